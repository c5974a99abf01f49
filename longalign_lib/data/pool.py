"""The documents of one pass that could still be drawn: counted, bucketed by length, the best of each bucket kept on disk.

For each language, source and length bucket a `sampling.Reservoir` holds the keys of its best `capacity` documents. A text
that enters one is appended to the file `<stem>.spool` at once, so memory holds keys and places, never texts. `finish`
writes the texts still held to `<stem>.jsonl`: at most `capacity` of each language and source, spread as the law wants.
What was rejected or cleaned goes to `<stem>.rejected.jsonl` and `<stem>.cleaned.jsonl` as it comes.

A `note` holds the sizes of these files and the counters. A pool made from a note cuts the files back to it and offers the
spooled texts again: as keys are hashes, it is in the state that it was in.
Cost: one tokenisation of each text of at least min_tokens bytes (a token covers a byte or more, so shorter ones cannot
reach min_tokens); the spool grows to about 1 + ln(documents / capacity) times what is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from longalign_lib.data.documents import MAX_BYTES, Document, cut_to_tokens
from longalign_lib.data.jsonl import iter_jsonl
from longalign_lib.data.sampling import Law, Reservoir, allocate, key_of
from longalign_lib.data.text import token_counts
from longalign_lib.files import whole

OVER_LONG = ("drop", "cut")
FILES = {"spool": "spool", "rejected": "rejected.jsonl", "cleaned": "cleaned.jsonl"}


@dataclass(frozen=True)
class Wish:
    """What is to be collected; `capacity` is the most documents that one language of one source may need."""

    lengths: Law
    capacity: int
    seed: int
    over_long: str = "drop"  # or "cut": its beginning, to a length drawn from the range
    scan: int | None = None  # rows to read of a stream
    max_bytes: int = MAX_BYTES
    ways: int = 8  # shards of a stream read in turn


class Pool:
    """The candidates of one pass; to be used in a `with` block.

    Attributes:
        counts: rows (of a stream); read = short + long + repeated + not_drawn + candidates (these after `finish`);
            cut, rejected, cleaned.
        rejected, cleaned: lists to append to; written down and emptied with every batch.
    """

    def __init__(self, stem: Path, wish: Wish, tokenizer, note: dict | None = None):
        if wish.over_long not in OVER_LONG:
            raise ValueError(f"over_long is {wish.over_long!r}; accepted: {', '.join(OVER_LONG)}")
        self.stem, self.wish, self.tokenizer = stem, wish, tokenizer
        self.counts: Counter = Counter(rows=0, read=0, short=0, long=0, cut=0, repeated=0, not_drawn=0, rejected=0, cleaned=0)
        self.rejected: list[dict] = []
        self.cleaned: list[dict] = []
        self._pools: dict[tuple[str, str, int], Reservoir] = {}
        self._held: dict[str, list] = {}  # id -> [id, source, language, tokens, bucket, key, offset, length]
        self._files = {}
        for name, ending in FILES.items():
            file = open(f"{stem}.{ending}", "r+b" if note else "w+b")
            file.truncate(note["sizes"][name] if note else 0)
            file.seek(0, 2)
            self._files[name] = file
        if note:
            offset = 0
            for record in iter_jsonl(Path(f"{stem}.spool")):
                row = [record[key] for key in ("id", "source", "language", "tokens", "bucket", "key")]
                length = len(_line(record))
                self._offer([*row, offset, length])
                offset += length
            self.counts = Counter(note["counts"])

    @staticmethod
    def can_go_back(stem: Path, note: dict) -> bool:
        """Whether the files are there, as long as the note says or longer."""
        files = {name: Path(f"{stem}.{ending}") for name, ending in FILES.items()}
        return all(path.is_file() and path.stat().st_size >= note["sizes"][name] for name, path in files.items())

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()

    def counting(self, rows: Iterable[dict]) -> Iterator[dict]:
        """The rows, counted, up to `wish.scan` in all."""
        limit = self.wish.scan
        if limit is not None and self.counts["rows"] >= limit:
            return
        for row in rows:
            self.counts["rows"] += 1
            yield row
            if self.counts["rows"] == limit:
                return

    def take(self, batch: Sequence[Document]) -> None:
        """Count a batch of documents and keep those that could be drawn."""
        lengths = self.wish.lengths
        least, end = lengths.edges[0], lengths.edges[-1]
        long_enough = [d for d in batch if len(d.text) >= least or len(d.text.encode()) >= least]
        self.counts["read"] += len(batch)
        self.counts["short"] += len(batch) - len(long_enough)
        for document, tokens in zip(long_enough, self._lengths([d.text for d in long_enough])):
            if tokens >= end and self.wish.over_long == "cut":
                document = self._cut(document)
                tokens = int(token_counts(self.tokenizer, [document.text])[0])
                self.counts["cut"] += 1
            bucket = lengths.bucket(tokens)
            if bucket is None:
                self.counts["short" if tokens < least else "long"] += 1
            elif document.id in self._held:
                self.counts["repeated"] += 1
                self.rejected.append({"id": document.id, "reason": "duplicate id; ids must be unique"})
            else:
                key = key_of(self.wish.seed, document.id, lengths.weight(tokens))
                row = [document.id, document.source, document.language, tokens, bucket, key]
                if self._offer(row):
                    line = _line(asdict(document) | {"tokens": tokens, "bucket": bucket, "key": key})
                    row += [self._files["spool"].tell(), len(line)]
                    self._files["spool"].write(line)
        self._write_down()

    def note(self) -> dict:
        """The pool's state, as JSON: to make it again from its files."""
        for file in self._files.values():
            file.flush()
        return {"counts": dict(self.counts), "sizes": {name: file.tell() for name, file in self._files.items()}}

    def finish(self) -> list[list]:
        """Write `<stem>.jsonl`. Returns its index: [id, source, language, tokens, bucket, key, offset, length] a line."""
        self._write_down()
        shares = self.wish.lengths.shares
        chosen: list[str] = []
        for group in sorted({stratum[:2] for stratum in self._pools}):
            pools = [self._pools.get((*group, bucket)) for bucket in range(len(shares))]
            ids = [[id for _, id in pool.items()] if pool else [] for pool in pools]
            for got, there in zip(allocate(self.wish.capacity, shares, [len(i) for i in ids]), ids):
                chosen += there[:got]
                self.counts["not_drawn"] += len(there) - got
        index = []
        with whole(Path(f"{self.stem}.jsonl")) as half, open(half, "wb") as part:
            for id in chosen:
                *row, offset, length = self._held[id]
                self._files["spool"].seek(offset)
                index.append([*row, part.tell(), length])
                part.write(self._files["spool"].read(length))
        self.counts["candidates"] = len(index)
        return index

    def _lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text; one whose beginning alone is clearly too long is not counted to its end."""
        end = self.wish.lengths.edges[-1]
        beginnings = [text[: 12 * end] if len(text) > 24 * end else text for text in texts]
        counts = token_counts(self.tokenizer, beginnings).tolist()
        unsure = [i for i, text in enumerate(texts) if len(beginnings[i]) < len(text) and counts[i] < 1.1 * end]
        for i, tokens in zip(unsure, token_counts(self.tokenizer, [texts[i] for i in unsure]).tolist()):
            counts[i] = tokens
        return counts

    def _offer(self, row: list) -> bool:
        pool = self._pools.setdefault((row[2], row[1], row[4]), Reservoir(self.wish.capacity))
        entered, out = pool.offer(row[5], row[0])
        if entered:
            self._held[row[0]] = row
        if out is not None:
            del self._held[out]
        self.counts["not_drawn"] += int(not entered or out is not None)
        return entered

    def _cut(self, document: Document) -> Document:
        """The document's beginning; its length is drawn evenly from the range by a hash of the id."""
        low, high = self.wish.lengths.edges[0], self.wish.lengths.edges[-1] - 1
        digest = hashlib.blake2b(f"{self.wish.seed}\0cut\0{document.id}".encode(), digest_size=8).digest()
        target = low + int.from_bytes(digest, "big") * (high - low + 1) // 2**64
        target = max(target, min(high, low * 4 // 3 + 1))  # a cut may end up to a quarter early, at a sentence
        beginning = replace(document, text=document.text[: 16 * target])  # spares counting a whole book
        try:
            short = cut_to_tokens(beginning, self.tokenizer, target)
            return short if short is not beginning else cut_to_tokens(document, self.tokenizer, target)
        except ValueError:  # not even its first character fits: what is left over counts as short
            return replace(document, text="")

    def _write_down(self) -> None:
        for name, notes in (("rejected", self.rejected), ("cleaned", self.cleaned)):
            self.counts[name] += len(notes)
            self._files[name].writelines(_line(note) for note in notes)
            notes.clear()


def _line(record: dict) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
