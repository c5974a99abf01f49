"""Weights against the paper's equations computed by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.train.weights import pack_mean_weights, token_weights


def equations(losses, pack):
    """Eq. 2 and Eq. 3 of the paper, as loops over one global batch: losses[i] are the token losses of sequence i."""
    m, k = len(losses), len(set(pack))
    eq2 = sum(np.sum(x) / len(x) for x in losses) / m
    eq3 = sum(sum(np.sum(x) for x, q in zip(losses, pack) if q == p) / sum(len(x) for x, q in zip(losses, pack) if q == p)
              for p in set(pack)) / k  # fmt: skip
    return eq2, eq3


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=20), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_weights_reproduce_the_papers_equations(sequences, seed):
    rng = np.random.default_rng(seed)
    targets, pack = (np.array(x) for x in zip(*sequences))
    losses = [rng.random(n) for n in targets]
    eq2, eq3 = equations(losses, pack.tolist())
    total = np.array([x.sum() for x in losses])
    step = np.zeros(len(targets), dtype=int)
    assert (token_weights(targets, step, p=1) * total).sum() == pytest.approx(eq2)
    assert (pack_mean_weights(targets, step, pack) * total).sum() == pytest.approx(eq3)
    assert (token_weights(targets, step, p=0) * total).sum() == pytest.approx(np.concatenate(losses).mean())
    # the paper's own form of Eq. 4: scale L_i by K / (N_i M), sum in each pack, average over the K packs
    k, m = len(set(pack.tolist())), len(targets)
    eq4 = np.mean([sum(total[i] * k / (targets[i] * m) for i in np.flatnonzero(pack == p)) for p in set(pack.tolist())])
    assert eq4 == pytest.approx(eq2)


@pytest.mark.parametrize("p", [0, 0.5, 1])
def test_weights_of_a_step_sum_to_one_over_tokens(p):
    rng = np.random.default_rng(1)
    targets, step = rng.integers(0, 40, 200), np.sort(rng.integers(0, 9, 200))
    w = token_weights(targets, step, p)
    for s in range(9):
        assert (w * targets)[step == s].sum() == pytest.approx(1)
    assert (w[targets == 0] == 0).all()


def test_epoch_denominator_weighs_a_sequence_alike_in_every_step():
    targets, step = [2, 2, 2, 2], [0, 1, 1, 1]
    of_step = token_weights(targets, step, 1, "step") * 2
    of_epoch = token_weights(targets, step, 1, "epoch") * 2
    assert of_step.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert of_epoch.tolist() == pytest.approx([0.5] * 4)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="denominator 'batch'"):
        token_weights([1], [0], 1, "batch")
    with pytest.raises(ValueError, match="one entry a sequence"):
        token_weights([1, 2], [0])
