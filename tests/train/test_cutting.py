"""Cuttings hold every sequence once, differ from one another, and mean the same to a plan as to a list."""

import numpy as np
import pandas as pd
import pytest
import torch

from longalign_lib.train.audit import audit
from longalign_lib.train.cutting import Cutting, cut, make_cuttings, n_targets, random_sequences
from longalign_lib.train.plan import assign, micro_steps


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [4, 7, 13])
@pytest.mark.parametrize("short", [False, True])
def test_every_cutting_holds_each_sequence_once(ranks, n, short):
    lengths = np.random.default_rng(n).integers(2, 50, n)
    found = make_cuttings(lengths, ranks, short=short, seed=3)
    assert len({c.name for c in found}) == len(found) >= 5 and len({c.ranks for c in found}) >= 3
    for c in found:
        assert sorted(i for rank in c.ranks for batch in rank for i in batch) == list(range(n))
        assert all(batch for rank in c.ranks for batch in rank) and len(c.ranks) == ranks
        uneven = len({len(rank) for rank in c.ranks}) > 1
        assert uneven <= short, f"{c.name} leaves a rank without a micro-batch"
        assert len(c.lines) == (n if c.padded else len(c.micro_batches))
    if n == 13:
        assert {1, 2, 3} <= {c.accumulation for c in found} and {c.padded for c in found} == {True, False}
        assert max(len(b) for c in found for b in c.micro_batches) > 3
        if short and ranks > 1:
            assert any(len({len(rank) for rank in c.ranks}) > 1 for c in found)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_plan_deals_the_same_sequences_to_the_same_ranks(ranks):
    sequences = random_sequences(13)
    lengths = [len(x) for x, _ in sequences]
    for c in make_cuttings(lengths, ranks, short=True):
        plan = c.plan(sequences)
        audit(plan, lengths)
        assert micro_steps(plan, ranks) == c.accumulation and plan.padded == c.padded and plan.steps().sequences.tolist() == [13]
        dealt = assign(plan, ranks, balance=False).merge(plan.table, on="pack")
        for (rank, micro), lines in dealt.groupby(["rank", "micro"]):
            assert tuple(lines.sort_values("offset").row) == c.ranks[rank][micro]
        assert plan.table.targets.tolist() == [n_targets(sequences[r]) for r in plan.table.row]


def test_tensors_of_a_cutting_against_the_sequences():
    sequences = random_sequences(6)
    weights = np.arange(1, 7) / 10
    for padded in (False, True):
        c = cut("two", [[4, 0], [1], [2, 3], [5]], ranks=2, padded=padded)
        assert c.ranks == (((4, 0), (2, 3)), ((1,), (5,))) and c.accumulation == 2
        first = c.batches(sequences, 0, weights, pad_id=9)[0]
        for k, i in enumerate((4, 0)):
            ids, labels = sequences[i]
            start = 0 if padded or k == 0 else len(sequences[4][0])
            here = (k if padded else 0), slice(start, start + len(ids))
            assert first["input_ids"][here].tolist() == ids.tolist()
            assert first["labels"][here].tolist() == [-100, *labels[1:].tolist()]
            assert torch.allclose(first["loss_weights"][here].double(), torch.tensor(weights[i] * (labels != -100) * (np.arange(len(ids)) > 0)))
            assert first["position_ids"][here].tolist() == list(range(len(ids)))
        assert first["input_ids"].shape == ((2, 40) if padded else (1, len(sequences[4][0]) + 40))


def test_random_sequences_are_the_odd_ones_that_are_promised():
    sequences = random_sequences(9, vocabulary=50, longest=30, seed=4)
    assert [len(x) for x, _ in sequences[:3]] == [30, 5, 15] and [n_targets(s) for s in sequences[:3]] == [2, 4, 1]
    assert all(n_targets(s) >= 1 for s in sequences) and max(x.max() for x, _ in sequences) < 50
    first = [labels[0] != -100 for _, labels in sequences]
    assert any(first) and not all(first)
    again = random_sequences(9, vocabulary=50, longest=30, seed=4)
    assert all((a == b).all() for s, t in zip(sequences, again, strict=True) for a, b in zip(s, t, strict=True))


def test_bad_input_is_named():
    sequences = random_sequences(4)
    with pytest.raises(ValueError, match="give at least two, one a rank"):
        make_cuttings([3, 4], ranks=3)
    with pytest.raises(ValueError, match="2 sequences up to 40 tokens"):
        random_sequences(2)
    with pytest.raises(ValueError, match="micro-batch 1 of a plan goes to rank 1"):
        Cutting("rank 1 idle at first", (((0,), (1,)), ())).plan(sequences)
    with pytest.raises(ValueError, match="none may be empty"):
        Cutting("empty", (((),), ((0, 1, 2, 3),))).plan(sequences)
    assert isinstance(cut("x", [[0, 1, 2, 3]]).plan(sequences).table, pd.DataFrame)
