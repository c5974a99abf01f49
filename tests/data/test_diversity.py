"""Openings are counted, and nearness is the Jaccard index of word pairs, against plain sets."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.data.diversity import nearest, openings, words


def brute(questions):
    sets = []
    for q in questions:
        w = words(q) or [""]
        sets.append(set(itertools.pairwise(w)) or {(w[0], "")})
    return [max((len(a & b) / len(a | b) for j, b in enumerate(sets) if j != i), default=0) for i, a in enumerate(sets)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab 桥。", max_size=12), min_size=1, max_size=9), st.integers(1, 4))
def test_nearest_is_the_jaccard_index_of_word_pairs(questions, block):
    assert nearest(questions, block) == pytest.approx(brute(questions))


def test_the_same_question_is_at_one_and_another_one_at_nothing():
    assert nearest(["When was it built?", "when was it built", "Who pays 3 crowns?"]).tolist() == [1, 1, 0]
    assert nearest(["Alone?"]).tolist() == [0]
    assert nearest([]).tolist() == []


def test_words_and_openings():
    assert words("Don't 桥梁 built-in x_1?") == ["don't", "桥", "梁", "built", "in", "x", "1"]
    table = openings(["What is it?", "what IS that", "Who?", "河上有几座桥？"])
    assert table.opening.tolist() == ["what is", "who", "河 上"] and table.questions.tolist() == [2, 1, 1]
    assert np.isclose(table.share.sum(), 1)
    assert openings([]).empty
