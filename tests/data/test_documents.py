"""Readers account for every file; cuts keep their promises."""

from __future__ import annotations

import pytest

from longalign_lib.data import documents as D
from longalign_lib.data.text import language_of, token_ids

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


def test_what_cannot_be_used_is_rejected_and_what_is_cleaned_is_noted():
    rejected, cleaned = [], []
    texts = ["ok", "a\u200bb\u200b", "  ", "x\x00y", "half \ud800 of one", "\ufffd" * 3 + "abc", "ok"]
    documents = [doc(i, text) for i, text in enumerate(texts)] + [doc(0, "another")]
    kept = D.accept(documents, rejected, cleaned)
    assert [(d.id, d.text) for d in kept] == [("d0", "ok"), ("d1", "ab"), ("d6", "ok")]
    assert cleaned == [{"id": "d1", "removed": {"U+200B": 2}}]
    reasons = [(r["id"], r["reason"]) for r in rejected]
    assert [id for id, _ in reasons] == ["d2", "d3", "d4", "d5", "d0"]
    for (_, reason), word in zip(reasons, ("empty", "zero byte", "lone surrogate", "replacement", "duplicate id")):
        assert word in reason


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 101)
    assert D.read_text(tmp_path / "a.txt", 101) == ("x" * 101, None)
    assert "101 bytes, the limit for one document is 100" in D.read_text(tmp_path / "a.txt", 100)[1]
    assert "cannot be read (No such file" in D.read_text(tmp_path / "b.txt")[1]


def test_what_python_carries():
    topics, source = D.python_topics(), D.python_source(["argparse", "json.decoder"])
    assert len(topics) > 50 and sum(len(d.text) for d in topics) > 300_000
    assert "class ArgumentParser" in source[0].text and source[1].id == "module:json.decoder"
    assert len(D.python_source()) == len(D.STDLIB_MODULES)
    for bad in ("sys", "no_such_module", "no.such"):
        with pytest.raises(ValueError, match=f"'{bad}' has no Python source"):
            D.python_source([bad])


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
