"""The local server: it answers, heeds sampling, says why it did not start, and leaves no process behind."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from longalign_lib import serve
from longalign_lib.llm import ChatClient, ChatError, Request
from longalign_lib.models import model_dir
from longalign_lib.serve import ServerError, serve_local

ASK = [{"role": "user", "content": "Where is the key?"}]


def test_serve_local_names_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        with serve_local(tmp_path):
            pass


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, tokenizer):
    """A random one-layer model with the default tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def fake_server(tmp_path, monkeypatch):
    """A folder that passes for a model's; in place of transformers a server that says yes to /health starts at once."""
    (tmp_path / "config.json").write_text("{}")
    code = "import sys, http.server as h\nfrom test_serve import Healthy\nport = int(sys.argv[sys.argv.index('--port') + 1])"
    monkeypatch.setattr(serve, "_LAUNCH", f"{code}\nh.ThreadingHTTPServer(('127.0.0.1', port), Healthy).serve_forever()")
    for folder in (Path(__file__).parent, Path(__file__).parents[1]):
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    return tmp_path


def test_serve_local_answers_and_leaves_no_process(tmp_path, tiny_folder):
    log = tmp_path / "server.log"
    with serve_local(tiny_folder, log=log, device="cpu", dtype="float32") as url:
        chat = ChatClient(url, tiny_folder, max_retries=0, timeout=60)
        reply = chat.chat(ASK, max_tokens=3)
        assert reply.completion_tokens == 3 and reply.prompt_tokens > 10 and chat.label == "tiny"
        warm = [chat.chat(ASK, max_tokens=8, temperature=1.0, seed=seed).text for seed in (1, 2, 1)]
        assert warm[0] == warm[2] != warm[1]  # a random model's samples differ by seed and repeat with it
        assert len({chat.chat(ASK, max_tokens=8, seed=seed).text for seed in (1, 2)}) == 1  # temperature 0: greedy
    with pytest.raises(ChatError, match="connection failed"):
        ChatClient(url, tiny_folder, max_retries=0).chat(ASK)
    assert log.stat().st_size > 0


def test_serve_local_reports_why_a_server_did_not_start(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("longalign_lib.serve._LAUNCH", "raise SystemExit('no weights in this folder')")
    with pytest.raises(ServerError, match=r"(?s)ended with status 1.*Its last lines:\nno weights in this folder"):
        with serve_local(tmp_path, device="cpu", dtype="float32"):
            pass

def test_the_default_model_is_asked_one_question_at_a_time_so_that_seeds_hold():
    """`transformers serve` sets a seed when a request arrives: two in flight at once would disturb each other's draws."""
    folder = model_dir()
    requests = [Request([{"role": "user", "content": f"Tell me about the number {n}."}], 6, 1.0, n) for n in range(4)]
    with serve_local(folder) as url:
        clients = [ChatClient(url, folder, max_retries=0, timeout=60) for _ in range(2)]
        first, again = ([r.text for r in c.chat_many(requests, progress=False)] for c in clients)
    assert clients[0].concurrency == 1 and first == again and len(set(first)) == 4
    assert ChatClient(url, "some-name").concurrency == 8


def test_serve_local_names_a_port_that_is_taken(tiny_folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=rf"port {port} cannot be used \(Address already in use\)"):
            with serve_local(tiny_folder, port=port, device="cpu", dtype="float32"):
                pass
    with pytest.raises(ServerError, match="port 70000 cannot be used"):
        with serve_local(tiny_folder, port=70000, device="cpu", dtype="float32"):
            pass


def test_serve_local_takes_another_port_when_one_is_lost_between_the_look_and_the_start(fake_server, monkeypatch):
    """The first free port is taken by a foreign server that even answers /health: it must not be mistaken for ours."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as foreign:
        threading.Thread(target=foreign.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        free, offered = serve._free_port, [foreign.server_port]
        monkeypatch.setattr(serve, "_free_port", lambda wanted: offered.pop() if offered else free(wanted))
        log = fake_server / "log"
        with serve_local(fake_server, device="cpu", dtype="float32", log=log) as url:
            assert f":{foreign.server_port}/" not in url
        foreign.shutdown()
    assert "Address already in use" in log.read_text()


def test_serve_local_names_missing_packages(tiny_folder, monkeypatch):
    monkeypatch.setattr(serve, "NEEDS", ("json", "no_such_package"))
    with pytest.raises(ServerError, match=r"needs no_such_package: pip install 'transformers\[serving\]'"):
        with serve_local(tiny_folder):
            pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_server_ends_when_the_block_ends_by_an_error(fake_server, monkeypatch, error):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(serve.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(error), serve_local(fake_server, device="cpu", dtype="float32"):
        assert started[0].poll() is None
        raise error("stop")
    assert len(started) == 1 and started[0].poll() is not None


def test_serve_local_says_when_nothing_answers_in_time(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(serve, "_LAUNCH", "import time; print('loading', flush=True); time.sleep(60)")
    log = tmp_path / "server.log"
    log.write_text("from an earlier run\n")
    with pytest.raises(ServerError, match=r"(?s)did not answer within 1\.5 s. Its last lines:\nloading$"):
        with serve_local(tmp_path, device="cpu", dtype="float32", start_timeout=1.5, log=log):
            pass


class Healthy(http.server.BaseHTTPRequestHandler):
    """Says yes to /health, whoever asks."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args):
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
