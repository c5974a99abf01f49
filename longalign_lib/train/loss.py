"""The weighted loss of a stock model: losses at target positions, summed with the weights of `weights`.

All weights of a global step sum to one over its tokens, so losses are simply **summed** over tokens, packs, micro-steps and
ranks: no split can change them.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F

from longalign_lib.train.chunked import CHUNK_BYTES, head_losses, why_not

IGNORE = -100


def sequence_losses(losses: torch.Tensor, sequence: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the token losses of each sequence: ``(L_i float[n], N_i int[n])`` from per-token losses and sequence numbers."""
    total = torch.zeros(n, dtype=losses.dtype, device=losses.device).index_add(0, sequence, losses)
    return total, torch.bincount(sequence, minlength=n)


def target_losses(model, batch: dict, chunk_bytes: int = CHUNK_BYTES,
                  dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Cross entropy at the target positions of a batch, with logits computed only where a target follows, a chunk at a time.

    Labels are unshifted (label t is token t; the prediction for it is made at t - 1), and the first label of every
    document is ``IGNORE``. Nearly all stock models end in a plain linear head: theirs gives losses in place of logits for
    this call (`chunked.head_losses`), and the memory is two chunks. For others (`chunked.why_not` says why) the logits of
    all targets are made at once, ``targets x vocabulary``, by ``logits_to_keep`` where the forward takes it.

    Args:
        model: a causal language model, also one wrapped by DDP or DeepSpeed.
        batch: what `collate` makes; keys besides ``labels`` and ``loss_weights`` go to the model.
        chunk_bytes: most bytes of one float32 copy of a chunk's logits.
        dtype: type of the losses; None is float64 for a float64 model, float32 for any other.

    Returns:
        losses float[N], row int64[N] and position int64[N] of the label in ``labels[B, T]``. N >= 1: a batch without
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
    if why_not(model) is None:
        losses = head_losses(model, inputs, row, position, wanted, chunk_bytes)
        return losses.to(dtype or losses.dtype), row, label_position
    if takes_logits_to_keep(model):
        keep = torch.unique(position)  # one set of columns for all rows of a padded batch
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
        logits = logits[row, torch.searchsorted(keep, position)]
    else:
        logits = model(**inputs, use_cache=False).logits[row, position]
    logits = logits.to(dtype or torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, wanted, reduction="none"), row, label_position


def takes_logits_to_keep(model) -> bool:
    """Whether the model (also one wrapped by DDP or DeepSpeed) can compute logits for chosen positions only."""
    inner = model
    while hasattr(inner, "module"):
        inner = inner.module
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
