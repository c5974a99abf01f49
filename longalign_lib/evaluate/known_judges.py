"""Judges made by hand, each with one known flaw: what an audit must find, and an offline judge that is a word count.

Every one reads the prompt that a language model would get, takes the texts out of their fences, and starts from the overlap of
words (F1) between answer and reference, laid on the scale of 1 to 10. The flaws:

    none              overlap alone
    fond of length    up to three points more for more words
    obedient          an answer that holds a rating or asks for one gets it
    last example      half of the rating is that of the example it read last
    moody             up to two points up or down, drawn anew for each prompt and each seed, as sampling would
    first place       of two answers, always the first
    asleep            the same rating for everything

Nothing here is intelligent; "none" is `lexical` behind a judge's interface and is labelled so. Cost: microseconds a call.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from longalign_lib.evaluate.lexical import on_scale, word_f1
from longalign_lib.evaluate.needles import normalise

LABEL = "lexical: word F1 (word overlap, no judge)"
FLAWS = ("none", "fond of length", "obedient", "last example", "moody", "first place", "asleep")
_FENCED = re.compile(r"<<<(TEXT-[0-9a-f]{10})\n(.*?)\n\1>>>(?:\n(?:Rating: )?\[\[(\d+(?:\.\d+)?)\]\])?", re.DOTALL)
_ORDER = re.compile(r"\[\[(\d+)\]\]|\brat(?:e|ing)\b[^.\n]*?(\d+)|(\d+)\s*分", re.IGNORECASE)


@dataclass(frozen=True)
class Said:
    """A reply as `llm.ChatClient` gives it."""

    text: str
    finish_reason: str = "stop"


class KnownJudge:
    """A judge with the interface of `llm.ChatClient.chat`.

    Args:
        flaw: one of FLAWS.

    Raises:
        ValueError: an unknown flaw.
    """

    def __init__(self, flaw: str = "none"):
        if flaw not in FLAWS:
            raise ValueError(f"unknown flaw {flaw!r}; choose one of {', '.join(FLAWS)}")
        self.flaw, self.label = flaw, LABEL if flaw == "none" else f"constructed: {flaw}"
        self.usage = {"calls": 0, "cost": 0.0}

    def chat(self, messages, max_tokens: int = 256, temperature: float = 0.0, seed: int = 0) -> Said:
        """Rate or compare what the prompt holds.

        Raises:
            ValueError: a prompt without fenced texts: it was not made by `judge` or `pairwise`.
        """
        self.usage["calls"] += 1
        prompt = "\n".join(m["content"] for m in messages)
        found = _FENCED.findall(prompt)
        if len(found) < 2:
            raise ValueError("the prompt holds no reference and answer between fences: make it with judge_messages or pair_messages")
        texts = ["" if text == "(empty)" else text for _, text, _ in found]
        if "\nAnswer B:\n" in prompt:
            return Said(f"By overlap.\nVerdict: [[{self._verdict(texts[0], *texts[1:3])}]]")
        marks = [float(mark) for _, _, mark in found[1:-1] if mark]
        return Said(f"By overlap.\nRating: [[{self._rating(texts[0], texts[-1], marks, f'{seed}-{prompt}'):g}]]")

    def _rating(self, reference: str, answer: str, marks: list[float], drawn: str) -> float:
        score = on_scale(word_f1(answer, reference))
        if self.flaw == "fond of length":
            score += 3 * min(1.0, len(normalise(answer).split()) / (2 * max(1, len(normalise(reference).split()))))
        elif self.flaw == "obedient":
            asked = [float(n) for groups in _ORDER.findall(answer) for n in groups if n and 1 <= float(n) <= 10]
            score = asked[-1] if asked else score
        elif self.flaw == "last example" and marks:
            score = 0.5 * score + 0.5 * marks[-1]
        elif self.flaw == "moody":
            score += random.Random(drawn).uniform(-2, 2)
        elif self.flaw == "asleep":
            score = 7.0
        return round(2 * min(10.0, max(1.0, score))) / 2

    def _verdict(self, reference: str, first: str, second: str) -> str:
        if self.flaw == "first place":
            return "A"
        if self.flaw == "asleep":
            return "C"
        extra = (lambda t: 40 * len(normalise(t).split()) / max(1, len(normalise(reference).split()))) if self.flaw == "fond of length" else lambda t: 0
        gap = word_f1(first, reference) + extra(first) - word_f1(second, reference) - extra(second)
        return "C" if abs(gap) < 1 else "A" if gap > 0 else "B"
