"""Tables of a needle grid: cells and areas with intervals, two models compared prompt by prompt, a judge beside recall.

A hit is a prompt whose answer holds every part and nothing of a distractor. Shares of hits have Wilson intervals; the mean
recall (share of parts) stands beside them. Failed prompts are counted, never scored. Two models are compared on prompts that
both answered, by McNemar's exact test on hits and the sign test on recall. A model has one answer a prompt: answers of several
settings are refused, never pooled. Cost: milliseconds; the judge's calls.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from longalign_lib.evaluate.stats import paired_test, wilson
from longalign_lib.llm import ChatError


def tally(rows: pd.DataFrame, confidence: float = 0.95) -> dict:
    """{"n" answered, "failed", "hits", "share", "low", "high", "recall"} of some rows; share and recall NaN for n = 0.

    Raises:
        ValueError: one prompt of a model under several keys (other settings or weights).
    """
    check_keys(rows)
    there = rows[rows.score.notna()]
    n, hits = len(there), int(there.hit.astype(bool).sum())
    low, high = wilson(hits, n, confidence)
    mean = float(there.score.astype(float).mean()) if n else float("nan")
    return {"n": n, "failed": len(rows) - n, "hits": hits, "share": hits / n if n else float("nan"), "low": low, "high": high,
            "recall": mean}  # fmt: skip


def check_keys(rows: pd.DataFrame) -> None:
    """Raises ValueError when a model has one prompt under several keys: answers of other settings or weights, not more of the same."""
    place = ["model", "message_hash", "repeat"]
    if not {*place, "key"} <= set(rows):
        return
    keys = rows.groupby(place, sort=False).key.nunique()
    if (keys > 1).any():
        name = keys[keys > 1].index[0][0]
        raise ValueError(f"model {name!r} has one prompt under several keys: answers of other settings (max_new_tokens, template) or "
                         "weights; keep the rows of one, or give each a name of its own")  # fmt: skip


def cells(frame: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """A row a model, length and depth: what `plots.needle.needle_grids` draws.

    Args:
        frame: of `needle.run_grid`, or several of them concatenated.

    Returns:
        model, length, depth, and the columns of `tally`.
    """
    by = ["model", "length", "depth"]
    return pd.DataFrame([dict(zip(by, at, strict=True)) | tally(rows, confidence) for at, rows in frame.groupby(by, sort=False)])


def areas(frame: pd.DataFrame, window: int | None = None, confidence: float = 0.95) -> pd.DataFrame:
    """Every model overall, inside and beyond the training window (prompt tokens against ``window``), by length, by depth.

    Returns:
        model, area ("all", "inside window", "beyond window", "length", "depth"), value, and the columns of `tally`.
    """
    found = []
    for model, mine in frame.groupby("model", sort=False):
        parts = [("all", "", mine)]
        if window is not None:
            parts += [("inside window", f"<= {window:,}", mine[mine.tokens <= window]), ("beyond window", f"> {window:,}", mine[mine.tokens > window])]
        parts += [("length", f"{v:,}", rows) for v, rows in mine.groupby("length")]
        parts += [("depth", f"{v:g}", rows) for v, rows in mine.groupby("depth")]
        found += [{"model": model, "area": area, "value": value} | tally(rows, confidence) for area, value, rows in parts if len(rows)]
    return pd.DataFrame(found)


def compare(frame: pd.DataFrame, before: str, after: str) -> dict:
    """Two models on the same prompts.

    Args:
        frame: rows of both. before, after: their names.

    Returns:
        "hits": `stats.paired_test` of hits (McNemar, exact), "recall": of recall (sign test), "pairs": a frame with
        length, depth, repeat and the scores of both; "alone": prompts that only one of them was asked.

    Raises:
        ValueError: an unknown model, no prompt in common, or one prompt of a model under several keys.
    """
    check_keys(frame[frame.model.isin([before, after])])
    names = list(dict.fromkeys(frame.model))
    for name in (before, after):
        if name not in names:
            raise ValueError(f"no rows of model {name!r}; there are {', '.join(map(repr, names))}")
    on = ["message_hash", "repeat"]
    keep = [*on, "length", "depth", "score", "hit"]
    sides = [frame.loc[frame.model == name, keep].drop_duplicates(on) for name in (before, after)]
    pairs = sides[0].merge(sides[1].drop(columns=["length", "depth"]), on=on, suffixes=("_before", "_after"))
    if pairs.empty:
        raise ValueError(f"{before!r} and {after!r} were asked no prompt in common: use one grid, seed and tokenizer for both")

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if pd.isna(v) else float(v) for v in pairs[name]])

    return {
        "hits": paired_test(column("hit_before"), column("hit_after")),
        "recall": paired_test(column("score_before"), column("score_after")),
        "alone": sum(map(len, sides)) - 2 * len(pairs), "pairs": pairs.drop(columns="message_hash"),
    }  # fmt: skip


def judged(frame: pd.DataFrame, judge: Callable[[str, str, str], float | None], progress: bool = True) -> pd.DataFrame:
    """A copy with ``judge`` (a rating from 1 to 10, NaN if none) and ``judge_status`` ("rated", "unparsed", "failed: reason").

    Args:
        judge: gets question, reference (the hidden sentences that answer) and answer; returns a rating, or None when it
            gave none. A ChatError marks the row and leaves the others.

    Raises:
        ValueError: a rating off the scale.
    """
    ratings, states = [], []
    for row in tqdm(frame.to_dict("records"), desc="judge", disable=not progress, leave=False):
        rating, state = None, "not asked: no answer"
        if row["status"] == "ok":
            try:
                rating = judge(row["question"], reference_of(row), row["answer"])
                state = "unparsed" if rating is None else "rated"
            except ChatError as error:
                state = f"failed: {str(error)[:200]}"
        if rating is not None and not 1 <= rating <= 10:
            raise ValueError(f"the judge gave {rating!r}; a rating must lie between 1 and 10, or be None")
        ratings.append(float("nan") if rating is None else float(rating))
        states.append(state)
    return frame.assign(judge=ratings, judge_status=states)


def reference_of(row: dict) -> str:
    """The hidden sentences that hold no distractor's words."""
    texts = [row["needle"], *row["others"]]
    return " ".join(t for t in texts if not any(w in t for w in row["wrong_parts"]))
