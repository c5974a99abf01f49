"""Marking replies to verifiable samples: is what must be said there, and nothing that contradicts it?

A reply may be phrased freely. What is compared is a value, in any of the forms in which one writes it:

    48213 = 48,213 = ４８２１３      07:05 = 7.05 am = 7点05分      19:30 = 7:30 pm = 晚上7点30分
    Ines Quist = INES  QUIST          3 = three = 三 (counts only)       'utf-8' = "utf-8" = utf-8

    retrieve, hop, chain, code   every expected value, and none of the sample's wrong ones (the values of other facts)
    list                         every value beside its own key, or in the order asked for when the keys are left out
    order                        the keys, first mentions in order (last ones when the reply lists all of them twice)
    count                        the number as digits or word, and no other number that could be meant

Limits: a right value in a denial ("it is not 48213") passes; so does a right one beside a wrong one that is no distractor.
Cost: linear in the reply for each value.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence

from longalign_lib.data.numerals import number_words

_TIME = re.compile(r"\d{1,2}(?::|点)\d{2}分?")
_TIMES = re.compile(
    r"(下午|晚上|傍晚)?\s*(?<!\d)(\d{1,2})\s?[:.点时h]\s?(\d{2})(?!\d)(?:分)?\s*(?:([ap])\.?\s?m\b)?", flags=re.IGNORECASE
)


def is_right(sample: Mapping, reply: str) -> bool:
    """True when a reply answers the sample's question; see the module's text for what each kind asks of it.

    Args:
        sample: with "task" ("verifiable:<kind>") and "expected"; "wrong" and "pairs" are used where they are there.
        reply: what a model wrote.
    """
    kind, said = sample["task"].rsplit(":", 1)[-1], plain(reply)
    if not sample["expected"] or not all(_places(value, said, kind) for value in sample["expected"]):
        return False
    if any(_places(value, said, kind) for value in sample.get("wrong", ())):
        return False
    if kind == "order" or (kind == "code" and len(sample["expected"]) > 1):
        return _in_order(sample["expected"], said, kind)
    if kind == "list" and sample.get("pairs"):
        return _paired(sample["pairs"], said)
    return True


def plain(text: str) -> str:
    """Text with everything evened out that does not matter: width, case, thousands commas, quotes, dashes, white space."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"[‘’‚`´]", "'", re.sub(r"[“”„«»]", '"', re.sub(r"[‐‑‒–—−]", "-", text)))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"\s+", " ", text)


def _places(value: str, said: str, kind: str) -> list[int]:
    """Where a value stands in an evened-out reply, in whatever form."""
    value = plain(value).strip()
    if _TIME.fullmatch(value):
        wanted = _clock(_TIMES.match(value))
        return [m.start() for m in _TIMES.finditer(said) if _clock(m) == wanted]
    forms = [value]
    if kind == "count" and value.isdigit():
        forms += [*number_words(int(value), "en"), *number_words(int(value), "zh")]
    found = []
    for form in forms:
        if kind == "code":
            form = form.strip("'\"")
        chinese_count = kind == "count" and not form.isascii()
        before = r"(?<![a-z0-9])(?<!\d\.)" if not chinese_count else r"(?<![一二两三四五六七八九十百第])"
        after = r"(?![a-z0-9])(?!\.\d)" if not chinese_count else r"(?=[个项种座处家条人名只])"
        found += [m.start() for m in re.finditer(before + re.escape(form).replace(r"\ ", " ") + after, said)]
    return found


def _clock(match: re.Match) -> tuple[int, int]:
    hour, minute = int(match[2]), int(match[3])
    late = match[1] or (match[4] or "").lower() == "p"
    return (hour + 12 if late and hour < 12 else hour), minute


def _in_order(values: Sequence[str], said: str, kind: str) -> bool:
    places = [_places(value, said, kind) for value in values]
    chosen = [p[-1] for p in places] if all(len(p) > 1 for p in places) else [p[0] for p in places]
    return all(a < b for a, b in itertools.pairwise(chosen))


def _paired(pairs: Sequence[Sequence[str]], said: str) -> bool:
    keys = [_places(key, said, "list") for key, _ in pairs]
    values = [_places(value, said, "list")[0] for _, value in pairs]
    by_value = sorted(range(len(pairs)), key=lambda i: values[i])
    if not all(keys):
        return by_value == list(range(len(pairs)))
    return by_value == sorted(range(len(pairs)), key=lambda i: keys[i][0])
