"""Verifiable samples: the answer is in the text, nowhere else, and the promised lengths and places are met."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from longalign_lib.data import facts
from longalign_lib.data.documents import Document, python_topics, read_samples
from longalign_lib.data.text import sentence_ends
from longalign_lib.data.tokens import encode_chat
from longalign_lib.data.verifiable import (
    ALL_KINDS,
    KINDS,
    Item,
    _unique,
    insert_sentences,
    is_right,
    make_item,
    retrieval_samples,
)


@pytest.fixture(scope="module")
def documents():
    return read_samples()[0] + python_topics()[:20]


@pytest.fixture(scope="module")
def samples(documents, tokenizer):
    return retrieval_samples(documents, tokenizer, 120, 900, seed=3, min_tokens=300, kinds=ALL_KINDS)


def test_schema_lengths_and_draws(samples, documents, tokenizer):
    assert len(samples) == 120 and {s["task"] for s in samples} == {f"verifiable:{k}" for k in ALL_KINDS}
    assert {s["language"] for s in samples} == {"en", "zh"}
    for s in samples:
        assert [m["role"] for m in s["messages"]] == ["user", "assistant"] and s["model"] == "none"
        assert s["length"] == len(encode_chat(tokenizer, s["messages"])[0]) and 300 <= s["length"] <= 900
    lengths = [s["length"] for s in samples]
    assert max(lengths) > 800 and min(lengths) < 400  # spread over the range, not heaped at one end
    assert len({s["prompt_hash"] for s in samples}) == 120
    again = retrieval_samples(documents, tokenizer, 5, 900, seed=3, min_tokens=300, kinds=ALL_KINDS)
    assert again == samples[:5]
    assert retrieval_samples(documents, tokenizer, 5, 900, seed=4, min_tokens=300, kinds=ALL_KINDS) != again


def test_every_answer_is_right_and_stands_in_the_text(samples):
    for s in samples:
        user, answer = (m["content"] for m in s["messages"])
        text = user.rsplit("\n\n", 1)[0]
        assert is_right(s, answer) and not is_right(s, "I do not know.")
        if not s["task"].endswith(":count"):
            assert all(value in text for value in s["expected"])
        if s["task"].endswith((":retrieve", ":hop", ":chain", ":list")):
            assert all(text.count(value) == 1 for value in s["expected"])
        if s["task"].endswith((":retrieve", ":chain")):  # the other facts are there, too, and are no answer
            assert all(text.count(value) == 1 for value in s["wrong"])
            assert not any(is_right(s, f"It is {value}.") for value in s["wrong"])
            assert not is_right(s, f"One of {', '.join([*s['expected'], *s['wrong']])}.") or not s["wrong"]
        if s["task"].endswith(":order"):
            places = [text.index(key) for key in s["expected"]]
            assert places == sorted(places) and not is_right(s, ", ".join(reversed(s["expected"])))


def test_no_question_holds_its_answer(samples):
    for s in samples:
        question = s["messages"][0]["content"].rsplit("\n\n", 1)[1]
        if not s["task"].endswith(":order"):
            assert not any(value.lower() in question.lower() for value in s["expected"])
            assert not is_right(s, question)


def test_a_chain_needs_both_of_its_facts(samples):
    chains = [s for s in samples if s["task"].endswith(":chain")]
    for s in chains:
        text, question = s["messages"][0]["content"].rsplit("\n\n", 1)
        ends = sentence_ends(text)
        about = [text[a:b] for a, b in zip([0, *ends[:-1]], ends) if s["expected"][0] in text[a:b]]
        assert len(about) == 1 and len(s["wrong"]) >= 1
        place = next(p for p in facts.HOP_PLACES[s["language"]] if p in question)
        assert place not in about[0].replace(text.split(about[0])[0], "")  # the value's sentence does not name the place
    assert len(chains) > 5 and {s["language"] for s in chains} == {"en", "zh"}


def test_draws_of_the_first_five_kinds_never_change():
    rng, drawn = np.random.default_rng(0), []
    for _ in range(200):
        for kind in KINDS:
            for language in ("en", "zh"):
                x = make_item(kind, language, "", rng)
                drawn.append((x.sentences, x.question, x.answer, x.expected, x.names, x.ordered))
    # Trained runs are repeated from these: a changed wording or an added draw changes their data.
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == "01d5f5f0d5aa41f7" and rng.integers(1000) == 841


def test_without_its_facts_the_text_is_the_documents_own(documents, tokenizer):
    one = [d for d in documents if d.id == "wikipedia_bridges"]
    for s in retrieval_samples(one, tokenizer, 20, 500, seed=0, min_tokens=200, max_facts=1):
        text = s["messages"][0]["content"].rsplit("\n\n", 1)[0]
        value = s["expected"][0]
        inserted = [(a, b) for a, b in zip([0, *sentence_ends(text)], sentence_ends(text)) if value in text[a:b]]
        assert len(inserted) == 1
        a, b = inserted[0]
        rest = text[:a] + text[b:]
        assert rest.strip() in one[0].text or (text[:a] + text[b:].lstrip()).strip() in one[0].text


def test_insertion_at_sentence_boundaries_and_depths():
    body = "One. Two. Three.\n\nFour."
    for depth, text, achieved in (
        (0.0, "NEW. One. Two. Three.\n\nFour.", 0.0),
        (1.0, "One. Two. Three.\n\nFour. NEW.", 1.0),
        (0.72, "One. Two. Three. NEW.\n\nFour.", round(16 / 23, 4)),
        (0.2, "One. NEW. Two. Three.\n\nFour.", round(4 / 23, 4)),
    ):
        assert insert_sentences(body, ["NEW."], [depth], "en") == (text, [achieved])
    assert insert_sentences("一。二。", ["新。"], [0.5], "zh")[0] == "一。新。二。"
    assert insert_sentences(body, ["A.", "B.", "C."], [0.2, 0.9, 0.2], "en")[0] == "One. A. C. Two. Three.\n\nFour. B."


def test_depths_cover_the_text(samples):
    depths = np.concatenate([s["depths"] for s in samples if s["task"].endswith((":retrieve", ":list", ":count", ":hop"))])
    assert np.histogram(depths, 4, range=(0, 1))[0].min() > 0.12 * len(depths)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_wording_of_every_family_carries_key_and_value(language):
    for family in facts.FAMILIES[language]:
        assert len(set(family.keys)) == len(family.keys) >= 8
        assert all("{k}" in t and "{v}" in t for t in family.facts) and all("{k}" in t for t in family.questions)
        assert all("{v}" in t for t in family.answers)
    rng = np.random.default_rng(0)
    for kind in ALL_KINDS:
        for _ in range(40):
            item = make_item(kind, language, "", rng)
            assert item.sentences and "{" not in item.question + item.answer + "".join(item.sentences)
            sample = {"task": f"verifiable:{kind}", "expected": item.expected, "wrong": item.wrong, "pairs": item.pairs}
            assert is_right(sample, item.answer), (sample, item.answer)


def test_names_that_the_document_holds_are_not_used():
    rng = np.random.default_rng(1)
    towns = " ".join(facts.HOP_PLACES["en"]) + " the north archive of everything"
    for _ in range(60):
        item = make_item("retrieve", "en", towns, rng)
        assert not any(name.lower() in towns.lower() for name in item.names)
    everything = " ".join(k for f in facts.ENGLISH for k in f.keys)
    with pytest.raises(ValueError, match="facts are left"):
        make_item("retrieve", "en", everything, rng)


def test_a_place_that_the_document_names_is_not_asked_about():
    rng = np.random.default_rng(2)
    for language in ("en", "zh"):
        *held, free = facts.HOP_PLACES[language]
        body = " ".join(f"The survey of {place} was signed by Ann Lee." for place in held)
        for kind in ("hop", "chain"):
            assert all(free in make_item(kind, language, body, rng).question for _ in range(3))
            with pytest.raises(ValueError, match=f"no {kind} facts are left"):
                make_item(kind, language, f"{body} {free}", rng)
    a, b = (make_item("chain", "en", body, np.random.default_rng(3)) for body in ("", "A text without places."))
    assert a == b  # other texts leave the draws alone


def test_names_wrapped_over_two_lines_are_seen():
    rng = np.random.default_rng(4)
    keys = [key for family in facts.ENGLISH for key in family.keys]
    for wrapped in ("\n".join(" ".join(keys).split(" ")), " ".join(keys).replace(" ", "  \n").replace("-", "-\n")):
        with pytest.raises(ValueError, match="facts are left"):
            make_item("retrieve", "en", wrapped, rng)
    with pytest.raises(ValueError, match="facts are left"):
        make_item("retrieve", "zh", "\n".join("".join(k for f in facts.CHINESE for k in f.keys)), rng)
    item = Item(("The code of the north vault is 5.",), "Which code?", "5", ("5",), ("the north vault",))
    assert _unique(item, "A line. The code of the north vault is 5.")
    assert not _unique(item, "Once more the north\nvault. The code of the north vault is 5.")


def test_short_documents_are_continued_with_others(tokenizer):
    short = [
        Document(f"d{i}", f"Topic {i} begins. " + "It goes on with plain words here. " * 20, "local", "en")
        for i in range(9)
    ]
    (s,) = retrieval_samples(short, tokenizer, 1, 800, seed=0, min_tokens=700)
    assert 700 <= s["length"] <= 800 and s["document_id"].count("+") >= 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kinds": ("retrieve", "riddle")}, r"\['riddle'\] unknown; accepted: retrieve, list"),
        ({"kinds": ()}, "unknown; accepted"),
        ({"documents": []}, "no documents given"),
        ({"min_tokens": 901}, "min_tokens 901 and max_tokens 900"),
        ({"max_tokens": 50, "min_tokens": 40}, "raise max_tokens"),
        ({"max_tokens": 90_000, "min_tokens": 80_000}, "hold too few tokens"),
    ],
)
def test_what_cannot_be_built_is_said(documents, tokenizer, change, says):
    arguments = {"documents": documents[:3], "n": 1, "max_tokens": 900, "seed": 0} | change
    with pytest.raises(ValueError, match=says):
        retrieval_samples(tokenizer=tokenizer, **arguments)
