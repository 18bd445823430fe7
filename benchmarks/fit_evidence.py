"""Fits the size rules' priors and the weights of their record, and writes `arc/evidence/size_priors.json`.

Fitted on the development split only: every demonstration of the ARC-AGI-2 training tasks that are not also in
ARC-AGI-1 evaluation, each held out from its task. Test pairs are not looked at.

    python benchmarks/fit_evidence.py [--tasks N] [--write]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arc.datasets import load_dataset  # noqa: E402
from arc.evidence.counting import TaskEvidence  # noqa: E402
from arc.evidence.sizes import PRIORS_FILE, SIZE_RULES  # noqa: E402
from arc.tasks import Task, drop_duplicates  # noqa: E402

FOLDS = 5


def development_tasks(limit: int | None) -> list[Task]:
    """ARC-AGI-2 training tasks that are not, by content, among the ARC-AGI-1 evaluation tasks."""
    kept, _ = drop_duplicates(load_dataset("arcagi2").training, load_dataset("arcagi1").evaluation)
    return list(kept)[:limit]


def collect(tasks: list[Task]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features (Q, R, 2), nan where silent; right (Q, R); task number (Q,)) of all held-out demonstrations."""
    features, right, owner = [], [], []
    for number, task in enumerate(tasks):
        evidence = TaskEvidence(task.train, [pair.input for pair in task.test])
        for index in range(evidence.n):
            query = evidence.query(held_out=index)
            silent = ~np.isfinite(query.rule_logits)
            features.append(np.where(silent[:, None], np.nan, query.rule_features))
            truth = np.array(evidence.outputs[index].shape, np.uint8)
            right.append((query.rule_sizes == truth).all(1) & ~silent)
            owner.append(number)
    return np.array(features, np.float64), np.array(right), np.array(owner)


def fit(
    features: np.ndarray, right: np.ndarray, steps: int = 400, decay: float = 3e-4
) -> tuple[np.ndarray, np.ndarray]:
    """Maximum likelihood of the true size under a softmax over the rules that speak, by Adam.

    Returns (prior (R,), weights (2,)).
    """
    live, x = np.isfinite(features[..., 0]), np.nan_to_num(features)
    usable = right.any(1)
    live, x, right = live[usable], x[usable], right[usable]
    parameters = np.concatenate([np.zeros(x.shape[1]), [3.0, 4.0]])
    first, second = np.zeros_like(parameters), np.zeros_like(parameters)
    for step in range(1, steps + 1):
        logits = np.where(live, parameters[:-2] + x @ parameters[-2:], -np.inf)
        share = np.exp(logits - logits.max(1, keepdims=True))
        wanted = np.where(right, share, 0)
        slope = share / share.sum(1, keepdims=True) - wanted / wanted.sum(1, keepdims=True)  # (Q, R)
        gradient = np.concatenate([slope.mean(0), np.einsum("qr,qrk->k", slope, x) / len(x)])
        gradient[:-2] += decay * parameters[:-2]
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        parameters -= 0.05 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
    return parameters[:-2], parameters[-2:]


def mass_on_truth(features: np.ndarray, right: np.ndarray, prior: np.ndarray, weights: np.ndarray) -> float:
    """Share of queries whose true size gets more than half of the rules' weight."""
    live = np.isfinite(features[..., 0])
    logits = np.where(live, prior + np.nan_to_num(features) @ weights, -np.inf)
    share = np.exp(logits - np.where(live.any(1), logits.max(1), 0)[:, None])
    return float((np.where(right, share, 0).sum(1) > share.sum(1) / 2).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=None, help="only the first N development tasks")
    parser.add_argument("--write", action="store_true", help=f"write {PRIORS_FILE.name}")
    args = parser.parse_args()
    features, right, owner = collect(development_tasks(args.tasks))
    held_out = 0.0
    for fold in range(FOLDS):
        test = owner % FOLDS == fold
        held_out += mass_on_truth(features[test], right[test], *fit(features[~test], right[~test])) * test.sum()
    unfitted = mass_on_truth(features, right, np.zeros(len(SIZE_RULES)), np.array([3.0, 4.0]))
    print(f"true size has the majority: priors 0 {unfitted:.4f}, fitted on other tasks {held_out / len(owner):.4f}")
    if args.write:
        prior, weights = fit(features, right)
        rules = {rule.name: round(float(p), 3) for rule, p in zip(SIZE_RULES, prior, strict=True)}
        content = {"fraction": round(float(weights[0]), 3), "all": round(float(weights[1]), 3), "rules": rules}
        PRIORS_FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"written: {PRIORS_FILE}")


if __name__ == "__main__":
    main()
