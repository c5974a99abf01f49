"""Word overlap with a reference: what can be scored without any model. Not a judge, and labelled so everywhere.

ROUGE-L F1 (longest common subsequence, Lin 2004, by the rouge_score package) and bag-of-words F1, both 0-100. English
is split into words, Chinese into characters: rouge_score's own tokenizer keeps ASCII only and would call every Chinese
answer empty. What overlap cannot see: a right answer in other words scores low, a wrong one in the reference's words
scores high.

`rate` and `rate_all` make the records that `judge.rate` makes, with the overlap laid on the rubric's scale, so that all
that follows a judge (coverage, tables, figures) runs without any key. The number is a share of common words on a borrowed
scale: 5 of 10 means an overlap of 44 in 100, and nothing about quality.
Cost: rouge_score's table is len(answer) x len(reference) steps of Python: 4 ms for two texts of 200 words.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import pandas as pd
from rouge_score.rouge_scorer import RougeScorer

from longalign_lib.evaluate.judge import RATED, rubric_of
from longalign_lib.evaluate.needles import normalise

LABEL = "lexical: ROUGE-L (word overlap, no judge)"


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


METRICS = {"rouge_l": rouge_l, "word_f1": word_f1}


def on_scale(percent: float, rubric: str = "chat") -> float:
    """An overlap of 0-100 laid on a rubric's scale: 0 is its lowest mark, 100 its highest."""
    scale = rubric_of(rubric)
    return scale.low + (scale.high - scale.low) * percent / 100


def rate(reference: str, answer: str, rubric: str = "chat", metric: str = "rouge_l") -> dict:
    """One answer scored against its reference: the record of a judge's round, always with the status rated.

    Args:
        rubric: the scale to lay the overlap on (`judge.RUBRICS`). metric: "rouge_l" or "word_f1".

    Returns:
        {"round": 0, "status", "score" (on the rubric's scale), "reason": "", "reply" (what was measured), "percent" (0-100),
        "judge": `LABEL`, "prompt_hash", "cost": 0}.

    Raises:
        ValueError: an unknown metric or rubric, an empty reference (nothing to overlap with).
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    if not reference.strip():
        raise ValueError("the reference is empty: word overlap needs one; give a reference, or ask a judge")
    percent = METRICS[metric](answer, reference)
    score = on_scale(percent, rubric)
    digest = hashlib.sha256(json.dumps([metric, rubric, reference, answer], ensure_ascii=False).encode()).hexdigest()[:16]
    return {"round": 0, "status": RATED, "score": score, "reason": "", "reply": f"{LABEL}; {metric} {percent:.1f} of 100",
            "percent": percent, "judge": LABEL, "prompt_hash": digest, "cost": 0.0}  # fmt: skip


def rate_all(rows: Sequence[Mapping], rubric: str = "chat", metric: str = "rouge_l") -> pd.DataFrame:
    """Score many answers: `judge.rate_all` without a judge, one round an answer.

    Args:
        rows: {"id", "question", "reference", "answer", "examples"} each; question and examples are not used, other keys
            are carried along.

    Returns:
        A row an answer: the row's other keys and what `rate` says; `judge.summarise` reads it.
    """
    left_out = ("question", "reference", "examples")
    return pd.DataFrame([{k: v for k, v in row.items() if k not in left_out} | rate(row["reference"], row["answer"], rubric, metric)
                         for row in rows])  # fmt: skip
