"""What becomes of rows that do not fit: cut, split, left out, or an error; every one with its fate on record.

`fit_rows` turns the lengths of the data into *pieces*, which `plan.build_plan` takes. A piece is a stretch of one row, and
almost always the whole row. A row over the capacity is

    truncate   cut on the right, as the paper says (its script drops it); the answer stands there, so it may be lost
    split      several pieces of ``capacity`` tokens and a rest; each is a sequence of its own for attention and loss
    drop       left out
    error      refused

Invariant: for every row, tokens in pieces + tokens lost on record = its tokens (`audit.audit` proves it). Cost: O(n).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from longalign_lib.train.packing import whole_lengths, whole_number

OVER_LONG = ("truncate", "split", "drop", "error")


def fit_rows(
    lengths, capacity: int, over_long: str = "truncate", targets_of: Callable | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cut the data into pieces of at most ``capacity`` tokens.

    Args:
        lengths: int[n], tokens of every row.
        capacity: tokens a piece holds at most.
        over_long: "truncate", "split", "drop" or "error" (see the module's head).
        targets_of: ``(rows, starts, lengths) -> int[m]``, target tokens of each piece that the loss will see, its first
            token never counted (`TokenStore.count_targets`). Pieces without any are then left out: training on them costs
            time and changes nothing. Without it all tokens but the first are targets.

    Returns:
        pieces: a row a piece, columns row, start (first token of the row that it holds), length, targets.
        fates: a row for each event: row, length (of the whole row), fate ("truncated", "split", "dropped", "empty",
            "no target"), tokens_lost.

    Raises:
        ValueError: an unknown choice, lengths or a capacity that are no counts, or "error" and a row is too long (it is named).

    Example:
        >>> fit_rows([5, 25, 0], 10, "split")[0].to_numpy().tolist()
        [[0, 0, 5, 4], [1, 0, 10, 9], [1, 10, 10, 9], [1, 20, 5, 4]]
    """
    lengths, capacity = whole_lengths(lengths), whole_number("capacity", capacity)
    if over_long not in OVER_LONG:
        raise ValueError(f"over_long {over_long!r} is not one of {', '.join(OVER_LONG)}")
    long = np.flatnonzero(lengths > capacity)
    if over_long == "error" and long.size:
        row = int(long[0])
        raise ValueError(
            f"row {row} has {int(lengths[row])} tokens and the capacity is {capacity} ({long.size} such rows): "
            "raise the capacity, or choose over_long='truncate', 'split' or 'drop'"
        )
    parts = np.minimum(lengths, 1)
    if over_long == "split":
        parts = -(-lengths // capacity)
    elif over_long == "drop":
        parts[long] = 0
    rows = np.repeat(np.arange(lengths.size), parts)
    starts = (np.arange(rows.size) - np.repeat(np.cumsum(parts) - parts, parts)) * capacity
    held = np.minimum(lengths[rows] - starts, capacity)
    empty = np.flatnonzero(lengths == 0)
    lost = {"truncate": lengths[long] - capacity, "split": 0, "drop": lengths[long], "error": 0}[over_long]
    past = {"truncate": "truncated", "split": "split", "drop": "dropped", "error": ""}[over_long]
    fates = [pd.DataFrame({"row": long, "length": lengths[long], "fate": past, "tokens_lost": lost}),
             pd.DataFrame({"row": empty, "length": 0, "fate": "empty", "tokens_lost": 0})]  # fmt: skip
    pieces = pd.DataFrame({"row": rows, "start": starts, "length": held, "targets": held - 1})
    if targets_of is not None:
        pieces["targets"] = np.asarray(targets_of(rows, starts, held), dtype=np.int64)
        gone = pieces[pieces.targets == 0]
        fates.append(pd.DataFrame({"row": gone.row, "length": lengths[gone.row], "fate": "no target", "tokens_lost": gone.length}))
        pieces = pieces[pieces.targets > 0].reset_index(drop=True)
    fates = pd.concat([f for f in fates if len(f)] or fates[:1], ignore_index=True)
    return pieces, fates.sort_values("row", kind="stable", ignore_index=True)
