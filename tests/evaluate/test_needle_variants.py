import re

import pytest

from longalign_lib.evaluate import needle as N
from longalign_lib.evaluate.needle_prompt import SEVERAL, HayHoldsAnswer, check_hay
from longalign_lib.evaluate.needle_variants import COUNTS, MOST, VARIANTS, depths_of, draw
from longalign_lib.evaluate.needles import Needle, default_haystack, parts_found, recall

EVERY = [(v, language) for v in VARIANTS for language in ("en", "zh")]


def solve(needle: Needle) -> set[str]:
    """Answer a drawn question from the hidden sentences alone, by other means than the drawing: regular expressions."""
    if needle.variant == "chain":  # follow the links to a fixed point
        value = re.search(r"\d{4}", needle.question)[0]
        start = re.compile(r"The number (?P<v>\d+) is written on the card (?P<a>\w+)\.|卡片(?P<za>..)上写着数字(?P<zv>\d+)。")
        link = re.compile(r"The card (\w+) repeats what is written on the card (\w+)\.|卡片(..)上写的和卡片(..)上的一样。")
        starts = [m.groupdict() for t in needle.texts if (m := start.fullmatch(t))]
        links = [tuple(g for g in m.groups() if g) for t in needle.texts if (m := link.fullmatch(t))]
        assert len(starts) == 2 and len(starts) + len(links) == len(needle.texts)
        shown = {s["a"] or s["za"] for s in starts if (s["v"] or s["zv"]) == value}
        while more := {b for b, a in links if a in shown} - shown:
            shown |= more
        return shown
    codes = [re.search(r"\d{4}", t)[0] for t in needle.texts]
    if needle.variant == "keys":  # the sentence whose names stand in the question
        said = [[w for w in re.findall(r"[A-Z]\w+|[a-z]{4,}", t) if w in needle.question] for t in needle.texts]
        if needle.language == "zh":
            said = [[c for c in t if c in needle.question] for t in needle.texts]
        best = max(range(len(said)), key=lambda i: len(said[i]))
        return {codes[best]}
    return set(codes)


@pytest.mark.parametrize(("variant", "language"), EVERY)
def test_families_are_seeded_distinct_and_answerable(variant, language):
    family = draw(variant, 60, 3, language)
    assert family == draw(variant, 60, 3, language) != draw(variant, 60, 4, language)
    assert len({n.texts for n in family}) == 60 and len({n.question for n in family}) > 20
    for n in family:
        assert (n.variant, n.language) == (variant, language)
        assert recall(" ".join(n.texts), n.parts) == 1 and not any(parts_found(n.question, n.parts))
        assert not set(n.parts) & set(n.wrong) and len(set(n.parts + n.wrong)) == len(n.parts + n.wrong)
        assert len(set(n.texts)) == len(n.texts) == COUNTS[variant] * (2 if variant == "chain" else 1)
        if variant != "single":
            assert solve(n) == set(n.parts)
    if variant not in ("single", "chain"):  # several forms, not one
        forms = ("code", "locker", "label") if language == "en" else ("密码", "储物柜", "编号")
        assert all(any(word in n.question for n in family) for word in forms)


@pytest.mark.parametrize(("variant", "wrong", "parts"), [("keys", 3, 1), ("chain", 3, 3), ("several", 0, 3), ("values", 0, 3)])
def test_what_each_variant_asks(variant, wrong, parts):
    for n in draw(variant, 20):
        assert (len(n.wrong), len(n.parts)) == (wrong, parts)
        if variant == "values":  # one thing, several values
            assert len({re.sub(r"\d{4}", "", t) for t in n.texts}) == 1
    assert len(draw(variant, 5, count=MOST)[0].texts) == (2 * MOST if variant == "chain" else MOST)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"variant": "many"}, r"'many'.*single, several, keys, values, chain"), ({"variant": "keys", "language": "fr"}, "'fr'.*en, zh"),
        ({"variant": "keys", "count": 1}, "2 to 8, got 1"), ({"variant": "chain", "count": 9}, "got 9"),
        ({"variant": "single", "count": 2}, "1 to 1, got 2"), ({"variant": "values", "count": True}, "True"),
    ],
)  # fmt: skip
def test_bad_draws(args, words):
    with pytest.raises(ValueError, match=words):
        draw(n=1, **args)


def test_depths_of_several():
    assert depths_of(40, 3, "after") == [40, 60, 80] and depths_of(100, 2, "after") == [100, 100]
    assert depths_of(0, 4, "around") == [0, 25, 50, 75] and depths_of(50, 4, "around") == [50, 75, 0, 25]
    assert depths_of(100, 2, "around") == [100, 50]
    with pytest.raises(ValueError, match=r"'near'.*after or around"):
        depths_of(0, 2, "near")


@pytest.mark.parametrize(("variant", "language"), EVERY)
@pytest.mark.parametrize("depth", [0, 50, 100])
def test_every_sentence_is_placed_on_a_boundary_at_its_own_depth(any_tokenizer, variant, language, depth):
    tok, length = any_tokenizer, 1400 if language == "en" else 3200
    hay = default_haystack(1, language)
    for needle in draw(variant, 2, depth, language):
        p = N.build_prompt(tok, needle, hay, length, depth)
        assert length - N.TOLERANCE <= p.tokens <= length == p.length
        context = p.text.split("<text>\n")[1].split("\n</text>")[0]
        scaffold = SEVERAL if variant in ("several", "values", "chain") else N.SCAFFOLDS
        assert p.message == scaffold[language].format(context=context, question=needle.question)
        assert list(tok.apply_chat_template(p.messages, add_generation_prompt=True)["input_ids"]) == p.input_ids
        left, before = context, []
        for text in needle.texts:
            assert context.count(text) == 1
            lead = context[: context.index(text)]
            assert lead == "" or re.search(r"([.!?][\"')\]”’]*\s+|\n\s*\n\s*|[。！？][”’』」）]*\s*)$", lead), lead[-30:]
            left = left.replace(text, "")
            for other in needle.texts:
                lead = lead.replace(other, "")
            before.append(lead)
        # the hay is otherwise untouched, and every sentence stands where its depth says
        plain = "".join(left.split())
        assert "".join(hay.split()).startswith(plain)
        total = len(tok(left, add_special_tokens=False)["input_ids"])
        want = depths_of(depth, len(needle.texts), "around" if variant == "keys" else "after")
        longest = 100 * max(len(tok(s, add_special_tokens=False)["input_ids"]) for s in re.split(r"(?<=[.。！？])\s*", left)) / total
        for lead, achieved, asked in zip(before, p.depths_achieved, want, strict=True):
            mine = 100 * len(tok(lead, add_special_tokens=False)["input_ids"]) / total
            assert abs(mine - achieved) < 2.5 and abs(achieved - asked) <= max(longest, 4) + 2
        assert p.depth_achieved == p.depths_achieved[0]
        if variant != "keys":  # order is kept
            places = [context.index(text) for text in needle.texts]
            assert places == sorted(places)


def test_a_hay_that_answers_is_refused_with_its_words():
    hay = "The tide is low. It was in 4711 that Anneke came to Vasterlo with 12 men."
    several = Needle("A is 4711.", "A and B?", ("4711", "9999"), variant="several", others=("B is 9999.",))
    for needle, words in (
        (several, "'4711'"),  # one of several answers is enough
        (Needle("A is 9998.", "A?", ("9998",), variant="keys", others=("B is 4711.",), wrong=("4711",)), "'4711'"),
        (Needle("It is 5.", "What?", ("5",), keys=("Anneke", "Vasterlo")), "'Anneke', 'Vasterlo'"),
        (Needle("The tide is low.", "How is the tide?", ("low", "tide")), "The tide is low"),
    ):
        with pytest.raises(HayHoldsAnswer, match=words):
            check_hay(hay, needle)
    check_hay(hay, Needle("It is 5.", "What?", ("5", "men"), keys=("Anneke", "Orlavik")))  # half a key, half an answer


def test_a_needle_longer_than_the_context(tokenizer, hay):
    long = Needle("Zyx is " + " ".join(["very"] * 400) + " tall.", "How is Zyx?", ("tall",))
    with pytest.raises(ValueError, match=r"needle is longer than the context: it has \d+ tokens, length 300 was asked"):
        N.build_prompt(tokenizer, long, hay, 300, 50)


def test_grids_draw_variants(tokenizer):
    grid = N.build_grid(tokenizer, [400, 500], [0, 100], 2, variant="values", count=2, seed=5)
    assert {p.needle.variant for _, p in grid} == {"values"} and {len(p.needle.texts) for _, p in grid} == {2}
    assert len({p.needle.texts for _, p in grid}) > 5
    assert [p.text for _, p in grid] == [p.text for _, p in N.build_grid(tokenizer, [400, 500], [0, 100], 2, variant="values", count=2, seed=5)]
