"""Rows of a Hugging Face dataset, streamed: several shards in turn, in an order given by a seed, with an exact place.

The shards are put in a seeded order and dealt to `ways` hands; the hands give a row each in turn, so that the first rows
already come from several shards (a shard may be one web site, one year, one letter of the alphabet). The place is the
position of every hand: its shard, and `IterableDataset.state_dict` within it. A shuffle buffer is not part of it, since
what such a buffer holds would be lost; `buffered` adds one where no exact place is needed.

Invariants: every row once; the same seed gives the same order; a place saved after a row goes on with the next one.
Memory: what `datasets` reads ahead in `ways` shards.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

_CLIENTS = ("aiohttp", "httpcore", "httpx", "requests", "urllib3")  # their errors are not all OSErrors
INSTEAD = (
    "Without a network use what is at hand: documents.read_samples(), documents.python_topics(), or your own texts with "
    "folders.read_folder(path)."
)


class SourceError(RuntimeError):
    """A source that cannot be read; the message says why and what to use instead."""


def is_network(error: Exception) -> bool:
    """Whether an error comes from the connection (or the disk), not from the data."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS


class ShardedRows:
    """The rows of a `datasets.IterableDataset`, shards in seeded order, `ways` of them in turn."""

    def __init__(self, rows, seed: int, ways: int = 8, rejected: list[dict] | None = None):
        order = np.random.default_rng(seed).permutation(rows.num_shards).tolist()
        ways = max(1, min(ways, len(order)))
        self.rows, self.rejected = rows, rejected
        self.hands: list[list[int]] = [order[hand::ways] for hand in range(ways)]
        self.turn = 0
        self.place: list[list] = [[0, None] for _ in self.hands]  # position in the hand, state within that shard
        self._open: list = [None] * ways

    def __iter__(self) -> Iterator[dict]:
        reading: list = [None] * len(self.hands)
        while any(position < len(hand) for (position, _), hand in zip(self.place, self.hands)):
            hand, turn = self.hands[self.turn], self.turn
            self.turn = (turn + 1) % len(self.hands)
            while self.place[turn][0] < len(hand):
                if reading[turn] is None:
                    self._open[turn] = self._shard(hand[self.place[turn][0]], self.place[turn][1])
                    reading[turn] = iter(self._open[turn])
                try:
                    row = next(reading[turn])
                except Exception as error:
                    if is_network(error):  # the place stays good
                        raise
                    if not isinstance(error, StopIteration):
                        self._note(hand[self.place[turn][0]], error)
                    self.place[turn] = [self.place[turn][0] + 1, None]
                    reading[turn] = self._open[turn] = None
                    continue
                yield row
                break

    def state_dict(self) -> dict:
        """The place behind the last row given out, as JSON."""
        places = [
            [position, state if shard is None else shard.state_dict()]
            for (position, state), shard in zip(self.place, self._open)
        ]
        return {"shards": self.rows.num_shards, "turn": self.turn, "places": places}

    def load_state_dict(self, state: dict) -> None:
        """Go to a place; to be called before the first row is taken."""
        here, there = (self.rows.num_shards, len(self.hands)), (state["shards"], len(state["places"]))
        if here != there:
            raise ValueError(f"the place is in {there[0]} shards read {there[1]} ways, this stream has {here[0]} read {here[1]} ways; begin anew")
        self.turn, self.place = state["turn"], [list(place) for place in state["places"]]

    def _note(self, index: int, error: Exception) -> None:
        if self.rejected is None:
            raise error
        why = f"{type(error).__name__}: {str(error).strip()[:200]}"
        self.rejected.append({"id": f"shard {index}", "reason": f"the shard cannot be parsed on ({why})"})

    def _shard(self, index: int, state: dict | None):
        shards = self.rows.num_shards
        shard = self.rows.shard(num_shards=shards, index=index) if shards > 1 else self.rows
        if state is not None:
            shard.load_state_dict(state)
        return shard


def open_rows(
    dataset: str, config: str | None = None, split: str = "train", *, seed: int = 0, ways: int = 8,
    rejected: list[dict] | None = None, loader: Callable | None = None, tries: int = 3,
) -> ShardedRows:  # fmt: skip
    """Open a dataset for streaming.

    Args:
        dataset, config, split: as `datasets.load_dataset` takes them.
        seed: of the order of shards.
        ways: shards read in turn.
        rejected: gets {"id", "reason"} for a shard that cannot be parsed, which then ends there; None lets that raise.
        loader: called in place of `datasets.load_dataset`.
        tries: at opening, with a pause between; reading on retries by itself inside `datasets`.

    Raises:
        SourceError: it cannot be opened; what to use offline.
    """
    import datasets

    for attempt in range(1, tries + 1):
        try:
            rows = (loader or datasets.load_dataset)(dataset, config, split=split, streaming=True)
            return ShardedRows(rows, seed, ways, rejected)
        except Exception as error:  # whatever it is, the reader needs to know what to use instead
            offline = datasets.config.HF_HUB_OFFLINE
            if is_network(error) and not offline and attempt < tries:
                time.sleep(2.0**attempt)
                continue
            why = "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {str(error).strip()[:300]}"
            raise SourceError(f"{dataset} cannot be opened: {why}. {INSTEAD}") from error
    raise ValueError(f"tries is {tries}; give at least 1")


def reading(name: str, rows: Iterable[dict]) -> Iterator[dict]:
    """The rows; a network that goes away is a SourceError that says how to go on."""
    count = 0
    try:
        for row in rows:
            yield row
            count += 1
    except Exception as error:
        if not is_network(error):
            raise
        raise SourceError(f"{name} broke off after {count} rows: {error}. Run again to go on. {INSTEAD}") from error


def buffered(rows: Iterable[dict], size: int, seed: int) -> Iterator[dict]:
    """The rows in an order shuffled within a buffer of `size` of them."""
    draw = random.Random(seed)
    held: list[dict] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        index = draw.randrange(size)
        held[index], row = row, held[index]
        yield row
    draw.shuffle(held)
    yield from held
