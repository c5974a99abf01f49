"""The weighted loss of a stock model: losses at target positions, summed with the weights of `weights`.

All weights of a global step sum to one over its tokens, so losses are simply **summed** over tokens, packs, micro-steps and
ranks: no split can change them.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F

IGNORE = -100


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
