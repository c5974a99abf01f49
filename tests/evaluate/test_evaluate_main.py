import argparse
import subprocess
import sys

import pytest
from llm_faults import FAULTS, FaultServer

from longalign_lib.evaluate import options
from longalign_lib.evaluate.__main__ import COMMANDS, main, parser


def parsed(*words):
    top = argparse.ArgumentParser()
    options.add_model_options(top, max_new_tokens=8)
    options.add_endpoint_options(top, "judge_")
    return top.parse_args(["--out", "o", *map(str, words)])


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def folder(make_model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("m") / "tiny"
    make_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_help_names_every_command_and_imports_none(root):
    code = "import sys; sys.argv = ['x', '--help']\ntry:\n    import runpy; runpy.run_module('longalign_lib.evaluate', run_name='__main__')\n"
    code += "except SystemExit: pass\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS) and done.stdout.rstrip().endswith("False False")


def test_only_the_wanted_command_has_options(capsys):
    assert parser("needle").parse_args(["needle", "--out", "o"]).command == "needle"
    for words in ([], ["nothing"], ["needle"]):
        with pytest.raises(SystemExit):
            main(words)
    assert "--out" in capsys.readouterr().err


def test_errors_end_with_one_line(monkeypatch):
    with pytest.raises(SystemExit, match=r"^needle: --served_model x needs --base_url"):
        main(["needle", "--out", "o", "--served_model", "x", "--lengths", "400"])


def test_a_model_in_this_process(folder, model, tokenizer, monkeypatch):
    who = options.answerer(parsed("--model", folder, "--dtype", "float32"))
    assert (who.name, who.kind, who.client) == ("tiny", "model", None)
    seen = []
    said = who([ask("one"), ask("two words")], progress=False, on_answer=lambda i, text: seen.append((i, text)))
    for text, messages in zip(said, (ask("one"), ask("two words")), strict=True):  # transformers' own greedy answer
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=2)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == text
    assert seen == list(enumerate(said)) and who.failures == {} and who.identity == options.answerer(parsed("--model", folder, "--dtype", "float32")).identity
    plain, calls = type(who.model).forward, []

    def forward(self, *args, **more):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return plain(self, *args, **more)

    monkeypatch.setattr(type(who.model), "forward", forward)
    again = who([ask("one"), ask("two words")], progress=False)
    assert again == [None, said[1]] and who.failures == {0: "RuntimeError: out of memory"}


def test_an_endpoint(tmp_path):
    with FaultServer(lambda body: body["messages"][0]["content"].upper()) as server:
        words = ["--base_url", server.url, "--served_model", "org/name", "--retries", 0, "--concurrency", 1]
        who = options.answerer(parsed(*words), tmp_path / "cache.jsonl")
        server.steps = [{}, FAULTS["500"]]
        assert who([ask("a"), ask("b"), ask("c")], progress=False) == ["A", None, "C"]
        assert list(who.failures) == [1] and (who.name, who.kind) == ("name", "endpoint")
        assert who([ask("a"), ask("b")], progress=False) == ["A", "B"] and len(server.requests) == 4  # kept answers are not asked
        assert {body["max_tokens"] for body, _ in server.requests} == {8}
        with pytest.raises(ValueError, match="no model in this process"):
            _ = who.model
        other = options.answerer(parsed(*words[:3], "another"), tmp_path / "c2.jsonl")
        assert who.identity != other.identity
        judge = options.client(parsed("--judge_base_url", server.url, "--judge_served_model", "j"), None, "judge_")
        assert judge.chat(ask("q")).text == "Q"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base_url", "http://127.0.0.1:9/v1"], "needs --served_model"), (["--served_model", "x"], "needs --base_url"),
        (["--max_new_tokens", 0], "1 or more, got 0"), (["--base_url", "ftp://x", "--served_model", "x"], "no URL"),
    ],
)  # fmt: skip
def test_bad_options(words, said):
    with pytest.raises(ValueError, match=said):
        options.answerer(parsed(*words))
    with pytest.raises(ValueError, match="give --judge_base_url"):
        options.client(parsed(), None, "judge_")


def test_settings_name_no_path_and_no_key(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-word")
    line = options.settings_of(parsed("--model", tmp_path / "mine"))
    assert "mine" in line and str(tmp_path) not in line and "secret" not in line
