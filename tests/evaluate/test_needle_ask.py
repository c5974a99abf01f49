import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from llm_faults import FaultServer, completion

from longalign_lib.evaluate import needle as N
from longalign_lib.evaluate.generate import Greedy
from longalign_lib.evaluate.needle_ask import read_results
from longalign_lib.llm import ChatClient

AXES = {"lengths": [300, 400], "depths": [0, 50, 100], "repeats": 2, "progress": False}


def knows(body):
    """Finds the hidden sentence by the first words of the question's names: a server that answers from the text alone."""
    text, question = body["messages"][-1]["content"].split("\n</text>")
    names = [w.strip("?") for w in question.split() if w[0].isupper() and w not in ("Question:", "What", "Where", "Answer")]
    return max(text.replace("\n", " ").split(". "), key=lambda s: sum(n in s for n in names))


@pytest.fixture
def server(monkeypatch):
    with FaultServer(knows, delay=0.01) as found:
        yield found


def client(server, **more):
    return ChatClient(server.url, more.pop("model", "m"), max_retries=0, concurrency=4, **more)


def test_an_endpoint_gets_the_messages_of_verified_prompts(server, tokenizer, tmp_path):
    frame = N.run_grid(client(server), tokenizer, **AXES, out=tmp_path / "n.jsonl", prompts_dir=tmp_path / "p")
    assert frame.hit.all() and len(server.requests) == 12 and 1 < server.most_at_once <= 4
    grid = N.build_grid(tokenizer, AXES["lengths"], AXES["depths"], AXES["repeats"])
    sent = {json.dumps(body["messages"]) for body, _ in server.requests}
    assert sent == {json.dumps(p.messages) for _, p in grid}
    assert all(body["temperature"] == 0 and body["max_tokens"] == 32 for body, _ in server.requests)
    assert {f.stem for f in (tmp_path / "p").iterdir()} == set(frame.message_hash)
    again = N.run_grid(client(server), tokenizer, **AXES, out=tmp_path / "n.jsonl")
    assert len(server.requests) == 12 and again.answer.tolist() == frame.answer.tolist()
    other = N.run_grid(client(server, model="m2"), tokenizer, **AXES, out=tmp_path / "n.jsonl", name="second")
    assert len(server.requests) == 24 and not set(other.key) & set(frame.key)


def test_an_endpoint_that_fails_half_the_calls(server, tokenizer, tmp_path):
    out, lock, seen = tmp_path / "n.jsonl", threading.Lock(), []

    def half(body):
        with lock:
            seen.append(body)
            if len(seen) <= 12 and len(seen) % 2:
                raise ConnectionError("dropped")
        return knows(body)

    server.reply = half
    frame = N.run_grid(client(server), tokenizer, **AXES, out=out)
    failed = frame[frame.status != "ok"]
    assert len(failed) == 6 and failed.status.str.startswith("failed: ChatError").all() and failed.score.isna().all()
    assert frame[frame.status == "ok"].hit.all() and len(read_results(out)) == 12
    frame = N.run_grid(client(server), tokenizer, **AXES, out=out)  # only what failed is asked again
    assert len(seen) == 18 and frame.hit.all() and (read_results(out).status == "ok").all()


def test_a_refused_key_ends_the_asking_and_marks_the_rest(server, tokenizer):
    server.steps = [{"status": 401, "body": b"{}"}] * 12
    frame = N.run_grid(client(server), tokenizer, **AXES)
    assert (frame.status != "ok").all() and len(server.requests) <= 4
    assert frame.status.str.contains("not asked").sum() >= 8


def test_an_empty_answer_is_a_miss_and_a_filtered_one_is_none(server, tokenizer, tmp_path):
    said = completion("", "content_filter"), completion("", "stop"), completion(None, "length")
    server.steps = [{"body": said[0]}, *[{"body": said[1]}] * 2, {"body": said[2]}]
    one = ChatClient(server.url, "m", max_retries=2, concurrency=1)
    frame = N.run_grid(one, tokenizer, **AXES | {"repeats": 1}, out=tmp_path / "n.jsonl")
    assert frame.status.str.startswith("failed: EmptyReplyError").tolist() == [True] + [False] * 5
    assert frame.answer.tolist()[1:3] == ["", ""] and frame.finish.tolist()[1:3] == ["stop", "length"]
    assert frame.hit.tolist()[1:] == [False, False, True, True, True] and frame.score.notna().sum() == 5


def test_other_end_tokens_are_asked_anew(make_model, tokenizer, tmp_path):
    model, axes = make_model(), {"lengths": [300], "depths": [50], "max_new_tokens": 6, "progress": False}
    before = N.run_grid(model, tokenizer, **axes, out=tmp_path / "n.jsonl")
    first = Greedy(model, tokenizer).prefill(N.build_grid(tokenizer, [300], [50])[0][1].input_ids)[0]
    model.generation_config.eos_token_id = [2, first]
    again = N.run_grid(model, tokenizer, **axes, out=tmp_path / "n.jsonl")
    assert again.answer[0] == "" != before.answer[0] and again.finish[0] == "stop"


SCRIPT = """
import sys, torch
sys.path[:0] = [sys.argv[2], sys.argv[3]]
torch.set_num_threads(1)
from conftest import tiny_model, toy_tokenizer
from longalign_lib.evaluate import needle as N
tokenizer = toy_tokenizer("bytes", N.default_haystack(0))
frame = N.run_grid(tiny_model(), tokenizer, [300, 500], [0, 20, 40, 60, 80, 100], 5, out=sys.argv[1], max_new_tokens=24,
                   progress=False)
frame.sort_values(["length", "depth", "repeat"]).drop(columns=["seconds", "reused", "computed"]).to_csv(sys.argv[1] + ".csv", index=False)
"""


def start(root, out):
    command = [sys.executable, "-c", SCRIPT, str(out), str(root / "tests" / "evaluate"), str(root)]
    return subprocess.Popen(command, cwd=root, start_new_session=True)


@pytest.mark.slow
def test_killed_twice_and_resumed_nothing_is_asked_again(root, tmp_path):
    assert start(root, tmp_path / "whole.jsonl").wait(120) == 0
    out, kept = tmp_path / "cut.jsonl", 0
    for wanted in (12, 30):
        process = start(root, out)
        while (len(out.read_bytes().splitlines()) if out.exists() else 0) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
        lines = [line for line in out.read_bytes().splitlines() if line]
        assert wanted <= len(lines) < 57 and len(lines) > kept
        kept = len(lines)
        with out.open("ab") as file:  # and a line that was cut off in the middle
            file.write(lines[-1][:80])
    assert start(root, out).wait(120) == 0
    whole = [line for line in out.read_bytes().splitlines() if line.endswith(b"}")]
    cells = [tuple(json.loads(line)[k] for k in ("length", "depth", "repeat")) for line in whole]
    assert len(cells) == len(set(cells)) == 60  # every cell's prompt answered once, over three starts
    assert (tmp_path / "cut.jsonl.csv").read_bytes() == (tmp_path / "whole.jsonl.csv").read_bytes()
