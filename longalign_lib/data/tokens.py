"""The token store: encoded conversations of any length, one behind the other, each sample with one fate on record.

`TokenStore.build` encodes samples in memory; `tokenize.tokenize` makes the same rows from files, shard by shard, in
several processes, and goes on after a kill. `TokenStore.save` and `tokenize` write one format (`data/store.py`), which
`TokenStore.load` opens by memory map in no time whatever its size. Chats become ids and labels in `data/chat.py`, samples
become rows with a fate in `data/encode.py`.

Invariants: labels are UNSHIFTED; token id 0 is an ordinary token; no padding; a row is what `encode_chat` gives for it.
Cost: 2 bytes a token (4 for vocabularies over 65,536 tokens) and a few numbers a row.
Shapes: T tokens of a row; n rows; N tokens of all rows.
"""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from longalign_lib.data import store as files
from longalign_lib.data.chat import IGNORE, check_messages, encode_chat, encode_chats
from longalign_lib.data.encode import OVER_LONG, encode_rows, summary

__all__ = ["IGNORE", "OVER_LONG", "TokenStore", "check_messages", "encode_chat", "encode_chats"]
ROWS_A_SHARD, OPEN_SHARDS = 4096, 64


@dataclass(frozen=True, eq=False, repr=False)
class TokenStore:
    """n encoded conversations of any length, back to back.

    Attributes:
        input_ids: int[N], all rows one behind the other.
        labels_mask: bool[N], True on target tokens.
        starts: int64[n + 1]; row i is input_ids[starts[i]:starts[i + 1]].
        meta: n dicts: the sample without its messages, plus "row" (its place in what was handed in).

    A store that was loaded has the same attributes: `input_ids` and `labels_mask` then read every token, all else does not.
    """

    input_ids: np.ndarray
    labels_mask: np.ndarray
    starts: np.ndarray
    meta: Sequence[dict]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __repr__(self) -> str:
        return f"TokenStore({len(self):,} rows, {int(self.lengths.sum()):,} tokens, {int(self.targets.sum()):,} targets)"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64[n]."""
        return np.diff(self.starts)

    @cached_property
    def targets(self) -> np.ndarray:
        """N_i, the target tokens of each row that the loss will see (position 0 is never predicted), int64[n]."""
        return files.count_in_runs(self._runs, self.starts[:-1] + 1, self.starts[1:])

    def count_targets(self, rows, starts, lengths) -> np.ndarray:
        """Target tokens that the loss sees in stretches of rows, the first token of a stretch not counted.

        Args:
            rows, starts, lengths: int[m] each; stretch k is tokens starts[k] .. starts[k] + lengths[k] of row rows[k].

        Returns:
            int64[m]. No token is read: whole rows are known, others are counted from the runs of targets.
        """
        rows, starts, lengths = (np.asarray(x, dtype=np.int64) for x in (rows, starts, lengths))
        counts = self.targets[rows]
        part = np.flatnonzero((starts != 0) | (lengths != self.lengths[rows]))
        counts[part] = self._count(rows[part], starts[part] + 1, starts[part] + lengths[part])
        return counts

    @cached_property
    def _runs(self) -> np.ndarray:
        return files.runs_of(self.labels_mask)

    def _count(self, rows: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        first = self.starts[:-1][rows]
        return files.count_in_runs(self._runs, first + begin, first + end)

    def _row(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of a store of {len(self)} rows")
        return int(i) % len(self)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Row i as (input_ids int32[T], labels int32[T], -100 off the target tokens)."""
        i = self._row(i)
        span = slice(int(self.starts[i]), int(self.starts[i + 1]))
        ids = np.array(self.input_ids[span], dtype=np.int32)
        return ids, np.where(self.labels_mask[span], ids, np.int32(IGNORE)).astype(np.int32)

    @staticmethod
    def build(
        samples: Iterable[dict], tokenizer, max_length: int, over_long: str = "truncate", progress: bool = True,
        answers: str = "all", **template,
    ) -> tuple[TokenStore, dict]:  # fmt: skip
        """Encode samples in memory; nothing is lost without a line in the report.

        Args:
            samples: dicts with "messages"; other keys go to `meta`.
            tokenizer, max_length, over_long, answers, template: see `encode_rows`.
            progress: show a bar when it takes longer than two seconds.

        Returns:
            (store, report). report: the counts of `summary`, and "rows": one dict for each conversation {row, fate:
            kept|truncated|left_out, tokens, reason}.

        Raises:
            ValueError: an unknown choice, an over-long row under "error", or no row kept at all.
        """
        bar = tqdm(samples, desc="encode", leave=False, delay=2, disable=not progress)
        rows = list(encode_rows(enumerate(bar), tokenizer, max_length, over_long, answers, **template))
        kept = [r for r in rows if r["fate"] != "left_out"]
        if rows and not kept:
            raise ValueError(f"none of {len(rows)} samples could be used; the first: {rows[0]['reason']}")
        keys = {"sample": "row", "fate": "fate", "tokens": "tokens", "reason": "reason"}
        report = summary(rows) | {"max_length": max_length, "rows": [{new: r[k] for k, new in keys.items()} for r in rows]}
        starts = np.cumsum([0, *(len(r["input_ids"]) for r in kept)], dtype=np.int64)
        flat = [np.concatenate([np.empty(0, d), *(r[k] for r in kept)]) for k, d in (("input_ids", np.int32), ("mask", bool))]
        return TokenStore(flat[0], flat[1], starts, [r["meta"] for r in kept]), report

    def save(self, folder: str | Path) -> Path:
        """Write the store into a folder, its index last; what an earlier store left there goes. Returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        largest = int(self.input_ids.max()) if len(self.input_ids) else 0
        rows = ({"input_ids": ids, "mask": labels != IGNORE, "sample": meta.get("row", i), "tokens": len(ids), "meta": meta}
                for i, ((ids, labels), meta) in enumerate(zip(self, self.meta)))  # fmt: skip
        for number, part in enumerate(_parts(rows)):
            files.write_shard(folder / files.SHARD.format(number), part, files.id_type(largest + 1), {})
        files.write_index(folder, {})
        return folder

    @staticmethod
    def load(folder: str | Path) -> TokenStore:
        """Open a saved store. Its rows are memory-mapped, read-only; a store of any size opens at once.

        Raises:
            FileNotFoundError: not a saved store, or one whose writing was cut off. ValueError: parts that disagree.
        """
        folder = Path(folder)
        if (folder / files.INDEX).is_file():
            return _MappedStore(folder)
        if not (folder / "meta.json").is_file():
            raise FileNotFoundError(f"{folder}: no complete token store here ({files.INDEX} is missing); build it again, or go on with tokenize")
        return _load_arrays(folder)


class _MappedStore(TokenStore):
    """A TokenStore over the files of `data/store.py`: the index in view, shards mapped when a row of theirs is asked for."""

    def __init__(self, folder: Path) -> None:
        index, facts = files.read_index(folder)
        keep = {"_folder": folder, "_index": index, "_facts": facts, "_open": OrderedDict(), "meta": files.Lines(self)}
        self.__dict__.update(keep)  # the base class is frozen

    def __len__(self) -> int:
        return len(self._index["length"])

    def __reduce__(self):
        return _MappedStore, (self._folder,)

    @cached_property
    def lengths(self) -> np.ndarray:
        return self._index["length"].astype(np.int64)

    @cached_property
    def targets(self) -> np.ndarray:
        return self._index["targets"].astype(np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @property
    def input_ids(self) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in self)])

    @property
    def labels_mask(self) -> np.ndarray:
        return np.concatenate([np.empty(0, bool), *(labels != IGNORE for _, labels in self)])

    def _shard(self, number: int) -> files.Shard:
        """A mapped shard; the least recently used ones are closed."""
        if number not in self._open:
            self._open[number] = files.open_shard(self._folder / self._facts["files"][number]["name"])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def place(self, i: int) -> tuple[files.Shard, int]:
        """The shard of row i and its place there."""
        i = self._row(i)
        return self._shard(int(self._index["shard"][i])), int(self._index["row"][i])

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        shard, row = self.place(i)
        ids = shard.ids[shard.starts[row] : shard.starts[row + 1]].astype(np.int32)
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        for start, end in shard.runs[shard.run_starts[row] : shard.run_starts[row + 1]] - shard.starts[row]:
            labels[start:end] = ids[start:end]
        return ids, labels

    def _count(self, rows: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        counts = np.zeros(len(rows), dtype=np.int64)
        shards = self._index["shard"][rows]
        for number in np.unique(shards):
            here, shard = np.flatnonzero(shards == number), self._shard(int(number))
            first = shard.starts[self._index["row"][rows[here]]]
            counts[here] = files.count_in_runs(shard.runs, first + begin[here], first + end[here])
        return counts

    def save(self, folder: str | Path) -> Path:
        if Path(folder).resolve() == self._folder.resolve():
            raise ValueError(f"{folder} is where this store was loaded from; save it elsewhere")
        return super().save(folder)


def clear(folder: Path) -> None:
    """Remove a store's files from a folder, its index first."""
    old = [folder / name for name in (files.INDEX, "meta.json", "input_ids.npy", "labels_mask.npy", "starts.npy")]
    for path in [*old, *folder.glob(files.SHARD.replace("{:05d}", "*"))]:
        path.unlink(missing_ok=True)


def _parts(rows: Iterable[dict]) -> Iterator[list[dict]]:
    rows = iter(rows)
    while part := list(itertools.islice(rows, ROWS_A_SHARD)):
        yield part


def _load_arrays(folder: Path) -> TokenStore:
    """A store in the older form: input_ids.npy, labels_mask.npy, starts.npy, meta.json."""
    ids, mask, starts = (
        np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False)
        for name, mode in (("input_ids", "r"), ("labels_mask", "r"), ("starts", None))
    )
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if not (len(ids) == len(mask) == starts[-1] and len(meta) == len(starts) - 1):
        raise ValueError(
            f"{folder}: parts disagree ({len(ids)} ids, {len(mask)} mask values, last start {starts[-1]}, "
            f"{len(meta)} meta records for {len(starts) - 1} rows); build the store again"
        )
    return TokenStore(ids, mask, starts, meta)
