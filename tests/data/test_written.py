"""Hand-written samples are the file's, joined with their documents; what cannot be joined is named."""

import json

from longalign_lib.data.documents import Document, read_samples
from longalign_lib.data.written import LONG, read_long_samples


def test_every_written_item_becomes_a_sample(tokenizer):
    items = [json.loads(line) for line in LONG.read_text(encoding="utf8").splitlines()]
    samples, rejected = read_long_samples()
    assert not rejected and [s["id"] for s in samples] == [i["id"] for i in items] and len(samples) >= 100
    texts = {d.id: d.text for d in read_samples()[0]}
    for item, sample in zip(items, samples, strict=True):
        said = [m["content"] for m in sample["messages"]]
        assert said == [texts[item["document_id"]] + "\n\n" + item["question"], item["answer"]]
        assert [m["role"] for m in sample["messages"]] == ["user", "assistant"] and sample["length"] == 0
    assert {s["source"] for s in samples} == {d.source for d in read_samples()[0]}
    first = read_long_samples([d for d in read_samples()[0] if d.id == items[0]["document_id"]], tokenizer=tokenizer)[0][0]
    assert first["length"] == len(tokenizer.apply_chat_template(first["messages"], tokenize=True, return_dict=True)["input_ids"])


def test_what_cannot_be_joined_is_named(tmp_path):
    rows = [{"id": "a", "document_id": "d", "task": "general", "language": "en", "question": "Q?", "answer": "A."},
            {"id": "b", "document_id": "gone", "task": "general", "language": "en", "question": "Q?", "answer": "A."},
            {"document_id": "d", "task": "general", "language": "en", "question": "Q?", "answer": ""}]  # fmt: skip
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples, rejected = read_long_samples([Document("d", "Text.", "books", "en")], file)
    assert [s["id"] for s in samples] == ["a"]
    assert rejected == [{"id": "b", "reason": "no document 'gone'"}, {"id": "record 3", "reason": "lacks answer"}]
