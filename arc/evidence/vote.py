"""What comes out of the evidence for one query, and the answers it gives without any training.

A *code* is colour + 10 * class: what a table says about an output cell, and how far it is to be trusted there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from arc.augment import Augmentation, apply_dihedral, dihedral_shape
from arc.evidence.tables import NUM_HASHED_TABLES, NUM_TABLES

UNSEEN, MIXED, PURE, SURE = range(4)  # classes of a code; SURE: one outcome only, sighted at least SURE_SIGHTINGS times
SURE_SIGHTINGS = 3
CLASS_WEIGHTS = np.array([0.0, 0.01, 0.5, 1.0], np.float32)  # how much a vote of each class counts

_KIND_WEIGHTS = np.ones(NUM_TABLES, np.float32)
_KIND_WEIGHTS[NUM_HASHED_TABLES:] = (10.0, 3.0, 1.0)  # of the program tables


def classes_of(most: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Class of each context from the count of its commonest outcome and of all its sightings: uint8, any shape."""
    known = np.where(most < seen, np.uint8(MIXED), np.where(seen < SURE_SIGHTINGS, np.uint8(PURE), np.uint8(SURE)))
    return np.where(seen == 0, np.uint8(UNSEEN), known)


def table_weights(stats: np.ndarray) -> np.ndarray:
    """Vote weight of each table from its held-out statistics (T, 3); constants chosen on the development split."""
    accuracy, coverage, exact = stats[:, 0], stats[:, 1], stats[:, 2]
    weight = coverage**2 * (10 * exact**4 + 3 * (exact == 1) + np.exp(100 * (accuracy - 1))) + 1e-6
    return (weight * _KIND_WEIGHTS).astype(np.float32)


@dataclass(frozen=True, eq=False)
class QueryEvidence:
    """Everything the demonstrations say about one query: arrays described in the field comments."""

    size: tuple[int, int]  # predicted output (h, w)
    rule_sizes: np.ndarray  # (R, 2) uint8: what each size rule says, 0 where silent
    rule_features: np.ndarray  # (R, 2) float32: fraction of usable demonstrations consistent with the rule, all of them
    rule_logits: np.ndarray  # (R,) float32: score of the rule in the choice of `size`, -inf where it does not apply
    codes: np.ndarray  # (T, h, w) uint8: colour + 10 * class for each table and output cell
    table_stats: np.ndarray  # (T, 3) float32: held-out accuracy where seen, coverage, share of pairs exactly right
    room: tuple[int, int] = (1, 1)  # rows and columns that the canvas has at least, where `size` decides nothing
    silent: bool = False  # nothing is said: no table, no size rule, no record

    def weights(self) -> np.ndarray:
        """(T,) float32: vote weight of each table for this query, times `CLASS_WEIGHTS` of a cell's class."""
        complete = (self.codes >= 10 * PURE).mean((1, 2))  # (T,) share of cells where the table has one answer only
        return (table_weights(self.table_stats) * complete**4).astype(np.float32)

    def vote(self) -> tuple[np.ndarray, np.ndarray]:
        """Training-free answer: the (h, w) uint8 grid with most votes and the votes (10, h, w) float32."""
        colour, share = self.codes % 10, CLASS_WEIGHTS[self.codes // 10] * self.weights()[:, None, None]
        votes = np.zeros((10, *self.size), np.float32)
        for c in range(10):
            votes[c] = (share * (colour == c)).sum(0)
        return votes.argmax(0).astype(np.uint8), votes

    def dissent(self, answer: np.ndarray) -> np.ndarray | None:
        """The best other answer than `answer` (h, w) that tables give as a whole grid: of those with something to say
        about every cell, equal grids' weights added up. None if they all agree.

        Not the second choice cell by cell: a table that is right in every cell but outvoted keeps its cells together.
        """
        tables = len(self.codes)
        colour = (self.codes % 10).reshape(tables, -1)
        differs = (self.codes >= 10).all((1, 2)) & (colour != answer.reshape(-1)).any(1)
        if not differs.any():
            return None
        grids, which = np.unique(colour[differs], axis=0, return_inverse=True)
        totals = np.bincount(which.reshape(-1), weights=self.weights()[differs])
        return grids[totals.argmax()].reshape(answer.shape).astype(np.uint8)


def augment_evidence(evidence: QueryEvidence, augmentation: Augmentation) -> QueryEvidence:
    """The evidence as it looks when task and query are seen under `augmentation`.

    Evidence is computed once, on the grids as they are; its predictions turn and change colour with them. The codes of
    class 0 ("unseen") carry no colour and stay 0.
    """
    table = np.arange(40, dtype=np.uint8)
    for confidence in (MIXED, PURE, SURE):
        table[10 * confidence : 10 * confidence + 10] = 10 * confidence + np.asarray(augmentation.colours, np.uint8)
    transposed = dihedral_shape(1, 2, augmentation.dihedral) == (2, 1)
    codes = apply_dihedral(evidence.codes if evidence.silent else table[evidence.codes], augmentation.dihedral)
    return dataclasses.replace(
        evidence,
        codes=np.ascontiguousarray(codes),
        size=(int(codes.shape[-2]), int(codes.shape[-1])),
        rule_sizes=evidence.rule_sizes[:, ::-1] if transposed else evidence.rule_sizes,
        room=evidence.room[::-1] if transposed else evidence.room,
    )
