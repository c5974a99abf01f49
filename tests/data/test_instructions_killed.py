"""Self-Instruct cut off: by a kill, between two writes, in the middle of a line; nothing is lost or asked twice."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time

import pytest
from test_instructions import Scripted, build, documents

from longalign_lib.data import outcomes
from longalign_lib.data.instructions import build_instructions
from longalign_lib.data.jsonl import append_jsonl, read_jsonl


def test_a_file_torn_by_a_kill_costs_only_the_torn_document(tokenizer, tmp_path):
    docs = documents(3)
    whole = build(docs, Scripted(), tokenizer, tmp_path, seed=0)
    path = tmp_path / "instructions.jsonl"
    path.rename(tmp_path / "outcomes.jsonl")
    (tmp_path / "outcomes.jsonl").write_bytes((tmp_path / "outcomes.jsonl").read_bytes()[:-40])
    model = Scripted()
    built = build(docs, model, tokenizer, tmp_path, seed=0)
    assert built.samples == whole.samples and len(model.asked) == 2


def test_a_kill_between_the_two_files_changes_nothing(tokenizer, tmp_path):
    docs = documents(4)
    build(docs[:2], Scripted(), tokenizer, tmp_path, seed=0)
    built = build(docs, Scripted(answer=""), tokenizer, tmp_path, seed=0)
    wanted = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for r in built.rejected:  # as if the journal had not been let go of, and the second file not been written
        append_jsonl(tmp_path / "outcomes.jsonl", r)
    (tmp_path / "rejected.jsonl").unlink()
    model = Scripted()
    build(docs, model, tokenizer, tmp_path, seed=0)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == wanted and not model.asked


@pytest.mark.parametrize("last", range(6))
def test_a_stop_at_any_write_loses_no_sample_that_has_become_a_duplicate(tokenizer, tmp_path, monkeypatch, last):
    """The folder holds a sample that repeats one of a document that comes before it now; the run ends before write `last`."""
    docs, same = documents(2), "The gauge at Skerry Pier was bought in 1987."
    one = functools.partial(build_instructions, tokenizer=tokenizer, seed=0, max_repeats=1)
    alike = Scripted("1. When was the gauge bought?", same)
    for name in ("whole", "stopped"):
        one(docs[1:], alike, folder=tmp_path / name)
    one(docs, alike, folder=tmp_path / "whole")
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    done = []

    def until(function):
        def step(*arguments, **more):
            if len(done) == last:
                raise KeyboardInterrupt
            done.append(function)
            return function(*arguments, **more)

        return step

    for target, name in ((outcomes, "append_jsonl"), (outcomes, "write_jsonl"), (outcomes.Path, "unlink")):
        monkeypatch.setattr(target, name, until(getattr(target, name)))
    if last < 5:  # journal of en0, of the sample that moves, two files, the journal's end
        with pytest.raises(KeyboardInterrupt):
            one(docs, alike, folder=tmp_path / "stopped")
    else:
        one(docs, alike, folder=tmp_path / "stopped")
    assert len(done) == min(last, 5)
    monkeypatch.undo()
    held = {r["document_id"] for p in (tmp_path / "stopped").glob("*.jsonl") for r in read_jsonl(p, [])}
    assert held == ({"en1"} if last == 0 else {"en0", "en1"})
    asked = Scripted("1. When was the gauge bought?", same)
    one(docs, asked, folder=tmp_path / "stopped")
    assert {p.name: p.read_bytes() for p in (tmp_path / "stopped").iterdir()} == whole
    assert len(asked.asked) == (2 if last == 0 else 0)


KILLED = """
import asyncio, random, sys
from longalign_lib.data import instructions
from longalign_lib.data.documents import Document
from longalign_lib.llm import Reply
instructions.encode_chat = lambda tokenizer, messages: ([0] * sum(len(m["content"]) for m in messages), None)

class Model:
    label = "scripted"
    async def achat(self, messages, max_tokens=256, temperature=0.0, seed=None):
        prompt = messages[-1]["content"]
        await asyncio.sleep(random.random() * float(sys.argv[2]))
        number = prompt.split("mark ")[1].split(".")[0]
        text = "1. Which mark does the gauge have?\\n2. When was the gauge bought?"
        return Reply(text if "1 to 5" in prompt else f"The gauge has the mark {number}.", 1, 1, False, "stop")

docs = [Document(f"d{i}", f"The gauge was bought in 1987. It has the mark {i}.", "books", "en") for i in range(60)]
instructions.build_instructions(docs, Model(), None, sys.argv[1], seed=0, workers=8, progress=False, max_repeats=20)
"""


def test_killed_twice_and_run_again_it_writes_the_same_files(root, tmp_path):
    (tmp_path / "run.py").write_text(KILLED)

    def start(name, pace):
        return subprocess.Popen([sys.executable, tmp_path / "run.py", tmp_path / name, str(pace)], cwd=root, env=None)

    assert start("whole", 0).wait(60) == 0
    journal = tmp_path / "killed" / "outcomes.jsonl"
    for least in (8, 25):
        process = start("killed", 0.2)
        deadline = time.monotonic() + 30
        while not (journal.is_file() and journal.read_bytes().count(b"\n") >= least):
            assert process.poll() is None and time.monotonic() < deadline, "ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
        assert not (tmp_path / "killed" / "instructions.jsonl").exists()
    assert start("killed", 0).wait(60) == 0
    for name in ("instructions.jsonl", "rejected.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    names = [s["document_id"] for s in read_jsonl(tmp_path / "whole" / "instructions.jsonl")]
    assert names == sorted(names, key=lambda n: int(n[1:])) and 20 < len(names) < 60 and not journal.exists()
