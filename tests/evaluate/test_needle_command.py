import json
import re

import pandas as pd
import pytest
from llm_faults import FaultServer

from longalign_lib.evaluate import needle as N
from longalign_lib.evaluate.__main__ import main
from longalign_lib.evaluate.needle_command import _with_others, spec_from
from longalign_lib.evaluate.stats import wilson

WORDS = ["needle", "--lengths", "300", "400", "--depths", "0", "50", "100", "--max_new_tokens", "4", "--repeats", "1"]


@pytest.fixture(scope="module")
def folders(make_model, tokenizer, tmp_path_factory):
    """Two tiny models saved with a tokenizer, as a user's folders."""
    found = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("models") / f"tiny-{seed}"
        make_model(seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found.append(str(folder))
    return found


def run(*words):
    main([*WORDS, *map(str, words)])


def test_a_grid_of_two_models_in_one_folder(folders, tmp_path, capsys):
    run("--model", folders[0], "--out", tmp_path, "--repeats", 2)
    said = capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "needle.jsonl").read_text().splitlines()]
    assert len(records) == 12 and {r["model"] for r in records} == {"tiny-0"}
    prefill = json.loads((tmp_path / "prefill.json").read_text())
    assert prefill["prompt_tokens"] == sum(r["tokens"] for r in records)
    assert prefill["least"] <= prefill["computed_tokens"] <= prefill["prompt_tokens"]
    assert f"{prefill['computed_tokens']:,} of {prefill['prompt_tokens']:,} prompt tokens" in said
    assert {f.stem for f in (tmp_path / "prompts").iterdir()} == {r["prompt_hash"] for r in records}
    for name in ("needle_grids", "needle_areas"):
        assert all((tmp_path / f"{name}.{suffix}").stat().st_size for suffix in ("png", "svg", "csv"))

    run("--model", folders[1], "--out", tmp_path, "--repeats", 2)
    said = capsys.readouterr().out
    assert "tiny-1 against tiny-0, same prompts: 12 pairs" in said
    cells = pd.read_csv(tmp_path / "needle_grids.csv")
    assert list(dict.fromkeys(cells.model)) == ["tiny-0", "tiny-1"] and len(cells) == 12 and (cells.n == 2).all()
    assert (cells.low, cells.high)[0].tolist() == pytest.approx([wilson(h, 2)[0] for h in cells.hits])
    answers = pd.read_csv(tmp_path / "needle_answers.csv")
    assert len(answers) == 24 and answers.message_hash.nunique() == 12
    whole = cells.drop(columns=[]).to_csv()

    before = (tmp_path / "needle.jsonl").read_bytes()
    run("--model", folders[1], "--out", tmp_path, "--repeats", 2)  # again: nothing is asked, the tables are the same
    assert (tmp_path / "needle.jsonl").read_bytes() == before and pd.read_csv(tmp_path / "needle_grids.csv").to_csv() == whole
    assert "prefill" not in capsys.readouterr().out

    run("--model", folders[0], "--name", "tiny-1", "--out", tmp_path, "--repeats", 2)  # one name, two models: both stay
    assert len(pd.read_csv(tmp_path / "needle_answers.csv").model.unique()) == 3
    assert not any(str(tmp_path) in f.read_text(errors="ignore") for f in tmp_path.glob("*.*") if f.suffix != ".png")


def test_dry_runs_ask_nothing_and_count(folders, tmp_path, tokenizer, capsys):
    run("--model", folders[0], "--out", tmp_path / "o", "--dry_run")
    said = capsys.readouterr().out
    prompts = [p for _, p in N.build_grid(tokenizer, [300, 400], [0.0, 50.0, 100.0])]
    total = sum(p.tokens for p in prompts)
    nodes = {tuple(p.input_ids[:k]) for p in prompts for k in range(1, p.tokens + 1)}  # every beginning, once
    assert f"6 prompts, {total:,} tokens; 0 answered already" in said and "at most 24 new ones" in said
    assert f"{len(nodes):,} prompt tokens computed, {total / len(nodes):.2f} times fewer" in said and not (tmp_path / "o").exists()
    run("--model", folders[0], "--out", tmp_path / "o")
    capsys.readouterr()
    run("--model", folders[0], "--out", tmp_path / "o", "--repeats", 2, "--dry_run")
    assert "12 prompts" in (said := capsys.readouterr().out) and "6 answered already\n6 calls" in said
    run("--model", folders[1], "--out", tmp_path / "o", "--dry_run")
    assert "0 answered already\n6 calls" in capsys.readouterr().out


def test_an_endpoint_and_a_judge(tmp_path, folders, capsys):
    def reply(body):
        asked = body["messages"][-1]["content"]
        return "Fair.\nRating: [[6]]" if "You grade answers" in asked else "nothing"

    with FaultServer(reply) as server:
        words = ["--base_url", server.url, "--served_model", "org/m", "--tokenizer", folders[0], "--out", tmp_path]
        run(*words, "--dry_run")
        assert "6 requests: 0 in the cache" in capsys.readouterr().out and not server.requests
        run(*words, "--judge_base_url", server.url, "--judge_model", "j", "--judge_prices", 1, 2)
        said = capsys.readouterr().out
        assert len(server.requests) == 12 and "judge, 1-10: m 6.00 over 6 rated" in said and "0 of 6" in said
        assert re.search(r"judge j: 6 calls, 0 kept, [\d,]+ tokens, cost 0\.\d+", said)
        run(*words, "--judge_base_url", server.url, "--judge_model", "j")
        assert len(server.requests) == 12  # all in the file and in the judge's cache
        with pytest.raises(SystemExit, match="needs --judge_model"):
            run(*words, "--judge_base_url", server.url)
        run(*words, "--name", "other weights")  # an endpoint's weights cannot be seen: another name is another model
        assert len(server.requests) == 18
        run(*words, "--name", "other weights")
        assert len(server.requests) == 18


def parsed(*words):
    from longalign_lib.evaluate.__main__ import parser

    return parser("needle").parse_args(["needle", "--out", "o", *words])


def test_words_override_the_config(tmp_path):
    file = tmp_path / "g.yaml"
    file.write_text("context: {lengths: [500]}\nprompt: {variant: keys, count: 5, spread: after}\nrepeats: 3\nseed: 9\n", encoding="utf-8")
    spec = spec_from(parsed("--config", str(file), "--depths", "10", "--repeats", "1"))
    assert (spec.lengths, spec.depths, spec.repeats, spec.seed, spec.variant, spec.count) == ((500,), (10,), 1, 9, "keys", 5)
    spec = spec_from(parsed("--config", str(file), "--variant", "chain", "--seed", "0"))
    assert (spec.variant, spec.count, spec.spread, spec.seed) == ("chain", None, None, 0)
    file.write_text("prompt: {needle: A is 1., retrieval_question: 'A?', answer: 1}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--variant cannot change the needle.*g.yaml"):
        spec_from(parsed("--config", str(file), "--variant", "keys"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lengths", "60"], "length 60 is shorter than the scaffold"), (["--lengths", "300", "300"], r"\[300\] twice"),
        (["--depths", "50", "50"], r"\[50.0\] twice"), (["--lengths", "5000"], r"beyond the model's window of 2048.*--beyond_window"),
        (["--config", "none.yaml"], "none.yaml: no such config"), (["--haystack", "nowhere"], "nowhere: no such folder"),
        (["--max_new_tokens", "0"], "1 or more"), (["--variant", "single", "--count", "4"], "1 to 1, got 4"),
    ],
)  # fmt: skip
def test_bad_words_end_with_one_line(folders, tmp_path, words, said):
    with pytest.raises(SystemExit, match=f"^needle: .*{said}") as caught:
        run("--model", folders[0], "--out", tmp_path / "o", *words)
    assert "\n" not in str(caught.value) and not (tmp_path / "o").exists()


def test_a_model_without_chat_template_and_an_empty_haystack(make_model, tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", None)
        tokenizer.save_pretrained(tmp_path / "base")
    make_model().save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit, match="no chat template"):
        run("--model", tmp_path / "base", "--out", tmp_path / "o")
    (tmp_path / "hay").mkdir()
    with pytest.raises(SystemExit, match=r"haystack_dir .* is empty"):
        run("--model", tmp_path / "base", "--out", tmp_path / "o", "--haystack", tmp_path / "hay")


def test_settings_are_never_pooled(tmp_path, folders, tokenizer, capsys):
    right = {p.needle.question: " ".join(p.needle.parts) for _, p in N.build_grid(tokenizer, [300, 400], [0, 50, 100])}
    out = tmp_path / "o"

    def good(body):
        return "Let me see" if body["max_tokens"] < 8 else next(v for q, v in right.items() if q in body["messages"][0]["content"])

    def ask(reply, name, most):
        with FaultServer(reply) as server:
            run("--base_url", server.url, "--served_model", name, "--tokenizer", folders[0], "--out", out, "--max_new_tokens", most)
        return capsys.readouterr().out, len(server.requests)

    ask(good, "good", 4)
    ask(good, "good", 32)
    said, _ = ask(lambda body: "no idea", "wrong", 32)
    assert re.search(r"good +all +6 of 6", said) and re.search(r"wrong +all +0 of 6", said)
    assert "6 pairs, found only by the first 0, only by the second 6" in said
    assert "left out: 6 answers of good with another --max_new_tokens than 32" in said

    file = out / "needle.jsonl"  # records from before the setting was kept: unknown, so left out
    old = [{k: v for k, v in json.loads(line).items() if k != "max_new_tokens"} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(r) + "\n" for r in old))
    said, asked = ask(good, "wrong", 32)
    assert asked == 0 and "good  " not in said and "left out: 12 answers of good" in said and re.search(r"wrong +all +0 of 6", said)
    said, asked = ask(good, "good", 32)  # asked for nothing, and on record again
    assert asked == 0 and "good against wrong, same prompts: 6 pairs" in said


def test_others_of_one_name_and_of_two_templates(tmp_path, make_model, tokenizer):
    axes = {"lengths": [300], "depths": [0, 100], "max_new_tokens": 4, "out": tmp_path / "n.jsonl", "progress": False}
    models = [make_model(seed) for seed in range(3)]
    N.run_grid(models[0], tokenizer, name="a", **axes)
    models[0].generation_config.eos_token_id = [2, 7]
    again = N.run_grid(models[0], tokenizer, name="a", **axes)
    frame = N.run_grid(models[1], tokenizer, name="b", **axes)
    rows = _with_others(frame, tmp_path / "n.jsonl")
    assert sorted(rows.key) == sorted([*again.key, *frame.key]) and "2 answers of a" in rows.attrs["left_out"][0]
    N.run_grid(models[2], tokenizer, name="a", **axes)
    names = _with_others(frame, tmp_path / "n.jsonl").model.tolist()
    assert len(set(names)) == 3 and all(n == "b" or n.startswith("a (") for n in names)
