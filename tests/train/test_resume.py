"""Kill a run with SIGKILL and start it again: the samples not yet seen, the same losses, on other numbers of processes too."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from longalign_lib.train import checkpoint
from longalign_lib.train.plan import Plan, build_plan


def command(folder, out, processes, config=None):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m", "longalign_lib.train",
             "--data", folder / "data", "--model", folder / "model", "--output_dir", folder / out, "--capacity", 128,
             "--packs_per_step", 4, "--max_ranks", 2, "--epochs", 3, "--learning_rate", 1e-2, "--dtype", "float32", "--seed", 3,
             "--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 2, "--report_to", "none",
             "--lr_scheduler_type", "cosine", "--warmup_steps", 2, "--adam_beta2", 0.95, "--disable_tqdm", "true"]  # fmt: skip
    return words + (["--deepspeed", config] if config else [])


def start(folder, root, out, processes, config=None):
    words = command(folder, out, processes, config)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with open(folder / f"{out}.log", "ab") as said:
        return subprocess.Popen([str(w) for w in words], stdout=said, stderr=subprocess.STDOUT, env=env, cwd=root, start_new_session=True)


def lines(folder, out):
    file = folder / out / "log.jsonl"
    found = [json.loads(x) for x in file.read_text().splitlines() if x.endswith("}")] if file.is_file() else []
    return [x for x in found if "loss" in x]


def finish(folder, root, out, processes, config=None):
    process = start(folder, root, out, processes, config)
    assert process.wait(timeout=240) == 0, (folder / f"{out}.log").read_text()[-3000:]
    return lines(folder, out)


def kill_at(step, folder, root, out, processes, config=None):
    """Start a run, kill all its processes once ``step`` is logged, return that log."""
    process = start(folder, root, out, processes, config)
    began = time.monotonic()
    while not any(x["step"] >= step for x in lines(folder, out)):
        assert process.poll() is None, "the run ended before it was killed:\n" + (folder / f"{out}.log").read_text()[-3000:]
        assert time.monotonic() - began < 200
        time.sleep(0.005)
    kill_tree(process.pid)
    process.wait()
    return lines(folder, out)


def kill_tree(pid):
    """SIGKILL to the launcher and, since workers have sessions of their own, to every descendant."""
    import psutil

    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for p in family:
        try:
            p.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(family, timeout=20)


def test_one_process_killed_twice_continues_to_the_last_digit(run_folder, root):
    whole = finish(run_folder, root, "whole", 1)
    assert len(whole) >= 9
    kill_at(3, run_folder, root, "killed", 1)
    half = run_folder / "killed" / "checkpoint-4"  # as if the kill had hit while this one was written
    half.mkdir(exist_ok=True)
    (half / checkpoint.MARKER).unlink(missing_ok=True)
    (half / "model.safetensors").write_bytes(b"half a file")
    kill_at(7, run_folder, root, "killed", 1)
    resumed = finish(run_folder, root, "killed", 1)
    said = (run_folder / "killed.log").read_text()
    assert "checkpoint-4 is incomplete" in said and "resuming from checkpoint-2 (made by 1 processes, now 1)" in said
    assert [x["step"] for x in resumed] == [x["step"] for x in whole], "steps are missing or were logged twice"
    assert [x["loss"] for x in resumed] == [x["loss"] for x in whole], "the same losses to the last digit"
    assert [x["grad_norm"] for x in resumed] == [x["grad_norm"] for x in whole]
    plan = Plan.load(run_folder / "killed" / "plan.parquet")
    assert [x["sequences"] for x in resumed] == plan.steps().sequences.tolist()
    assert len(checkpoint.checkpoints(run_folder / "killed")) == 2, "--save_total_limit 2"


def test_another_plan_or_other_data_is_refused(run_folder, root):
    run = run_folder / "killed"  # left by the test above, or made here
    if not checkpoint.checkpoints(run):
        kill_at(3, run_folder, root, "killed", 1)
    process = subprocess.run([sys.executable, "-m", "longalign_lib.train", "--data", run_folder / "data", "--model", run_folder / "model",
                              "--output_dir", run, "--capacity", "64", "--packs_per_step", "4", "--report_to", "none"],
                             capture_output=True, text=True, cwd=root)  # fmt: skip
    assert process.returncode and "belongs to another run: its plan is" in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("config", ["configs/zero2.json", "configs/zero3_offload.json"])
def test_killed_on_one_process_continues_on_two_and_mixes_with_nothing(config, run_folder, root):
    """More processes than before; and the half-written checkpoint of four, left in the way, is not mixed with their own."""
    name = f"up_{config[8:13]}{'o' * ('offload' in config)}"
    whole = finish(run_folder, root, f"{name}_whole", 1, config)
    kill_at(3, run_folder, root, name, 1, config)
    at = checkpoint.find(run_folder / name, {}, say=False)
    after = run_folder / name / f"checkpoint-{int(at.name.rpartition('-')[2]) + 2}"
    shutil.rmtree(after, ignore_errors=True)
    stale = after / f"global_step{after.name.rpartition('-')[2]}" / "zero_pp_rank_3_mp_rank_00_optim_states.pt"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of four processes")
    two = finish(run_folder, root, name, 2, config)
    assert "made by 1 processes, now 2" in (run_folder / f"{name}.log").read_text() and not stale.exists()
    assert [x["sequences"] for x in two] == [x["sequences"] for x in whole], "other global batches"
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in whole], rel=1e-4)
    plain = subprocess.run([str(w) for w in command(run_folder, name, 1)], capture_output=True, text=True, cwd=root)
    assert plain.returncode and "now it is 'plain'" in plain.stderr


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "configs/zero2.json", "configs/zero3.json"])
def test_killed_on_two_processes_continues_on_two_and_on_one(config, run_folder, root):
    name = config[8:13] if config else "ddp"
    whole = finish(run_folder, root, f"{name}_whole", 2, config)
    kill_at(5, run_folder, root, f"{name}_two", 2, config)
    shutil.copytree(run_folder / f"{name}_two", run_folder / f"{name}_one")
    two = finish(run_folder, root, f"{name}_two", 2, config)
    assert [x["loss"] for x in two] == [x["loss"] for x in whole], "the same losses to the last digit"
    one = finish(run_folder, root, f"{name}_one", 1, config)
    assert [x["step"] for x in one] == [x["step"] for x in whole]
    assert [x["sequences"] for x in one] == [x["sequences"] for x in whole], "other global batches"
    assert [x["loss"] for x in one] == pytest.approx([x["loss"] for x in whole], rel=1e-4)
    assert "made by 2 processes, now 1" in (run_folder / f"{name}_one.log").read_text()


def test_find_takes_the_newest_whole_one_and_names_what_differs(tmp_path, capsys):
    facts = {"plan": "p", "data": "d"}
    assert checkpoint.find(tmp_path, facts) is None
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        checkpoint.mark(tmp_path / f"checkpoint-{step}", facts | {"step": step})
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    assert checkpoint.find(tmp_path, facts) == tmp_path / "checkpoint-10"
    assert "checkpoint-12 is incomplete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="its data is 'd', now it is 'e'"):
        checkpoint.find(tmp_path, facts | {"data": "e"}, say=False)
    assert capsys.readouterr().out == ""
    (tmp_path / "checkpoint-5").mkdir()
    gone = checkpoint.rotate(tmp_path, 1)
    assert [f.name for f in gone] == ["checkpoint-2", "checkpoint-9", "checkpoint-5"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12", "checkpoint-notes"]
    assert checkpoint.rotate(tmp_path, None) == []


def test_a_named_checkpoint_must_be_whole_and_agree(tmp_path):
    folder = tmp_path / "run" / "checkpoint-4"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"checkpoint-4 has no longalign.json: .* another Trainer wrote it .* load them into the model"):
        checkpoint.require(folder, {})
    checkpoint.mark(folder, {"plan": "p", "loss": "mean of packs", "ranks": 2})
    assert checkpoint.require(str(folder), {"plan": "p"}) is None
    with pytest.raises(ValueError, match=r"checkpoint-4 in run belongs to another run: its plan is 'p', now it is 'q'\. Give another"):
        checkpoint.require(folder, {"loss": "mean of packs", "plan": "q"})


def test_a_run_continues_under_the_engine_that_wrote_its_checkpoint(root, tmp_path):
    """Trainer itself would go on from a DeepSpeed checkpoint with a fresh optimiser, silently."""
    read = {f.stem: json.loads(f.read_text()) for f in (root / "configs").glob("*.json")}
    kinds = {name: checkpoint.engine(config) for name, config in read.items()} | {"none": checkpoint.engine(None)}
    assert kinds == {"zero2": "zero-2", "zero3": "zero-3", "zero3_offload": "zero-3", "paper": "zero-3", "none": "plain"}
    (tmp_path / "checkpoint-2").mkdir()
    checkpoint.mark(tmp_path / "checkpoint-2", {"engine": kinds["zero3"]})
    assert checkpoint.find(tmp_path, {"engine": kinds["paper"]}) is not None
    for other in ("none", "zero2"):
        with pytest.raises(ValueError, match=f"its engine is 'zero-3', now it is '{kinds[other]}'. Give .* the engine that"):
            checkpoint.find(tmp_path, {"engine": kinds[other]})


def test_fingerprints_see_every_change(tmp_path):
    lengths = np.arange(5, 50)
    plan = build_plan(lengths, method="packed", capacity=64, packs_per_step=2)
    same = Plan.load(plan.save(tmp_path / "plan.parquet"))
    assert checkpoint.plan_fingerprint(plan) == checkpoint.plan_fingerprint(same)
    others = [build_plan(lengths, method=m, capacity=c, packs_per_step=k, seed=s)
              for m, c, k, s in (("packed", 64, 2, 1), ("packed", 65, 2, 0), ("packed", 64, 4, 0), ("balanced", 64, 2, 0))]  # fmt: skip
    assert len({checkpoint.plan_fingerprint(p) for p in [plan, *others]}) == 5
    rows = [(np.arange(n), np.arange(n)) for n in (4, 6)]
    prints = {checkpoint.data_fingerprint(s) for s in (rows, rows[::-1], [rows[0], (rows[1][0] + 1, rows[1][1])],
                                                       [rows[0], (rows[1][0], rows[1][1] - 1)])}  # fmt: skip
    assert len(prints) == 4


def test_ranks_that_read_the_settings_while_rank_0_writes_them_never_see_half(tmp_path):
    """Resuming, every rank compares run_settings.json with its own settings while rank 0 writes it again."""
    from longalign_lib.files import whole
    from longalign_lib.train.run import check_same_run

    settings = {f"name {k}": "x" * 1000 for k in range(2000)}
    (tmp_path / "checkpoint-1").mkdir()
    stop = threading.Event()

    def write():
        while not stop.is_set():
            with whole(tmp_path / "run_settings.json") as half:
                half.write_text(json.dumps(settings))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not (tmp_path / "run_settings.json").exists():
            time.sleep(0.001)
        for _ in range(50):
            check_same_run(tmp_path, settings)
    finally:
        stop.set()
        writer.join()


def test_a_log_cut_off_by_a_kill_is_trimmed(tmp_path):
    file = tmp_path / "log.jsonl"
    checkpoint.trim_log(file, 3)
    assert not file.exists()
    file.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n{"st')
    checkpoint.trim_log(file, 3)
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_universal_conversion_that_fails_says_why(tmp_path):
    (tmp_path / "latest").write_text("global_step2")
    with pytest.raises(RuntimeError, match="could not convert"):
        checkpoint.make_universal(Path(tmp_path), 0)
    with pytest.raises(RuntimeError, match="waited 0 s for rank 0"):
        checkpoint.make_universal(Path(tmp_path), 1, wait_s=0)
