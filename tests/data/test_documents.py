"""Readers account for every file; cuts and draws keep their promises; sentence ends are where a reader sees them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.data import documents as D
from longalign_lib.data.text import language_of, sentence_ends, token_ids

HEAD = '---\nid: {id}\ntitle: A: "title"\nsource: {source}\nlanguage: en\nlicence: CC0-1.0\n---\n\n{body}'


def doc(i: int, text: str = "Some text. More text.", **more) -> D.Document:
    return D.Document(f"d{i}", text, **({"source": "local", "language": "en"} | more))


def test_every_shipped_sample_is_read():
    documents, rejected = D.read_samples()
    assert rejected == []
    assert {d.source for d in documents} == set(D.SOURCES) and sum(d.language == "zh" for d in documents) >= 2
    for d in documents:
        assert d.language == language_of(d.text) and d.licence and d.title and not d.text.startswith("---")
        words = len(d.text) / 1.7 if d.language == "zh" else len(d.text.split())
        assert words >= 1500, f"{d.id} has about {words:.0f} words"


def test_samples_with_faults_are_rejected_with_reasons(tmp_path):
    def write(name, text):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    write("a.md", HEAD.format(id="one", source="arxiv", body="Body.\n---\nstill body"))
    write("b.txt", HEAD.format(id="empty", source="arxiv", body=" \n\u200b\n"))
    write("c.txt", "no front matter")
    write("d.txt", HEAD.format(id="x", source="myblog", body="Body."))
    write("e.txt", HEAD.format(id="one", source="books", body="Body."))
    write("f.txt", b"\xff\xfe\x41")
    write("g.txt", b"a\x00b")
    write("h.txt", HEAD.format(id="", source="books", body="Body."))
    write("README.md", "not a document")
    documents, rejected = D.read_samples(tmp_path)
    assert [(d.id, d.title, d.text) for d in documents] == [("one", 'A: "title', "Body.\n---\nstill body")]
    reasons = {r["id"]: r["reason"] for r in rejected}
    assert reasons["empty"] == "empty document"
    assert "front matter" in reasons["c.txt"] and "unknown source 'myblog'" in reasons["d.txt"]
    assert "duplicate id" in reasons["one"] and "UTF-8" in reasons["f.txt"] and "binary" in reasons["g.txt"]
    assert "lacks id" in reasons["h.txt"] and len(rejected) == 7


def test_a_folder_of_ones_own(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "code.py").write_text("x = 1\n")
    (tmp_path / "notes.md").write_text("这是中文。")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "rows.jsonl").write_text('{"text": "one", "id": "r1"}\n{"txt": "two"}\n{broken\n{"text": "four"}\n')
    documents, rejected = D.read_folder(tmp_path, source="wiki", language="auto")
    assert {d.id: (d.text, d.language) for d in documents} == {
        "notes.md": ("这是中文。", "zh"), "sub/code.py": ("x = 1", "en"), "r1": ("one", "en"),
        "rows.jsonl#2": ("four", "en"),
    }  # fmt: skip
    reasons = {r["id"]: r["reason"] for r in rejected}
    assert reasons["empty.txt"] == "empty document" and ".png" in reasons["picture.png"]
    assert "valid JSON" in reasons["rows.jsonl:3"] and 'no "text"' in reasons["rows.jsonl#1"]
    assert len(documents) + len(rejected) == 8  # 4 + 4 rows and files seen
    with pytest.raises(FileNotFoundError, match="no such folder"):
        D.read_folder(tmp_path / "gone")
    with pytest.raises(ValueError, match="'de' is unknown; accepted: en, zh, auto"):
        D.read_folder(tmp_path, language="de")


def test_what_python_carries():
    topics, source = D.python_topics(), D.python_source(["argparse", "json.decoder"])
    assert len(topics) > 50 and sum(len(d.text) for d in topics) > 300_000
    assert "class ArgumentParser" in source[0].text and source[1].id == "module:json.decoder"
    assert len(D.python_source()) == len(D.STDLIB_MODULES)
    for bad in ("sys", "no_such_module", "no.such"):
        with pytest.raises(ValueError, match=f"'{bad}' has no Python source"):
            D.python_source([bad])


def test_sampling_prefers_long_documents_in_proportion():
    documents = [doc(i) for i in range(4)]
    lengths = [1000, 2000, 3000, 4000]
    first = np.bincount([int(D.sample_documents(documents, lengths, 1, s)[0].id[1]) for s in range(2000)], minlength=4)
    assert np.abs(first / 2000 - np.array(lengths) / 10_000).max() < 0.035
    flat = np.bincount(
        [int(D.sample_documents(documents, lengths, 1, s, power=0)[0].id[1]) for s in range(2000)], minlength=4
    )
    assert np.abs(flat / 2000 - 0.25).max() < 0.035
    drawn = D.sample_documents(documents, lengths, 3, 7)
    assert drawn == D.sample_documents(documents, lengths, 3, 7) and len({d.id for d in drawn}) == 3
    assert {d.id for d in D.sample_documents(documents, lengths, 2, 0, max_tokens=2500)} == {"d0", "d1"}
    with pytest.raises(ValueError, match="5 documents wanted, 4 usable"):
        D.sample_documents(documents, lengths, 5, 0)
    with pytest.raises(ValueError, match="4 documents but 1 lengths"):
        D.sample_documents(documents, [3], 1, 0)


@pytest.mark.parametrize("limit", [1, 7, 50, 333])
def test_a_cut_is_a_prefix_within_the_limit_and_uses_most_of_it(tokenizer, limit):
    for d in D.read_samples()[0]:
        short = D.cut_to_tokens(d, tokenizer, limit) if limit > 3 or d.language == "en" else d
        assert d.text.startswith(short.text) and short.id == d.id
        if short is not d:
            used = len(token_ids(tokenizer, short.text))
            assert used <= limit and used >= 0.6 * limit - 3
            if limit == 333 and d.language == "en" and d.source != "github":
                assert short.text[-1] in ".!?\"')"


def test_a_cut_leaves_a_short_document_alone_and_refuses_the_impossible(tokenizer):
    d = doc(0)
    assert D.cut_to_tokens(d, tokenizer, 1000) is d
    with pytest.raises(ValueError, match="give at least 1"):
        D.cut_to_tokens(d, tokenizer, 0)
    with pytest.raises(ValueError, match="do not hold its first character"):
        D.cut_to_tokens(doc(0, "鹭"), tokenizer, 1)


def test_join_keeps_what_agrees():
    a, b = doc(0, "A.", title="T", licence="CC0"), doc(1, "B.", source="books", licence="CC0")
    joined = D.join([a, b])
    assert (joined.id, joined.text) == ("d0+d1", "T\n\nA.\n\n\nB.")
    assert (joined.source, joined.language, joined.licence) == ("mixed", "en", "CC0")
    with pytest.raises(ValueError, match="at least one"):
        D.join([])


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
