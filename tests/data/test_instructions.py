"""Self-Instruct against scripted models: parsing, gates at work, resuming, and no document without an outcome."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest

from longalign_lib.data.documents import Document
from longalign_lib.data.instructions import (
    ASK_ANSWER,
    TASK_PROMPTS,
    TASKS,
    answer_prompt,
    build_instructions,
    parse_questions,
    question_prompt,
)
from longalign_lib.data.jsonl import read_jsonl
from longalign_lib.data.tokens import encode_chat
from longalign_lib.llm import ChatError, Reply

TEXT = "The gauge at Skerry Pier was bought in 1987. It writes metres. Ada Stannard reads it every morning at seven."
LIST = (
    "Of course:\n1. When was the gauge bought?\n2. What does it write?\n3. Who reads it?\n4. Where is it?\n5. Why so?"
)


def documents(n: int, language: str = "en") -> list[Document]:
    text = TEXT if language == "en" else "芦汀县的河流博物馆建于1998年，馆长是陆明远，每逢周二闭馆。"
    return [Document(f"{language}{i}", f"{text} {i}.", "books", language) for i in range(n)]


@dataclass
class Scripted:
    """A model that gives `questions` to the first kind of prompt and `answer` to the second."""

    questions: str = LIST
    answer: str = "The gauge at Skerry Pier was bought in 1987."
    finish: tuple[str, str] = ("stop", "stop")
    fail_on: str = ""
    label: str = "scripted"
    asked: list = field(default_factory=list)

    def chat(self, messages, max_tokens=256, temperature=0.0, seed=None):
        prompt = messages[-1]["content"]
        self.asked.append((prompt, max_tokens, temperature))
        if self.fail_on and self.fail_on in prompt:
            raise ChatError("no answer")
        wants_list = "1 to 5" in prompt or "1到5" in prompt
        text = self.questions if wants_list else self.answer
        return Reply(text, 10, 5, False, self.finish[0] if wants_list else self.finish[1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sure!\n1. **Who** built it?\n2) When\n   was that?\n\nHope this helps.", ["Who built it?", "When was that?"]),
        ("1、谁建的？\n2．什么时候？\n第3题 为什么？", ["谁建的？", "什么时候？", "为什么？"]),
        ("**Question 1:** What?\n**Question 2:** Why?", ["What?", "Why?"]),
        ("Question: a?\n\nAnswer: b\nQuestion: c?\nAnswer: d", ["a?", "c?"]),
        ("(1) one\n[2]. two\n", ["one", "two"]),
        ("- one\n* two\n• three", ["one", "two", "three"]),
        ("1.\nWhat is it?\n2.\n\nWhy?", ["What is it?", "Why?"]),
        ("1. How wide?\n1.5 metres is no item", ["How wide? 1.5 metres is no item"]),
        ("In 1990 it rained.\nThere were 3. floods", []),
        ("", []),
        ("1.\n2.\n3.", []),
    ],
)
def test_lists_are_parsed(text, expected):
    assert parse_questions(text) == expected


def test_prompts_hold_document_task_and_language():
    for language in ("en", "zh"):
        d = documents(1, language)[0]
        for task in TASKS:
            assert d.text in question_prompt(d, task) and TASK_PROMPTS[language][task] in question_prompt(d, task)
        assert answer_prompt(d, "Q?").startswith(d.text) and "Q?" in answer_prompt(d, "Q?")
    braces = Document("b", "a {document} {task} {0} }{", "github", "en")
    assert braces.text in question_prompt(braces, "general") and braces.text in answer_prompt(braces, "{x}?")
    with pytest.raises(ValueError, match="'poem' is unknown; accepted: general, summary"):
        question_prompt(braces, "poem")


def test_a_sample_has_the_published_schema_and_its_origin(tokenizer, tmp_path):
    model = Scripted()
    built = build_instructions(documents(3), model, tokenizer, tmp_path, seed=0)
    assert len(built.samples) == 3 and not built.rejected and not built.failed and len(model.asked) == 6
    for s, d in zip(built.samples, documents(3)):
        question = s["messages"][0]["content"].removeprefix(d.text + "\n\n")
        assert question in parse_questions(LIST)[:4]
        assert s["messages"][1] == {"role": "assistant", "content": model.answer}
        assert s["length"] == len(encode_chat(tokenizer, s["messages"])[0])
        assert (s["source"], s["language"], s["document_id"], s["model"]) == ("books", "en", d.id, "scripted")
        assert s["task"] in TASKS and len(s["prompt_hash"]) == 16
        assert [x["reason"] for x in s["dropped"]] == ["too short: 2 words, at least 3 wanted"]  # "Why so?"
    assert read_jsonl(tmp_path / "instructions.jsonl") == built.samples


def test_draws_depend_on_seed_and_document_alone(tokenizer, tmp_path):
    def run(name, docs, seed):
        built = build_instructions(docs, Scripted(), tokenizer, tmp_path / name, seed)
        return {s["document_id"]: (s["task"], s["messages"][0]["content"]) for s in built.samples}

    docs = documents(40)
    first = run("a", docs, 0)
    assert first == run("b", docs[::-1], 0) and first != run("c", docs, 1)
    assert set(Counter(task for task, _ in first.values())) == set(TASKS)
    assert len({user.rsplit("\n\n", 1)[1] for _, user in first.values()}) == 4  # every question gets its turn


def test_chinese_documents_get_chinese_prompts(tokenizer, tmp_path):
    model = Scripted("1. 博物馆的馆长是谁？\n2. 博物馆建于哪一年？", "河流博物馆的馆长是陆明远。")
    built = build_instructions(documents(2, "zh"), model, tokenizer, tmp_path, seed=0)
    assert len(built.samples) == 2 and all(s["language"] == "zh" for s in built.samples)
    assert all(ASK_ANSWER["en"][-20:] not in prompt for prompt, *_ in model.asked)


@pytest.mark.parametrize(
    ("model", "stage", "reason"),
    [
        (Scripted(questions=""), "question", "empty"),
        (Scripted(questions="It is a fine text."), "question", "unparsed"),
        (Scripted(questions="1. Why?"), "question", "too short"),
        (Scripted(questions="1. 博物馆的馆长是谁？"), "question", "wrong language"),
        (Scripted(questions="1. When was the gauge", finish=("length", "stop")), "question", "cut off"),
        (Scripted(answer=" "), "answer", "empty"),
        (Scripted(answer="I'm sorry, I can't help."), "answer", "refusal"),
        (Scripted(answer="Pineapples dance happily under volcanic moonlight."), "answer", "not grounded"),
        (Scripted(finish=("stop", "length")), "answer", "cut off"),
    ],
)
def test_every_rejection_is_kept_with_what_the_model_wrote(tokenizer, tmp_path, model, stage, reason):
    built = build_instructions(documents(2), model, tokenizer, tmp_path, seed=0)
    assert not built.samples and len(built.rejected) == 2
    for r in read_jsonl(tmp_path / "rejected.jsonl"):
        assert r["stage"] == stage and r["reason"].startswith(f"{reason}: ") and r["raw"] == model.questions
        assert r["answer"] == (model.answer.strip() if stage == "answer" else "")
        assert {"task", "source", "language", "document_id", "model"} <= set(r)


def test_a_rerun_asks_nothing_again_and_changes_nothing(tokenizer, tmp_path):
    docs = documents(6)
    build_instructions(docs[:2], Scripted(), tokenizer, tmp_path, seed=0)
    build_instructions(docs[2:4], Scripted(answer=""), tokenizer, tmp_path, seed=0)
    model = Scripted()
    built = build_instructions(docs, model, tokenizer, tmp_path, seed=0)
    assert len(model.asked) == 4  # two calls for each of the two new documents
    assert [s["document_id"] for s in built.samples] == ["en0", "en1", "en4", "en5"]
    assert [r["document_id"] for r in built.rejected] == ["en2", "en3"]
    again = Scripted()
    assert build_instructions(docs, again, tokenizer, tmp_path, seed=0) == built and not again.asked


def test_a_file_torn_by_a_kill_costs_only_the_torn_document(tokenizer, tmp_path):
    docs = documents(3)
    whole = build_instructions(docs, Scripted(), tokenizer, tmp_path, seed=0)
    path = tmp_path / "instructions.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    model = Scripted()
    built = build_instructions(docs, model, tokenizer, tmp_path, seed=0)
    assert built.samples == whole.samples and len(model.asked) == 2


def test_a_failing_endpoint_is_no_outcome(tokenizer, tmp_path):
    docs = documents(4)
    built = build_instructions(docs, Scripted(fail_on=" 1."), tokenizer, tmp_path, seed=0)
    assert [f["document_id"] for f in built.failed] == ["en1"] and len(built.samples) == 3 and not built.rejected
    assert len(build_instructions(docs, Scripted(), tokenizer, tmp_path, seed=0).samples) == 4
    with pytest.raises(ChatError, match="three documents in a row failed; finished work is kept"):
        build_instructions(documents(5, "zh"), Scripted(fail_on="博物馆"), tokenizer, tmp_path, seed=0)
