"""Lists of questions are read in every form that models write, and prompts hold what they must."""

from __future__ import annotations

import json
import random

import pytest

from longalign_lib.data.documents import Document
from longalign_lib.data.prompts import (
    ASK_ANSWER,
    TASK_PROMPTS,
    TASKS,
    answer_prompt,
    parse_questions,
    prompt_language,
    question_prompt,
)

AB, ZH = ["What is it?", "Why so?"], ["谁建的？", "什么时候？"]


@pytest.mark.parametrize(
    "form",
    ["{}. {}", "{}) {}", "({}) {}", "[{}] {}", "**{}.** {}", "**{}. {}**", "{}: {}", "{} - {}", "### {}. {}", "> {}. {}",
     "Q{}: {}", "**Q{}:** {}", "Question {}: {}", "**Question {}:** {}", "| {} | {} |", "{}\\. {}", "{}.{}", "  {}. \"{}\""],
)  # fmt: skip
def test_every_way_of_numbering(form):
    for intro in ("", "Sure! Here are five questions about the text:\n\n", "```\n"):
        listed = [form.format(i + 1, q) for i, q in enumerate(AB)]
        for glue in ("\n", "\n\n"):
            assert parse_questions(intro + glue.join(listed) + ("\n```" if "`" in intro else "")) == AB, (form, intro, glue)
    assert parse_questions("\n".join(form.format(i + 1, q) for i, q in enumerate(ZH))) == ZH


@pytest.mark.parametrize(
    "listed",
    ["1、{}\n2、{}", "1．{}\n2．{}", "一、{}\n二、{}", "（一）{}\n（二）{}", "①{}\n②{}", "第一，{}\n第二，{}", "第1题：{}\n第2题：{}",
     "第一个问题：{}\n第二个问题：{}", "问题一：{}\n问题二：{}", "问题1：{}\n问题2：{}", "好的，问题如下：\n\n1. {}\n\n2. {}"],
)  # fmt: skip
def test_chinese_ways_of_numbering(listed):
    assert parse_questions(listed.format(*ZH)) == ZH


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- What is it?\n- Why so?", AB),
        ("* What is it?\n• Why so?", AB),
        ("<ol><li>What is it?</li><li>Why so?</li></ol>", AB),
        ("First, What is it?\nSecond, Why so?", AB),
        ("I. What is it?\nII. Why so?", AB),
        ("a) What is it?\nb) Why so?", AB),
        ("1. What is it? 2. Why so?", AB),
        ("1. **What** is it?\n2. Why\n   so?\n\nHope this helps. Shall I go on?", AB),
        ("1.\nWhat is it?\n2.\n\nWhy so?", AB),
        ("1. **What is it?**\n2. _Why so?_", AB),
        ("1. What does the `__init__` of `A` do?\n2. What is 2**10?\n3. What does __enter__ give?\n4. **Is** `a**b` in `__pow__`?",
         ["What does the __init__ of A do?", "What is 2**10?", "What does __enter__ give?", "Is a**b in __pow__?"]),
        ("Here are my questions:\nWhat is it?\nWhy so?\nGood luck.", AB),
        ("<think>\n1. Not this one?\n</think>\n1. What is it?\n2. Why so?", AB),
        ("Question: What is it?\n\nAnswer: a gauge\nQuestion: Why so?\n**A:** because", AB),
        ("1. What is it?\n   - Look at the first page.\n2. Why so?\n   - It is in the second.", AB),
        ("1. **Theme:**\n   - What is it?\n2. **Cause:** Why so?", ["Theme: What is it?", "Cause: Why so?"]),
        ("1. How wide?\n1.5 metres is no item", ["How wide? 1.5 metres is no item"]),
        ("1. What does [\"x\"] hold?\n2. Why so?", ['What does ["x"] hold?', "Why so?"]),
        ("1. 第一抽水站是谁建的？\n2. 第二次呢？", ["第一抽水站是谁建的？", "第二次呢？"]),
        ("In 1990 it rained.\nThere were 3. floods", []),
        ("It is a fine text.", []),
        ("", []),
        ("1.\n2.\n3.", []),
        ("<think>1. What is it?", []),
    ],
)
def test_lists_are_parsed(text, expected):
    assert parse_questions(text) == expected


def test_json_whole_fenced_and_cut_off():
    for value in (AB, {"questions": AB}, {"1": AB[0], "2": AB[1]}, [{"question": q, "answer": "x"} for q in AB]):
        for wrap in ("{}", "```json\n{}\n```", "Here they are: {}", "{}\nHope this helps."):
            assert parse_questions(wrap.replace("{}", json.dumps(value, indent=1))) == AB, (value, wrap)
    assert parse_questions('["What is it?", "Why so?", "And wh') == AB
    assert parse_questions(json.dumps(['He said "no"?'])) == ['He said "no"?']
    assert parse_questions(json.dumps(ZH, ensure_ascii=False)) == ZH


@pytest.mark.parametrize("n", [1, 3, 5, 12])
def test_too_few_and_too_many_come_back_as_they_are(n):
    wanted = [f"What is part {'abcdefghijkl'[i]} about?" for i in range(n)]
    assert parse_questions("\n".join(f"{i + 1}. {q}" for i, q in enumerate(wanted))) == wanted


def test_two_megabytes_are_read_to_a_limit_and_hidden_signs_do_no_harm():
    for piece in ("[", '\\"', "*", "why ", "1.\n", "\n"):
        assert parse_questions("1. What is it?\n\n" + piece * (2_000_000 // len(piece)))[0] == "What is it?"
    assert parse_questions('["' + '\\"' * 1_000_000) == []
    assert parse_questions("\u200b1. What\u200b is it?\n\ufeff2. Why so?") == AB


def test_nothing_that_a_model_writes_breaks_the_parser():
    draw = random.Random(0)
    signs = ["1.", "2)", "- ", "Q1:", "[", "{", '"', "\n", "\n\n", "What?", "第一", "问题", "：", "```", "<li>", "\\", "\x00", "？", "|"]
    for _ in range(2000):
        found = parse_questions("".join(draw.choice(signs) for _ in range(draw.randint(0, 30))))
        assert all(isinstance(q, str) and q.strip() for q in found)


def test_prompts_hold_document_task_and_language():
    for language, text in (("en", "A gauge stands here."), ("zh", "这里有一支水尺。")):
        d = Document("d", text, "books", language)
        for task in TASKS:
            assert d.text in question_prompt(d, task) and TASK_PROMPTS[language][task] in question_prompt(d, task)
        assert answer_prompt(d, "Q?") == ASK_ANSWER[language].format(document=d.text, question="Q?")
        assert prompt_language(Document("d", text, "books", "auto")) == language
        asks, answers = question_prompt(d, "general"), answer_prompt(d, "Q?")
        end = asks.index(d.text) + len(d.text)
        assert asks[:end] == answers[:end]  # a server that keeps prefixes reads the document once
    with pytest.raises(ValueError, match=r"task 'poem' is unknown; accepted: general"):
        question_prompt(d, "poem")


def test_braces_in_a_document_are_text():
    d = Document("d", "x = {document} {task} {0}", "github", "en")
    assert "x = {document} {task} {0}" in question_prompt(d, "general")
