"""Training suites by name and seed: long samples mixed with all short ones, as in the paper's ablation (section 4.2).

    longalign-0k     no long sample            longalpaca-12k   the 12,000 rows of LongAlpaca, read in its own format
    longalign-5k     5,000 long samples        two-sources      as many as 10k has, from papers and books alone
    longalign-10k    10,000 long samples
    each with every short sample (ShareGPT in the paper)

Every row has a rank: a hash of seed and messages. A suite takes the long rows of lowest rank and writes its rows in the
order of another such hash, so the rows of 5k are among those of 10k, in the same order, and neither the order of the files
nor rows added later move the others. With fewer than 10,000 long rows a suite is scaled: 5k takes half of what there is,
10k all, and the report says so.

Invariants: same files, name and seed give the same suite; a row is taken at most once (repeated messages are rejected); every
row says which file and line it comes from. Cost: files are read once, a row in memory at a time; a copy on disk while mixing.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from longalign_lib.data.formats import iter_format
from longalign_lib.data.jsonl import write_jsonl
from longalign_lib.files import whole

FULL = 10_000  # long samples of the paper


@dataclass(frozen=True)
class Suite:
    """How many long rows a suite wants at the paper's scale, and from where ("pool", "longalpaca" or "sources")."""

    wanted: int
    of: int
    rule: str
    says: str


SUITES = {
    "longalign-0k": Suite(0, FULL, "pool", "short samples alone"),
    "longalign-5k": Suite(5_000, FULL, "pool", "half of the long samples"),
    "longalign-10k": Suite(10_000, FULL, "pool", "all long samples"),
    "longalpaca-12k": Suite(12_000, 12_000, "longalpaca", "LongAlpaca: papers, books and 3,000 short ones"),
    "two-sources": Suite(10_000, FULL, "sources", "long samples from two sources alone"),
}
TWO_SOURCES = ("arxiv", "books")  # what LongAlpaca's long questions are about


@dataclass(frozen=True)
class Row:
    """What choosing needs to know of a sample: its hash, source, size and place (part, spool offset, "file:line")."""

    key: str
    part: str
    source: str
    tokens: int | None
    characters: int
    origin: str
    offset: int = 0


def rank(seed: int, key: str, what: str) -> str:
    """A row's place in a seeded order that does not depend on the other rows."""
    return hashlib.blake2b(f"{seed}/{what}/{key}".encode(), digest_size=12).hexdigest()


def choose(name: str, long: Sequence[Row], short: Sequence[Row], seed: int, sources: Sequence[str] = TWO_SOURCES) -> tuple[list[Row], list[str]]:
    """The rows of a suite, in order, and what there is to say about its scale.

    Args:
        name: a key of SUITES.
        long, short: all rows there are.
        seed: of the draw and of the order.
        sources: the two of "two-sources".

    Raises:
        ValueError: an unknown name, no long rows for a suite that wants some, or a source without rows.
    """
    if name not in SUITES:
        raise ValueError(f"suite {name!r} is unknown; accepted: {', '.join(SUITES)}")
    suite, pool, notes = SUITES[name], sorted(long, key=lambda r: rank(seed, r.key, "draw")), []
    if suite.wanted and not long:
        raise ValueError(f"suite {name!r} wants {suite.wanted:,} long samples and there is none; give files of long samples")
    n = suite.wanted if len(pool) >= suite.of else round(len(pool) * suite.wanted / suite.of)
    if n < suite.wanted:
        notes.append(f"{len(pool):,} long samples instead of {suite.of:,}: {n:,} taken where the paper has {suite.wanted:,}")
    if suite.rule == "sources":
        found = Counter(r.source for r in pool)
        if len(set(sources)) != 2 or not all(found[s] for s in sources):
            raise ValueError(f"sources {tuple(sources)}: give two of those that the long samples have: {dict(sorted(found.items()))}")
        pool = [r for r in pool if r.source in sources]
        if len(pool) < n:
            notes.append(f"{' and '.join(sources)} have {len(pool):,} long samples, {n - len(pool):,} fewer than the suite is to have")
    return sorted([*pool[:n], *short], key=lambda r: rank(seed, r.key, "order")), notes


def mix(
    name: str, long: str | Path | Sequence[str | Path], short: str | Path | Sequence[str | Path], seed: int, out: str | Path,
    sources: Sequence[str] = TWO_SOURCES, progress: bool = True,
) -> dict:  # fmt: skip
    """Write a suite's samples to a file.

    Args:
        name: a key of SUITES.
        long, short: files in any format of `formats` (samples of our own, LongAlign-10k, LongAlpaca-12k, ShareGPT, Alpaca).
        seed: of the draw and of the order.
        out: JSONL to write; a row is its sample and "part" (long | short), "origin" ("file:line"). Beside it, under the
            same name, .rejected.jsonl ({"id", "reason"}) and .report.json.
        sources: the two of "two-sources".

    Returns:
        report: suite, seed, rows, notes (what was scaled), rejected (count), parts: a dict for each part and source
        {part, source, available, taken, tokens, characters}; `report_table` makes a frame of it.

    Raises:
        FileNotFoundError, ValueError: see `formats.read_format` and `choose`.
    """
    if name not in SUITES:
        raise ValueError(f"suite {name!r} is unknown; accepted: {', '.join(SUITES)}")
    out, rejected = Path(out), []
    out.parent.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Row]] = {"long": [], "short": []}
    seen: dict[str, str] = {}
    with tempfile.TemporaryFile(dir=out.parent) as spool:
        for part, paths in (("long", long), ("short", short)):
            for path in [paths] if isinstance(paths, (str, Path)) else paths:
                kind = "longalpaca" if part == "long" and SUITES[name].rule == "longalpaca" else None
                bar = tqdm(iter_format(path, kind, rejected), desc=f"read {part}", leave=False, delay=2, disable=not progress)
                for origin, sample in bar:
                    row = row_of(sample, part, origin, spool.tell())
                    if row.key in seen:
                        rejected.append({"id": origin, "reason": f"the same messages as {seen[row.key]}"})
                        continue
                    seen[row.key] = origin
                    groups[part].append(row)
                    spool.write(json.dumps(sample | {"part": part, "origin": origin}, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n")
        try:
            taken, notes = choose(name, groups["long"], groups["short"], seed, sources)
        except ValueError as error:
            first = "; ".join(f"{r['id']}: {r['reason']}" for r in rejected[:3])
            raise ValueError(f"{error}" + (f" ({len(rejected)} rows were rejected, first {first})" if rejected else "")) from None
        with whole(out) as half, half.open("wb") as handle:
            for row in tqdm(taken, desc="write", leave=False, delay=2, disable=not progress):
                spool.seek(row.offset)
                handle.write(spool.readline())
    report = _report(name, seed, groups, taken, notes) | {"rejected": len(rejected)}
    write_jsonl(out.with_suffix(".rejected.jsonl"), rejected)
    with whole(out.with_suffix(".report.json")) as half:
        half.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def mix_samples(
    name: str, long: Sequence[dict], short: Sequence[dict], seed: int, sources: Sequence[str] = TWO_SOURCES
) -> tuple[list[dict], dict]:
    """`mix` in memory: (samples with "part" and "origin" ("long:3", the place in what was given), report)."""
    groups: dict[str, list[Row]] = {"long": [], "short": []}
    seen: dict[str, int] = {}
    for part, samples in (("long", long), ("short", short)):
        for i, sample in enumerate(samples):
            row = row_of(sample, part, f"{part}:{i}", i)
            if row.key not in seen:
                groups[part].append(row)
            seen[row.key] = seen.get(row.key, 0) + 1
    taken, notes = choose(name, groups["long"], groups["short"], seed, sources)
    given = {"long": long, "short": short}
    report = _report(name, seed, groups, taken, notes) | {"rejected": sum(seen.values()) - len(seen)}
    return [{**given[r.part][r.offset], "part": r.part, "origin": r.origin} for r in taken], report


def report_table(report: dict) -> pd.DataFrame:
    """A report's parts as a frame: part, source, available, taken, share of the rows taken, tokens, characters."""
    table = pd.DataFrame(report["parts"], columns=["part", "source", "available", "taken", "tokens", "characters"])
    table.insert(4, "share", table.taken / max(1, table.taken.sum()))
    return table


def row_of(sample: dict, part: str, origin: str, offset: int) -> Row:
    """The facts of a sample that choosing needs; its key is a hash of its messages alone."""
    text = json.dumps([[m["role"], m["content"]] for m in sample["messages"]], ensure_ascii=False)
    key = hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=12).hexdigest()
    tokens = sample.get("length")
    characters = sum(len(m["content"]) for m in sample["messages"])
    return Row(key, part, str(sample.get("source", "")), tokens if isinstance(tokens, int) else None, characters, origin, offset)


def _report(name: str, seed: int, groups: dict[str, list[Row]], taken: list[Row], notes: list[str]) -> dict:
    parts = []
    for part, rows in groups.items():
        here = [r for r in taken if r.part == part]
        for source, available in sorted(Counter(r.source for r in rows).items()):
            mine = [r for r in here if r.source == source]
            tokens = None if any(r.tokens is None for r in mine) else sum(r.tokens for r in mine)
            parts.append({"part": part, "source": source, "available": available, "taken": len(mine), "tokens": tokens,
                          "characters": sum(r.characters for r in mine)})  # fmt: skip
    return {"suite": name, "seed": seed, "rows": len(taken), "notes": notes, "parts": parts}
