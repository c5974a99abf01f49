"""The audit finds what is broken; shares and waiting against plain loops."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from longalign_lib.train.audit import audit, report, weight_shares, worst_over_mean
from longalign_lib.train.plan import METHODS, PlanError, build_plan
from longalign_lib.train.rows import fit_rows


def mix(n, seed=0):
    """The long-tail mix: nine rows in ten lognormal and short, one in ten uniform over 8k to 64k."""
    rng = np.random.default_rng(seed)
    short = np.clip(np.exp(rng.normal(6.6, 1.0, n)), 16, 8192).astype(int)
    return np.where(rng.random(n) < 0.1, rng.integers(8192, 65537, n), short)


LENGTHS = np.minimum(np.exp(np.random.default_rng(0).normal(3, 1, 200)).astype(int) + 2, 256)


@pytest.mark.parametrize(
    "break_it, message",
    [(lambda t: t.iloc[1:], "tokens 0 are in the plan"), (lambda t: pd.concat([t, t.iloc[:1]]), "is in the plan twice"),
     (lambda t: t.assign(row=t.row + 1), "the plan has tokens|the data has rows|tokens .* are in the plan"),
     (lambda t: t.assign(row=-t.row), "the data has rows 0..199"), (lambda t: t.assign(length=t.length - 1), "the plan has|recorded as lost"),
     (lambda t: t.assign(start=1), "the plan has tokens 1"), (lambda t: t.assign(offset=0), "overlaps"),
     (lambda t: t.assign(step=np.arange(len(t))), "more than one step"), (lambda t: t.assign(step=0), "more than 4 packs"),
     (lambda t: t.assign(pack=0, offset=t.length.cumsum() - t.length), "outside its capacity 256"),
     (lambda t: t.assign(offset=t.offset + 256), "outside its capacity 256"), (lambda t: t.assign(offset=t.offset - 1), "outside its capacity"),
     (lambda t: pd.concat([t, t.assign(epoch=1, pack=t.pack + 999, step=t.step + 99)]), "is in epoch 1, and the plan has 1"),
     (lambda t: t.assign(targets=t.length), "targets in .* tokens; the first token is never one"), (lambda t: t.assign(targets=-1), "-1 targets"),
     (lambda t: t.assign(step=2 * t.step), "are numbered with gaps")],
)  # fmt: skip
def test_audit_finds_a_broken_plan(break_it, message):
    plan = build_plan(LENGTHS, method="packed", capacity=256, packs_per_step=4)
    audit(plan, LENGTHS)
    with pytest.raises(PlanError, match=message):
        audit(replace(plan, table=break_it(plan.table)), LENGTHS)


def test_lost_tokens_must_be_on_record():
    lengths = [5, 300, 0, 40]
    pieces, fates = fit_rows(lengths, 100)
    plan = build_plan(pieces, method="packed", capacity=100, packs_per_step=1)
    assert audit(plan, lengths, fates) == {"method": "packed", "rows": 3, "left_out": 1, "tokens_lost": 200, "packs": 2,
                                               "steps": 2, "tokens": 145, "targets": 142, "fill": 145 / 200}  # fmt: skip
    with pytest.raises(PlanError, match="of row 1's 300 tokens 100 are in the plan and 0 recorded as lost"):
        audit(plan, lengths)
    with pytest.raises(PlanError, match=r"fates tell of rows 5\.\.6 but the data has rows 0\.\.3"):
        audit(plan, lengths, fates.assign(row=fates.row + 4))


def test_padding_over_the_capacity_is_found():
    plan = build_plan([10, 10, 4, 4], method="sorted", capacity=20, packs_per_step=1, rows_per_pack=2)
    audit(plan, [10, 10, 4, 4])
    uneven = plan.table.sort_values("row").assign(pack=[0, 1, 0, 1], offset=[0, 0, 10, 10], step=[0, 1, 0, 1])  # widths of 10
    audit(replace(plan, table=uneven), [10, 10, 4, 4])
    with pytest.raises(PlanError, match="pack 0 holds 20 tokens, over the capacity 19"):
        audit(replace(plan, table=uneven, capacity=19), [10, 10, 4, 4])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("denominator", ["step", "epoch"])
def test_weight_shares_against_a_loop(method, denominator):
    lengths = np.minimum(mix(300) // 64 + 2, 1024)
    plan = build_plan(lengths, method=method, capacity=1024, packs_per_step=4, seed=2, epochs=2)
    steps = defaultdict(list)
    for line in plan.table.itertuples():
        steps[line.step].append(line.length)
    m = {s: len(v) if denominator == "step" else np.mean([len(x) for x in steps.values()]) for s, v in steps.items()}
    want = defaultdict(float)
    for s, rows in steps.items():
        for length in rows:  # Eq. 2: every sequence of a step weighs 1 / M
            want[length > 128] += 1 / m[s]
    shares = weight_shares(plan, denominator=denominator, edges=(128,)).set_index("length")
    total = sum(want.values())
    assert shares.weight.to_dict() == pytest.approx({"to 128": want[False] / total, "over 128": want[True] / total})
    assert shares.rows["over 128"] == pytest.approx((lengths > 128).mean())
    if denominator == "epoch":
        assert shares.ratio.to_numpy() == pytest.approx(1), "with the epoch's mean every row weighs the same"


def test_waiting_against_a_loop():
    plan = build_plan(LENGTHS, method="packed", capacity=256, packs_per_step=8, seed=0)
    work = (plan.table.length.astype(float) ** 2).groupby([plan.table.step, plan.table.pack]).sum()
    worst = mean = 0.0
    for _, packs in work.groupby(level="step"):
        packs = packs.sort_values(ascending=False).to_numpy()
        for k in range(0, len(packs), 4):
            worst, mean = worst + packs[k], mean + packs[k : k + 4].sum() / 4
    assert worst_over_mean(plan, 4) == pytest.approx(worst / mean)


@pytest.mark.parametrize("rows, packs_per_step, most", [(10_000, 64, 1.02), (100_000, 64, 1.02), (100_000, 16, 1.02)])
def test_balance_without_bias_on_the_long_tail_mix(rows, packs_per_step, most):
    """What the balanced plan promises: nobody waits, packs are full, long rows keep their weight; random dealing does neither."""
    lengths = mix(rows)
    facts = report(build_plan(lengths, method="balanced", capacity=65_536, packs_per_step=packs_per_step, max_ranks=8), 8)
    assert facts["worst_over_mean"] <= most and facts["fill"] >= 0.995 and facts["long_ratio"] <= 1.05
    random = report(build_plan(lengths, method="packed", capacity=65_536, packs_per_step=packs_per_step, max_ranks=8), 8, balance=False)
    assert random["worst_over_mean"] > 1.5 and random["long_ratio"] > facts["long_ratio"]


def test_sorting_best_fit_packs_by_cost_is_the_bias_that_cost_balanced_packing_avoids():
    lengths = mix(20_000)
    ratio = {a: report(build_plan(lengths, method="balanced", algorithm=a, capacity=65_536, packs_per_step=8), 8)["long_ratio"]
             for a in ("best_fit_decreasing", "cost_balanced")}  # fmt: skip
    assert ratio["best_fit_decreasing"] > 4 > 2 > ratio["cost_balanced"] > 1
