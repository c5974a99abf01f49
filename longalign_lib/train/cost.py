"""What a pack costs and who waits for whom.

Step-cost model: a forward and backward pass over a pack takes ``a + b * slots + c * squares`` seconds (launches; linear layers
and head; attention), with slots the tokens computed and squares the sum of squared document lengths. `fit` finds a, b, c
from measured times (non-negative least squares); `from_config` derives b and c from a model's sizes and a speed in FLOP/s.

Simulator: in every micro-step all ranks wait for the slowest (as ZeRO-3 makes them), so a micro-step lasts its maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from longalign_lib.train.plan import Plan, assign


@dataclass(frozen=True)
class StepCost:
    """Seconds of a forward and backward pass: ``fixed + per_token * slots + per_square * squares``."""

    fixed: float
    per_token: float
    per_square: float

    def __call__(self, slots, squares) -> np.ndarray:
        """Seconds for packs of ``slots`` tokens computed and ``squares`` = sum of squared lengths."""
        return self.fixed + self.per_token * np.asarray(slots, float) + self.per_square * np.asarray(squares, float)


def fit(slots, squares, seconds) -> StepCost:
    """Fit the three coefficients (>= 0) to measured seconds, weighting relative errors equally.

    Raises:
        ValueError: fewer than three measurements, or a time that is not positive.
    """
    from scipy.optimize import nnls

    slots, squares, seconds = (np.asarray(x, dtype=float) for x in (slots, squares, seconds))
    if seconds.size < 3 or (seconds <= 0).any():
        raise ValueError(f"need at least three positive times, got {seconds.tolist()}")
    columns = np.stack([np.ones_like(slots), slots, squares], axis=1) / seconds[:, None]
    scale = columns.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(columns / scale, np.ones_like(seconds))
    return StepCost(*(found / scale).tolist())


# dense bf16 peaks of data sheets, FLOP/s; the first name that occurs in the device's own name counts
PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
         "L40S": 362e12, "RTX 4090": 165e12}  # fmt: skip


def peak_flops(device: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device by its name, or None when it is not in `PEAKS`."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def from_config(config, flops_per_second: float, recompute: bool = False, fixed: float = 0.0,
                attention_flops_per_second: float | None = None) -> StepCost:  # fmt: skip
    """Coefficients from a model's sizes: 6 FLOPs a weight and token, 6 x hidden x layers a token pair (causal half).

    Args:
        config: a Hugging Face config with hidden_size, num_hidden_layers, intermediate_size, vocab_size, heads.
        flops_per_second: achieved speed of one device in linear layers.
        attention_flops_per_second: achieved speed in attention; the same by default (an H100 reached 520e12 and 285e12).
        recompute: gradient checkpointing, which adds a second forward pass (a factor 4/3).
        fixed: seconds a pass whatever its length.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    kv = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim
    wide = config.num_attention_heads * head_dim
    weights = layers * (2 * hidden * wide + 2 * hidden * kv + 3 * hidden * config.intermediate_size)
    weights += hidden * config.vocab_size
    passes = 4 / 3 if recompute else 1.0
    return StepCost(fixed, 6 * weights * passes / flops_per_second,
                    6 * layers * wide * passes / (attention_flops_per_second or flops_per_second))  # fmt: skip


@dataclass(frozen=True)
class Simulation:
    """Result of `simulate`: the whole time, the share of rank-time spent waiting, and a row a pack with start and end."""

    seconds: float
    idle: float
    timeline: pd.DataFrame


def simulate(plan: Plan, world_size: int, cost: StepCost, balance: bool = True) -> Simulation:
    """Time on ``world_size`` ranks that wait for the slowest in every micro-step.

    Args:
        plan: any plan.
        world_size: ranks; divides the plan's packs a step.
        cost: seconds of a pack.
        balance: as in `plan.assign`: False deals packs in the plan's own order, as published code does.

    Returns:
        seconds of the run, idle share in 0..1, and the timeline: step, micro, rank, pack, start, end, until (seconds;
        ``until`` is when the slowest rank of the micro-step is done).
    """
    dealt = assign(plan, world_size, balance, cost=lambda p: cost(p.slots, p.squares))
    key = ["step", "micro"]
    longest = dealt.groupby(key).cost.max()
    ends = longest.cumsum()
    table = dealt.join((ends - longest).rename("start"), on=key).join(ends.rename("until"), on=key)
    table["end"] = table.start + table.cost
    seconds = float(ends.iloc[-1])
    return Simulation(seconds, float(1 - dealt.cost.sum() / (seconds * world_size)), table)


def measure(model, packs: list[list[int]], repeats: int = 1, seed: int = 0, all_targets: bool = False) -> pd.DataFrame:
    """Time forward and backward passes of a model over packs of random tokens, the last quarter of every document targets.

    Args:
        model: a causal model, switched to the packed attention; its gradients are dropped.
        packs: document lengths of each pack to time; a first, untimed pass over the smallest warms up.
        repeats: timed passes a pack; the median is kept.
        all_targets: every token is a target, not the last quarter.

    Returns:
        A row a pack: documents, longest, slots, squares, seconds, peak_gib (CUDA only, else NaN).
    """
    import time

    import torch
    from tqdm.auto import tqdm

    from longalign_lib.train import attention
    from longalign_lib.train.collate import collate
    from longalign_lib.train.loss import target_losses

    model.set_attn_implementation(attention.register())
    rng, device = np.random.default_rng(seed), next(model.parameters()).device
    cuda, rows = device.type == "cuda", []
    for k, lengths in enumerate(tqdm([min(packs, key=sum), *packs], desc="timing packs", leave=False)):
        ids = [rng.integers(10, model.config.vocab_size, n) for n in lengths]
        store = [(x, x if all_targets else np.where(np.arange(len(x)) * 4 >= 3 * len(x), x, -100)) for x in ids]
        lines = pd.DataFrame({"row": range(len(ids)), "length": lengths, "offset": np.cumsum([0, *lengths[:-1]])})
        batch = {name: v.to(device) if hasattr(v, "to") else v for name, v in collate(lines, store).items()}
        seconds = []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(1 if k == 0 else repeats):
            began = time.perf_counter()
            target_losses(model, batch)[0].mean().backward()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
        rows.append({"documents": len(lengths), "longest": max(lengths), "slots": sum(lengths),
                     "squares": float(np.sum(np.square(lengths, dtype=float))), "seconds": float(np.median(seconds)),
                     "peak_gib": peak})  # fmt: skip
    return pd.DataFrame(rows[1:])
