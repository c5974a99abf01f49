"""The chat client against a real loopback server with injected faults."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from longalign_lib.llm import ChatClient, ChatError, Reply

ASK = [{"role": "user", "content": "Where is the key?"}]
KEY = "sk-very-secret-0123456789"


def completion(text="In the drawer.", choices=True) -> bytes:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice] if choices else []}
    return json.dumps(body | {"usage": {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}}).encode()


class Server:
    """Answers with the scripted steps one after the other, then well; keeps what it was asked."""

    def __init__(self):
        self.steps, self.requests, self.arrivals = [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.requests.append((body, self.headers.get("authorization")))
                outer.arrivals.append(time.monotonic())
                step = outer.steps.pop(0) if outer.steps else {}
                time.sleep(step.get("sleep", 0))
                if step.get("drop"):
                    self.close_connection = True
                    self.connection.close()
                    return
                data = step.get("body", completion())
                self.send_response(step.get("status", 200))
                self.send_header("content-type", step.get("type", "application/json"))
                self.send_header("content-length", str(len(data)))
                for name, value in step.get("headers", {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request, client_address):  # a dropped connection is meant to be one
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


def client(server, **options):
    return ChatClient(server.url, "m", **({"timeout": 5, "max_wait": 0.05} | options))


def test_an_answer_and_what_was_sent(server):
    chat = client(server)
    reply = chat.chat(ASK, max_tokens=9, temperature=0.5, seed=3)
    assert reply == Reply("In the drawer.", 7, 4, False, "stop")
    sent, _ = server.requests[0]
    assert (sent["model"], sent["messages"], sent["max_tokens"], sent["temperature"], sent["seed"]) == (
        "m", ASK, 9, 0.5, 3,
    )  # fmt: skip
    expected = {"calls": 1, "cached": 0, "retries": 0, "failed": 0, "prompt_tokens": 7, "completion_tokens": 4}
    assert chat.usage == expected


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 429, "headers": {"retry-after": "0.01"}, "body": b'{"error": {"message": "slow down"}}'},
        {"status": 500, "body": b"boom", "type": "text/plain"},
        {"drop": True},
        {"body": b'{"choices": [', "type": "application/json"},
        {"body": b"<html>proxy error</html>", "type": "text/html"},
        {"body": completion(choices=False)},
        {"body": b"[1, 2]"},
        {"body": b'{"choices": [{"index": 0}]}'},
        {"body": b"\xff\xfe not utf-8"},
    ],
    ids=["429", "500", "dropped", "cut-json", "html", "no-choices", "a-list", "no-message", "charset"],
)
def test_a_passing_fault_is_tried_again_and_a_lasting_one_is_an_error_and_not_cached(server, fault, tmp_path):
    cache = tmp_path / "cache.jsonl"
    server.steps = [fault, fault]
    chat = client(server, cache=cache)
    assert chat.chat(ASK).text == "In the drawer."
    assert len(server.requests) == 3 and chat.usage["retries"] == 2 and chat.usage["failed"] == 0

    server.steps = [fault] * 3
    fresh = client(server, cache=tmp_path / "other.jsonl", max_retries=2)
    with pytest.raises(ChatError, match=r"127\.0\.0\.1 .* in 3 tries"):
        fresh.chat(ASK)
    assert fresh.usage["failed"] == 1 and not (tmp_path / "other.jsonl").exists()
    assert fresh.chat(ASK).cached is False  # the failure left nothing behind: the next call asks


def test_retry_after_is_waited_for_and_a_long_one_ends_the_tries(server):
    server.steps = [{"status": 429, "headers": {"retry-after": "0.3"}, "body": b"{}"}]
    client(server, max_wait=1).chat(ASK)
    assert server.arrivals[1] - server.arrivals[0] >= 0.3
    server.steps = [{"status": 429, "headers": {"Retry-After": "3600"}, "body": b"{}"}]
    with pytest.raises(ChatError, match="asks to wait 3600 s"):
        client(server).chat(ASK)
    assert len(server.requests) == 3  # not asked again


def test_time_out(server):
    server.steps = [{"sleep": 1.0}] * 2
    with pytest.raises(ChatError, match=r"no answer within 0\.2 s"):
        client(server, timeout=0.2, max_retries=1).chat(ASK)


def test_a_refused_request_is_not_tried_again(server):
    server.steps = [{"status": 400, "body": b'{"error": {"message": "context too long"}}'}]
    with pytest.raises(ChatError, match=r"in 1 tries: HTTP 400.*context too long"):
        client(server).chat(ASK)
    assert len(server.requests) == 1


def test_nobody_listening():
    with pytest.raises(ChatError, match="connection failed"):
        ChatClient("http://127.0.0.1:9/v1", "m", max_retries=1, max_wait=0.01).chat(ASK)


def test_a_cache_hit_makes_no_request_even_in_a_new_client_and_other_settings_miss(server, tmp_path):
    cache = tmp_path / "deep" / "cache.jsonl"
    first = client(server, cache=cache).chat(ASK)
    again = client(server, cache=cache)
    assert again.chat(ASK) == Reply(first.text, 7, 4, True, "stop") and len(server.requests) == 1
    assert again.usage["cached"] == 1 and again.usage["calls"] == 0 and again.usage["prompt_tokens"] == 0
    for other in ({"max_tokens": 5}, {"temperature": 1.0}, {"seed": 1}):
        again.chat(ASK, **other)
    ChatClient(server.url, "another", cache=cache).chat(ASK)
    assert len(server.requests) == 5


def test_another_checkpoint_in_the_same_folder_is_another_model(server, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for weights in (b"one", b"another"):
        (folder / "model.safetensors").write_bytes(weights)
        assert not ChatClient(server.url, folder, cache=tmp_path / "c.jsonl").chat(ASK).cached
    assert str(tmp_path) not in (tmp_path / "c.jsonl").read_text()


def test_a_torn_cache_line_costs_one_call_and_spoils_no_other(server, tmp_path):
    cache = tmp_path / "cache.jsonl"
    chat = client(server, cache=cache)
    chat.chat(ASK)
    chat.chat(ASK, seed=1)
    cache.write_bytes(cache.read_bytes()[:-20])  # killed in mid-write
    again = client(server, cache=cache)
    assert again.chat(ASK).cached and not again.chat(ASK, seed=1).cached
    assert client(server, cache=cache).chat(ASK, seed=1).cached


def test_the_key_is_sent_and_appears_nowhere_else(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    cache = tmp_path / "cache.jsonl"
    chat = client(server, cache=cache, api_key_env="SOME_KEY", max_retries=0)
    chat.chat(ASK)
    assert server.requests[0][1] == f"Bearer {KEY}"
    server.steps = [{"status": 500, "body": json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()}]
    with pytest.raises(ChatError) as caught:
        chat.chat(ASK, seed=1)
    assert "bad key <key>" in str(caught.value) and KEY not in str(caught.value)
    assert KEY not in cache.read_text()


def test_a_remote_endpoint_needs_a_key(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ChatError, match="set the environment variable NO_SUCH_KEY"):
        ChatClient("https://llm.example/v1", "m", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ValueError, match="is no URL"):
        ChatClient("llm", "m")


def test_the_budget_counts_every_request(server):
    server.steps = [{"status": 500, "body": b"{}"}]
    chat = client(server, max_calls=2)
    chat.chat(ASK)
    with pytest.raises(ChatError, match="budget of 2 requests"):
        chat.chat(ASK, seed=1)
    assert len(server.requests) == 2
