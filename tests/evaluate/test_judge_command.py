import argparse
import json

import pandas as pd
import pytest
from llm_faults import FAULTS, FaultServer

from longalign_lib.evaluate import judge_command as C
from longalign_lib.evaluate.known_judges import KnownJudge


def run(*words):
    parser = argparse.ArgumentParser()
    C.add(parser.add_subparsers(dest="command", required=True))
    args = parser.parse_args([str(w) for w in words])
    args.run(args)


@pytest.fixture(autouse=True)
def toy(tokenizer, monkeypatch):
    monkeypatch.setattr("longalign_lib.models.load_tokenizer", lambda name: tokenizer)


def rating(body):
    return KnownJudge().chat(body["messages"], seed=body.get("seed", 0)).text


def test_answers_are_rated_and_kept(tmp_path, capsys):
    with FaultServer(lambda body: "Six centimetres of rain.") as server, FaultServer(rating) as judge:
        words = ("longbench-chat", "--limit", 3, "--window", 900, "--max_new_tokens", 40, "--base_url", server.url, "--served_model", "m",
                 "--out", tmp_path / "o")  # fmt: skip
        run(*words, "--dry_run")
        assert "3 questions" in capsys.readouterr().out and not server.requests and not (tmp_path / "o").exists()
        run(*words)
        assert "word overlap" in capsys.readouterr().out and len(server.requests) == 3
        rated = (*words, "--judge_base_url", judge.url, "--judge_model", "j", "--judge_prices", 1, 2)
        run(*rated)
        said = capsys.readouterr().out
        assert "6 calls" in said and "cost" in said and len(server.requests) == 3 and len(judge.requests) == 6
        scores = pd.read_csv(tmp_path / "o" / "scores.csv").iloc[0]
        ratings = pd.read_csv(tmp_path / "o" / "ratings.csv")
        assert scores["mean"] == pytest.approx(ratings.groupby("id").score.mean().mean()) and scores.coverage == 1 and scores.shortened == 3
        run(*rated)
        assert len(judge.requests) == 6 and "6 kept" in capsys.readouterr().out
        assert len((tmp_path / "o" / "results.jsonl").read_text().splitlines()) == 3


def test_answers_that_failed_stay_in_the_denominator(tmp_path, capsys):
    with FaultServer(lambda body: "Six centimetres of rain.") as server, FaultServer(rating) as judge:
        server.steps = [FAULTS["500"]]
        run("longbench-chat", "--limit", 4, "--window", 900, "--max_new_tokens", 40, "--base_url", server.url, "--served_model", "m", "--retries", 0,
            "--judge_base_url", judge.url, "--judge_model", "j", "--out", tmp_path / "o")  # fmt: skip
        assert "not rated: no answer to rate: failed" in capsys.readouterr().out and len(judge.requests) == 2 * 3
        scores, ratings = pd.read_csv(tmp_path / "o" / "scores.csv").iloc[0], pd.read_csv(tmp_path / "o" / "ratings.csv")
        assert (scores.asked, scores.answered, scores.answers, scores.failed, scores.coverage) == (4, 3, 4, 1, 0.75)
        rated = ratings.groupby("id").score.mean().dropna()
        assert scores["mean"] == pytest.approx(rated.mean()) and scores.lowest == pytest.approx((rated.sum() + 1) / 4)


def test_published_files_and_a_judge_that_fails(tmp_path, capsys):
    case = {"idx": 1, "prompt": "A long text about tin.\n\nWhat is it about?", "query": "What is it about?", "answer": "About tin."}
    (tmp_path / "test_cases.json").write_text(json.dumps([case]))
    (tmp_path / "few_shots.json").write_text(json.dumps([[{"answer": "Tin.", "score": 9}]]))
    with FaultServer(lambda body: "Tin") as server, FaultServer(rating) as judge:
        judge.steps = [FAULTS["500"]] * 2
        run("longbench-chat", "--cases", tmp_path, "--window", 700, "--max_new_tokens", 20, "--base_url", server.url, "--served_model", "m",
            "--judge_base_url", judge.url, "--judge_model", "j", "--judge_retries", 0, "--out", tmp_path / "o")  # fmt: skip
        said = capsys.readouterr().out
        assert "not rated" in said and "boom" in said and not judge.steps and pd.read_csv(tmp_path / "o" / "scores.csv").failed[0] == 2


def test_an_audit_of_an_endpoint_and_of_word_overlap(tmp_path, capsys):
    with FaultServer(rating) as judge:
        words = ("audit", "--limit", 3, "--out", tmp_path / "o", "--judge_base_url", judge.url, "--judge_model", "j")
        run(*words, "--dry_run")
        assert "nothing was asked" in capsys.readouterr().out and not judge.requests
        run(*words)
        assert "nothing found with 3 questions" in capsys.readouterr().out and judge.requests
        assert {"audit.png", "audit.svg", "audit.csv", "ladders.png", "results.jsonl", "settings.json"} <= {f.name for f in (tmp_path / "o").iterdir()}
    run("audit", "--limit", 4, "--out", tmp_path / "w", "--probes", "ladder", "swap")
    assert "lexical" in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "w" / "audit.csv").probe) == {"ladder", "swap"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["audit", "--limit", 0], "--limit must be 1"), (["audit", "--limit", 1], "at least two questions"),
        (["audit", "--cases", "c", "--items", "i"], "not both"), (["audit", "--probes", "mood"], "unknown probe mood"),
        (["longbench-chat", "--rounds", 0, "--window", 900], "--rounds must be 1"),
        (["longbench-chat", "--base_url", "http://127.0.0.1:9/v1", "--served_model", "m"], "--window is needed"),
    ],
)  # fmt: skip
def test_bad_options(words, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        run(*words, "--out", tmp_path / "o")


def test_a_model_is_not_asked_beyond_its_window(tmp_path, make_model, capsys):
    make_model(window=1000).save_pretrained(tmp_path / "m")
    words = ("longbench-chat", "--limit", 1, "--window", 1200, "--max_new_tokens", 40, "--model", tmp_path / "m", "--out", tmp_path / "o")
    with pytest.raises(ValueError, match=r"1160 \+ 40 new tokens = 1200 is beyond the model's window of 1000; .*--beyond_window"):
        run(*words)
    run(*words, "--beyond_window", "--dry_run")
    assert "1 questions" in capsys.readouterr().out and not (tmp_path / "o").exists()
