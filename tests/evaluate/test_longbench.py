import argparse
import json
import random
import re
import string
from collections import Counter

import pandas as pd
import pytest

from longalign_lib.evaluate import longbench as L
from longalign_lib.evaluate import tasks_command

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
    assert [s.task for s in L.read_samples(path)] == ["qasper_e", "qasper"] and len(L.read_samples(path, 1)) == 1
    for limit in (0, -1):
        with pytest.raises(ValueError, match="1 or more questions"):
            L.read_samples(path, limit)


@pytest.mark.parametrize("named", ["qasper", "qasper_e"])  # by either name in the records, the file's own tells them apart
def test_a_folder_as_published_keeps_longbench_e_apart_and_skips_what_is_not_scored(tmp_path, named, model, tokenizer, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl"):
        L.read_scored(data)
    write(data / "trec.jsonl", RECORD | {"dataset": "trec", "all_classes": ["x"], "input": ""})
    with pytest.raises(ValueError, match="data has trec: none of the tasks"):
        L.read_scored(data)
    write(data / "empty.jsonl").write_text("[]")
    with pytest.raises(ValueError, match="has no record: none"):
        L.read_scored(data / "empty.jsonl")
    write(data / "lcc_e.jsonl", RECORD | {"dataset": "lcc_e"})
    write(data / "qasper.jsonl", RECORD)
    write(data / "qasper_e.jsonl", RECORD | {"dataset": named}, RECORD | {"dataset": named, "_id": "a2"})
    samples, skipped = L.read_scored(data)
    assert [s.task for s in samples] == ["qasper", "qasper_e", "qasper_e"] and skipped == ["lcc_e", "trec"]
    assert L.read_samples(data) == samples
    monkeypatch.setattr(tasks_command.running, "who", lambda args: (argparse.Namespace(name="m", client=None), model, tokenizer))
    parser = argparse.ArgumentParser()
    tasks_command.add(parser.add_subparsers())
    args = parser.parse_args(["longbench", str(data), "--window", "400", "--out", str(tmp_path / "o"), "--max_new_tokens", "4"])
    args.run(args)
    assert "not scored here, left out: lcc_e, trec" in capsys.readouterr().out
    scores = pd.read_csv(tmp_path / "o" / "scores.csv")
    assert scores.name.tolist() == ["qasper", "qasper_e", L.SINGLE, f"{L.SINGLE} (LongBench-E)"] and scores.n.tolist() == [1, 2, 1, 2]
    answers = pd.DataFrame([json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()])
    assert answers.id.is_unique and answers.metric.tolist() == ["f1"] * 3 and set(L.judge_rows(answers)) == {"qa"}


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


def normalize_answer(text):  # LongBench's definition
    bare = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


@pytest.mark.parametrize(
    ("answer", "accepted", "published"),
    [
        ("1995", "1990–1995", 0), ("€5", "£5", 0), ("x²", "x2", 0), ("Tchaikovsky’s “Swan Lake”", "Swan Lake", 0), ("Straße", "strasse", 0),
        ("Mayor’s office", "Mayor office", 50), ("½ cup", "1/2 cup", 50), ("北京 Beijing", "北京", 200 / 3), ("a", "the", 0),
        ("the U.S., 7,421", "US 7421", 100), ("snake_case", "snakecase", 100), ("rain rain go", "rain go go", 200 / 3), ("", "x", 0),
    ],
)  # fmt: skip
def test_english_f1_is_the_published_one(answer, accepted, published):
    assert f1(normalize_answer(answer).split(), normalize_answer(accepted).split()) == pytest.approx(published)
    assert L.score(answer, [accepted], "f1") == pytest.approx(published)


def published_rouge(answer, reference):
    """The rouge 1.0.1 package's summary-level ROUGE-L of sets of words, from its definition."""

    def recon(x, y):
        if not x or not y:
            return []
        if x[-1] == y[-1]:
            return [*recon(x[:-1], y[:-1]), x[-1]]
        return recon(x[:-1], y) if lcs(x[:-1], y) > lcs(x, y[:-1]) else recon(x, y[:-1])

    said, wanted = ([" ".join(s.split()).split(" ") for s in text.split(".") if len(s) > 0] for text in (answer, reference))
    if not said or not wanted:
        return 0
    union = {word for r in wanted for c in said for word in recon(r, c)}
    p, r = len(union) / len({w for s in said for w in s}), len(union) / len({w for s in wanted for w in s})
    return 100 * 2 * (p * r / (p + r + 1e-8))


def test_english_rouge_l_is_the_published_packages():
    for answer, reference, recorded in (  # by rouge 1.0.1 itself
        ("The tide rose. The town slept, and the tide fell.", "the tide rose and fell. The town slept. The town woke.", 70.58823479584775),
        ("a b c a b d. b a d c", "a c b d a. d c b a. c a", 99.9999995), ("Rain. ", "Rain fell. ", 79.99999952), ("...", "Rain.", 0),
        ("Rain at 3.5 degrees", "3.5 degrees", 74.99999953125),
    ):  # fmt: skip
        assert published_rouge(answer, reference) == pytest.approx(recorded, abs=1e-9)
        assert L.score(answer, [reference], "rouge_l") == pytest.approx(recorded, abs=1e-9)
    rng = random.Random(0)
    for _ in range(300):
        texts = [" ".join(rng.choices(["a", "b", "c", "D", "d,", "e.", ".", "f . "], k=rng.randint(1, 9))) for _ in range(3)]
        want = max(published_rouge(texts[0], t) for t in texts[1:])
        assert L.score(texts[0], texts[1:], "rouge_l") == pytest.approx(want, abs=1e-9), texts


def test_a_kind_is_the_mean_of_its_tasks():
    rows = [("multifieldqa_en", 100.0)] * 150 + [("narrativeqa", 0.0)] * 196 + [("narrativeqa", 50.0)] * 4
    answers = pd.DataFrame([{"task": t, "kind": L.SINGLE, "overlap": o, "status": "ok", "id": f"{t}{i}"} for i, (t, o) in enumerate(rows)])
    ratings = {"qa": pd.DataFrame({"id": answers.id, "score": [3] * 150 + [1] * 200})}
    one = L.table(answers, ratings).set_index("name").loc[L.SINGLE]
    assert (one.overlap, one.rating, one.tasks, one.n, one.rated) == (50.5, 50, 2, 350, 350)
    assert one.se == pytest.approx(pd.Series([0.0] * 196 + [50.0] * 4).sem() / 2)  # the other task does not vary
    unrated = {"qa": ratings["qa"].assign(score=[3] * 150 + [float("nan")] * 200)}
    one = L.table(answers, unrated).set_index("name").loc[L.SINGLE]
    assert pd.isna(one.rating) and one.rated == 150  # no column of one task passes for the mean of two


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
