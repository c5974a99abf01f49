"""A plan made shard by shard, for data too large for one table: bounded memory, one Parquet file a shard.

The data comes as shards that each give their rows' lengths. In every epoch the shards are visited in a seeded random order. A
visit cuts the shard into pieces (`rows.fit_rows`), adds the pieces carried over from the visit before, plans them with
`plan.build_plan`, and keeps as many packs as make whole steps; the rows of the rest, fewer than ``packs_per_step`` packs, are
carried over. So every step of an epoch is full but those of its last file, where they differ as in any plan.

    shard 2 -> plan: 19 packs -> 2 steps of 8 -> plan-000-000000.parquet, 3 packs' rows carried over
    shard 0 -> with these rows: 22 packs -> 2 steps of 8 -> plan-000-000001.parquet, 6 packs' rows carried over
    shard 1 -> with these rows: 23 packs -> 3 steps of 8, 8 and 7 -> plan-000-000002.parquet, the epoch's last

Rows are numbered through the shards as given (shard 0's first), steps and packs through all files. Invariants: every row once
an epoch; a step lies in one file, so that file alone gives its M and K, its loss weights and its `assign`; the files are a
function of the lengths and the arguments. Each is written under another name and renamed, the plan after the rows that it
carries over: a rerun skips what is finished and makes the rest as it would have been.

Memory: one shard's lengths, pieces and plan, and fewer than ``packs_per_step`` packs of carried rows; of the whole only the
list of shard sizes.

Fill: a set of T tokens takes fewer than T/C + 1 + e packs of C, where e packs are what the algorithm opens beyond the least
possible (0 for best fit where short rows abound). A carried pack holds at most C tokens, so the files of S shards hold fewer
than T/C + S (1 + e) packs, and their fill is below one table's by at most about (1 + e) / (packs a shard).

Randomness: rows meet in packs and steps with rows of their own shard alone (and the carried ones), and balancing sees one
shard's costs. So a shard should be a random draw of the data; shards of one source each make steps of one source. Epochs
draw the order of shards, packs and steps anew, not what is in a shard.

Cost, measured on two cores (shards of 10^6 rows, 90% lognormal(6.6, 1.0), 10% up to 65,536 tokens, 64 packs of 65,536 a step):
0.6 s a shard "packed" and 1.7 s "balanced", a peak of 0.5 GB over the interpreter's 0.1 GB, a file of 10 to 11 MB, an audit of
0.4 s. Neither time nor memory a shard grew from 5 to 40 shards (of 10^5 rows: 0.14 and 0.15 s, 123 and 127 MB). So 1,000 such
shards, 10^9 rows, are to take 10 or 28 minutes an epoch, 11 GB of files and the same 0.5 GB, and to lose at most 1/72,000 of fill.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from longalign_lib.data.jsonl import write_jsonl
from longalign_lib.files import whole
from longalign_lib.train.plan import COLUMNS, LARGEST, Plan, PlanError, build_plan
from longalign_lib.train.rows import fit_rows

PIECE = ["row", "start", "length", "targets"]


def read_shard(source) -> tuple[np.ndarray, Callable | np.ndarray | None]:
    """Lengths and targets of a shard.

    Args:
        source: int[n] lengths; the path of an .npy file that holds them; a pair (lengths, targets) of arrays or paths, where
            targets may also be a function (rows, starts, lengths) as in `rows.fit_rows`, rows counted in the shard; or
            a function without arguments that returns one of these, called whenever the shard is needed.

    Returns:
        ``(lengths int[n], targets)``; targets None stands for all tokens but a row's first.
    """
    source = source() if callable(source) else source
    lengths, targets = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    lengths, targets = (np.load(x, mmap_mode="r") if isinstance(x, str | Path) else x for x in (lengths, targets))
    return np.asarray(lengths), targets if targets is None or callable(targets) else np.asarray(targets)


def shard_pieces(source, capacity: int, over_long: str, shard: int = 0, first_row: int = 0, size: int | None = None):
    """`rows.fit_rows` of a shard of ``size`` rows, numbered from ``first_row``; ValueError names the shard."""
    lengths, targets = read_shard(source)
    if size is not None and len(lengths) != size:
        raise ValueError(f"shard {shard} has {len(lengths)} rows, not {size} as said before: plan into another folder")
    try:
        of = targets if targets is None or callable(targets) else _targets_of(lengths, targets)
        pieces, fates = fit_rows(lengths, capacity, over_long, of)
    except ValueError as error:
        raise ValueError(f"shard {shard} (its rows counted from 0): {error}") from error
    return pieces.assign(row=pieces.row + first_row), fates.assign(row=fates.row + first_row)


def _targets_of(lengths: np.ndarray, targets: np.ndarray) -> Callable:
    if targets.shape != lengths.shape:
        raise ValueError(f"targets has shape {targets.shape}, lengths has {lengths.shape}: give one number a row")

    def of(rows, starts, held):
        cut = np.flatnonzero(held != lengths[rows])
        if cut.size:
            raise ValueError(f"row {rows[cut[0]]} is cut from {lengths[rows[cut[0]]]} tokens to {held[cut[0]]}, and a number of "
                             "targets does not say which remain: give a function (rows, starts, lengths)")  # fmt: skip
        return targets[rows]

    return of


def visits(seed: int, epochs: int, shards: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, visit, shard) in the order of the files: each epoch all shards in a random order drawn from (seed, epoch)."""
    for epoch in range(epochs):
        for visit, shard in enumerate(np.random.default_rng([seed, epoch]).permutation(shards).tolist()):
            yield epoch, visit, shard


def shard_file(folder: Path, kind: str, epoch: int, visit: int) -> Path:
    """The file of a visit: kind "plan", "carry" or "fates"."""
    return folder / f"{kind}-{epoch:03d}-{visit:06d}.parquet"


def build_shards(
    shards: Sequence, folder: Path | str, *, capacity: int, packs_per_step: int, method: str = "balanced", seed: int = 0,
    epochs: int = 1, over_long: str = "error", sizes: Sequence[int] | None = None, **options,
) -> list[Path]:  # fmt: skip
    """Plan all shards into ``folder``; what is there and finished is kept.

    Args:
        shards: what `read_shard` takes, each.
        folder: ``shards.json`` (sizes and arguments), and for every epoch and visit ``plan-EEE-VVVVVV.parquet`` (a Plan),
            ``carry-…`` (the rows carried over) and, in epoch 0, ``fates-…`` where rows were cut or left out.
        capacity, packs_per_step, method, seed, epochs: as in `plan.build_plan`.
        over_long: as in `rows.fit_rows`.
        sizes: rows of each shard, if known; else every shard is read once more, to count them.
        options: further arguments of `plan.build_plan`.

    Returns:
        The plan files in order.

    Raises:
        ValueError: no shards, a bad length, sizes that do not hold, or a folder that was made with other arguments.
    """
    for name, value in dict(capacity=capacity, packs_per_step=packs_per_step, epochs=epochs).items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [len(read_shard(source)[0]) for source in shards] if sizes is None else list(sizes)
    if not sizes or len(sizes) != len(shards):
        raise ValueError(f"{len(shards)} shards and {len(sizes)} sizes: give at least one shard, and one size each")
    facts = {"sizes": sizes, "capacity": capacity, "packs_per_step": packs_per_step, "method": method, "seed": seed,
             "epochs": epochs, "over_long": over_long}  # fmt: skip
    _agree(folder, facts | options)
    first_row, paths = np.concatenate([[0], np.cumsum(sizes)]).tolist(), []
    for epoch, visit, shard in tqdm(list(visits(seed, epochs, len(sizes))), desc="shards", disable=None):
        paths.append(shard_file(folder, "plan", epoch, visit))
        if paths[-1].exists():
            continue
        carried, step, pack = carried_into(folder, epoch, visit, len(sizes))
        pieces, fates = shard_pieces(shards[shard], capacity, over_long, shard, first_row[shard], sizes[shard])
        if epoch == 0 and len(fates):
            _write(fates, shard_file(folder, "fates", epoch, visit))
        elif epoch == 0:  # what an earlier try with other arguments may have left
            shard_file(folder, "fates", epoch, visit).unlink(missing_ok=True)
        pieces = pd.concat([carried, pieces], ignore_index=True)
        if len(pieces):
            plan = build_plan(pieces, method=method, capacity=capacity, packs_per_step=packs_per_step,
                              seed=int(np.random.default_rng([seed, epoch, shard]).integers(2**62)), **options)  # fmt: skip
        else:
            plan = Plan(pd.DataFrame({k: np.empty(0, v) for k, v in COLUMNS.items()}), method, capacity, packs_per_step, 0)
        table, left = plan.table, plan.table.iloc[:0]
        if visit < len(sizes) - 1:
            table, left = whole_steps(plan)
        news = {"epoch": np.full(len(table), epoch, dtype=COLUMNS["epoch"])}
        for name, first in (("step", step), ("pack", pack)):
            number = table[name].to_numpy(np.int64) + first
            news[name] = number if number.max(initial=0) > LARGEST else number.astype(COLUMNS[name])
        step, pack = (int(news[k].max(initial=first - 1)) + 1 for k, first in (("step", step), ("pack", pack)))
        _write(left[PIECE].astype(np.int64), shard_file(folder, "carry", epoch, visit), {"next_step": step, "next_pack": pack})
        replace(plan, table=table.assign(**news), rows=first_row[-1]).save(paths[-1])  # last: it says that the visit is done
    return paths


def whole_steps(plan: Plan) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make as many full steps as the packs of a plan allow.

    The smallest step is dissolved: its packs top up the steps that miss some (whole groups of ``max_ranks`` first, so that like
    costs stay side by side), and the rest is left.

    Returns:
        The table of the full steps, numbered anew, and the lines of the packs that are left, fewer than
        ``plan.packs_per_step``.
    """
    table, full = plan.table.reset_index(drop=True), plan.packs_per_step
    pack, first = table.pack.to_numpy(), ~table.pack.duplicated().to_numpy()
    old = table.step.to_numpy()[first]  # the step of every pack
    sizes = np.bincount(old)
    kept = np.sort(np.argsort(-sizes, kind="stable")[: old.size // full])
    number = np.full(sizes.size, -1)
    number[kept] = np.arange(kept.size)
    step, missing = number[old], full - sizes[kept]
    takers = np.argsort(missing % plan.max_ranks, kind="stable")
    step[np.flatnonzero(step < 0)[: missing.sum()]] = np.repeat(takers, missing[takers])
    order = np.argsort(step, kind="stable")[np.count_nonzero(step < 0) :]  # packs of full steps, in their new order
    place = np.full(step.size, -1)
    place[order] = np.arange(order.size)
    stays = np.flatnonzero(place[pack] >= 0)
    stays = stays[np.argsort(place[pack[stays]], kind="stable")]
    whole = table.iloc[stays].assign(step=step[pack[stays]], pack=place[pack[stays]]).reset_index(drop=True)
    return whole, table[place[pack] < 0]


def _agree(folder: Path, facts: dict) -> None:
    """Record the arguments of a folder, or hold them against those that its plans were made with."""
    def plain(value):
        return value.item() if isinstance(value, np.generic) else getattr(value, "__qualname__", repr(value))

    facts = json.loads(json.dumps(facts, default=plain))
    before = manifest(folder) if next(folder.glob("plan-*.parquet"), None) else facts
    for name in sorted(facts.keys() | before.keys()):
        if facts.get(name) != before.get(name):
            raise ValueError(f"{folder.name} was planned with {name}={before.get(name)!r}, not {facts.get(name)!r}: finish it "
                             "with its own arguments, or plan into another folder")  # fmt: skip
    write_jsonl(folder / "shards.json", [facts])


def manifest(folder: Path | str) -> dict:
    """What `build_shards` was called with, and the sizes of the shards."""
    return json.loads((Path(folder) / "shards.json").read_text(encoding="utf-8"))


def _write(frame: pd.DataFrame, path: Path, facts: dict | None = None) -> None:
    arrow = pa.Table.from_pandas(frame, preserve_index=False)
    with whole(path) as half:
        pq.write_table(arrow.replace_schema_metadata({**arrow.schema.metadata, b"longalign_shard": json.dumps(facts)}), half)


def carried_into(folder: Path, epoch: int, visit: int, shards: int) -> tuple[pd.DataFrame, int, int]:
    """What comes before a visit: pieces carried over, next step, next pack."""
    if epoch == visit == 0:
        return pd.DataFrame({k: np.empty(0, dtype=np.int64) for k in PIECE}), 0, 0
    at = (epoch, visit - 1) if visit else (epoch - 1, shards - 1)
    path = shard_file(folder, "carry", *at)
    if not path.exists():
        raise PlanError(f"{path.name} is missing: delete {shard_file(folder, 'plan', *at).name} too and run build_shards again")
    return pd.read_parquet(path), *carry_facts(path).values()


def carry_facts(carry: Path) -> dict:
    """Next step and next pack after the visit that wrote this file."""
    return json.loads(pq.read_schema(carry).metadata[b"longalign_shard"])


def iter_shards(folder: Path | str, from_step: int = 0) -> Iterator[Plan]:
    """The plans of a folder in order, from the one that holds step ``from_step`` on; files without a step are passed over.

    Raises:
        PlanError: a file is missing; `build_shards` with the same arguments makes it.
    """
    facts = manifest(folder)
    for epoch, visit, _ in visits(facts["seed"], facts["epochs"], len(facts["sizes"])):
        path, carry = (shard_file(Path(folder), kind, epoch, visit) for kind in ("plan", "carry"))
        if not path.exists() or not carry.exists():
            raise PlanError(f"{path.name} or {carry.name} is missing: run build_shards again with the same arguments")
        if carry_facts(carry)["next_step"] > from_step and pq.read_metadata(path).num_rows:
            yield Plan.load(path)
