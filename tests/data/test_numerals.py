"""Numbers read from words: written out by hand, and back and forth for many."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from longalign_lib.data.numerals import number_words, numbers_in


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("a hundred and ninety-six steps", [196]),
        ("14,200 euros and 1,234,567.50", [14200, Fraction("1234567.5")]),
        ("at 04:18", [4, 18]),
        ("一九五八年建成", [1958]),
        ("二百一十八公里", [218]),
        ("三千八百六十万元", [38_600_000]),
        ("3860万元", [38_600_000]),
        ("一亿三千万", [130_000_000]),
        ("百分之三点一", [Fraction("3.1")]),
        ("九米四七", [Fraction("9.47"), 47, 9, 47]),
        ("nine minutes and twenty seconds", [9, 20]),
        ("forty-two thousand one hundred", [42_100]),
        ("fourteen. thirteen", [14, 13]),
        ("one two three", [1, 2, 3]),
        ("1.2 million", [1_200_000]),
        ("１２３", [123]),
        ("两千四百", [2400]),
        ("一百零八", [108]),
        ("千万不要", []),
        ("someone often weighted", []),
        ("", []),
        ("the fifteenth, the twentieth and the forty-first; the ninetieth", [15, 20, 41, 90]),
        ("a ramp of .75 metres, $.5, and... 12 in fig.3, at v1.2.3", [Fraction(3, 4), Fraction(1, 2), 12, 3, Fraction("1.2")]),
        ("$1.5bn, 3k visitors, £2m, € 4b, 7mn, 3k人", [1_500_000_000, 3000, 2_000_000, 4_000_000_000, 7_000_000, 3000]),
        ("5m tall, 3km, 300 K, 4b, 2 books", [5, 3, 300, 4, 2]),
        ("a 3-million-dollar plan, two trillion, 1.5 trillion", [3_000_000, 2 * 10**12, 15 * 10**11]),
        ("half a million, one and a half million; two-and-a-half thousand", [500_000, 1_500_000, 2500]),
        ("Rows: 100,200,300.", [100_200_300, 100, 200, 300]),
        ("in nineteen twelve; nineteen and twelve", [19, 12, 1912, 19, 12]),
        ("三万五, 两千三, 两百五十, 一百零五, 十五, 三亿五", [35_000, 2300, 250, 105, 15, 350_000_000]),
        ("二三十人, 三四百, 一三五", [20, 30, 300, 400, 135]),
    ],
)
def test_numbers_in_words_and_digits(text, numbers):
    assert sorted(numbers_in(text)) == sorted(map(Fraction, numbers))


def test_words_there_and_back():
    for value in range(100):
        for language in ("en", "zh"):
            for word in number_words(value, language):
                assert numbers_in(f"… {word} …") == [value], word
        for thousand in (1000, 2000):
            assert numbers_in(f"{number_words(thousand // 1000, 'en')[0]} thousand and {number_words(value, 'en')[0]}") == [
                thousand + value
            ]
    with pytest.raises(ValueError, match="100 has no words here; accepted: 0 to 99"):
        number_words(100, "en")


def test_no_text_breaks_it():
    draw = random.Random(0)
    signs = [*"零〇一二两三四五六七八九十百千万亿点米元块分之0123456789,.:٣½① ", "thousand", "million", "and ", "a ", "-", "six", "hundred "]
    for _ in range(5000):
        assert all(n >= 0 for n in numbers_in("".join(draw.choice(signs) for _ in range(draw.randint(1, 12)))))
