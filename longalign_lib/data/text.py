"""Small facts about a text: its language, where its sentences end, its tokens.

English and Chinese only. A sentence end is found by punctuation and what follows it, so positions are characters of
the text itself, whatever the tokenizer. Cost: linear in the text.
"""

from __future__ import annotations

import re

_CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_WORDS = re.compile(r"[A-Za-z]+")
_END = re.compile(r"[。！？][”’』」）]*|[.!?][\"')\]”’]*(?=\s+[A-Z0-9\"'(\[“‘\u3400-\u9fff]|\s*$)")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|Fig|Eq|Sec|No|cf|al|e\.g|i\.e|[A-Z])|(?:^|\n)[ \t]*\d+)\.$"
)


def language_of(text: str) -> str:
    """ "zh" when Chinese characters outnumber Latin words, else "en"."""
    return "zh" if len(_CJK.findall(text)) > len(_WORDS.findall(text)) else "en"


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
