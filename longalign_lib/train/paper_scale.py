"""The paper's runs on paper: from layers timed on one device to the hours of Figure 5.

A run is simulated, not scaled from a bar: rows are drawn, planned as the paper batches them (next-fit packs, or 96 rows a
step), dealt to eight ranks, and every micro-step lasts as long as its slowest rank. A pack costs

    layers x layer(slots, squares) + head(slots, squares)          timed on one GPU, times the ratio of the two devices' speed
    + 3 x 2 bytes x parameters x 7/8 / link speed                  ZeRO-3 collects the weights twice and scatters gradients
    and each step 30 bytes x parameters / host memory speed        Adam on the CPU reads and writes its states

What is measured, what is taken from data sheets and what is assumed is told apart in `ASSUMED`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from longalign_lib.train.cost import StepCost, simulate
from longalign_lib.train.plan import Plan, build_plan

MODELS = {  # published configurations: ChatGLM3-6B, Llama-2-7B, Llama-2-13B
    "6B": {"hidden_size": 4096, "intermediate_size": 13_696, "num_hidden_layers": 28, "num_attention_heads": 32,
           "num_key_value_heads": 2, "vocab_size": 65_024, "parameters": 6.24e9},
    "7B": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32_000, "parameters": 6.74e9},
    "13B": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40, "vocab_size": 32_000, "parameters": 13.02e9},
}  # fmt: skip

ASSUMED = {
    "peak of an A800, bf16 FLOP/s (data sheet)": 312e12,
    "peak of an H100, bf16 FLOP/s (data sheet)": 989e12,
    "link bytes/s that ZeRO-3's collectives reach (assumed; NVLink of an A800: 400 GB/s both ways)": 150e9,
    "host memory bytes/s for Adam on the CPU (assumed)": 200e9,
    "rows an epoch (1,500 to 2,000 steps of 96 rows in two epochs)": 84_000,
}


def mix(rows: int, seed: int = 0, capacity: int = 65_536, long: str = "uniform") -> np.ndarray:
    """Lengths like the paper's Figure 3, int64[rows]: a long tail behind many short rows.

    Nine rows in ten are lognormal(6.6, 1.0) clipped to 16..8,192, one in ten lies over 8,192..``capacity``, "uniform" or
    "log-uniform". Every statement of the project about "the mix" is about the uniform one, with seed 0 unless it says so.
    """
    if long not in ("uniform", "log-uniform"):
        raise ValueError(f"long {long!r} is not 'uniform' or 'log-uniform'")
    rng = np.random.default_rng(seed)
    short = np.clip(np.exp(rng.normal(6.6, 1.0, rows)), 16, 8192).astype(np.int64)
    tail = rng.integers(8192, capacity + 1, rows)
    if long == "log-uniform":
        tail = np.exp(rng.uniform(np.log(8192), np.log(capacity), rows)).astype(np.int64)
    return np.where(rng.random(rows) < 0.1, tail, short)


def four_plans(lengths, capacity: int = 65_536, packs_per_step: int = 8, ranks: int = 8, seed: int = 0) -> dict[str, Plan]:
    """Naive, sorted, packed and balanced plans that take about the same number of steps, as the paper compares them.

    Args:
        lengths: int[n], at most ``capacity``.
        packs_per_step: packs of a step of the packed and balanced plans; the padded ones take, of one row a pack, as many
            as make about as many steps, a multiple of ``ranks``.
        ranks: ranks that every plan can be dealt to, and each of their divisors.

    Returns:
        method -> plan, in that order.
    """
    common = dict(capacity=capacity, seed=seed, max_ranks=ranks)
    packs = {m: build_plan(lengths, method=m, packs_per_step=packs_per_step, **common) for m in ("packed", "balanced")}
    rows_a_step = max(1, round(len(lengths) / len(packs["packed"].steps()) / ranks)) * ranks
    return {m: build_plan(lengths, method=m, packs_per_step=rows_a_step, **common) for m in ("naive", "sorted")} | packs


def pack_cost(model: str, layer: StepCost, head: StepCost, slower: float) -> StepCost:
    """Seconds of one pack of a whole model on the slower device, ZeRO-3's traffic included.

    Args:
        model: a key of `MODELS`.
        layer, head: seconds of one layer, and of embedding and head, on the device that was measured.
        slower: how many times longer the other device takes.
    """
    n = MODELS[model]["num_hidden_layers"]
    link = ASSUMED["link bytes/s that ZeRO-3's collectives reach (assumed; NVLink of an A800: 400 GB/s both ways)"]
    traffic = 3 * 2 * MODELS[model]["parameters"] * 7 / 8 / link
    part = lambda name: slower * (n * getattr(layer, name) + getattr(head, name))  # noqa: E731
    return StepCost(part("fixed") + traffic, part("per_token"), part("per_square"))


def figure5(layer_times: dict, long: str = "uniform", epochs: int = 2, seed: int = 0, ranks: int = 8) -> pd.DataFrame:
    """Predicted hours of Figure 5's nine runs, and of three more with balanced packs.

    Args:
        layer_times: what benchmarks/layer_times.py writes.
        long: how the long rows are spread, see `mix`: the paper shows them about evenly over 8k to 64k, and says that a
            pack holds 12 rows on average; "uniform" gives 11.1, "log-uniform" 14.2.
        epochs: passes over the data; ``seed``: of rows and plans; ``ranks``: GPUs.

    Returns:
        A row a run: model, method ("naive", "packing", "sorted", "balanced"), hours, idle (share of rank-time), steps,
        rows_per_pack.
    """
    lengths = mix(ASSUMED["rows an epoch (1,500 to 2,000 steps of 96 rows in two epochs)"], seed, long=long)
    slower = ASSUMED["peak of an H100, bf16 FLOP/s (data sheet)"] / ASSUMED["peak of an A800, bf16 FLOP/s (data sheet)"]
    host = ASSUMED["host memory bytes/s for Adam on the CPU (assumed)"]
    common = dict(capacity=65_536, seed=seed, epochs=epochs)
    plans = {
        "naive": build_plan(lengths, method="naive", packs_per_step=12 * ranks, **common),
        "packing": build_plan(lengths, method="packed", algorithm="next_fit", packs_per_step=ranks, **common),
        "sorted": build_plan(lengths, method="sorted", packs_per_step=12 * ranks, **common),
        "balanced": build_plan(lengths, method="balanced", packs_per_step=ranks, **common),
    }
    rows = []
    for model, facts in MODELS.items():
        times = layer_times["models"][model]
        cost = pack_cost(model, StepCost(**times["layer"]), StepCost(**times["head"]), slower)
        for method, plan in plans.items():
            run = simulate(plan, ranks, cost, balance=method == "balanced")
            steps = int(plan.table.step.max()) + 1
            seconds = run.seconds + steps * 30 * facts["parameters"] / host
            rows.append({"model": model, "method": method, "hours": seconds / 3600, "idle": run.idle, "steps": steps,
                         "rows_per_pack": len(plan.table) / (int(plan.table.pack.max()) + 1)})  # fmt: skip
    return pd.DataFrame(rows)


def beside_paper(layer_times: dict, published: pd.DataFrame, **options) -> pd.DataFrame:
    """Figure 5 and its prediction side by side.

    Args:
        layer_times, options: as for `figure5`.
        published: columns model, method, hours: the nine bars.

    Returns:
        A row a bar, and three for balanced packs that the paper does not have: model, method, paper (hours), uniform and
        log_uniform (predicted hours for the two spreads of long rows), times (predicted over paper, a text "1.2 to 1.5").
    """
    spreads = {w: figure5(layer_times, long, **options).set_index(["model", "method"]).hours
               for w, long in (("uniform", "uniform"), ("log_uniform", "log-uniform"))}  # fmt: skip
    table = pd.DataFrame(spreads).join(published.set_index(["model", "method"]).hours.rename("paper")).reset_index()
    low, high = (table[["uniform", "log_uniform"]].agg(f, axis=1) / table.paper for f in ("min", "max"))
    table["times"] = [f"{a:.2f} to {b:.2f}" if a == a else "" for a, b in zip(low, high)]
    return table[["model", "method", "paper", "uniform", "log_uniform", "times"]]
