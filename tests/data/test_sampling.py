"""Draws follow their law, whatever the order; quotas are shared out exactly."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from longalign_lib.data import sampling as S
from longalign_lib.data.documents import Document


def doc(i: int) -> Document:
    return Document(f"d{i}", "Some text.", "local", "en")


# ------------------------------------------------------------------------------------------------------------- the law
def test_the_default_law_is_even_over_8k_to_64k():
    law = S.law()
    assert law.edges[0] == 8192 and law.edges[-1] == 65537 and len(law.shares) == 7
    assert max(np.diff(law.edges)) - min(np.diff(law.edges)) <= 1
    assert law.bucket(8191) is None and law.bucket(8192) == 0 and law.bucket(65536) == 6 and law.bucket(65537) is None
    assert law.name(0) == "8192-16383"


@pytest.mark.parametrize("spread", S.SPREADS)
def test_every_length_has_one_bucket(spread):
    for low, high in ((1, 1), (1, 3), (5, 100), (100, 5000)):
        law = S.law(low, high, spread)
        edges = law.edges
        for tokens in {low, high, (low + high) // 2, *edges[:-1], *(e - 1 for e in edges[1:])}:
            inside = [b for b in range(len(law.shares)) if edges[b] <= tokens < edges[b + 1]]
            assert inside == [law.bucket(tokens)] and 0 < law.weight(tokens) <= 1
        assert law.bucket(low - 1) is None and law.bucket(high + 1) is None and sum(law.shares) == pytest.approx(1)
    ratios = np.diff(np.log(S.law(1000, 127_999, "log").edges))
    assert ratios.max() / ratios.min() < 1.01


def test_a_law_that_cannot_be():
    for arguments, message in (((0, 5), "1 <= min_tokens"), ((9, 5), "1 <= min_tokens"), ((1, 5, "flat"), "'flat' is unknown")):
        with pytest.raises(ValueError, match=message):
            S.law(*arguments)


# ----------------------------------------------------------------------------------------------------------------- keys
def test_keys_draw_in_proportion_to_weights():
    """Oracle: the exact probabilities of successive draws without replacement."""
    weights = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    exact = {}
    for pair in itertools.permutations(weights, 2):
        first, second = (weights[i] for i in pair)
        exact[pair] = first / 10 * second / (10 - first)
    seen = dict.fromkeys(exact, 0)
    for seed in range(6000):
        seen[tuple(sorted(weights, key=lambda i: -S.key_of(seed, i, weights[i]))[:2])] += 1
    assert stats.chisquare(list(seen.values()), [6000 * p for p in exact.values()]).pvalue > 0.001


def test_keys_are_fixed_numbers():
    assert S.key_of(0, "d0") == S.key_of(0, "d0") and S.key_of(1, "d0") != S.key_of(0, "d0") < 0
    assert S.key_of(0, "x", 0) == -np.inf
    uniform = np.exp([S.key_of(3, f"document {i}") for i in range(5000)])
    assert stats.kstest(uniform, "uniform").pvalue > 0.001


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 0), st.text("abc", min_size=1, max_size=4)), unique_by=lambda t: t[1]), st.integers(0, 6))
def test_a_reservoir_holds_the_largest_in_one_pass(items, capacity):
    pool, inside = S.Reservoir(capacity), set()
    for key, id in items:
        entered, out = pool.offer(key, id)
        inside |= {id} if entered else set()
        inside -= {out}
        assert len(inside) <= capacity
    best = sorted(items, reverse=True)[:capacity]
    assert pool.items() == best and inside == {id for _, id in best}


# ------------------------------------------------------------------------------------------------------------ allocation
@settings(max_examples=300, deadline=None)
@given(st.integers(0, 40), st.lists(st.tuples(st.floats(0, 5), st.integers(0, 15)), min_size=1, max_size=6))
def test_shares_add_up_and_nobody_gets_more_than_there_is(total, groups):
    weights, available = zip(*groups)
    got = S.allocate(total, weights, available)
    assert all(0 <= g <= a for g, a in zip(got, available))
    assert sum(got) == min(total, sum(a for w, a in groups if w > 0))
    # Oracle: who is not full has its share, by weight, of what all those not full got, but for rounding.
    open_ = [i for i, (w, a) in enumerate(groups) if w > 0 and got[i] < a]
    for i in open_:
        share = sum(got[j] for j in open_) * weights[i] / sum(weights[j] for j in open_)
        assert abs(got[i] - share) <= len(groups)


def test_allocation_by_hand():
    assert S.allocate(10, [1, 1], [100, 100]) == [5, 5]
    assert S.allocate(10, [1, 1, 8], [100, 100, 2]) == [4, 4, 2]
    assert S.allocate(10, [0, 1], [100, 3]) == [0, 3]
    assert S.allocate(2, [1, 1, 1], [9, 9, 9]) == [0, 1, 1]  # of equal remainders the last (the longest bucket) is first
    with pytest.raises(ValueError, match="must not be negative"):
        S.allocate(3, [-1, 2], [1, 1])


# --------------------------------------------------------------------------------------------------------------- choosing
def candidates(counts: dict[tuple[str, str, int], int], seed=0) -> pd.DataFrame:
    rows = [(lang, source, b, f"{lang}{source}{b}-{i}") for (lang, source, b), n in counts.items() for i in range(n)]
    frame = pd.DataFrame(rows, columns=["language", "source", "bucket", "id"])
    return frame.assign(key=[S.key_of(seed, id) for id in frame["id"]])


def test_languages_sources_and_lengths_get_what_they_want():
    law = S.law(1, 700)
    table = candidates({(lang, source, b): 50 for lang, source in (("en", "c4"), ("en", "books"), ("zh", "wudao")) for b in range(7)})
    chosen, report = S.choose(table, 140, law)
    got = table.loc[chosen]
    assert len(set(chosen)) == 140 and (got["language"] == "zh").sum() == 14
    assert got.groupby("source").size().to_dict() == {"books": 63, "c4": 63, "wudao": 14}
    assert got.groupby(["source", "bucket"]).size().to_dict() == {
        (s, b): 9 if s != "wudao" else 2 for s in ("books", "c4", "wudao") for b in range(7)
    }
    assert (report["got"] == report["wanted"]).all() and report["got"].sum() == 140 and set(report["available"]) == {50}
    # the best keys of each stratum, independent of the order of the table
    for (source, bucket), rows in got.groupby(["source", "bucket"]):
        there = table[(table["source"] == source) & (table["bucket"] == bucket)]
        assert sorted(rows["key"]) == sorted(there["key"].nlargest(len(rows)))
    shuffled = table.sample(frac=1, random_state=3).reset_index(drop=True)
    assert set(shuffled.loc[S.choose(shuffled, 140, law)[0], "id"]) == set(got["id"])


def test_what_is_missing_is_filled_and_told():
    law = S.law(1, 700)
    table = candidates({("en", "c4", 0): 100, ("en", "books", 6): 5})
    chosen, report = S.choose(table, 40, law)
    assert len(chosen) == 40 and table.loc[chosen].groupby("source").size().to_dict() == {"books": 5, "c4": 35}
    none = report[report["language"] == "zh"].iloc[0]
    assert (none["source"], none["wanted"], none["got"]) == ("(none)", 4, 0)
    assert report["wanted"].sum() == 40 and report["got"].sum() == 40
    assert len(S.choose(table, 1000, law)[0]) == 105
    assert len(S.choose(table, 10, law, chinese=1.0)[0]) == 0  # no Chinese text, and nothing else is wanted


def test_quotas_and_languages_as_they_come():
    law = S.law(1, 700)
    table = candidates({("en", "c4", 0): 300, ("en", "books", 0): 100, ("zh", "wudao", 0): 100})
    by_source = table.loc[S.choose(table, 100, law, {"books": 3.0}, chinese=0)[0]].groupby("source").size().to_dict()
    assert by_source == {"books": 75, "c4": 25}
    chosen = table.loc[S.choose(table, 100, law, chinese=None)[0]]
    assert (chosen["language"] == "zh").sum() == 20
    with pytest.raises(ValueError, match="quotas name wiki; the documents come from: books, c4, wudao"):
        S.choose(table, 10, law, {"wiki": 1})
    with pytest.raises(ValueError, match=r"share of Chinese documents is 1\.5"):
        S.choose(table, 10, law, chinese=1.5)


# -------------------------------------------------------------------------------------------------------------- in memory
def test_sampling_prefers_long_documents_in_proportion():
    documents = [doc(i) for i in range(4)]
    lengths = [1000, 2000, 3000, 4000]
    first = np.bincount([int(S.sample_documents(documents, lengths, 1, s)[0].id[1]) for s in range(2000)], minlength=4)
    assert np.abs(first / 2000 - np.array(lengths) / 10_000).max() < 0.035
    flat = np.bincount(
        [int(S.sample_documents(documents, lengths, 1, s, power=0)[0].id[1]) for s in range(2000)], minlength=4
    )
    assert np.abs(flat / 2000 - 0.25).max() < 0.035
    drawn = S.sample_documents(documents, lengths, 3, 7)
    assert drawn == S.sample_documents(documents, lengths, 3, 7) and len({d.id for d in drawn}) == 3
    order = random.Random(1).sample(range(4), 4)
    assert drawn == S.sample_documents([documents[i] for i in order], [lengths[i] for i in order], 3, 7)
    assert drawn[:2] == S.sample_documents(documents, lengths, 2, 7)
    assert {d.id for d in S.sample_documents(documents, lengths, 2, 0, max_tokens=2500)} == {"d0", "d1"}
    assert S.sample_documents(documents, lengths, 0, 0) == []
    for arguments, message in (
        ((documents, lengths, 5, 0), "5 documents wanted, 4 usable"),
        ((documents, [3], 1, 0), "4 documents but 1 lengths"),
        ((documents * 2, lengths * 2, 1, 0), "4 documents repeat an id"),
    ):
        with pytest.raises(ValueError, match=message):
            S.sample_documents(*arguments)


def test_many_small_shares_do_not_all_leave_out_the_same_range():
    """Nine sources of six documents each over seven equal ranges: each range misses about as many."""
    rows = [{"source": f"s{k}", "language": "en", "bucket": b, "key": float(-k)} for k in range(9) for b in range(7) for _ in range(9)]
    lengths = S.law(700, 1399)
    assert len(lengths.shares) == 7
    chosen, report = S.choose(pd.DataFrame(rows), 54, lengths, chinese=None)
    by_range = report.groupby("tokens")[["wanted", "got"]].sum()
    assert len(chosen) == by_range.got.sum() == 54
    assert by_range.min().min() >= 7 and by_range.max().max() <= 8
