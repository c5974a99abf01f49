"""What the GPUs of several ranks did in one step, from the kernels that a profiler saw.

A rank's time is split into three: kernels that compute or copy are running (``busy``), only collectives are (``collectives``), or
nothing is (``nothing``: launches, host work). A collective that starts early spins until the last rank arrives. Collective i is
the same one on every rank, so the time that it runs beside no computation, less the shortest of all ranks for that i, is waiting
for slower ranks; what is left is the transfer itself.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch


class Profile:
    """The kernels of one stretch of a run on CUDA; without CUDA it sees nothing and says so."""

    def __init__(self):
        self._seen, self._began, self._wall = None, 0.0, float("nan")

    def start(self) -> None:
        """Begin to watch; a profiler that does not start is reported and left out, for it must not end a run."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            try:
                self._seen = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self._seen.start()
            except RuntimeError as error:
                print(f"no profile: {error}", flush=True)
                self._seen = None
            self._began = time.perf_counter()

    def stop(self) -> None:
        """Stop, if it was started."""
        if self._seen is not None and np.isnan(self._wall):
            torch.cuda.synchronize()
            self._wall = time.perf_counter() - self._began
            self._seen.stop()

    def kernels(self) -> dict | None:
        """wall (seconds), start and end (float64[k], seconds), collective (bool[k]), in order of start; None when it saw nothing."""
        if self._seen is None or np.isnan(self._wall):
            return None
        with tempfile.TemporaryDirectory() as folder:
            self._seen.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text(encoding="utf8"))["traceEvents"]
        found = sorted((e["ts"], e["ts"] + e["dur"], "nccl" in e["name"].lower()) for e in events
                       if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))  # fmt: skip
        times = np.array([x[:2] for x in found], dtype=float).reshape(-1, 2) / 1e6
        return {"wall": self._wall, "start": times[:, 0], "end": times[:, 1], "collective": np.array([x[2] for x in found], dtype=bool)}


def union(start, end) -> tuple[np.ndarray, np.ndarray]:
    """Merge overlapping intervals, given in order of start: starts and ends of the pieces."""
    start, end = np.asarray(start, dtype=float), np.asarray(end, dtype=float)
    reach = np.maximum.accumulate(end) if len(end) else end
    first = np.flatnonzero(np.concatenate([[True], start[1:] > reach[:-1]])) if len(end) else np.array([], dtype=int)
    return start[first], reach[np.append(first[1:] - 1, len(end) - 1)] if len(end) else reach


def uncovered(start, end, pieces: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Of every interval, how much of it lies in none of the pieces (of `union`)."""
    start, end = np.asarray(start, dtype=float), np.asarray(end, dtype=float)
    left, right = pieces
    if not len(left):
        return end - start
    marks, done = np.stack([left, right], axis=1).ravel(), np.concatenate([[0.0], np.cumsum(right - left)])
    before = np.stack([done[:-1], done[1:]], axis=1).ravel()  # covered time before each mark
    return (end - start) - (np.interp(end, marks, before) - np.interp(start, marks, before))


def shares(ranks: list[dict | None]) -> dict:
    """Shares of a step's time, a number a rank, and ``gpu_waiting``: the share of rank-time spent waiting for slower ranks.

    Args:
        ranks: what `Profile.kernels` gave on every rank.

    Returns:
        gpu_busy, gpu_collectives, gpu_nothing (lists), gpu_waiting (None when ranks ran different numbers of collectives, or one
        rank alone ran). Empty when nothing was profiled.
    """
    if any(r is None or not len(r["start"]) for r in ranks):
        return {}
    busy, alone, waits = [], [], []
    for r in ranks:
        work = union(r["start"][~r["collective"]], r["end"][~r["collective"]])
        busy.append(float(np.sum(work[1] - work[0])) / r["wall"])
        moved = union(r["start"][r["collective"]], r["end"][r["collective"]])
        alone.append(float(uncovered(*moved, work).sum()) / r["wall"])
        waits.append(uncovered(r["start"][r["collective"]], r["end"][r["collective"]], work))
    waiting = None
    if len(ranks) > 1 and len({len(w) for w in waits}) == 1 and len(waits[0]):
        waiting = float((np.array(waits) - np.min(waits, axis=0)).sum() / sum(r["wall"] for r in ranks))
    nothing = [1 - b - a for b, a in zip(busy, alone, strict=True)]
    return {"gpu_busy": busy, "gpu_collectives": alone, "gpu_nothing": nothing, "gpu_waiting": waiting}
