"""The recipe on the GPUs of one host: speed, waiting, scaling, equal gradients, and a kill with a resume on other ranks.

    python benchmarks/multi_gpu.py --out results/multi_gpu.json          # every power of two of the GPUs at hand
    python benchmarks/multi_gpu.py --worlds 1 2 --scale 64 --tiny --out build/multi_gpu_cpu.json       # two CPU processes, to try it

The default model's sizes (135M) and a random model of about 1B, with DDP and with DeepSpeed ZeRO-3, on the mix cut at 16k to 64k, by naive,
sorted, packed and balanced plans of eight packs a step. Tables:

    steps       tokens/s of the timed steps, to compare ranks or backends by one plan (plans compare over all steps, ``tokens_all``:
                each holds the same rows, but not in the same step), step times, peak memory; ``beside_packs``: the share of a step
                that is not the slowest rank's packs (collectives, optimiser, launches); ``gpu_...``: what each GPU did in the last step, from its kernels, and the
                share of rank-time spent waiting for slower ranks; ``efficiency``: tokens/s over those of one rank times the ranks
    waiting     share of rank-time spent waiting, from packs timed alone on the ranks that they are dealt to, beside what FLOPs
                and a fitted cost predict; what 2, 4 and 8 such ranks would wait; over all steps, and in the last, which is watched
    gradients   of one step, against those of one rank
    resume      killed with SIGKILL on n ranks, continued on n and on n / 2: largest relative difference of the losses

First comes what asks for no quiet, side by side: the kills and the gradients of one rank. Then one rank, both backends on a GPU
each, and then every larger number of ranks. Everything runs under torchrun over NCCL (gloo without GPUs), NVLink multicast off. A finished row is kept at once, in ``--folder``; a rerun
continues after it. A case that ends its launch (out of memory) is written down as failed, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch
from multi_gpu_worker import ALLOCATOR, BACKENDS, RANKS

from longalign_lib.course import cores, killing
from longalign_lib.course.results import write_result
from longalign_lib.train.plan import METHODS

HERE = Path(__file__).resolve().parent
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
KEYS = ["table", "world", "backend", "model", "window", "method", "type", "to"]  # what tells rows apart, where they have it


def cases_of(args, world: int, backend: str, model: str) -> list[tuple]:
    """The cases of one launch: gradients first, then windows in the order given."""
    kinds = {"ddp": ("float32", "bfloat16"), "zero3": ("bfloat16",)}[backend] if model == args.models[0] and args.gradients else ()
    methods = args.methods if world > 1 or max(args.worlds) == 1 else args.methods_alone
    return [("gradient", k) for k in kinds] + [("steps", w, m) for w in args.windows for m in methods]


def rows_at(folder: Path) -> list[dict]:
    """Rows finished so far; a line cut off by a kill is left out."""
    file = folder / "rows.jsonl"
    lines = file.read_text(encoding="utf8").splitlines() if file.is_file() else []
    return [json.loads(x) for x in lines if x.endswith("}")]


def is_done(rows: list[dict], world: int, backend: str, model: str, case: tuple) -> bool:
    """Whether a row of this case is there, failed or not."""
    here = [r for r in rows if (r["world"], r["backend"], r["model"]) == (world, backend, model)]
    if case[0] == "gradient":
        return any(r["table"] == "gradients" and r["type"] == case[1] for r in here)
    return any(r["table"] == "steps" and (r["window"], r["method"]) == case[1:] for r in here)


def launch(args, world: int, backend: str, model: str, until: float, kinds: tuple = ("gradient", "steps"), gpu: int | None = None) -> None:
    """Run what is left of one launch's cases; start again after a case that ended it, writing that one down.

    Args:
        kinds: of cases to run now.
        gpu: the one GPU that a single rank is to use.
    """
    name = f"{world}_{backend}_{model}"
    current, work, output = (args.folder / f"{x}_{name}" for x in ("current.json", "work.json", "output.txt"))
    while time.time() < until:
        rows = rows_at(args.folder)
        left = [c for c in cases_of(args, world, backend, model) if c[0] in kinds and not is_done(rows, world, backend, model, c)]
        if not left:
            return
        work.write_text(json.dumps({"folder": str(args.folder), "current": str(current), "backend": backend, "model": model, "cases": left,
                                    "tiny": args.tiny, "scale": args.scale, "steps": dict(zip(args.windows, args.steps, strict=True)), "seed": args.seed,
                                    "seconds": until - time.time()}))  # fmt: skip
        current.unlink(missing_ok=True)
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world),
                 str(HERE / "multi_gpu_worker.py"), str(work)]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // (2 * world))), "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        env |= {"CUDA_VISIBLE_DEVICES": str(gpu)} if gpu is not None else {}
        with open(output, "a", encoding="utf8") as said:
            began = said.tell()
            process = subprocess.Popen(words, env=env, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(max(60.0, until - time.time() + args.grace))
            except subprocess.TimeoutExpired:
                code = "none in time"
            finally:
                killing.kill_family(process)
        if code == 0:
            return
        case = json.loads(current.read_text(encoding="utf8")) if current.is_file() else None
        with open(output, encoding="utf8", errors="replace") as said:
            said.seek(began)
            lines = said.read().splitlines()
        if case is None:
            print(f"failed: {world} x {backend}, {model} ended with code {code} before its first case:", *lines[-30:], sep="\n", flush=True)
            return
        if code == "none in time":  # not the case's own fault: a rerun takes it up
            return
        why = next((x for x in reversed(lines) if "Error" in x and "ChildFailed" not in x), f"code {code}").strip()[:200]
        failed = {"world": world, "backend": backend, "model": model, "failed": why}
        failed |= {"table": "gradients", "type": case[1]} if case[0] == "gradient" else {"table": "steps", "window": case[1], "method": case[2]}
        print(f"failed: {failed}", flush=True)
        add_row(args.folder, failed)


def add_row(folder: Path, row: dict) -> None:
    """Append a row to the file that outlives a kill."""
    with open(folder / "rows.jsonl", "a", encoding="utf8") as file:
        file.write(json.dumps(row) + "\n")


def resumed(args, world: int, backend: str) -> None:
    """Kill the small run of `killing` on ``world`` ranks in its second checkpoint, and continue copies of it on as many and on half."""
    gpus, config, data = torch.cuda.is_available(), {"ddp": None, "zero3": "zero3"}[backend], args.folder / "small"
    row = {"table": "resume", "world": world, "backend": backend, "model": "34k weights"}
    kept = {r["to"] for r in rows_at(args.folder) if all(r.get(k) == v for k, v in row.items())}
    left = sorted({world, world // 2} - kept)
    if not left:
        return
    out = {k: args.folder / f"{k}_{backend}_{world}" for k in ("whole", "killed", *left)}
    for folder in out.values():  # of a run of this script that was itself cut off
        shutil.rmtree(folder, ignore_errors=True)
    order = lambda k, n: killing.command(data, out[k], n, config, seed=args.seed, packs=RANKS)  # noqa: E731
    try:
        with ThreadPoolExecutor(2) as both:
            entire = both.submit(killing.finish, order("whole", world), out["whole"], gpus=gpus)
            before, processes = killing.kill_at(6, order("killed", world), out["killed"], gpus=gpus)
            log, _ = entire.result()
        for to in left:
            shutil.copytree(out["killed"], out[to])
        after, _ = killing.finish_all({str(to): (order(to, to), out[to]) for to in left}, gpus=gpus)
        for to in left:
            add_row(args.folder, row | {"to": to, "steps": len(log), "killed_after_step": int(before.step.max()) if len(before) else 0,
                                        "processes_killed": processes,
                                        "largest_difference": killing.largest_difference(log, after[str(to)])})  # fmt: skip
    except (RuntimeError, ValueError) as error:
        print(error, flush=True)
        for to in left:
            add_row(args.folder, row | {"to": to, "failed": str(error).splitlines()[0][:200]})


def run_all(args, worlds: list[int], gpus: int, until: float) -> None:
    """Everything that is left, in the order that the module's text says."""
    side = lambda k: k if gpus > 1 else None  # noqa: E731  # one rank of each backend: a GPU each, where there are two
    tasks = []
    if args.resume and max(worlds) > 1:
        if not (args.folder / "small" / "data").is_dir():
            killing.prepare(args.folder / "small", args.seed)
        tasks += [lambda b=b: [resumed(args, w, b) for w in worlds if w > 1] for b in args.backends]
    if 1 in worlds:
        tasks += [lambda k=k, b=b: launch(args, 1, b, args.models[0], until, ("gradient",), side(k)) for k, b in enumerate(args.backends)]
    at_once(tasks, len(tasks) if gpus else 1)
    for model in args.models:
        if 1 in worlds:
            at_once([lambda k=k, b=b, model=model: launch(args, 1, b, model, until, gpu=side(k)) for k, b in enumerate(args.backends)], 2 if gpus > 1 else 1)
        for world in (w for w in worlds if w > 1):
            for backend in args.backends:
                launch(args, world, backend, model, until)


def at_once(tasks: list, threads: int) -> None:
    """Run tasks side by side; the first error is raised once all are done."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()


def tables(rows: list[dict]) -> dict[str, list[dict]]:
    """Table -> rows, the last of each key, with ``efficiency`` where one rank ran the same."""
    latest = {tuple(r.get(k) for k in [*KEYS, "ranks"]): r for r in rows}
    found: dict[str, list[dict]] = {"steps": [], "waiting": [], "gradients": [], "resume": []}
    for row in latest.values():
        found[row["table"]].append({k: v for k, v in row.items() if k != "table"})
    same = ("backend", "model", "window", "method")
    alone = {tuple(r[k] for k in same): r.get("tokens_per_second") for r in found["steps"] if r["world"] == 1}
    for row in found["steps"]:
        one = alone.get(tuple(row[k] for k in same))
        if one and "failed" not in row:
            row["efficiency"] = row["tokens_per_second"] / (row["world"] * one)
    return found


def main() -> None:
    """Run what is not there yet, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/multi_gpu.json"))
    parser.add_argument("--folder", type=Path, default=Path("build/multi_gpu"), help="rows as they come, logs, gradients")
    parser.add_argument("--worlds", type=int, nargs="+", help="numbers of ranks; default: powers of two up to the GPUs at hand")
    parser.add_argument("--models", nargs="+", default=["135M", "1B"])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--windows", type=int, nargs="+", default=[16_384, 32_768, 65_536])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--methods_alone", nargs="+", default=["balanced"], choices=METHODS, help="what one rank trains with, to compare")
    parser.add_argument("--steps", type=int, nargs="+", default=[4], help="of each window, or one for all: optimiser steps a case; the first, and on GPUs the profiled last, are not counted")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths by this, to try the script on a CPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of every model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e6, help="start no further case after so many seconds")
    parser.add_argument("--grace", type=float, default=600, help="seconds that a case may take beyond that")
    parser.add_argument("--gradients", action=argparse.BooleanOptionalAction, default=True, help="also compare gradients, of the first model")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="also kill and resume the small run")
    args = parser.parse_args()
    args.steps = args.steps * len(args.windows) if len(args.steps) == 1 else args.steps
    if len(args.steps) != len(args.windows):
        raise SystemExit(f"--steps {args.steps}: give one number, or one for each of the windows {args.windows}")
    gpus = torch.cuda.device_count()
    worlds = args.worlds = sorted(args.worlds or [w for w in (1, 2, 4, RANKS) if w <= max(1, gpus)])
    if gpus and max(worlds) > gpus:
        raise SystemExit(f"{max(worlds)} ranks need as many GPUs, here are {gpus}: leave the larger numbers out of --worlds")
    if any(RANKS % w for w in worlds):
        raise SystemExit(f"--worlds {worlds}: each must divide the {RANKS} packs of a step")
    os.environ.setdefault(ALLOCATOR, "expandable_segments:True")  # packs of ever new sizes break fixed segments to pieces
    for name, value in MULTICAST_OFF.items():
        os.environ[name] = value
    args.folder.mkdir(parents=True, exist_ok=True)
    until = time.time() + args.seconds
    try:
        run_all(args, worlds, gpus, until)
    finally:
        found = tables(rows_at(args.folder))
        for name, rows in found.items():
            table = pd.DataFrame(rows).drop(columns=["step_seconds", "critical_seconds", "allocator"], errors="ignore")
            print(f"\n{name}\n{table.round(4).to_string(max_colwidth=60)}", flush=True)
        if any(found.values()):
            write_result(args.out, "gpu" if gpus else "ci", args.seed, gpus=gpus, scale=args.scale, tiny=args.tiny,
                         dtype="bfloat16" if gpus else "float32", **found)  # fmt: skip


if __name__ == "__main__":
    main()
