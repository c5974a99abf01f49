"""A small run to experiment on, started as a reader would start it: on any number of processes, killed, started again.

`prepare` makes a random two-layer Llama and a store of rows that it can learn; `launch` starts ``longalign_lib.train`` on
them, `finish` and `finish_all` wait for the end, `kill_at` ends it with SIGKILL, all processes at once, as a power cut or a full machine would. Workers of
torchrun lead process groups of their own, so a kill goes to the whole family by process id. Whatever happens in between (an
error, an interrupted cell), no process is left behind. A launch costs 5 to 15 seconds, nearly all of it imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from longalign_lib.train import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def prepare(folder: Path, seed: int = 0, rows: int = 110, longest: int = 256, vocabulary: int = 512) -> tuple[Path, Path]:
    """Write a tiny random Llama (34 thousand weights) and a token store that it can learn.

    Rows follow one fixed random successor of each token, with one token in ten drawn anew; lengths are lognormal, the
    second half of a row is trained on.

    Args:
        folder: gets ``model`` and ``data``.
        seed: of weights and rows.
        rows, longest: how many rows, of 8 to ``longest`` tokens.
        vocabulary: tokens in use; the model has no more.

    Returns:
        The folders of model and data.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from longalign_lib.data.tokens import TokenStore
    from longalign_lib.models import load_tokenizer

    model, data, rng = folder / "model", folder / "data", np.random.default_rng(seed)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=longest, pad_token_id=2, tie_word_embeddings=True)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(model)
    load_tokenizer().save_pretrained(model)
    lengths = np.clip(np.exp(rng.normal(4.2, 0.7, rows)), 8, longest).astype(int)
    after, starts = rng.permutation(vocabulary), np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(0, vocabulary, starts[-1])
    for k in np.flatnonzero(rng.random(len(ids)) < 0.9):  # in order: each continues the token before it
        ids[k] = after[ids[k - 1]] if k else ids[k]
    half = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    TokenStore(ids.astype(np.int32), half, starts, [{} for _ in lengths]).save(data)
    return model, data


def command(folder: Path, out: Path, processes: int, config: str | None = None, capacity: int = 256, epochs: int = 2, save: int = 3,
            seed: int = 0, packs: int = 4) -> list[str]:  # fmt: skip
    """The command line of the small run: float32 weights, as many packs a step on whatever number of processes.

    Args:
        folder: what `prepare` filled.
        out: the run's folder.
        processes: a divisor of ``packs``.
        config: a file of configs/ for DeepSpeed, such as "zero3"; None is plain (one process) or DDP.
        capacity, epochs, seed: of the plan.
        save: steps between checkpoints.
        packs: packs a step.
    """
    words = ["torchrun", "--standalone", "--nproc_per_node", processes] if processes > 1 or config else ["python"]
    words += ["-m", "longalign_lib.train", "--data", folder / "data", "--model", folder / "model", "--output_dir", out,
              "--capacity", capacity, "--packs_per_step", packs, "--epochs", epochs, "--learning_rate", 3e-2, "--dtype", "float32",
              "--seed", seed, "--save_strategy", "steps", "--save_steps", save, "--save_total_limit", 3, "--logging_steps", 1,
              "--lr_scheduler_type", "cosine", "--report_to", "none", "--disable_tqdm", "true"]  # fmt: skip
    words += ["--deepspeed", Path(os.path.relpath(ROOT / "configs" / f"{config}.json")).as_posix()] if config else []
    return [str(w) for w in words]


@contextlib.contextmanager
def launch(words: list[str], out: Path, threads: int = 1, gpus: bool = False):
    """Start a command of `command` and yield its Popen; at the end of the block no process of its family lives.

    It runs on the CPU, also where there are GPUs: two processes cannot share one, and sums on the CPU repeat exactly. With
    ``gpus`` every process takes a GPU of its own, where there are any. What it prints is appended to ``<out>.txt``, beside the
    run's folder.
    """
    real = {"torchrun": [sys.executable, "-m", "torch.distributed.run"], "python": [sys.executable]}
    words = [*real.get(words[0], [words[0]]), *words[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    env |= {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(said(out), "ab") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        yield process
    finally:
        kill_family(process)


def said(out: Path) -> Path:
    """The file that holds what a run printed."""
    return out.with_name(out.name + ".txt")


def kill_family(process: subprocess.Popen) -> int:
    """SIGKILL to a process and all its descendants; returns how many lived. Harmless when none does."""
    import psutil

    if process.poll() is not None:
        return 0
    try:
        launcher = psutil.Process(process.pid)
        launcher.send_signal(signal.SIGSTOP)  # it starts nobody, and nobody is orphaned, while the family is counted
        family = [*launcher.children(recursive=True), launcher]
    except psutil.NoSuchProcess:
        family = []
    lived = 0
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
            lived += 1
    psutil.wait_procs(family[:-1], timeout=20)
    process.wait()
    return lived


def steps(out: Path) -> pd.DataFrame:
    """The steps that a run has logged so far, a row a step; empty before the first."""
    file = out / "log.jsonl"
    lines = [json.loads(x) for x in file.read_text(encoding="utf8").splitlines() if x.endswith("}")] if file.is_file() else []
    return pd.DataFrame([x for x in lines if "loss" in x])


def finish(words: list[str], out: Path, limit: float = 300, gpus: bool = False) -> tuple[pd.DataFrame, float]:
    """Run a command to its end; returns its steps and seconds. See `finish_all`."""
    logs, seconds = finish_all({out.name: (words, out)}, limit, gpus)
    return logs[out.name], seconds


def finish_all(runs: dict[str, tuple[list[str], Path]], limit: float = 300,
               gpus: bool = False) -> tuple[dict[str, pd.DataFrame], float]:  # fmt: skip
    """Run commands side by side, each to its end: starting is mostly waiting, so that three cost less than one after another.

    Args:
        runs: label -> (command, its folder); every run has a folder of its own.
        limit: seconds for all of them.
        gpus: see `launch`.

    Returns:
        label -> steps, and the seconds until the last had ended.

    Raises:
        ValueError: two runs share a folder.
        RuntimeError: one failed or took too long (the others are stopped); the message ends with its last lines.
    """
    if len({out.resolve() for _, out in runs.values()}) < len(runs):
        raise ValueError(f"runs share a folder: {', '.join(str(out.name) for _, out in runs.values())}; give each its own")
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        started = {label: stack.enter_context(launch(words, out, gpus=gpus)) for label, (words, out) in runs.items()}
        for label, process in started.items():
            words, out = runs[label]
            try:
                code = process.wait(max(0.1, limit - (time.perf_counter() - began)))
            except subprocess.TimeoutExpired:
                code = f"none within {limit:.0f} s"
            if code != 0:
                raise RuntimeError(f"the run {label!r} ended with code {code}: {shlex.join(words)}\n{_tail(out)}")
    return {label: steps(out) for label, (_, out) in runs.items()}, time.perf_counter() - began


def kill_at(step: int, words: list[str], out: Path, limit: float = 300, tries: int = 3, gpus: bool = False) -> tuple[pd.DataFrame, int]:
    """Start a run and kill all its processes while it writes the checkpoint of ``step`` (or as soon after as is noticed).

    A run that ends before it could be killed is deleted and started again.

    Args:
        step: a step after which the run saves, early enough that some are left to take.
        words, out: the command and its folder.
        limit: seconds in which the step must be reached.
        tries: starts in all.
        gpus: see `launch`.

    Returns:
        The steps logged when it died, and the number of processes that were killed.

    Raises:
        RuntimeError: the run failed by itself, ended before the kill ``tries`` times, or never came to the step.
    """
    for _ in range(tries):
        shutil.rmtree(out, ignore_errors=True)
        began, target = time.monotonic(), out / f"checkpoint-{step}"
        with launch(words, out, gpus=gpus) as process:
            while not target.is_dir() and process.poll() is None and time.monotonic() - began < limit:
                time.sleep(0.002)
            if process.poll() is None and target.is_dir():
                died = kill_family(process)
                return steps(out), died
            code = process.poll()
        if code != 0:
            raise RuntimeError(f"the run {'failed' if code else f'had not reached step {step} after {limit:.0f} s'}:\n{_tail(out)}")
    raise RuntimeError(f"{tries} runs ended before they could be killed at step {step}: kill at an earlier step, or let the run be longer")


def states(out: Path) -> pd.DataFrame:
    """Checkpoints of a run, a row each: checkpoint, whole (its marker is there), ranks (that made it), files."""
    rows = []
    for folder in checkpoint.checkpoints(out):
        mark = checkpoint.read_mark(folder)
        rows.append({"checkpoint": folder.name, "whole": mark is not None, "ranks": mark["ranks"] if mark else None,
                     "files": sum(f.is_file() for f in folder.rglob("*"))})  # fmt: skip
    return pd.DataFrame(rows, columns=["checkpoint", "whole", "ranks", "files"])


def remarks(out: Path, words: tuple[str, ...] = ("incomplete", "resuming")) -> list[str]:
    """Lines of what a run printed that hold one of ``words``."""
    file = said(out)
    lines = file.read_text(encoding="utf8", errors="replace").splitlines() if file.is_file() else []
    return [x for x in lines if any(w in x for w in words)]


def largest_difference(a: pd.DataFrame, b: pd.DataFrame, column: str = "loss") -> float:
    """Largest relative difference of a column over the steps of two runs.

    Raises:
        ValueError: the runs took other steps, or other rows in them.
    """
    for name in ("step", "sequences", "targets"):
        if a[name].tolist() != b[name].tolist():
            raise ValueError(f"the runs differ in {name!r}: {a[name].tolist()} and {b[name].tolist()}")
    return float(((a[column] - b[column]).abs() / a[column].abs()).max())


def _tail(out: Path, lines: int = 25) -> str:
    file = said(out)
    return "\n".join(file.read_text(encoding="utf8", errors="replace").splitlines()[-lines:]) if file.is_file() else ""
