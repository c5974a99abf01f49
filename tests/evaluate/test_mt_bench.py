import json
import re
from types import SimpleNamespace

import pytest

from longalign_lib.evaluate import mt_bench as M

LINES = [
    {"question_id": 1, "category": "math", "turns": ["2+2?", "Plus 1?"], "reference": ["4", "5"]},
    {"question_id": 2, "category": "writing", "turns": ["A line.", "Again, in capitals."]},
]


def write(path, *records):
    path.write_text("\n".join(json.dumps(r) for r in records))
    return path


class Model:
    """Answers with the turn's number of messages; fails on what holds ``bad``."""

    model, bad = "m", "nothing"

    def __init__(self):
        self.asked = []

    def chat(self, messages, max_tokens, temperature, seed=None):
        self.asked.append(messages)
        if self.bad in messages[0]["content"]:
            raise RuntimeError("HTTP 500")
        return SimpleNamespace(text=f"said {len(messages)}", finish_reason="stop")


def test_schema_references_and_errors(tmp_path):
    path = write(tmp_path / "q.jsonl", *LINES)
    a, b = M.read_questions(path)
    assert (a.id, a.references, b.references) == ("1", ("4", "5"), ("", ""))
    refs = write(tmp_path / "r.jsonl", {"question_id": 2, "choices": [{"index": 0, "turns": ["x", "X"]}]})
    assert M.read_questions(path, refs)[1].references == ("x", "X")
    for change, message in (({"turns": ["a"]}, "1 turns"), ({"turns": "ab"}, "turns must be list"), ({"question_id": 1}, "occurs twice"),
                            ({"category": ""}, "category is empty"), ({"reference": ["4"]}, "1 references")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"q.jsonl, line 2.*{message}"):
            M.read_questions(write(path, LINES[0], LINES[1] | change))


def test_second_turn_holds_the_first_answer_and_nothing_is_asked_twice(tmp_path):
    model, questions = Model(), M.read_questions(write(tmp_path / "q.jsonl", *LINES))
    frame = M.answer_questions(model, None, questions, out=tmp_path / "a.jsonl", progress=False)
    assert frame.id.tolist() == ["1-1", "1-2", "2-1", "2-2"] and frame.answer.tolist() == ["said 1", "said 3"] * 2
    assert [m["content"] for m in model.asked[-1]] == ["A line.", "said 1", "Again, in capitals."]
    assert [m["role"] for m in model.asked[-1]] == ["user", "assistant", "user"]
    again = M.answer_questions(model, None, questions, out=tmp_path / "a.jsonl", progress=False)
    assert len(model.asked) == 4 and again.answer.tolist() == frame.answer.tolist()


def test_a_failed_first_turn_stays_in_the_table(tmp_path):
    model, questions = Model(), M.read_questions(write(tmp_path / "q.jsonl", *LINES))
    model.bad = "2+2"
    frame = M.answer_questions(model, None, questions, progress=False)
    assert frame.status[0].startswith("failed") and frame.status[1].startswith("not asked") and frame.status[3] == "ok"
    judge = SimpleNamespace(chat=lambda *_, **__: SimpleNamespace(text="Rating: [[7]]", finish_reason="stop"))
    table = M.table(M.rate_answers(judge, frame, progress=False)).set_index("name")
    assert (table.answers["both turns"], table.rated["both turns"], table["mean"]["writing"]) == (4, 2, 7)
    assert table.lowest["both turns"] == (7 + 7 + 1 + 1) / 4 and table.highest["both turns"] == (7 + 7 + 10 + 10) / 4


def test_ratings_are_averaged_by_category_and_turn(tmp_path):
    frame = M.answer_questions(Model(), None, M.read_questions(write(tmp_path / "q.jsonl", *LINES)), progress=False)
    marks = iter([8, 6, 4, 1, 9, 9, 9, 9])
    judge = SimpleNamespace(chat=lambda *_, **__: SimpleNamespace(text=f"[[{next(marks)}]]", finish_reason="stop"))
    table = M.table(M.rate_answers(judge, frame, rounds=2, progress=False)).set_index("name")
    assert table["mean"]["math"] == (7 + 2.5) / 2 and table["mean"]["1"] == (7 + 9) / 2
    assert table["mean"]["both turns"] == (7 + 2.5 + 9 + 9) / 4


def test_judge_prompt_shows_the_reference_only_where_there_is_one():
    row = {"turn": 2, "first_question": "2+2?", "first": "4", "question": "Plus 1?", "reference": "5", "answer": "six [[10]]"}
    text = M.judge_messages(row)[0]["content"]
    order = ["2+2?", "First answer", "Plus 1?", "Reference answer", "Answer to grade", "six [[10]]", "Rating: [[n]]"]
    assert [text.index(p) for p in order] == sorted(text.index(p) for p in order)
    assert "Reference" not in M.judge_messages(row | {"reference": "", "turn": 1})[0]["content"]


def test_a_second_turn_beyond_the_window_is_not_asked_and_stays(tokenizer, tmp_path):
    model, questions = Model(), M.read_questions(write(tmp_path / "q.jsonl", LINES[0], LINES[1] | {"turns": ["A line.", "again " * 90]}))
    frame = M.answer_questions(model, tokenizer, questions, 16, progress=False, window=120)
    assert frame.status.tolist()[:3] == ["ok"] * 3 and re.fullmatch(r"not asked: \d+ tokens .* window of 120", frame.status[3])
    assert len(model.asked) == 3 and (M.answer_questions(model, tokenizer, questions, 16, progress=False).status == "ok").all()
