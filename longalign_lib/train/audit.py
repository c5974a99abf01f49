"""Proofs and reports about a plan: is every row in it, who waits, and what does each row weigh?

`audit` proves a plan against the lengths of the data. `worst_over_mean` is the waiting that unequal packs cause.
`weight_shares` shows what a denominator per step does: with M sequences in a step a sequence weighs 1/M, so steps of few
(long) sequences weigh theirs more; a bucket of lengths that has 10% of the rows should have 10% of an epoch's weight.
Everything is computed from the plan's table, in O(n log n).
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from longalign_lib.train.packing import whole_lengths
from longalign_lib.train.plan import Plan, PlanError, assign
from longalign_lib.train.weights import plan_weights

EDGES = (1024, 4096, 8192, 16384, 32768)


def audit(plan: Plan, lengths, fates: pd.DataFrame | None = None) -> dict:
    """Prove the plan against the data; returns its facts.

    Args:
        plan: any plan.
        lengths: int[n], tokens of every row of the data; a row of 0 tokens need not be in the plan.
        fates: what `rows.fit_rows` recorded, when rows were cut or left out: tokens in the plan and tokens lost must
            add up to every row's length in each epoch.

    Raises:
        PlanError: a row is missing, twice, or unknown, or in an epoch that the plan has not; it has more targets than tokens;
            documents overlap; a pack is over capacity, or in two steps; a step is too large, or its number is missing.
    """
    t, lengths = plan.table, whole_lengths(lengths)
    row, start, length, pack = (t[c].to_numpy() for c in ("row", "start", "length", "pack"))
    unknown = row[(row < 0) | (row >= lengths.size)]
    if unknown.size:
        raise PlanError(f"row {int(unknown[0])} is in the plan but the data has rows 0..{lengths.size - 1}")
    beyond = np.flatnonzero((length < 1) | (start < 0) | (start + length.astype(np.int64) > lengths[row]))
    if beyond.size:
        i = beyond[0]
        raise PlanError(f"row {row[i]}: the plan has tokens {start[i]}..{start[i] + length[i]}, the data 0..{lengths[row[i]]}")
    off = np.flatnonzero((t.epoch < 0) | (t.epoch >= plan.epochs))
    if off.size:
        raise PlanError(f"row {row[off[0]]} is in epoch {t.epoch.iloc[off[0]]}, and the plan has {plan.epochs} from 0 on")
    lost = np.zeros(lengths.size)
    if fates is not None:
        if not fates.row.between(0, lengths.size - 1).all():
            raise PlanError(f"fates tell of rows {fates.row.min()}..{fates.row.max()} but the data has rows 0..{lengths.size - 1}")
        lost += np.bincount(fates.row, weights=fates.tokens_lost, minlength=lengths.size)
    for epoch in range(plan.epochs):
        now = np.flatnonzero((t.epoch == epoch).to_numpy())
        now = now[np.lexsort((start[now], row[now]))]
        twice = np.flatnonzero((row[now][1:] == row[now][:-1]) & (start[now][1:] < (start[now] + length[now])[:-1]))
        if twice.size:
            raise PlanError(f"epoch {epoch}: row {row[now][twice[0]]} is in the plan twice ({twice.size} such)")
        held = np.bincount(row[now], weights=length[now], minlength=lengths.size)
        off = np.flatnonzero(held + lost != lengths)
        if off.size:
            r = off[0]
            raise PlanError(f"epoch {epoch}: of row {r}'s {lengths[r]} tokens {held[r]:.0f} are in the plan and {lost[r]:.0f} "
                            f"recorded as lost; rows must be there once an epoch ({off.size} such)")  # fmt: skip
    off = np.flatnonzero((t.targets < 0) | (t.targets >= length))
    if off.size:
        i = off[0]
        raise PlanError(f"row {row[i]}: {t.targets.iloc[i]} targets in {length[i]} tokens; the first token is never one")
    order = np.lexsort((t.offset, pack))
    end = t.offset.to_numpy(np.int64)[order] + length[order]
    clash = np.flatnonzero((pack[order][1:] == pack[order][:-1]) & (t.offset.to_numpy()[order][1:] < end[:-1]))
    if clash.size:
        raise PlanError(f"row {row[order][clash[0]]} overlaps its neighbour in pack {pack[order][clash[0]]}")
    outside = np.flatnonzero((end > plan.capacity) | (end - length[order] < 0))
    if outside.size:
        i = order[outside[0]]
        raise PlanError(f"row {row[i]} lies at {t.offset.iloc[i]}..{t.offset.iloc[i] + int(length[i])} of pack {pack[i]}, outside its "
                        f"capacity {plan.capacity}")  # fmt: skip
    packs = plan.packs()
    over = packs[packs.slots > plan.capacity]
    if len(over):
        raise PlanError(f"pack {over.pack.iloc[0]} holds {over.slots.iloc[0]} tokens, over the capacity {plan.capacity}")
    torn = np.flatnonzero((pack[order][1:] == pack[order][:-1]) & (np.diff(t.step.to_numpy()[order]) != 0))
    if torn.size:
        raise PlanError(f"pack {pack[order][torn[0]]} is in more than one step")
    steps = plan.steps()
    if (steps.packs > plan.packs_per_step).any():
        raise PlanError(f"step {steps.step[steps.packs > plan.packs_per_step].iloc[0]} has more than {plan.packs_per_step} packs")
    numbers = steps.step.to_numpy()
    if numbers[-1] - numbers[0] + 1 != len(numbers):
        raise PlanError(f"steps {numbers[0]}..{numbers[-1]} are numbered with gaps: there are only {len(numbers)}")
    present = np.zeros(lengths.size, dtype=bool)
    present[row] = True
    return {"method": plan.method, "rows": len(t), "left_out": int((~present).sum()), "tokens_lost": int(lost.sum()),
            "packs": len(packs), "steps": len(steps), "tokens": int(length.sum(dtype=np.int64)),
            "targets": int(t.targets.sum()), "fill": plan.fill()}  # fmt: skip


def worst_over_mean(plan: Plan, world_size: int, balance: bool = True, cost=None) -> float:
    """Sum of the slowest rank's cost over sum of the ranks' mean cost, over all micro-steps: 1 is perfect balance.

    Args:
        plan, world_size, balance, cost: as in `plan.assign`; by default cost is attention work. A rank without a pack
            costs 0, so short last micro-steps count as waiting too.
    """
    dealt = assign(plan, world_size, balance, cost)
    worst = dealt.groupby(["step", "micro"]).cost.max().sum()
    return float(worst * world_size / dealt.cost.sum())


def weight_shares(plan: Plan, p: float | None = 1.0, denominator: str = "step", edges=EDGES) -> pd.DataFrame:
    """Share of rows, tokens and loss weight over the whole plan, by length of row.

    Args:
        plan: any plan.
        p, denominator: the loss weights, see `weights.token_weights`; ``p=None`` is plain packing's mean (Eq. 3).
        edges: the buckets' upper ends in tokens; one more bucket holds the rest.

    Returns:
        A row a bucket that holds rows: length ("over 8,192 to 16,384"), rows, tokens, weight (shares of one), and ratio =
        weight over rows' share: 1 means that these rows weigh what Eq. 2 says.
    """
    t = plan.table[plan.table.targets > 0]
    weight = (plan_weights(plan, p, denominator)[(plan.table.targets > 0).to_numpy()] * t.targets).to_numpy()
    bucket = np.searchsorted(edges, t.length, side="left")
    names = [f"to {edges[0]:,}", *(f"over {a:,} to {b:,}" for a, b in itertools.pairwise(edges)), f"over {edges[-1]:,}"]
    sums = {"rows": np.bincount(bucket, minlength=len(names)), "tokens": np.bincount(bucket, t.length, len(names)),
            "weight": np.bincount(bucket, weight, len(names))}  # fmt: skip
    table = pd.DataFrame({"length": names} | {k: v / v.sum() for k, v in sums.items()})
    return table.assign(ratio=table.weight / table.rows)[sums["rows"] > 0].reset_index(drop=True)


def report(plan: Plan, world_size: int, long: int = 8192, balance: bool = True) -> dict:
    """One line about a plan: fill, waiting, sequences M a step, and how far a per-step mean over-weights long rows.

    Args:
        plan, world_size, balance: as in `plan.assign`.
        long: rows over this many tokens are "long".

    Returns:
        method, algorithm, packs, steps, fill, worst_over_mean, M_min, M_median, M_max, long_ratio (the long rows' share of
        the epoch's weight under Eq. 4 with each step's own M, over their share of rows; NaN without long rows).
    """
    m = plan.steps().sequences
    shares = weight_shares(plan, edges=(long,))
    ratio = shares.ratio[shares.length.str.startswith("over")]
    return {"method": plan.method, "algorithm": plan.algorithm, "packs": int(plan.steps().packs.sum()), "steps": len(m),
            "fill": plan.fill(), "worst_over_mean": worst_over_mean(plan, world_size, balance), "M_min": int(m.min()),
            "M_median": float(m.median()), "M_max": int(m.max()),
            "long_ratio": float(ratio.iloc[0]) if len(ratio) else float("nan")}  # fmt: skip
