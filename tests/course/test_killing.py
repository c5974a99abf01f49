"""The small run of notebook 06: what it consists of, that a kill leaves nobody alive, and what is read from its folder."""

import itertools
import json
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest

from longalign_lib.course import killing
from longalign_lib.data.tokens import TokenStore

FAMILY = """
import pathlib, subprocess, sys, time
folder, depth = pathlib.Path(sys.argv[1]), int(sys.argv[2])
if depth:
    for _ in range(2):
        subprocess.Popen([sys.executable, __file__, str(folder), str(depth - 1)], start_new_session=True)
(folder / f"{__import__('os').getpid()}.pid").touch()
time.sleep(120)
"""


@pytest.fixture
def family(tmp_path):
    """A command whose process starts two more, each a session of its own, which start two more: seven in all."""
    (tmp_path / "family.py").write_text(FAMILY)
    return [sys.executable, str(tmp_path / "family.py"), str(tmp_path), "2"]


def members(folder, n=7):
    until = time.monotonic() + 20
    while len(found := [int(f.stem) for f in folder.glob("*.pid")]) < n and time.monotonic() < until:
        time.sleep(0.02)
    assert len(found) == n
    return found


def alive(pids):
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def test_a_kill_reaches_grandchildren_in_sessions_of_their_own(family, tmp_path):
    with killing.launch(family, tmp_path / "run") as process:
        pids = members(tmp_path)
        assert len(alive(pids)) == 7
        assert killing.kill_family(process) == 7
        assert not alive(pids) and process.returncode == -9
        assert killing.kill_family(process) == 0


def test_an_error_inside_the_block_leaves_no_process_behind(family, tmp_path):
    with pytest.raises(KeyboardInterrupt), killing.launch(family, tmp_path / "run"):
        pids = members(tmp_path)
        raise KeyboardInterrupt
    assert not alive(pids)


def python(code):
    return [sys.executable, "-c", code]


def test_a_run_to_its_end_gives_its_steps_and_a_failed_one_its_last_words(tmp_path):
    (tmp_path / "a").mkdir()
    code = f"open({str(tmp_path / 'a' / 'log.jsonl')!r}, 'w').write('{{\"step\": 1, \"loss\": 2.5}}\\n{{\"step\": 1, \"runtime\": 9}}\\n')"
    log, seconds = killing.finish(python(code), tmp_path / "a")
    assert log.to_dict("records") == [{"step": 1, "loss": 2.5}] and 0 < seconds < 20
    with pytest.raises(RuntimeError, match=r"(?s)'b' ended with code 5.*no oil"):
        killing.finish(python("print('no oil'); raise SystemExit(5)"), tmp_path / "b")
    with pytest.raises(RuntimeError, match="none within 1 s"):
        killing.finish(python("import time; time.sleep(60)"), tmp_path / "c", limit=1)


def test_runs_side_by_side_end_together_and_one_failure_stops_the_others(tmp_path, family):
    logs, seconds = killing.finish_all({k: (python("import time; time.sleep(2)"), tmp_path / k) for k in "abcd"})
    assert list(logs) == list("abcd") and all(log.empty for log in logs.values()) and seconds < 7
    with pytest.raises(RuntimeError, match="'short' ended with code 1"):
        killing.finish_all({"short": (python("import time; time.sleep(2); 1 / 0"), tmp_path / "s"), "long": (family, tmp_path / "l")})
    assert not alive(members(tmp_path))
    with pytest.raises(ValueError, match="share a folder"):
        killing.finish_all({"x": (python("1"), tmp_path / "s"), "y": (python("1"), tmp_path / "s")})


def saver(out, seconds):
    """A command that appears to reach a checkpoint of step 4 and goes on for some seconds."""
    lines = "".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (1, 2, 3, 4))
    return python(f"import pathlib, time; o = pathlib.Path({str(out)!r}); o.mkdir(); (o / 'log.jsonl').write_text({lines!r}); "
                  f"(o / 'checkpoint-4').mkdir(); time.sleep({seconds})")  # fmt: skip


def test_kill_at_kills_while_the_checkpoint_is_written(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()  # of an earlier try: goes
    log, processes = killing.kill_at(4, saver(tmp_path / "run", 60), tmp_path / "run")
    assert log.step.tolist() == [1, 2, 3, 4] and processes == 1 and not (tmp_path / "run" / "old").exists()
    table = killing.states(tmp_path / "run")
    assert table.checkpoint.tolist() == ["checkpoint-4"] and not table.whole.any()


def test_kill_at_says_what_went_wrong_instead(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)the run failed.*no oil"):
        killing.kill_at(4, python("print('no oil'); raise SystemExit(5)"), tmp_path / "a")
    with pytest.raises(RuntimeError, match="2 runs ended before"):
        killing.kill_at(4, python("pass"), tmp_path / "b", tries=2)
    with pytest.raises(RuntimeError, match="had not reached step 4 after 1 s"):
        killing.kill_at(4, python("import time; time.sleep(60)"), tmp_path / "c", limit=1)


def test_the_small_run_can_be_learned_and_is_the_same_each_time(tmp_path):
    model, data = killing.prepare(tmp_path / "a", seed=3)
    killing.prepare(tmp_path / "b", seed=3)
    killing.prepare(tmp_path / "c", seed=4)
    store = TokenStore.load(data)
    assert len(store) == 110 and store.lengths.max() <= 256 and store.targets.min() > 0
    follows = {}
    for row in range(len(store)):
        ids, labels = store[row]
        assert (labels[len(ids) // 2 :] >= 0).all() and (labels[: len(ids) // 2] < 0).all()
        for x, y in itertools.pairwise(ids):
            follows.setdefault(int(x), []).append(int(y))
    usual = sum(max(map(v.count, set(v))) for v in follows.values()) / sum(map(len, follows.values()))
    assert 0.85 < usual < 0.95  # nine tokens in ten follow from the one before
    weights = [(tmp_path / k / "model" / "model.safetensors").read_bytes() for k in "abc"]
    rows = [np.concatenate([TokenStore.load(tmp_path / k / "data")[i][0] for i in range(20)]).tolist() for k in "abc"]
    assert weights[0] == weights[1] != weights[2] and rows[0] == rows[1] != rows[2]
    assert json.loads((model / "config.json").read_text())["max_position_embeddings"] == 256


def test_commands_name_launcher_processes_and_no_place_of_this_machine(monkeypatch):
    monkeypatch.chdir(killing.ROOT)
    one, two, shared = (" ".join(killing.command(killing.Path("L"), killing.Path("O"), n, c)) for n, c in ((1, None), (2, None), (1, "zero3")))
    assert one.startswith("python -m longalign_lib.train --data L/data --model L/model --output_dir O ")
    assert two.startswith("torchrun --standalone --nproc_per_node 2 -m longalign_lib.train") and "--deepspeed" not in two
    assert shared.startswith("torchrun --standalone --nproc_per_node 1 -m") and shared.endswith("--deepspeed configs/zero3.json")


def test_half_written_lines_are_no_steps_and_remarks_are_found(tmp_path):
    out = tmp_path / "run"
    assert killing.steps(out).empty and killing.remarks(out) == [] and killing.states(out).empty
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    killing.said(out).write_text("hello\nresuming from checkpoint-6\n")
    assert killing.steps(out).step.tolist() == [1] and killing.remarks(out) == ["resuming from checkpoint-6"]


def test_differences_are_of_the_same_rows_or_refused():
    a = pd.DataFrame({"step": [1, 2], "loss": [2.0, 4.0], "sequences": [3, 4], "targets": [9, 9]})
    assert killing.largest_difference(a, a.assign(loss=[2.0, 4.4])) == pytest.approx(0.1)
    assert killing.largest_difference(a, a) == 0
    with pytest.raises(ValueError, match=r"differ in 'sequences': \[3, 4\] and \[4, 3\]"):
        killing.largest_difference(a, a.assign(sequences=[4, 3]))
    with pytest.raises(ValueError, match="'step'"):
        killing.largest_difference(a, a[:1])
