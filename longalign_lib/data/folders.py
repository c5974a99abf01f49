"""Your own files as documents: txt, md, py, jsonl, jsonl.gz and parquet, read one document at a time.

Every file and every record has one fate: it is yielded, or it is in `rejected` with a reason. Links that lead out of the folder are
not followed. A broken record does not
stop its file, a broken file does not stop the folder. Memory: one document, at most `max_bytes` (a longer line is
skipped without being held), or one batch of a Parquet file. Cost: one pass over the files, in sorted order.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from longalign_lib.data.documents import MAX_BYTES, Document, accepting, read_text
from longalign_lib.data.text import language_of

PLAIN = (".txt", ".md", ".py")
READABLE = (*PLAIN, ".jsonl", ".jsonl.gz", ".parquet")
FIELDS = ("id", "text", "title", "licence", "license")


def read_folder(
    path: str | Path, source: str = "local", language: str = "en", max_bytes: int = MAX_BYTES
) -> tuple[list[Document], list[dict]]:
    """All documents of a folder at once; see `iter_folder`.

    Returns:
        (documents, rejected: list of {"id", "reason"}).
    """
    rejected: list[dict] = []
    return list(iter_folder(path, rejected, source=source, language=language, max_bytes=max_bytes)), rejected


def iter_folder(
    path: str | Path,
    rejected: list[dict],
    *,
    source: str = "local",
    language: str = "en",
    max_bytes: int = MAX_BYTES,
    cleaned: list[dict] | None = None,
) -> Iterator[Document]:
    """Yield the documents of every readable file under a folder; records of JSONL and Parquet need a "text" field.

    Ids are file names, or a record's own "id", with its file's name before it where another record has that id and another text
    (files that each number their rows from 0); the same id with the same text is a duplicate.

    Args:
        path: the folder, read recursively in sorted order.
        rejected: gets {"id", "reason"} for what cannot be used, files of other kinds among them.
        source: what to call the source; one of the nine kinds when it is one.
        language: "en", "zh", or "auto" (by the share of Chinese characters).
        max_bytes: of one file of text or one line of JSONL.
        cleaned: gets a note for each text that invisible characters were taken from.

    Raises:
        FileNotFoundError: no such folder. ValueError: an unknown language.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a folder that holds {', '.join(READABLE)} files")
    if language not in ("en", "zh", "auto"):
        raise ValueError(f"language {language!r} is unknown; accepted: en, zh, auto")
    if max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}; give at least 1")

    seen: dict[str, int] = {}

    def named(given: str, name: str, text: str) -> str:
        for identity in (given, f"{name}#{given}"):
            if seen.setdefault(identity, hash(text)) == hash(text):
                break
        return identity

    def documents() -> Iterator[Document]:
        home = folder.resolve()
        for file in sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink()):
            name = _utf8(file.relative_to(folder).as_posix())
            try:
                inside = file.resolve().is_relative_to(home)
            except (OSError, RuntimeError):  # links in a ring
                inside = False
            if not inside or not file.exists():
                rejected.append({"id": name, "reason": "a link out of the folder is not followed; copy the file" if not inside else "a link to nothing"})
                continue
            if file.is_dir():
                continue
            if file.suffix in PLAIN:
                text, reason = read_text(file, max_bytes)
                if reason is not None:
                    rejected.append({"id": name, "reason": reason})
                else:
                    yield Document(name, text, source, _language(text, language), _utf8(file.stem))
                continue
            if not file.name.endswith(READABLE):
                rejected.append({"id": name, "reason": f"suffix {file.suffix!r} is not read; accepted: {READABLE}"})
                continue
            records = _parquet(file, name, rejected) if file.suffix == ".parquet" else _jsonl(file, name, rejected, max_bytes)
            for row, record in records:
                text = record.get("text")
                if not isinstance(text, str):
                    rejected.append({"id": f"{name}#{row}", "reason": 'record has no "text" string'})
                    continue
                given = {key: _utf8(str(record[key])) for key in FIELDS if record.get(key) not in (None, "")}
                licence = given.get("licence") or given.get("license", "")
                identity = named(given["id"], name, text) if "id" in given else f"{name}#{row}"
                yield Document(identity, text, source, _language(text, language), given.get("title", ""), licence)

    yield from accepting(documents(), rejected, cleaned)


def bounded_lines(handle, limit: int) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield (number from 1, line without its end, length in bytes); the line is None when it is longer than `limit`."""
    number = 0
    while line := handle.readline(limit + 2):
        number += 1
        length, last = len(line), line
        while not last.endswith(b"\n") and (last := handle.readline(min(limit, 2**20) + 2)):
            length += len(last)
        content = line.rstrip(b"\r\n")
        yield number, content if len(content) <= limit and length == len(line) else None, length


def _jsonl(file: Path, name: str, rejected: list[dict], max_bytes: int) -> Iterator[tuple[int, dict]]:
    """(row, record) of a JSONL file, gzipped or not; what is broken goes to `rejected`."""
    row = -1
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as handle:
            for number, line, length in bounded_lines(handle, max_bytes):
                if line is not None and not line.strip():
                    continue
                row += 1
                reason = None
                if line is None:
                    reason = f"line of {length:,} bytes, the limit is {max_bytes:,}; split it or raise max_bytes"
                else:
                    try:
                        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                        if not isinstance(record, dict):
                            reason = f"line holds a JSON {type(record).__name__}, a record must be an object {{...}}"
                    except UnicodeDecodeError as error:
                        reason = f"line is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
                    except RecursionError:
                        reason = "line is nested too deeply"
                    except ValueError as error:
                        reason = f"line is not valid JSON ({error}); a write may have been cut off here"
                if reason is None:
                    yield row, record
                else:
                    rejected.append({"id": f"{name}:{number}", "reason": reason})
    except (EOFError, zlib.error, OSError) as error:
        rejected.append({"id": name, "reason": f"cannot be read on after {row + 1} records ({error})"})


def _parquet(file: Path, name: str, rejected: list[dict], batch: int = 64) -> Iterator[tuple[int, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(file) as table:
            columns = [key for key in FIELDS if key in table.schema_arrow.names]
            if "text" not in columns:
                found = ", ".join(table.schema_arrow.names)
                rejected.append({"id": name, "reason": f'no column "text" (it has: {found}); rename one'})
                return
            for part in table.iter_batches(batch_size=batch, columns=columns):
                # Values one by one: a string that is not UTF-8 then costs its own row alone.
                for values in zip(*(part.column(key) for key in columns)):
                    try:
                        yield row, {key: value.as_py() for key, value in zip(columns, values)}
                    except UnicodeDecodeError as error:
                        reason = f"row is not UTF-8 ({error.reason} at byte {error.start})"
                        rejected.append({"id": f"{name}#{row}", "reason": reason})
                    row += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        rejected.append({"id": name, "reason": f"not a readable Parquet file after {row} rows ({reason})"})


def _language(text: str, wanted: str) -> str:
    return language_of(text[:20_000]) if wanted == "auto" else wanted


def _utf8(text: str) -> str:
    """The text with what UTF-8 cannot hold replaced (names of files may be any bytes)."""
    return text.encode("utf-8", "replace").decode()
