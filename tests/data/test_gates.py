"""Each gate lets the good through and names what is wrong with the bad."""

from __future__ import annotations

import pytest

from longalign_lib.data.gates import GATES, check_answer, check_question, grounding

DOCUMENT = (
    "The swing bridge at Marrick was built in 1874 by the engineer Ada Stannard. It carries the coast road over the "
    "river mouth and opens for vessels twice a day. Its iron trusses were replaced in 1921."
)
CHINESE = "芦汀县的河流博物馆建于1998年，馆长是陆明远。馆内收藏了三百多件渔具，每逢周二闭馆。"
QUESTION = "Who built the swing bridge at Marrick?"

GOOD_QUESTIONS = [
    (QUESTION, "en"), ("Summarise the history of the bridge.", "en"), ("List the years that the text gives", "en"),
    ("博物馆的馆长是谁？", "zh"), ("请总结这篇文章的内容", "zh"), ("How many C++ (1998) features are used?", "en"),
]  # fmt: skip
BAD_QUESTIONS = [
    ("", "en", "empty"), ("  \n", "en", "empty"), ("Why?", "en", "too short"), ("谁？", "zh", "too short"),
    ("博物馆的馆长是谁？", "en", "wrong language"), ("What is the museum for?", "zh", "wrong language"),
    ("The bridge has iron trusses of some age.", "en", "not a question"),
    ("博物馆收藏了渔具。", "zh", "not a question"),
    ("who built  the SWING bridge, at Marrick", "en", "duplicate"),
    ("(question about it)", "en", "not a question"), ("1998?", "en", "too short"),
]  # fmt: skip


@pytest.mark.parametrize(("question", "language"), GOOD_QUESTIONS)
def test_good_questions_pass(question, language):
    assert check_question(question, language, ["What else is there?"]) == ""


@pytest.mark.parametrize(("question", "language", "gate"), BAD_QUESTIONS)
def test_bad_questions_are_named(question, language, gate):
    reason = check_question(question, language, [QUESTION])
    assert reason.startswith(f"{gate}: ") and gate in GATES


GOOD_ANSWERS = [
    "It was built by the engineer Ada Stannard in 1874.", "Ada Stannard", "1874", "Ada Stannard built the bridge.",
    "The engineer of the swing bridge was Ada Stannard; its trusses were replaced later.",
]  # fmt: skip
BAD_ANSWERS = [
    ("", "empty"), ("I'm sorry, but I cannot answer that.", "refusal"),
    ("As an AI language model, I think so", "refusal"),
    ("这座桥是由一位工程师修建的。", "wrong language"), ("Who built the swing bridge at Marrick", "echo"),
    ("Isambard Brunel, a famous Victorian railway pioneer, designed everything.", "not grounded"),
    ("1901", "not grounded"), ("It is.", "too short"), ("18", "not grounded"),
]  # fmt: skip


@pytest.mark.parametrize("answer", GOOD_ANSWERS)
def test_good_answers_pass(answer):
    assert check_answer(answer, QUESTION, DOCUMENT, "en") == ""


@pytest.mark.parametrize(("answer", "gate"), BAD_ANSWERS)
def test_bad_answers_are_named(answer, gate):
    reason = check_answer(answer, QUESTION, DOCUMENT, "en")
    assert reason.startswith(f"{gate}: ") and gate in GATES


def test_chinese_answers():
    ask = ("博物馆的馆长是谁？", CHINESE, "zh")
    assert check_answer("河流博物馆的馆长是陆明远。", *ask) == ""
    assert check_answer("很抱歉，我无法回答。", *ask).startswith("refusal: ")
    assert check_answer("The head is Lu Mingyuan.", *ask).startswith("wrong language: ")
    assert check_answer("他在北京大学学习计算机科学与技术专业。", *ask).startswith("not grounded: ")
    assert check_answer("1998", *ask) == ""


def test_a_cut_off_answer_is_rejected_whatever_it_says():
    assert check_answer(GOOD_ANSWERS[0], QUESTION, DOCUMENT, "en", "length").startswith("cut off: ")


def test_grounding_is_a_share():
    assert grounding("engineer Stannard", DOCUMENT, "", "en") == 1
    assert grounding("engineer pineapple", DOCUMENT, "", "en") == 0.5
    assert grounding("is it so", DOCUMENT, "", "en") is None
    assert check_answer("engineer pineapple", QUESTION, DOCUMENT, "en", min_overlap=0.6).startswith("not grounded: 50%")
