"""From tokens through a plan to every rank's tensors: what the published scripts lose, miscount or crash on, none of it here.

Token id 0 is a word like any other, rows fill a pack exactly, a row has no target, the number of packs divides by nothing, and the
last pack, the longest group and the last ranks' turns are all there.
"""

import itertools
from collections import Counter

import numpy as np
import pytest

from longalign_lib.data.tokens import TokenStore
from longalign_lib.train.audit import audit
from longalign_lib.train.loss import IGNORE
from longalign_lib.train.plan import METHODS, build_plan
from longalign_lib.train.rows import fit_rows
from longalign_lib.train.trainer import RankPacks

CAPACITY = 32


@pytest.fixture(scope="module")
def store():
    """41 rows: nothing but zeros; a zero first, in the middle, last; four of full length; halves; two without a target."""
    rng = np.random.default_rng(0)
    rows = [np.zeros(CAPACITY, int), np.zeros(5, int), np.array([0, 7, 8, 9]), np.array([7, 0, 0, 9, 4]), np.array([5, 6, 0])]
    rows += [rng.integers(0, 4, CAPACITY) for _ in range(3)] + [rng.integers(0, 4, CAPACITY // 2) for _ in range(4)]
    rows += [rng.integers(0, 4, n) for n in rng.integers(2, 20, 29)]
    masks = [rng.random(len(x)) < 0.5 for x in rows]
    for k, mask in enumerate(masks):
        mask[-1] = k not in (10, 20)
        mask[: len(mask) - 1] &= k not in (10, 20)
    starts = np.concatenate([[0], np.cumsum([len(x) for x in rows])])
    return TokenStore(np.concatenate(rows).astype(np.int32), np.concatenate(masks), starts, [{} for _ in rows])


def documents(batch, plan):
    """(ids, labels, weight of each token) of every document in a rank's batch."""
    ids, labels, weights = (batch[k].numpy() for k in ("input_ids", "labels", "loss_weights"))
    if plan.padded:  # the padding is id 0 too: only the plan knows where a row ends
        lines = plan.table[plan.table.pack == batch["pack"]].sort_values("offset")
        return [(ids[i, :n], labels[i, :n], weights[i, :n]) for i, n in enumerate(lines.length)]
    borders = batch["cu_seq_lens_q"].tolist()
    return [(ids[0, a:b], labels[0, a:b], weights[0, a:b]) for a, b in itertools.pairwise(borders)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_every_token_of_every_row_reaches_a_rank_once_with_its_weight(store, method, ranks):
    plan = build_plan(store.lengths, store.targets, method=method, capacity=CAPACITY, packs_per_step=4, max_ranks=4, seed=1, epochs=2)
    audit(plan, store.lengths)
    packs = plan.steps().packs
    assert packs.sum() % (2 * 4) and packs.min() < 4, "nothing is left over: nothing is tested"
    of_ranks = [RankPacks(plan, store, rank, ranks) for rank in range(ranks)]
    assert len({len(r) for r in of_ranks}) == 1, "ranks would wait for each other for ever"
    micro, seen, empty = of_ranks[0].micro, Counter(), 0
    for step, found in enumerate(range(0, len(of_ranks[0]), micro)):
        total, in_step = 0.0, []
        for batch in (r[k] for r in of_ranks for k in range(found, found + micro)):
            if batch["pack"] < 0:
                assert not batch["loss_weights"].any() and (batch["labels"] == IGNORE).all()
                empty += 1
                continue
            total += float(batch["loss_weights"].sum())
            in_step += documents(batch, plan)
        with_targets = [d for d in in_step if (d[1] != IGNORE).any()]
        assert total == pytest.approx(1), f"the weights of step {step} do not sum to one"
        for ids, labels, weights in in_step:
            seen[ids.tobytes(), (labels != IGNORE).tobytes()] += 1
            target = labels != IGNORE
            assert not target[0] and (labels[target] == ids[target]).all()
            assert weights.sum() == pytest.approx(1 / len(with_targets) if target.any() else 0), "Eq. 4: every sequence weighs 1 / M"
    wanted = Counter()
    for ids, labels in (store[i] for i in range(len(store))):
        target = np.asarray(labels) != IGNORE
        target[0] = False
        wanted[np.asarray(ids, np.int64).tobytes(), target.tobytes()] += 2  # epochs
    assert seen == wanted
    assert empty == len(of_ranks[0]) * ranks - packs.sum() > 0


def test_packs_are_filled_exactly_and_rows_without_a_target_are_told(store):
    plan = build_plan(store.lengths, store.targets, method="packed", capacity=CAPACITY, packs_per_step=4)
    full = plan.packs().query("tokens == @CAPACITY")
    assert (full.sequences == 1).sum() == 4 and (full.sequences > 1).sum() >= 2, "rows of full length, and packs of several rows"
    assert plan.packs().with_targets.sum() == len(store) - 2 and plan.steps().sequences.sum() == len(store) - 2
    pieces, fates = fit_rows(store.lengths, CAPACITY, targets_of=store.count_targets)
    assert fates[["row", "fate"]].to_numpy().tolist() == [[10, "no target"], [20, "no target"]]
    assert audit(build_plan(pieces, method="balanced", capacity=CAPACITY, packs_per_step=4), store.lengths, fates)["left_out"] == 2
