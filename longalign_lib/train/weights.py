"""Loss weights of packed sequences: what one target token of each sequence weighs. NumPy only, copyable.

Letters of the paper: M sequences in K packs of one global batch; L_i is the summed loss of the N_i target tokens of sequence i.

    Eq. 2, wanted            L  = 1/M sum_i L_i / N_i
    Eq. 3, plain packing     L' = 1/K sum_k ( sum_{i in k} L_i / sum_{i in k} N_i )
    Eq. 4, the repair        scale sequence i by K / (N_i M), sum in each pack, average over packs: then L' = L

One exponent p covers the family: a target token of sequence i weighs ``N_i^-p / sum_j N_j^(1-p)``, j over the global batch.
p = 1 is Eq. 2 = Eq. 4 (every sequence counts the same), p = 0 the token mean, 1/2 lies between. All weights of a step sum
to one over its tokens, so losses are summed, and no split into packs, micro-steps or ranks can change a gradient.
"""

from __future__ import annotations

import numpy as np


def token_weights(targets, step, p: float = 1.0, denominator: str = "step") -> np.ndarray:
    """Weight of one target token of each sequence.

    Args:
        targets: int[n], target tokens N_i of each sequence.
        step: int[n], the global step that each sequence is in.
        p: exponent; 1 is Eq. 4 of LongAlign, 0 the token mean.
        denominator: "step" divides by the step's own sum (Eq. 4); "epoch" by the mean over steps, so that a sequence
            weighs the same in whatever step it sits, while steps no longer all sum to one.

    Returns:
        float64[n]; 0 for a sequence without targets.

    Example:
        >>> token_weights([1, 4], [0, 0], p=1).tolist()
        [0.5, 0.125]
    """
    targets, step = np.asarray(targets, dtype=float), np.asarray(step)
    if denominator not in ("step", "epoch"):
        raise ValueError(f"denominator {denominator!r} is not 'step' or 'epoch'")
    if targets.shape != step.shape or (targets < 0).any():
        raise ValueError(f"targets {targets.shape} and step {step.shape} need one entry a sequence, targets >= 0")
    has = targets > 0
    safe = np.where(has, targets, 1.0)
    _, index = np.unique(step, return_inverse=True)
    sums = np.bincount(index, weights=np.where(has, safe ** (1 - p), 0.0))
    mean = sums.mean() or 1.0
    sums = np.where(sums > 0, sums, 1.0)  # a step without any target has weight nowhere
    total = sums[index] if denominator == "step" else mean
    return np.where(has, safe**-p / total, 0.0)


def pack_mean_weights(targets, step, pack) -> np.ndarray:
    """Eq. 3 in the same form, for comparison: 1 / (K x target tokens of the sequence's own pack).

    Args:
        targets, step, pack: int[n] each, a sequence an entry. Packs without any target do not count in K.

    Returns:
        float64[n], weight of one target token of each sequence; 0 for a sequence without targets.
    """
    targets = np.asarray(targets, dtype=float)
    _, first, of_pack = np.unique(np.asarray(pack), return_index=True, return_inverse=True)
    _, of_step = np.unique(np.asarray(step), return_inverse=True)
    total = np.bincount(of_pack, weights=targets)  # target tokens of every pack
    k = np.bincount(of_step[first], weights=total > 0)  # packs with a target, of every step
    return np.where(targets > 0, 1 / (np.maximum(k[of_step], 1) * np.maximum(total[of_pack], 1)), 0.0)


def plan_weights(plan, exponent: float | None = 1.0, denominator: str = "step") -> np.ndarray:
    """Token weight of every line of a plan's table, float64[lines]: the one place where a plan meets the loss.

    Args:
        plan: a `plan.Plan`, or anything with a ``table`` of columns targets, step and pack.
        exponent: p of `token_weights`; None is plain packing's mean (`pack_mean_weights`).
        denominator: see `token_weights`.
    """
    t = plan.table
    if exponent is None:
        return pack_mean_weights(t.targets, t.step, t.pack)
    return token_weights(t.targets, t.step, exponent, denominator)
