import itertools
import math

import numpy as np
import pytest
from scipy import stats

from longalign_lib.evaluate import stats as S


def test_wilson_is_scipys():
    for n, confidence in itertools.product((1, 2, 9, 100), (0.8, 0.95)):
        for hits in range(0, n + 1, max(1, n // 9)):
            ours = S.wilson(hits, n, confidence)
            theirs = stats.binomtest(hits, n).proportion_ci(confidence, "wilson")
            assert ours == pytest.approx(tuple(theirs), abs=1e-12)
            assert 0 <= ours[0] <= hits / n <= ours[1] <= 1
    assert S.wilson(0, 0) == (0, 1)


def test_the_papers_needle_intervals_overlap():
    assert [round(100 * v) for v in S.wilson(92, 100)] == [85, 96]
    assert [round(100 * v) for v in S.wilson(98, 100)] == [93, 99]


@pytest.mark.parametrize(
    ("hits", "n", "c", "word"), [(3, 2, 0.95, "3 hits of 2"), (-1, 2, 0.95, "-1"), (1, 2, 1, "confidence")]
)
def test_wilson_refuses(hits, n, c, word):
    with pytest.raises(ValueError, match=word):
        S.wilson(hits, n, c)


def test_paired_test_by_enumeration():
    before = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 0, np.nan])
    after = np.array([1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1])
    got = S.paired_test(before, after)
    assert (got["better"], got["worse"], got["same"], got["missing"], got["n"]) == (6, 1, 3, 1, 10)
    # every way seven fair coins can fall, and those at least as uneven as six to one
    falls = [sum(c) for c in itertools.product((0, 1), repeat=7)]
    assert got["p"] == pytest.approx(sum(abs(f - 3.5) >= 2.5 for f in falls) / len(falls))
    assert S.paired_test(after, before)["p"] == pytest.approx(got["p"])
    assert S.paired_test([1, 1], [1, 1])["p"] == 1
    with pytest.raises(ValueError, match=r"one length"):
        S.paired_test([1], [1, 0])


@pytest.mark.parametrize("kind", ["spearman", "kendall"])
def test_correlation_value_and_coverage(kind):
    rng = np.random.default_rng(0)
    x = np.arange(40.0)
    assert S.rank_correlation(x, x**3, kind, resamples=50) | {} == S.rank_correlation(x, x**3, kind, resamples=50)
    perfect = S.rank_correlation(x, -(x**3), kind, resamples=50)
    assert perfect["value"] == pytest.approx(-1) and perfect["high"] == pytest.approx(-1)
    y = x + rng.normal(0, 15, 40)
    got = S.rank_correlation(x, y, kind, resamples=300)
    concordant = np.mean([np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in itertools.combinations(range(40), 2)])
    if kind == "kendall":
        assert got["value"] == pytest.approx(concordant)
    assert -1 <= got["low"] < got["value"] < got["high"] <= 1 and got["undefined"] == 0


def test_correlation_with_constant_or_missing_scores():
    flat = S.rank_correlation([1, 2, 3, np.nan], [5, 5, 5, 5], resamples=20)
    assert math.isnan(flat["value"]) and math.isnan(flat["low"]) and flat["undefined"] == 1
    assert (flat["n"], flat["missing"]) == (3, 1)
    some = S.rank_correlation([1, 2, 3, 4], [5, 5, 5, 6], resamples=200)
    assert 0 < some["undefined"] < 1 and some["value"] > 0
    nothing = S.rank_correlation([], [])
    assert nothing["n"] == 0 and math.isnan(nothing["value"])


def test_groups_are_resampled_whole():
    x, y = [1, 2, 3, 1, 2, 3], [1, 2, 3, 3, 2, 1]  # two questions that disagree: the mean says nothing
    got = S.rank_correlation(x, y, groups=["a"] * 3 + ["b"] * 3, resamples=200)
    assert got["value"] == pytest.approx(0) and (got["low"], got["high"]) == pytest.approx((-1, 1))


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"pearson.*spearman, kendall"):
        S.rank_correlation([1], [1], "pearson")


def test_errors():
    got = S.mean_and_error([1, 3, 5, None])
    assert (got["mean"], got["sd"], got["n"], got["missing"]) == (3, 2, 3, 1) and got["se"] == pytest.approx(2 / 3**0.5)
    assert math.isnan(S.mean_and_error([])["mean"]) and math.isnan(S.mean_and_error([4])["se"])
    assert S.error_of_difference(2.5, 50) == pytest.approx(0.5)
    assert S.error_of_difference(2.5, 50, 1) == 0
    rng = np.random.default_rng(1)
    pairs = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=(4000, 20))
    assert (pairs[..., 0] - pairs[..., 1]).mean(1).std() == pytest.approx(S.error_of_difference(1, 20, 0.6), rel=0.05)
    with pytest.raises(ValueError, match=r"n >= 1"):
        S.error_of_difference(1, 0)
