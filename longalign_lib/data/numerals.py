"""Numbers in a text whatever they are written in: 196, 1,874, "a hundred and ninety-six", 一九五八, 三千八百六十万.

Each number becomes a Fraction, so that "196 steps" can be found in a text that says "a hundred and ninety-six". English
cardinals and ordinals, Chinese numerals with and without units, digits with separators, full-width digits, decimals with or
without a leading zero, and multipliers behind digits: thousand to trillion, k, mn, bn, 万, 亿, and m and b behind a sign of money.

What can be read in two ways gives both: "100,200,300" is one number and three, "nineteen twelve" also the year, 二三十 20 and 30.

Limits: more than 40 digits are no number; "half past six" is read as 6, "5m" without a sign of money as 5 (metres), 十七八 is
misread; signs, "1 958", fractions in words (but "half a million", "two and a half million"), 千 behind digits (千克), 廿 and 壹
are not read. Cost: linear.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from fractions import Fraction

LONGEST = 40
_ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
         "eighteen nineteen").split()  # fmt: skip
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINALS = ("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
             "sixteenth seventeenth eighteenth nineteenth").split()  # fmt: skip
_WORD = {w: i for i, w in enumerate(_ONES)} | {w: 20 + 10 * i for i, w in enumerate(_TENS)}
_WORD |= {w: i + 1 for i, w in enumerate(_ORDINALS)} | {w[:-1] + "ieth": 20 + 10 * i for i, w in enumerate(_TENS)}
_SCALE = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CHINESE = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNIT = {"十": 10, "百": 100, "千": 1000}
_BIG = {"万": 10**4, "亿": 10**8}
_BEHIND = _SCALE | _BIG | {"k": 1000, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9}

_DIGITS = re.compile(
    r"([$£€¥]\s?)?((?<![\w.)])\.[0-9]+|(?<!\d)(?<!\d\.)(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)(?!\d)"
    r"(?:[\s-]?((?:thousand|million|billion|trillion|mn|bn|(?<=\d)k|(?<=\d)(?(1)[mb]|(?!)))(?![a-z\d])|(?<=\d)[万亿]))?"
)
_HALF = re.compile(rf"\b(?:({'|'.join(_ONES)})[\s-]and[\s-]a[\s-]half|half\s+an?)[\s-]+(?=(?:thousand|million|billion|trillion)\b)")
_NAMES = "|".join(sorted((*_WORD, *_SCALE), key=len, reverse=True))
_ENGLISH = re.compile(rf"\b(?:an?\s+(?=hundred|thousand|million|billion|trillion))?(?:{_NAMES})(?:(?:[\s-]+|\s+and\s+)(?:{_NAMES}))*\b")
_HAN = re.compile(r"[零〇一二两三四五六七八九十百千万亿]+(?:点[零〇一二三四五六七八九]+)?")
_ABOUT = re.compile(r"([一二两三四五六七八])([二三四五六七八九])([十百千万亿].*)")
_METRES = re.compile(
    r"([零〇一二两三四五六七八九十百]{1,12}|[0-9]{1,12})[米元块]([零〇一二三四五六七八九]{1,2}|[0-9]{1,2})(?![十百千万\d])"
)


def numbers_in(text: str) -> list[Fraction]:
    """Every number of a text, in no order that matters, equal ones as often as they stand.

    Example:
        >>> sorted({int(n) for n in numbers_in("1,958 and a hundred and ninety-six; 一九五八年, 3860万")})
        [196, 1958, 38600000]
    """
    text = unicodedata.normalize("NFKC", text).lower()
    found = []
    for match in _METRES.finditer(text):  # 九米四七 is 9.47 metres
        whole, part = (_any(piece) for piece in match.groups())
        digits = match[2] if match[2].isascii() else "".join(str(_CHINESE[c]) for c in match[2])
        found += [whole + Fraction(int(digits), 10 ** len(digits)), part]
    text = _HALF.sub(lambda m: f" {_WORD.get(m[1], 0)}.5 ", text)
    for match in _DIGITS.finditer(text):
        if len(match[0]) > LONGEST:
            continue
        found.append(Fraction(match[2].replace(",", "")) * _BEHIND.get(match[3], 1))
        if not match[3] and re.fullmatch(r"\d{3}(?:,\d{3}){2,}", match[2]):
            found += map(Fraction, match[2].split(","))
    text = _DIGITS.sub(" ; ", text)
    for match in _ENGLISH.finditer(text):
        values = _english(re.findall(r"[a-z]+", match[0]))
        found += values
        if " and " not in match[0]:  # nineteen twelve
            found += [100 * a + b for a, b in itertools.pairwise(values) if 13 <= a <= 20 and 10 <= b < 100]
    runs = _HAN.findall(re.sub("[百千万]分之", " ", text))
    runs = [run for run in runs if len(run) <= LONGEST and any(c in _CHINESE or c == "十" for c in run)]  # 千万 is no number
    for run in runs:
        about = _ABOUT.fullmatch(run)
        twice = about and _CHINESE[about[2]] == _CHINESE[about[1]] + 1
        found += [_chinese(digit + about[3]) for digit in about.groups()[:2]] if twice else [_chinese(run)]
    return found


def number_words(value: int, language: str) -> tuple[str, ...]:
    """The words for a small whole number, 0 to 99, as one writes them: ("three",), or ("三",) and ("二", "两")."""
    if not 0 <= value <= 99:
        raise ValueError(f"{value} has no words here; accepted: 0 to 99")
    if language == "en":
        ten, one = divmod(value, 10)
        return (_ONES[value],) if value < 20 else (_TENS[ten - 2] + (f"-{_ONES[one]}" if one else ""),)
    ten, one = divmod(value, 10)
    digits = "零一二三四五六七八九"
    text = digits[value] if value < 10 else ("" if ten == 1 else digits[ten]) + "十" + (digits[one] if one else "")
    return (text, "两") if value == 2 else (text,)


def _any(piece: str) -> Fraction:
    return Fraction(piece) if piece.isascii() else _chinese(piece)


def _english(words: list[str]) -> list[Fraction]:
    """ "a hundred and ninety six" is 196; "fourteen thirteen" are two numbers here."""
    values, total, current, last = [], 0, None, 0
    for word in words:
        if word in ("a", "an", "and"):
            continue
        if word in _SCALE:
            current = (1 if current is None else current) * _SCALE[word]
            if _SCALE[word] >= 1000:
                total, current = total + current, 0
            last = _SCALE[word]
        else:
            value = _WORD[word]
            if current is not None and not (last >= 100 or (20 <= last < 100 and 0 < value < 10)):
                values.append(Fraction(total + current))
                total, current = 0, None
            current, last = (current or 0) + value, value
    return [*values, Fraction(total + (current or 0))]


def _chinese(text: str) -> Fraction:
    whole, _, decimals = text.partition("点")
    if not any(c in _UNIT or c in _BIG for c in whole):  # 一九五八: digits read one by one
        number = Fraction(int("".join(str(_CHINESE[c]) for c in whole)))
    else:
        total = section = digit = 0
        for c in whole:
            if c in _CHINESE:
                digit = digit * 10 + _CHINESE[c] if digit else _CHINESE[c]
            elif c in _UNIT:
                section, digit = section + (digit or 1) * _UNIT[c], 0
            else:
                total = total + (section + digit or 1) * 10**4 if c == "万" else (total + section + digit or 1) * 10**8
                section = digit = 0
        colloquial = not decimals and len(whole) > 1 and digit and (_UNIT | _BIG).get(whole[-2], 0)  # 三万五 is 35000
        number = Fraction(total + section + (digit * colloquial // 10 if colloquial and colloquial > 10 else digit))
    return number + Fraction(int("".join(str(_CHINESE[c]) for c in decimals)), 10 ** len(decimals)) if decimals else number
