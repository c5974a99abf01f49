"""Sentence ends are where a reader sees them; only the invisible is taken out; tokens are counted as they are encoded."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.data.text import clean, sentence_ends, token_counts, token_ids, unusable


def test_sentence_ends():
    text = 'Dr. Smith paid 3.50 at 5 p.m. "Why?" he asked. See e.g. J. Doe.\n\nNext one!'
    pieces = [text[a:b].strip() for a, b in zip([0, *sentence_ends(text)], sentence_ends(text))]
    assert pieces == ["Dr. Smith paid 3.50 at 5 p.m.", '"Why?" he asked.', "See e.g. J. Doe.", "Next one!"]
    chinese = "他说：“走吧。”然后走了！真的？"
    assert [chinese[:e] for e in sentence_ends(chinese)] == [
        "他说：“走吧。”", "他说：“走吧。”然后走了！", chinese,
    ]  # fmt: skip
    assert sentence_ends("no stop") == [7]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='ab .!?。\n"”1A', max_size=60))
def test_sentence_ends_ascend_and_cover_the_text(text):
    ends = sentence_ends(text)
    assert ends[-1] == len(text) and all(a < b for a, b in pairwise(ends))


def test_the_invisible_goes_and_the_visible_stays():
    assert clean("ig\u200dno\u200bre\u2060 the\ufeff above") == (
        "ignore the above", {"U+200B": 1, "U+200D": 1, "U+2060": 1, "U+FEFF": 1},
    )  # fmt: skip
    assert clean("a\r\nb\rc\x0cd\u2028e\tf") == ("a\nb\nc\nd\ne\tf", {})
    assert clean("中\u200c文 \u202eevil\u202c soft\u00adly \U000e0041") == (
        "中文 evil softly ", {"U+00AD": 1, "U+200C": 1, "U+202C": 1, "U+202E": 1, "U+E0041": 1},
    )  # fmt: skip
    # joiners that mean something: a family emoji, Persian
    for text in ("👩\u200d👩\u200d👧", "می\u200cخواهم"):
        assert clean(text) == (text, {})
    assert unusable("") == unusable(" \n") == "empty document" and unusable("a\x00") and unusable("fine 中文 ☃") is None


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_cleaning_is_idempotent_and_takes_only_format_and_control_characters(text):
    cleaned, removed = clean(text)
    assert clean(cleaned)[0] == cleaned
    assert all(unicodedata.category(chr(int(code[2:], 16))) in ("Cc", "Cf", "Cn") for code in removed)
    ends = "\r\n\x0b\x0c\x85\u2028\u2029"
    visible = [c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cn", "Zl", "Zp")]
    kept = [c for c in cleaned if unicodedata.category(c) not in ("Cc", "Cf", "Cn", "Zl", "Zp")]
    assert visible == kept and not set(cleaned) & (set(ends) - {"\n"})


@pytest.mark.parametrize("batch_chars", [1, 50, 10**6])
def test_counts_are_those_of_the_tokenizer(tokenizer, batch_chars):
    texts = ["", "one", "Two words, 2.5 times.\n\n", "中文和 English 混在一起。", "x" * 3000, "def f():\n    return 1\n" * 40]
    expected = [len(token_ids(tokenizer, text)) for text in texts]
    tokenizer(texts[2], truncation=True, max_length=2)  # leaves a truncation behind, which must not count
    assert token_counts(tokenizer, iter(texts), batch_chars).tolist() == expected
    assert token_counts(tokenizer, []).shape == (0,)


def test_a_tokenizer_without_a_fast_backend_counts_too():
    def words(text, **_):
        return {"input_ids": text.split()}

    assert token_counts(words, ["a b", "", "c"]).tolist() == [2, 0, 1]
