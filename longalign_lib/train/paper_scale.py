"""The paper's runs on paper: from layers timed on one device to the hours of Figure 5.

A run is simulated, not scaled from a bar: rows are drawn, planned as the paper batches them (next-fit packs, or 96 rows a
step), dealt to eight ranks, and every micro-step lasts as long as its slowest rank. A pack costs

    layers x layer(slots, squares) + head(slots, squares)          timed on one GPU, times the ratio of the two devices' speed
    + 3 x 2 bytes x parameters x 7/8 / link speed                  ZeRO-3 collects the weights twice and scatters gradients
    and each step 30 bytes x parameters / host memory speed        Adam on the CPU reads and writes its states

What is measured, what is taken from data sheets and what is assumed is told apart in `ASSUMED`; `reasons` changes one assumption
at a time, to see which of them could explain where prediction and paper part.
"""

from __future__ import annotations

from functools import lru_cache

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

A800, H100 = "peak of an A800, bf16 FLOP/s (data sheet)", "peak of an H100, bf16 FLOP/s (data sheet)"
LINK = "link bytes/s that ZeRO-3's collectives reach (assumed; NVLink of an A800: 400 GB/s both ways)"
ASSUMED = {
    A800: 312e12,
    H100: 989e12,
    LINK: 150e9,
    "host memory bytes/s for Adam on the CPU (assumed)": 200e9,
    "share of its peak that FlashAttention-2 reaches on an A100 (its paper: 50 to 73%), used in one of `reasons`": 0.6,
    "rows an epoch (1,500 to 2,000 steps of 96 rows in two epochs)": 84_000,
}

SPREADS = ("uniform", "log-uniform", "between", "falling")


def mix(rows: int, seed: int = 0, capacity: int = 65_536, long: str = "uniform") -> np.ndarray:
    """Lengths like the paper's Figure 3, int64[rows]: a long tail behind many short rows.

    Nine rows in ten are lognormal(6.6, 1.0) clipped to 16..8,192, one in ten lies over 8,192..``capacity``: "uniform",
    "log-uniform", "between" (a coin decides for each row which of the two) or "falling" (density falls linearly to 0 at the
    capacity). Every statement of the project about "the mix" is about the uniform one, with seed 0 unless it says so.
    """
    if long not in SPREADS:
        raise ValueError(f"long {long!r} is not one of {', '.join(SPREADS)}")
    rng = np.random.default_rng(seed)
    short = np.clip(np.exp(rng.normal(6.6, 1.0, rows)), 16, 8192).astype(np.int64)
    tail = rng.integers(8192, capacity + 1, rows)
    if long in ("log-uniform", "between"):
        bent = np.exp(rng.uniform(np.log(8192), np.log(capacity), rows)).astype(np.int64)
        tail = bent if long == "log-uniform" else np.where(np.random.default_rng([seed, 1]).random(rows) < 0.5, tail, bent)
    elif long == "falling":
        tail = (capacity - (capacity - 8192) * np.sqrt(rng.random(rows))).astype(np.int64)
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


def pack_cost(model: str, layer: StepCost, head: StepCost, slower: float, attention_share: float | None = None,
              link: float | None = None) -> StepCost:  # fmt: skip
    """Seconds of one pack of a whole model on the slower device, ZeRO-3's traffic included.

    Args:
        model: a key of `MODELS`.
        layer, head: seconds of one layer, and of embedding and head, on the device that was measured.
        slower: how many times longer the other device takes.
        attention_share: share of an A800's peak that attention reaches there; by default it is ``slower`` like all else.
        link: bytes/s of ZeRO-3's collectives; what is `ASSUMED` by default.
    """
    n = MODELS[model]["num_hidden_layers"]
    traffic = 3 * 2 * MODELS[model]["parameters"] * 7 / 8 / (link or ASSUMED[LINK])
    part = lambda name: slower * (n * getattr(layer, name) + getattr(head, name))  # noqa: E731
    squares = part("per_square")
    if attention_share:  # 6 FLOPs x width a squared token forward and backward, 2 more for the recomputed forward pass
        squares = n * 8 * MODELS[model]["hidden_size"] / (attention_share * ASSUMED[A800])
    return StepCost(part("fixed") + traffic, part("per_token"), squares)


@lru_cache(maxsize=2)
def _plans(long: str, epochs: int, seed: int, ranks: int) -> dict[str, Plan]:
    lengths = mix(ASSUMED["rows an epoch (1,500 to 2,000 steps of 96 rows in two epochs)"], seed, long=long)
    common = dict(capacity=65_536, seed=seed, epochs=epochs)
    return {
        "naive": build_plan(lengths, method="naive", packs_per_step=12 * ranks, **common),
        "packing": build_plan(lengths, method="packed", algorithm="next_fit", packs_per_step=ranks, **common),
        "sorted": build_plan(lengths, method="sorted", packs_per_step=12 * ranks, **common),
        "balanced": build_plan(lengths, method="balanced", packs_per_step=ranks, **common),
    }


def figure5(layer_times: dict, long: str = "uniform", epochs: int = 2, seed: int = 0, ranks: int = 8, *, wait: str = "micro-step",
            attention_share: float | None = None, link: float | None = None) -> pd.DataFrame:  # fmt: skip
    """Predicted hours of Figure 5's nine runs, and of three more with balanced packs.

    Args:
        layer_times: what benchmarks/layer_times.py writes.
        long: how the long rows are spread, see `mix`: the paper shows them about evenly over 8k to 64k, and says that a
            pack holds 12 rows on average; "uniform" gives 11.1, "between" 12.3, "log-uniform" 14.0, "falling" 14.2.
        epochs: passes over the data; ``seed``: of rows and plans; ``ranks``: GPUs.
        wait: when ranks wait for the slowest: "micro-step" (as ZeRO-3 makes them) or only at the end of a "step".
        attention_share, link: see `pack_cost`.

    Returns:
        A row a run: model, method ("naive", "packing", "sorted", "balanced"), hours, idle (share of rank-time), steps,
        rows_per_pack.
    """
    if wait not in ("micro-step", "step"):
        raise ValueError(f"wait {wait!r} is not 'micro-step' or 'step'")
    slower, host = ASSUMED[H100] / ASSUMED[A800], ASSUMED["host memory bytes/s for Adam on the CPU (assumed)"]
    rows = []
    for model, facts in MODELS.items():
        times = layer_times["models"][model]
        cost = pack_cost(model, StepCost(**times["layer"]), StepCost(**times["head"]), slower, attention_share, link)
        for method, plan in _plans(long, epochs, seed, ranks).items():
            run = simulate(plan, ranks, cost, balance=method == "balanced")
            steps, seconds, work = int(plan.table.step.max()) + 1, run.seconds, run.timeline.cost
            if wait == "step":
                seconds = float(work.groupby([run.timeline.step, run.timeline["rank"]]).sum().groupby("step").max().sum())
            rows.append({"model": model, "method": method, "hours": (seconds + steps * 30 * facts["parameters"] / host) / 3600,
                         "idle": float(1 - work.sum() / (seconds * ranks)), "steps": steps,
                         "rows_per_pack": len(plan.table) / (int(plan.table.pack.max()) + 1)})  # fmt: skip
    return pd.DataFrame(rows)


def reasons(layer_times: dict, published: pd.DataFrame, **options) -> pd.DataFrame:
    """What each suspected reason for a difference is worth: predicted over published hours, one assumption changed at a time.

    Args:
        layer_times, options: as for `figure5`.
        published: columns model, method, hours: the nine bars.

    Returns:
        A row a change, a column a bar ("6B naive", ...), predicted over published; and ``naive over packing``, the mean
        of the three models' speed-ups by packing, whose published value is in the row "the paper".
    """
    share = ASSUMED["share of its peak that FlashAttention-2 reaches on an A100 (its paper: 50 to 73%), used in one of `reasons`"]
    changes = {
        "as predicted, 12 rows a pack": {},
        "fewer long rows near 64k": {"long": "falling"},
        f"attention at {share:.0%} of an A800's peak": {"attention_share": share},
        "collectives at 50 GB/s": {"link": 50e9},
        "waiting once a step": {"wait": "step"},
    }
    bars = published.set_index(["model", "method"]).hours

    def line(hours) -> dict:
        speed_up = np.mean([hours[m, "naive"] / hours[m, "packing"] for m in MODELS])
        return {f"{m} {k}": hours[m, k] / bars[m, k] for m, k in bars.index} | {"naive over packing": speed_up}

    found = {name: line(figure5(layer_times, **{"long": "between"} | change | options).set_index(["model", "method"]).hours)
             for name, change in changes.items()}  # fmt: skip
    return pd.DataFrame({"the paper": line(bars)} | found).T


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
