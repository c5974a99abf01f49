"""Small facts about a text: its language, what is invisible in it, where its sentences end, its tokens.

English and Chinese only. A sentence end is found by punctuation and what follows it, so positions are characters of
the text itself, whatever the tokenizer. Cost: linear in the text; tokens are counted at some 2-3 MB a second and core.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

import numpy as np

_CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_WORDS = re.compile(r"[A-Za-z]+")
_END = re.compile(r"[。！？][”’』」）]*|[.!?][\"')\]”’]*(?=\s+[A-Z0-9\"'(\[“‘\u3400-\u9fff]|\s*$)")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|Fig|Eq|Sec|No|cf|al|e\.g|i\.e|[A-Z])|(?:^|\n)[ \t]*\d+)\.$"
)
# Control characters, zero-width spaces and marks, writing-direction overrides, interlinear and tag characters.
_HIDDEN = (
    r"\x01-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    r"\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
)
# Joiners carry meaning in emoji and in some scripts, none between Latin letters or Chinese characters.
_JOINER = r"(?<=[\x00-\x7f\u3400-\u9fff])[\u200c\u200d]+(?=[\x00-\x7f\u3400-\u9fff])"
_INVISIBLE = re.compile(rf"[{_HIDDEN}]|{_JOINER}")
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_LOST = 0.005  # share of replacement characters from which a text counts as wrongly decoded


def language_of(text: str) -> str:
    """ "zh" when Chinese characters outnumber Latin words, else "en"."""
    return "zh" if len(_CJK.findall(text)) > len(_WORDS.findall(text)) else "en"


def clean(text: str) -> tuple[str, dict[str, int]]:
    """Take out what a reader cannot see and a tokenizer can; nothing visible is changed.

    Removed: control characters, zero-width spaces and byte order marks, soft hyphens, writing-direction overrides, tag
    characters, and joiners between Latin letters or Chinese characters. Line ends become `\\n`. A zero byte stays
    (`unusable` tells of it).

    Returns:
        (text, {"U+200B": times removed, ...}).
    """
    text = _LINE_ENDS.sub("\n", text)
    if not _INVISIBLE.search(text):
        return text, {}
    removed = Counter(f"U+{ord(c):04X}" for match in _INVISIBLE.finditer(text) for c in match[0])
    return _INVISIBLE.sub("", text), dict(sorted(removed.items()))


def unusable(text: str) -> str | None:
    """Why a text cannot become a document, or None: empty, binary, not valid Unicode, or decoded wrongly."""
    if not any(not c.isspace() and unicodedata.category(c) not in ("Cf", "Cc") for c in text):
        return "empty document" if not text.strip() else "empty document: it holds invisible characters alone" if "\x00" not in text else "binary (holds a zero byte)"
    if "\x00" in text:
        return "binary (holds a zero byte)"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"holds half a character (U+{ord(text[error.start]):04X}, a lone surrogate, at {error.start})"
        lost = text.count("\ufffd")
        if lost > _LOST * len(text):
            return f"{lost} replacement characters (U+FFFD) in {len(text)}: it was decoded wrongly where it comes from"
    return None


def sentence_ends(text: str) -> list[int]:
    """Character positions just behind each sentence (English or Chinese), ascending; the text's end is the last one.

    A full stop behind an abbreviation, an initial or a list number does not end a sentence.
    """
    ends = [m.end() for m in _END.finditer(text) if not _ABBREVIATION.search(text[max(0, m.end() - 12) : m.end()])]
    if not ends or ends[-1] != len(text):
        ends.append(len(text))
    return ends


def token_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a plain text, without special tokens and without the warning about long texts."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def token_counts(tokenizer, texts: Iterable[str], batch_chars: int = 1_000_000) -> np.ndarray:
    """Tokens of each text, special ones not counted, by the tokenizer's own threads.

    Args:
        tokenizer: any; one without a fast backend counts text by text.
        texts: taken lazily.
        batch_chars: characters encoded at a time, which bounds the memory (about 40 MB for a million).

    Returns:
        int64[number of texts].
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "encode_batch_fast"):
        return np.array([len(token_ids(tokenizer, text)) for text in texts], dtype=np.int64)
    token_ids(tokenizer, "")  # a plain call switches off whatever truncation and padding were left on
    counts: list[int] = []
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > batch_chars:
            counts += [len(e) for e in backend.encode_batch_fast(batch, add_special_tokens=False)]
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        counts += [len(e) for e in backend.encode_batch_fast(batch, add_special_tokens=False)]
    return np.array(counts, dtype=np.int64)
