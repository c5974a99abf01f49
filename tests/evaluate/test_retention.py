import json
import shutil
import sys

import pytest

from longalign_lib.evaluate import retention as R


def test_questions_have_one_answer_each_and_no_favourite_place(root):
    lines = (root / "data_samples" / "retention" / "general_knowledge.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 40 and len({r["question"] for r in rows}) == 40 and len({r["id"] for r in rows}) == 40
    assert [sum(r["answer"] == n for r in rows) for n in range(4)] == [10] * 4
    assert R.general_task()["dataset_kwargs"]["data_files"]["test"].endswith("general_knowledge.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"answer": 4}, "answer 4 must be"), ({"choices": ["a", "a", "b", "c"]}, "different"), ({"question": ""}, "question is empty"),
     ({"choices": "ab"}, "must be list")],
)  # fmt: skip
def test_a_bad_question_is_named_before_anything_is_loaded(tmp_path, change, message):
    shutil.copy(R.SAMPLES / "general_knowledge.yaml", tmp_path)
    good = {"question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 3}
    (tmp_path / "general_knowledge.jsonl").write_text("\n".join(json.dumps(r) for r in (good, good | change)))
    with pytest.raises(ValueError, match=rf"general_knowledge.jsonl, line 2: .*{message}"):
        R.evaluate(None, None, folder=tmp_path)


def test_unknown_task_and_missing_harness(monkeypatch):
    with pytest.raises(ValueError, match="unknown task arcs; choose among general, arc"):
        R.evaluate(None, None, ["arcs"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"not installed .*\[retention\]"):
        R.evaluate(None, None)


def test_the_papers_tasks_and_shots_are_in_the_commands():
    text = "\n".join(R.harness_commands("org/model"))
    for task, shots in (("arc_challenge", 25), ("hellaswag", 10), ("truthfulqa_mc2", 0), ("mmlu", 5)):
        assert f"pretrained=org/model,dtype=bfloat16 --tasks {task} --num_fewshot {shots} " in text
