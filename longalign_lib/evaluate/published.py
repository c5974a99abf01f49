"""Published benchmark files: JSON arrays or JSON Lines, read record by record with the line that each begins on.

Two shapes are in use: one JSON array of objects (LongBench-Chat's test_cases.json) and JSON Lines (LongBench, MT-Bench).
`records` reads both and says file and line for everything that is wrong: not UTF-8, cut off, no object. `Fields` checks
one record's keys and types. `inside` keeps a path that a file names within the folder that the reader was given.
Cost: one pass; a JSON array is in memory as text and as objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign_lib.data.jsonl import JsonlError

_SPACE = re.compile(r"\s*")
MAX_BYTES = 2**30  # of one file; LongBench's largest has 80 MB


@dataclass(frozen=True)
class Fields:
    """One record of a file: its fields, and where it stands ("name.jsonl, line 3")."""

    values: Any
    where: str

    def __contains__(self, key: str) -> bool:
        return isinstance(self.values, dict) and self.values.get(key) is not None

    def get(self, key: str, kind: type | tuple[type, ...], hint: str = "", empty: bool = False):
        """The field of that name.

        Args:
            kind: the type it must have; booleans are no numbers.
            hint: what the field is for, shown when it is missing. empty: "" and [] are fine.

        Raises:
            ValueError: it is missing, of another type, or empty; the message names file, line and field.
        """
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        if not isinstance(self.values, dict):
            raise ValueError(f"{self.where}: a record must be a JSON object, this is a {type(self.values).__name__}")
        if key not in self.values:
            there = ", ".join(sorted(map(str, self.values)))[:200] or "no fields"
            raise ValueError(f"{self.where}: {key} missing ({hint or wanted}); the record has {there}")
        value = self.values[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{self.where}: {key} must be {wanted}, got {type(value).__name__} {str(value)[:40]!r}")
        if not empty and isinstance(value, (str, list)) and not (value.strip() if isinstance(value, str) else value):
            raise ValueError(f"{self.where}: {key} is empty{'; it holds ' + hint if hint else ''}")
        return value

    def texts(self, key: str, hint: str = "", empty: bool = False) -> list[str]:
        """A list of strings. ``empty``: single strings may be empty. Raises ValueError like `get`."""
        found = self.get(key, list, hint)
        for value in found:
            if not isinstance(value, str) or not (empty or value.strip()):
                raise ValueError(f"{self.where}: {key} must hold texts, got {type(value).__name__} {str(value)[:40]!r}")
        return found


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        FileNotFoundError: no such file. ValueError: not UTF-8 (with the line), binary, or over 1 GiB.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path.name}: no such file; give the published file or a folder that holds it")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}: split it")
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path.name}, line {line} is not UTF-8 ({error.reason}); save the file as UTF-8") from None


def records(path: str | Path) -> Iterator[Fields]:
    """The records of a JSON array or of a JSON Lines file.

    Raises:
        JsonlError (a ValueError): text that is no JSON or ends too early, no record at all; FileNotFoundError: no file.
    """
    path, text = Path(path), read_text(path)
    start = len(text) - len(text.lstrip())
    if not text.strip():
        raise JsonlError(f"{path.name} is empty: one JSON object a line, or one JSON array of objects, is needed")
    if text[start] == "[":
        yield from _array(path.name, text, start + 1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield Fields(json.loads(line), f"{path.name}, line {number}")
            except json.JSONDecodeError as error:
                last = number == text.count("\n") + 1
                cut = "; it is the last and has no line end, so the file may have been cut off" if last else ""
                raise JsonlError(f"{path.name}, line {number} is not valid JSON ({error.msg} at column {error.colno}){cut}") from None


def _array(name: str, text: str, position: int) -> Iterator[Fields]:
    decoder, line, counted, first = json.JSONDecoder(), 1, 0, True
    while True:
        position = _SPACE.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        if position >= len(text):
            raise JsonlError(f"{name}, line {line}: the array is not closed by ]; the file was cut off. Fetch it again")
        if text[position] == "]":
            if text[position + 1 :].strip():
                raise JsonlError(f"{name}, line {line}: more text after the array's ]")
            return
        if not first:
            if text[position] != ",":
                raise JsonlError(f"{name}, line {line}: expected a comma between two records")
            position = _SPACE.match(text, position + 1).end()
            line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            at = text.count("\n", 0, error.pos) + 1
            raise JsonlError(
                f"{name}, line {at} is not valid JSON ({error.msg}), in the record that begins on line {line}; if it is "
                "the last one, the file was cut off"
            ) from None
        yield Fields(value, f"{name}, line {line}")
        position, first = end, False


def inside(folder: str | Path, named: str, where: str) -> Path:
    """The file ``named`` under ``folder``.

    Raises:
        ValueError: an absolute path, or one that leaves the folder by .. or by a link. FileNotFoundError: no such file.
    """
    root = Path(folder).resolve()
    path = (root / named).resolve()
    if Path(named).is_absolute() or "\\" in named or not path.is_relative_to(root):
        raise ValueError(f"{where}: the document {named!r} is outside the folder {root.name}/; name it relative to that folder")
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in root.iterdir())[:5]) if root.is_dir() else "no such folder"
        raise FileNotFoundError(f"{where}: no document {named!r} in {root.name}/ (there: {there or 'nothing'})")
    return path
