"""The Plan: one plain table that says who sits where, for the whole training run.

A row a sequence: ``epoch, step`` (global, counted through all epochs), ``pack`` (likewise), ``offset`` (first token in the
pack), ``row`` (of the data), ``start`` (first token of that row; 0 unless it was split), ``length``, ``targets`` (tokens that the
loss sees). It depends on lengths, capacity, seed and the packs of a step, not on the ranks at hand: `assign` deals a step's
packs to any number of ranks that divides ``packs_per_step``. From it come the pictures of waste, K and M of every step and
so the exact loss weights, simulated times, the audit, and resume (a step number is all the state there is).

    naive     random order; a pack is ``rows_per_pack`` rows, padded to its longest
    sorted    sorted by length, global batches of neighbours in random order; padded likewise
    packed    bins of ``capacity`` tokens in random order, whatever they cost
    balanced  bins of level cost; bins that run side by side cost about the same, while every step holds dear and cheap ones

Invariants: every row is in the plan once an epoch; no pack holds more than ``capacity`` tokens (padding included); steps of
an epoch differ by at most one pack (balanced: one group of at most ``max_ranks`` packs, and groups by one pack), so that no short
last step of a few sequences weighs as much as a whole one; nothing is dropped. Cost: a sort and one packing an epoch, 34 bytes a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from longalign_lib.files import whole
from longalign_lib.train.packing import ALGORITHMS, check_lengths, radix_argsort, whole_lengths, whole_number

METHODS = ("naive", "sorted", "packed", "balanced")
COLUMNS = {"epoch": np.int16, "step": np.int32, "pack": np.int32, "offset": np.int32, "row": np.int64,
           "start": np.int32, "length": np.int32, "targets": np.int32}  # fmt: skip
MOST_EPOCHS = 2**15 - 1
LARGEST = 2**31 - 1  # attention kernels count the tokens of a pack in 32 bits


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
    pool: int | None = None

    @property
    def padded(self) -> bool:
        """Whether a pack's rows are padded to the longest (naive, sorted)."""
        return self.method in ("naive", "sorted")

    def packs(self) -> pd.DataFrame:
        """A row a pack: pack, step, sequences, with_targets (sequences that the loss sees), tokens, targets, longest,
        squares, slots (tokens computed, padding included).

        ``squares`` is the sum of squared lengths as computed, twice the attention work in token pairs.
        """
        t, first = self.table, int(self.table.pack.min())  # not 0 in the file of a later shard
        pack = t.pack.to_numpy() - first
        length = t.length.to_numpy(float)
        sums = {"sequences": None, "with_targets": t.targets.to_numpy() > 0, "tokens": length,
                "targets": t.targets.to_numpy(float), "squares": length * length}  # fmt: skip
        packs = pd.DataFrame({k: np.bincount(pack, w) for k, w in sums.items()})
        longest, step = np.zeros(len(packs)), np.zeros(len(packs), dtype=np.int64)
        np.maximum.at(longest, pack, length)
        step[pack] = t.step
        packs = packs.assign(longest=longest, step=step)
        packs["slots"] = packs.tokens
        if self.padded:
            packs["slots"] = packs.sequences * packs.longest
            packs["squares"] = packs.sequences * packs.longest**2
        whole = ["sequences", "with_targets", "tokens", "targets", "longest", "slots"]
        packs[whole] = packs[whole].astype(np.int64)
        packs.insert(0, "pack", first + np.arange(len(packs)))
        return packs[packs.sequences > 0].reset_index(drop=True)

    def steps(self) -> pd.DataFrame:
        """A row a step: step, packs = K, sequences = M (those with a target), tokens, targets, slots."""
        g = self.packs().groupby("step")
        return g.agg(packs=("pack", "size"), sequences=("with_targets", "sum"), tokens=("tokens", "sum"),
                     targets=("targets", "sum"), slots=("slots", "sum")).reset_index()  # fmt: skip

    def fill(self) -> float:
        """Real tokens over tokens computed (padded plans) or over packs x capacity (packed plans)."""
        packs = self.packs()
        room = packs.slots.sum() if self.padded else len(packs) * self.capacity
        return float(packs.tokens.sum() / room)

    def save(self, path: Path | str) -> Path:
        """Write the table as Parquet, with everything else in its metadata; a file cut off by a kill is never left."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "table"}
        arrow = pa.Table.from_pandas(self.table, preserve_index=False)
        arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), b"longalign_plan": json.dumps(facts)})
        with whole(path) as half:
            pq.write_table(arrow, half)
        return path

    @staticmethod
    def load(path: Path | str) -> Plan:
        """Read what `save` wrote; PlanError if the file holds no plan."""
        import pyarrow.parquet as pq

        arrow = pq.read_table(path)
        facts = (arrow.schema.metadata or {}).get(b"longalign_plan")
        if facts is None:
            raise PlanError(f"{Path(path).name} is a Parquet file without a plan in its metadata; save it with Plan.save")
        return Plan(table=arrow.to_pandas(), **json.loads(facts))


def pair_work(lengths) -> np.ndarray:
    """Attention work of a sequence in token pairs, l^2 / 2: the default cost."""
    return np.asarray(lengths, dtype=float) ** 2 / 2


def build_plan(
    lengths, targets=None, *, method: str, capacity: int, packs_per_step: int, rows_per_pack: int = 1,
    max_ranks: int | None = None, seed: int = 0, epochs: int = 1, algorithm: str | None = None,
    cost: Callable[[np.ndarray], np.ndarray] | None = None, pool: int | None = None,
) -> Plan:  # fmt: skip
    """Make a plan.

    Args:
        lengths: int[n], tokens a row, each in 0..capacity, rows of length 0 are left out; or the pieces of `rows.fit_rows`.
        targets: int[n], target tokens a row; ``lengths - 1`` (all but the first) by default.
        method: "naive", "sorted", "packed" or "balanced".
        capacity: tokens a pack holds at most.
        packs_per_step: packs of a global step (the paper: 8 packs, or 96 padded rows).
        rows_per_pack: rows of a padded pack (one rank's micro-batch); packed plans ignore it.
        max_ranks: the largest number of ranks to balance for; divides ``packs_per_step``; by default equal to it.
        seed, epochs: every epoch is drawn anew from ``(seed, epoch)``.
        algorithm: a name in `packing.ALGORITHMS`; by default "best_fit_decreasing" for "packed", "cost_balanced" for
            "balanced".
        cost: lengths -> work of each sequence, for "balanced": what packs are levelled in and sorted by. By default they are
            sorted by attention work (`pair_work`) and filled by `cost_balanced`'s own default, which adds linear work.
        pool: how many steps' packs, drawn at random, "balanced" sorts by cost together. The whole epoch (None) waits
            least; 1 mixes most, so that M differs least from step to step. `audit.report` shows both.

    Raises:
        ValueError: names the argument that is off and what it accepts.
    """
    if isinstance(lengths, pd.DataFrame):
        pieces = lengths
        missing = [c for c in ("row", "start", "length", "targets") if c not in pieces]
        if missing:
            raise ValueError(f"a frame of pieces lacks columns {missing}: give what rows.fit_rows returns, or lengths alone")
        if targets is not None:
            raise ValueError("pieces carry their own targets: give fit_rows a targets_of, not build_plan targets")
        rows, starts, lengths, targets = (pieces[c].to_numpy() for c in ("row", "start", "length", "targets"))
    else:
        lengths = whole_lengths(lengths)
        rows, starts = np.arange(lengths.size), np.zeros(lengths.size, dtype=np.int64)
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    algorithm = algorithm or ("cost_balanced" if method == "balanced" else "best_fit_decreasing")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    max_ranks = packs_per_step if max_ranks is None else max_ranks
    counts = dict(capacity=capacity, packs_per_step=packs_per_step, rows_per_pack=rows_per_pack, max_ranks=max_ranks)
    capacity, packs_per_step, rows_per_pack, max_ranks = (whole_number(k, v, LARGEST) for k, v in counts.items())
    epochs, pool = whole_number("epochs", epochs, MOST_EPOCHS), None if pool is None else whole_number("pool", pool, LARGEST)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a whole number >= 0, got {seed!r}")
    if packs_per_step % max_ranks:
        raise ValueError(f"packs_per_step {packs_per_step} is no multiple of max_ranks {max_ranks}")
    targets = np.maximum(lengths - 1, 0) if targets is None else np.asarray(targets)
    if targets.size and not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(f"targets must be whole numbers of tokens, got dtype {targets.dtype}")
    if targets.shape != lengths.shape:
        raise ValueError(f"targets has shape {targets.shape}, lengths has {lengths.shape}: give one number a row")
    here = np.flatnonzero(lengths != 0)
    held = check_lengths(lengths[here], capacity, rows[here])
    if not here.size:
        raise ValueError("no row has a token: there is nothing to plan")
    far = np.flatnonzero(starts[here] > LARGEST - capacity)
    if far.size:
        row = rows[here[far[0]]]
        raise ValueError(f"row {row} has a piece from token {starts[here[far[0]]]} on, and a plan counts tokens of a row up to "
                         f"{LARGEST}: cut such a document into several rows")  # fmt: skip
    off = np.flatnonzero((targets[here] >= held) | (targets[here] < 0))
    if off.size:
        line = int(here[off[0]])
        raise ValueError(f"row {rows[line]}: {targets[line]} targets in {lengths[line]} tokens; the first token is never one")
    if method in ("naive", "sorted") and rows_per_pack * int(held.max()) > capacity:
        raise ValueError(f"a padded pack of {rows_per_pack} rows of {held.max()} tokens needs {rows_per_pack * int(held.max())} "
                         f"slots, over the capacity of {capacity}: lower rows_per_pack or raise the capacity")  # fmt: skip
    columns = {name: [] for name in COLUMNS}
    step = pack = 0
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        shuffled = rng.permutation(held.size)
        of_row, sizes = _epoch(held[shuffled], method, capacity, packs_per_step, rows_per_pack, max_ranks, algorithm, cost,
                               pool, rng)  # fmt: skip
        order = radix_argsort(of_row)  # packs in order, rows of a pack in the random order of ``shuffled``
        of_row, line = of_row[order], here[shuffled[order]]
        first = np.flatnonzero(np.diff(of_row, prepend=-1))  # the first line of every pack
        spans = np.diff(np.append(first, line.size))
        length = lengths[line]
        if method in ("naive", "sorted"):
            offset = (np.arange(line.size) - np.repeat(first, spans)) * np.repeat(np.maximum.reduceat(length, first), spans)
        else:
            before = np.cumsum(length) - length
            offset = before - np.repeat(before[first], spans)
        of_pack = np.repeat(np.arange(len(sizes)), sizes) + step
        values = (np.full(line.size, epoch), of_pack[of_row], of_row + pack, offset, rows[line], starts[line], length, targets[line])
        for (name, dtype), column in zip(COLUMNS.items(), values, strict=True):
            columns[name].append(column.astype(dtype))
        step, pack = step + len(sizes), pack + len(spans)
    table = pd.DataFrame({name: np.concatenate(parts) for name, parts in columns.items()})
    packed = method in ("packed", "balanced")
    return Plan(table, method, capacity, packs_per_step, int(rows.max()) + 1, rows_per_pack, max_ranks, int(seed), epochs,
                algorithm if packed else "", pool if method == "balanced" else None)  # fmt: skip


def _even(items: int, most: int) -> np.ndarray:
    """Sizes of as few groups as ``most`` items each allow, as even as possible: 17 items, at most 8: 6 6 5."""
    groups = -(-items // most)
    return np.full(groups, items // groups) + (np.arange(groups) < items % groups)


def _epoch(lengths, method, capacity, per_step, rows_per_pack, ranks, algorithm, cost, pool, rng):
    """One epoch: the pack of every row, packs numbered in the order of steps, and how many packs each step has."""
    n = lengths.size
    if method in ("naive", "sorted"):
        order = np.argsort(lengths, kind="stable") if method == "sorted" else np.arange(n)
        packs = -(-n // rows_per_pack)
        sizes = _even(packs, per_step)
        steps = rng.permutation(len(sizes)) if method == "sorted" else np.arange(len(sizes))  # the order of global batches
        of_row = np.empty(n, dtype=np.int64)
        of_row[order] = np.arange(n) // rows_per_pack
        ends = np.cumsum(sizes)
        new_order = np.concatenate([np.arange(ends[s] - sizes[s], ends[s]) for s in steps])
        sizes = sizes[steps]
    else:
        fill = ALGORITHMS[algorithm]
        of_row = (partial(fill, cost=cost) if cost and algorithm == "cost_balanced" else fill)(lengths, capacity)
        packs = int(of_row.max()) + 1
        if method == "packed":
            new_order, sizes = rng.permutation(packs), _even(packs, per_step)
        else:
            work = np.asarray((cost or pair_work)(lengths), dtype=float)
            if work.shape != lengths.shape or not np.isfinite(work).all():
                raise ValueError(f"cost must give one finite number a row, got shape {work.shape} for {lengths.shape}")
            costs = np.bincount(of_row, weights=work)
            new_order, sizes = _balanced_order(costs, np.bincount(of_row), per_step, ranks, pool, rng)
    place = np.empty(packs, dtype=np.int64)
    place[new_order] = np.arange(packs)
    return place[of_row], sizes


def _balanced_order(costs, sequences, per_step: int, ranks: int, pool: int | None, rng):
    """Order of the packs, and how many each step gets.

    Packs sorted by cost form groups of ``ranks`` that run side by side, so nobody waits; where packs do not come out even,
    groups hold fewer, all alike but for one pack. The groups, dearest first, are dealt to the steps like cards, a round after
    the other, and in each round the group of most sequences goes to the step that has fewest: steps hold dear and cheap
    groups alike, and M is as level as groups allow. Only the ``pool`` steps at hand are sorted together.
    """
    packs, groups_a_step = costs.size, per_step // ranks
    shuffled = rng.permutation(packs)
    group_sizes = _even(packs, ranks)
    groups_of_step = _even(len(group_sizes), groups_a_step)
    chosen, at, group = [], 0, 0  # chosen: the packs of each step
    for part in np.array_split(groups_of_step, -(-len(groups_of_step) // (pool or len(groups_of_step)))):
        sizes = group_sizes[group : group + int(part.sum())]
        here = shuffled[at : at + int(sizes.sum())]
        at, group = at + here.size, group + sizes.size
        here = here[np.argsort(-costs[here], kind="stable")]
        groups = np.split(here, np.cumsum(sizes)[:-1])
        size = np.array([sequences[g].sum() for g in groups])
        have, dealt = np.zeros(len(part)), [[] for _ in part]
        for first in range(0, len(groups), len(part)):  # a round: one group for each step
            now = np.arange(first, min(first + len(part), len(groups)))
            now = now[np.argsort(-size[now], kind="stable")]
            for which, to in zip(now, np.lexsort((rng.random(len(part)), have)), strict=False):
                dealt[to].append(groups[which])
                have[to] += size[which]
        chosen += [np.concatenate(d) for d in dealt]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    return np.concatenate(chosen), np.array([len(c) for c in chosen])


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
    whole = isinstance(world_size, int | np.integer) and not isinstance(world_size, bool)
    if not whole or world_size < 1 or plan.packs_per_step % world_size:
        fits = [w for w in range(1, plan.packs_per_step + 1) if plan.packs_per_step % w == 0]
        raise ValueError(f"{plan.packs_per_step} packs a step cannot be dealt to {world_size!r} ranks; use one of {fits}")
    packs = plan.packs()
    packs["cost"] = packs.squares / 2 if cost is None else np.asarray(cost(packs), dtype=float)
    dealt = packs.sort_values(["step", "cost", "pack"], ascending=[True, False, True]) if balance else packs
    place = dealt.groupby("step").cumcount()
    dealt = dealt.assign(micro=place // world_size, rank=place % world_size)
    return dealt[["step", "pack", "micro", "rank", "cost"]].reset_index(drop=True)


def micro_steps(plan: Plan, world_size: int) -> int:
    """Micro-steps (gradient accumulation) of every step at this many ranks."""
    return -(-plan.packs_per_step // world_size)
