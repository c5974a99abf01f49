"""Answers under a hash of what shaped them, in an append-only JSONL file.

    {"key": "<sha256>", "model": ..., "settings": {...}, "text": ..., "prompt_tokens": ..., "completion_tokens": ...,
     "finish_reason": ...}
    {"spent": "<random id>", "prompt_tokens": ..., "completion_tokens": ...}

The second kind is no answer: it says what a try without one took, so that budgets hold over reruns. The key is the SHA-256 of
endpoint, model, messages and settings; neither the messages nor any secret is written.
Appending locks the file (where the system can), ends a torn last line, writes all new lines at once and flushes them to
the disk. Several processes may append to one file; each sees the others' lines, since a look-up that misses reads
whatever was added since (a `stat` when nothing was).

Invariants: an answer that `append` returned for is on disk; a torn or foreign line is passed over, stays in the file and
is listed in `bad`; files of earlier versions (without "settings") are read; an entry without text, or with "spent", is no
answer.
Cost: the file is read once, then only its new bytes; one flush for each batch of answers. All answers are in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from longalign_lib.llm.records import Reply

try:
    import fcntl
except ImportError:  # no such locks on this system: one process a file there
    fcntl = None

FIELDS = ("text", "prompt_tokens", "completion_tokens", "finish_reason")


def request_hash(identity: Mapping, settings: Mapping) -> str:
    """SHA-256 (hex) of everything that shapes an answer."""
    content = json.dumps({**identity, **settings}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


class AnswerCache:
    """Answers by key, kept in a file.

    Args:
        path: the JSONL file, made with its folders at the first answer; None keeps answers in memory alone.

    Attributes:
        bad: lines that hold no answer: {"id": "file:line", "reason"}, as `data.jsonl.iter_jsonl` reports them.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path is not None else None
        self.bad: list[dict] = []
        self._answers: dict[str, Reply] = {}
        self._spent: dict[str, tuple[int, int]] = {}  # tokens of tries without an answer, by their ids
        self._offset, self._lines = 0, 0  # what was read: bytes and lines
        self._lock = threading.Lock()
        self.refresh()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Reply | None:
        """The answer under this key, from memory or from what other processes have added to the file; or None."""
        if key not in self._answers:
            self.refresh()
        return self._answers.get(key)

    def tokens(self) -> tuple[int, int, int]:
        """(requests, their prompt tokens, their completion tokens) of the answers and of `spend`, as known now."""
        known = [(r.prompt_tokens, r.completion_tokens) for r in self._answers.values()] + [*self._spent.values()]
        return len(known), sum(prompt for prompt, _ in known), sum(completion for _, completion in known)

    def refresh(self) -> None:
        """Read what was added to the file since the last look."""
        if self.path is None or not self._lock.acquire(blocking=False):  # an append is under way: look the next time
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                self._read_new()
        finally:
            self._lock.release()

    def append(self, answers: Sequence[tuple[str, Reply, Mapping]]) -> None:
        """Keep answers, each as (key, reply, what else the line is to say); on disk when this returns.

        Raises:
            OSError: the file cannot be written. The answers are kept in memory then.
        """
        with self._lock:
            self._answers |= {key: replace(reply, cached=True) for key, reply, _ in answers}
            if self.path is not None:
                self._write(b"".join(_line(*answer) for answer in answers))

    def spend(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Put on record, on disk when this returns, what a request without an answer took; OSError as in `append`."""
        name, tokens = secrets.token_hex(8), (prompt_tokens, completion_tokens)
        with self._lock:
            self._spent[name] = tokens
            if self.path is not None:
                self._write((json.dumps({"spent": name, **dict(zip(FIELDS[1:], tokens))}) + "\n").encode())

    def _write(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as handle:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)  # given back by the system, even after a kill
            end = handle.seek(0, os.SEEK_END)
            if end > 0:
                handle.seek(end - 1)
                if handle.read(1) != b"\n":  # a torn line: do not glue this one to it
                    data = b"\n" + data
            rest = memoryview(data)
            while rest:
                rest = rest[handle.write(rest) :]
            os.fsync(handle.fileno())
            if end == self._offset:  # nobody else wrote: no need to read our own lines
                self._offset += len(data)
                self._lines += data.count(b"\n")

    def _read_new(self) -> None:
        size = self.path.stat().st_size
        if size < self._offset:  # cut or replaced: what is known stays known
            self._offset, self._lines = 0, 0
        if size == self._offset:
            return
        with self.path.open("rb") as handle:
            handle.seek(self._offset)
            for raw in handle:
                if not raw.endswith(b"\n"):  # torn, or still being written: looked at again the next time
                    break
                self._offset += len(raw)
                self._lines += 1
                if raw.strip():
                    self._take(raw)

    def _take(self, raw: bytes) -> None:
        try:
            record = json.loads(raw)
            if isinstance(record, dict) and "spent" in record:
                tokens = tuple(record[name] for name in FIELDS[1:3])
                if not all(isinstance(n, int) and n >= 0 for n in tokens):
                    raise ValueError("no counts")
                self._spent[str(record["spent"])] = tokens
                return
            reply = Reply(**{name: record[name] for name in FIELDS}, cached=True)
            if not isinstance(record["key"], str) or not reply.text.strip():
                raise ValueError("no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"line holds no answer ({type(error).__name__}: {str(error)[:80]}); its question is asked again"
            self.bad.append({"id": f"{self.path.name}:{self._lines}", "reason": reason})
        else:
            self._answers[record["key"]] = reply


def _line(key: str, reply: Reply, more: Mapping) -> bytes:
    record = {"key": key, **more, **{name: getattr(reply, name) for name in FIELDS}}
    return (json.dumps(record) + "\n").encode()  # ASCII: any text that came as JSON can be written
