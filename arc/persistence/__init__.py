"""Checkpoints of a run folder; what is promised stands in model_persistence.py, the only module that imports this.

From the bottom up: `names` (names, limits, errors), `tree` (state to JSON and back), `files` (write, sync, hash),
`manifest` (a checkpoint folder and its verification), `lock` (one writer a run), `snapshot` (what a save takes from
the live state), `writer` (one save in flight), `folder` (how a checkpoint gets into the run folder), `retention` (the
best ones, rotation), `mirror` and `restore` (the backup, there and back), `runs` (finding and looking at runs),
`store` (ModelPersistence), `export` (weights for other programs). Nothing here knows models, flags or tasks.
"""
