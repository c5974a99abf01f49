"""The plan keeps its promises for every method, any number of ranks, and through a file."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.train.cost import StepCost, fit, from_config, simulate
from longalign_lib.train.plan import METHODS, Plan, PlanError, assign, audit, build_plan, fit_lengths, micro_steps


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
    # steps are numbered 0.. without a gap and hold at most packs_per_step packs
    steps = plan.steps()
    assert steps.step.tolist() == list(range(len(steps))) and steps.packs.max() <= per_step


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


def test_balanced_micro_steps_wait_less_than_packed_ones():
    lengths = np.random.default_rng(0).choice([20, 30, 60, 900], 4000, p=[0.5, 0.3, 0.15, 0.05])
    cost = StepCost(0, 0, 1)
    idle = {m: simulate(build_plan(lengths, method=m, capacity=1024, packs_per_step=32, max_ranks=8, seed=0), 8, cost,
                        balance=m == "balanced").idle for m in ("packed", "balanced")}  # fmt: skip
    assert idle["balanced"] < 0.1 < idle["packed"]


def test_simulation_against_a_loop():
    lengths = lengths_of(2)
    plan = build_plan(lengths, method="naive", capacity=256, packs_per_step=8, seed=0)
    cost = StepCost(0.5, 1e-2, 1e-4)
    seconds = worked = 0.0
    for _, step in plan.table.groupby("step"):
        times = [0.5 + 1e-2 * x + 1e-4 * x * x for x in step.length]
        for k in range(0, len(times), 4):
            seconds += max(times[k : k + 4])
            worked += sum(times[k : k + 4])
    run = simulate(plan, 4, cost, balance=False)
    assert run.seconds == pytest.approx(seconds) and run.idle == pytest.approx(1 - worked / (4 * seconds))


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
    plan.table.to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(PlanError, match=r"bare\.parquet is a Parquet file without a plan"):
        Plan.load(tmp_path / "bare.parquet")


@pytest.mark.parametrize(
    "break_it, message",
    [(lambda t: t.iloc[1:], "in the plan 0 times"), (lambda t: pd.concat([t, t.iloc[:1]]), "2 times"),
     (lambda t: t.assign(row=t.row + 1), "tokens in the plan|the data has rows"),
     (lambda t: t.assign(offset=0), "overlaps"), (lambda t: t.assign(pack=0, offset=t.length.cumsum() - t.length), "over the capacity")],
)  # fmt: skip
def test_audit_finds_a_broken_plan(break_it, message):
    lengths = lengths_of(0)
    plan = build_plan(lengths, method="packed", capacity=256, packs_per_step=4)
    broken = Plan(**{**plan.__dict__, "table": break_it(plan.table)})
    with pytest.raises(PlanError, match=message):
        audit(broken, lengths)


def test_over_long_and_empty_rows_have_a_recorded_fate():
    lengths, fates = fit_lengths([5, 300, 0, 256], 256)
    assert lengths.tolist() == [5, 256, 0, 256]
    assert fates.fate.tolist() == ["truncated", "empty"] and fates.tokens_lost.tolist() == [44, 0]
    dropped, fates = fit_lengths([5, 300], 256, "drop")
    assert dropped.tolist() == [5, 0] and fates.fate.tolist() == ["dropped"] and fates.tokens_lost.tolist() == [300]
    with pytest.raises(ValueError, match="row 1 has 300 tokens and the capacity is 256"):
        fit_lengths([5, 300], 256, "error")
    assert audit(build_plan(dropped, method="packed", capacity=256, packs_per_step=1), dropped)["left_out"] == 1


@pytest.mark.parametrize(
    "change, message",
    [({"method": "pack"}, "method 'pack'"), ({"packs_per_step": 0}, "packs_per_step"), ({"max_ranks": 3}, "no multiple"),
     ({"algorithm": "magic"}, "algorithm 'magic'"), ({"capacity": 10}, "outside 1..10"), ({"targets": [1]}, "shape"),
     ({"targets": [5, 2]}, "first token is never one"), ({"lengths": [0, 0]}, "no row"),
     ({"method": "naive", "rows_per_pack": 9}, "lower rows_per_pack")],
)  # fmt: skip
def test_bad_arguments_are_named(change, message):
    good = {"lengths": [5, 30], "method": "packed", "capacity": 100, "packs_per_step": 4}
    with pytest.raises(ValueError, match=message):
        build_plan(**{**good, **change})


def test_ranks_that_do_not_divide_are_refused_with_those_that_do():
    plan = build_plan(lengths_of(0), method="packed", capacity=256, packs_per_step=6)
    with pytest.raises(ValueError, match=r"use one of \[1, 2, 3, 6\]"):
        assign(plan, 4)


def test_cost_is_recovered_from_times_it_made():
    true = StepCost(0.1, 2e-5, 3e-10)
    slots = np.array([512, 2048, 8192, 32768, 65536, 65536])
    squares = np.array([512, 2048, 8192, 32768, 65536, 8192], float) ** 2
    found = fit(slots, squares, true(slots, squares))
    assert found(slots, squares) == pytest.approx(true(slots, squares), rel=1e-6)
    with pytest.raises(ValueError, match="three positive times"):
        fit([1, 2], [1, 4], [0.1, 0.2])


def test_flops_of_a_config_against_counting_matrix_products():
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2)  # fmt: skip
    flops = lambda m, k, n: 2 * m * k * n  # noqa: E731
    tokens = 64
    linear = 2 * (flops(tokens, 32, 32) * 2 + flops(tokens, 32, 16) * 2 + flops(tokens, 32, 48) * 3) + flops(tokens, 32, 97)
    pairs = tokens * tokens / 2
    attention = 2 * 2 * (2 * pairs * 32)
    cost = from_config(config, flops_per_second=1.0)
    assert cost(tokens, tokens**2) == pytest.approx(3 * (linear + attention))  # backward costs twice the forward
