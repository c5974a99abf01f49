"""The course's own training run: its data, its launch command, and the checkpoint that notebooks 06 to 09 share.

Everything is started exactly as a reader would start it: ``torchrun … -m longalign_lib.train …`` as a subprocess, with
DeepSpeed ZeRO-3 where DeepSpeed is installed. A finished run is recognised by its ``run.json``, which holds the settings it
was made with: the same settings are not trained twice.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from longalign_lib.course import check_profile, cores, pick
from longalign_lib.course.killing import kill_family

ROOT = Path(__file__).resolve().parents[2]
CONFIGS, SAMPLES = ROOT / "configs", ROOT / "data_samples"
SHORT = SAMPLES / "instructions" / "short.jsonl"
HELD_OUT = frozenset({"stackexchange_sourdough", "wikipedia_bridges"})  # documents that no run trains on


def settings(profile: str, seed: int) -> dict:
    """Sizes of the run at this profile; ``paper`` holds the paper's own numbers (8 x 80 GB, 64k packs).

    ``data`` is a hash of the files that rows are made from, so that a model is not taken for one of other data. What a model
    wrote in notebook 01 is not in it: that is mixed in whenever notebook 06 itself is run.
    """
    check_profile(profile)
    return {
        "seed": seed,
        "processes": pick(profile, ci=2, laptop=2, gpu=_gpus(), paper=8),
        "capacity": pick(profile, ci=2048, laptop=2048, gpu=16_384, paper=65_536),
        "packs_per_step": pick(profile, ci=2, laptop=4, gpu=2 * _gpus(), paper=8),
        "epochs": pick(profile, ci=1, laptop=1, gpu=1, paper=2),
        "long_samples": pick(profile, ci=84, laptop=300, gpu=1200, paper=10_000),
        "long_tokens": pick(profile, ci=700, laptop=1500, gpu=8000, paper=65_536),
        "short_samples": pick(profile, ci=62, laptop=62, gpu=None, paper=None),  # None: all
        "held_out": pick(profile, ci=16, laptop=40, gpu=100, paper=200),
        "learning_rate": pick(profile, ci=5e-5, laptop=5e-5, gpu=1e-4, paper=2e-5),
        "rope": pick(profile, ci="none", laptop="none", gpu="yarn", paper="base"),
        "rope_factor": pick(profile, ci=1.0, laptop=1.0, gpu=2.0, paper=8.0),
        "weight_exponent": 1.0,
        "data": _data_hash(),
    }


def _data_hash() -> str:
    """12 hex digits of the project's own documents and short instructions, names and contents."""
    digest = hashlib.blake2b(digest_size=6)
    for file in [*sorted((SAMPLES / "documents").glob("*.txt")), SHORT]:
        for part in (file.name.encode(), file.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def training_data(profile: str, seed: int, folder: Path, made_by_model: Path | None = None):
    """Build the run's two token stores, ``folder/train`` and ``folder/held_out``, from the project's own samples.

    Long samples are verifiable retrieval questions over whole documents; the documents of `HELD_OUT` are kept for the held-out
    set alone. Short instructions are mixed in, every sixth of them held out.

    Args:
        made_by_model: a JSONL of notebook 01; what a model wrote there is mixed in when the file exists, except about documents
            of `HELD_OUT` (their number is in ``folder/train_report.json``).

    Returns:
        A frame, a row a sample: part, task, source, tokens, targets.

    Raises:
        ValueError: a document of `HELD_OUT` is not among the project's samples.
    """
    import pandas as pd

    from longalign_lib.data.documents import read_samples
    from longalign_lib.data.jsonl import read_jsonl
    from longalign_lib.data.tokens import TokenStore
    from longalign_lib.data.verifiable import retrieval_samples
    from longalign_lib.models import load_tokenizer

    s, tokenizer = settings(profile, seed), load_tokenizer()
    documents, _ = read_samples()
    if missing := HELD_OUT - {d.id for d in documents}:
        raise ValueError(f"held-out document(s) {', '.join(sorted(missing))} not in {SAMPLES.name}/documents: training.HELD_OUT names them")
    kept_back, seen = ([d for d in documents if (d.id in HELD_OUT) == held] for held in (True, False))
    long = retrieval_samples(seen, tokenizer, n=s["long_samples"], max_tokens=s["long_tokens"], seed=seed)
    held = retrieval_samples(kept_back, tokenizer, n=s["held_out"], max_tokens=s["long_tokens"], seed=seed + 1)
    short = [{**x, "task": "short", "source": "general"} for x in read_jsonl(SHORT)[: s["short_samples"]]]
    parts = {"train": long + [x for k, x in enumerate(short) if k % 6], "held_out": held + short[::6]}
    made = read_jsonl(made_by_model) if made_by_model is not None and made_by_model.is_file() else []
    made = [x for x in made if x.get("model") != "none"]  # "none": 01's verifiable ones
    usable = [x for x in made if not any(d in str(x.get("document_id", "")) for d in HELD_OUT)]
    parts["train"] += usable
    rows = []
    for part, samples in parts.items():
        store, report = TokenStore.build(samples, tokenizer, s["capacity"])
        store.save(folder / part)
        if part == "train":
            report = {**report, "left_out_about_held_out_documents": len(made) - len(usable)}
        rows += [{"part": part, "task": m.get("task", ""), "source": m.get("source", ""), "tokens": int(t), "targets": int(n)}
                 for m, t, n in zip(store.meta, store.lengths, store.targets, strict=True)]  # fmt: skip
        (folder / f"{part}_report.json").write_text(json.dumps(report, ensure_ascii=False) + "\n", encoding="utf8")
    return pd.DataFrame(rows)


def launch_command(profile: str, seed: int, data: Path, out: Path, launcher: str = "torchrun") -> list[str]:
    """The command line of the run, as a list of words; ``launcher`` is "torchrun" or "deepspeed"."""
    import torch

    from longalign_lib.models import pick_dtype

    s = settings(profile, seed)
    bf16 = pick_dtype() == torch.bfloat16
    n = str(s["processes"])
    if launcher == "deepspeed":
        gpus = ["--num_gpus", n] if torch.cuda.is_available() else ["--num_accelerators", n]
        start = ["deepspeed", *gpus, "--module"]
    else:
        start = ["torchrun", "--standalone", "--nproc_per_node", n, "-m"]
    words = [*start, "longalign_lib.train", "--data", str(data), "--output_dir", str(out), "--method", "balanced",
             "--capacity", s["capacity"], "--packs_per_step", s["packs_per_step"], "--epochs", s["epochs"],
             "--exponent", s["weight_exponent"], "--learning_rate", s["learning_rate"], "--seed", seed,
             "--lr_scheduler_type", "cosine", "--warmup_steps", "0.03", "--adam_beta2", "0.95", "--weight_decay", "0",
             "--bf16", str(bf16).lower(), "--logging_steps", "1",
             "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--gradient_checkpointing", "true"]  # fmt: skip
    if s["rope"] != "none":
        words += ["--rope", s["rope"], "--rope_factor", s["rope_factor"]]
    if importlib.util.find_spec("deepspeed"):
        words += ["--deepspeed", Path(os.path.relpath(CONFIGS / "zero3.json")).as_posix()]
    return [str(w) for w in words]


def run_training(command: list[str], out: Path, progress: bool = True) -> float:
    """Start a launch command, show a bar of its steps, return its seconds.

    The process's output goes to ``out/launch.log``, the most memory that one of its processes held (resident, looked at twice
    a second) to ``out/peak.json``. Interrupting the notebook ends all its processes.

    Raises:
        RuntimeError: the run failed; the message ends with the last lines of its log.
    """
    from tqdm.auto import tqdm

    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.jsonl"
    for stale in (log, out / "run.json", out / "run_settings.json", out / "peak.json"):
        stale.unlink(missing_ok=True)
    words = [sys.executable, "-m", "torch.distributed.run", *command[1:]] if command[0] == "torchrun" else command
    threads = max(1, cores() // int(command[command.index("--nproc_per_node") + 1])) if "--nproc_per_node" in command else 1
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore::FutureWarning", "TQDM_DISABLE": "1"}
    began, peak = time.perf_counter(), 0.0
    with open(out / "launch.log", "w", encoding="utf8") as output, tqdm(
        disable=not progress, desc="training", unit="step"
    ) as bar:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                _update(bar, log)
                peak = max(peak, _largest_gib(process.pid))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    kill_family(process)
        _update(bar, log)
    if process.returncode:
        tail = "\n".join((out / "launch.log").read_text(encoding="utf8", errors="replace").splitlines()[-30:])
        raise RuntimeError(f"training ended with code {process.returncode}: {shlex.join(command)}\n{tail}")
    (out / "peak.json").write_text(json.dumps({"process_gib": round(peak, 2)}) + "\n", encoding="utf8")
    return time.perf_counter() - began


def _largest_gib(pid: int) -> float:
    """Resident GiB of the largest process among ``pid`` and its descendants; 0 when none is left."""
    import psutil

    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return max(p.memory_info().rss for p in family) / 2**30
    except psutil.Error:  # one ended meanwhile
        return 0.0


def _update(bar, log: Path) -> None:
    if log.is_file():
        lines = [json.loads(x) for x in log.read_text(encoding="utf8").splitlines() if x.endswith("}")]
        steps = [x for x in lines if "loss" in x]
        if steps:
            bar.total = steps[-1]["max_steps"]
            bar.set_postfix(loss=f"{steps[-1]['loss']:.3f}", refresh=False)
            bar.update(len(steps) - bar.n)


def trained_model(profile: str, seed: int, out_dir: str | Path) -> Path:
    """Folder of the checkpoint that notebook 06 trains; trained now, in the same way, if it is not there yet."""
    folder = Path(out_dir) / profile / "06_training"
    model, wanted = folder / "model", settings(profile, seed)
    done = model / "run.json"
    facts = json.loads(done.read_text(encoding="utf8")) if done.is_file() else {}
    if (facts.get("settings"), facts.get("model")) != (wanted, _base()):
        print("notebook 06 has not been run with these settings: training its model now", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        training_data(profile, seed, folder, Path(out_dir) / profile / "01_data_construction" / "instructions.jsonl")
        seconds = run_training(launch_command(profile, seed, folder / "train", model), model)
        mark_done(profile, seed, model, seconds)
    return model


def _base() -> str:
    """Name of the model that the run starts from, without its path."""
    return os.environ.get("LONGALIGN_MODEL", "default").rstrip("/").rpartition("/")[2]


def mark_done(profile: str, seed: int, model: Path, seconds: float) -> None:
    """Write ``run.json``: the settings and seconds of a finished run."""
    facts = {"profile": profile, "model": _base(), "settings": settings(profile, seed), "seconds": round(seconds, 1)}
    (model / "run.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf8")
