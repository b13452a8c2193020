"""Labels and what makes them equal: a union-find over integers, with locks and with labels that are pairs.

It knows no dimension and no operator. There is no Python loop over labels: every call works on whole arrays.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

LabelArray: TypeAlias = npt.NDArray[np.int64]

FIXED = "it is a fixed size"
LOCKED = 0
PAIRED = -1
NO_PAIR = -1
DEEPEST_PAIR = 24


class Unions:
    """A vectorised union-find over labels, with locks and pairs.

    Example:
        >>> unions = Unions()
        >>> a, b = unions.new(3), unions.new(3)
        >>> unions.join(a, b)
        >>> bool((unions.find(a) == unions.find(b)).all())
        True
    """

    def __init__(self) -> None:
        self._parent: LabelArray = np.zeros(1024, np.int64)
        self._first: LabelArray = np.full(1024, NO_PAIR, np.int64)
        self._second: LabelArray = np.full(1024, NO_PAIR, np.int64)
        self._why: LabelArray = np.zeros(1024, np.int64)
        self._count = 1
        self._has_pairs = False
        self._why[LOCKED] = 1
        self.reasons: list[tuple[str, str]] = [("", ""), (FIXED, "")]

    def __len__(self) -> int:
        return self._count

    def new(self, count: int) -> LabelArray:
        """Fresh, distinct labels: an array of length ``count``."""
        start, end = self._count, self._count + count
        if end > len(self._parent):
            room = max(end, 2 * len(self._parent)) - len(self._parent)
            self._parent = np.concatenate([self._parent, np.zeros(room, np.int64)])
            self._first = np.concatenate([self._first, np.full(room, NO_PAIR, np.int64)])
            self._second = np.concatenate([self._second, np.full(room, NO_PAIR, np.int64)])
            self._why = np.concatenate([self._why, np.zeros(room, np.int64)])
        fresh = np.arange(start, end, dtype=np.int64)
        self._parent[start:end] = fresh
        self._count = end
        return fresh

    def find(self, labels: LabelArray) -> LabelArray:
        """The representative of each label; same shape as ``labels``."""
        roots = self._parent[labels]
        above = self._parent[roots]
        if equal(above, roots):
            return roots
        while not equal(above, roots):
            roots, above = above, self._parent[above]
        self._parent[labels] = roots
        return roots

    def lock_labels(self, labels: LabelArray, reason: int) -> None:
        """Lock single labels, for the reason of that number; pairs lock both halves."""
        pending = [labels]
        while pending:
            roots = self.find(pending.pop())
            roots = roots[self._why[roots] == 0]
            if not roots.size:
                continue
            self._why[roots] = reason
            paired = roots[self._first[roots] != NO_PAIR]
            if paired.size:
                pending += [self._first[paired], self._second[paired]]

    def why(self, labels: LabelArray) -> LabelArray:
        """For each label the number of a reason that locks it (see ``reasons``), 0 where it is free.

        A pair is locked where both halves are.
        """
        roots = self.find(labels)
        found, latest = self._why[roots], np.zeros(len(roots), np.int64)
        for _ in range(DEEPEST_PAIR):
            paired = (found == 0) & (self._first[roots] != NO_PAIR)
            if not np.count_nonzero(paired):
                break
            first, second = self.find(self._first[roots[paired]]), self.find(self._second[roots[paired]])
            closed = self._why[first] > 0
            open_half = np.where(closed, second, first)
            halves = np.maximum(self._why[first], self._why[second])
            latest[paired] = np.maximum(latest[paired], halves)
            found[paired] = np.where(closed & (self._why[second] > 0), latest[paired], 0)
            roots = roots.copy()
            roots[paired] = open_half
        return found

    def join(self, a: LabelArray, b: LabelArray) -> None:
        """Make ``a[i]`` and ``b[i]`` one label, for every ``i``; pairs are joined half by half."""
        pending = [(a, b)]
        while pending:
            a, b = pending.pop()
            merged = self._hook(a, b)
            if not merged.size:
                continue
            reasons = self._why[merged]
            if np.count_nonzero(reasons):
                np.maximum.at(self._why, self.find(merged), reasons)
            if self._has_pairs:
                pending += self._halves_to_join(merged)

    def _halves_to_join(self, merged: LabelArray) -> list[tuple[LabelArray, LabelArray]]:
        """The halves of the pairs among labels that ceased to be roots, and those that they now meet."""
        roots = self.find(merged)
        pending = []
        paired = self._first[merged] != NO_PAIR
        if np.count_nonzero(paired):
            old, new = merged[paired], roots[paired]
            first, second = self._first[old], self._second[old]
            empty = self._first[new] == NO_PAIR
            self._first[new[empty]], self._second[new[empty]] = first[empty], second[empty]
            pending = [(self._first[new], first), (self._second[new], second)]
        both = roots[(self._why[roots] > 0) & (self._first[roots] != NO_PAIR)]
        for root in both:  # locks reach into pairs; rare
            self.lock_labels(np.array([self._first[root], self._second[root]]), int(self._why[root]))
        return pending

    def _hook(self, a: LabelArray, b: LabelArray) -> LabelArray:
        """Hang larger roots below smaller ones until all pairs agree; the labels that ceased to be roots.

        One label may be named several times.
        """
        gone: list[LabelArray] = []
        while True:
            ra, rb = self.find(a), self.find(b)
            differ = ra != rb
            count = np.count_nonzero(differ)  # `any` and `all` of short arrays take several times as long
            if not count:
                return np.concatenate(gone) if gone else np.empty(0, np.int64)
            a, b = (ra, rb) if count == len(differ) else (ra[differ], rb[differ])
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)
            gone.append(high)
            if equal(self._parent[high], low):  # as nearly always: no label met two others
                return np.concatenate(gone) if len(gone) > 1 else high

    def _pair(self, first: LabelArray, second: LabelArray) -> LabelArray:
        self._has_pairs = True
        pairs = self.new(len(first))
        self._first[pairs], self._second[pairs] = first, second
        return pairs

    def atoms(self) -> LabelArray:
        """What every label stands for now: a single free label, `LOCKED`, or `PAIRED` where it is a pair.

        One look-up in this table resolves a dimension, unless it has several factors or meets a pair.
        """
        roots = self.find(np.arange(self._count))
        single = np.where(self._first[roots] == NO_PAIR, roots, PAIRED)
        return np.where(self._why[roots] == 0, single, LOCKED)


def equal(a: LabelArray, b: LabelArray) -> bool:
    """Whether two arrays of one shape hold the same; for short ones several times quicker than numpy's."""
    return a.tobytes() == b.tobytes()
