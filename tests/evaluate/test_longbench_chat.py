import json
from types import SimpleNamespace

import pytest

from longalign_lib.data.documents import Document, read_samples
from longalign_lib.evaluate import longbench_chat as L

RECORD = {
    "id": "q1", "document_id": "d", "language": "en", "question": "What rose?", "reference": "The tide.",
    "answers": [{"text": "tide", "score": 4}, {"text": "The tide.", "score": 10}],
}  # fmt: skip
DOCUMENTS = {"d": Document("d", "The tide rose. It fell again. " * 120, "local", "en")}
ITEM = L.Item("q1", "d", "en", "What rose?", "The tide.", ())


def write(path, *records):
    path.write_text("\n".join(json.dumps(r) for r in records))
    return path


def test_our_own_set_reads_and_every_document_is_there():
    items, documents = L.read_items(), {d.id for d in read_samples()[0]}
    assert len(items) >= 10 and sum(i.language == "zh" for i in items) >= 2
    for item in items:
        assert item.document_id in documents, item.id
        scores = [a["score"] for a in item.answers]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True) and len(set(scores)) == 3


def test_best_answer_first_whatever_the_file_says(tmp_path):
    (item,) = L.read_items(write(tmp_path / "a.jsonl", RECORD))
    assert [a["score"] for a in item.answers] == [10, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "question missing"), ({"answers": None}, "answers missing"),
        ({"reference": 3}, "reference"),
        ({"answers": [{"text": "x", "score": "9"}]}, "a number as its score"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named(tmp_path, change, message):
    write(tmp_path / "a.jsonl", RECORD)
    write(tmp_path / "b.jsonl", RECORD | {"id": "q2"}, RECORD | {"id": "q3"} | change)
    with pytest.raises(ValueError, match=rf"b.jsonl, record 2 \(q3\).*{message}"):
        L.read_items(tmp_path)


def test_doubles_and_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .jsonl"):
        L.read_items(tmp_path)
    with pytest.raises(ValueError, match=r"occurs twice"):
        L.read_items(write(tmp_path / "a.jsonl", RECORD, RECORD))
    (tmp_path / "a.jsonl").write_text('{"id": ')
    with pytest.raises(ValueError, match=r"a.jsonl, line 1"):
        L.read_items(tmp_path)


@pytest.mark.parametrize("window", [200, 333, 700])
def test_prompt_fits_and_loses_its_middle(any_tokenizer, window):
    p = L.build_prompt(any_tokenizer, ITEM, DOCUMENTS["d"].text, window, 20)
    ids = any_tokenizer.apply_chat_template(p.messages, add_generation_prompt=True)["input_ids"]
    assert len(ids) == p.tokens and window - 20 - 10 <= p.tokens <= window - 20
    content = p.messages[0]["content"]
    assert (
        content.startswith("The tide rose.")
        and content.endswith("What rose?")
        and "[...]" in content
        and p.left_out > 0
    )
    whole = L.build_prompt(any_tokenizer, ITEM, DOCUMENTS["d"].text, 5000, 20)
    assert whole.left_out == 0 and DOCUMENTS["d"].text in whole.messages[0]["content"]


def test_no_room_for_the_document(tokenizer):
    with pytest.raises(ValueError, match=r"window of 60 tokens has no room.*q1.*ask for a window of (\d+)") as error:
        L.build_prompt(tokenizer, ITEM, DOCUMENTS["d"].text, 60, 20)
    enough = int(str(error.value).split("window of ")[-1].split()[0])
    assert L.build_prompt(tokenizer, ITEM, DOCUMENTS["d"].text, enough, 20).tokens <= enough - 20


def test_model_answers_are_kept_and_not_asked_again(tokenizer, model, tmp_path, make_model, monkeypatch):
    items = [ITEM, L.Item("q2", "d", "en", "What fell?", "The tide.", ())]
    out = tmp_path / "answers.jsonl"
    options = {"window": 300, "max_new_tokens": 8, "out": out, "progress": False}
    first = L.answer_items(model, tokenizer, items, DOCUMENTS, **options)
    assert first.status.tolist() == ["ok", "ok"] and (first.left_out > 0).all() and (first.tokens <= 292).all()
    with monkeypatch.context() as patch:
        patch.setattr(L.Greedy, "answer", lambda *_: pytest.fail("asked again"))
        assert L.answer_items(model, tokenizer, items, DOCUMENTS, **options).answer.tolist() == first.answer.tolist()
    other = L.answer_items(make_model(seed=3), tokenizer, items, DOCUMENTS, **options)
    assert not set(other.key) & set(first.key)


def test_an_endpoint_that_fails_once_keeps_the_rest(tokenizer, tmp_path):
    class Endpoint:
        model, calls = "m", 0

        def chat(self, messages, max_tokens, temperature):
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("HTTP 503")
            return SimpleNamespace(text=f"answer {self.calls}")

    endpoint, items = Endpoint(), [ITEM, L.Item("q2", "d", "en", "What fell?", "The tide.", ())]
    options = {"window": 300, "max_new_tokens": 8, "out": tmp_path / "a.jsonl", "progress": False}
    frame = L.answer_items(endpoint, tokenizer, items, DOCUMENTS, **options)
    assert "HTTP 503" in frame.status[0] and frame.answer[1] == "answer 2"
    assert L.answer_items(endpoint, tokenizer, items, DOCUMENTS, **options).answer.tolist() == ["answer 3", "answer 2"]


def test_a_missing_document_is_named(tokenizer, model):
    with pytest.raises(KeyError, match=r"no document for d; there are x"):
        L.answer_items(model, tokenizer, [ITEM], {"x": DOCUMENTS["d"]}, 300)
