"""Many questions at once: order, failures in their places, the bar, hopeless endpoints, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from llm_faults import FAULTS, FaultServer

from longalign_lib.llm import ChatClient, ChatError, Reply, Request


def client(server, **options):
    return ChatClient(server.url, "m", **({"timeout": 5, "max_wait": 0.05} | options))


def asks(number):
    return [Request([{"role": "user", "content": f"question {n}"}]) for n in range(number)]


def test_answers_come_in_the_order_of_the_questions_and_at_most_as_many_at_once(server):
    server.reply = lambda body: body["messages"][0]["content"][::-1]
    server.delay = 0.05
    requests = asks(40)
    requests[3] = requests[7]  # the same question twice
    forms = [requests[0], {"messages": requests[1].messages, "max_tokens": 5}, requests[2].messages, *requests[3:]]
    replies = client(server, concurrency=5).chat_many(forms, progress=False)
    assert [r.text for r in replies] == [r.messages[0]["content"][::-1] for r in requests]
    assert server.most_at_once == 5 and len(server.requests) == 39 and server.asked["question 7"] == 1
    assert client(server).chat_many([], progress=False) == []


def test_one_failure_stays_in_its_place(server, tmp_path):
    requests = asks(10)
    requests[4] = Request([{"role": "user", "content": "cut \ud83d"}])
    server.steps = [FAULTS["500"]] * 3 + [{"status": 400, "body": b"too long"}]
    chat = client(server, cache=tmp_path / "c.jsonl", concurrency=1)
    replies = chat.chat_many(requests, progress=False)
    assert [n for n, r in enumerate(replies) if isinstance(r, ChatError)] == [0, 4]
    assert "HTTP 400" in str(replies[0]) and "lone surrogate" in str(replies[4])
    replies = chat.chat_many(requests, progress=False)
    assert [n for n, r in enumerate(replies) if isinstance(r, ChatError)] == [4] and not replies[0].cached


def test_a_request_that_is_none_is_refused_before_anything_is_asked(server):
    for wrong, match in (({"prompt": "x"}, "does not know prompt"), ({"max_tokens": 3}, "needs messages"), ("Where?", "no message")):
        with pytest.raises(ValueError, match=match):
            client(server).chat_many([*asks(3), wrong], progress=False)
    assert not server.requests


@pytest.mark.parametrize("status", [401, 404])
def test_an_endpoint_that_refuses_all_is_asked_no_further(server, tmp_path, status):
    chat = client(server, cache=tmp_path / "c.jsonl", concurrency=2)
    chat.chat(asks(30)[20].messages)
    server.steps = [{"status": status, "body": b"no"}] * 100
    replies = chat.chat_many(asks(30), progress=False)
    assert len(server.requests) <= 1 + 3 and replies[20].cached
    assert all("not asked" in str(r) and f"HTTP {status}" in str(r) for r in replies[5:20])


def test_the_bar_shows_the_cost_so_far(server, capsys, monkeypatch):
    from tqdm.std import tqdm

    import longalign_lib.llm.batch as batch

    monkeypatch.setattr(batch, "tqdm", lambda **options: tqdm(**(options | {"delay": 0, "leave": True, "mininterval": 0})))
    chat = client(server, prices=(1e6, 1e6))
    chat.chat_many(asks(4), desc="instructions")
    shown = capsys.readouterr().err
    assert "instructions: 100%" in shown and "cost 44.0000, 0 cached, 0 failed" in shown
    client(server).chat_many(asks(2))
    assert "22 tokens, 0 cached, 0 failed" in capsys.readouterr().err


SCRIPT = """
import json, signal, sys
from longalign_lib.llm import ChatClient, Request
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
client = ChatClient(sys.argv[1], "m", cache=sys.argv[2], concurrency=4)
print("ready", flush=True)
try:
    client.chat_many([Request([{"role": "user", "content": f"question {n}"}]) for n in range(200)])
except KeyboardInterrupt:
    print(json.dumps(client.usage), flush=True)
"""


def test_ctrl_c_starts_nothing_new_and_loses_no_answer(tmp_path, root):
    with FaultServer(delay=0.05) as server:
        cache = tmp_path / "c.jsonl"
        command = [sys.executable, "-c", SCRIPT, server.url, str(cache)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=root, start_new_session=True, **streams)
        assert process.stdout.readline() == "ready\n"
        while len(server.requests) < 20:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=30)
        assert printed, f"exit status {process.returncode} after {len(server.requests)} requests:\n{errors}"
        usage, asked = json.loads(printed), len(server.requests)
        assert usage["calls"] == asked == usage["requests"] < 60 and "requests in flight get 10 s" in errors
        assert len(cache.read_bytes().splitlines()) == asked  # all that were in flight were let finish
        again = client(server, cache=cache, concurrency=16).chat_many(asks(200), progress=False)
        assert len(server.requests) == 200 and all(isinstance(r, Reply) for r in again)
        assert max(server.asked.values()) == 1
