"""The local server: it answers, heeds sampling, says why it did not start, and leaves no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from longalign_lib.llm import ChatClient, ChatError
from longalign_lib.serve import ServerError, serve_local

ASK = [{"role": "user", "content": "Where is the key?"}]


def test_serve_local_names_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        with serve_local(tmp_path):
            pass


def test_serve_local_answers_and_leaves_no_process(tmp_path, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    log = tmp_path / "server.log"
    with serve_local(tmp_path / "tiny", log=log, device="cpu", dtype="float32") as url:
        chat = ChatClient(url, tmp_path / "tiny", max_retries=0, timeout=60)
        reply = chat.chat(ASK, max_tokens=3)
        assert reply.completion_tokens == 3 and reply.prompt_tokens > 10 and chat.label == "tiny"
        warm = [chat.chat(ASK, max_tokens=8, temperature=1.0, seed=seed).text for seed in (1, 2, 1)]
        assert warm[0] == warm[2] != warm[1]  # a random model's samples differ by seed and repeat with it
        assert len({chat.chat(ASK, max_tokens=8, seed=seed).text for seed in (1, 2)}) == 1  # temperature 0: greedy
    with pytest.raises(ChatError, match="connection failed"):
        ChatClient(url, tmp_path / "tiny", max_retries=0).chat(ASK)
    assert log.stat().st_size > 0


def test_serve_local_reports_why_a_server_did_not_start(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("longalign_lib.serve._LAUNCH", "raise SystemExit('no weights in this folder')")
    with pytest.raises(ServerError, match=r"(?s)ended with status 1.*Its last lines:\nno weights in this folder"):
        with serve_local(tmp_path, device="cpu", dtype="float32"):
            pass


def test_a_server_ends_with_a_parent_that_was_killed():
    from longalign_lib.serve import _LAUNCH

    watcher = _LAUNCH.split("from transformers")[0] + "time.sleep(60)"
    parent = (
        "import subprocess, sys, os, time\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())], start_new_session=True)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, watcher], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    os.kill(child, 0)  # it is there
    time.sleep(0.5)
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not _gone(child):
        time.sleep(0.1)
    assert _gone(child)


def _gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False
