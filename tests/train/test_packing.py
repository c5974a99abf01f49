"""Packing against brute force and against the promises that the docstrings make."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.train.packing import (
    ALGORITHMS,
    best_fit_decreasing,
    check_lengths,
    first_fit_decreasing,
    lower_bound,
    next_fit,
    pack_loads,
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
     ([[1]], 10, "one-dimensional"), ([1], 0, "capacity must be")],
)  # fmt: skip
def test_bad_input_is_named(lengths, capacity, message):
    with pytest.raises(ValueError, match=message):
        check_lengths(lengths, capacity)
    with pytest.raises(ValueError, match=message):
        best_fit_decreasing(lengths, capacity)
