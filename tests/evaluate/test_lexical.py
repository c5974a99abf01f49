from types import SimpleNamespace

import pytest

from longalign_lib.evaluate import judge, lexical
from longalign_lib.evaluate.lexical import rouge_l, word_f1


def lcs(a, b):
    return 0 if not a or not b else 1 + lcs(a[:-1], b[:-1]) if a[-1] == b[-1] else max(lcs(a[:-1], b), lcs(a, b[:-1]))


def test_rouge_l_is_the_longest_common_subsequence():
    a, b = "the keeper saw the light fail".split(), "the light the old keeper saw did fail".split()
    n = lcs(a, b)
    assert n > 0 and rouge_l(" ".join(a), " ".join(b)) == pytest.approx(100 * 2 * n / (len(a) + len(b)))


def test_chinese_is_not_dropped():
    assert rouge_l("河水涨了", "河水涨了") == word_f1("河水涨了", "河水涨了") == 100
    assert rouge_l("河水涨", "河水涨了") == pytest.approx(100 * 2 * 3 / 7)
    assert rouge_l("山高", "河水涨了") == word_f1("山高", "河水涨了") == 0


def test_order_matters_to_one_of_them_and_case_to_none():
    assert word_f1("B a", "A b!") == 100 > rouge_l("B a", "A b!")
    assert rouge_l("", "x") == word_f1("", "x") == word_f1("", "") == 0
    assert word_f1("a a a", "a b") == pytest.approx(
        100 * 2 * 1 / 5
    )  # a repeated word counts once for each time it is wanted


def test_records_of_a_judge_without_a_judge():
    same = {"question": "q", "reference": "the tide rose", "model": "m"}
    rows = [same | {"id": i, "answer": a} for i, a in zip("abc", ["the tide rose", "", "the sun"])]
    frame = lexical.rate_all(rows)
    assert frame.score.tolist() == pytest.approx([10, 1, 1 + 9 * 0.4]) and frame.status.eq("rated").all()
    assert frame.judge.str.contains("no judge").all() and frame.reply.str.startswith("lexical").all() and frame.model.eq("m").all()
    replies = SimpleNamespace(chat=lambda *_, **__: SimpleNamespace(text="[[3]]", finish_reason="stop"))
    assert set(judge.rate(replies, "q", "r", "a", rounds=1)[0]) <= set(frame.columns)
    seen = judge.summarise(frame)
    assert (seen["answers"], seen["coverage"]) == (3, 1) and seen["percent"] == pytest.approx((100 + 0 + 40) / 3)
    assert lexical.rate("a b", "a b", rubric="qa")["score"] == 3
    with pytest.raises(ValueError, match="reference is empty"):
        lexical.rate(" ", "x")
