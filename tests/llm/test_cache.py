"""Answers on disk: torn lines, old files, two processes on one file, keys."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_faults import FaultServer

from longalign_lib.llm import ChatClient, Reply, Request
from longalign_lib.llm.cache import AnswerCache, request_hash

ASK = [{"role": "user", "content": "Where is the key?"}]


def client(server, cache, **options):
    return ChatClient(server.url, "m", cache=cache, timeout=5, max_wait=0.05, **options)


def reply(text, n=1):
    return Reply(text, n, n + 1, False, "stop")


def test_a_torn_line_costs_one_call_stays_visible_and_spoils_no_other(server, tmp_path):
    cache = tmp_path / "cache.jsonl"
    chat = client(server, cache)
    chat.chat(ASK)
    chat.chat(ASK, seed=1)
    cache.write_bytes(cache.read_bytes()[:-20])  # killed in mid-write
    torn = cache.read_bytes().splitlines()[1]
    again = client(server, cache)
    assert again.chat(ASK).cached and again.cache_problems == [] and not again.chat(ASK, seed=1).cached
    assert cache.read_bytes().splitlines()[1] == torn and len(cache.read_bytes().splitlines()) == 3
    last = client(server, cache)
    assert last.chat(ASK, seed=1).cached and len(server.requests) == 3
    assert [p["id"] for p in last.cache_problems] == ["cache.jsonl:2"] and "asked again" in last.cache_problems[0]["reason"]


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_a_file_cut_at_any_byte_loses_no_whole_line(tmp_path, at):
    whole = AnswerCache(tmp_path / "whole.jsonl")
    whole.append([(f"k{i}", reply(f"answer {i}"), {"model": "m"}) for i in range(4)])
    data = whole.path.read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(data[:at])
    cut = AnswerCache(tmp_path / "cut.jsonl")
    complete = data[:at].count(b"\n")
    assert len(cut) == complete and all(cut.get(f"k{i}").text == f"answer {i}" for i in range(complete))
    cut.append([("new", reply("kept"), {})])
    read = AnswerCache(tmp_path / "cut.jsonl")
    assert read.get("new").text == "kept" and len(read) >= complete + 1


def test_lines_that_hold_no_answer_are_listed_and_the_rest_is_read(tmp_path):
    path = tmp_path / "c.jsonl"
    good = {"key": "a", "text": "yes", "prompt_tokens": 1, "completion_tokens": 1, "finish_reason": "stop"}
    lines = [good, good | {"key": "b", "text": " "}, {"key": "c"}, [1], good | {"key": 3}, good | {"key": "d", "text": None}]
    path.write_bytes(b"\n".join(json.dumps(line).encode() for line in lines) + b"\n\n\xff\xfe\n" + b"x" * 100_000 + b"\n")
    cache = AnswerCache(path)
    assert cache.get("a") == Reply("yes", 1, 1, True, "stop") and len(cache) == 1
    assert [bad["id"].split(":")[1] for bad in cache.bad] == ["2", "3", "4", "5", "6", "8", "9"]


def test_what_was_spent_is_counted_once_and_is_never_an_answer(tmp_path):
    one, path = AnswerCache(tmp_path / "c.jsonl"), tmp_path / "c.jsonl"
    two = AnswerCache(path)
    one.spend(5, 0)
    two.spend(3, 2)  # one has written in between: two reads its own line too
    one.append([("a", reply("yes"), {})])
    assert two.get("none") is one.get("none") is None and one.tokens() == two.tokens() == (3, 9, 4) and len(one) == 1
    assert AnswerCache(path).tokens() == (3, 9, 4) and AnswerCache(None).tokens() == (0, 0, 0)
    whole = path.read_bytes()
    good = {"key": "k", "text": "no", "prompt_tokens": 1, "completion_tokens": 1, "finish_reason": "stop"}
    odd = [good | {"spent": "x"}, good | {"spent": "y", "prompt_tokens": -1}, {"spent": "z"}]
    path.write_bytes(whole + b"\n".join(json.dumps(line).encode() for line in odd) + b"\n" + whole[:20])
    read = AnswerCache(path)
    assert read.tokens() == (4, 10, 5) and read.get("k") is None and [bad["id"] for bad in read.bad] == ["c.jsonl:5", "c.jsonl:6"]


def test_files_written_before_settings_were_kept_are_read(server, tmp_path):
    identity = {"endpoint": "loopback", "model": "m"}
    asked = {"messages": ASK, "max_tokens": 256, "temperature": 0.0, "seed": None}
    content = json.dumps(identity | asked, sort_keys=True, ensure_ascii=False)
    old = {"key": hashlib.sha256(content.encode()).hexdigest(), "model": "m", "text": "from long ago"}
    old |= {"prompt_tokens": 3, "completion_tokens": 2, "finish_reason": "stop"}
    (tmp_path / "c.jsonl").write_text(json.dumps(old) + "\n")
    assert client(server, tmp_path / "c.jsonl").chat(ASK) == Reply("from long ago", 3, 2, True, "stop")
    assert not server.requests


_values = {"text": st.text(max_size=5), "max_tokens": st.integers(1, 3), "temperature": st.sampled_from([0.0, 0.5])}


@given(st.lists(st.fixed_dictionaries(_values), min_size=2, max_size=2))
@settings(max_examples=60, deadline=None)
def test_keys_are_equal_exactly_when_the_questions_are(pair):
    keys = []
    for value in pair:
        asked = Request([{"content": value["text"], "role": "user"}], value["max_tokens"], value["temperature"])
        keys.append(request_hash({"endpoint": "e", "model": "m"}, asked.settings()))
    assert (keys[0] == keys[1]) == (pair[0] == pair[1])


def test_what_another_client_adds_is_seen_without_reading_the_file_again(server, tmp_path, monkeypatch):
    cache = tmp_path / "c.jsonl"
    one, two = client(server, cache), client(server, cache)
    for seed in range(5):
        assert not one.chat(ASK, seed=seed).cached
    parsed = []
    take = AnswerCache._take
    monkeypatch.setattr(AnswerCache, "_take", lambda self, raw: (parsed.append(raw), take(self, raw))[1])
    assert all(two.chat(ASK, seed=seed).cached for seed in range(5))
    assert not two.chat(ASK, seed=9).cached and one.chat(ASK, seed=9).cached
    assert len(parsed) == 6 and len(server.requests) == 6  # five lines by two, one by one; its own lines nobody reads


WRITER = """
import sys
from longalign_lib.llm.cache import AnswerCache
from longalign_lib.llm.records import Reply
name, path = sys.argv[1], sys.argv[2]
cache = AnswerCache(path)
for n in range(150):
    cache.append([(f"{name}{n}{extra}", Reply(name * 3000, n, n, False, "stop"), {}) for extra in "ab"])
"""


def test_two_processes_append_to_one_file_and_no_line_is_mixed(tmp_path, root):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"key": "torn')
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name, str(path)], cwd=root) for name in "xy"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    cache = AnswerCache(path)
    assert len(cache) == 600 and [bad["id"] for bad in cache.bad] == ["c.jsonl:1"]
    assert all(cache.get(f"{name}{n}{extra}").text == name * 3000 for name in "xy" for n in range(150) for extra in "ab")


def test_an_answer_that_cannot_be_written_is_an_error_and_stays_in_memory(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):  # said before anything is paid for
        client(server, tmp_path / "file" / "c.jsonl")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longalign_lib.llm.cache.os.fsync", full)
    chat = client(server, tmp_path / "c.jsonl")
    with pytest.raises(OSError, match="No space left"):
        chat.chat(ASK)
    assert chat.chat(ASK).cached and len(server.requests) == 1
    with pytest.raises(OSError, match="No space left"):
        chat.chat_many([Request(ASK, seed=1), Request(ASK, seed=2)], progress=False)


def test_a_cache_file_that_was_replaced_by_a_shorter_one_is_read_anew(tmp_path):
    cache = AnswerCache(tmp_path / "c.jsonl")
    cache.append([("a", reply("long" * 50), {}), ("b", reply("two"), {})])
    other = AnswerCache(tmp_path / "other.jsonl")
    other.append([("c", reply("three"), {})])
    cache.path.write_bytes(other.path.read_bytes())
    assert cache.get("c").text == "three" and cache.get("a").text == "long" * 50


def test_two_clients_of_one_process_asking_at_once_keep_every_answer(tmp_path):
    with FaultServer(reply=lambda body: body["messages"][0]["content"].upper()) as running:
        ask = [Request([{"role": "user", "content": f"q{n}"}]) for n in range(60)]
        one, two = client(running, tmp_path / "c.jsonl"), client(running, tmp_path / "c.jsonl")
        assert [r.text for r in one.chat_many(ask[:40], progress=False)] == [f"Q{n}" for n in range(40)]
        assert [r.text for r in two.chat_many(ask, progress=False)] == [f"Q{n}" for n in range(60)]
        assert two.usage["cached"] == 40 and len(running.requests) == 60
