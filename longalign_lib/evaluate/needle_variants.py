"""Several sentences for one question: what one hidden fact does not test.

    several  facts about different things, all of them asked for           (retrieve many)
    keys     facts of one form about different things, one of them asked   (do not take a distractor)
    values   facts of one form about one thing, all of them asked          (do not stop at the first)
    chain    "card B repeats card A": every card that shows a number       (follow, do not match words)

The four are what multi-needle, multi-key, multi-value and variable-tracking tests ask elsewhere; here in prose, in English and
Chinese, drawn from a seeded family. A chain comes with a second chain of the same form and another number, so that naming
every card is no answer. ``wrong`` holds what only distractors say: an answer that holds any of it is no hit.

Where they go (`depths_of`): the asked-for depth is that of the first sentence. "after" puts sentence i of n at
depth + i (100 - depth) / n, in order, so at 100 all stand together at the end; "around" spreads them over the whole text,
sentence i at (depth + 100 i / n) modulo 100, so that distractors surround the one that is asked for.

Invariants as for `needles.needle_family`; the values of one needle differ from each other. Cost: milliseconds.
"""

from __future__ import annotations

import itertools
import random

from longalign_lib.evaluate import needles as base
from longalign_lib.evaluate.needles import Needle, needle_family

COUNTS = {"single": 1, "several": 3, "keys": 4, "values": 3, "chain": 3}  # sentences by default (a chain has twice as many)
SPREADS = {"single": "after", "several": "after", "keys": "around", "values": "after", "chain": "after"}
VARIANTS = tuple(COUNTS)
MOST = 8

# Forms of a fact: names to fill in, the sentence, its question, the sentence and question for several values of one thing.
_FORMS = {
    "en": (
        (
            ("gate", "town"), "The code that opens the {gate} in {town} is {value}.", "What is the code that opens the {gate} in {town}?",
            "One of the codes that open the {gate} in {town} is {value}.", "What are all {n} codes that open the {gate} in {town}?",
        ),
        (
            ("name", "town"), "{name} from {town} has the locker number {value}.", "What is the locker number of {name} from {town}?",
            "{name} from {town} has a locker with the number {value}.", "What are the numbers of all {n} lockers of {name} from {town}?",
        ),
        (
            ("colour", "thing", "name"), "The {colour} {thing} of {name} carries the label {value}.",
            "Which label does the {colour} {thing} of {name} carry?", "One label on the {colour} {thing} of {name} reads {value}.",
            "What do all {n} labels on the {colour} {thing} of {name} read?",
        ),
    ),
    "zh": (
        (
            ("name", "town"), "{name}在{town}的门牌密码是{value}。", "{name}在{town}的门牌密码是多少？",
            "{name}在{town}的门牌密码之一是{value}。", "{name}在{town}的全部{n}个门牌密码是什么？",
        ),
        (
            ("town", "name"), "{town}的{name}的储物柜号码是{value}。", "{town}的{name}的储物柜号码是多少？",
            "{town}的{name}有一个储物柜，号码是{value}。", "{town}的{name}的全部{n}个储物柜号码是什么？",
        ),
        (
            ("name", "thing"), "{name}的{thing}上贴着编号{value}。", "{name}的{thing}上贴着哪个编号？",
            "{name}的{thing}上贴着的编号之一是{value}。", "{name}的{thing}上贴着的全部{n}个编号是什么？",
        ),
    ),
}  # fmt: skip
_FILL = {
    "en": {"gate": base._GATES, "town": base._TOWNS, "name": base._NAMES, "colour": base._COLOURS, "thing": base._THINGS},
    "zh": {"town": base._ZH_TOWNS, "name": base._ZH_NAMES, "thing": base._ZH_THINGS},
}
_CHAIN = {
    "en": ("The number {value} is written on the card {a}.", "The card {b} repeats what is written on the card {a}.",
           "Which cards show the number {value}? Name all {n} of them."),
    "zh": ("卡片{a}上写着数字{value}。", "卡片{b}上写的和卡片{a}上的一样。", "哪些卡片上的数字是{value}？请列出全部{n}张。"),
}  # fmt: skip
# Names of cards. The Chinese ones never share a character between first and second place: no two side by side make a third.
_OPEN = {"en": ("Bal", "Cor", "Dun", "Fel", "Gor", "Hal", "Jor", "Kel", "Lum", "Mor", "Nal", "Pel"), "zh": tuple("岚溪屿岫泠澜峦汀崖渚")}
_CLOSE = {"en": ("vix", "dax", "mok", "zan", "tuk", "wen", "bry", "lop"), "zh": tuple("鸢鹂鹭隼鹞鸮鸥雁")}


def _keys(rng: random.Random, fields: tuple[str, ...], language: str, n: int) -> list[dict]:
    """``n`` different ways to fill the fields."""
    every = list(itertools.product(*(_FILL[language][f] for f in fields)))
    return [dict(zip(fields, chosen, strict=True)) for chosen in rng.sample(every, n)]


def _draw(rng: random.Random, variant: str, language: str, n: int) -> Needle:
    if variant == "chain":
        return _draw_chain(rng, language, n)
    codes = [str(v) for v in rng.sample(range(1000, 10_000), n)]
    fields, sentence, question, one_of, all_of = rng.choice(_FORMS[language])
    if variant == "values":
        (key,) = _keys(rng, fields, language, 1)
        texts = [one_of.format(**key, value=code) for code in codes]
        ask, parts, wrong, used = all_of.format(**key, n=n), codes, (), tuple(key.values())
    else:
        keys = _keys(rng, fields, language, n)
        texts = [sentence.format(**key, value=code) for key, code in zip(keys, codes, strict=True)]
        asks = [question.format(**key) for key in keys]
        if variant == "keys":
            ask, parts, wrong, used = asks[0], codes[:1], tuple(codes[1:]), tuple(keys[0].values())
        else:
            ask, parts, wrong, used = " ".join(f"({i}) {q}" for i, q in enumerate(asks, start=1)), codes, (), ()
    return Needle(texts[0], ask, tuple(parts), language, variant, tuple(texts[1:]), wrong, used)


def _draw_chain(rng: random.Random, language: str, n: int) -> Needle:
    names = ["".join(p) for p in rng.sample(list(itertools.product(_OPEN[language], _CLOSE[language])), 2 * n)]
    first, link, question = _CHAIN[language]
    values = [str(v) for v in rng.sample(range(1000, 10_000), 2)]
    chains = []
    for cards, value in zip((names[:n], names[n:]), values, strict=True):
        links = [link.format(a=a, b=b) for a, b in itertools.pairwise(cards)]
        chains.append([first.format(value=value, a=cards[0]), *links])
    texts = [text for pair in zip(*chains, strict=True) for text in pair]  # both chains in order, one link each in turn
    ask = question.format(value=values[0], n=n)
    return Needle(texts[0], ask, tuple(names[:n]), language, "chain", tuple(texts[1:]), tuple(names[n:]))


def draw(variant: str, n: int, seed: int = 0, language: str = "en", count: int | None = None) -> list[Needle]:
    """Draw ``n`` different needles of a variant.

    Args:
        variant: one of VARIANTS; "single" is `needles.needle_family`.
        count: sentences (of a chain: cards); by default as in COUNTS.

    Raises:
        ValueError: an unknown variant or language, a count that the variant does not take, more needles than there are.
    """
    if variant not in COUNTS:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    count = COUNTS[variant] if count is None else count
    low, high = (1, 1) if variant == "single" else (2, MOST)
    if isinstance(count, bool) or not isinstance(count, int) or not low <= count <= high:
        raise ValueError(f"variant {variant!r} takes a count of {low} to {high}, got {count!r}")
    if variant == "single":
        return needle_family(n, seed, language)
    if language not in _FORMS:
        raise ValueError(f"no needles in language {language!r}; there are {', '.join(_FORMS)}")
    rng, found = random.Random(f"{variant}-{language}-{seed}-{count}"), {}
    for _ in range(1000 + 20 * n):
        if len(found) >= n:
            return list(found.values())
        needle = _draw(rng, variant, language, count)
        found.setdefault(needle.texts, needle)
    raise ValueError(f"asked for {n} different needles, {variant!r} in {language!r} gave {len(found)}: ask for fewer")


def depths_of(depth: float, n: int, spread: str) -> list[float]:
    """Depths in percent for ``n`` sentences, the first at ``depth``; see the module's head for the two rules."""
    if spread == "after":
        return [depth + i * (100 - depth) / n for i in range(n)]
    if spread == "around":
        return [depth] + [(depth + 100 * i / n) % 100 for i in range(1, n)]
    raise ValueError(f"unknown spread {spread!r}; choose after or around")
