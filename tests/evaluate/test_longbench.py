import json
from collections import Counter

import pandas as pd
import pytest

from longalign_lib.evaluate import longbench as L

SAMPLES = "data_samples/longbench"
RECORD = {"input": "What rose?", "context": "The tide rose.", "answers": ["the tide", "tide"], "length": 3, "dataset": "qasper",
          "language": "en", "all_classes": None, "_id": "a1"}  # fmt: skip


def write(path, *records):
    path.write_text("\n".join(json.dumps(r) for r in records))
    return path


def test_our_files_are_in_the_published_schema_and_hold_our_text(root):
    samples = L.read_samples(root / SAMPLES)
    assert {L.TASKS[s.task].kind for s in samples} == {L.SINGLE, L.MULTI, L.SUMMARY} and {s.language for s in samples} == {"en", "zh"}
    ours = "".join(p.read_text(encoding="utf-8") for p in (root / "data_samples" / "documents").glob("*.txt"))
    for sample in samples:
        assert sample.length == len(sample.context.split() if sample.language == "en" else sample.context)
        for part in sample.context.split("\n\n"):
            assert part.removeprefix("Passage 1:\n").removeprefix("Passage 2:\n") in ours


def test_longbench_e_names_and_limit(tmp_path):
    path = write(tmp_path / "x.jsonl", RECORD | {"dataset": "qasper_e"}, RECORD | {"_id": "a2"})
    assert [s.task for s in L.read_samples(path)] == ["qasper", "qasper"] and len(L.read_samples(path, 1)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": ""}, "context is empty"), ({"answers": []}, "answers is empty"), ({"answers": "x"}, "answers must be list"),
        ({"answers": [""]}, "must hold texts"), ({"dataset": "trec"}, "none of the tasks"), ({"input": ""}, "input is empty"),
        ({"length": "3"}, "length must be int"), ({"_id": "a1"}, "occurs twice"), ({"_id": 7}, "_id must be str"),
    ],
)  # fmt: skip
def test_bad_records_are_named_with_their_line(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"x.jsonl, line 2.*{message}"):
        L.read_samples(write(tmp_path / "x.jsonl", RECORD, RECORD | {"_id": "a2"} | change))


def test_a_missing_key_and_a_cut_file(tmp_path):
    with pytest.raises(ValueError, match="line 1: language missing"):
        L.read_samples(write(tmp_path / "x.jsonl", {k: v for k, v in RECORD.items() if k != "language"}))
    (tmp_path / "x.jsonl").write_text(json.dumps(RECORD) + "\n" + json.dumps(RECORD)[:30])
    with pytest.raises(ValueError, match=r"line 2 is not valid JSON.*cut off"):
        L.read_samples(tmp_path / "x.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl"):
        L.read_samples(tmp_path / "empty")


def f1(a, b):
    same = sum((Counter(a) & Counter(b)).values())
    return 0 if not same else 200 * (p := same / len(a)) * (r := same / len(b)) / (p + r)


def lcs(a, b):
    return 0 if not a or not b else 1 + lcs(a[1:], b[1:]) if a[0] == b[0] else max(lcs(a[1:], b), lcs(a, b[1:]))


def test_metrics_against_a_small_computation():
    assert L.score("A U.S. ship, the Tide.", ["US ship"], "f1") == pytest.approx(f1(["us", "ship", "tide"], ["us", "ship"]))
    assert L.score("凌晨一点。", ["一点五十"], "f1", "zh") == pytest.approx(f1("凌晨一点", "一点五十"))
    assert L.score("no", ["yes", "no"], "f1") == 100 and L.score("", ["x"], "f1") == 0
    a, b = "the tide rose twice".split(), "twice the old tide rose".split()
    assert L.score(" ".join(a), [" ".join(b)], "rouge_l") == pytest.approx(200 * lcs(a, b) / (len(a) + len(b)))
    assert L.score("河水涨", ["河水涨了"], "rouge_l", "zh") == pytest.approx(200 * 3 / 7)
    with pytest.raises(ValueError, match="choose f1"):
        L.score("a", ["a"], "bleu")


def test_prompts_are_filled_once(tmp_path):
    assert L.fill("{context}|{input}", "a {input} {x}", "q {context}") == "a {input} {x}|q {context}"
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"qasper": "T {context} Q {input}", "trec": "x"}))
    assert set(L.read_prompts(path)) == {"qasper"}
    path.write_text(json.dumps({"qasper": "Q {input}"}))
    with pytest.raises(ValueError, match=r"qasper; a prompt needs \{context\}"):
        L.read_prompts(path)


def test_answers_are_cut_in_the_middle_kept_and_tabled(root, tokenizer, model, tmp_path, monkeypatch):
    samples = L.read_samples(root / SAMPLES)
    options = {"window": 400, "max_new_tokens": 5, "out": tmp_path / "a.jsonl", "progress": False}
    first = L.answer_samples(model, tokenizer, samples, **options)
    assert (first.status == "ok").all() and (first.tokens <= 395).all() and (first.left_out > 0).any()
    with monkeypatch.context() as patch:
        patch.setattr("longalign_lib.evaluate.answering.Greedy.answer", lambda *_: pytest.fail("asked again"))
        assert L.answer_samples(model, tokenizer, samples, **options).answer.tolist() == first.answer.tolist()
    rows = L.judge_rows(first)
    ratings = {r: pd.DataFrame([{"id": x["id"], "score": 2} for x in part for _ in range(2)]) for r, part in rows.items()}
    table = L.table(first, ratings).set_index("name")
    assert table.rating[L.SINGLE] == 50 and table.rating[L.SUMMARY] == 25 and table.n[L.SINGLE] == 4
    assert table.overlap[L.SINGLE] == pytest.approx(first[first.kind == L.SINGLE].overlap.mean())
    lost = first.id[first.kind == L.SINGLE].iloc[0]  # a failed call: no judge is asked to rate the empty answer that stands for it
    failed = first.assign(status=["failed: x" if i == lost else s for i, s in zip(first.id, first.status)])
    assert lost not in {row["id"] for part in L.judge_rows(failed).values() for row in part}
    rows = {r: pd.DataFrame([{"id": x["id"], "score": 2} for x in part]) for r, part in L.judge_rows(failed).items()}
    table = L.table(failed, rows).set_index("name")
    assert (table.n[L.SINGLE], table.rated[L.SINGLE], table.failed[L.SINGLE]) == (4, 3, 1)
