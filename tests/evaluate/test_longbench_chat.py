import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from llm_faults import FaultServer, completion

from longalign_lib.data.documents import Document, read_samples
from longalign_lib.evaluate import answering
from longalign_lib.evaluate import longbench_chat as L
from longalign_lib.evaluate.answering import Prompt, ask
from longalign_lib.llm import ChatClient

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
        ({"question": " "}, "question is empty"), ({"answers": None}, "answers must be list"),
        ({"reference": 3}, "reference must be str"),
        ({"answers": [{"text": "x", "score": "9"}]}, "score must be int or float"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named(tmp_path, change, message):
    write(tmp_path / "a.jsonl", RECORD)
    write(tmp_path / "b.jsonl", RECORD | {"id": "q2"}, RECORD | {"id": "q3"} | change)
    with pytest.raises(ValueError, match=rf"b.jsonl, line 2.*{message}"):
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
        patch.setattr(answering.Greedy, "answer", lambda *_: pytest.fail("asked again"))
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


CASE = {"idx": 1, "prompt": "The tide rose.\nIt fell.\n\nWhat rose?", "query": "What rose?", "answer": "The tide."}
SHOT = [{"answer": "tide", "score": 4}, {"answer": "The tide.", "score": 10}]


def folder(path, cases, shots=None):
    (path / "test_cases.json").write_text(cases if isinstance(cases, str) else json.dumps(cases, indent=1), encoding="utf-8")
    if shots is not None:
        (path / "few_shots.json").write_text(json.dumps(shots, indent=1), encoding="utf-8")
    return path


def test_published_files_keep_every_word_of_the_prompt(tmp_path, tokenizer):
    whole = CASE | {"idx": 2, "prompt": "What fell? Answer from this text: the tide.", "query": "What fell?"}
    (first, second), documents = L.read_published(folder(tmp_path, [CASE, whole], [SHOT, SHOT[:1]]))
    assert (first.id, first.language, first.reference) == ("lbc-1", "en", "The tide.")
    assert [a["score"] for a in first.answers] == [10, 4] and [a["text"] for a in second.answers] == ["tide"]
    for item, case in ((first, CASE), (second, whole)):
        prompt = L.build_prompt(tokenizer, item, documents[item.document_id].text, 500, 20)
        assert prompt.messages == [{"role": "user", "content": case["prompt"]}]


def test_a_document_file_is_read_and_no_path_leads_out(tmp_path):
    inner = tmp_path / "set"
    (inner / "docs").mkdir(parents=True)
    (inner / "docs" / "d.txt").write_text("The tide rose.")
    (tmp_path / "secret.txt").write_text("no")
    (inner / "link.txt").symlink_to(tmp_path / "secret.txt")
    case = {"query": "What rose?", "answer": "The tide.", "file": "docs/d.txt"}
    items, documents = L.read_published(folder(inner, [case]))
    assert documents[items[0].id].text == "The tide rose." and items[0].answers == ()
    for out in ("../secret.txt", str(tmp_path / "secret.txt"), "docs/../../secret.txt", "link.txt"):
        with pytest.raises(ValueError, match=r"test_cases.json, line 2: the document .* is outside the folder set/"):
            L.read_published(folder(inner, [case | {"file": out}]))
    with pytest.raises(FileNotFoundError, match=r"line 2: no document 'none.txt'"):
        L.read_published(folder(inner, [case | {"file": "none.txt"}]))


@pytest.mark.parametrize(
    ("cases", "shots", "message"),
    [
        ([{k: v for k, v in CASE.items() if k != "answer"}], None, r"line 2: answer missing"),
        ([CASE, CASE], None, r"line 8: idx 1 occurs twice"), ([CASE | {"answer": ""}], None, r"answer is empty"),
        ([CASE | {"query": 3}], None, r"query must be str"), ([CASE | {"idx": 2}], [SHOT], r"idx 2 has no entry"),
        ([CASE], [[{"answer": "x"}]], r"few_shots.json, line 2, example answer 1: score missing"),
        (json.dumps([CASE])[:-5], None, r"line 1 is not valid JSON.*cut off"), (json.dumps([CASE])[:-1], None, r"not closed"),
        ("", None, r"is empty"), ("[3]", None, r"must be a JSON object"), (json.dumps(CASE)[:-3], None, r"line 1 is not valid.*cut off"),
    ],
)  # fmt: skip
def test_bad_published_files_are_named(tmp_path, cases, shots, message):
    with pytest.raises(ValueError, match=message):
        L.read_published(folder(tmp_path, cases, shots))


def test_not_utf8(tmp_path):
    (tmp_path / "test_cases.json").write_bytes(b'[\n{"query": "\xff"}]')
    with pytest.raises(ValueError, match=r"test_cases.json, line 2 is not UTF-8"):
        L.read_published(tmp_path)


def test_a_torn_line_is_asked_again(tokenizer, model, tmp_path):
    options = {"window": 300, "max_new_tokens": 4, "out": tmp_path / "a.jsonl", "progress": False}
    first = L.answer_items(model, tokenizer, [ITEM], DOCUMENTS, **options)
    options["out"].write_bytes(options["out"].read_bytes()[:-20])  # what a kill in mid-write leaves
    again = L.answer_items(model, tokenizer, [ITEM], DOCUMENTS, **options)
    assert again.answer.tolist() == first.answer.tolist()
    assert len(answering.known_answers(options["out"])) == 1 and len(options["out"].read_text().splitlines()) == 2


KILLED = """
import os, signal, sys
from types import SimpleNamespace
from longalign_lib.evaluate.answering import Prompt, ask
class Endpoint:
    model, calls = "m", 0
    def chat(self, messages, max_tokens, temperature):
        self.calls += 1
        print(messages[0]["content"], file=sys.stderr)
        if self.calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return SimpleNamespace(text="to " + messages[0]["content"], finish_reason="stop")
prompts = [Prompt(str(n), [{"role": "user", "content": str(n)}]) for n in range(5)]
print([r["answer"] for r in ask(Endpoint(), None, prompts, sys.argv[1], progress=False)])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, root):
    def go(at):
        words = [sys.executable, "-c", KILLED, str(tmp_path / "a.jsonl"), str(at)]
        return subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=120)

    assert go(3).returncode == -signal.SIGKILL
    again = go(99)
    assert again.stdout.strip() == str([f"to {n}" for n in range(5)]), again.stderr
    assert [line for line in again.stderr.splitlines() if line.isdigit()] == ["2", "3", "4"]


def test_another_template_or_end_token_is_asked_anew(make_model, tokenizer, tmp_path, monkeypatch):
    model, prompts = make_model(), [Prompt("q", [{"role": "user", "content": "What rose?"}], 6)]
    options = {"out": tmp_path / "a.jsonl", "progress": False}
    (first,) = ask(model, tokenizer, prompts, **options)
    assert ask(model, tokenizer, prompts, **options) == [first] and len(options["out"].read_text().splitlines()) == 1
    monkeypatch.setattr(tokenizer, "chat_template", "[{{ messages[0]['content'] }}]")
    (other,) = ask(model, tokenizer, prompts, **options)
    assert other["key"] != first["key"] and other["answer"] == ask(model, tokenizer, prompts, progress=False)[0]["answer"]
    token = answering.Greedy(model, tokenizer).prefill(answering.rendered_ids(tokenizer, prompts[0].messages))[0]
    model.generation_config.eos_token_id = [2, token]
    assert ask(model, tokenizer, prompts, **options)[0]["answer"] == "" != other["answer"]


def test_an_empty_reply_is_an_answer_and_a_refusal_is_none(tmp_path):
    refused = json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": None, "refusal": "No."}}]}).encode()
    steps = [completion("", "stop")] * 2 + [completion("", "content_filter")] + [refused] * 2 + [completion(None, "length")]
    prompts = [Prompt(str(n), [{"role": "user", "content": str(n)}]) for n in range(5)]
    with FaultServer() as server:
        server.steps = [{"body": b} for b in steps] + [{"status": 400, "body": b"{}"}]
        rows = ask(ChatClient(server.url, "m", concurrency=1), None, prompts, tmp_path / "a.jsonl", progress=False)
        assert [(r["status"][:6], r["answer"], r["finish"]) for r in rows] == [
            ("ok", "", "stop"), ("failed", "", ""), ("failed", "", ""), ("ok", "", "length"), ("failed", "", "")]  # fmt: skip
        assert len(server.requests) == 7
        ask(ChatClient(server.url, "m", concurrency=1), None, prompts, tmp_path / "a.jsonl", progress=False)
        assert len(server.requests) == 10  # only what got no answer
