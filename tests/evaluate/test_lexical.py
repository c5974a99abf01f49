import pytest

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
