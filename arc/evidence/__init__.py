"""What the demonstrations of a task prove before any training; nobody outside names a module in here.

- `EvidenceStore.get(task)` gives a task's `TaskQueries`, whose `held_out` and `test` give one `QueryEvidence` a query.
  `NoEvidence` stands in for it where there shall be none.
- `QueryEvidence`: a predicted size, a code for every table and output cell, every table's record; `vote` and `dissent`
  answer from them. `augment_evidence` turns and recolours them.
- The test output of a task is never read, and the output of a held-out demonstration enters none of its answers.
"""

from arc.evidence.counting import feedback_indices
from arc.evidence.sizes import NUM_RULES
from arc.evidence.sources import NUM_SOURCES
from arc.evidence.store import EvidenceStore, NoEvidence, TaskQueries
from arc.evidence.tables import NUM_TABLES
from arc.evidence.vote import CLASS_WEIGHTS, SURE, QueryEvidence, augment_evidence

__all__ = [
    "CLASS_WEIGHTS",
    "NUM_RULES",
    "NUM_SOURCES",
    "NUM_TABLES",
    "SURE",
    "EvidenceStore",
    "NoEvidence",
    "QueryEvidence",
    "TaskQueries",
    "augment_evidence",
    "feedback_indices",
]
