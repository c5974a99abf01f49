"""Race packing functions, ours beside the published ones, on the same lengths: seconds, fill, peak memory; then whole plans.

    python benchmarks/packing.py            10,000 to 10,000,000 rows, results/packing.json
    python benchmarks/packing.py --quick    up to 100,000 rows, build/packing.json

Lengths are "the mix" (`paper_scale.mix`: a long tail behind many short rows) in random order, capacity 65,536. Every
contender (packing_contenders.py) and size is a fresh process on one core. Before the clock starts it has the lengths in the
form that it wants and has packed 64 rows once (imports, compilation: column "ready"). Then it is timed up to five times by the wall clock. Peak
memory is the highest resident size during the first call less the one before it. What comes back is checked: no row that was
not given, no pack over the capacity, and how many rows were lost. A contender that runs over the time limit or half of
this machine's memory, fails, or is not installed is a line that says so, and is not tried with more rows.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from packing_contenders import CAPACITY, PACKERS, PADDED, PEERS, PLAN, PLANS, SEED, mix, outcome

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
OURS_LIMIT = 900  # seconds; peers have --limit
ENOUGH = 20  # seconds of one contender's calls after which it is not timed again
PACKAGES = ("numpy", "pyarrow", "transformers", "trl", "binpacking", "axolotl", "numba", "seqpacker")


def _resident(key: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak) of this process in bytes; the peak of its life where there is no /proc."""
    with contextlib.suppress(FileNotFoundError), open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _give_back() -> None:
    """Return free memory to the system, so that all that a call takes is seen to be taken."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's allocator, then Arrow's
        ctypes.CDLL(None).malloc_trim(0)
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()


def time_one(name: str, lengths: np.ndarray, capacity: int, limit: float, repeats: int) -> dict:
    """Time one contender in this process, which dies of SIGALRM at the limit; returns its line."""
    prepare = (PACKERS | PEERS | PLANS)[name]
    start = time.perf_counter()
    prepare(lengths[:64].copy(), capacity)[0]()
    ready = time.perf_counter() - start
    call, read = prepare(lengths, capacity)
    _give_back()
    with contextlib.suppress(OSError):  # forget the peak so far: VmHWM, unlike ru_maxrss, can start anew
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, seconds = _resident("VmRSS"), []
    while not seconds or (len(seconds) < repeats and sum(seconds) < ENOUGH):
        result = None
        signal.setitimer(signal.ITIMER_REAL, limit)
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if len(seconds) == 1:
            peak = max(0, _resident("VmHWM") - before)
    line = {"ready": ready, "seconds": min(seconds), "median": statistics.median(seconds), "runs": len(seconds), "before_mb": before / 1e6,
            "peak_mb": peak / 1e6, "rows_per_second": lengths.size / min(seconds)}  # fmt: skip
    if name in PLANS:
        line |= {"steps": len(result.steps()), "table_mb": int(result.table.memory_usage(deep=True).sum()) / 1e6}
    return line | outcome(*read(result), lengths, capacity, name in PADDED)


def answer(args) -> None:
    """The child process: one contender, one core, its line or its error as JSON in ``args.answer``."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    resource.setrlimit(resource.RLIMIT_DATA, (int(args.memory * 1e9),) * 2)
    try:
        line = {"status": "ok"} | time_one(args.one, np.load(args.lengths), args.capacity, args.limit, args.repeats)
    except ModuleNotFoundError as error:
        line = {"status": "not installed", "why": str(error)}
    except MemoryError:
        line = {"status": f"> {args.memory:.3g} GB"}
    except Exception as error:  # whatever a contender raises is its line, not the end of the bench
        line = {"status": "error", "why": f"{type(error).__name__}: {error}"[:300]}
    Path(args.answer).write_text(json.dumps(line), encoding="utf8")


def measure(name: str, path: Path | str, capacity: int, limit: float, repeats: int = 5, memory: float | None = None) -> dict:
    """Run one contender over the lengths in ``path`` (npy) in a fresh process; its line, whatever happens to it.

    Args:
        limit: seconds that one call may take; memory: GB that the process may take, half of this machine's by default.
    """
    alone = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMBA")} | {"HF_HUB_OFFLINE": "1"}
    memory = memory or psutil.virtual_memory().total / 2e9
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.json"
        options = {"one": name, "lengths": path, "answer": file, "capacity": capacity, "limit": limit, "repeats": repeats,
                   "memory": memory}  # fmt: skip
        command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
        try:  # preparing and reading are not timed, but they end too
            done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, timeout=2 * limit + 120)
        except subprocess.TimeoutExpired:
            return {"contender": name, "status": "error", "why": "did not get ready, or could not be read, in time"}
        if done.returncode == -signal.SIGALRM:
            return {"contender": name, "status": f"> {limit:g} s"}
        if done.returncode or not file.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"contender": name, "status": "error", "why": f"exit status {done.returncode}: {last}"[:300]}
        return {"contender": name} | json.loads(file.read_text(encoding="utf8"))


def race(contenders: dict[str, float], sizes, seed: int, repeats: int = 5, capacity: int = CAPACITY) -> list[dict]:
    """Measure every contender (name: limit in seconds) at every size; one that does not finish is not tried with more rows."""
    from tqdm.auto import tqdm

    lines, out = [], set()
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(contenders) * len(sizes), leave=False) as bar:
        path = Path(folder) / "lengths.npy"
        for size in sizes:
            np.save(path, mix(size, seed, capacity))
            for name, limit in contenders.items():
                bar.set_description(f"{name}, {size:,} rows")
                if name not in out:
                    lines.append({"rows": size} | measure(name, path, capacity, limit, repeats))
                    out |= {name} if lines[-1]["status"] != "ok" else set()
                bar.update()
    return lines


def targets(lines: list[dict]) -> list[dict]:
    """What the project promises of best-fit decreasing, beside what was measured (seconds: the median)."""
    found = {x["rows"]: x for x in lines if x["contender"] == "ours: best_fit_decreasing" and x["status"] == "ok"}
    promised = [(1_000_000, "median", 0.3, "seconds"), (1_000_000, "gap", 0.01, "percent over the lower bound"),
                (1_000_000, "peak_mb", 150, "MB"), (10_000_000, "median", 2.0, "seconds")]  # fmt: skip
    return [{"rows": rows, "at_most": most, "unit": unit, "measured": found[rows][key] if rows in found else None,
             "verdict": "not measured" if rows not in found else "met" if found[rows][key] <= most else "not met"}
            for rows, key, most, unit in promised]  # fmt: skip


def show(lines: list[dict], columns: dict[str, str]) -> str:
    """The lines as text; ``columns`` maps keys to formats. A line that did not finish says why in place of numbers."""
    frame = pd.DataFrame(lines).reindex(columns=["rows", "contender", *columns, "status", "why"]).astype(object)
    for key, form in {"rows": ",d", **columns}.items():
        frame[key] = ["" if pd.isna(v) else format(int(v) if form.endswith("d") else v, form) for v in frame[key]]
    return frame.fillna("").drop(columns=[] if frame.why.notna().any() else "why").to_string(index=False)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 100,000 rows")
    parser.add_argument("--out", help="results/packing.json by default; build/packing.json with --quick")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a peer may take for one call")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--capacity", type=int, default=CAPACITY)
    for name in ("--one", "--lengths", "--answer", "--memory"):  # how the bench calls itself
        parser.add_argument(name, help=argparse.SUPPRESS, type=float if name == "--memory" else str)
    args = parser.parse_args()
    if args.one:
        return answer(args)
    from longalign_lib.course.results import write_result

    sizes = [size for size in SIZES if size <= 100_000] if args.quick else SIZES
    load, memory = os.getloadavg(), psutil.virtual_memory().total / 2e9
    contenders = dict.fromkeys(PACKERS, OURS_LIMIT) | dict.fromkeys(PEERS, args.limit)
    lines = race(contenders, sizes, args.seed, args.repeats, args.capacity)
    plans = race(dict.fromkeys(PLANS, OURS_LIMIT), sizes, args.seed, args.repeats, args.capacity)
    checks = targets(lines)
    shared = {"ready": ".2f", "seconds": ".4f", "median": ".4f", "rows_per_second": ",d", "packs": ",d", "fill": ".5f", "gap": ".4f"}
    print(f"one core; load of the machine at the start {load[0]:.2f}; capacity {args.capacity:,}; gap, waste in percent\n")
    print(show(lines, shared | {"waste": ".2f", "lost": ",d", "peak_mb": ".1f"}), "\n")
    print(show(plans, shared | {"steps": ",d", "peak_mb": ".1f", "table_mb": ".1f"}), "\n")
    print(pd.DataFrame(checks).to_string(index=False))
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    out = args.out or ("build/packing.json" if args.quick else "results/packing.json")
    write_result(out, "ci", args.seed, capacity=args.capacity, limit_seconds=args.limit, limit_gb=memory, load_average=load,
                 packages=versions, packing=lines, plans=plans, plan_options=PLAN | {"capacity": args.capacity},
                 targets=checks)  # fmt: skip
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    main()
