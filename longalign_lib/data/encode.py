"""Samples to encoded rows, each with one fate: what the store, built in memory or from files, is made of.

    kept        as it is
    truncated   cut from the right (the paper's way); the answer stands there, so it may be lost
    left_out    broken, over-long under "drop", or without a target token within max_length; with the reason

Invariants: rows come in the order of the samples; every conversation handed in has one fate. Cost: a chat at a time is
encoded once; the tokenizer gets up to 64 chats or 200,000 characters a call, and no more than that is held.
Shapes: T tokens of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from longalign_lib.data.chat import IGNORE, check_messages, control_ids, encode_chats

OVER_LONG = ("truncate", "drop", "error")
EACH = ("all", "each")
BATCH, BATCH_CHARACTERS = 64, 200_000  # what one call of the tokenizer gets


def encode_rows(
    samples: Iterable[tuple[int, dict]], tokenizer, max_length: int, over_long: str = "truncate", answers: str = "all",
    **template,
) -> Iterator[dict]:  # fmt: skip
    """Encode numbered samples, in order, a few at a time.

    Args:
        samples: (number, sample with "messages") pairs; a sample's other keys go to `meta`.
        tokenizer: with a chat template. template: passed on to it, see `chat.encode_chat`.
        max_length: the longest row in tokens.
        over_long: "truncate" from the right (the paper), "drop", or "error". A question about a long document stands at
            the end of its row, so truncation often takes the whole answer: such a row has no target left and is left out.
        answers: "all" makes a conversation a row with every answer as target; "each" makes a row of each answer with
            what stands before it, for templates that render earlier turns otherwise; `meta` then has its "turn".

    Yields:
        {sample, fate, reason, tokens (before any cut), empty (blank answers), open_end (the last target is no special
        token), control (a text holds a special token such as <|im_end|>, which the tokenizer takes for one),
        input_ids int32[T], mask bool[T], meta}.

    Raises:
        ValueError: an unknown choice, or an over-long row under "error".
    """
    for name, value, accepted in (("over_long", over_long, OVER_LONG), ("answers", answers, EACH)):
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; a row needs 2 tokens to have a target")
    control = dict.fromkeys(control_ids(tokenizer).tolist(), "")
    control |= {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    batch, size = [], 0
    for number, sample in samples:
        batch += [(number, sample, *x) for x in _conversations(sample.get("messages"), answers)]
        size += sum(len(m["content"]) for m in sample.get("messages") or [] if isinstance(m, dict) and isinstance(m.get("content"), str))
        if len(batch) >= BATCH or size >= BATCH_CHARACTERS:
            yield from _encode_batch(batch, tokenizer, max_length, over_long, control, template)
            batch, size = [], 0
    yield from _encode_batch(batch, tokenizer, max_length, over_long, control, template)


def _conversations(messages, answers: str) -> list[tuple]:
    """(messages, which answers are labelled, what goes to meta) of each row that a sample makes."""
    if answers == "each":
        try:
            check_messages(messages)
        except ValueError:
            return [(messages, "all", {})]
        turns = [t for t, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()]
        return [(messages[: t + 1], "last", {"turn": t}) for t in turns] or [(messages, "all", {})]
    return [(messages, "all", {})]


def _encode_batch(batch: list[tuple], tokenizer, max_length: int, over_long: str, control: dict, template: dict) -> Iterator[dict]:
    results = encode_chats(tokenizer, [x[2] for x in batch], [x[3] for x in batch], **template)
    for (number, sample, messages, choice, more), result in zip(batch, results):
        row = {"sample": number, "fate": "kept", "reason": "", "tokens": 0, "empty": 0, "open_end": False, "control": False}
        if isinstance(result, ValueError):
            yield row | {"fate": "left_out", "reason": f"not encoded: {result}"}
            continue
        ids, labels = result
        row["tokens"] = len(ids)
        row["control"] = any(token in m["content"] for m in messages for token in control.values() if token)
        if choice == "all":
            row["empty"] = sum(m["role"] == "assistant" and not m["content"].strip() for m in messages)
        if len(ids) > max_length:
            row |= {"fate": "truncated" if over_long == "truncate" else "left_out", "reason": f"{len(ids)} tokens are more than max_length {max_length}"}
            if over_long == "error":
                raise ValueError(f"sample {number} ({sample.get('document_id', 'no id')}): {row['reason']}; "
                                 'raise max_length, or choose over_long="truncate" or "drop"')  # fmt: skip
        mask = labels[:max_length] != IGNORE
        if row["fate"] != "left_out" and not mask[1:].any():
            row |= {"fate": "left_out", "reason": f"no target token in its first {max_length} tokens ({len(ids)} in all)"}
        if row["fate"] == "kept":
            row["open_end"] = int(ids[np.flatnonzero(mask)[-1]]) not in control
        meta = {k: v for k, v in sample.items() if k != "messages"} | {"row": number} | more
        yield row | {"input_ids": ids[:max_length], "mask": mask, "meta": meta}


def summary(rows: Iterable[dict]) -> dict:
    """Counts over `encode_rows`: samples, conversations, kept, truncated, left_out, tokens, targets, tokens_cut,
    empty_answers (masked), open_ends (rows whose last answer ends with no special token: nothing teaches to stop),
    control_in_text (a message holds a special token, as if it were a turn's end)."""
    names = ("samples", "conversations", "kept", "truncated", "left_out", "tokens", "targets", "tokens_cut", "empty_answers", "open_ends", "control_in_text")
    counts, before = Counter(dict.fromkeys(names, 0)), None
    for r in rows:
        counts.update({"samples": int(r["sample"] != before), "conversations": 1, r["fate"]: 1, "empty_answers": r["empty"],
                       "control_in_text": int(r["control"])})  # fmt: skip
        before = r["sample"]
        if r["fate"] != "left_out":
            n = len(r["input_ids"])
            counts.update(tokens=n, targets=int(np.count_nonzero(r["mask"][1:])), tokens_cut=r["tokens"] - n, open_ends=int(r["open_end"]))
    return dict(counts)
