"""Published instruction sets read directly: ShareGPT, LongAlign-10k, LongAlpaca-12k and Alpaca become samples.

    sharegpt     {"id", "conversations": [{"from": "human" | "gpt" | "system", "value": ...}, ...]}
    longalign    {"messages": [{"role", "content"}, ...], "length"}                  (and samples of our own)
    longalpaca   {"instruction", "output", "file"?, "input"?}: 9k questions on papers and books, 3k short ones
    alpaca       {"instruction", "input", "output"}

Files are a JSON array (.json), JSON Lines or Parquet; rows of a streamed `datasets` dataset convert as well. Empty answers
are filtered, as the paper does with ShareGPT: a conversation is kept up to the last turn before one. Answers that stand
before the first question and a last question without an answer are cut off. What was cut is in the sample's "mended".

Invariant: every record becomes a sample or a rejection {"id", "reason"}; samples pass `chat.check_messages`.
Cost: one record at a time (a .json array is read whole).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from longalign_lib.data.chat import check_messages
from longalign_lib.data.text import language_of

LONGEST_LINE = 32 << 20  # bytes: a hundred times a sample of 64k tokens
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "system": "system",
}  # fmt: skip
_KIND = ((re.compile(r"\b(paper|papers)\b", re.I), "arxiv"), (re.compile(r"\bbooks?\b", re.I), "books"))
_TOLD_TO_READ = re.compile(r"^\s*(below (is|are)|there (is|are))\b", re.I)


def read_format(path: str | Path, kind: str | None = None) -> tuple[list[dict], list[dict]]:
    """All samples of a file.

    Args:
        path: .json (an array), .jsonl or .parquet.
        kind: a key of FORMATS; by default each record's own keys tell.

    Returns:
        (samples {"messages", "source", "task", "language", "document_id", ...}, rejected {"id", "reason"}).

    Raises:
        FileNotFoundError: no such file. ValueError: an unknown kind, or a file that is none of these.
    """
    rejected: list[dict] = []
    return [sample for _, sample in iter_format(path, kind, rejected)], rejected


def iter_format(path: str | Path, kind: str | None = None, rejected: list[dict] | None = None) -> Iterator[tuple[str, dict]]:
    """`read_format` one (place, sample) at a time, a place being "file:line"; rejections are appended to ``rejected``."""
    return _convert(iter_records(path, rejected), kind, rejected)


def convert(records: Iterable[dict], kind: str | None = None, rejected: list[dict] | None = None, name: str = "record") -> Iterator[dict]:
    """Turn records into samples; what cannot be used is appended to ``rejected`` as {"id": "name:number", "reason"}."""
    placed = ((f"{name}:{number}", record) for number, record in enumerate(records, start=1))
    return (sample for _, sample in _convert(placed, kind, rejected))


def _convert(records: Iterable[tuple[str, dict]], kind: str | None, rejected: list[dict] | None) -> Iterator[tuple[str, dict]]:
    if kind is not None and kind not in FORMATS:
        raise ValueError(f"kind is {kind!r}; accepted: {', '.join(FORMATS)}, or None to tell by each record's keys")
    for place, record in records:
        try:
            yield place, to_sample(record, kind, place)
        except ValueError as error:
            if rejected is not None:
                rejected.append({"id": place, "reason": str(error)})


def to_sample(record: dict, kind: str | None = None, place: str = "") -> dict:
    """One record as a sample; ValueError says why it is none."""
    kind = kind or kind_of(record)
    if not _NEEDED[kind] <= set(record):
        raise ValueError(f"a record with the keys {sorted(map(str, record))} is no {kind} record, which has {' and '.join(sorted(_NEEDED[kind]))}")
    messages, facts = FORMATS[kind](record)
    messages, mended = mend(messages)
    check_messages(messages)
    answers = " ".join(m["content"][:2000] for m in messages if m["role"] == "assistant")
    facts = {"source": kind, "task": "general", "language": language_of(answers), "document_id": str(record.get("id") or place)} | facts
    return {"messages": messages, **facts, **({"mended": mended} if mended else {})}


def kind_of(record: dict) -> str:
    """Which format a record has, by its keys; ValueError lists the accepted ones."""
    keys = set(record)
    if "conversations" in keys:
        return "sharegpt"
    if "messages" in keys:
        return "longalign"
    if {"instruction", "output"} <= keys:
        asks = str(record["instruction"])
        return "longalpaca" if "file" in keys or (_TOLD_TO_READ.match(asks) and len(asks) > 8000) else "alpaca"
    raise ValueError(
        f"a record with the keys {sorted(map(str, keys))} is of no known format; accepted: conversations (ShareGPT), "
        "messages (LongAlign-10k), instruction and output (LongAlpaca, Alpaca)"
    )


_NEEDED = {"sharegpt": {"conversations"}, "longalign": {"messages"}, "longalpaca": {"instruction", "output"}, "alpaca": {"instruction", "output"}}


def mend(messages: list[dict]) -> tuple[list[dict], list[str]]:
    """Cut what nothing can be learned from: (messages left, what was cut and why)."""
    notes = []
    head = [m for m in messages[:1] if m["role"] == "system"]
    turns, skipped = messages[len(head) :], len(head)
    if head and not head[0]["content"].strip():
        head = []
    first = next((i for i, m in enumerate(turns) if m["role"] == "user"), len(turns))
    if first and first < len(turns):
        notes.append(f"{first} turns before the first question cut")
        turns, skipped = turns[first:], skipped + first
    blank = next((i for i, m in enumerate(turns) if not m["content"].strip()), None)
    if blank is not None:
        what = "answer" if turns[blank]["role"] == "assistant" else "question"
        notes.append(f"cut before turn {skipped + blank}, an empty {what}")
        turns = turns[:blank]
    if turns and turns[-1]["role"] == "user":
        if blank is None:
            notes.append("the last question, without an answer, cut")
        turns = turns[:-1]
    if blank is not None and not turns:
        raise ValueError(f"nothing is left before an empty {what}")
    return head + turns, notes


# ------------------------------------------------------------------------------------------------------------ formats
def _sharegpt(record: dict) -> tuple[list[dict], dict]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"conversations is {turns!r:.60}; give a non-empty list of {{from, value}}")
    messages = []
    for i, turn in enumerate(turns):
        who = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(who, str) or who not in SPEAKERS:
            raise ValueError(f"turn {i} is from {who!r}; accepted: {', '.join(SPEAKERS)}")
        messages.append({"role": SPEAKERS[who], "content": _text(turn.get("value"), f"turn {i}")})
    return messages, {}


def _longalign(record: dict) -> tuple[list[dict], dict]:
    turns = record["messages"]
    if not isinstance(turns, list) or not all(isinstance(m, dict) for m in turns):
        raise ValueError(f"messages is {turns!r:.60}; give a list of {{role, content}}")
    messages = [{"role": m.get("role"), "content": _text(m.get("content"), f"message {i}")} for i, m in enumerate(turns)]
    facts = {} if "length" in record else {"source": "general"}  # LongAlign-10k names no source
    return messages, facts | {k: v for k, v in record.items() if k not in ("messages", "mended")}


def _alpaca(record: dict) -> tuple[list[dict], dict]:
    asks, more = _text(record.get("instruction"), "instruction"), record.get("input") or ""
    asks = f"{asks}\n\n{_text(more, 'input')}" if more else asks
    return [{"role": "user", "content": asks}, {"role": "assistant", "content": _text(record.get("output"), "output")}], {}


def _longalpaca(record: dict) -> tuple[list[dict], dict]:
    """Long ones are on papers or books, which their first words tell; the rest are short and general."""
    messages, _ = _alpaca(record)
    head = messages[0]["content"][:200]
    source = next((name for words, name in _KIND if words.search(head)), None) if _TOLD_TO_READ.match(head) else None
    facts = {"source": source, "task": "long-qa"} if source else {"source": "general", "task": "general"}
    return messages, facts | ({"file": record["file"]} if record.get("file") else {})


def _text(value, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is of type {type(value).__name__}; give a string")
    return value


FORMATS = {"sharegpt": _sharegpt, "longalign": _longalign, "longalpaca": _longalpaca, "alpaca": _alpaca}


# -------------------------------------------------------------------------------------------------------------- files
def iter_records(path: str | Path, rejected: list[dict] | None = None) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", record) of a .json array (the item's number), a .jsonl or a .parquet file (the row's number);
    what is no record goes to ``rejected``.

    Raises:
        FileNotFoundError: no such file. ValueError: a JSON array that is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as handle:
        start = handle.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    parts = _parquet(path) if path.suffix == ".parquet" else _array(path) if start.startswith(b"[") else _lines(path)
    for number, (record, reason) in parts:
        if record is not None:
            yield f"{path.name}:{number}", record
        elif rejected is not None:
            rejected.append({"id": f"{path.name}:{number}", "reason": reason})


def parse_line(raw: bytes, first: bool = False, longest: int = LONGEST_LINE) -> tuple[dict | None, str]:
    """A line of JSONL as (record, "") or (None, reason); the first line of a file may begin with a byte order mark."""
    if len(raw) > longest:
        return None, f"line has {len(raw):,} bytes, more than {longest:,}; split the sample"
    try:
        record = json.loads(raw.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return None, f"line is not UTF-8 ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:  # also integers of more than 4,300 digits
        cut = "" if raw.endswith(b"\n") else "; it has no line end, so a write may have been cut off here"
        return None, f"line is not valid JSON ({error}){cut}"
    if not isinstance(record, dict):
        return None, f"line holds a JSON {type(record).__name__}, a sample must be an object {{...}}"
    return record, ""


def _lines(path: Path) -> Iterator[tuple[int, tuple]]:
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            if not raw.isspace():
                yield number, parse_line(raw, first=number == 1)


def _array(path: Path) -> Iterator[tuple[int, tuple]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON array ({error}); a download may have been cut off: fetch it again") from error
    for number, record in enumerate(records, start=1):
        yield number, (record, "") if isinstance(record, dict) else (None, f"item is a JSON {type(record).__name__}, not an object")


def _parquet(path: Path) -> Iterator[tuple[int, tuple]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}); write the file anew") from None
    with opened as file:
        records = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(batch_size=64))
        yield from ((number, (record, "")) for number, record in enumerate(records, start=1))
