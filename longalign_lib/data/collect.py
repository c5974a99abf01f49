"""One reader's candidates: a single pass that keeps, for each length, the documents that could still be drawn.

A reader is a source on the Hub, a folder, or what is at hand offline. Its documents are counted in tokens in batches, put
into a pool (`pool`) that keeps the best of each length. What the pool holds at the end becomes the part, `<name>.jsonl`;
`<name>.json` beside it, written last, says that it is whole.

A killed run: finished parts are kept. A Hub stream notes its place every few thousand rows and goes on from there, to the
same part as without the kill; a folder is read again.
Invariants: a document read is a candidate, or rejected with a reason, or counted as too short, too long or not drawn.
Cost: see `pool`; memory is one batch of texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm.auto import tqdm

from longalign_lib.data import hub, sources
from longalign_lib.data.documents import Document, python_source, python_topics, read_samples
from longalign_lib.data.folders import iter_folder
from longalign_lib.data.pool import Pool, Wish
from longalign_lib.files import whole

AT_HAND = ("samples", "python")
BATCH_CHARS, BATCH = 1_000_000, 512
NOTE_EVERY = 2_000  # rows between two notes of a stream's place


def kind_of(reader: str) -> tuple[str, str, str]:
    """("hub" | "hand" | "folder", name of the part, folder or ""); `name=folder` gives a folder's source its name.

    Raises:
        ValueError: neither a known source nor a folder.
    """
    if reader in sources.REGISTRY:
        return "hub", reader, ""
    if reader in AT_HAND:
        return "hand", reader, ""
    label, equals, path = reader.partition("=")
    if not (equals and label.replace("-", "").replace("_", "").isalnum()):
        label, path = "local", reader
    if Path(path).is_dir():
        return "folder", label, path
    raise ValueError(
        f"{reader!r} is neither a source nor a folder; accepted: {', '.join(sources.REGISTRY)} (on the Hub), "
        f"{', '.join(AT_HAND)} (at hand), a folder, or name=folder"
    )


def part_name(reader: str) -> str:
    """File name of a reader's part: readable, and its own for each folder."""
    kind, label, path = kind_of(reader)
    return label if kind != "folder" else f"{label}-{hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:8]}"


def collect(
    reader: str, parts: Path, wish: Wish, tokenizer, *, loader: Callable | None = None, progress: bool = True
) -> dict:
    """Make a reader's part, or find it made.

    Args:
        reader: as `kind_of` takes it.
        parts: folder of the parts.
        wish: what to collect; a part made for another wish is made anew.
        tokenizer: that counts.
        loader: in place of `datasets.load_dataset`.
        progress: show a bar.

    Returns:
        {"counts": {...}, "index": [[id, source, language, tokens, bucket, key, offset, length], ...], ...}.

    Raises:
        hub.SourceError: the source cannot be read; what was read so far is kept.
    """
    kind, label, path = kind_of(reader)
    name = part_name(reader)
    same = _fingerprint(reader, wish, tokenizer)
    if (made := _load(parts / f"{name}.json")) and made.get("same") == same:
        return made
    parts.mkdir(parents=True, exist_ok=True)
    note = _load(parts / f"{name}.place") if kind == "hub" else None
    if note and (note["same"] != same or not Pool.can_go_back(parts / name, note)):
        note = None
    with Pool(parts / name, wish, tokenizer, note) as pool:
        rows = None
        if kind == "hub":
            source = sources.get(label)
            rows = hub.open_rows(
                source.dataset, source.config, source.split,
                seed=wish.seed, ways=wish.ways, rejected=pool.rejected, loader=loader,
            )  # fmt: skip
            if note:
                rows.load_state_dict(note["place"])
            read = hub.reading(label, pool.counting(rows))
            documents = sources.documents_of(source, read, pool.rejected, pool.cleaned, wish.max_bytes)
        elif kind == "folder":
            documents = iter_folder(
                path, pool.rejected, source=label, language="auto", max_bytes=wish.max_bytes, cleaned=pool.cleaned
            )
        else:
            documents = _at_hand(label, pool.rejected)
        noted = pool.counts["rows"]
        bar = tqdm(
            desc=name, total=wish.scan if rows else None, initial=noted, unit="doc", disable=not progress, leave=False
        )
        with bar:
            for batch in _batches(documents):
                pool.take(batch)
                bar.update(len(batch))
                if rows is not None and pool.counts["rows"] - noted >= NOTE_EVERY:
                    noted = pool.counts["rows"]
                    place = {"same": same, "place": rows.state_dict()} | pool.note()
                    _save(parts / f"{name}.place", place)
        index = pool.finish()
        made = {"same": same, "reader": label if path else reader, "counts": dict(pool.counts), "index": index}
    _save(parts / f"{name}.json", made)
    for leftover in (parts / f"{name}.place", parts / f"{name}.spool"):
        leftover.unlink(missing_ok=True)
    return made


def _at_hand(label: str, rejected: list[dict]) -> Iterator[Document]:
    if label == "samples":
        documents, bad = read_samples()
        rejected += bad
        yield from documents
    else:
        yield from python_topics()
        yield from python_source()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS or len(batch) >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch  # may be empty: rejections alone are written down too


def _fingerprint(reader: str, wish: Wish, tokenizer) -> str:
    """What a part depends on: the reader and its data, the wish, the tokenizer."""
    kind, label, path = kind_of(reader)
    seen: list = [kind, label, repr(wish), getattr(tokenizer, "name_or_path", ""), len(tokenizer)]
    if kind == "folder":
        files = sorted(p for p in Path(path).rglob("*") if p.is_file())
        seen += [[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    elif kind == "hub":
        seen.append(repr(sources.get(label)))
    else:
        seen += [[d.id, hashlib.sha256(d.text.encode()).hexdigest()] for d in _at_hand(label, [])]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _load(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _save(path: Path, record: dict) -> None:
    with whole(path) as half:
        half.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
