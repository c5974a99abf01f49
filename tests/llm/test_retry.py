"""Faults that pass and faults that last, against a real server; waits that an endpoint asks for."""

from __future__ import annotations

import random
import time
from email.utils import formatdate

import pytest
from llm_faults import FAULTS, LONG, completion

from longalign_lib.llm import ChatClient, ChatError, EmptyReplyError, Request
from longalign_lib.llm.retry import back_off, parse_reply, retry_after

ASK = [{"role": "user", "content": "Where is the key?"}]


def client(server, **options):
    return ChatClient(server.url, "m", **({"timeout": 5, "max_wait": 0.05} | options))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_passing_fault_is_tried_again_and_a_lasting_one_is_an_error_and_not_cached(server, fault, tmp_path):
    server.steps = [fault, fault]
    chat = client(server, cache=tmp_path / "cache.jsonl")
    assert chat.chat(ASK).text == "In the drawer."
    assert len(server.requests) == 3 and chat.usage["retries"] == 2 and chat.usage["failures"] == 0

    server.steps = [fault] * 3
    fresh = client(server, cache=tmp_path / "other.jsonl", max_retries=2)
    with pytest.raises(ChatError, match=r"127\.0\.0\.1 \(m\) gave no answer in 3 tries") as caught:
        fresh.chat(ASK)
    assert caught.value.status == fault.get("status")
    assert fresh.usage["failures"] == 1 and not (tmp_path / "other.jsonl").exists()
    assert fresh.chat(ASK).cached is False  # the failure left nothing behind: the next call asks


@pytest.mark.parametrize(
    ("status", "fix"),
    [(400, "beyond the model's window"), (401, "set SOME_KEY to a key"), (403, "the key in SOME_KEY may not use"),
     (404, "'m' must be a name that GET /v1/models lists"), (413, "shorten the prompt"), (422, "check the settings")],
)  # fmt: skip
def test_a_refused_request_is_not_tried_again_and_the_error_names_the_fix(server, status, fix):
    server.steps = [{"status": status, "body": b'{"error": {"message": "so says the server"}}'}]
    with pytest.raises(ChatError, match=f"(?s)in 1 tries: HTTP {status}.*{fix}.*so says the server") as caught:
        client(server, api_key_env="SOME_KEY").chat(ASK)
    assert caught.value.status == status and len(server.requests) == 1


def test_a_used_up_quota_is_not_waited_for(server):
    server.steps = [{"status": 429, "body": b'{"error": {"code": "insufficient_quota"}}'}]
    with pytest.raises(ChatError, match="top it up at the provider"):
        client(server).chat(ASK)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "requests", "match"),
    [
        (completion(""), 2, "text is empty, finish_reason 'stop'"),
        (completion(" \n"), 2, "text is empty"),
        (completion(None), 2, "text is empty"),
        (completion("", finish="length"), 1, "raise max_tokens"),
        (completion(None, finish="content_filter"), 1, "content_filter"),
    ],
)
def test_an_empty_answer_is_a_failure_and_paid_for_twice_at_most(server, tmp_path, body, requests, match):
    server.steps = [{"body": body}] * 5
    chat = client(server, cache=tmp_path / "c.jsonl")
    with pytest.raises(EmptyReplyError, match=match):
        chat.chat(ASK)
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    assert len(server.requests) == requests == len(lines) and all('"spent"' in line and "key" not in line for line in lines)
    assert chat.usage["completion_tokens"] == 4 * requests  # what it cost is counted


def test_a_long_answer_comes_whole_and_other_unicode_encodings_are_read(server, tmp_path):
    server.steps = [{"body": completion(LONG)}, {"body": completion("\u00e9t\u00e9 \u9510 \ud83d\ude00 \ud800").decode().encode("utf-16")}]
    cache = tmp_path / "c.jsonl"
    chat = client(server, cache=cache)
    assert len(LONG) > 2_000_000 and chat.chat(ASK).text == LONG
    assert chat.chat(ASK, seed=1).text == "\u00e9t\u00e9 \u9510 \U0001f600 \ud800"  # even what no UTF-8 file could hold as it is
    again = client(server, cache=cache)
    assert again.chat(ASK).text == LONG and again.chat(ASK, seed=1).text.endswith("\ud800") and len(server.requests) == 2


def test_retry_after_is_waited_for_in_seconds_milliseconds_and_as_a_date(server):
    for headers, least in (({"retry-after": "0.3"}, 0.3), ({"Retry-After-Ms": "200"}, 0.2)):
        before = len(server.requests)
        server.steps = [{"status": 429, "headers": headers, "body": b"{}"}]
        client(server, max_wait=1).chat(ASK)
        assert server.arrivals[before + 1] - server.arrivals[before] >= least
    until = time.time() + 2
    server.steps = [{"status": 503, "headers": {"Retry-After": formatdate(until, usegmt=True)}, "body": b"{}"}]
    client(server, max_wait=3).chat(ASK)
    assert time.time() >= int(until)


def test_a_long_retry_after_ends_the_tries(server):
    server.steps = [{"status": 429, "headers": {"Retry-After": "3600"}, "body": b"{}"}]
    with pytest.raises(ChatError, match=r"asks to wait 3600 s, more than max_wait 0\.05"):
        client(server).chat(ASK)
    assert len(server.requests) == 1


def test_a_pause_that_the_endpoint_asks_for_holds_back_every_call(server):
    server.steps = [{"status": 429, "headers": {"Retry-After": "0.5"}, "body": b"{}"}]
    chat = client(server, max_wait=2, concurrency=1)
    chat.chat_many([Request(ASK, seed=s) for s in range(4)], progress=False)
    assert len(server.requests) == 5
    server.steps, server.delay = [{"status": 429, "headers": {"Retry-After": "0.5"}, "body": b"{}", "sleep": 0}], 0.1
    wide, before = client(server, max_wait=2, concurrency=4), len(server.requests)
    wide.chat_many([Request(ASK, seed=s) for s in range(100, 112)], progress=False)
    arrivals = server.arrivals[before:]
    first, later = arrivals[0], arrivals[4:]  # four were in flight when the pause began
    assert len(arrivals) == 13 and min(later) - first >= 0.5


def test_time_out_of_one_try_and_of_the_whole_call(server):
    server.steps = [{"sleep": 1.0}] * 2
    with pytest.raises(ChatError, match=r"in 2 tries: no answer within 0\.2 s"):
        client(server, timeout=0.2, max_retries=1).chat(ASK)
    server.steps, began = [{"status": 500, "body": b"{}"}] * 50, time.monotonic()
    with pytest.raises(ChatError, match=r"deadline of 0\.6 s leaves no time for another try"):
        client(server, deadline=0.6, max_retries=50, max_wait=0.2).chat(ASK)
    assert time.monotonic() - began < 2


def test_nobody_listening():
    with pytest.raises(ChatError, match="in 2 tries: connection failed"):
        ChatClient("http://127.0.0.1:9/v1", "m", max_retries=1, max_wait=0.01).chat(ASK)


def test_waits_grow_are_spread_and_bounded():
    drawn = [back_off(n, None, 60, random.Random(s)) for n in range(40) for s in range(20)]
    assert max(drawn) == 60 and min(drawn) >= 0.25
    for n in range(6):
        row = drawn[20 * n : 20 * n + 20]
        assert 0.5 * 2**n * 0.5 <= min(row) < max(row) <= 0.5 * 2**n * 1.5 and len(set(row)) == 20
    assert 3 <= back_off(0, 3.0, 60, random.Random(0)) <= 3.3


@pytest.mark.parametrize(
    ("value", "seconds"), [("5", 5), ("-3", 0), ("inf", float("inf")), ("nan", None), ("soon", None), ("", None), ("Mon", None)]
)
def test_retry_after_values(value, seconds):
    assert retry_after({"retry-after": value}) == seconds
    assert retry_after({}) is None


def test_answers_in_parts_and_without_token_counts_are_read():
    parts = [{"type": "text", "text": "In the "}, {"type": "text", "text": "drawer."}]
    reply, known = parse_reply(completion(parts, usage=None))
    assert (reply.text, reply.prompt_tokens, known) == ("In the drawer.", 0, False)
    assert parse_reply(b"\xef\xbb\xbf" + completion())[1] is True  # a byte order mark
