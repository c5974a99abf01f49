"""How far to trust a score: intervals for proportions, paired tests, rank correlations, standard errors.

Small samples are the rule here (one prompt a cell, 50 chat questions), so everything is exact or resampled: Wilson
intervals instead of p +- 2 se, the exact sign test (McNemar's for hits) instead of chi squared, bootstrap intervals for
correlations. Missing scores are counted and reported. Cost: milliseconds; a bootstrap of 2,000 about a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927).

    Returns:
        (low, high), both in [0, 1]; (0, 1) for n = 0: no trial says nothing.

    Raises:
        ValueError: hits outside 0..n, or a confidence outside (0, 1).
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n}: hits must lie between 0 and n")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    if n == 0:
        return 0.0, 1.0
    z, p = stats.norm.ppf(0.5 + confidence / 2), hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == n else middle + half)


def paired_test(before: Sequence[float], after: Sequence[float]) -> dict:
    """Exact two-sided sign test on pairs; with hits (0 or 1) it is McNemar's exact test.

    Only pairs that differ speak: with ``better`` + ``worse`` = m of them, p = P(a fair coin splits m so unevenly).

    Returns:
        {"n" pairs compared, "better", "worse", "same", "missing" pairs with a NaN, "p"}; p = 1 when none differ.
    """
    x, y = np.asarray(before, float), np.asarray(after, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"pairs need two rows of one length, got shapes {x.shape} and {y.shape}")
    there = ~(np.isnan(x) | np.isnan(y))
    up, down = int((y > x)[there].sum()), int((y < x)[there].sum())
    p = float(stats.binomtest(up, up + down, 0.5).pvalue) if up + down else 1.0
    n = int(there.sum())
    return {"n": n, "better": up, "worse": down, "same": n - up - down, "missing": len(x) - n, "p": p}


KINDS = {"spearman": stats.spearmanr, "kendall": stats.kendalltau}


def rank_correlation(
    x: Sequence[float], y: Sequence[float], kind: str = "spearman", groups: Sequence | None = None,
    resamples: int = 1000, confidence: float = 0.95, seed: int = 0,
) -> dict:  # fmt: skip
    """Spearman's rho or Kendall's tau-b with a percentile bootstrap interval.

    Args:
        x, y: paired scores; pairs with a NaN are counted as missing.
        groups: a label a pair. Whole groups are resampled, for pairs that belong together (answers to one question).

    Returns:
        {"value", "low", "high", "n", "missing", "undefined"}. The value is NaN when either side is constant: no order,
        no correlation. ``undefined``: share of resamples for which that held; they are outside the interval.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown correlation {kind!r}; choose one of {', '.join(KINDS)}")
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"pairs need two rows of one length, got shapes {x.shape} and {y.shape}")
    there = ~(np.isnan(x) | np.isnan(y))
    label = np.arange(len(x)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    x, y, label, missing = x[there], y[there], label[there], int((~there).sum())

    def value(i: np.ndarray) -> float:
        if len(i) < 2 or np.ptp(x[i]) == 0 or np.ptp(y[i]) == 0:
            return math.nan
        return float(KINDS[kind](x[i], y[i])[0])

    members = [np.flatnonzero(label == g) for g in np.unique(label)]
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(resamples if members else 0):
        drawn.append(value(np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])))
    kept = np.array([v for v in drawn if not math.isnan(v)])
    tails = (50 - 50 * confidence, 50 + 50 * confidence)
    low, high = np.percentile(kept, tails) if len(kept) else (math.nan, math.nan)
    return {
        "value": value(np.arange(len(x))), "low": float(low), "high": float(high), "n": len(x), "missing": missing,
        "undefined": 1 - len(kept) / len(drawn) if drawn else 1.0,
    }  # fmt: skip


def mean_and_error(scores: Sequence[float]) -> dict:
    """Mean, standard deviation (n - 1) and standard error of the scores that are there, with both counts."""
    values = np.asarray(scores, float)
    kept = values[~np.isnan(values)]
    sd = float(kept.std(ddof=1)) if len(kept) > 1 else math.nan
    mean = float(kept.mean()) if len(kept) else math.nan
    return {
        "mean": mean,
        "sd": sd,
        "se": sd / math.sqrt(max(1, len(kept))),
        "n": len(kept),
        "missing": len(values) - len(kept),
    }


def error_of_difference(sd: float, n: int, correlation: float = 0.0) -> float:
    """Standard error of the difference of two mean scores over the same n items, given the spread of a score.

    ``correlation`` is that of the two models' scores over items: 0 is the unpaired case, more is better.
    """
    if n < 1 or sd < 0 or not -1 <= correlation <= 1:
        raise ValueError(f"need n >= 1, sd >= 0 and a correlation in [-1, 1]; got {n}, {sd}, {correlation}")
    return sd * math.sqrt(2 * (1 - correlation) / n)
