"""Documents: where long text comes from, and how it is brought to a wanted length in tokens.

Four readers (the samples in data_samples, a folder of your own, the language reference and the standard library that
every Python carries) yield the same record, `Document`. Readers of files return `(documents, rejected)`: what could
not be used is listed as {"id", "reason"}, so `len(documents) + len(rejected)` accounts for everything seen.

Sampling follows the paper (section 3.1): articles are drawn with longer ones upsampled; here the chance of an article
grows with length ** power. Cutting and joining keep whole sentences. Cost: one tokenisation of a text for a cut.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from longalign_lib.data.jsonl import iter_jsonl
from longalign_lib.data.text import language_of, sentence_ends, token_ids

SAMPLES = Path(__file__).resolve().parents[2] / "data_samples" / "documents"

# The paper's nine source kinds: name -> (what it holds, main language).
SOURCES: dict[str, tuple[str, str]] = {
    "arxiv": ("scientific papers", "en"),
    "books": ("books (the paper: Books3, which may no longer be distributed; PG-19 is a lawful stand-in)", "en"),
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
READABLE = (".txt", ".md", ".py", ".jsonl")
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
        text, reason = _read_text(path)
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
    return _accept(documents, rejected)


def read_folder(path: str | Path, source: str = "local", language: str = "en") -> tuple[list[Document], list[dict]]:
    """Your own texts: every .txt, .md, .py and .jsonl file under a folder (a .jsonl line needs a "text" field).

    Args:
        path: the folder, read recursively in sorted order.
        source: what to call the source; one of the nine kinds when it is one.
        language: "en", "zh", or "auto" (by the share of Chinese characters).

    Returns:
        (documents, rejected: list of {"id", "reason"}); files of other kinds are listed as rejected.

    Raises:
        FileNotFoundError: no such folder. ValueError: an unknown language.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a folder that holds {', '.join(READABLE)} files")
    if language not in ("en", "zh", "auto"):
        raise ValueError(f"language {language!r} is unknown; accepted: en, zh, auto")
    documents, rejected = [], []

    def keep(name: str, text: str, title: str = "", licence: str = "") -> None:
        lang = language_of(text) if language == "auto" else language
        documents.append(Document(name, text, source, lang, title, licence))

    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.suffix not in READABLE:
            rejected.append({"id": name, "reason": f"suffix {file.suffix!r} is not read; accepted: {READABLE}"})
        elif file.suffix == ".jsonl":
            for row, record in enumerate(iter_jsonl(file, rejected)):
                text = record.get("text")
                if not isinstance(text, str):
                    rejected.append({"id": f"{name}#{row}", "reason": 'record has no "text" string'})
                    continue
                title, licence = str(record.get("title", "")), str(record.get("licence", ""))
                keep(str(record.get("id", f"{name}#{row}")), text, title, licence)
        else:
            text, reason = _read_text(file)
            if reason is not None:
                rejected.append({"id": name, "reason": reason})
            else:
                keep(name, text, file.stem)
    return _accept(documents, rejected)


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


def _read_text(path: Path) -> tuple[str, str | None]:
    raw = path.read_bytes()
    if b"\x00" in raw:
        return "", "binary file (holds a zero byte); convert it to UTF-8 text"
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n"), None
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


def _accept(documents: list[Document], rejected: list[dict]) -> tuple[list[Document], list[dict]]:
    """Strip texts; move empty ones and repeated ids to `rejected`."""
    kept, seen = [], set()
    for document in documents:
        text = document.text.strip().strip("\ufeff\u200b")
        if not text:
            rejected.append({"id": document.id, "reason": "empty document"})
        elif document.id in seen:
            rejected.append({"id": document.id, "reason": "duplicate id; ids must be unique"})
        else:
            seen.add(document.id)
            kept.append(replace(document, text=text))
    return kept, rejected


# -------------------------------------------------------------------------------------------------- lengths in tokens
def token_lengths(documents: Sequence[Document], tokenizer) -> np.ndarray:
    """Length of each document in tokens (no special tokens). Returns int64[len(documents)]."""
    return np.array([len(token_ids(tokenizer, d.text)) for d in documents], dtype=np.int64)


def sample_documents(
    documents: Sequence[Document],
    lengths: Sequence[int] | np.ndarray,
    n: int,
    seed: int,
    *,
    power: float = 1.0,
    max_tokens: int | None = None,
) -> list[Document]:
    """Draw n different documents, long ones upsampled: the chance of each draw grows with length ** power.

    Args:
        documents: to draw from.
        lengths: tokens of each.
        n: how many.
        seed: of this draw's own generator; the same seed gives the same documents in the same order.
        power: 0 draws every document alike, 1 in proportion to its length.
        max_tokens: leave longer documents out (the paper keeps articles under 64k tokens).

    Raises:
        ValueError: lengths that do not match, or more documents wanted than there are.
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    if len(lengths) != len(documents):
        raise ValueError(f"{len(documents)} documents but {len(lengths)} lengths; give one length for each document")
    usable = np.flatnonzero((lengths > 0) & (lengths <= (max_tokens or np.inf)))
    if n > len(usable):
        raise ValueError(f"{n} documents wanted, {len(usable)} usable; ask for at most {len(usable)} or add documents")
    if n == 0:
        return []
    weights = lengths[usable] ** power
    chosen = np.random.default_rng(seed).choice(usable, size=n, replace=False, p=weights / weights.sum())
    return [documents[i] for i in chosen]


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
