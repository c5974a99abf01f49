import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from longalign_lib.evaluate.needle_score import areas, cells, compare, judged, reference_of, tally
from longalign_lib.llm import ChatError


@pytest.fixture
def frame():
    """Two models, 3 lengths x 3 depths x 4 repeats, recall in halves; two failed prompts."""
    rng, rows = np.random.default_rng(0), []
    for model, (length, depth, repeat) in itertools.product("ab", itertools.product((500, 9000, 10_000), (0, 50, 100), range(4))):
        score = float(rng.choice([0, 0.5, 1]))
        rows.append({"model": model, "length": length, "tokens": length - 1, "depth": depth, "repeat": repeat, "score": score,
                     "hit": score == 1, "status": "ok", "message_hash": f"{length}-{depth}-{repeat}"})  # fmt: skip
    out = pd.DataFrame(rows).astype({"hit": object})
    for i in (0, 40):
        out.loc[i, ["score", "hit", "status"]] = [np.nan, None, "failed: x"]
    return out


def test_cells_by_counting(frame):
    table = cells(frame)
    assert len(table) == 18
    for row in table.itertuples():
        mine = [r for r in frame.itertuples() if (r.model, r.length, r.depth) == (row.model, row.length, row.depth)]
        scores = [r.score for r in mine if r.status == "ok"]
        assert (row.n, row.failed, row.hits) == (len(scores), 4 - len(scores), sum(s == 1 for s in scores))
        assert row.recall == pytest.approx(sum(scores) / len(scores))
        interval = stats.binomtest(row.hits, row.n).proportion_ci(0.95, "wilson")
        assert (row.low, row.high) == pytest.approx(tuple(interval))
    assert table.failed.sum() == 2 and table.n.sum() == 70


def test_areas_add_up(frame):
    table = areas(frame, window=9000)
    for model, mine in table.groupby("model"):
        total = mine[mine.area == "all"].iloc[0]
        rows = frame[(frame.model == model) & (frame.status == "ok")]
        assert (total.n, total.hits) == (len(rows), int((rows.score == 1).sum()))
        for names in (("inside window", "beyond window"), ("length",), ("depth",)):
            part = mine[mine.area.isin(names)]
            assert (part.n.sum(), part.hits.sum(), part.failed.sum()) == (total.n, total.hits, total.failed)
        assert mine[mine.area == "inside window"].n.item() == len(rows[rows.length <= 9000])
    assert "inside window" not in set(areas(frame).area)


def test_nothing_answered_says_nothing(frame):
    empty = tally(frame[frame.status != "ok"])
    assert (empty["n"], empty["failed"], empty["low"], empty["high"]) == (0, 2, 0, 1)
    assert np.isnan(empty["share"]) and np.isnan(empty["recall"])


def test_comparison_is_mcnemars_exact_test(frame):
    got = compare(frame.sample(frac=1, random_state=1), "a", "b")  # order of rows does not matter
    a, b = (frame[frame.model == m].set_index("message_hash") for m in "ab")
    both = [k for k in a.index if a.status[k] == b.status[k] == "ok"]
    for test, value in ((got["hits"], lambda m, k: float(m.score[k] == 1)), (got["recall"], lambda m, k: m.score[k])):
        up = sum(value(b, k) > value(a, k) for k in both)
        down = sum(value(b, k) < value(a, k) for k in both)
        assert (test["better"], test["worse"], test["n"], test["missing"]) == (up, down, 34, 2)
        assert test["p"] == pytest.approx(stats.binomtest(up, up + down, 0.5).pvalue) and 0 < up and 0 < down
    assert got["alone"] == 0 and len(got["pairs"]) == 36
    part = compare(frame.drop(index=[1, 2]), "a", "b")
    assert part["alone"] == 2 and part["hits"]["n"] == 32


def test_comparisons_that_cannot_be(frame):
    with pytest.raises(ValueError, match=r"'c'; there are 'a', 'b'"):
        compare(frame, "a", "c")
    frame.loc[frame.model == "b", "message_hash"] += "x"
    with pytest.raises(ValueError, match="no prompt in common"):
        compare(frame, "a", "b")


def test_a_judge_beside_recall():
    row = {"question": "Q?", "needle": "A is 1.", "others": ["B is 2."], "wrong_parts": ["2"], "status": "ok"}
    frame = pd.DataFrame([row | {"answer": a} for a in ("good", "odd", "refused")] + [row | {"answer": None, "status": "failed: x"}])
    seen = []

    def judge(question, reference, answer):
        seen.append((question, reference, answer))
        if answer == "refused":
            raise ChatError("no")
        return 7 if answer == "good" else None

    got = judged(frame, judge, progress=False)
    assert got.judge.tolist()[:1] == [7] and got.judge.isna().tolist() == [False, True, True, True]
    assert got.judge_status.tolist() == ["rated", "unparsed", "failed: no", "not asked: no answer"]
    assert seen[0] == ("Q?", "A is 1.", "good") and len(seen) == 3  # the distractor is not in the reference
    with pytest.raises(ValueError, match=r"11.*between 1 and 10"):
        judged(frame, lambda *_: 11, progress=False)


def test_reference_keeps_all_answering_sentences():
    assert reference_of({"needle": "A.", "others": ["B."], "wrong_parts": []}) == "A. B."


def test_answers_of_two_settings_are_refused(frame):
    frame["key"] = frame.model + frame.message_hash
    areas(frame), compare(pd.concat([frame, frame]), "a", "b")  # the same answers twice are no second setting
    both = pd.concat([frame, frame[frame.model == "a"].assign(key="other")])
    for table in (lambda: tally(both[both.model == "a"]), lambda: cells(both), lambda: areas(both), lambda: compare(both, "a", "b")):
        with pytest.raises(ValueError, match="model 'a' has one prompt under several keys"):
            table()
