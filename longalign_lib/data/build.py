"""From sources and folders to the documents of a data set: collected, without near-duplicates, chosen by length.

    readers ─► candidates (collect, one part a reader) ─► dedup ─► choose (sampling) ─► documents.jsonl
                        └──────────────────────────┴─► rejected.jsonl, cleaned.jsonl, report.json

Killed at any moment, a rerun with the same arguments keeps the finished parts, goes on with the others and writes the
same files. Changed arguments make anew what depends on them. Invariants: a document is in the output once; what was
rejected or removed is on record with a reason, what was only not drawn is counted.
Cost: reading and counting, then 10 to 50 ms a candidate of 10k-50k words for near-duplicates; memory for keys and
signatures, not for texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from longalign_lib.data import sampling
from longalign_lib.data.collect import collect, kind_of, part_name
from longalign_lib.data.dedup import find_near_duplicates
from longalign_lib.data.documents import MAX_BYTES
from longalign_lib.data.hub import SourceError
from longalign_lib.data.jsonl import iter_jsonl, write_jsonl
from longalign_lib.data.pool import Wish
from longalign_lib.files import whole

INDEX = ["id", "source", "language", "length", "bucket", "key", "offset", "bytes"]


def build_documents(
    out: str | Path,
    readers: Sequence[str],
    *,
    n: int = 10_000,
    min_tokens: int = 8_192,
    max_tokens: int = 65_536,
    spread: str = "even",
    power: float = 1.0,
    quotas: Mapping[str, float] | None = None,
    chinese: float | None = sampling.CHINESE,
    tokenizer=None,
    seed: int = 0,
    threshold: float | None = 0.8,
    over_long: str = "drop",
    scan: int | None = 100_000,
    max_bytes: int = MAX_BYTES,
    loader: Callable | None = None,
    progress: bool = True,
) -> tuple[Path, Path, pd.DataFrame]:
    """Build documents.jsonl, rejected.jsonl, cleaned.jsonl and report.json in a folder.

    Args:
        out: the folder; its parts/ keeps what each reader gave.
        readers: names of `sources.REGISTRY` (streamed from the Hub), "samples", "python", folders, or name=folder.
        n: documents wanted.
        min_tokens, max_tokens: length range, both included.
        spread, power: the law of lengths, see `sampling.law`.
        quotas: relative weights of the documents' sources; those not named weigh 1.
        chinese: share of Chinese documents; None takes the languages as they come.
        tokenizer: its name or folder, or the tokenizer; None is the default model's.
        seed: of every draw.
        threshold: Jaccard similarity from which a near-duplicate is removed; None keeps them.
        over_long: "drop" documents beyond max_tokens, as the paper, or "cut" them to a length drawn from the range.
        scan: rows to read of each Hub stream; None reads it to its end.
        max_bytes: of one document.
        loader: in place of `datasets.load_dataset`.
        progress: show bars.

    Returns:
        (documents.jsonl, rejected.jsonl, report): the report has a row for each source, language and length range with
        available, wanted, got; report.attrs["readers"] says what became of everything each reader read.

    Raises:
        ValueError: an argument that cannot be, or nothing to choose from.
        hub.SourceError: a source that cannot be read, once all others are collected.
    """
    out = Path(out)
    if n < 1:
        raise ValueError(f"n is {n}; ask for at least 1 document")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; give a whole number from 0 to {2**32 - 1}")
    if not readers or len(set(map(part_name, readers))) < len(readers):
        raise ValueError(f"readers are {list(readers)}; give at least one, each once")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; give a Jaccard similarity above 0 and at most 1, or None")
    lengths = sampling.law(min_tokens, max_tokens, spread, power=power)
    tokenizer = _tokenizer(tokenizer)
    found, failed = {}, []
    for reader in tqdm(readers, desc="readers", disable=not progress, leave=False):
        capacity = _capacity(n, reader, readers, quotas or {}, chinese)
        wish = Wish(lengths, capacity, seed, over_long, scan, max_bytes)
        try:
            found[part_name(reader)] = collect(reader, out / "parts", wish, tokenizer, loader=loader, progress=progress)
        except SourceError as error:
            failed.append(str(error))
    if failed:
        raise SourceError(f"{len(failed)} of {len(readers)} readers failed; the others' parts are kept. " + " | ".join(failed))
    return _choose(out, found, lengths, n, quotas, chinese, threshold, seed, progress)


def _choose(out, found, lengths, n, quotas, chinese, threshold, seed, progress) -> tuple[Path, Path, pd.DataFrame]:
    """Near-duplicates, choice and files, from the parts."""
    parts = out / "parts"
    frames = [pd.DataFrame(made["index"], columns=INDEX).assign(part=part) for part, made in found.items()]
    table = pd.concat([frame for frame in frames if len(frame)] or frames, ignore_index=True)
    again = table["id"].duplicated() & ~table.duplicated(["id", "part"])  # another reader has a document of that name
    table.loc[again, "id"] = table.part[again] + ":" + table.id[again]
    repeated = table["id"].duplicated()
    removed = [
        {"id": row.id, "reason": "duplicate id; ids must be unique", "reader": row.part}
        for row in table[repeated].itertuples()
    ]
    table = table[~repeated].reset_index(drop=True)
    with _Texts(parts) as texts:
        if threshold is not None and len(table):
            spots = _places(table)
            notes = find_near_duplicates(
                table["id"].tolist(), lambda i: texts(*spots[i])["text"], threshold=threshold, seed=seed, progress=progress
            )
            gone = [note.pop("position") for note in notes]
            removed += notes
            table = table.drop(index=gone).reset_index(drop=True)
        rejected, cleaned = out / "rejected.jsonl", out / "cleaned.jsonl"
        write_jsonl(rejected, _all(parts, found, "rejected", removed))
        write_jsonl(cleaned, _all(parts, found, "cleaned", []))
        counts = pd.DataFrame([{"reader": part, **made["counts"]} for part, made in found.items()])
        if not len(table):
            told = counts.drop(columns=["rows", "cleaned"]).to_string(index=False)
            raise ValueError(
                f"no document of {lengths.edges[0]} to {lengths.edges[-1] - 1} tokens was found; widen min_tokens and "
                f"max_tokens, or read more. What became of the documents:\n{told}\nReasons are in {rejected.name}."
            )
        chosen, report = sampling.choose(table, n, lengths, quotas, chinese)
        ids = table["id"].tolist()
        order = sorted(chosen, key=lambda i: sampling.key_of(seed, f"order {ids[i]}"))
        documents, spots = out / "documents.jsonl", _places(table)
        write_jsonl(documents, (_record(texts(*spots[i])) | {"id": ids[i]} for i in order))
    duplicates = pd.Series([note["id"] for note in removed if "duplicate_of" in note], dtype=object)
    counts["got"] = [int(table.loc[order, "part"].eq(part).sum()) for part in found]
    report.attrs["readers"] = counts.to_dict("records")
    told = {"strata": report.to_dict("records"), "readers": report.attrs["readers"], "near_duplicates": len(duplicates)}
    with whole(out / "report.json") as half:
        half.write_text(json.dumps(told, ensure_ascii=False, indent=1, default=int) + "\n", encoding="utf-8")
    return documents, rejected, report


def _capacity(n: int, reader: str, readers: Sequence[str], quotas: Mapping[str, float], chinese: float | None) -> int:
    """Documents to keep of one language and source of a reader: its share three times over, as others may fall short.

    A reader that may have to give everything (the only one, one that holds several sources) keeps a quarter more than n,
    for near-duplicates.
    """
    everything = math.ceil(1.25 * n) + 16
    kind, label, _ = kind_of(reader)
    if len(readers) == 1 or chinese is None or kind == "hand":
        return everything
    total = sum(quotas.get(kind_of(other)[1], 1.0) for other in readers)
    share = max(3 * quotas.get(label, 1.0) / total if total else 1.0, 1.5 * chinese)
    return min(everything, math.ceil(n * share) + 32)


def _tokenizer(given):
    from longalign_lib.models import load_tokenizer

    return load_tokenizer(given or "default") if given is None or isinstance(given, (str, Path)) else given


def _places(table: pd.DataFrame) -> list[tuple[str, int, int]]:
    return list(zip(table["part"].tolist(), table["offset"].tolist(), table["bytes"].tolist()))


def _record(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in ("bucket", "key")}


def _all(parts: Path, found: Mapping[str, dict], kind: str, more: list[dict]) -> Iterator[dict]:
    for part in found:
        for note in iter_jsonl(parts / f"{part}.{kind}.jsonl"):
            yield note | {"reader": part}
    yield from more


class _Texts:
    """Records of the parts by place, with the files kept open."""

    def __init__(self, parts: Path):
        self.parts, self.files = parts, {}

    def __enter__(self) -> _Texts:
        return self

    def __exit__(self, *_) -> None:
        for file in self.files.values():
            file.close()

    def __call__(self, part: str, offset: int, length: int) -> dict:
        if part not in self.files:
            self.files[part] = open(self.parts / f"{part}.jsonl", "rb")
        self.files[part].seek(offset)
        return json.loads(self.files[part].read(length))
