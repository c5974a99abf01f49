"""What a model is paid for instructions: tokens counted, prices given, money.

Self-Instruct asks twice about a document: for five questions, then for the answer to one of them. Both calls read the whole
document, so reading is nearly all of the bill:

    prompt tokens      2 x (document and question) + what the first call asks
    completion tokens  answer + five questions

Both begin with the same words: endpoints that keep prefixes charge less than this. Prices are per million tokens, as they
state them. Cost: arithmetic on counted tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

MILLION = 1_000_000
COLUMNS = ["prompt_tokens", "completion_tokens"]


def cost_of(counts, price_in: float, price_out: float) -> dict:
    """The price of calls.

    Args:
        counts: (prompt, completion) pairs; or dicts with prompt_tokens and completion_tokens, such as replies or built samples
            that carry them; or one such dict (a client's usage); or a frame with these columns.
        price_in, price_out: per million prompt and completion tokens.

    Returns:
        {"prompt_tokens", "completion_tokens", "cost"}.

    Raises:
        ValueError: a negative price or count, or counts without these keys.

    Example:
        >>> cost_of([(30_000, 400), (30_000, 200)], 1.0, 4.0)
        {'prompt_tokens': 60000, 'completion_tokens': 600, 'cost': 0.0624}
    """
    if not (price_in >= 0 and price_out >= 0):
        raise ValueError(f"prices are {price_in} and {price_out} per million tokens; both must be 0 or more")
    table = _frame(counts)
    prompt, completion = (int(table[c].sum()) for c in COLUMNS)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "cost": round((prompt * price_in + completion * price_out) / MILLION, 10)}


def self_instruct_calls(lengths, targets, asking: int = 150, question: int = 25) -> pd.DataFrame:
    """Tokens of the calls that samples of these sizes take, a row a sample.

    Args:
        lengths, targets: int[n], tokens of each encoded sample and of its answer (`TokenStore.lengths`, `.targets`).
        asking: tokens of what the first call asks, beyond the document.
        question: tokens of one of the five questions.

    Returns:
        a frame with prompt_tokens and completion_tokens.
    """
    lengths, targets = np.asarray(lengths, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    if (targets > lengths).any() or (targets < 0).any():
        raise ValueError("targets must lie between 0 and the lengths")
    read = lengths - targets
    return pd.DataFrame({"prompt_tokens": 2 * read + asking - question, "completion_tokens": targets + 5 * question})


def price_table(calls, prices: Mapping[str, tuple[float, float]], samples: int = 10_000, accepted: float = 1.0) -> pd.DataFrame:
    """What ``samples`` samples cost at several prices.

    Args:
        calls: as ``counts`` of `cost_of`, one entry a sample; its mean is taken for every sample.
        prices: name -> (price_in, price_out), per million tokens.
        samples: how many are to be had.
        accepted: the share of built samples that the gates let through; the others are paid as well.

    Returns:
        a row a price: name, price_in, price_out, samples, prompt_tokens, completion_tokens, cost, cost_per_sample.
    """
    table = _frame(calls)
    if not len(table) or not 0 < accepted <= 1:
        raise ValueError(f"{len(table)} calls and accepted {accepted}: give at least one, and a share above 0 up to 1")
    total = pd.DataFrame([table.mean() * samples / accepted]).round().astype(np.int64)
    lines = [{"name": name, "price_in": a, "price_out": b, "samples": samples, **cost_of(total, a, b)} for name, (a, b) in prices.items()]
    frame = pd.DataFrame(lines)
    frame["cost_per_sample"] = frame.cost / samples
    return frame


def _frame(counts) -> pd.DataFrame:
    if isinstance(counts, Mapping):
        counts = [counts]
    if not isinstance(counts, pd.DataFrame):
        counts = list(counts) if isinstance(counts, Iterable) else counts
        counts = pd.DataFrame(counts, columns=None if counts and isinstance(counts[0], Mapping) else COLUMNS)
    missing = [c for c in COLUMNS if c not in counts]
    if missing:
        raise ValueError(f"counts lack {', '.join(missing)}; they have {list(counts.columns)}")
    if (counts[COLUMNS] < 0).to_numpy().any():
        raise ValueError("counts of tokens must be 0 or more")
    return counts[COLUMNS]
