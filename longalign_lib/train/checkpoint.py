"""Checkpoints that a run can be killed at any moment without losing: which one is whole, and does it belong to this run?

A checkpoint counts from the moment its marker ``longalign.json`` is there, which is written last, after every rank is done. It
names the step, the ranks, the engine, and fingerprints of plan and data. The plan holds the order of all samples, so the step
number is the whole position: the same step of the same plan means the same global batches on any number of ranks.

    incomplete (no marker)        passed over; the one before it is used, and its files go before the step is saved anew
    other plan, data or loss      refused, with what differs; the trainer asks too (`require`)
    another engine                refused: plain and each ZeRO stage keep the optimiser's state in files of their own
    DeepSpeed, other ranks        converted to a universal checkpoint first (`make_universal`), once

Older checkpoints are deleted only after a newer one is marked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from longalign_lib.files import whole

MARKER = "longalign.json"


def plan_fingerprint(plan) -> str:
    """16 hex digits of a plan's table: the same for equal plans, on any machine."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(plan.table.columns):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(plan.table[name].to_numpy(np.int64)).tobytes())
    digest.update(json.dumps([plan.method, plan.capacity, plan.packs_per_step, plan.rows_per_pack]).encode())
    return digest.hexdigest()


def data_fingerprint(store, sample: int = 1000) -> str:
    """16 hex digits of a token store: all row lengths, and the tokens and targets of up to ``sample`` rows spread over it.

    Rows are sampled so that a store of any size takes under a second; an edit of a few rows elsewhere is not seen unless it
    changes a length.
    """
    digest = hashlib.blake2b(digest_size=8)
    lengths = getattr(store, "lengths", None)
    lengths = np.array([len(x) for x, _ in store]) if lengths is None else np.asarray(lengths)
    digest.update(lengths.astype(np.int64).tobytes())
    for row in np.unique(np.linspace(0, len(lengths) - 1, min(sample, len(lengths))).astype(int)):
        for part in store[int(row)]:
            digest.update(np.asarray(part, dtype=np.int64).tobytes())
    return digest.hexdigest()


def engine(deepspeed: dict | None) -> str:
    """What writes a run's checkpoints: "plain" (one process or DDP), or "zero-0" to "zero-3" by a DeepSpeed configuration."""
    return "plain" if deepspeed is None else f"zero-{deepspeed.get('zero_optimization', {}).get('stage', 0)}"


def mark(folder: Path | str, facts: dict) -> None:
    """Declare a checkpoint whole: write its marker, in one move."""
    with whole(Path(folder) / MARKER) as half:
        half.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf8")


def read_mark(folder: Path | str) -> dict | None:
    """The facts of a checkpoint, or None when it is not whole."""
    try:
        return json.loads((Path(folder) / MARKER).read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def checkpoints(out: Path | str) -> list[Path]:
    """Checkpoint folders of a run, by step, whole or not."""
    found = [f for f in Path(out).glob("checkpoint-*") if f.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda f: int(f.name.rpartition("-")[2]))


def find(out: Path | str, facts: dict, say: bool = True) -> Path | None:
    """The newest whole checkpoint of this run, or None.

    Args:
        out: the run's output folder.
        facts: what must agree: name -> value, such as {"plan": ..., "data": ...}.
        say: print which ones are passed over (one rank is enough).

    Raises:
        ValueError: a whole checkpoint belongs to another run; the message says which fact differs.
    """
    for folder in reversed(checkpoints(out)):
        mark_ = read_mark(folder)
        if mark_ is None:
            if say:
                print(f"{folder.name} is incomplete (the run was stopped while writing it): passed over", flush=True)
            continue
        require(folder, facts)
        return folder
    return None


def require(folder: Path | str, facts: dict) -> None:
    """Raise ValueError unless a checkpoint is whole and its marker agrees with ``facts``; the message says what differs."""
    folder, mark_ = Path(folder), read_mark(folder)
    if mark_ is None:
        raise ValueError(
            f"{folder.name} has no {MARKER}: its run was stopped while writing it, or another Trainer wrote it under no plan. Resume "
            "from a whole checkpoint of this plan; to begin from its weights alone, load them into the model and do not resume"
        )
    for name, value in facts.items():
        if mark_.get(name) != value:
            raise ValueError(
                f"{folder.name} in {folder.absolute().parent.name} belongs to another run: its {name} is {mark_.get(name)!r}, now it is "
                f"{value!r}. Give another --output_dir, or the {name} that it was made with"
            )


def clear(folder: Path | str) -> None:
    """Delete what is left of a checkpoint, marker first: a step that is saved anew, perhaps by fewer ranks, mixes with nothing."""
    (Path(folder) / MARKER).unlink(missing_ok=True)  # from here on it does not count, whatever a kill leaves of it
    if Path(folder).is_dir():
        shutil.rmtree(folder)


def rotate(out: Path | str, keep: int | None) -> list[Path]:
    """Delete the oldest whole checkpoints but ``keep`` (at least one stays); incomplete ones older than a whole one go too."""
    if not keep or keep < 1:
        return []
    all_ = checkpoints(out)
    marked = [f for f in all_ if read_mark(f) is not None]
    halves = [f for f in all_ if f not in marked and marked and all_.index(f) < all_.index(marked[-1])]
    gone = marked[:-keep] + halves
    for folder in gone:
        clear(folder)
    return gone


def make_universal(checkpoint: Path, rank: int, wait_s: float = 3600) -> None:
    """Convert a DeepSpeed checkpoint so that any number of ranks can load it; rank 0 does it, the others wait.

    Writes ``latest_universal`` last; a conversion that was cut off is done again.

    Raises:
        RuntimeError: the conversion failed (its last lines are in the message), or rank 0 took longer than ``wait_s``.
    """
    tag = (checkpoint / "latest").read_text(encoding="utf8").strip()
    done, name = checkpoint / "latest_universal", f"{tag}_universal"
    if done.is_file() and done.read_text(encoding="utf8").strip() == name:
        return
    if rank != 0:
        began = time.monotonic()
        while not done.is_file():
            if time.monotonic() - began > wait_s:
                raise RuntimeError(f"waited {wait_s:.0f} s for rank 0 to convert {checkpoint.name}; does this node share its folder?")
            time.sleep(0.5)
        return
    shutil.rmtree(checkpoint / name, ignore_errors=True)
    words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", checkpoint / tag,
             "--output_folder", checkpoint / name, "--inject_missing_state"]  # fmt: skip
    run = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"could not convert {checkpoint.name} to a universal checkpoint:\n" + "\n".join(run.stderr.splitlines()[-15:]))
    with whole(done) as half:
        half.write_text(name, encoding="utf8")


def wait_for(file: Path, content: dict, wait_s: float = 600) -> None:
    """Wait until rank 0 has written this JSON; RuntimeError after ``wait_s`` seconds."""
    began = time.monotonic()
    while not file.is_file() or json.loads(file.read_text(encoding="utf8")) != content:
        if time.monotonic() - began > wait_s:
            raise RuntimeError(f"waited {wait_s:.0f} s for rank 0 to write {file.name}; does this node share its folder?")
        time.sleep(0.2)


def trim_log(path: Path, step: int) -> None:
    """Drop lines of a JSONL log that are past ``step`` (steps that a resumed run takes again) or cut off by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf8").splitlines():
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    with whole(path) as half:
        half.write_text("".join(line + "\n" for line in kept), encoding="utf8")
