"""Killed with SIGKILL again and again: no answered call is repeated, and the file is the same in the end."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

from llm_faults import FAULTS, FaultServer

CALLS, SLOTS = 300, 6
SCRIPT = f"""
import sys
from longalign_lib.data.jsonl import write_jsonl
from longalign_lib.llm import ChatClient, Request
url, cache, out = sys.argv[1:]
client = ChatClient(url, "m", cache=cache, concurrency={SLOTS}, max_wait=0.05)
requests = [Request([{{"role": "user", "content": f"question {{n}}"}}], seed=n) for n in range({CALLS})]
replies = client.chat_many(requests, progress=False)
write_jsonl(out, [{{"question": r.messages[0]["content"], "answer": a.text, "tokens": a.completion_tokens}}
                  for r, a in zip(requests, replies)])
"""


def answer(body: dict) -> str:
    """A long answer that depends on the question alone, so that a kill can fall into its writing."""
    return f"{body['messages'][0]['content']}: " + " ".join(random.Random(body["seed"]).choices("abcdefgh", k=4000))


def start(root, server, cache, out):
    command = [sys.executable, "-c", SCRIPT, server.url, str(cache), str(out)]
    return subprocess.Popen(command, cwd=root, start_new_session=True)


def keys_in(cache) -> int:
    whole = cache.read_bytes().split(b"\n")[:-1] if cache.exists() else []
    return len({json.loads(line)["key"] for line in whole if line.startswith(b"{") and line.endswith(b"}")})


def test_killed_at_random_moments_no_answered_call_is_repeated_and_the_file_is_the_same(tmp_path, root):
    draw = random.Random(20)
    with FaultServer(answer, delay=0.004) as server:
        assert start(root, server, tmp_path / "one.jsonl", tmp_path / "one.out").wait(60) == 0
        assert len(server.requests) == CALLS
        expected = (tmp_path / "one.out").read_bytes()

    cache, out, kills = tmp_path / "cache.jsonl", tmp_path / "two.out", 0
    moments = [draw.randrange(10, 45) for _ in range(4)]  # requests after a start, at which it is killed
    with FaultServer(answer, delay=0.004) as server:
        allowed = 0
        for moment in moments:
            begun, before = len(server.requests), keys_in(cache)
            process = start(root, server, cache, out)
            while len(server.requests) - begun < moment and process.poll() is None:
                time.sleep(0.001)
            time.sleep(draw.random() * 0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait(10) == -signal.SIGKILL and not out.exists()
            kills += 1
            time.sleep(0.3)  # what was in flight arrives
            kept = keys_in(cache)
            lost = len(server.requests) - allowed - kept
            assert before < kept and 0 <= lost <= SLOTS  # no more than what was in flight is asked again
            allowed += lost
        server.steps = [FAULTS["500"], FAULTS["dropped-in-the-body"]]  # and faults on top
        assert start(root, server, cache, out).wait(60) == 0
        assert kills == 4 and out.read_bytes() == expected
        assert len(server.requests) == CALLS + allowed + 2
        assert allowed <= kills * SLOTS and sum(n - 1 for n in server.asked.values()) == allowed + 2
        assert start(root, server, cache, tmp_path / "three.out").wait(60) == 0
        assert len(server.requests) == CALLS + allowed + 2  # a rerun of a finished run asks nothing
        assert (tmp_path / "three.out").read_bytes() == expected
