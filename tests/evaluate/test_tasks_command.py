import argparse
import json

import pandas as pd
import pytest
from llm_faults import FaultServer

from longalign_lib.evaluate import tasks_command as T


def run(*words):
    parser = argparse.ArgumentParser()
    T.add(parser.add_subparsers(dest="command", required=True))
    args = parser.parse_args([str(w) for w in words])
    args.run(args)


@pytest.fixture(autouse=True)
def toy(tokenizer, monkeypatch):
    monkeypatch.setattr("longalign_lib.models.load_tokenizer", lambda name: tokenizer)


def endpoint(server, out):
    return "--base_url", server.url, "--served_model", "m", "--out", out


def test_longbench_by_an_endpoint_with_and_without_a_judge(root, tmp_path, capsys):
    data = root / "data_samples" / "longbench" / "multifieldqa_en.jsonl"
    with FaultServer(lambda body: "In 1876") as server, FaultServer(lambda body: "Rating: [[3]]") as judge:
        run("longbench", data, "--window", 900, "--dry_run", *endpoint(server, tmp_path / "o"))
        assert "2 questions" in capsys.readouterr().out and not server.requests and not (tmp_path / "o").exists()
        run("longbench", data, "--window", 900, *endpoint(server, tmp_path / "o"))
        scores = pd.read_csv(tmp_path / "o" / "scores.csv").set_index("name")
        assert scores.overlap["multifieldqa_en"] == 50 and "no judge" in capsys.readouterr().out
        asked = len(server.requests)
        assert {body["max_tokens"] for body, _ in server.requests} == {64}  # the task's own
        run("longbench", data, "--window", 900, *endpoint(server, tmp_path / "o"), "--judge_base_url", judge.url, "--judge_model", "j")
        assert len(server.requests) == asked and len(judge.requests) == 2  # the answers are kept
        assert pd.read_csv(tmp_path / "o" / "scores.csv").rating.tolist() == [100, 100]
        run("longbench", data, "--window", 900, "--max_new_tokens", 9, *endpoint(server, tmp_path / "q"))
        assert {body["max_tokens"] for body, _ in server.requests[asked:]} == {9}
        with pytest.raises(ValueError, match="--window is needed"):
            run("longbench", data, *endpoint(server, tmp_path / "p"))


def test_mt_bench_by_an_endpoint(tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["2+2?", "Plus 1?"]}))
    with FaultServer(lambda body: "4") as server, FaultServer(lambda body: "Fine.\nRating: [[6]]") as judge:
        words = ("mt-bench", tmp_path / "q.jsonl", *endpoint(server, tmp_path / "o"))
        run(*words)
        assert "none is rated" in capsys.readouterr().out
        run(*words, "--judge_base_url", judge.url, "--judge_model", "j")
        assert pd.read_csv(tmp_path / "o" / "scores.csv")["mean"].tolist() == [6, 6, 6, 6] and len(server.requests) == 2


def test_retention_names_the_commands_and_refuses_an_endpoint(tmp_path, capsys):
    run("retention", "--model", "org/model", "--out", tmp_path, "--dry_run")
    assert "pretrained=org/model,dtype=bfloat16 --tasks arc_challenge --num_fewshot 25" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give --model"):
        run("retention", "--base_url", "http://127.0.0.1:1/v1", "--served_model", "m", "--out", tmp_path)


def test_a_model_is_not_asked_beyond_its_window(root, tmp_path, make_model, tokenizer, capsys):
    make_model(window=400).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    data, model = root / "data_samples" / "longbench" / "multifieldqa_en.jsonl", ("--model", tmp_path / "m", "--out", tmp_path / "o")
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["2+2? " * 150, "Plus 1?"]}))
    for words in (("longbench", data, "--window", 500), ("mt-bench", tmp_path / "q.jsonl", "--max_new_tokens", 4)):
        with pytest.raises(ValueError, match=r"beyond the model's window of 400; .*--beyond_window"):
            run(*words, *model)
        run(*words, *model, "--beyond_window", "--dry_run")
    run("longbench", data, "--window", 400, *model, "--dry_run")
    run("longbench", data, *model, "--dry_run")
    assert capsys.readouterr().out.count("questions,") == 4
