"""The label algebra against a union-find without cleverness, and its laws."""

from __future__ import annotations

from itertools import chain, combinations
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.graph.labels import Dim, Labels
from secateurs.graph.unions import LOCKED

SIZE = 6
quick = settings(max_examples=60, deadline=None)


class NaiveUnionFind:
    """Sets of labels in a list; a set that contains 'locked' is locked."""

    def __init__(self) -> None:
        self.sets: list[set[object]] = []

    def _of(self, label: object) -> set[object]:
        for known in self.sets:
            if label in known:
                return known
        self.sets.append({label})
        return self.sets[-1]

    def join(self, a: object, b: object) -> None:
        one, other = self._of(a), self._of(b)
        if one is not other:
            self.sets.remove(other)
            one |= other

    def same(self, a: object, b: object) -> bool:
        return b in self._of(a)


def atoms(labels: Labels, dim: Dim) -> set[int]:
    """Every free label that can remove an index of a dimension."""
    factors = labels.resolve(dim).factors
    return set(np.concatenate(factors).tolist()) - {LOCKED} if factors else set()


def removed(labels: Labels, dim: Dim, gone: set[int]) -> list[bool]:
    """Which indices go when the given labels go."""
    mask = np.zeros(dim.size, bool)
    for factor in labels.resolve(dim).factors:
        mask |= np.isin(factor, list(gone))
    return mask.tolist()


def subsets(items: set[int]) -> list[set[int]]:
    ordered = sorted(items)
    return [set(s) for s in chain.from_iterable(combinations(ordered, n) for n in range(len(ordered) + 1))]


steps = st.lists(
    st.tuples(
        st.sampled_from(["unify", "lock", "shift", "reverse", "take"]), st.integers(0, 3), st.integers(0, 3)
    ),
    max_size=12,
)


@quick
@given(steps)
def test_random_joins_and_locks_give_the_partition_of_the_naive_union_find(
    program: list[tuple[str, int, int]],
) -> None:
    labels, naive = Labels(), NaiveUnionFind()
    dims = [labels.fresh(SIZE) for _ in range(4)]
    for operation, i, j in program:
        a, b = dims[i], dims[j]
        if operation == "lock":
            labels.lock(a, "because")
            pairs = [(int(x), "locked") for x in a.factors[0]]
        elif operation == "take":
            labels.unify(labels.take(a, slice(0, 3)), labels.take(b, slice(3, 6)))
            pairs = list(zip(a.factors[0][:3].tolist(), b.factors[0][3:].tolist(), strict=True))
        else:
            order = {
                "unify": np.arange(SIZE),
                "shift": np.roll(np.arange(SIZE), 1),
                "reverse": np.arange(SIZE)[::-1],
            }
            other = labels.take(b, order[operation])
            labels.unify(a, other)
            pairs = list(zip(a.factors[0].tolist(), other.factors[0].tolist(), strict=True))
        for one, two in pairs:
            naive.join(one, two)
    flat = np.concatenate([dim.factors[0] for dim in dims])
    roots = labels.find(flat)
    for x in range(len(flat)):
        assert (labels.why(flat[x : x + 1])[0] > 0) == naive.same(int(flat[x]), "locked")
        for y in range(x):
            together = naive.same(int(flat[x]), int(flat[y]))
            both_locked = naive.same(int(flat[x]), "locked") and naive.same(int(flat[y]), "locked")
            assert (roots[x] == roots[y]) == together or both_locked


@quick
@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 4))
def test_split_undoes_merge(a: int, b: int, c: int) -> None:
    labels = Labels()
    dims = [labels.fresh(size) for size in (a, b, c)]
    again = labels.split(labels.merge(dims), [a, b, c])
    assert [dim.size for dim in again] == [a, b, c]
    for old, new in zip(dims, again, strict=True):
        assert atoms(labels, old) == atoms(labels, new)
        for gone in ({label} for label in atoms(labels, old)):
            assert removed(labels, old, gone) == removed(labels, new, gone)


@quick
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_merge_undoes_split(sizes: list[int]) -> None:
    labels = Labels()
    dim = labels.fresh(prod(sizes))
    parts = labels.split(dim, sizes)
    merged = labels.merge(parts)
    assert merged.size == dim.size
    assert atoms(labels, merged) == atoms(labels, dim)
    for label in atoms(labels, dim):
        assert removed(labels, merged, {label}) == removed(labels, dim, {label})


@quick
@given(st.integers(2, 4), st.integers(2, 4), st.integers(2, 4))
def test_split_at_once_is_split_in_two_goes(a: int, b: int, c: int) -> None:
    once, twice = Labels(), Labels()
    dim1, dim2 = once.fresh(a * b * c), twice.fresh(a * b * c)
    parts1 = once.split(dim1, [a, b, c])
    left, right = twice.split(dim2, [a, b * c])
    parts2 = [left, *twice.split(right, [b, c])]
    assert len(atoms(once, dim1)) == len(atoms(twice, dim2)) == a + b + c
    assert [len(atoms(once, p)) for p in parts1] == [len(atoms(twice, p)) for p in parts2] == [a, b, c]


def test_a_dimension_splits_into_rows_and_columns_that_remove_whole_stripes() -> None:
    labels = Labels()
    dim = labels.fresh(6)
    rows, columns = labels.split(dim, [2, 3])
    second_row = {int(labels.find(rows.factors[0])[1])}
    first_column = {int(labels.find(columns.factors[0])[0])}
    assert removed(labels, dim, second_row) == [False, False, False, True, True, True]
    assert removed(labels, dim, first_column) == [True, False, False, True, False, False]


def test_flattened_channels_keep_their_labels_when_split_again() -> None:
    labels = Labels()
    channels = labels.fresh(5)
    flat = labels.merge([channels, Dim(49)])
    again, pixels = labels.split(flat, [5, 49])
    assert np.array_equal(labels.find(again.factors[0]), labels.find(channels.factors[0]))
    assert pixels.is_locked


@quick
@given(
    st.lists(st.sampled_from([(2, 6), (6, 2), (3, 4), (4, 3), (2, 3, 2), (2, 2, 3)]), min_size=1, max_size=3)
)
def test_every_cut_that_the_labels_allow_fits_every_view(views: list[tuple[int, ...]]) -> None:
    """Soundness by brute force: what remains is a full grid along the axes of every view."""
    labels = Labels()
    dim = labels.fresh(12)
    for view in views:
        labels.split(dim, view)
    free = atoms(labels, dim)
    for gone in subsets(free) if len(free) < 9 else [{label} for label in free]:
        kept = ~np.array(removed(labels, dim, gone))
        for view in views:
            grid = kept.reshape(view)
            lines = [
                grid.any(axis=tuple(a for a in range(grid.ndim) if a != axis)) for axis in range(grid.ndim)
            ]
            full = np.ones(view, bool)
            for axis, line in enumerate(lines):
                full &= line.reshape([-1 if a == axis else 1 for a in range(grid.ndim)])
            assert np.array_equal(grid, full), (views, gone)


@quick
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_concatenate_then_take_gives_the_parts_back(sizes: list[int]) -> None:
    labels = Labels()
    dims = [labels.fresh(size) for size in sizes]
    whole = labels.concatenate(dims)
    assert whole.size == sum(sizes)
    start = 0
    for dim in dims:
        part = labels.take(whole, slice(start, start + dim.size))
        assert part.size == dim.size
        assert atoms(labels, part) == atoms(labels, dim)
        start += dim.size


def test_concatenate_keeps_every_factor_of_parts_with_several() -> None:
    labels = Labels()
    rows, columns, plain = labels.fresh(2), labels.fresh(3), labels.fresh(4)
    grid = labels.merge([rows, columns])
    whole = labels.concatenate([plain, grid, Dim(2)])
    for label in atoms(labels, grid):
        expected = [False] * 4 + removed(labels, grid, {label}) + [False] * 2
        assert removed(labels, whole, {label}) == expected


@quick
@given(st.lists(st.integers(0, 5), min_size=2, max_size=8))
def test_take_picks_labels_in_order(places: list[int]) -> None:
    labels = Labels()
    dim = labels.fresh(6)
    taken = labels.take(dim, np.array(places))
    assert taken.factors[0].tolist() == [int(dim.factors[0][place]) for place in places]


@pytest.mark.parametrize("lock_first", [True, False])
def test_a_lock_reaches_all_that_is_equal_with_its_reason(lock_first: bool) -> None:
    labels = Labels()
    a, b, c = (labels.fresh(4) for _ in range(3))
    actions = [lambda: labels.unify(a, b), lambda: labels.lock(b, "it is an output", "net.py:3")]
    for action in reversed(actions) if lock_first else actions:
        action()
    numbers = labels.why(a.factors[0])
    assert [labels.reasons[int(n)] for n in numbers] == [("it is an output", "net.py:3")] * 4
    assert labels.resolve(a).factors == ()
    assert not labels.why(c.factors[0]).any()


def test_the_first_reason_is_kept() -> None:
    labels = Labels()
    dim = labels.fresh(3)
    labels.lock(dim, "first")
    labels.lock(dim, "second")
    assert {labels.reasons[int(n)][0] for n in labels.why(dim.factors[0])} == {"first"}


def test_locking_one_index_leaves_the_others_free() -> None:
    labels = Labels()
    dim = labels.fresh(4)
    labels.lock(labels.take(dim, np.array([1, 2])), "two of them")
    assert removed(labels, dim, atoms(labels, dim)) == [True, False, False, True]


@pytest.mark.parametrize("split_first", [True, False])
def test_locking_a_split_dimension_locks_both_axes(split_first: bool) -> None:
    labels = Labels()
    dim = labels.fresh(6)
    if split_first:
        rows, columns = labels.split(dim, [2, 3])
        labels.lock(dim, "all of it")
    else:
        labels.lock(dim, "all of it")
        rows, columns = labels.split(dim, [2, 3])
    assert atoms(labels, dim) == atoms(labels, rows) == atoms(labels, columns) == set()


def test_locking_one_axis_leaves_the_other() -> None:
    labels = Labels()
    dim = labels.fresh(6)
    rows, columns = labels.split(dim, [2, 3])
    labels.lock(rows, "halves")
    assert atoms(labels, dim) == atoms(labels, columns)
    assert len(atoms(labels, dim)) == 3


def test_unifying_with_a_fixed_dimension_locks() -> None:
    labels = Labels()
    dim = labels.fresh(3)
    labels.unify(dim, Dim(3))
    assert atoms(labels, dim) == set()
    assert labels.reasons[int(labels.why(dim.factors[0])[0])][0] == "it is a fixed size"


def test_unifying_two_split_dimensions_unifies_their_axes() -> None:
    labels = Labels()
    one, other = labels.fresh(6), labels.fresh(6)
    rows, columns = labels.split(one, [2, 3])
    labels.unify(one, other)
    assert atoms(labels, other) == atoms(labels, rows) | atoms(labels, columns)
    again = labels.split(other, [2, 3])
    assert atoms(labels, again[0]) == atoms(labels, rows)
    assert atoms(labels, again[1]) == atoms(labels, columns)


@pytest.mark.parametrize("extra_first", [False, True])
def test_what_one_of_two_equal_dimensions_has_besides_is_locked(extra_first: bool) -> None:
    labels = Labels()
    samples, heads = labels.fresh(2), labels.fresh(3)
    many, few = labels.merge([samples, heads]), labels.merge([Dim(2), heads])
    labels.unify(*((many, few) if extra_first else (few, many)))
    assert atoms(labels, many) == atoms(labels, few) == atoms(labels, heads)
    assert len(atoms(labels, heads)) == 3
    assert not atoms(labels, samples)
    assert all("contradicts" not in reason for reason, _ in labels.reasons)


def test_lengths_that_differ_are_refused() -> None:
    labels = Labels()
    with pytest.raises(ValueError, match="lengths 3 and 4"):
        labels.unify(labels.fresh(3), labels.fresh(4))
    with pytest.raises(ValueError, match="length 6 into"):
        labels.split(labels.fresh(6), [4, 2, 2])


def test_a_dimension_of_length_one_is_locked_from_the_start() -> None:
    labels = Labels()
    assert labels.fresh(1).is_locked
    assert not labels.fresh(2).is_locked


def test_a_million_labels_take_no_python_loop() -> None:
    labels = Labels()
    dims = [labels.fresh(250_000) for _ in range(4)]
    for dim in dims[1:]:
        labels.unify(dims[0], labels.take(dim, np.arange(dim.size)[::-1]))
    assert np.array_equal(labels.find(dims[1].factors[0]), labels.find(dims[2].factors[0]))
    assert len(labels) == 1_000_001


def test_layouts_that_contradict_each_other_are_locked_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, expand = [], Labels._expand

    def counted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 20_000:
            raise RecursionError("each call makes two more, 24 levels deep")
        expand(*arguments)

    monkeypatch.setattr(Labels, "_expand", counted)
    labels = Labels()
    dim = labels.fresh(6)
    rows, columns = labels.split(dim, [2, 3])
    shuffled = labels.merge([columns, rows])
    for part in labels.split(dim, [3, 2]):
        labels.unify(part, labels.fresh(part.size))
    for _ in range(2):
        labels.unify(dim, shuffled)
    free = atoms(labels, dim)
    assert removed(labels, dim, free) in ([False] * 6, [True] * 6)


def test_joining_several_at_once_is_joining_them_one_by_one() -> None:
    """Plain dimensions, one that was split, one that is fixed and one that meets itself."""
    kept: list[Labels] = []
    for at_once in (True, False):
        labels = Labels()
        dim, plain, twin, split = (labels.fresh(SIZE) for _ in range(4))
        labels.split(split, [2, 3])
        others = [plain, twin, split, plain, dim]
        if at_once:
            labels.unify_all(dim, others)
        else:
            for other in others:
                labels.unify(dim, other)
        assert [len(labels.resolve(each).factors) for each in (dim, plain, twin)] == [2, 2, 2]
        labels.unify_all(twin, [Dim(SIZE)])
        assert not labels.resolve(plain).factors
        kept.append(labels)
    roots = [labels.find(np.arange(4 * SIZE)) for labels in kept]
    assert np.array_equal(roots[0], roots[1])


def test_pairs_that_are_nested_in_another_order_meet_atom_by_atom() -> None:
    labels = Labels()
    parts = [labels.fresh(size) for size in (3, 2, 4)]
    left, right = labels.fresh(24), labels.fresh(24)
    for dim, sizes in ((left, (6, 4)), (right, (3, 8))):  # ((a, b), c) and (a, (b, c))
        pair = labels.split(dim, sizes)
        whole = [labels.merge(parts[:2]), parts[2]] if sizes[0] == 6 else [parts[0], labels.merge(parts[1:])]
        for each, other in zip(pair, whole, strict=True):
            labels.unify(each, other)
    labels.unify_all(left, [right, labels.fresh(24)])
    assert all("contradicts" not in reason for reason, _ in labels.reasons)
    for dim in (left, right):
        assert sorted(len(set(factor.tolist())) for factor in labels.resolve(dim).factors) == [2, 3, 4]
