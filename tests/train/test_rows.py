"""Over-long rows: every token is in a piece or on record as lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.data.tokens import TokenStore
from longalign_lib.train.rows import OVER_LONG, fit_rows


@given(st.lists(st.integers(0, 200), max_size=30), st.integers(1, 60), st.sampled_from([o for o in OVER_LONG if o != "error"]),
       st.integers(0, 10**6))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_every_token_is_in_a_piece_or_recorded_as_lost(lengths, capacity, over_long, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random(sum(lengths)) < 0.1
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    store = TokenStore(np.zeros(len(mask), np.int32), mask, starts, [{} for _ in lengths])
    for targets_of in (None, store.count_targets):
        pieces, fates = fit_rows(lengths, capacity, over_long, targets_of)
        held = np.zeros(len(lengths))
        for piece in pieces.itertuples():
            assert 1 <= piece.length <= capacity and piece.start + piece.length <= lengths[piece.row]
            assert over_long == "split" or piece.start == 0
            held[piece.row] += piece.length
            inside = mask[starts[piece.row] + piece.start + 1 : starts[piece.row] + piece.start + piece.length]
            assert piece.targets == (piece.length - 1 if targets_of is None else inside.sum())
            assert targets_of is None or piece.targets > 0
        for fate in fates.itertuples():
            held[fate.row] += fate.tokens_lost
            assert fate.length == lengths[fate.row]
        assert held.tolist() == lengths
        touched = set(fates.row)
        for row, length in enumerate(lengths):
            if length > capacity or length == 0:
                assert row in touched, f"row {row} of {length} tokens has no fate on record"


def test_the_four_choices():
    pieces, fates = fit_rows([5, 300, 0, 256], 256)
    assert pieces.to_numpy().tolist() == [[0, 0, 5, 4], [1, 0, 256, 255], [3, 0, 256, 255]]
    assert fates.to_numpy().tolist() == [[1, 300, "truncated", 44], [2, 0, "empty", 0]]
    pieces, fates = fit_rows([5, 600], 256, "split")
    assert pieces.to_numpy().tolist() == [[0, 0, 5, 4], [1, 0, 256, 255], [1, 256, 256, 255], [1, 512, 88, 87]]
    assert fates.fate.tolist() == ["split"] and fates.tokens_lost.tolist() == [0]
    pieces, fates = fit_rows([5, 300], 256, "drop")
    assert pieces.row.tolist() == [0] and fates.to_numpy().tolist() == [[1, 300, "dropped", 300]]
    with pytest.raises(ValueError, match="row 1 has 300 tokens and the capacity is 256"):
        fit_rows([5, 300], 256, "error")


@pytest.mark.parametrize("capacity", [0, -1, 2.5, float("nan"), None, True, "10"])
@pytest.mark.parametrize("over_long", OVER_LONG)
def test_a_capacity_that_is_no_count_is_named(capacity, over_long):
    with pytest.raises(ValueError, match=f"capacity must be a whole number >= 1, got {capacity!r}"):
        fit_rows([5, 30], capacity, over_long)


@pytest.mark.parametrize("lengths, over_long, message", [
    ([3, -1], "drop", "row 1 has -1 tokens"), ([3, float("nan")], "drop", "row 0 is 3.0"), ([[3]], "drop", "one-dimensional"),
    ([3], "cut", "over_long 'cut' is not one of truncate, split, drop, error"), ([True], "drop", "row 0 is True"),
])  # fmt: skip
def test_bad_input_is_named(lengths, over_long, message):
    with pytest.raises(ValueError, match=message):
        fit_rows(lengths, 10, over_long)
