"""Loss on held-out rows, one document at a time: the number that compares models whatever way they were trained."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from longalign_lib.train.collate import collate
from longalign_lib.train.loss import target_losses


@torch.no_grad()
def held_out_loss(model, store, rows=None, progress: bool = False) -> pd.DataFrame:
    """Loss of each row.

    Args:
        model: a causal language model in eval mode.
        store: row -> (input_ids, labels).
        rows: which rows; all by default. Rows without a target are left out (they have no loss).
        progress: show a progress bar.

    Returns:
        A row a sequence: row, tokens, targets, loss (mean over its target tokens, nats). The token mean is
        ``(loss * targets).sum() / targets.sum()``, the sequence mean ``loss.mean()``.
    """
    out = []
    device = next(model.parameters()).device
    for row in tqdm(range(len(store)) if rows is None else rows, disable=not progress, desc="held-out loss"):
        ids, labels = store[int(row)]
        if not (np.asarray(labels)[1:] >= 0).any():
            continue
        line = pd.DataFrame({"offset": [0], "row": [int(row)], "length": [len(ids)]})
        batch = collate(line, store, padded=True)
        losses, _, _ = target_losses(model, {k: v.to(device) for k, v in batch.items()})
        out.append({"row": int(row), "tokens": len(ids), "targets": losses.numel(), "loss": float(losses.mean())})
    return pd.DataFrame(out, columns=["row", "tokens", "targets", "loss"])


def means(table: pd.DataFrame) -> dict:
    """Token mean and sequence mean of `held_out_loss`'s frame, and its standard error over sequences."""
    if table.empty:
        raise ValueError("no held-out row has a target token")
    return {"token_mean": float((table.loss * table.targets).sum() / table.targets.sum()),
            "sequence_mean": float(table.loss.mean()),
            "standard_error": float(table.loss.std(ddof=1) / np.sqrt(len(table))) if len(table) > 1 else float("nan"),
            "sequences": len(table)}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """``python -m longalign_lib.train.heldout --model FOLDER --data STORE --out FILE.csv``: score one model in its own process."""
    import argparse
    import json

    from longalign_lib.data.tokens import TokenStore
    from longalign_lib.models import load_model

    parser = argparse.ArgumentParser(description="Loss of every row of a token store.")
    parser.add_argument("--model", default="default", help="'default', a model folder or a Hub id")
    parser.add_argument("--data", required=True, help="folder of a token store")
    parser.add_argument("--out", required=True, help="CSV file to write")
    args = parser.parse_args(argv)
    store = TokenStore.load(args.data)
    table = held_out_loss(load_model(args.model), store, progress=True)
    table["task"] = [store.meta[r].get("task", "") for r in table.row]
    table.to_csv(args.out, index=False)
    print(json.dumps(means(table)))


if __name__ == "__main__":
    main()
