"""The token store on disk: ragged rows in Arrow files, opened by memory map and never read whole.

    index.arrow          a row a conversation: shard, place in it, sample, length, target tokens; written last
    shard-00000.arrow    input_ids list<uint16 | int32>, target_runs list<int32>, targets, tokens, sample, meta (JSON)

Labels are kept as runs: [start, end) of each stretch of target tokens in a row, a few numbers a conversation. Ids take two
bytes where the vocabulary has at most 65,536 tokens and four elsewhere. A shard is an Arrow stream of one batch, which
`datasets.Dataset.from_file` opens as well; its schema says how it came about (`key`, `facts`).

Invariants: a file is whole or not there; an index is written when all its shards are; a shard that is not the one its
index knows is an error. Cost: opening reads the index (24 bytes a row); a row touches its own tokens alone.
Shapes: n rows, N tokens and R runs of a shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from longalign_lib.files import whole

INDEX = "index.arrow"
SHARD = "shard-{:05d}.arrow"
SMALL_VOCABULARY = 1 << 16
_FACTS = b"longalign_store"


def id_type(vocabulary: int) -> np.dtype:
    """The narrowest of uint16 and int32 that holds ids below ``vocabulary``."""
    return np.dtype(np.uint16 if vocabulary <= SMALL_VOCABULARY else np.int32)


def runs_of(mask: np.ndarray) -> np.ndarray:
    """[start, end) of each stretch of True: int64[R, 2].

    >>> runs_of(np.array([0, 1, 1, 0, 1], bool)).tolist()
    [[1, 3], [4, 5]]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(mask, dtype=bool), [False]])))
    return edges.reshape(-1, 2).astype(np.int64)


def count_in_runs(runs: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How many positions of [begin, end) lie in runs (in order, not overlapping): int64[m]; end below begin counts 0."""
    before = np.concatenate([[0], np.cumsum(runs[:, 1] - runs[:, 0])])

    def below(position: np.ndarray) -> np.ndarray:
        k = np.searchsorted(runs[:, 0], position, side="left")  # runs that begin before the position
        over = np.maximum(0, runs[np.maximum(k - 1, 0), 1] - position) if len(runs) else 0
        return before[k] - np.where(k > 0, over, 0)

    begin = np.asarray(begin, dtype=np.int64)
    return below(np.maximum(np.asarray(end, dtype=np.int64), begin)) - below(begin)


@dataclass(frozen=True)
class Shard:
    """One shard, mapped. Attributes: ids uint16 | int32[N], starts int64[n + 1], table (all columns)."""

    ids: np.ndarray
    starts: np.ndarray
    table: pa.Table

    @cached_property
    def run_starts(self) -> np.ndarray:
        """int64[n + 1]: the runs of row i are runs[run_starts[i]:run_starts[i + 1]]."""
        return _offsets(self.table["target_runs"]) // 2

    @cached_property
    def runs(self) -> np.ndarray:
        """int64[R, 2], positions in the shard's ids, in order."""
        pairs = _values(self.table["target_runs"]).astype(np.int64).reshape(-1, 2)
        return pairs + np.repeat(self.starts[:-1], np.diff(self.run_starts))[:, None]


def narrow(ids, dtype: np.dtype) -> np.ndarray:
    """Token ids in the type of a store, see `id_type`; ValueError for an id that it cannot hold."""
    ids = np.asarray(ids)
    if len(ids) and (least := int(ids.min())) < 0:
        raise ValueError(f"token id {least} is negative: ids count from 0, and what the loss leaves out belongs into the labels")
    if len(ids) and (largest := int(ids.max())) > np.iinfo(dtype).max:
        raise ValueError(f"token id {largest} does not fit into {np.dtype(dtype).name}; give the type of the largest id, see id_type")
    return ids.astype(dtype, copy=False)


def write_shard(path: Path, rows: Sequence[dict], dtype: np.dtype, facts: dict) -> None:
    """Write one shard, whole or not at all.

    Args:
        path: the file.
        rows: dicts of input_ids (array[T]), mask (bool[T], True on targets), sample (int), tokens (int, before any
            cut), meta (dict).
        dtype: of the ids, see `id_type`.
        facts: JSON to be kept in the schema.
    """
    columns = {
        "sample": pa.array([r["sample"] for r in rows], pa.int64()),
        "tokens": pa.array([r["tokens"] for r in rows], pa.int64()),
        "targets": pa.array([int(np.count_nonzero(r["mask"][1:])) for r in rows], pa.int32()),
        "input_ids": _ragged([narrow(r["input_ids"], dtype) for r in rows], dtype),
        "target_runs": _ragged([runs_of(r["mask"]).astype(np.int32).ravel() for r in rows], np.dtype(np.int32)),
        "meta": pa.array([json.dumps(r["meta"]) for r in rows], pa.string()),
    }
    _write(path, columns, facts)


def open_shard(path: Path) -> Shard:
    """Map a shard; nothing but its schema is read."""
    table = _open(path)
    return Shard(_values(table["input_ids"]), _offsets(table["input_ids"]), table)


def shard_facts(path: Path) -> dict | None:
    """The facts in a shard's schema; None where there is no whole shard."""
    try:
        with pa.memory_map(str(path)) as source:
            return json.loads((pa.ipc.open_stream(source).schema.metadata or {})[_FACTS])
    except (OSError, KeyError, pa.ArrowInvalid, ValueError):
        return None


def write_index(folder: Path, facts: dict) -> Path:
    """Write the index over the shards that lie in a folder, by their names; returns its path.

    Raises:
        ValueError: a file named as a shard that is none.
    """
    paths = sorted(Path(folder).glob(SHARD.replace("{:05d}", "*")), key=lambda p: int(p.stem.split("-")[1]))
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.int32)] for name in ("shard", "row", "sample", "length", "targets")}
    files = []
    for number, path in enumerate(paths):
        table = _open(path)
        n = table.num_rows
        parts["shard"].append(np.full(n, number, np.int32))
        parts["row"].append(np.arange(n, dtype=np.int32))
        parts["sample"].append(table["sample"].to_numpy())
        parts["length"].append(np.diff(_offsets(table["input_ids"])))
        parts["targets"].append(table["targets"].to_numpy())
        files.append({"name": path.name, "rows": n, "bytes": path.stat().st_size})
    kinds = {"sample": pa.int64()}
    columns = {k: pa.array(np.concatenate(v), kinds.get(k, pa.int32())) for k, v in parts.items()}
    _write(Path(folder) / INDEX, columns, {**facts, "files": files})
    return Path(folder) / INDEX


def read_index(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The index's columns, mapped, and its facts (`files` among them).

    Raises:
        ValueError: a shard is missing or has another size than when the index was written.
    """
    folder = Path(folder)
    table = _open(folder / INDEX)
    facts = json.loads(table.schema.metadata[_FACTS])
    for file in facts["files"]:
        path = folder / file["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{folder}: parts disagree ({file['name']} {found}, the index knows {file['bytes']} bytes); build the store again")
    return {name: _values(table[name]) for name in table.column_names}, facts


class Lines(Sequence):
    """The meta records of a store as a sequence of dicts, parsed one at a time when asked for."""

    def __init__(self, store) -> None:
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        shard, row = self._store.place(i)
        return json.loads(shard.table["meta"][row].as_py())

    def __iter__(self) -> Iterator[dict]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other) -> bool:
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None


# -------------------------------------------------------------------------------------------------------------- arrow
def _write(path: Path, columns: dict, facts: dict) -> None:
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    schema = batch.schema.with_metadata({_FACTS: json.dumps(facts)})
    with whole(path) as half, pa.OSFile(str(half), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))


def _open(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not an Arrow file of a token store ({error}); build the store again") from None


def _ragged(arrays: list[np.ndarray], dtype: np.dtype) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays], dtype=np.int64)])
    if offsets[-1] >= 2**31:
        raise ValueError(f"a shard of {offsets[-1]} tokens; a shard holds fewer than 2,147,483,648: make shards smaller")
    flat = np.concatenate(arrays) if arrays else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat))


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """The flat values of a column of one batch, without a copy."""
    if column.num_chunks == 0:
        return np.empty(0, np.int64)
    chunk = column.chunk(0)
    return (chunk.values if pa.types.is_list(chunk.type) else chunk).to_numpy(zero_copy_only=True)


def _offsets(column: pa.ChunkedArray) -> np.ndarray:
    return column.chunk(0).offsets.to_numpy().astype(np.int64) if column.num_chunks else np.zeros(1, np.int64)
