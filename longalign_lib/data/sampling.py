"""Which documents: long ones upsampled, a share for each language and source, the same ones whatever order they come in.

Each document gets a number u in (0, 1) from a hash of (seed, id), and the key log(u) / w for its weight w. The k largest
keys are a draw of k without replacement in which the next document is always taken in proportion to its weight
(Efraimidis and Spirakis 2006, A-ES). Keys need neither the other documents nor their order: one pass with a heap of k
finds them (`Reservoir`), and a draw is repeated exactly on any shuffled, sharded or resumed stream.

The law of lengths (`Law`) cuts min_tokens..max_tokens into buckets that each want a share. The paper's long samples are
spread about evenly over 8k-64k tokens (Figure 3), so the default is seven buckets of equal width with equal shares. Where
a bucket, source or language has too few documents, the others take over in proportion (`allocate`), and the report says
what each wanted, had and got.

Invariants: a choice never holds a document twice; changing the order of the input changes nothing.
Cost: O(n log k), 2 microseconds a document; a Reservoir holds k keys and ids, never texts.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from longalign_lib.data.documents import Document

SPREADS = ("even", "log", "power")
CHINESE = 0.1  # share of Chinese samples, section 3.1 of the paper


@dataclass(frozen=True)
class Law:
    """Wanted lengths: bucket i holds edges[i] <= tokens < edges[i + 1] and wants shares[i]; weights are tokens ** power."""

    edges: tuple[int, ...]
    shares: tuple[float, ...]
    power: float = 0.0

    def bucket(self, tokens: int) -> int | None:
        """The bucket of a length, None outside."""
        if not self.edges[0] <= tokens < self.edges[-1]:
            return None
        return bisect.bisect_right(self.edges, tokens) - 1

    def weight(self, tokens: int) -> float:
        """The document's weight within its bucket, at most 1."""
        return (tokens / (self.edges[-1] - 1)) ** self.power

    def name(self, bucket: int) -> str:
        """The bucket in words: "8192-16383"."""
        return f"{self.edges[bucket]}-{self.edges[bucket + 1] - 1}"


def law(
    min_tokens: int = 8_192, max_tokens: int = 65_536, spread: str = "even", buckets: int = 7, power: float = 1.0
) -> Law:
    """A law of lengths.

    Args:
        min_tokens, max_tokens: the shortest and the longest document wanted, both included.
        spread: "even" gives equal shares to buckets of equal width, "log" to buckets of equal ratio, "power" has one
            bucket in which a document is drawn with a chance that grows as tokens ** power.
        buckets: how many, fewer where the range is short.
        power: of the "power" spread.

    Raises:
        ValueError: an empty range, an unknown spread.
    """
    if not 1 <= min_tokens <= max_tokens:
        raise ValueError(f"min_tokens {min_tokens} and max_tokens {max_tokens}: give 1 <= min_tokens <= max_tokens")
    if spread not in SPREADS:
        raise ValueError(f"spread {spread!r} is unknown; accepted: {', '.join(SPREADS)}")
    if spread == "power":
        return Law((min_tokens, max_tokens + 1), (1.0,), power)
    make = np.linspace if spread == "even" else np.geomspace
    count = max(1, min(buckets, max_tokens + 1 - min_tokens))
    edges = np.unique(np.round(make(min_tokens, max_tokens + 1, count + 1)).astype(int)).tolist()
    return Law(tuple(edges), (1 / (len(edges) - 1),) * (len(edges) - 1))


def key_of(seed: int, id: str, weight: float = 1.0) -> float:
    """log(u) / weight with u in (0, 1) from (seed, id); larger keys are drawn first. A weight of 0 gives -inf."""
    digest = hashlib.blake2b(f"{seed}\0{id}".encode("utf-8", "replace"), digest_size=8).digest()
    u = (int.from_bytes(digest, "big") + 0.5) / 2**64
    if u >= 1.0:  # rounded up
        u = math.nextafter(1.0, 0.0)
    return math.log(u) / weight if weight > 0 else -math.inf


class Reservoir:
    """The `capacity` items of largest key among all that were offered."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._heap: list[tuple[float, str]] = []  # smallest key first

    def offer(self, key: float, id: str) -> tuple[bool, str | None]:
        """Offer an item. Returns (whether it is in, the id that it pushed out or None)."""
        if len(self._heap) < self.capacity:
            heapq.heappush(self._heap, (key, id))
            return True, None
        if self.capacity == 0 or (key, id) <= self._heap[0]:
            return False, None
        return True, heapq.heapreplace(self._heap, (key, id))[1]

    def items(self) -> list[tuple[float, str]]:
        """(key, id), largest key first."""
        return sorted(self._heap, reverse=True)


def allocate(total: int, weights: Sequence[float], available: Sequence[int], turn: int = 0) -> list[int]:
    """Share out `total` in proportion to weights, nobody more than available; who is full leaves the rest to the others.

    Rounding is by largest remainder; of equal ones the last gain first (of length buckets, the longest), or with ``turn`` the
    one so many places before it: many small allocations that take turns do not all leave out the same one.

    Returns:
        whole numbers; they sum to min(total, what is available where the weight is not 0).
    """
    weights, available = np.asarray(weights, dtype=float), np.asarray(available)
    if (weights < 0).any() or (available < 0).any():
        raise ValueError(f"weights {weights.tolist()} and available {available.tolist()} must not be negative")
    got = np.zeros(len(weights))
    open_ = (weights > 0) & (available > 0)
    left = float(min(total, int(available[open_].sum())))
    while open_.any():
        share = np.where(open_, weights, 0.0)
        want = left * (share / share.sum())
        full = open_ & (want >= available)
        if not full.any():
            got += want
            break
        got[full] = available[full]
        left -= float(available[full].sum())
        open_ &= ~full
    whole = np.floor(got + 1e-9).astype(int)
    rest = round(float(got.sum())) - int(whole.sum())
    order = sorted(range(len(got)), key=lambda i: (-round(got[i] - whole[i], 9), (-i - 1 - turn) % len(got)))
    for i in order[:rest]:
        whole[i] += 1
    return whole.tolist()


def choose(
    table: pd.DataFrame,
    n: int,
    lengths: Law,
    quotas: Mapping[str, float] | None = None,
    chinese: float | None = CHINESE,
) -> tuple[list[int], pd.DataFrame]:
    """Choose n documents: first by language, then by source, then by length; within a bucket by key.

    Args:
        table: a row a candidate, with columns source, language, bucket (of `lengths`), key.
        n: how many.
        lengths: the law.
        quotas: relative weights of sources; one that is not named weighs 1.
        chinese: share of Chinese documents; None takes the languages as they come.

    Returns:
        (row positions, report): the report has a row for each source, language and bucket: available, wanted, got.

    Raises:
        ValueError: a share outside 0..1, a quota for a source that has no documents.
    """
    if chinese is not None and not 0 <= chinese <= 1:
        raise ValueError(f"the share of Chinese documents is {chinese}; give a number from 0 to 1, or None")
    quotas = dict(quotas or {})
    known = set(table["source"])
    if unknown := sorted(set(quotas) - known):
        raise ValueError(f"quotas name {', '.join(unknown)}; the documents come from: {', '.join(sorted(known))}")
    order = table.reset_index(drop=True).sort_values("key", ascending=False, kind="stable")
    strata = {group: rows.index.tolist() for group, rows in order.groupby(["language", "source", "bucket"])}
    counts = {group: len(rows) for group, rows in strata.items()}
    languages = sorted({group[0] for group in strata} | ({"en", "zh"} if chinese is not None else set()))
    of_language = [sum(c for g, c in counts.items() if g[0] == lang) for lang in languages]
    shares = of_language if chinese is None else [chinese if lang == "zh" else 1 - chinese for lang in languages]
    chosen, report = [], []
    wanted_of = allocate(n, shares, [n] * len(languages))
    for lang, got_lang, want_lang in zip(languages, allocate(n, shares, of_language), wanted_of):
        sources = sorted({group[1] for group in strata if group[0] == lang})
        if not sources and want_lang:
            report.append({"source": "(none)", "language": lang, "tokens": "", "available": 0, "wanted": want_lang, "got": 0})
        weights = [quotas.get(source, 1.0) for source in sources]
        held = [sum(c for g, c in counts.items() if g[:2] == (lang, source)) for source in sources]
        want_sources = allocate(want_lang, weights, [n] * len(sources))
        for turn, (source, got_source, want_source) in enumerate(zip(sources, allocate(got_lang, weights, held), want_sources)):
            there = [counts.get((lang, source, b), 0) for b in range(len(lengths.shares))]
            want = allocate(want_source, lengths.shares, [n] * len(there), turn)
            for bucket, got in enumerate(allocate(got_source, lengths.shares, there, turn)):
                chosen += strata.get((lang, source, bucket), [])[:got]
                row = {"source": source, "language": lang, "tokens": lengths.name(bucket)}
                if there[bucket] or want[bucket]:
                    report.append(row | {"available": there[bucket], "wanted": want[bucket], "got": got})
    columns = ["source", "language", "tokens", "available", "wanted", "got"]
    return chosen, pd.DataFrame(report, columns=columns)


def sample_documents(
    documents: Sequence[Document],
    lengths: Sequence[int] | np.ndarray,
    n: int,
    seed: int,
    *,
    power: float = 1.0,
    max_tokens: int | None = None,
) -> list[Document]:
    """Draw n different documents, long ones upsampled: the chance of each draw grows with length ** power.

    Args:
        documents: to draw from, in any order (the draw does not depend on it), with unique ids.
        lengths: tokens of each.
        n: how many.
        seed: of the hash; the same seed gives the same documents in the same order.
        power: 0 draws every document alike, 1 in proportion to its length.
        max_tokens: leave longer documents out (the paper keeps articles under 64k tokens).

    Raises:
        ValueError: lengths that do not match, ids that are not unique, or more documents wanted than there are.
    """
    if len(lengths) != len(documents):
        raise ValueError(f"{len(documents)} documents but {len(lengths)} lengths; give one length for each document")
    limit = max_tokens or math.inf
    usable = [(d, int(tokens)) for d, tokens in zip(documents, lengths) if 0 < tokens <= limit]
    if n > len(usable):
        raise ValueError(f"{n} documents wanted, {len(usable)} usable; ask for at most {len(usable)} or add documents")
    by_id = {d.id: d for d, _ in usable}
    if len(by_id) < len(usable):
        raise ValueError(f"{len(usable) - len(by_id)} documents repeat an id; give each its own")
    longest = max((tokens for _, tokens in usable), default=1)
    return [by_id[id] for id in _draw(((d.id, (tokens / longest) ** power) for d, tokens in usable), n, seed)]


def _draw(items: Iterable[tuple[str, float]], n: int, seed: int) -> list[str]:
    reservoir = Reservoir(n)
    for id, weight in items:
        reservoir.offer(key_of(seed, id, weight), id)
    return [id for _, id in reservoir.items()]
