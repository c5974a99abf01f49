"""Word overlap with a reference: what can be scored without any model. Not a judge, and labelled so everywhere.

ROUGE-L F1 (longest common subsequence, Lin 2004, by the rouge_score package) and bag-of-words F1, both 0-100. English
is split into words, Chinese into characters: rouge_score's own tokenizer keeps ASCII only and would call every Chinese
answer empty. What overlap cannot see: a right answer in other words scores low, a wrong one in the reference's words
scores high.
Cost: rouge_score's table is len(answer) x len(reference) steps of Python.
"""

from __future__ import annotations

from collections import Counter

from rouge_score.rouge_scorer import RougeScorer

from longalign_lib.evaluate.needles import normalise


class _Words:
    """rouge_score's tokenizer interface over `needles.normalise`, which splits Chinese into characters."""

    def tokenize(self, text: str) -> list[str]:
        return normalise(text).split()


_SCORER = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 of an answer against a reference, 0-100."""
    return 100 * _SCORER.score(reference, answer)["rougeL"].fmeasure


def word_f1(answer: str, reference: str) -> float:
    """F1 of the two bags of words, 0-100; 0 when either is empty."""
    said, wanted = Counter(normalise(answer).split()), Counter(normalise(reference).split())
    shared = (said & wanted).total()
    return 200 * shared / (said.total() + wanted.total()) if shared else 0.0
