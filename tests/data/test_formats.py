"""Published formats to samples: what is kept, what is cut with a note, what is refused with a reason."""

from __future__ import annotations

import json

import pytest

from longalign_lib.data.chat import check_messages, encode_chat
from longalign_lib.data.formats import FORMATS, convert, kind_of, read_format, to_sample


def said(*turns: tuple[str, str]) -> dict:
    return {"id": "abc_0", "conversations": [{"from": who, "value": text} for who, text in turns]}


def turns_of(sample: dict) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in sample["messages"]]


def test_sharegpt():
    sample = to_sample(said(("system", "Be kind."), ("human", "q"), ("gpt", "a"), ("human", "你好吗"), ("chatgpt", "我很好,谢谢你的关心,今天天气不错。")))
    assert turns_of(sample) == [("system", "Be kind."), ("user", "q"), ("assistant", "a"), ("user", "你好吗"), ("assistant", "我很好,谢谢你的关心,今天天气不错。")]
    assert (sample["source"], sample["task"], sample["document_id"], sample["language"]) == ("sharegpt", "general", "abc_0", "zh")
    assert "mended" not in sample and to_sample(said(("human", "q"), ("gpt", "an English answer")))["language"] == "en"


@pytest.mark.parametrize(("turns", "left", "note"), [
    ([("gpt", "x"), ("human", "q"), ("gpt", "a")], ["q", "a"], ["1 turns before the first question cut"]),
    ([("human", "q"), ("gpt", "a"), ("human", "r")], ["q", "a"], ["the last question, without an answer, cut"]),
    ([("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", " \n"), ("human", "s"), ("gpt", "b")], ["q", "a"], ["cut before turn 3, an empty answer"]),
    ([("human", "q"), ("gpt", "a"), ("human", ""), ("gpt", "b")], ["q", "a"], ["cut before turn 2, an empty question"]),
    ([("system", " "), ("human", "q"), ("gpt", "a")], ["q", "a"], None),
    ([("system", "s"), ("gpt", "x"), ("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "")], ["s", "q", "a"],
     ["1 turns before the first question cut", "cut before turn 5, an empty answer"]),
])  # fmt: skip
def test_what_is_cut_from_a_conversation_is_noted(turns, left, note):
    sample = to_sample(said(*turns))
    assert [m["content"] for m in sample["messages"]] == left and sample.get("mended") == note
    check_messages(sample["messages"])


@pytest.mark.parametrize(("record", "says"), [
    (said(("human", "q"), ("gpt", "")), "nothing is left before an empty answer"),
    (said(("human", "q"), ("human", "r"), ("gpt", "a")), "message 1 is a second user turn in a row"),
    (said(("human", "q")), "non-empty list"), (said(("gpt", "a")), "first turn after the system message must be the user's"),
    (said(("human", "q"), ("bing", "a")), "turn 1 is from 'bing'; accepted: human, user, gpt"),
    (said(("human", "q"), ("gpt", None)), "turn 1 is of type NoneType"),
    ({"conversations": []}, "give a non-empty list of {from, value}"), ({"conversations": "no"}, "conversations is 'no'"),
    ({"conversations": ["x"]}, "turn 0 is from None"), ({"messages": "x"}, "messages is 'x'"), ({"messages": [1]}, "messages is [1]"),
    ({"messages": [{"role": "user", "content": 1}]}, "message 0 is of type int"), ({"instruction": "q", "output": None}, "output is of type NoneType"),
    ({"prompt": "q"}, "keys ['prompt'] is of no known format; accepted: conversations (ShareGPT)"),
])  # fmt: skip
def test_what_cannot_be_used_has_a_reason(record, says):
    rejected = []
    assert list(convert([record], None, rejected, "f.json")) == []
    assert rejected[0]["id"] == "f.json:1" and says in rejected[0]["reason"]


def test_alpaca_and_longalpaca():
    sample = to_sample({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert turns_of(sample) == [("user", "Add.\n\n1 2"), ("assistant", "3")] and sample["source"] == "alpaca"
    paper = {"instruction": "Below is a paper. Keep it in mind.\n" + "Text. " * 2000 + "What is shown?", "output": "This.", "file": "p1.pdf"}
    book = {"instruction": "There are some paragraphs of a book.\n" + "Text. " * 2000, "output": "That.", "file": None}
    short = {"instruction": "Write a paper plane poem.", "output": "Fold.", "file": ""}
    found = [to_sample(r) for r in (paper, book, short)]
    assert [kind_of(r) for r in (paper, book, short)] == ["longalpaca"] * 3 and kind_of({k: v for k, v in paper.items() if k != "file"}) == "longalpaca"
    assert [(s["source"], s["task"]) for s in found] == [("arxiv", "long-qa"), ("books", "long-qa"), ("general", "general")]
    assert found[0]["file"] == "p1.pdf" and "file" not in found[1]


def test_longalign_keeps_its_facts(tokenizer):
    record = {"messages": [{"role": "user", "content": "doc q"}, {"role": "assistant", "content": "a"}], "length": 8123, "task": "summary", "source": "c4"}
    sample = to_sample(record)
    assert (sample["length"], sample["task"], sample["source"], sample["messages"]) == (8123, "summary", "c4", record["messages"])
    assert (encode_chat(tokenizer, sample["messages"])[1] >= 0).any()
    bare = {"messages": record["messages"]}
    assert to_sample(bare | {"length": 9})["source"] == "longalign" and to_sample(bare)["source"] == "general"
    with pytest.raises(ValueError, match="kind is 'vicuna'; accepted: sharegpt, longalign, longalpaca, alpaca"):
        list(convert([record], "vicuna"))
    assert list(FORMATS) == ["sharegpt", "longalign", "longalpaca", "alpaca"]


def test_every_kind_of_file_reads_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [said(("human", "q"), ("gpt", f"a{i}")) for i in range(200)] + [said(("human", "q"), ("gpt", ""))]
    (tmp_path / "a.json").write_text("\n  " + json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    found = [read_format(tmp_path / f"a.{kind}") for kind in ("json", "jsonl", "parquet")]
    assert len(found[0][0]) == 200 and found[0][0] == found[1][0] == found[2][0]  # the same ids, from the records
    assert [r["id"] for _, rejected in found for r in rejected] == ["a.json:201", "a.jsonl:201", "a.parquet:201"]


@pytest.mark.parametrize("kind", FORMATS)
def test_records_of_another_kind_than_asked_for_are_rejections(tmp_path, kind):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    found, rejected = read_format(tmp_path / "a.jsonl", kind)
    assert not found and f"the keys ['text'] is no {kind} record" in rejected[0]["reason"]


def test_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.json: no such file"):
        read_format(tmp_path / "gone.json")
    (tmp_path / "a.json").write_text('[{"conversations": [')
    with pytest.raises(ValueError, match=r"a.json: not a JSON array .* may have been cut off"):
        read_format(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('[1, {"instruction": "q", "output": "a"}]')
    samples, rejected = read_format(tmp_path / "a.json")
    assert len(samples) == 1 and rejected == [{"id": "a.json:1", "reason": "item is a JSON int, not an object"}]
    (tmp_path / "a.jsonl").write_text('\n{"instruction": "q", "output": "a"}\n{"instruction": "q", "out')
    samples, rejected = read_format(tmp_path / "a.jsonl")
    assert len(samples) == 1 and "cut off" in rejected[0]["reason"] and rejected[0]["id"] == "a.jsonl:3" and samples[0]["document_id"] == "a.jsonl:2"


def test_a_speaker_that_is_no_word_and_numbers_without_end_are_rejections(tmp_path):
    rows = ['{"conversations": [{"from": ["human"], "value": "x"}]}', '{"messages": %s}' % ("9" * 5000), "[" * 100_000]
    (tmp_path / "s.jsonl").write_text("\n".join(rows) + "\n")
    samples, rejected = read_format(tmp_path / "s.jsonl")
    assert samples == [] and [r["id"] for r in rejected] == ["s.jsonl:1", "s.jsonl:2", "s.jsonl:3"]
    assert "turn 0 is from ['human']" in rejected[0]["reason"] and "not valid JSON" in rejected[1]["reason"]
