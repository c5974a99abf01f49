"""The client against a real loopback server: what is sent, the cache, single flight, Jupyter, the key, the dry run."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time

import pytest
from llm_faults import FaultServer, completion

from longalign_lib.llm import ChatClient, ChatError, Reply, Request
from longalign_lib.llm import client as client_module

ASK = [{"role": "user", "content": "Where is the key?"}]
KEY = "sk-very-secret-0123456789"


def client(server, **options):
    return ChatClient(server.url, "m", **({"timeout": 5, "max_wait": 0.05} | options))


def asks(*contents, **settings):
    return [Request([{"role": "user", "content": str(c)}], **settings) for c in contents]


def test_an_answer_and_what_was_sent(server):
    chat = client(server, prices=(1.0, 10.0))
    reply = chat.chat(ASK, max_tokens=9, temperature=0.5, seed=3)
    assert reply == Reply("In the drawer.", 7, 4, False, "stop") and not reply.truncated
    assert server.requests[0][0] == {"model": "m", "messages": ASK, "max_tokens": 9, "temperature": 0.5, "seed": 3}
    counts = {"calls": 1, "cached": 0, "retries": 0, "failures": 0, "requests": 1, "prompt_tokens": 7}
    assert chat.usage == counts | {"completion_tokens": 4, "cost": pytest.approx(47e-6)}
    client(server, extra={"top_p": 0.9}, tokens_field="max_completion_tokens").chat(ASK, temperature=None)
    assert server.requests[1][0] == {"model": "m", "messages": ASK, "max_completion_tokens": 256, "top_p": 0.9}


def test_achat_asks_as_chat_does_and_from_a_running_loop_both_work(server):
    chat = client(server, concurrency=3)

    async def notebook_cell():
        sync = chat.chat(ASK)  # a notebook's thread runs a loop; chat may be called all the same
        many = await asyncio.gather(*(chat.achat(r.messages) for r in asks(*range(12))))
        listed = chat.chat_many(asks(*range(14)), progress=False)
        return sync, await chat.achat(ASK), many, listed

    server.delay = 0.02
    sync, awaited, many, listed = asyncio.run(notebook_cell())
    assert awaited == Reply(sync.text, 7, 4, True, "stop") and all(not r.cached for r in many)
    assert [r.cached for r in listed] == [True] * 12 + [False] * 2
    assert server.most_at_once == 3 and len(server.requests) == 15


def test_in_a_real_jupyter_kernel_a_cell_may_call_chat_and_await_achat(server, tmp_path, root):
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor

    cells = [
        f"import sys\nsys.path.insert(0, {str(root)!r})",
        f"from longalign_lib.llm import ChatClient\nclient = ChatClient({server.url!r}, 'm')\nm = {ASK!r}",
        "print(client.chat(m).text)", "print((await client.achat(m, seed=1)).text)",
        "print(len(client.chat_many([m, m], progress=False)), client.usage['calls'])",
    ]  # fmt: skip
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    ExecutePreprocessor(timeout=60, kernel_name="python3").preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    printed = [cell.outputs[0].text.strip() for cell in notebook.cells[2:]]
    assert printed == ["In the drawer.", "In the drawer.", "2 2"]


def test_one_question_in_flight_is_asked_once_however_many_threads_ask(server):
    server.delay = 0.2
    chat, replies = client(server), []
    threads = [threading.Thread(target=lambda: replies.append(chat.chat(ASK))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1 and sorted(r.cached for r in replies) == [False] + [True] * 5
    assert chat.usage["calls"] == 1 and chat.usage["cached"] == 5


def test_one_who_stops_waiting_does_not_take_the_answer_from_another(server):
    server.delay = 0.2
    chat = client(server)

    async def two():
        first = asyncio.create_task(chat.achat(ASK))
        second = asyncio.create_task(chat.achat(ASK))
        await asyncio.sleep(0.05)
        first.cancel()
        reply = await second
        alone = asyncio.create_task(chat.achat(ASK, seed=2))
        await asyncio.sleep(0.05)
        alone.cancel()
        await asyncio.wait([alone])
        await asyncio.sleep(0.05)
        again = await chat.achat(ASK, seed=2)  # asked anew: the first was dropped
        return first.cancelled() or first.cancelling(), reply.text, again.text

    assert asyncio.run(two()) == (True, "In the drawer.", "In the drawer.")
    assert len(server.requests) == 3 and chat.usage["calls"] == 2


def test_a_cache_hit_makes_no_request_even_in_a_new_client_and_other_settings_miss(server, tmp_path):
    cache = tmp_path / "deep" / "cache.jsonl"
    first = client(server, cache=cache).chat(ASK)
    again = client(server, cache=cache)
    assert again.chat(ASK) == Reply(first.text, 7, 4, True, "stop") and len(server.requests) == 1
    assert again.usage["cached"] == 1 and again.usage["calls"] == 0 and again.usage["prompt_tokens"] == 0
    for other in ({"max_tokens": 5}, {"temperature": 1.0}, {"seed": 1}):
        again.chat(ASK, **other)
    ChatClient(server.url, "another", cache=cache).chat(ASK)
    client(server, cache=cache, extra={"top_p": 0.5}).chat(ASK)
    assert len(server.requests) == 6
    record = json.loads(cache.read_text().splitlines()[0])
    settings = {"max_tokens": 256, "temperature": 0.0, "seed": None}
    assert record == {
        "key": again.hash(ASK), "model": "m", "settings": settings, "text": first.text, "prompt_tokens": 7,
        "completion_tokens": 4, "finish_reason": "stop",
    }  # fmt: skip


def test_an_answer_cut_by_max_tokens_is_kept_and_says_so(server, tmp_path):
    server.steps = [{"body": completion("In the dra", finish="length")}]
    chat = client(server, cache=tmp_path / "c.jsonl")
    assert chat.chat(ASK).truncated and chat.chat(ASK).truncated and len(server.requests) == 1


def test_another_checkpoint_in_the_same_folder_is_another_model(server, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, weights in (("model", b"one"), ("model", b"another"), ("model-00002-of-00002", b"a second file")):
        (folder / f"{name}.safetensors").write_bytes(weights)
        assert not ChatClient(server.url, folder, cache=tmp_path / "c.jsonl").chat(ASK).cached
    assert ChatClient(server.url, folder, cache=tmp_path / "c.jsonl").chat(ASK).cached
    assert str(tmp_path) not in (tmp_path / "c.jsonl").read_text()
    assert {body["model"] for body, _ in server.requests} == {"model"}


def test_the_key_is_sent_and_appears_nowhere_else(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")  # as `export SOME_KEY="$(cat file)"` may leave it
    cache = tmp_path / "cache.jsonl"
    with caplog.at_level(logging.DEBUG):
        chat = client(server, cache=cache, api_key_env="SOME_KEY", max_retries=0)
        chat.chat(ASK)
        assert server.requests[0][1] == f"Bearer {KEY}"
        server.steps = [{"status": 500, "body": json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()}]
        with pytest.raises(ChatError) as caught:
            chat.chat(ASK, seed=1)
        assert "bad key <key>" in str(caught.value) and caught.value.__cause__ is None
    seen = [str(caught.value), repr(chat), repr(chat._endpoint), cache.read_text(), caplog.text, str(chat.budget)]
    assert not any(KEY in text for text in seen) and "POST" in caplog.text


def test_a_remote_endpoint_needs_a_key_and_bad_arguments_are_named(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ChatError, match="set the environment variable NO_SUCH_KEY"):
        ChatClient("https://llm.example/v1", "m", api_key_env="NO_SUCH_KEY")
    monkeypatch.setenv("BAD_KEY", "sk-\u00e9 two")
    with pytest.raises(ChatError, match="BAD_KEY holds blanks or characters") as caught:
        ChatClient("https://llm.example/v1", "m", api_key_env="BAD_KEY")
    assert "two" not in str(caught.value)
    for url in ("llm", "ftp://llm.example/v1"):
        with pytest.raises(ValueError, match="is no URL"):
            ChatClient(url, "m")
    with pytest.raises(ValueError, match="holds a user name or password") as caught:
        ChatClient("https://me:hidden@llm.example/v1", "m")
    assert "hidden" not in str(caught.value)
    local = "http://127.0.0.1:9/v1"
    for wrong in ({"concurrency": 0}, {"max_retries": -1}, {"timeout": 0}, {"prices": (1,)}, {"max_cost": 1}, {"max_calls": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ChatClient(local, "m", **wrong)


@pytest.mark.parametrize(
    ("messages", "settings", "match"),
    [
        ([], {}, "messages is empty"),
        ("Where?", {}, "is no message"),
        ([{"role": "user"}], {}, "is no message"),
        (ASK, {"max_tokens": 0}, "max_tokens must be"),
        (ASK, {"temperature": -1}, "temperature must be"),
        ([{"role": "user", "content": "cut \ud83d"}], {}, "lone surrogate at character 4"),
    ],
)
def test_a_question_that_is_none_is_refused_before_any_request(server, messages, settings, match):
    with pytest.raises((ValueError, ChatError), match=match):
        client(server).chat(messages, **settings)
    assert not server.requests


def test_the_dry_run_counts_what_a_real_run_then_takes_and_asks_nothing(server, tmp_path, tokenizer, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    requests = asks("one", "two", "two", "three", max_tokens=50)
    real = client(server, cache=tmp_path / "c.jsonl")
    real.chat(requests[0].messages, max_tokens=50)
    dry = client(server, cache=tmp_path / "c.jsonl", dry_run=True, prices=(2.0, 4.0))
    guess, counted = dry.estimate(requests), dry.estimate(requests, tokenizer)
    assert (guess.requests, guess.cached, guess.repeated, guess.calls) == (4, 1, 1, 2)
    assert not guess.counted and counted.counted and counted.max_completion_tokens == 100
    text = [tokenizer.apply_chat_template(r.messages, tokenize=False, add_generation_prompt=True) for r in requests]
    assert counted.prompt_tokens == sum(len(tokenizer.encode(text[i])) for i in (1, 3))
    assert counted.cost == pytest.approx((2 * counted.prompt_tokens + 4 * 100) / 1e6)
    assert "2 calls" in str(counted) and "cost at most" in str(counted)
    assert len(server.requests) == 1 and dry.chat(requests[0].messages, max_tokens=50).cached
    with pytest.raises(ChatError, match="dry_run=True"):
        dry.chat(requests[1].messages, max_tokens=50)
    real.chat_many(requests, progress=False)
    assert len(server.requests) == 1 + guess.calls
    remote = ChatClient("https://llm.example/v1", "m", api_key_env="NO_SUCH_KEY", dry_run=True)
    assert remote.estimate(requests).cost is None


def test_a_client_that_is_gone_closes_its_connections(server):
    import gc

    chat = client(server)
    chat.chat(ASK)
    connection = chat._asker._connection
    del chat
    gc.collect()
    deadline = time.monotonic() + 5
    while not connection.is_closed() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert connection.is_closed()


def test_waiting_inside_the_clients_own_loop_is_an_error_and_no_deadlock(server):
    chat = client(server)

    async def inside():
        chat.chat(ASK)

    with pytest.raises(RuntimeError, match="use achat"):
        client_module.loop.submit(inside()).result(5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_error_that_ends_loops_reaches_its_caller_and_strands_nobody_else(server, error):
    chat = client(server)

    async def inside():
        raise error

    with pytest.raises(error):
        client_module.loop.submit(inside()).result(5)
    assert client_module.loop.submit(chat.achat(ASK)).result(5).text == "In the drawer."


def test_a_client_does_not_ask_in_a_forked_process_and_says_why(server):
    chat = client(server)
    chat.chat(ASK)
    chat._asker._pid -= 1  # as a fork would see it
    with pytest.raises(ChatError, match="make one in each process"):
        chat.chat(ASK, seed=1)
    assert chat.chat(ASK).cached and len(server.requests) == 1


LEAVE = """
import asyncio, sys
from longalign_lib.llm import ChatClient
client = ChatClient(sys.argv[1], "m", cache=sys.argv[2], timeout=60)
async def main():
    tasks = [asyncio.create_task(client.achat([{"role": "user", "content": f"q{n}"}])) for n in range(9)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    raise SystemExit(3)
asyncio.run(main())
"""


def test_a_script_that_ends_amid_its_calls_ends_at_once_and_silently(tmp_path, root):
    with FaultServer() as server:
        server.steps = [{}] + [{"sleep": 20}] * 8
        command = [sys.executable, "-c", LEAVE, server.url, str(tmp_path / "c.jsonl")]
        ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=15)
    assert (ended.returncode, ended.stderr) == (3, "") and len((tmp_path / "c.jsonl").read_bytes().splitlines()) == 1


def test_importing_the_client_needs_neither_torch_nor_transformers(root):
    """A judge or a builder that asks a remote endpoint starts at once."""
    code = "import sys, longalign_lib.llm as llm; llm.ChatClient('http://127.0.0.1:9/v1', 'm'); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert printed == "False\n"
