"""Documents: the record that long text travels in, the texts that are always at hand, and bringing one to a wanted length.

Three readers need no network: the samples in data_samples, the language reference and the standard library that every
Python carries. Folders of your own are read by `folders`, the nine sources of the paper by `sources`; `sampling` draws,
`dedup` removes near-duplicates, `build` does all of it. Readers of files return `(documents, rejected)`: what could not
be used is listed as {"id", "reason"}, so `len(documents) + len(rejected)` accounts for everything seen. Invisible
characters are taken out of every text (`text.clean`). Cutting and joining keep whole sentences.
Cost: one tokenisation of a text for a cut.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from longalign_lib.data.text import clean, sentence_ends, token_counts, token_ids, unusable

SAMPLES = Path(__file__).resolve().parents[2] / "data_samples" / "documents"

# The paper's nine source kinds: name -> (what it holds, main language).
SOURCES: dict[str, tuple[str, str]] = {
    "arxiv": ("scientific papers", "en"),
    "books": ("books (the paper: Books3, which may no longer be distributed; PG-19 stands in)", "en"),
    "c4": ("cleaned web pages", "en"),
    "clue": ("CLUECorpus2020, Chinese web text", "zh"),
    "commoncrawl": ("web pages", "en"),
    "github": ("source code", "en"),
    "stackexchange": ("questions and answers", "en"),
    "wikipedia": ("encyclopedia articles", "en"),
    "wudao": ("WuDaoCorpora, Chinese web text", "zh"),
}
# Sources of our own, for text that belongs to none of the nine.
LOCAL_SOURCES = ("local", "python-topics", "python-source", "mixed")
MAX_BYTES = 16 * 2**20  # of one document: about 4 million tokens; a longer file or line is a mistake more often than a text
STDLIB_MODULES = (
    "argparse", "asyncio.base_events", "collections", "configparser", "csv", "dataclasses", "datetime", "decimal",
    "difflib", "doctest", "email.message", "enum", "fractions", "functools", "heapq", "http.client", "inspect",
    "ipaddress", "json.decoder", "logging", "mailbox", "optparse", "pathlib", "pdb", "pickletools", "platform",
    "random", "shutil", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "turtle", "typing", "unittest.case", "urllib.request", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A text with its origin. `source` is a key of SOURCES or one of LOCAL_SOURCES; `language` is "en" or "zh"."""

    id: str
    text: str
    source: str
    language: str
    title: str = ""
    licence: str = ""


# ---------------------------------------------------------------------------------------------------------- readers
def read_samples(folder: str | Path | None = None) -> tuple[list[Document], list[dict]]:
    """The texts written for this project: .txt and .md files with a front matter of `key: value` lines.

    Args:
        folder: where they are; None means data_samples/documents of this repository.

    Returns:
        (documents sorted by file name, rejected: list of {"id", "reason"}).

    Raises:
        FileNotFoundError: the folder is not there.
    """
    folder = Path(folder) if folder is not None else SAMPLES
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder. The samples come with the repository (data_samples/documents); "
            "pass folder=... when the library is used without it."
        )
    documents, rejected = [], []
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".txt", ".md") and p.stem != "README"):
        text, reason = read_text(path)
        fields, body, reason = _front_matter(text) if reason is None else ({}, "", reason)
        if reason is None:
            missing = [key for key in ("id", "source", "language") if not fields.get(key)]
            if missing:
                reason = f"front matter lacks {', '.join(missing)}; write `{missing[0]}: ...` between the --- lines"
            elif fields["source"] not in SOURCES:
                reason = f"unknown source {fields['source']!r}; accepted: {', '.join(SOURCES)}"
        if reason is not None:
            rejected.append({"id": path.name, "reason": reason})
            continue
        known = {key: fields.get(key, "") for key in ("id", "title", "source", "language", "licence")}
        documents.append(Document(text=body, **known))
    return accept(documents, rejected), rejected


def python_topics() -> list[Document]:
    """The language reference that every Python carries in `pydoc_data.topics`: long English prose, one text a topic."""
    from pydoc_data.topics import topics

    licence = "PSF-2.0 (part of Python)"
    texts = sorted((name, text.strip()) for name, text in topics.items())
    return [Document(f"topic:{n}", t, "python-topics", "en", n, licence) for n, t in texts if t]


def python_source(modules: Sequence[str] | None = None) -> list[Document]:
    """Source of standard-library modules, found without running them (a submodule's package is imported).

    Args:
        modules: dotted names; None means a fixed list of larger ones (STDLIB_MODULES).

    Raises:
        ValueError: a module that does not exist or has no Python source.
    """
    documents = []
    for name in modules if modules is not None else STDLIB_MODULES:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            raise ValueError(f"module {name!r} has no Python source here; name a pure-Python module such as 'argparse'")
        text = Path(spec.origin).read_text(encoding="utf-8").strip()
        if text:
            documents.append(Document(f"module:{name}", text, "python-source", "en", name, "PSF-2.0 (part of Python)"))
    return documents


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> tuple[str, str | None]:
    """A file's text, or why it cannot be used: (text, None) or ("", reason). At most max_bytes are read."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            return "", f"{size:,} bytes, the limit for one document is {max_bytes:,}; split it or raise max_bytes"
        raw = path.read_bytes()
    except OSError as error:
        return "", f"cannot be read ({error.strerror or type(error).__name__})"
    if b"\x00" in raw:
        return "", "binary file (holds a zero byte); convert it to UTF-8 text"
    try:
        return raw.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"


def _front_matter(text: str) -> tuple[dict[str, str], str, str | None]:
    match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, flags=re.DOTALL)
    if match is None:
        return {}, "", "no front matter; begin the file with --- lines around id, title, source, language, licence"
    fields = {}
    for line in match[1].splitlines():
        key, colon, value = line.partition(":")
        if line.strip() and not line.lstrip().startswith("#") and colon:
            fields[key.strip()] = value.strip().strip("\"'")
    return fields, text[match.end() :], None


def accept(
    documents: Iterable[Document], rejected: list[dict], cleaned: list[dict] | None = None
) -> list[Document]:
    """The documents that can be used, stripped and without invisible characters; the others go to `rejected`.

    Args:
        documents: any; taken one by one.
        rejected: gets {"id", "reason"} for empty, unusable (`text.unusable`) and repeated ones.
        cleaned: gets {"id", "removed": {"U+200B": count}} for each text that invisible characters were taken from.
    """
    return list(accepting(documents, rejected, cleaned))


def accepting(
    documents: Iterable[Document], rejected: list[dict], cleaned: list[dict] | None = None, unique: bool = True
) -> Iterator[Document]:
    """`accept`, one by one; without `unique` the ids seen are not remembered (for endless streams)."""
    seen: set[str] = set()
    for document in documents:
        text, removed = clean(document.text)
        text = text.strip()
        reason = unusable(text)
        if reason is None and unique and document.id in seen:
            reason = "duplicate id; ids must be unique"
        if reason is not None:
            rejected.append({"id": document.id, "reason": reason})
            continue
        if unique:
            seen.add(document.id)
        if removed and cleaned is not None:
            cleaned.append({"id": document.id, "removed": removed})
        yield document if text == document.text else replace(document, text=text)


# -------------------------------------------------------------------------------------------------- lengths in tokens
def token_lengths(documents: Sequence[Document], tokenizer) -> np.ndarray:
    """Length of each document in tokens (no special tokens). Returns int64[len(documents)]."""
    return token_counts(tokenizer, [d.text for d in documents])


def cut_to_tokens(document: Document, tokenizer, max_tokens: int) -> Document:
    """The document's beginning, at most max_tokens tokens long, ended at a sentence where one ends in its last quarter.

    Raises:
        ValueError: max_tokens below 1, or too few for even the first character.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; give at least 1")
    text = document.text
    ids = token_ids(tokenizer, text)
    while len(ids) > max_tokens:
        room = len(tokenizer.decode(ids[:max_tokens], clean_up_tokenization_spaces=False))
        room = min(room, len(text) - 1)
        ends = [end for end in sentence_ends(text[:room]) if 0.75 * room <= end < room]
        text = text[: ends[-1] if ends else room].rstrip()
        if not text:
            raise ValueError(f"{document.id}: {max_tokens} tokens do not hold its first character; allow more")
        ids = token_ids(tokenizer, text)
    return document if text == document.text else replace(document, text=text)


def join(documents: Sequence[Document], id: str | None = None, separator: str = "\n\n\n") -> Document:
    """One long document from several, in the given order; each begins with its title when it has one.

    Source, language and licence are kept where all agree, else "mixed".
    """
    if not documents:
        raise ValueError("nothing to join; give at least one document")

    def common(field: str) -> str:
        values = {getattr(d, field) for d in documents}
        return values.pop() if len(values) == 1 else "mixed"

    texts = [f"{d.title}\n\n{d.text}" if d.title and not d.text.startswith(d.title) else d.text for d in documents]
    name = id if id is not None else "+".join(d.id for d in documents)
    title = documents[0].title if len(documents) == 1 else ""
    return Document(name, separator.join(texts), common("source"), common("language"), title, common("licence"))
