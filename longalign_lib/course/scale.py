"""Tables of notebook 06: what a rank holds and how long a run takes, for the paper's models on 1 and 8 GPUs of 80 GB.

Both are arithmetic. Memory is `memory.estimate`, which was within a quarter of every peak that was measured; so a run
"fits" when a quarter more than the estimate still fits. Time is the paper's two epochs, simulated as `paper_scale` does it:
layers timed on one H100, 3.2 times slower on an A800, all ranks wait for the slowest. On 8 GPUs ZeRO-3 moves the weights over
NVLink; one GPU has no peers, keeps the weights in host memory and moves them over the bus, once for each pass (`BUS`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from longalign_lib.train import memory
from longalign_lib.train.cost import StepCost, simulate
from longalign_lib.train.paper_scale import ASSUMED, MODELS, mix, pack_cost
from longalign_lib.train.plan import build_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ROOM = 79.2  # GiB that a GPU sold as 80 GB reports (an H100; results/throughput.json)
BUS = 25e9  # bytes/s from host memory to one GPU: PCIe 4 with 16 lanes (assumed)
WAYS = {
    "DDP, autocast": {"zero_stage": None},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
    "ZeRO-3, optimizer offloaded": {"zero_stage": 3, "offload_optimizer": True},
    "ZeRO-3, all offloaded (paper)": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


def verdict(total: float, room: float = ROOM) -> str:
    """"fits", "maybe" (only if the estimate is not a quarter too low) or "no", for an estimate of ``total`` GiB."""
    return "fits" if total * 1.25 <= room else "maybe" if total <= room else "no"


def memory_table(tokens: int = 65_536, gpus: tuple[int, ...] = (1, 8), recompute: bool = True, models=MODELS) -> pd.DataFrame:
    """Estimated GiB of one GPU for each model, number of GPUs and way of sharing.

    Args:
        tokens: tokens of a pack.
        gpus: numbers of ranks.
        recompute: gradient checkpointing.
        models: name -> sizes, see `paper_scale.MODELS`.

    Returns:
        A row a case: model, gpus, way, the parts of `memory.estimate`, total, host (all ranks together), verdict.
    """
    rows = []
    for name, sizes in models.items():
        for ranks in gpus:
            for way, options in WAYS.items():
                parts = memory.estimate(SimpleNamespace(**sizes), tokens, ranks=ranks, recompute=recompute, **options)
                rows.append({"model": name, "gpus": ranks, "way": way} | parts | {"verdict": verdict(parts["total"])})
    return pd.DataFrame(rows)


def measured_peaks(throughput: dict, layer_times: dict, config) -> pd.DataFrame:
    """Estimates beside the peaks that an H100 recorded, for packs of 64k tokens.

    Args:
        throughput, layer_times: results/throughput.json and results/layer_times.json.
        config: the sizes of throughput.json's model.

    Returns:
        A row a case: case, measured and estimated (GiB), error (estimated over measured, less one).
    """
    rows = []
    for r in throughput["rows"]:
        if r["table"] == "recompute":  # bf16 weights and gradients, Adam's moments in bf16 too: 8 bytes a weight, no masters
            parts = memory.estimate(config, int(r["tokens"]), zero_stage=0, recompute=r["way"] == "recomputed")
            ours = parts["total"] - parts["optimizer"] + 4 * memory.parameters(config) / memory.GIB
            rows.append((f"135M, whole model with Adam, {'recomputed' if r['way'] == 'recomputed' else 'nothing recomputed'}", r["peak_gib"], ours))
    for name, facts in layer_times["models"].items():
        runs = [t for t in facts["times"][-1] if t["slots"] == 65_536 and t["documents"] == 1]
        for t in runs:  # no optimiser in these runs
            sizes = SimpleNamespace(**{**MODELS[name], "num_hidden_layers": t["layers"]}, tie_word_embeddings=False)
            parts = memory.estimate(sizes, t["slots"], zero_stage=0, recompute=True)
            rows.append((f"{name}: {t['layers']} of its layers, no optimizer", t["peak_gib"], parts["total"] - parts["optimizer"]))
    table = pd.DataFrame(rows, columns=["case", "measured", "estimated"])
    return table.assign(error=table.estimated / table.measured - 1)


def hours_table(layer_times: dict, rows: int | None = None, seed: int = 0, gpus: tuple[int, ...] = (1, 8)) -> pd.DataFrame:
    """Predicted hours of the paper's two epochs under four plans; the global batches do not depend on the GPUs.

    Args:
        layer_times: results/layer_times.json.
        rows: rows of the mix to simulate; hours are scaled to the paper's 84,000. None is all of them.
        seed: of rows and plans.
        gpus: numbers of ranks.

    Returns:
        A row a run: model, plan, gpus, hours, gpu_hours, idle (share of rank-time spent waiting), steps (of both epochs).
    """
    epoch = ASSUMED["rows an epoch (1,500 to 2,000 steps of 96 rows in two epochs)"]
    slower = ASSUMED["peak of an H100, bf16 FLOP/s (data sheet)"] / ASSUMED["peak of an A800, bf16 FLOP/s (data sheet)"]
    link = ASSUMED["link bytes/s that ZeRO-3's collectives reach (assumed; NVLink of an A800: 400 GB/s both ways)"]
    host = ASSUMED["host memory bytes/s for Adam on the CPU (assumed)"]
    lengths = mix(rows or epoch, seed)
    times, common = 2 * epoch / len(lengths), dict(capacity=65_536, seed=seed)
    plans = {
        "naive": build_plan(lengths, method="naive", packs_per_step=96, **common),
        "sorted": build_plan(lengths, method="sorted", packs_per_step=96, **common),
        "packed": build_plan(lengths, method="packed", algorithm="next_fit", packs_per_step=8, **common),
        "balanced": build_plan(lengths, method="balanced", packs_per_step=8, **common),
    }
    out = []
    for model, facts in MODELS.items():
        weights = 3 * 2 * facts["parameters"]  # bytes a pass: read twice, gradients written once
        measured = layer_times["models"][model]
        shared = pack_cost(model, StepCost(**measured["layer"]), StepCost(**measured["head"]), slower)
        alone = dataclasses.replace(shared, fixed=shared.fixed - weights * 7 / 8 / link + weights / BUS)
        for name, plan in plans.items():
            steps = int(plan.table.step.max()) + 1
            for ranks in gpus:
                run = simulate(plan, ranks, alone if ranks == 1 else shared, balance=name == "balanced")
                hours = times * (run.seconds + steps * 30 * facts["parameters"] / host) / 3600
                out.append({"model": model, "plan": name, "gpus": ranks, "hours": hours, "gpu_hours": hours * ranks,
                            "idle": max(0.0, run.idle), "steps": round(steps * times)})  # fmt: skip
    return pd.DataFrame(out)


def stand_in(folder: Path, model: str, rows: int = 1000, seed: int = 0) -> tuple[Path, Path]:
    """What a dry run of one of the paper's models needs: its config without weights, and rows of the mix's lengths.

    Args:
        folder: gets ``<model>`` and ``mix``.
        model: a key of `paper_scale.MODELS`.
        rows, seed: of the mix; tokens are all alike, half of each row is trained on.

    Returns:
        The folders of model and data.
    """
    import numpy as np
    from transformers import LlamaConfig

    from longalign_lib.data.tokens import TokenStore

    sizes = {k: v for k, v in MODELS[model].items() if k != "parameters"}
    LlamaConfig(**sizes, max_position_embeddings=65_536, architectures=["LlamaForCausalLM"]).save_pretrained(folder / model)
    lengths = mix(rows, seed)
    half = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    TokenStore(np.ones(len(half), np.int32), half, np.concatenate([[0], np.cumsum(lengths)]), [{} for _ in lengths]).save(folder / "mix")
    return folder / model, folder / "mix"


def dry_run_options(model: Path, data: Path, gpus: int, config: str) -> list[str]:
    """Options of ``python -m longalign_lib.train`` for a dry run at the paper's pack size; ``config`` is a name in configs/."""
    return ["--data", str(data), "--model", str(model), "--method", "balanced", "--capacity", "65536", "--packs_per_step", "8",
            "--gradient_checkpointing", "true", "--deepspeed", str(CONFIGS / f"{config}.json"), "--dry_run", "--gpus", str(gpus),
            "--gpu", "A800"]  # fmt: skip


def dry_run(options: list[str]) -> dict:
    """What ``python -m longalign_lib.train OPTIONS --dry_run`` prints, from a call of the same function in this process.

    Returns:
        {"plan": its audit, "predicted": memory and time}, see `train.run.predict`.
    """
    from longalign_lib.train.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(options)
    return {name: json.loads(line) for name, _, line in (x.partition(": ") for x in said.getvalue().splitlines()) if name in ("plan", "predicted")}
