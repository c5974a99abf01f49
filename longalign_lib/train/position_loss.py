"""How well a model predicts the next token, position by position.

A model that reads past its window breaks where the window ends: the mean loss over a whole text hides that, the
loss by position shows it. One forward pass through `loss.target_losses`, which makes the logits of `chunk` positions at a
time (at 64k tokens and V = 49,152: 50 MB a copy instead of 13 GB), with whatever the model does to them after its head.

Invariants: the result does not depend on `chunk`; position 0 has no loss, as nothing comes before it.
Cost: one forward pass without a cache, attention quadratic in T.
Shape legend: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch

from longalign_lib.train.loss import IGNORE, target_losses


@torch.no_grad()
def token_losses(model, token_ids, chunk: int = 256) -> np.ndarray:
    """-ln p(token t | tokens before t) of one text.

    Args:
        model: a causal LM of transformers; its mode is used as it is (eval mode has no dropout).
        token_ids: [T] ids, T >= 2.
        chunk: positions whose logits are held at once; all at once for models whose head `chunked.why_not` names.

    Returns:
        float32 [T] in nats; entry 0 is nan. Computed in float32 from the model's logits.

    Raises:
        ValueError: fewer than two tokens, an id outside the vocabulary, a chunk below 1.
    """
    ids = torch.as_tensor(np.asarray(token_ids), dtype=torch.long, device=model.device)
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"token_ids of shape {tuple(ids.shape)}: give one text of at least 2 tokens, shape [T]")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: at least 1")
    config = model.config.get_text_config()
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"token id {int(ids.max() if ids.min() >= 0 else ids.min())} is outside the vocabulary "
            f"(0..{config.vocab_size - 1}): was the text encoded by this model's tokenizer?"
        )
    labels = ids[None].clone()
    labels[:, 0] = IGNORE
    losses, _, position = target_losses(model, {"input_ids": ids[None], "labels": labels}, chunk_bytes=4 * chunk * config.vocab_size)
    out = torch.full((len(ids),), math.nan, dtype=torch.float32)
    out[position.cpu()] = losses.float().cpu()
    return out.numpy()


def by_position(values, bucket: int) -> pd.DataFrame:
    """Mean of per-token values in buckets of positions; nan entries (position 0) are left out.

    Args:
        values: [T] numbers by position: losses, or differences of two models' losses on the same text.
        bucket: positions a bucket; the last one may be shorter.

    Returns:
        A row a bucket: start, end (exclusive), tokens, mean, se. `se` is sd / sqrt(tokens), as if tokens were
        independent; neighbours in a text are not, so read it as a lower bound. nan for a single token.

    Raises:
        ValueError: a bucket below 1 or values that are not one row.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or bucket < 1:
        raise ValueError(f"values of shape {values.shape}, bucket={bucket}: give [T] values and a bucket of at least 1")
    rows = []
    for start in range(0, len(values), bucket):
        part = values[start : start + bucket]
        part = part[~np.isnan(part)]
        n = len(part)
        rows.append(
            {
                "start": start,
                "end": min(start + bucket, len(values)),
                "tokens": n,
                "mean": part.mean() if n else math.nan,
                "se": part.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan,
            }
        )
    return pd.DataFrame(rows)


def loss_by_position(model, token_ids, bucket: int = 512, chunk: int = 256) -> pd.DataFrame:
    """Mean next-token loss of one text by position bucket: `by_position(token_losses(model, ids), bucket)`.

    Args:
        model, token_ids, chunk: as for `token_losses`.
        bucket: positions a bucket.

    Returns:
        Columns start, end, tokens, mean (nats a token), se.
    """
    return by_position(token_losses(model, token_ids, chunk), bucket)
