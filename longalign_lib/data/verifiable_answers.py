"""Marking replies to verifiable samples: is what must be said there, and nothing that contradicts it?

A reply may be phrased freely. What is compared is a value, in any of the forms in which one writes it:

    48213 = 48,213 = ４８２１３      07:05 = 7.05 am = 7点05分      19:30 = 7:30 pm = 晚上7点30分 = 7:30 in the evening
    Ines Quist = INES  QUIST          3 = three = 三 (counts only)       'utf-8' = "utf-8" = utf-8, but not utf-8-sig

    retrieve, hop, chain, code   every expected value, and none of the sample's wrong ones (the values of other facts)
    list                         every value nearer to its own key than to others, or in the order asked for without keys
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
    r"(?:\b(morning|afternoon|evening|tonight)\b,?\s?(?:at\s)?|(下午|晚[上间]?|凌晨))?\s?(?<!\d)(\d{1,2})\s?[:.点时h]\s?(\d{2})"
    r"(?!\d)分?[\s(]*(?:([ap])\.?\s?m\b|(?:in the |this |at )?(morning|afternoon|evening|tonight|night)\b)?"
)
_AFTERNOON, _EVENING = ("p", "afternoon", "下午"), ("evening", "tonight", "night", "晚", "晚上", "晚间")


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
        return _paired(sample["pairs"], reply)
    return True


def plain(text: str) -> str:
    """Text with everything evened out that does not matter: width, case, thousands commas, quotes, dashes, white space."""
    text = unicodedata.normalize("NFKC", text).lower().replace("—", " - ")  # this one parts words, the others may join them
    text = re.sub(r"[‘’‚`´]", "'", re.sub(r"[“”„«»]", '"', re.sub(r"[‐‑‒–−]", "-", text)))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"\s+", " ", text)


def _places(value: str, said: str, kind: str) -> list[tuple[int, int]]:
    """Where a value stands in an evened-out reply, in whatever form: (start, end) of each mention."""
    value = plain(value).strip()
    if _TIME.fullmatch(value):
        wanted = _clock(_TIMES.match(value))
        return [m.span() for m in _TIMES.finditer(said) if _clock(m) == wanted]
    forms = [value.removeprefix("the ") if kind == "order" else value]
    if kind == "count" and value.isdigit():
        forms += [*number_words(int(value), "en"), *number_words(int(value), "zh")]
    found = []
    for form in forms:
        if kind == "code":
            form = form.strip("'\"")
        before, after = r"(?<![a-z0-9])(?<!\d\.)", r"(?![a-z0-9])(?!\.\d)"
        if kind == "code":  # a part of a longer name, path or number is another value
            before, after = r"(?<![a-z0-9_.+/-])", r"(?![a-z0-9_+-]|[./][a-z0-9_])"
        elif kind == "count" and form.isascii():  # twenty-two holds no two
            before += "(?<!ty-)"
        elif kind == "count":
            before, after = r"(?<![一二两三四五六七八九十百第])", r"(?=[个项种座处家条人名只])"
        found += [m.span() for m in re.finditer(before + re.escape(form).replace(r"\ ", " ") + after, said)]
    return found


def _clock(match: re.Match) -> tuple[int, int]:
    said = [part for part in match.group(1, 2, 5, 6) if part]
    hour, minute = int(match[3]), int(match[4])
    late, evening = any(part in _AFTERNOON for part in said), any(part in _EVENING for part in said)
    if hour == 12:
        return (0 if said and not late else 12), minute
    return (hour + 12 if (late or evening) and hour < 12 else hour), minute


def _in_order(values: Sequence[str], said: str, kind: str) -> bool:
    places = [_places(value, said, kind) for value in values]
    chosen = [p[-1] for p in places] if all(len(p) > 1 for p in places) else [p[0] for p in places]
    return all(a < b for a, b in itertools.pairwise(chosen))


def _paired(pairs: Sequence[Sequence[str]], reply: str) -> bool:
    """True when no other pairing puts keys and values as near to each other as the right one.

    Commas and "and", and more so ends of lines and sentences, keep apart. "a and b are 1 and 2" is paired in order.
    """
    text = "\n".join(line for part in reply.splitlines() if (line := plain(part).strip()))
    said = text.replace("\n", " ")
    keys = [_places(key, said, "order") for key, _ in pairs]
    values = [_places(value, said, "list") for _, value in pairs]
    if not all(keys):
        return all(a < b for a, b in itertools.pairwise(spans[0] for spans in values))
    weights = [1] * len(text)
    for match in re.finditer(r"([\n;。!?]|\.(?=\s))|[,、]|\band\b", text):
        weights[match.start()] = 1000 if match[1] else 100
    far = list(itertools.accumulate(weights, initial=0))
    gaps = [[_gap(k, v, far) for v in values] for k in keys]
    cost = lambda order: [sum(gaps[i][j] ** power for i, j in enumerate(order)) for power in (1, 2)]  # noqa: E731
    right, *others = itertools.permutations(range(len(pairs)))
    return all(cost(right) < cost(other) for other in others)


def _gap(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]], far: Sequence[int]) -> int:
    """How far the nearest mentions of two strings are apart."""
    spans = sorted([(*span, 0) for span in one] + [(*span, 1) for span in other])
    return min(max(0, far[b[0]] - far[a[1]]) for a, b in itertools.pairwise(spans) if a[2] != b[2])
