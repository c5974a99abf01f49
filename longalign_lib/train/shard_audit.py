"""Proof that a folder of shard plans holds every row exactly once an epoch, with one shard in memory at a time.

By induction over the visits: the pieces carried in and those of the shard (cut again from the data's lengths) are exactly the
lines of the visit's file and the pieces carried out; nothing is carried out of an epoch. So every piece is in the files once
an epoch, and `rows.fit_rows` accounts for every token of the rows. Beside that, steps and packs are numbered through all files
without a gap, every step is full but in an epoch's last file, documents do not overlap, no pack is over capacity, and the
``fates-...`` files say what was cut or left out. Cost: a sort of each shard's lines; memory of one shard and its carried rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from longalign_lib.train.plan import Plan, PlanError
from longalign_lib.train.shards import PIECE, carried_into, carry_facts, manifest, shard_file, shard_pieces, visits


def audit_shards(shards: Sequence, folder: Path | str) -> dict:
    """Prove all files of `shards.build_shards` against the data.

    Args:
        shards: the same sources, in the same order, as were planned; each is read once an epoch.
        folder: where the plans are.

    Returns:
        rows (of the data), files, lines, tokens, targets, tokens_lost, steps, packs (over all epochs), fill (as of packed
        plans: tokens over packs x capacity).

    Raises:
        PlanError: names the file and the first row, pack or step that is off.
    """
    folder, facts = Path(folder), manifest(folder)
    sizes, capacity = facts["sizes"], facts["capacity"]
    first_row, sums = np.concatenate([[0], np.cumsum(sizes)]).tolist(), {"lines": 0, "tokens": 0, "targets": 0, "tokens_lost": 0}
    for epoch, visit, shard in visits(facts["seed"], facts["epochs"], len(sizes)):
        path, last = shard_file(folder, "plan", epoch, visit), visit == len(sizes) - 1
        carried, step, pack = carried_into(folder, epoch, visit, len(sizes))
        pieces, fates = shard_pieces(shards[shard], capacity, facts["over_long"], shard, first_row[shard], sizes[shard])
        carry, told = shard_file(folder, "carry", epoch, visit), shard_file(folder, "fates", 0, visit)
        if epoch == 0 and not (pd.read_parquet(told) if told.exists() else fates.iloc[:0]).equals(fates):
            raise PlanError(f"{told.name}: {len(fates)} rows of shard {shard} were cut or left out, and it says something else")
        plan = Plan.load(path)
        t, left = plan.table, pd.read_parquet(carry)
        _same(path.name, pd.concat([carried, pieces]), pd.concat([t[PIECE], left]))
        if last and len(left):
            raise PlanError(f"{carry.name}: row {left.row.iloc[0]} is carried out of epoch {epoch}")
        _well_formed(path.name, plan, step, pack, last)
        if carry_facts(carry) != {"next_step": step + t.step.nunique(), "next_pack": pack + t.pack.nunique()}:
            raise PlanError(f"{carry.name}: the next step and pack are not {carry_facts(carry)}")
        for name, value in zip(sums, (len(t), t.length.sum(), t.targets.sum(), fates.tokens_lost.sum()), strict=True):
            sums[name] += int(value)
    last_facts = carry_facts(carry)
    return {"rows": first_row[-1], "files": len(sizes) * facts["epochs"], **sums, "steps": last_facts["next_step"],
            "packs": last_facts["next_pack"], "fill": sums["tokens"] / max(last_facts["next_pack"] * capacity, 1)}  # fmt: skip


def _same(name: str, wanted: pd.DataFrame, found: pd.DataFrame) -> None:
    """PlanError unless both frames hold the same pieces, each as often."""
    a, b = (f[PIECE].to_numpy(np.int64)[np.lexsort((f.start, f.row))] for f in (wanted, found))
    n = min(len(a), len(b))
    off = np.flatnonzero((a[:n] != b[:n]).any(axis=1))
    i = int(off[0]) if off.size else n
    if i < max(len(a), len(b)):
        want, got = (dict(zip(PIECE, x[i].tolist())) if i < len(x) else "nothing" for x in (a, b))
        raise PlanError(f"{name}: the data has {want} where the file and what it carries over have {got}")


def _well_formed(name: str, plan: Plan, step: int, pack: int, last: bool) -> None:
    """PlanError if a file's numbers have a gap, a step is not full, documents overlap or a pack is over capacity."""
    t = plan.table
    if not len(t):
        return
    steps, packs, offset, length = (t[c].to_numpy(np.int64) for c in ("step", "pack", "offset", "length"))
    new = np.diff(packs, prepend=pack - 1)
    gap = np.flatnonzero((new < 0) | (new > 1) | (np.diff(steps, prepend=step - 1) > new) | (np.diff(steps, prepend=step - 1) < 0))
    if gap.size or packs[0] != pack or steps[0] != step:
        raise PlanError(f"{name}: pack {packs[gap[0] if gap.size else 0]} is out of order or in two steps")
    held = np.bincount(steps[new == 1] - step)
    if (held > plan.packs_per_step).any() or (not last and (held < plan.packs_per_step).any()):
        raise PlanError(f"{name}: a step has {held[held != plan.packs_per_step][0]} packs, not {plan.packs_per_step}")
    first = np.flatnonzero(new)
    clash = np.flatnonzero((new[1:] == 0) & (offset[1:] < (offset + length)[:-1]))
    if clash.size or offset[first].any():
        raise PlanError(f"{name}: a row overlaps its neighbour in pack {packs[clash[0] if clash.size else 0]}")
    end = offset + (np.repeat(np.maximum.reduceat(length, first), np.diff(np.append(first, len(t)))) if plan.padded else length)
    if (end > plan.capacity).any():
        raise PlanError(f"{name}: pack {packs[end > plan.capacity][0]} is over the capacity {plan.capacity}")
