"""Near-duplicates against brute force: nothing is removed falsely, nearly everything is found, always the same."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.data import dedup as D
from longalign_lib.data.documents import Document, python_topics

WORDS = [f"{a}{b}" for a in ("ta", "ri", "mo", "lu", "ke", "sa", "ve") for b in ("n", "st", "rd", "mp", "lo", "x", "ch")]
HAN = [chr(0x4E00 + 7 * i) for i in range(400)]


def units_of(text: str) -> list[str]:
    """Oracle: one unit after the other, without the pattern of the module."""
    units, word = [], ""
    for c in text.lower() + " ":
        han = "\u3400" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff"
        if c.isalnum() and not han:
            word += c
            continue
        units += [word] if word else []
        units += [c] if han else []
        word = ""
    return units


def brute(a: str, b: str) -> float:
    def grams(text):
        units = units_of(text)
        return {tuple(units[i : i + 5]) for i in range(max(1, len(units) - 4))}

    x, y = grams(a), grams(b)
    return len(x & y) / len(x | y)


def edited(text: str, rate: float, draw: random.Random, chinese: bool) -> str:
    pieces = list(text) if chinese else text.split()
    alphabet = HAN if chinese else WORDS
    changed = [draw.choice(alphabet) if draw.random() < rate else piece for piece in pieces]
    return ("" if chinese else " ").join(changed)


def corpus(pairs: int, seed: int) -> list[Document]:
    """Documents, each followed by an edited copy of itself: similarities from 0.3 to 1."""
    draw = random.Random(seed)
    documents = []
    for i in range(pairs):
        chinese = i % 2 == 1
        text = "".join(draw.choices(HAN, k=300)) if chinese else " ".join(draw.choices(WORDS, k=300))
        copy = edited(text, draw.uniform(0, 0.08), draw, chinese)
        documents += [Document(f"{i}", text, "local", "zh" if chinese else "en"), Document(f"{i}'", copy, "local", "en")]
    draw.shuffle(documents)
    return documents


@settings(max_examples=200, deadline=None)
@given(st.text("ab中文 .\nA1é", max_size=60), st.text("ab中文 .\nA1é", max_size=60))
def test_similarity_is_the_exact_one(a, b):
    if units_of(a) and units_of(b):
        assert D.jaccard(D.shingles(a), D.shingles(b)) == pytest.approx(brute(a, b))


def test_odd_texts():
    assert len(D.shingles("")) == len(D.shingles(" \n")) == 0
    assert D.jaccard(D.shingles(""), D.shingles("")) == 0.0
    assert D.jaccard(D.shingles("?!"), D.shingles("? !")) == 1.0  # signs alone: characters
    assert D.jaccard(D.shingles("One two"), D.shingles("one, TWO.")) == 1.0
    assert D.jaccard(D.shingles("one two"), D.shingles("two one")) == 0.0
    assert D.shingles("x " * 3).tolist() != D.shingles("x " * 2).tolist()
    # crc32 and adler32 collide for short words; together they must not
    short = ["".join(w) for n in (1, 2, 3) for w in itertools.product("abcdefghijklmnop", repeat=n)]
    assert len({tuple(D.shingles(w)) for w in short}) == len(short)


def test_nothing_is_removed_falsely_and_nearly_all_is_found():
    documents = corpus(150, 0)
    kept, removed = D.remove_near_duplicates(documents, threshold=0.8)
    by_id = {d.id: d for d in documents}
    assert len(kept) + len(removed) == len(documents) and [d.id for d in kept] == [d.id for d in documents if d in kept]
    kept_ids = {d.id for d in kept}
    for note in removed:
        exact = brute(by_id[note["id"]].text, by_id[note["duplicate_of"]].text)
        assert exact >= 0.8 and note["jaccard"] == pytest.approx(exact) and note["duplicate_of"] in kept_ids
        assert f"near-duplicate of {note['duplicate_of']} (Jaccard 0." in note["reason"] or exact == 1
        longer = len(D.shingles(by_id[note["duplicate_of"]].text)), len(D.shingles(by_id[note["id"]].text))
        assert longer[0] >= longer[1]
    true = [i for i in range(150) if brute(by_id[f"{i}"].text, by_id[f"{i}'"].text) >= 0.8]
    found = {note["id"].strip("'") for note in removed}
    assert len(true) > 40 and len(removed) < 140, "the corpus must hold both kinds"
    assert len(found & {str(i) for i in true}) / len(true) >= 0.97
    assert all(kept_pair not in found for kept_pair in {str(i) for i in range(150)} - {str(i) for i in true})


def test_the_promised_recall_is_the_measured_one():
    assert D.recall_at(0.8) >= 0.99 and D.recall_at(0.9) > 0.9999 and D.recall_at(0.3) < 0.1
    for threshold in (0.1, 0.5, 0.9, 1.0):
        assert D.recall_at(threshold, threshold) >= 0.98
    proposed = 0
    for i in range(120):  # pairs of similarity 0.6: 60 of 100 + 2 * 33 shingles apart
        shared = list(range(i * 1000, i * 1000 + 60))
        index = D._index(0.8)
        rows = [D.np.array(shared + [10**6 + i * 100 + side * 40 + k for k in range(20)], dtype=D.np.uint64) for side in (0, 1)]
        hashed = [D.np.unique((row * D._MIX) ^ ((row * D._MIX) >> D.np.uint64(31))) for row in rows]
        assert D.jaccard(*hashed) == pytest.approx(0.6)
        index.insert(0, D._minhash(1, D._signature(hashed[0], 1)))
        proposed += bool(index.query(D._minhash(1, D._signature(hashed[1], 1))))
    expected = D.recall_at(0.6)
    assert abs(proposed / 120 - expected) < 4 * (expected * (1 - expected) / 120) ** 0.5


def test_order_and_hash_seed_do_not_matter():
    documents = corpus(30, 5)
    first = {(n["id"], n["duplicate_of"]) for n in D.remove_near_duplicates(documents)[1]}
    for seed in (1, 2):
        again = random.Random(seed).sample(documents, len(documents))
        assert {(n["id"], n["duplicate_of"]) for n in D.remove_near_duplicates(again)[1]} == first
    code = (
        "from longalign_lib.data.dedup import shingles, _signature\n"
        "print(shingles('one two three four five six 中文').tolist(), _signature(shingles('a b c d e f'), 1).tolist()[:9])"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": h}, capture_output=True, text=True, check=True).stdout
        for h in ("0", "1")
    }
    assert len(outputs) == 1 and outputs != {""}


def test_chains_and_exact_copies():
    text = python_topics()[3].text * 2
    documents = [Document(f"{c}", text, "local", "en") for c in "cab"] + [Document("longer", text + " And one more.", "local", "en")]
    kept, removed = D.remove_near_duplicates(documents)
    assert [d.id for d in kept] == ["longer"] and {n["duplicate_of"] for n in removed} == {"longer"}
    kept, removed = D.remove_near_duplicates(documents[:3], threshold=1.0)
    assert [d.id for d in kept] == ["a"] and all(n["jaccard"] == 1 for n in removed)
    # a ~ b and b ~ c do not make a ~ c: what is removed is near what is kept
    kept, removed = D.remove_near_duplicates([Document(str(i), "", "local", "en") for i in range(3)])
    assert len(kept) == 3 and removed == []


def test_what_cannot_be():
    for threshold in (0, -1, 1.1):
        with pytest.raises(ValueError, match="give a Jaccard similarity above 0"):
            D.remove_near_duplicates([], threshold=threshold)
    with pytest.raises(ValueError, match="1 ids are repeated"):
        D.remove_near_duplicates([Document("a", "x", "local", "en")] * 2)
