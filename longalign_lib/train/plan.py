"""The Plan: one plain table that says who sits where, for the whole training run.

A row a sequence: ``epoch, step`` (global, counted through all epochs), ``pack`` (likewise), ``offset`` (first token in the
pack), ``row`` (of the data), ``length``, ``targets`` (tokens that the loss sees). It depends on lengths, capacity, seed and the
packs of a step, not on the ranks at hand: `assign` deals a step's packs to any number of ranks that divides
``packs_per_step``. From it come the pictures of waste, K and M of every step and so the exact loss weights, simulated
times, the audit, and resume (a step number is all the state there is).

    naive     random order; a pack is ``rows_per_pack`` rows, padded to its longest
    sorted    sorted by length, global batches of neighbours in random order; padded likewise
    packed    bins of ``capacity`` tokens in random order, whatever they cost
    balanced  packed, and packs that run side by side cost about the same, while every step holds dear and cheap ones

Invariants: every row is in the plan once an epoch; no pack holds more than ``capacity`` tokens (padding included); a
step may be short (the last one, or any one of a sorted plan), nothing is dropped. Cost: a sort and one packing an epoch; 90 bytes a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from longalign_lib.train.packing import ALGORITHMS, check_lengths

METHODS = ("naive", "sorted", "packed", "balanced")
COLUMNS = ["epoch", "step", "pack", "offset", "row", "length", "targets"]


class PlanError(ValueError):
    """A plan breaks one of its promises; the message names the first row or pack that does."""


@dataclass(frozen=True)
class Plan:
    """The table and what it was made from. ``padded`` packs are ``[rows, longest]``, others one line of documents."""

    table: pd.DataFrame = field(repr=False)
    method: str
    capacity: int
    packs_per_step: int
    rows: int
    rows_per_pack: int = 1
    max_ranks: int = 1
    seed: int = 0
    epochs: int = 1
    algorithm: str = ""

    @property
    def padded(self) -> bool:
        """Whether a pack's rows are padded to the longest (naive, sorted)."""
        return self.method in ("naive", "sorted")

    def packs(self) -> pd.DataFrame:
        """A row a pack: step, pack, sequences, tokens, targets, slots (tokens computed, padding included), squares.

        ``squares`` is the sum of squared lengths as computed, twice the attention work in token pairs.
        """
        t = self.table.assign(square=self.table.length.astype(float) ** 2)
        g = t.groupby("pack", sort=True)
        packs = g.agg(step=("step", "first"), sequences=("row", "size"), tokens=("length", "sum"),
                      targets=("targets", "sum"), longest=("length", "max"), squares=("square", "sum"))  # fmt: skip
        packs["slots"] = packs.tokens
        if self.padded:
            packs["slots"] = packs.sequences * packs.longest
            packs["squares"] = packs.sequences * packs.longest.astype(float) ** 2
        return packs.reset_index()

    def steps(self) -> pd.DataFrame:
        """A row a step: K = packs, M = sequences with a target, tokens, targets, slots."""
        t = self.table.assign(counts=self.table.targets > 0)
        steps = t.groupby("step").agg(packs=("pack", "nunique"), sequences=("counts", "sum"), tokens=("length", "sum"),
                                      targets=("targets", "sum"))  # fmt: skip
        steps["slots"] = self.packs().groupby("step").slots.sum()
        return steps.reset_index()

    def fill(self) -> float:
        """Real tokens over tokens computed (padded plans) or over packs x capacity (packed plans)."""
        packs = self.packs()
        room = packs.slots.sum() if self.padded else len(packs) * self.capacity
        return float(packs.tokens.sum() / room)

    def save(self, path: Path | str) -> Path:
        """Write the table as Parquet, with everything else in its metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        facts = {k: v for k, v in asdict(self).items() if k != "table"}
        arrow = pa.Table.from_pandas(self.table, preserve_index=False)
        arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), b"longalign_plan": json.dumps(facts)})
        pq.write_table(arrow, path)
        return Path(path)

    @staticmethod
    def load(path: Path | str) -> Plan:
        """Read what `save` wrote; PlanError if the file holds no plan."""
        import pyarrow.parquet as pq

        arrow = pq.read_table(path)
        facts = (arrow.schema.metadata or {}).get(b"longalign_plan")
        if facts is None:
            raise PlanError(f"{Path(path).name} is a Parquet file without a plan in its metadata; save it with Plan.save")
        return Plan(table=arrow.to_pandas(), **json.loads(facts))


def fit_lengths(lengths, capacity: int, over_long: str = "truncate") -> tuple[np.ndarray, pd.DataFrame]:
    """Decide the fate of rows longer than ``capacity``.

    Args:
        lengths: int[n], tokens a row.
        capacity: tokens a pack.
        over_long: "truncate" from the right as the paper says, "drop", or "error".

    Returns:
        Lengths that fit (0 where a row is left out), and a frame (row, length, fate, tokens_lost) of every row touched;
        empty rows are left out as "empty".

    Raises:
        ValueError: unknown choice, or "error" and a row is too long (it is named).
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if over_long not in ("truncate", "drop", "error"):
        raise ValueError(f"over_long {over_long!r} is not one of truncate, drop, error")
    long, empty = lengths > capacity, lengths < 1
    if over_long == "error" and long.any():
        row = int(np.flatnonzero(long)[0])
        raise ValueError(
            f"row {row} has {int(lengths[row])} tokens and the capacity is {capacity} ({int(long.sum())} such rows): "
            "raise the capacity, or choose over_long='truncate' or 'drop'"
        )
    fitted = np.where(long, capacity if over_long == "truncate" else 0, np.maximum(lengths, 0))
    rows = np.flatnonzero(long | empty)
    fates = np.where(empty[rows], "empty", "truncated" if over_long == "truncate" else "dropped")
    return fitted, pd.DataFrame(
        {"row": rows, "length": lengths[rows], "fate": fates, "tokens_lost": (lengths - fitted)[rows]}
    )


def pair_work(lengths) -> np.ndarray:
    """Attention work of a sequence in token pairs, l^2 / 2: the default cost."""
    return np.asarray(lengths, dtype=float) ** 2 / 2


def build_plan(
    lengths, targets=None, *, method: str, capacity: int, packs_per_step: int, rows_per_pack: int = 1,
    max_ranks: int | None = None, seed: int = 0, epochs: int = 1, algorithm: str = "best_fit_decreasing",
    cost: Callable[[np.ndarray], np.ndarray] = pair_work,
) -> Plan:  # fmt: skip
    """Make a plan.

    Args:
        lengths: int[n], tokens a row, each in 0..capacity; rows of length 0 are left out (see `fit_lengths`).
        targets: int[n], target tokens a row; ``lengths - 1`` (all but the first) by default.
        method: "naive", "sorted", "packed" or "balanced".
        capacity: tokens a pack holds at most.
        packs_per_step: packs of a global step (the paper: 8 packs, or 96 padded rows).
        rows_per_pack: rows of a padded pack (one rank's micro-batch); packed plans ignore it.
        max_ranks: the largest number of ranks to balance for; divides ``packs_per_step``; by default equal to it.
        seed, epochs: every epoch is drawn anew from ``(seed, epoch)``.
        algorithm: a name in `packing.ALGORITHMS`, for "packed" and "balanced".
        cost: lengths -> work of each sequence, for "balanced".

    Raises:
        ValueError: names the argument that is off and what it accepts.
    """
    lengths = np.asarray(lengths)
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    max_ranks = packs_per_step if max_ranks is None else max_ranks
    for name, value in dict(packs_per_step=packs_per_step, rows_per_pack=rows_per_pack, max_ranks=max_ranks,
                            epochs=epochs).items():  # fmt: skip
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if packs_per_step % max_ranks:
        raise ValueError(f"packs_per_step {packs_per_step} is no multiple of max_ranks {max_ranks}")
    targets = np.maximum(lengths - 1, 0) if targets is None else np.asarray(targets)
    if targets.shape != lengths.shape:
        raise ValueError(f"targets has shape {targets.shape}, lengths has {lengths.shape}: give one number a row")
    rows = np.flatnonzero(lengths != 0)
    check_lengths(lengths[rows], capacity)
    if not rows.size:
        raise ValueError("no row has a token: there is nothing to plan")
    if (targets[rows] >= lengths[rows]).any() or (targets < 0).any():
        row = int(rows[np.flatnonzero((targets[rows] >= lengths[rows]) | (targets[rows] < 0))[0]])
        raise ValueError(f"row {row}: {targets[row]} targets in {lengths[row]} tokens; the first token is never one")
    parts, step, pack = [], 0, 0
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        of_row, step_of_pack = _epoch(lengths[rows], method, capacity, packs_per_step, rows_per_pack, max_ranks,
                                      algorithm, cost, rng)  # fmt: skip
        order = np.lexsort((rng.random(rows.size), of_row))  # random order inside a pack, packs in order
        part = pd.DataFrame({"epoch": epoch, "step": step_of_pack[of_row[order]] + step, "pack": of_row[order] + pack,
                             "row": rows[order]})  # fmt: skip
        parts.append(part)
        step, pack = step + int(step_of_pack.max()) + 1, pack + len(step_of_pack)
    table = pd.concat(parts, ignore_index=True)
    table["length"], table["targets"] = lengths[table.row].astype(np.int64), targets[table.row].astype(np.int64)
    by_pack = table.groupby("pack").length
    if method in ("naive", "sorted"):
        table["offset"] = by_pack.cumcount() * by_pack.transform("max")
    else:
        table["offset"] = by_pack.cumsum() - table.length
    return Plan(table[COLUMNS], method, int(capacity), int(packs_per_step), int(lengths.size), int(rows_per_pack),
                int(max_ranks), int(seed), int(epochs), algorithm if method in ("packed", "balanced") else "")  # fmt: skip


def _epoch(lengths, method, capacity, per_step, rows_per_pack, ranks, algorithm, cost, rng):
    """One epoch: (pack of every row, step of every pack), packs numbered in the order of their steps."""
    n = lengths.size
    if method in ("naive", "sorted"):
        shuffled = rng.permutation(n)
        if method == "sorted":
            shuffled = shuffled[np.argsort(lengths[shuffled], kind="stable")]
            if rows_per_pack * int(lengths.max()) > capacity:
                _too_wide(rows_per_pack, int(lengths.max()), capacity)
        elif rows_per_pack * int(lengths.max()) > capacity:
            _too_wide(rows_per_pack, int(lengths.max()), capacity)
        group = np.empty(n, dtype=np.int64)
        group[shuffled] = np.arange(n) // (rows_per_pack * per_step)  # global batches of neighbours
        batches = rng.permutation(int(group.max()) + 1) if method == "sorted" else np.arange(int(group.max()) + 1)
        step_of_row = np.argsort(batches)[group]
        within = np.empty(n, dtype=np.int64)
        within[shuffled] = np.arange(n) % (rows_per_pack * per_step) // rows_per_pack
        _, of_row = np.unique(step_of_row * per_step + within, return_inverse=True)
        step_of_pack = np.empty(of_row.max() + 1, dtype=np.int64)
        step_of_pack[of_row] = step_of_row
        return of_row, step_of_pack
    shuffled = rng.permutation(n)
    of_row = np.empty(n, dtype=np.int64)
    of_row[shuffled] = ALGORITHMS[algorithm](lengths[shuffled], capacity)
    packs = int(of_row.max()) + 1
    if method == "packed":
        order = rng.permutation(packs)
    else:
        order = _balanced_order(np.bincount(of_row, weights=cost(lengths)), per_step, ranks, rng)
    place = np.empty(packs, dtype=np.int64)
    place[order] = np.arange(packs)
    return place[of_row], np.arange(packs) // per_step


def _too_wide(rows_per_pack: int, longest: int, capacity: int):
    raise ValueError(
        f"a padded pack of {rows_per_pack} rows of {longest} tokens needs {rows_per_pack * longest} slots, over the "
        f"capacity of {capacity}: lower rows_per_pack or raise the capacity"
    )


def _balanced_order(costs: np.ndarray, per_step: int, ranks: int, rng) -> np.ndarray:
    """Order of packs: groups of ``ranks`` packs of like cost; each step draws one group from each stratum of cost.

    A group runs side by side, so nobody waits; a step mixes strata, so that no step is all long rows (which the loss,
    divided by each step's own number of sequences, would over-weight).
    """
    order = np.argsort(-costs, kind="stable")
    groups = [order[i : i + ranks] for i in range(0, order.size, ranks)]
    ragged = [groups.pop()] if groups and groups[-1].size < ranks else []  # the cheapest, incomplete one goes last
    strata = max(1, per_step // ranks)
    steps = -(-len(groups) // strata)
    drawn = [rng.permutation(np.arange(s * steps, min((s + 1) * steps, len(groups)))) for s in range(strata)]
    which = [[] for _ in range(steps)]
    for stratum in drawn:
        for k, group in enumerate(stratum):
            which[k].append(int(group))
    which.sort(key=len, reverse=True)  # steps that a short last stratum left incomplete come last
    full = [w for w in which if len(w) == strata]
    full = [full[i] for i in rng.permutation(len(full))]
    chosen = [groups[g] for w in full + [w for w in which if len(w) < strata] for g in w] + ragged
    return np.concatenate(chosen)


def assign(plan: Plan, world_size: int, balance: bool = True, cost: Callable | None = None) -> pd.DataFrame:
    """Deal the packs of each step to ranks and micro-steps.

    Args:
        plan: any plan.
        world_size: ranks; divides ``plan.packs_per_step``.
        balance: sort a step's packs by cost first, so that the packs of a micro-step cost about the same. False keeps
            the plan's order (random, for naive and packed plans).
        cost: per-pack cost from `Plan.packs`'s frame; attention work (``squares``) by default.

    Returns:
        A row a pack: step, pack, micro, rank, cost. A short step leaves ranks without a pack in its last micro-step.
    """
    if isinstance(world_size, bool) or world_size < 1 or plan.packs_per_step % world_size:
        fits = [w for w in range(1, plan.packs_per_step + 1) if plan.packs_per_step % w == 0]
        raise ValueError(f"{plan.packs_per_step} packs a step cannot be dealt to {world_size} ranks; use one of {fits}")
    packs = plan.packs()
    packs["cost"] = packs.squares / 2 if cost is None else np.asarray(cost(packs), dtype=float)
    dealt = packs.sort_values(["step", "cost", "pack"], ascending=[True, False, True]) if balance else packs
    place = dealt.groupby("step").cumcount()
    dealt = dealt.assign(micro=place // world_size, rank=place % world_size)
    return dealt[["step", "pack", "micro", "rank", "cost"]].reset_index(drop=True)


def micro_steps(plan: Plan, world_size: int) -> int:
    """Micro-steps (gradient accumulation) of every step at this many ranks."""
    return -(-plan.packs_per_step // world_size)


def audit(plan: Plan, lengths) -> dict:
    """Prove the plan against the data; returns its facts.

    Raises:
        PlanError: a row is missing, twice, or unknown; a length differs; documents overlap; a pack is over capacity.
    """
    t, lengths = plan.table, np.asarray(lengths)
    unknown = t.row[(t.row < 0) | (t.row >= lengths.size)]
    if len(unknown):
        raise PlanError(f"row {int(unknown.iloc[0])} is in the plan but the data has rows 0..{lengths.size - 1}")
    wrong = t[t.length.to_numpy() != lengths[t.row]]
    if len(wrong):
        w = wrong.iloc[0]
        raise PlanError(f"row {w.row} has {w.length} tokens in the plan and {lengths[w.row]} in the data")
    for epoch in range(plan.epochs):
        seen = np.bincount(t.row[t.epoch == epoch], minlength=lengths.size)
        off = np.flatnonzero(seen != (lengths > 0))
        if off.size:
            raise PlanError(f"epoch {epoch}: row {off[0]} is in the plan {seen[off[0]]} times, not once ({off.size} such)")
    s = t.sort_values(["pack", "offset"])
    after = s.groupby("pack").offset.shift(-1)
    overlap = s[(s.offset + s.length > after)]
    if len(overlap):
        raise PlanError(f"row {overlap.row.iloc[0]} overlaps its neighbour in pack {overlap.pack.iloc[0]}")
    packs = plan.packs()
    over = packs[packs.slots > plan.capacity]
    if len(over):
        raise PlanError(f"pack {over.pack.iloc[0]} holds {over.slots.iloc[0]} tokens, over the capacity {plan.capacity}")
    spread = t.groupby("pack").step.nunique()
    if (spread > 1).any():
        raise PlanError(f"pack {spread.index[spread > 1][0]} is in more than one step")
    steps = plan.steps()
    if (steps.packs > plan.packs_per_step).any():
        raise PlanError(f"step {steps.step[steps.packs > plan.packs_per_step].iloc[0]} has too many packs")
    return {"method": plan.method, "rows": len(t), "left_out": int((lengths == 0).sum()), "packs": len(packs),
            "steps": len(steps), "tokens": int(t.length.sum()), "targets": int(t.targets.sum()),
            "fill": plan.fill()}  # fmt: skip
