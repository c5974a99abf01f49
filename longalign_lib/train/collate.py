"""One pack of the plan as tensors for a stock Hugging Face model.

A packed pack is one line: B = 1, T = tokens, documents end to end, positions restarting at 0, ``cu_seq_lens`` marking the
borders (S + 1 numbers, the first 0, the last T). A padded pack is B rows of T = the longest, padded on the right, where
causal attention never looks from a real token at padding, so it needs no mask.

Invariants: the first label of every document is -100, so no document is asked to predict the next one's start; weights are 0
wherever labels are -100; nothing is shifted here.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from longalign_lib.train.loss import IGNORE


def collate(rows: pd.DataFrame, store, weights=None, *, padded: bool = False, pad_id: int = 0) -> dict:
    """Tensors of one pack.

    Args:
        rows: the plan's lines of one pack (offset, row, length, and start where rows were split).
        store: anything indexed by row that gives ``(input_ids, labels)``, int arrays of at least ``length`` tokens.
        weights: float[len(rows)], weight of a target token of each row (see `weights.token_weights`); 1 by default.
        padded: whether the pack is rows padded to the longest (naive, sorted plans).
        pad_id: filler token of padded packs.

    Returns:
        input_ids, position_ids, labels int64[B, T]; loss_weights, inverse_targets float64[B, T]; for packed packs also
        cu_seq_lens_q, cu_seq_lens_k int32[S + 1] and max_length_q, max_length_k.

    Raises:
        ValueError: a row of the store is shorter than the plan says, or has other targets (the plan belongs to other data, or was
            built without them); labels of another length than the ids; a negative id, or a negative label but -100.
    """
    order = np.argsort(rows.offset.to_numpy(), kind="stable")
    weights = (np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=float))[order]
    rows = rows.iloc[order]
    lengths = rows.length.to_numpy()
    width = int(lengths.max()) if padded else int(lengths.sum())
    size = width * len(rows) if padded else width
    starts = np.arange(len(rows)) * width if padded else np.concatenate([[0], np.cumsum(lengths)[:-1]])
    ids, positions = np.full(size, pad_id, dtype=np.int64), np.zeros(size, dtype=np.int64)
    labels = np.full(size, IGNORE, dtype=np.int64)
    loss_weights, inverse = np.zeros(size), np.zeros(size)  # float64: exact for float64 models
    firsts = rows.start.to_numpy() if "start" in rows else np.zeros(len(rows), dtype=np.int64)
    planned = rows.targets.to_numpy() if "targets" in rows else [None] * len(rows)
    for start, row, first, length, weight, due in zip(starts, rows.row, firsts, lengths, weights, planned, strict=True):
        row_ids, row_labels = store[int(row)]
        if len(row_labels) != len(row_ids):
            raise ValueError(f"row {row} has {len(row_ids)} ids and {len(row_labels)} labels: give one label a token")
        row_ids, row_labels = row_ids[first : first + length], row_labels[first : first + length]
        if len(row_ids) < length:
            raise ValueError(f"row {row} has {first + len(row_ids)} tokens, the plan says {first + length}: they belong to other data")
        here = slice(start, start + length)
        ids[here], labels[here], positions[here] = row_ids, row_labels, np.arange(length)
        labels[start] = IGNORE
        target = labels[here] != IGNORE
        if due is not None and int(target.sum()) != due:
            raise ValueError(f"row {row} has {int(target.sum())} targets, the plan says {due}: weights would be wrong; "
                             "build the plan with the targets of this data (store.targets)")  # fmt: skip
        loss_weights[here], inverse[here] = weight * target, target / max(int(target.sum()), 1)
    odd = np.flatnonzero((ids < 0) | ((labels < 0) & (labels != IGNORE)))
    if odd.size:
        raise ValueError(f"token {odd[0]} of the pack has id {ids[odd[0]]} and label {labels[odd[0]]}: ids are 0 or more, and so are "
                         f"labels, but for {IGNORE} where the loss does not look")  # fmt: skip
    shape = (len(rows), width) if padded else (1, width)
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "loss_weights": loss_weights,
             "inverse_targets": inverse}  # fmt: skip
    batch = {k: torch.from_numpy(v).reshape(shape) for k, v in batch.items()}
    if padded:  # padding columns continue counting, as a stock model would by itself
        batch["position_ids"] = torch.arange(width).expand(shape).clone()
    else:
        borders = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        batch |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders,
                  "max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}  # fmt: skip
    return batch


def empty_pack(pad_id: int = 0, padded: bool = False) -> dict:
    """A pack of two tokens and no target: what a rank runs when a short last step has no pack for it."""
    rows = pd.DataFrame({"offset": [0], "row": [0], "length": [2]})
    nothing = (np.full(2, pad_id), np.full(2, IGNORE))
    return collate(rows, {0: nothing}, [0.0], padded=padded, pad_id=pad_id)
