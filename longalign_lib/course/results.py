"""Reference results: a JSON file with the numbers and where they come from."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pandas as pd

from longalign_lib.files import whole
from longalign_lib.models import environment_report
from longalign_lib.plots.style import commit, device_name


def provenance(profile: str, seed: int) -> dict:
    """What a number needs beside it to be believed: device, versions, commit, profile, seed, day (UTC)."""
    versions = environment_report().set_index("item").value.to_dict()
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"profile": profile, "seed": seed, "device": device_name(), "commit": commit(), "date": day, "versions": versions}


def write_result(path: Path | str, profile: str, seed: int, **numbers) -> Path:
    """Write ``numbers`` with their provenance as JSON; returns the path."""
    text = json.dumps({"provenance": provenance(profile, seed), **numbers}, indent=1, ensure_ascii=False)
    with whole(path) as half:
        half.write_text(text + "\n", encoding="utf8")
    return Path(path)


def several_gpus(record: dict) -> pd.DataFrame:
    """What ``results/multi_gpu.json`` says about the most ranks that it was run on, one row a case that ran.

    Args:
        record: the file's content.

    Returns:
        Models as they come in the record; columns

            backend, model, window, plan, ranks   "DDP" or "ZeRO-3"; naive, sorted, packed or balanced
            tokens_per_second   over all steps, in which every plan of a window computes the same rows (the first warms up)
            efficiency          timed steps: speed over that of one rank times the ranks; NaN without a run on one
            computing           share of the ranks' time in kernels of their own, in the last step
            waiting             share of the ranks' time, measured in the last step
            waiting_timed       predicted for that step from packs timed alone; NaN where their times were not kept
            waiting_flops       predicted for that step from FLOPs
            waiting_timed_all   predicted from packs timed alone, over all steps
            peak_gib            largest of the ranks

    Raises:
        ValueError: no case ran on more than one rank.
    """
    keys = ["world", "backend", "model", "window", "method"]
    steps = pd.DataFrame([r for r in record["steps"] if r["world"] > 1 and "failed" not in r])
    if steps.empty:
        raise ValueError("the record holds no case that ran on two ranks or more: run benchmarks/multi_gpu.py on several GPUs")
    steps = steps[steps.world == steps.world.max()]
    waiting = pd.DataFrame(record["waiting"])
    both = steps.merge(waiting[(waiting.ranks == waiting.world) & (waiting.timed_on == waiting.world)], on=keys, validate="1:1")
    meets = (both.backend == "zero3").map({True: "", False: "a_step_"})  # ZeRO-3's ranks meet in every micro-step
    rows = [row for _, row in both.iterrows()]
    timed = [row.get(f"idle_last_{meet}measured", float("nan")) for row, meet in zip(rows, meets)]
    flops = [row[f"idle_last_{meet}from_flops"] for row, meet in zip(rows, meets)]
    whole_run = [row[f"idle_{meet}measured"] for row, meet in zip(rows, meets)]
    table = pd.DataFrame({
        "backend": both.backend.map({"ddp": "DDP", "zero3": "ZeRO-3"}), "model": both.model, "window": both.window,
        "plan": pd.Categorical(both.method, ["naive", "sorted", "packed", "balanced"], ordered=True), "ranks": both.world,
        "tokens_per_second": both.tokens_all / both.step_seconds.map(sum), "efficiency": both.get("efficiency", float("nan")),
        "computing": both.gpu_busy.map(lambda shares: sum(shares) / len(shares)), "waiting": both.gpu_waiting,
        "waiting_timed": timed, "waiting_flops": flops, "waiting_timed_all": whole_run, "peak_gib": both.peak_gib})  # fmt: skip
    order = ["model", "backend", "window", "plan"]
    return table.sort_values(order, key=lambda c: pd.factorize(c)[0] if c.name == "model" else c, ignore_index=True)
