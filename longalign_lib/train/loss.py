"""Loss weights of packed sequences, and the weighted loss of a stock model.

Letters of the paper: M sequences in K packs of one global batch; L_i is the summed loss of the N_i target tokens of sequence i.

    Eq. 2, wanted            L  = 1/M sum_i L_i / N_i
    Eq. 3, plain packing     L' = 1/K sum_k ( sum_{i in k} L_i / sum_{i in k} N_i )
    Eq. 4, the repair        scale sequence i by K / (N_i M), sum in each pack, average over packs: then L' = L

One exponent p covers the family: a target token of sequence i weighs ``N_i^-p / sum_j N_j^(1-p)``, j over the global batch.
p = 1 is Eq. 2 = Eq. 4 (every sequence counts the same), p = 0 the token mean, 1/2 lies between. All weights of a step sum
to one over its tokens, so losses are simply **summed** over tokens, packs, micro-steps and ranks: no split can change them.
"""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

IGNORE = -100


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
    """Eq. 3 in the same form, for comparison: 1 / (K x target tokens of the sequence's own pack)."""
    frame = pd.DataFrame({"targets": np.asarray(targets, float), "step": step, "pack": pack})
    of_pack = frame.groupby("pack").targets.transform("sum").to_numpy()
    alive = frame[of_pack > 0].groupby("step").pack.nunique()
    k = frame.step.map(alive).fillna(1).to_numpy()
    return np.where(frame.targets > 0, 1 / (k * np.where(of_pack > 0, of_pack, 1)), 0.0)


def sequence_losses(losses: torch.Tensor, sequence: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the token losses of each sequence: ``(L_i float[n], N_i int[n])`` from per-token losses and sequence numbers."""
    total = torch.zeros(n, dtype=losses.dtype, device=losses.device).index_add(0, sequence, losses)
    return total, torch.bincount(sequence, minlength=n)


def target_losses(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy at the target positions of a batch, with logits computed only where a target follows.

    Labels are unshifted (label t is token t; the prediction for it is made at t - 1), and the first label of every
    document is ``IGNORE``. Models whose forward takes ``logits_to_keep`` (every recent causal model) compute no other
    logits, so the memory is ``targets x vocabulary``, not ``tokens x vocabulary``.

    Args:
        model: a causal language model.
        batch: what `collate` makes; keys besides ``labels`` and ``loss_weights`` go to the model.

    Returns:
        losses float32[N], row int64[N] and position int64[N] of the label in ``labels[B, T]``. N >= 1: a batch without
        targets gives one entry with position 0, whose weight is 0, so that every rank still runs the model.
    """
    labels_BT = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "loss_weights", "inverse_targets")}
    row, position = torch.nonzero(labels_BT[:, 1:] != IGNORE, as_tuple=True)
    if row.numel() == 0:
        row, position = (torch.zeros(1, dtype=torch.long, device=labels_BT.device) for _ in range(2))
        wanted, label_position = labels_BT.new_zeros(1), position
    else:
        wanted, label_position = labels_BT[row, position + 1], position + 1
    if takes_logits_to_keep(model):
        keep = torch.unique(position)  # one set of columns for all rows of a padded batch
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
        logits = logits[row, torch.searchsorted(keep, position)]
    else:
        logits = model(**inputs, use_cache=False).logits[row, position]
    return F.cross_entropy(logits.float(), wanted, reduction="none"), row, label_position


def takes_logits_to_keep(model) -> bool:
    """Whether the model (also one wrapped by DDP or DeepSpeed) can compute logits for chosen positions only."""
    inner = model
    while hasattr(inner, "module"):
        inner = inner.module
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
