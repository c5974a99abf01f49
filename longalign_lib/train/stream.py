"""Packing a stream: rows come one by one, their lengths are not known ahead, and at most ``buffer_rows`` of them wait.

Rule. Rows go into a buffer. Whenever it is full, and at the end of the stream until it is empty, one pack is closed: it
starts from the **oldest** waiting row and then takes, again and again, the **largest** waiting row that still fits (the oldest
of that length). Capacity 10, a buffer of 4 rows:

    6 5 4 3 | full: |6 4 .|  waiting 5 3     2 7 | full: |5 3 2|  waiting 7     end: |7 ...|

Invariants: no pack passes the capacity (a pack may be exactly full); a row is in exactly one pack, or in pieces that cover it
once; packs are a function of the rows and the arguments alone. **Nothing starves:** a row with r older lines waiting is in
the (r+1)-th pack closed from then on, at the latest, because each pack takes the oldest; so in at most the
``buffer_rows``-th. All rows longer than half the capacity reach that bound.

Full means ``buffer_rows`` lines or, if given, ``buffer_tokens`` tokens: whoever keeps the tokens of waiting rows keeps fewer than
that plus one row's. Fill comes from choice, so let the buffer hold many packs' worth of rows: where a pack holds 14 rows on
average (100,000 rows of `paper_scale.mix`), fill is 0.806 at 16 rows, 0.981 at 64, 0.998 at 128, 0.9998 from 256 on.

Cost: O(log different lengths) comparisons a row (bisect in a sorted list of lengths, a queue for each) and a small shift of
that list, about 2 microseconds in all; memory O(buffer). Packs come in the order of their oldest rows: a stream that is not
shuffled stays so. State is one small JSON of the waiting lines and counters; ``rows_in`` says which row comes next.
"""

from __future__ import annotations

import json
from bisect import bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from longalign_lib.data.jsonl import write_jsonl
from longalign_lib.train.plan import COLUMNS, LARGEST, Plan
from longalign_lib.train.rows import OVER_LONG

PAST = {"truncate": "truncated", "split": "split", "drop": "dropped"}
FORMAT, COUNTERS = 1, ("rows_in", "packs_out", "tokens_out")


class Line(NamedTuple):
    """One line of a pack: ``length`` tokens of ``row`` from token ``start`` on, at ``offset`` in the pack."""

    row: int
    start: int
    offset: int
    length: int
    targets: int


class StreamPacker:
    """A bounded buffer of rows that closes packs by best fit; see the module's text for the rule.

    Args:
        capacity: tokens a pack.
        buffer_rows: lines that may wait, >= 1 (1 closes a pack a row).
        over_long: "error", "truncate", "split" or "drop", as in `rows.fit_rows`.
        buffer_tokens: tokens that may wait, >= capacity; None sets no bound beside ``buffer_rows``.

    Attributes:
        rows_in: rows taken so far, dropped ones included: the number of the stream's next row.
        packs_out, tokens_out: packs closed so far and the tokens in them.
        fates: rows that are not in packs as they came, as in `rows.fit_rows`: dicts of row, length, fate ("truncated",
            "split", "dropped", "no target"), tokens_lost. Part of the state; write it away and clear it when it grows.

    Raises:
        ValueError: names the argument that is off and what it accepts.
    """

    def __init__(self, capacity: int, buffer_rows: int, over_long: str = "error", buffer_tokens: int | None = None):
        self.capacity = _whole("capacity", capacity, 1)
        self.buffer_rows = _whole("buffer_rows", buffer_rows, 1)
        self.buffer_tokens = None if buffer_tokens is None else _whole("buffer_tokens", buffer_tokens, self.capacity)
        if over_long not in OVER_LONG:
            raise ValueError(f"over_long {over_long!r} is not one of {', '.join(OVER_LONG)}")
        self.over_long = over_long
        self.rows_in = self.packs_out = self.tokens_out = self.pending_tokens = self._arrivals = 0
        self.fates: list[dict] = []
        self._pending: OrderedDict[int, tuple] = OrderedDict()  # arrival -> (row, start, length, targets), oldest first
        self._lengths: list[int] = []  # the different lengths that wait, sorted
        self._queues: dict[int, deque] = {}  # length -> arrivals of that length, oldest first

    def __len__(self) -> int:
        """Lines that wait."""
        return len(self._pending)

    @property
    def full(self) -> bool:
        """Whether a pack must be closed before the next row."""
        tokens = self.buffer_tokens is not None and self.pending_tokens >= self.buffer_tokens
        return tokens or len(self._pending) >= self.buffer_rows

    def add(self, row: int, length: int, targets: int | Callable[[int, int], int] | None = None) -> list[list[Line]]:
        """Take a row.

        Args:
            row: the caller's number for it, >= 0, only handed back: it may come again while it waits (a second epoch).
            length: its tokens, >= 1.
            targets: tokens that the loss sees, 0..length-1 (the first token never is one); all but the first by default.
                A row that is cut needs the default or a function (start, length) -> targets of that piece. Pieces that
                were said to have none are left out and recorded.

        Returns:
            The packs that this row made close, usually none or one.

        Raises:
            ValueError: no such number, or a row over capacity under "error". The packer is then as it was before.
        """
        self._take(row, length, targets)
        return list(self._closed())

    def flush(self) -> list[list[Line]]:
        """Close packs until nothing waits: the end of the stream."""
        return list(self._closed(to_the_end=True))

    def run(self, rows: Iterable[tuple]) -> Iterator[list[Line]]:
        """Packs of a whole stream of (row, length) or (row, length, targets), one at a time.

        At each pack `state` counts what was handed out and nothing else, so ``StreamPacker.from_state(state).run(rest)``,
        the stream continued at its row ``rows_in``, goes on as if nothing had happened, in the last packs too.
        """
        yield from self._closed()
        for item in rows:
            self._take(*item)
            yield from self._closed()
        yield from self._closed(to_the_end=True)

    def _closed(self, to_the_end: bool = False) -> Iterator[list[Line]]:
        while self._pending if to_the_end else self.full:
            yield self.close()

    def close(self) -> list[Line]:
        """Close one pack by the rule; IndexError when nothing waits."""
        if not self._pending:
            raise IndexError("no row waits: there is no pack to close")
        pack, room = [], self.capacity
        at = bisect_right(self._lengths, next(iter(self._pending.values()))[2])  # the oldest of all leads its length's queue
        while at:
            length = self._lengths[at - 1]
            queue = self._queues[length]
            row, start, _, targets = self._pending.pop(queue.popleft())
            if not queue:
                del self._queues[length], self._lengths[at - 1]
            pack.append(Line(row, start, self.capacity - room, length, targets))
            room -= length
            at = bisect_right(self._lengths, room)
        self.pending_tokens -= self.capacity - room
        self.tokens_out += self.capacity - room
        self.packs_out += 1
        return pack

    def _take(self, row, length, targets=None) -> None:
        """Put a row's pieces into the buffer, or record why not."""
        row, length = _whole("row", row, 0), _whole("length", length, 1, f" of row {row!r}")
        pieces, fates = [(0, length)], []
        if length > self.capacity:
            if self.over_long == "error":
                raise ValueError(f"row {row} has {length} tokens and the capacity is {self.capacity}: raise the capacity, "
                                 "or choose over_long='truncate', 'split' or 'drop'")  # fmt: skip
            pieces = [(s, min(self.capacity, length - s)) for s in range(0, length, self.capacity)]
            pieces = {"truncate": pieces[:1], "split": pieces, "drop": []}[self.over_long]
            fates.append((PAST[self.over_long], length - sum(size for _, size in pieces)))
        lines = [(row, start, size, _targets(targets, row, length, start, size)) for start, size in pieces]
        self.rows_in += 1
        for line in lines:
            if targets is None or line[3]:
                self._wait(line)
            else:
                fates.append(("no target", line[2]))
        self.fates += [{"row": row, "length": length, "fate": f, "tokens_lost": lost} for f, lost in fates]

    def _wait(self, line: tuple) -> None:
        length = line[2]
        if length not in self._queues:
            insort(self._lengths, length)
            self._queues[length] = deque()
        self._queues[length].append(self._arrivals)
        self._pending[self._arrivals] = line
        self._arrivals += 1
        self.pending_tokens += length

    def state(self) -> dict:
        """Everything needed to go on, as plain JSON types (a copy)."""
        return {
            "longalign_stream": FORMAT, "capacity": self.capacity, "buffer_rows": self.buffer_rows,
            "buffer_tokens": self.buffer_tokens, "over_long": self.over_long, "fates": [dict(f) for f in self.fates],
            "pending": [list(line) for line in self._pending.values()], **{n: getattr(self, n) for n in COUNTERS},
        }  # fmt: skip

    @staticmethod
    def from_state(state: dict) -> StreamPacker:
        """The packer that gave this state; ValueError names what is missing or off in it."""
        known = StreamPacker(1, 1).state().keys()
        if not isinstance(state, dict) or state.get("longalign_stream") != FORMAT or state.keys() != known:
            odd = sorted(known ^ state.keys()) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"no StreamPacker state of format {FORMAT} (missing or unknown: {odd})")
        packer = StreamPacker(state["capacity"], state["buffer_rows"], state["over_long"], state["buffer_tokens"])
        for row, start, length, targets in state["pending"]:
            if _whole("length", length, 1, f" of waiting row {row!r}") > packer.capacity:
                raise ValueError(f"waiting row {row} has {length} tokens, over the capacity {packer.capacity}")
            start = _whole("start", start, 0, f" of waiting row {row!r}")
            packer._wait((_whole("row", row, 0), start, length, _targets(targets, row, length, start, length)))
        packer.rows_in, packer.packs_out, packer.tokens_out = (_whole(n, state[n], 0) for n in COUNTERS)
        packer.fates = [dict(f) for f in state["fates"]]
        return packer

    def save(self, path: Path | str) -> Path:
        """Write `state` as JSON; a kill leaves the old file or the new one, never half of one."""
        return write_jsonl(path, [self.state()])

    @staticmethod
    def load(path: Path | str) -> StreamPacker:
        """Read what `save` wrote; ValueError names the file if it holds something else."""
        try:
            return StreamPacker.from_state(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{Path(path).name}: {error}") from error


def _whole(name: str, value, least: int, of: str = "") -> int:
    whole = type(value) is int or (isinstance(value, (int, np.integer)) and not isinstance(value, bool))
    if not whole or value < least:
        raise ValueError(f"{name}{of} must be a whole number >= {least}, got {value!r} ({type(value).__name__})")
    return int(value)


def _targets(targets, row: int, whole: int, start: int, length: int) -> int:
    """Targets of the piece [start, start + length) of a row of ``whole`` tokens."""
    if targets is None:
        return length - 1
    if callable(targets):
        targets = targets(start, length)
    elif length < whole:
        raise ValueError(f"row {row} is cut from {whole} tokens to {length}, and {targets!r} targets do not say which remain: "
                         "pass a function (start, length) -> targets, or None for all tokens but the first")  # fmt: skip
    targets = _whole("targets", targets, 0, f" of row {row}")
    if targets >= length:
        raise ValueError(f"row {row}: {targets} targets in {length} tokens; the first token is never one")
    return targets


def stream_packs(rows: Iterable[tuple], capacity: int, buffer_rows: int, **options) -> Iterator[list[Line]]:
    """Packs of a stream of (row, length) or (row, length, targets); ``options`` are those of `StreamPacker`.

    Example:
        >>> [[line.length for line in pack] for pack in stream_packs(enumerate([6, 5, 4, 3, 2, 7]), 10, buffer_rows=4)]
        [[6, 4], [5, 3, 2], [7]]
    """
    return StreamPacker(capacity, buffer_rows, **options).run(rows)


def plan_of_packs(packs: Iterable[list[Line]], *, capacity: int, packs_per_step: int, rows: int | None = None, epoch: int = 0,
                  first_step: int = 0, first_pack: int = 0) -> Plan:  # fmt: skip
    """Number packs into steps, in their order: a Plan for `collate`, `RankPacks` and the loss weights.

    Args:
        packs: of a `StreamPacker`; the last step may be short.
        capacity, packs_per_step: tokens a pack, packs a step.
        rows: rows of the data; the largest row number + 1 by default.
        epoch, first_step, first_pack: where the numbers start, to go on after an earlier table.

    Raises:
        ValueError: there is no pack, one is empty, or one holds more than the capacity.
    """
    packs = list(packs)
    if not packs or not all(packs):
        raise ValueError("no pack, or a pack without a line: there is nothing to plan")
    packs_per_step = _whole("packs_per_step", packs_per_step, 1)
    over = [k for k, pack in enumerate(packs) if sum(line.length for line in pack) > capacity]
    if over:
        raise ValueError(f"pack {over[0]} holds more than the capacity {capacity}: it was made for another one")
    if max(first_pack, first_step) + len(packs) > LARGEST:
        raise ValueError(f"step {first_step} or pack {first_pack} and {len(packs)} more pass {LARGEST}: begin again at 0")
    pack = np.repeat(np.arange(len(packs)), [len(lines) for lines in packs])
    table = pd.DataFrame([line for lines in packs for line in lines], columns=Line._fields)
    table = table.assign(epoch=epoch, step=first_step + pack // packs_per_step, pack=first_pack + pack)
    rows = int(table.row.max()) + 1 if rows is None else rows
    return Plan(table[list(COLUMNS)].astype(COLUMNS), "packed", int(capacity), packs_per_step, rows, algorithm="stream")


def fill_by_buffer(lengths, capacity: int, buffers=(16, 64, 256, 1024, 4096, 16384)) -> pd.DataFrame:
    """Fill against buffer size, the data of that figure.

    Args:
        lengths: int[n], n >= 1, tokens a row in the order of the stream, each in 1..capacity.
        capacity: tokens a pack.
        buffers: sizes in rows.

    Returns:
        A row a size: buffer_rows, packs, fill, mean_wait and longest_wait (rows that came between a row and its pack).
    """
    lengths, found = np.asarray(lengths).tolist(), []
    for size in buffers:
        packer = StreamPacker(capacity, size)
        waits = [packer.rows_in - 1 - line.row for pack in packer.run(enumerate(lengths)) for line in pack]
        found.append({"buffer_rows": size, "packs": packer.packs_out, "fill": sum(lengths) / (packer.packs_out * capacity),
                      "mean_wait": float(np.mean(waits)), "longest_wait": max(waits)})  # fmt: skip
    return pd.DataFrame(found)
