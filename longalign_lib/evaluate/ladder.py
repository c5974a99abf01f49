"""Answers whose order of quality is known because they were made that way: a reference, and copies of it made worse step by step.

    level 4   the reference itself
    level 3   a quarter of its sentences left out
    level 2   half of its sentences left out
    level 1   as level 2, and every number in it changed
    level 0   the reference of another question

Each level from 4 to 1 has every defect of the one above and one more, so the order needs nobody's opinion; level 0 holds nothing
that was asked for. What the ladder cannot test: style, helpfulness, a right answer in wholly other words. A judge that fails it
is no judge; one that passes may still be a poor one. Nothing here is a human rating.

Invariants: the same reference and seed give the same ladder; texts of one ladder differ. Cost: microseconds.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

from longalign_lib.data.text import language_of, sentence_ends

DEFECTS = {4: "none", 3: "a quarter left out", 2: "half left out", 1: "half left out, numbers changed", 0: "answers another question"}
LEVELS = tuple(DEFECTS)
_DIGITS = "〇一二三四五六七八九"
_NUMBER = re.compile(rf"\d+|[{_DIGITS}]+(?=[{_DIGITS}十百千万]|[年月日号个人次米厘公元分秒克吨块页本年度%％])")


@dataclass(frozen=True)
class Rung:
    """One answer of a ladder. ``level``: 4 is best. ``kept``: the reference's sentences that it keeps."""

    level: int
    text: str
    kept: tuple[int, ...]

    @property
    def defect(self) -> str:
        """What is wrong with it, in words."""
        return DEFECTS[self.level]


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the space between them."""
    ends = [0, *sentence_ends(text), len(text)]
    return [part for a, b in itertools.pairwise(ends) if (part := text[a:b].strip())]


def change_numbers(text: str, seed: int = 0) -> str:
    """Every number another one with as many digits; Chinese figures too. Texts without a number come back as they are."""
    rng = random.Random(f"numbers-{seed}")

    def other(found: re.Match) -> str:
        said = found[0]
        arabic = said.isdigit() and said.isascii()
        alphabet = "0123456789" if arabic else _DIGITS
        digits = [alphabet[(alphabet.index(c) + rng.randrange(1, 9)) % 10] if c in alphabet else c for c in said]
        if len(said) > 1 and digits[0] == alphabet[0]:  # no leading zero; and not the digit that stood there
            digits[0] = alphabet[1 + (alphabet.index(said[0]) % 9)]
        return "".join(digits)

    return _NUMBER.sub(other, text)


def rungs(reference: str, other: str, seed: int = 0) -> list[Rung]:
    """The ladder of one reference, best first.

    Args:
        reference: the best answer, at least three sentences. other: the reference of another question.

    Returns:
        Five rungs; four where the half that is kept holds no number to change (level 1 is then missing).

    Raises:
        ValueError: fewer than three sentences, or ``other`` is the same text.
    """
    parts = sentences(reference.strip())
    if len(parts) < 3:
        raise ValueError(f"a ladder needs a reference of at least 3 sentences, this one has {len(parts)}: {reference[:60]!r}")
    if other.strip() == reference.strip():
        raise ValueError("level 0 must be the reference of another question; both are the same text")
    n, rng = len(parts), random.Random(f"ladder-{seed}-{reference}")
    half = max(1, n // 2)
    quarter = max(half + 1, min(n - 1, round(0.75 * n)))
    order = rng.sample(range(n), n)
    numbered = next((i for i in order if _NUMBER.search(parts[i])), None)
    if numbered is not None:  # a sentence with a number stays longest, so that level 1 has something to change
        order = [numbered] + [i for i in order if i != numbered]

    def kept(count: int) -> tuple[int, ...]:
        return tuple(sorted(order[:count]))

    def text(which: tuple[int, ...]) -> str:
        return ("" if language_of(reference) == "zh" else " ").join(parts[i] for i in which)

    found = [Rung(4, reference.strip(), kept(n)), Rung(3, text(kept(quarter)), kept(quarter)), Rung(2, text(kept(half)), kept(half))]
    wrong = change_numbers(found[-1].text, seed)
    found += [Rung(1, wrong, kept(half))] if wrong != found[-1].text else []
    return [*found, Rung(0, other.strip(), ())]
