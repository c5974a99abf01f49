"""The plan keeps its promises for every method, any number of ranks, and through a file."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.train import plan as plan_module
from longalign_lib.train.audit import audit
from longalign_lib.train.packing import cost_balanced, pack_loads
from longalign_lib.train.plan import METHODS, Plan, PlanError, assign, build_plan, micro_steps
from longalign_lib.train.rows import fit_rows


def lengths_of(seed, n=200, capacity=256):
    rng = np.random.default_rng(seed)
    return np.minimum(np.exp(rng.normal(3, 1, n)).astype(int) + 2, capacity)


@given(st.integers(0, 10**6), st.sampled_from(METHODS), st.integers(1, 60), st.sampled_from([1, 2, 4, 8]),
       st.sampled_from([1, 2]))  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_every_row_once_an_epoch_and_packs_within_capacity(seed, method, n, per_step, rows_per_pack):
    lengths = lengths_of(seed, n)
    plan = build_plan(lengths, method=method, capacity=512, packs_per_step=per_step, rows_per_pack=rows_per_pack,
                      seed=seed, epochs=2)  # fmt: skip
    facts = audit(plan, lengths)
    assert facts["rows"] == 2 * n
    for epoch in (0, 1):
        assert sorted(plan.table.row[plan.table.epoch == epoch]) == list(range(n))
    # documents lie side by side: no offset leaves a hole in a packed pack
    if not plan.padded:
        for _, pack in plan.table.groupby("pack"):
            assert pack.offset.tolist() == [0, *np.cumsum(pack.length)[:-1]]
    # steps are numbered 0.. without a gap, hold at most packs_per_step packs, and no step is much shorter than another
    steps = plan.steps()
    assert steps.step.tolist() == list(range(len(steps))) and steps.packs.max() <= per_step
    packs = steps.packs.groupby(plan.table.groupby("step").epoch.first())
    assert (packs.max() - packs.min()).max() <= (2 * plan.max_ranks - 1 if method == "balanced" else 1)
    assert (packs.size() == -(-packs.sum() // per_step)).all(), "more steps than needed"


@given(st.integers(0, 10**6), st.sampled_from(METHODS), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_dealing_to_ranks_keeps_every_step_and_fills_micro_steps(seed, method, world):
    plan = build_plan(lengths_of(seed), method=method, capacity=256, packs_per_step=8, seed=seed)
    dealt = assign(plan, world)
    assert sorted(dealt.pack) == sorted(plan.table.pack.unique())
    assert dealt.merge(plan.table[["pack", "step"]].drop_duplicates(), on="pack").eval("step_x == step_y").all()
    assert not dealt.duplicated(["step", "micro", "rank"]).any(), "a rank got two packs in one micro-step"
    assert dealt["rank"].max() < world and dealt.micro.max() < micro_steps(plan, world)


def test_a_plan_is_a_function_of_its_arguments_and_epochs_differ():
    a, b = (build_plan(lengths_of(0), method="packed", capacity=256, packs_per_step=4, seed=3, epochs=2) for _ in "ab")
    pd.testing.assert_frame_equal(a.table, b.table)
    one, two = (a.table[a.table.epoch == e].row.tolist() for e in (0, 1))
    assert one != two
    other = build_plan(lengths_of(0), method="packed", capacity=256, packs_per_step=4, seed=4, epochs=2)
    assert other.table.row.tolist() != a.table.row.tolist()


def test_sorted_steps_hold_neighbours_and_come_in_random_order():
    lengths = lengths_of(1, 400)
    plan = build_plan(lengths, method="sorted", capacity=512, packs_per_step=8, seed=0)
    spans = plan.table.groupby("step").length.agg(["min", "max"]).sort_values(["min", "max"]).to_numpy()
    assert (spans[1:, 0] >= spans[:-1, 1]).all(), "two steps overlap in length"
    first = plan.table.groupby("step").length.mean()
    assert not first.is_monotonic_increasing


def test_padding_is_counted():
    plan = build_plan([10, 4, 10, 4], method="sorted", capacity=64, packs_per_step=1, rows_per_pack=2, seed=0)
    assert plan.packs().slots.tolist() in ([8, 20], [20, 8]) and plan.fill() == 1.0
    uneven = build_plan([10, 4], method="naive", capacity=64, packs_per_step=1, rows_per_pack=2, seed=0)
    assert uneven.fill() == pytest.approx(14 / 20)
    assert uneven.table.sort_values("offset").offset.tolist() == [0, 10]


def test_saved_and_read_again(tmp_path):
    plan = build_plan(lengths_of(0), method="balanced", capacity=256, packs_per_step=4, max_ranks=2, seed=3, epochs=2)
    again = Plan.load(plan.save(tmp_path / "plan.parquet"))
    pd.testing.assert_frame_equal(plan.table, again.table)
    assert (again.method, again.capacity, again.max_ranks, again.epochs) == ("balanced", 256, 2, 2)
    odd = dict(capacity=np.int32(256), packs_per_step=np.int64(4), max_ranks=np.int8(2), seed=np.int64(3), epochs=np.int64(2), pool=np.int64(2))
    numbers = Plan.load(build_plan(lengths_of(0), method="balanced", **odd).save(tmp_path / "numpy.parquet"))
    pd.testing.assert_frame_equal(numbers.table, build_plan(lengths_of(0), method="balanced", **{k: int(v) for k, v in odd.items()}).table)
    assert numbers.pool == 2 and type(numbers.seed) is int
    plan.table.to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(PlanError, match=r"bare\.parquet is a Parquet file without a plan"):
        Plan.load(tmp_path / "bare.parquet")


@pytest.mark.parametrize(
    "change, message",
    [({"method": "pack"}, "method 'pack'"), ({"packs_per_step": 0}, "packs_per_step"), ({"max_ranks": 3}, "no multiple"),
     ({"algorithm": "magic"}, "algorithm 'magic'"), ({"capacity": 10}, "outside 1..10"), ({"targets": [1]}, "shape"),
     ({"targets": [5, 2]}, "first token is never one"), ({"lengths": [0, 0]}, "no row"),
     ({"method": "naive", "rows_per_pack": 9}, "lower rows_per_pack"), ({"pool": 0}, "pool"), ({"pool": 1.5}, "pool"),
     ({"capacity": 2**31}, "capacity must be"), ({"lengths": [5, 2**31]}, "row 1 has 2147483648 tokens"),
     ({"lengths": [5.0, 30.0]}, "whole numbers"), ({"lengths": [5, float("nan")]}, "whole numbers"), ({"lengths": []}, "no row|whole"),
     ({"lengths": [5, -3]}, "row 1 has -3 tokens"), ({"lengths": [0, 101]}, "row 1 has 101 tokens"),
     ({"targets": [1, float("nan")]}, "targets must be whole numbers"), ({"targets": [1.0, 2.5]}, "targets must be whole numbers"),
     ({"capacity": float("nan")}, "capacity must be a whole number in 1..2147483647, got nan"), ({"capacity": None}, "got None"),
     ({"seed": -1}, "seed must be a whole number >= 0, got -1"), ({"seed": 0.5}, r"seed must be .* got 0\.5"),
     ({"epochs": 40_000}, "epochs must be a whole number in 1..32767, got 40000"), ({"lengths": [[5, 30]]}, "one-dimensional"),
     ({"lengths": pd.DataFrame({"row": [0, 4], "start": [0, 0], "length": [5, 101], "targets": [1, 1]})}, "row 4 has 101 tokens"),
     ({"lengths": pd.DataFrame({"row": [0, 4], "start": [0, 0], "length": [5, 6], "targets": [1, 6]})}, "row 4: 6 targets in 6 tokens"),
     ({"lengths": pd.DataFrame({"length": [5]})}, r"lacks columns \['row', 'start', 'targets'\]"), ({"lengths": None}, "of a NoneType"),
     ({"method": "balanced", "cost": lambda x: 3.0}, "one finite number a row"),
     ({"method": "balanced", "algorithm": "next_fit", "cost": lambda x: x * np.nan}, "one finite number a row")],
)  # fmt: skip
def test_bad_arguments_are_named(change, message):
    good = {"lengths": [5, 30], "method": "packed", "capacity": 100, "packs_per_step": 4}
    with pytest.raises(ValueError, match=message):
        build_plan(**{**good, **change})


def test_ranks_that_do_not_divide_are_refused_with_those_that_do():
    plan = build_plan(lengths_of(0), method="packed", capacity=256, packs_per_step=6)
    for ranks in (4, 0, -2, 2.0, "2", True):
        with pytest.raises(ValueError, match=rf"to {ranks!r} ranks; use one of \[1, 2, 3, 6\]"):
            assign(plan, ranks)


def test_a_piece_that_begins_beyond_31_bits_is_refused_and_not_wrapped():
    pieces, _ = fit_rows([5, 2**31 + 100], 2**29, "split")
    with pytest.raises(ValueError, match=r"row 1 has a piece from token \d+ on, and a plan counts tokens of a row up to 2147483647"):
        build_plan(pieces, method="packed", capacity=2**29, packs_per_step=1)


def test_a_plan_of_more_than_two_to_the_31_tokens():
    lengths = np.full(40_000, 65_536)
    facts = audit(build_plan(lengths, method="packed", capacity=65_536, packs_per_step=8), lengths)
    assert facts["tokens"] == 40_000 * 65_536 > 2**31 and facts["fill"] == 1


def test_a_cost_of_ones_own_fills_the_packs_and_sorts_them():
    lengths, loads = lengths_of(3, 2000), {}
    for name, cost in (("default", None), ("cubes", lambda x: x.astype(float) ** 3), ("rows", lambda x: np.ones(len(x)))):
        plan = build_plan(lengths, method="balanced", capacity=256, packs_per_step=4, cost=cost, seed=0)
        loads[name] = sorted(plan.packs().tokens)
        assert loads[name] == sorted(pack_loads(lengths, cost_balanced(lengths, 256, cost=cost))), name
        if cost:  # four packs a step are one group: neighbours in this cost
            of_pack = plan.table.assign(w=cost(plan.table.length.to_numpy())).groupby(["step", "pack"]).w.sum()
            spans = of_pack.groupby("step").agg(["min", "max"]).sort_values(["min", "max"]).to_numpy()
            assert (spans[1:, 0] >= spans[:-1, 1]).all(), name
    assert loads["default"] != loads["cubes"] != loads["rows"]


def test_no_short_last_step_of_a_few_rows():
    """17 packs, 8 a step: 6, 6 and 5, not 8, 8 and a last step of one pack that weighs as much as eight."""
    for method in METHODS:
        plan = build_plan([10] * 17, method=method, capacity=10, packs_per_step=8, max_ranks=1, seed=0)
        assert sorted(plan.steps().packs) == [5, 6, 6], method


@given(st.integers(1, 90), st.sampled_from([1, 2, 3, 8]), st.integers(1, 4), st.sampled_from([None, 1, 2, 5]), st.integers(0, 9))
def test_groups_of_a_balanced_plan_are_as_even_as_they_can_be(packs, ranks, groups_a_step, pool, seed):
    """A row is a pack here. Least is what the emptiest group holds if packs are spread over as few groups as ranks allow."""
    plan = build_plan([10] * packs, method="balanced", capacity=10, packs_per_step=ranks * groups_a_step, max_ranks=ranks, pool=pool, seed=seed)
    found, groups = plan.steps().packs, -(-packs // ranks)
    assert found.sum() == packs and len(found) == -(-groups // groups_a_step)
    assert found.min() >= packs // groups and found.max() <= ranks * groups_a_step
    assert found.max() - found.min() <= ranks + groups_a_step - 1


def test_the_table_against_a_plain_loop():
    """Offsets, lengths and targets of every line, rebuilt row by row with dictionaries."""
    lengths = lengths_of(5, 300)
    for method in METHODS:
        plan = build_plan(lengths, method=method, capacity=512, packs_per_step=4, rows_per_pack=2, seed=1, epochs=2)
        at, longest = {}, plan.table.groupby("pack").length.max().to_dict()
        for line in plan.table.itertuples():
            assert line.offset == at.get(line.pack, 0) and line.length == lengths[line.row] and line.start == 0
            assert line.targets == lengths[line.row] - 1
            at[line.pack] = line.offset + (longest[line.pack] if plan.padded else line.length)
        packs = plan.packs().set_index("pack")
        for pack, lines in plan.table.groupby("pack"):
            squares = (lines.length.astype(float) ** 2).sum() if not plan.padded else len(lines) * float(lines.length.max()) ** 2
            assert packs.squares[pack] == squares and packs.longest[pack] == lines.length.max()
            assert packs.slots[pack] == at[pack] and packs.step[pack] == lines.step.iloc[0]


def test_groups_of_a_balanced_plan_are_neighbours_in_cost():
    """With a group a step and all packs sorted together, every step holds packs that are consecutive in cost."""
    lengths = lengths_of(3, 2000)
    plan = build_plan(lengths, method="balanced", capacity=256, packs_per_step=4, seed=0)
    spans = plan.packs().groupby("step").squares.agg(["min", "max"]).sort_values(["min", "max"]).to_numpy()
    assert len(spans) > 20 and (spans[1:, 0] >= spans[:-1, 1]).all()


def test_groups_are_dealt_so_that_steps_hold_like_numbers_of_rows():
    """Steps of two packs, one rank: a dear pack of few rows meets a cheap one of many, whatever the order they came in."""
    costs, sequences = np.array([40.0, 30, 20, 10]), np.array([1, 10, 1, 10])
    for seed in range(20):
        order, sizes = plan_module._balanced_order(costs, sequences, 2, 1, None, np.random.default_rng(seed))
        assert sizes.tolist() == [2, 2] and sorted(order) == [0, 1, 2, 3]
        assert sequences[order].reshape(2, 2).sum(1).tolist() == [11, 11]
        assert all((costs[pair] > 25).sum() == 1 for pair in order.reshape(2, 2)), "a step of dear packs only"


def test_pool_one_groups_only_within_a_random_step():
    lengths = lengths_of(3, 2000)
    spread = {pool: build_plan(lengths, method="balanced", capacity=256, packs_per_step=4, pool=pool, seed=0).packs()
              .groupby("step").squares.std().mean() for pool in (1, 4, None)}  # fmt: skip
    assert spread[1] > spread[4] > spread[None]


def test_pieces_of_split_rows_are_planned_with_their_starts():
    pieces, fates = fit_rows([5, 70, 30], 32, "split")
    plan = build_plan(pieces, method="packed", capacity=32, packs_per_step=2, seed=0)
    assert audit(plan, [5, 70, 30], fates)["rows"] == 5
    assert sorted(map(tuple, plan.table[["row", "start", "length"]].to_numpy())) == [(0, 0, 5), (1, 0, 32), (1, 32, 32), (1, 64, 6), (2, 0, 30)]
    with pytest.raises(ValueError, match="pieces carry their own targets"):
        build_plan(pieces, [1] * 5, method="packed", capacity=32, packs_per_step=2)


def test_a_kill_leaves_no_half_written_plan(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    plan = build_plan(lengths_of(0), method="packed", capacity=256, packs_per_step=4)
    plan.save(tmp_path / "plan.parquet")
    before = (tmp_path / "plan.parquet").read_bytes()

    def cut_off(table, path):
        Path(path).write_bytes(b"PAR1 half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", cut_off)
    with pytest.raises(KeyboardInterrupt):
        plan.save(tmp_path / "plan.parquet")
    assert (tmp_path / "plan.parquet").read_bytes() == before
