"""Packing against brute force and against the promises that the docstrings make."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.train.packing import (
    ALGORITHMS,
    best_fit_decreasing,
    check_lengths,
    cost_balanced,
    first_fit_decreasing,
    lower_bound,
    next_fit,
    pack_loads,
    radix_argsort,
    rows_by_pack,
)  # fmt: skip

cases = st.integers(1, 70).flatmap(
    lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=60))
)


def brute(lengths, capacity, rule):
    """Ten-line bin packing: ``rule`` picks among the packs that fit."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if not fits:
            rooms.append(capacity - length)
        else:
            rooms[rule(fits, rooms)] -= length
    return sorted(capacity - room for room in rooms)


@given(cases)
@settings(max_examples=300, deadline=None)
def test_every_algorithm_packs_every_row_within_capacity(case):
    capacity, lengths = case
    for name, pack in ALGORITHMS.items():
        packs = pack(lengths, capacity)
        assert packs.shape == (len(lengths),), name
        assert set(packs.tolist()) == set(range(int(packs.max()) + 1)), f"{name} leaves gaps in the numbering"
        loads = pack_loads(lengths, packs)
        assert loads.max() <= capacity and loads.sum() == sum(lengths), name
        assert len(loads) >= lower_bound(lengths, capacity), name


@given(cases)
@settings(max_examples=300, deadline=None)
def test_decreasing_fits_equal_the_textbook_loops(case):
    capacity, lengths = case
    best = brute(lengths, capacity, lambda fits, rooms: min(fits, key=lambda i: rooms[i]))
    first = brute(lengths, capacity, lambda fits, rooms: fits[0])
    assert sorted(pack_loads(lengths, best_fit_decreasing(lengths, capacity)).tolist()) == best
    assert sorted(pack_loads(lengths, first_fit_decreasing(lengths, capacity)).tolist()) == first


def test_the_drawn_examples():
    lengths = [5, 4, 3, 6, 2]
    assert next_fit(lengths, 10).tolist() == [0, 0, 1, 1, 2]
    assert first_fit_decreasing(lengths, 10).tolist() == [1, 0, 1, 0, 1]
    assert best_fit_decreasing(lengths, 10).tolist() == [1, 0, 1, 0, 1]
    assert cost_balanced([6, 3, 3, 3, 2, 2, 1], 10, cost=lambda x: x**2).tolist() == [0, 1, 1, 1, 0, 0, 1]
    packs = best_fit_decreasing([6, 3, 3, 3, 2, 2, 1], 10)
    assert sorted(np.bincount(packs, [36, 9, 9, 9, 4, 4, 1])) == [26, 46]


@pytest.mark.parametrize("capacity", [64, 65, 2**16, 2**16 + 1])
def test_a_pack_may_be_exactly_full(capacity):
    half = capacity // 2
    for name, pack in ALGORITHMS.items():
        packs = pack([capacity, half, capacity - half], capacity)
        assert pack_loads([capacity, half, capacity - half], packs).tolist() == [capacity, capacity], name


def test_no_rows_is_no_pack():
    for pack in ALGORITHMS.values():
        assert pack(np.array([], dtype=int), 10).size == 0


@pytest.mark.parametrize(
    "lengths, capacity, message",
    [([3, 11], 10, "row 1 has 11 tokens"), ([0, 3], 10, "row 0 has 0 tokens"), ([1.5], 10, "whole numbers"),
     ([[1]], 10, "one-dimensional"), ([1], 0, "capacity must be"), ([1], 1.5, "capacity must be"), ([1], True, "capacity must be"),
     ([float("nan")], 10, "whole numbers"), ([-4], 10, "row 0 has -4 tokens"), ([2**40], 2**31, "row 0 has 1099511627776 tokens"),
     ([True], 10, "whole numbers"), (["5"], 10, "whole numbers"), ([3, float("nan"), 4.0], 10, r"\(row 0 is 3\.0\)"),
     ([3, None], 10, r"\(row 1 is None\)"), ([2**64], 10, "a number is too large"), ([[1, 2], [3]], 10, "a number of tokens for each row"),
     (None, 10, "of a NoneType"), ([3], float("nan"), "capacity must be a whole number >= 1, got nan"), ([3], None, "capacity .* got None"),
     ([3], float("inf"), "capacity .* got inf"), ([3], "10", "capacity .* got '10'"), ([3], [10], r"capacity .* got \[10\]"),
     ([3], np.True_, "capacity must be")],
)  # fmt: skip
def test_bad_input_is_named(lengths, capacity, message):
    with pytest.raises(ValueError, match=message):
        check_lengths(lengths, capacity)
    for pack in ALGORITHMS.values():
        with pytest.raises(ValueError, match=message):
            pack(lengths, capacity)


def test_a_cost_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="one finite number a row"):
        cost_balanced([1, 2], 5, cost=lambda x: np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="one finite number a row"):
        cost_balanced([1, 2], 5, cost=lambda x: 3.0)
    for wrong in ({"tail": 1.5}, {"tail": -0.1}, {"tail": float("nan")}, {"slack": -1}):
        with pytest.raises(ValueError, match="tail is a share"):
            cost_balanced([1, 2], 5, **wrong)


@given(st.lists(st.integers(0, 9), max_size=40))
def test_rows_of_each_pack(packs):
    packs = np.unique(packs, return_inverse=True)[1]  # numbered without gaps
    assert [m.tolist() for m in rows_by_pack(packs)] == [[i for i, p in enumerate(packs) if p == k] for k in sorted(set(packs.tolist()))]


def test_lengths_may_be_of_any_whole_type():
    """Small and unsigned types must not overflow in differences, sums or masks."""
    lengths = np.random.default_rng(0).integers(1, 120, 300)
    for name, pack in ALGORITHMS.items():
        wanted = pack(lengths, 127).tolist()
        for kind in (np.int8, np.uint8, np.uint16, np.int32, np.uint64):
            assert pack(lengths.astype(kind), 127).tolist() == wanted, (name, kind)
    for kind in (np.uint8, np.int8, np.uint16):
        assert radix_argsort(lengths.astype(kind)).tolist() == np.argsort(lengths, kind="stable").tolist()
    assert pack_loads([], []).tolist() == [] and pack_loads(np.full(40_000, 65_536), np.zeros(40_000, int)).tolist() == [40_000 * 65_536]


def test_more_than_two_to_the_31_tokens():
    lengths = np.full(40_000, 65_536)
    lengths[::2] = 65_535
    for name, pack in ALGORITHMS.items():
        assert int(pack(lengths, 65_536).max()) + 1 == 40_000 == lower_bound(lengths, 65_536), name


@given(cases, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_loads_do_not_depend_on_the_order_of_rows(case, random):
    capacity, lengths = case
    shuffled = list(lengths)
    random.shuffle(shuffled)
    for name, pack in ALGORITHMS.items():
        if name != "next_fit":
            loads = [sorted(pack_loads(x, pack(x, capacity)).tolist()) for x in (lengths, shuffled)]
            assert loads[0] == loads[1], name


@given(cases)
@settings(max_examples=200, deadline=None)
def test_cost_balanced_needs_hardly_more_packs_and_loses_no_row(case):
    capacity, lengths = case
    fewest = best_fit_decreasing(lengths, capacity).max() + 1
    assert cost_balanced(lengths, capacity).max() + 1 <= 1.005 * fewest
    assert cost_balanced(lengths, capacity, cost=lambda x: np.ones(len(x)), tail=0).max() + 1 <= 1.005 * fewest


def optimum(lengths, capacity):
    """Fewest packs by trying every partition (restricted growth strings), for tiny cases."""
    best = len(lengths)

    def place(i, loads):
        nonlocal best
        if len(loads) >= best:
            return
        if i == len(lengths):
            best = len(loads)
            return
        for k in range(len(loads)):
            if loads[k] + lengths[i] <= capacity:
                place(i + 1, [*loads[:k], loads[k] + lengths[i], *loads[k + 1 :]])
        place(i + 1, [*loads, lengths[i]])

    place(0, [])
    return best


def test_gap_to_the_optimum_on_tiny_cases():
    """The known bound 11/9 OPT + 6/9 for first and best fit decreasing (Dosa 2007), and how often they are optimal."""
    rng, optimal = np.random.default_rng(0), 0
    for _ in range(150):
        capacity = int(rng.integers(8, 30))
        lengths = rng.integers(1, capacity + 1, 8).tolist()
        best = optimum(lengths, capacity)
        assert lower_bound(lengths, capacity) <= best
        for name in ("first_fit_decreasing", "best_fit_decreasing", "cost_balanced"):
            used = int(ALGORITHMS[name](lengths, capacity).max()) + 1
            assert best <= used <= 11 / 9 * best + 6 / 9, name
        optimal += used == best
    assert optimal >= 140
    assert lower_bound([2**62] * 4, 2**62) == 4 and lower_bound([2**62] * 4, 2**62 + 1) == 4 and lower_bound([5] * 4, 10) == 2


def test_cost_balanced_levels_costs_and_rows_of_the_long_tail_mix():
    rng = np.random.default_rng(0)
    short = np.clip(np.exp(rng.normal(6.6, 1.0, 5000)), 16, 8192).astype(int)
    lengths = np.where(rng.random(5000) < 0.1, rng.integers(8192, 65537, 5000), short)
    spread = {}
    for name in ("best_fit_decreasing", "cost_balanced"):
        packs = ALGORITHMS[name](lengths, 65_536)
        for what, values in (("cost", lengths.astype(float) ** 2), ("rows", np.ones(5000))):
            of_pack = np.bincount(packs, values)
            spread[name, what] = of_pack.std() / of_pack.mean()
    assert spread["cost_balanced", "cost"] < 0.85 * spread["best_fit_decreasing", "cost"]
    assert spread["cost_balanced", "rows"] < 0.3 * spread["best_fit_decreasing", "rows"]


@given(cases, st.lists(st.integers(0, 70), max_size=8))
@settings(max_examples=200, deadline=None)
def test_best_fit_into_packs_that_are_open_already(case, rooms):
    capacity, lengths = case
    rooms = [min(r, capacity) for r in rooms]
    left = list(rooms)
    for length in sorted(lengths, reverse=True):
        fits = [k for k, room in enumerate(left) if room >= length]
        if fits:
            left[min(fits, key=lambda k: left[k])] -= length
        else:
            left.append(capacity - length)
    packs = best_fit_decreasing(lengths, capacity, rooms)
    got = [*rooms, *[capacity] * (len(left) - len(rooms))] - pack_loads([*lengths, *[0] * len(left)], [*packs, *range(len(left))])
    assert sorted(got) == sorted(left)
    with pytest.raises(ValueError, match=r"rooms\[0\] is -1"):
        best_fit_decreasing(lengths, capacity, [-1])


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=50))
def test_radix_sort_is_a_stable_sort(keys):
    assert radix_argsort(keys).tolist() == np.argsort(keys, kind="stable").tolist()


@pytest.mark.parametrize("capacity", [2**20 + 1, 2**31 + 7, 2**40])
def test_large_capacities(capacity):
    lengths = [capacity, capacity - 5, 3, 2, 1, capacity // 2, capacity - capacity // 2]
    for name, pack in ALGORITHMS.items():
        assert pack_loads(lengths, pack(lengths, capacity)).max() == capacity, name
    with_odd = [capacity] * 3 + [1]
    assert best_fit_decreasing(with_odd, capacity).max() + 1 == 4 == lower_bound(with_odd, capacity)


def test_the_file_can_be_copied_into_an_empty_project(tmp_path, monkeypatch):
    """NumPy is all it needs: run from a copy with every other package out of reach."""
    import longalign_lib.train.packing as original

    copied = tmp_path / "packing_copy.py"
    copied.write_text(Path(original.__file__).read_text(encoding="utf8"), encoding="utf8")

    class OnlyNumPy:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("longalign_lib", "pandas", "torch", "scipy", "transformers"):
                raise ImportError(name)

    for name in [m for m in sys.modules if m.split(".")[0] in ("longalign_lib", "pandas", "torch", "scipy", "transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [OnlyNumPy(), *sys.meta_path])
    copy = runpy.run_path(str(copied))
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    for name, pack in ALGORITHMS.items():
        assert copy[name](lengths, 100).tolist() == pack(lengths, 100).tolist()


def test_what_the_published_packer_got_wrong():
    """A full-length row, a pack filled exactly, and the last open pack: none may be lost, none may count as short."""
    lengths = [65_536, 65_535, 1, 32_768, 32_768, 7]
    for name, pack in ALGORITHMS.items():
        loads = pack_loads(lengths, pack(lengths, 65_536)).tolist()
        assert loads.count(65_536) == 3 and sum(loads) == sum(lengths), name
        assert len(loads) == 4 and min(loads) == 7, f"{name}: the last pack is missing"
