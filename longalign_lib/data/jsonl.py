"""JSON Lines in and out, one record a line, with errors that name the file and the line.

Invariants: a record is a JSON object; files are UTF-8 with `\\n` line ends; a non-blank line either becomes a
record or is reported, never skipped in silence. Cost: one pass, one line in memory at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from longalign_lib.files import whole


class JsonlError(ValueError):
    """A line of a JSONL file that is not a JSON object."""


def iter_jsonl(path: str | Path, rejected: list[dict] | None = None) -> Iterator[dict]:
    """Yield the records of a JSONL file one by one.

    Args:
        path: the file.
        rejected: when given, bad lines are appended to it as {"id": "file:line", "reason": ...} and reading goes on;
            when None, the first bad line raises.

    Raises:
        JsonlError: a bad line, with the file, the line number, what is wrong and how to mend it.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such JSONL file")
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            if not raw.strip():
                continue
            reason = None
            try:
                record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(record, dict):
                    reason = f"holds a JSON {type(record).__name__}, a record must be an object {{...}}"
            except UnicodeDecodeError as error:
                reason = f"is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
            except json.JSONDecodeError as error:
                cut = "" if raw.endswith(b"\n") else "; it has no line end, so a write may have been cut off here"
                reason = f"is not valid JSON ({error.msg} at column {error.colno}){cut}"
            except RecursionError:
                reason = "is nested too deeply"
            except ValueError as error:  # a number of thousands of digits
                reason = f"cannot be read ({str(error).split(';')[0][:100]})"
            if reason is None:
                yield record
            elif rejected is not None:
                rejected.append({"id": f"{path.name}:{number}", "reason": f"line {reason}"})
            else:
                start = raw[:60].decode("utf-8", "replace").strip()
                raise JsonlError(
                    f"{path}, line {number} {reason}. The line begins: {start!r}. Mend or delete that line: "
                    "every line must be one complete JSON object."
                )


def read_jsonl(path: str | Path, rejected: list[dict] | None = None) -> list[dict]:
    """All records of a JSONL file; see `iter_jsonl` for the arguments and errors."""
    return list(iter_jsonl(path, rejected))


def write_jsonl(path: str | Path, records: Iterable[dict]) -> Path:
    """Write records to a new file, complete or not at all (a temporary file beside it is renamed at the end).

    Returns:
        the path written.
    """
    with whole(path) as half, half.open("w", encoding="utf-8", newline="\n") as handle:
        for record in records:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")
    return Path(path)


def append_jsonl(path: str | Path, record: dict) -> None:
    """Append one record as one line and flush it to the disk, so that a kill loses at most the line being written.

    A file that ends without a line end (an earlier kill in mid-write) gets one first: the torn line stays visible to
    `iter_jsonl` and the new record is not glued to it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
    with path.open("ab+") as handle:
        if handle.tell() > 0:
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":
                line = b"\n" + line
        handle.write(line)
        handle.flush()
        os.fsync(handle.fileno())
