"""Chats to tokens: input ids, labels on the assistant's turns alone, and a ragged store of many such rows.

Labels. A conversation is rendered by the tokenizer's own chat template. An assistant turn is what the rendering up to
and including the turn has beyond the rendering of the turns before it followed by the generation prompt (prefix
difference, on characters); a token is a target when it lies wholly inside such a span. The turn's end token
(`<|im_end|>`) is a target, as the model must learn to stop; white space that the template puts behind it is not. Where
the template marks assistant turns itself (`{% generation %}`), both ways are compared and a disagreement is an error.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    -100 ............................................ -100 Hello ! <|im_end|> -100

Invariants: labels are UNSHIFTED (labels[t] is input_ids[t] or -100; the loss shifts); token id 0 is an ordinary token;
rows are stored without padding, back to back; every sample handed in has one fate in the report.
Cost: 5 bytes a token on disk and in memory (int32 id, one bool), read through a memory map.

Shapes: T tokens of a row; n rows; N tokens of all rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

IGNORE = -100
OVER_LONG = ("truncate", "drop", "error")
ROLES = ("system", "user", "assistant")


def check_messages(messages: Sequence[dict]) -> None:
    """Raise ValueError unless this is a conversation: known roles, text contents, a user turn first, an answer."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{role, content}}, got {type(messages).__name__}")
    for position, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise ValueError(f"message {position} has role {role!r}; accepted: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {position} ({role}) has content of type {type(content).__name__}; give a string")
    roles = [m["role"] for m in messages if m["role"] != "system"]
    if not roles or roles[0] != "user":
        raise ValueError("the first turn after the system message must be the user's; drop what stands before it")
    if "assistant" not in roles:
        raise ValueError("the conversation has no assistant turn, so there is nothing to learn from it")


def encode_chat(tokenizer, messages: Sequence[dict], max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Render one conversation with the tokenizer's chat template and label the assistant's tokens.

    Args:
        tokenizer: with a chat template.
        messages: turns {"role": system|user|assistant, "content": text}; assistant turns without text are masked.
        max_length: cut from the right beyond this many tokens (the paper's way); None keeps all.

    Returns:
        (input_ids int32[T], labels int32[T]); labels[t] == input_ids[t] on target tokens, -100 elsewhere.

    Raises:
        ValueError: a broken conversation, a tokenizer without a chat template, or a template whose assistant turns
            cannot be told apart.
    """
    check_messages(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{getattr(tokenizer, 'name_or_path', 'the tokenizer')!r} has no chat template; use an instruction-tuned "
            "model's tokenizer or set tokenizer.chat_template"
        )
    messages = list(messages)
    text = _render(tokenizer, messages)
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    else:  # a tokenizer without offsets: count the tokens of prefixes instead of characters
        ids, offsets = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32), None
    target = np.zeros(len(ids), dtype=bool)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        before = _render(tokenizer, messages[:turn], add_generation_prompt=True)
        after = _render(tokenizer, messages[: turn + 1])
        if not (text.startswith(before) and text.startswith(after.rstrip()) and len(after) > len(before)):
            raise ValueError(
                f"the chat template renders turn {turn} differently once later turns follow, so its tokens cannot be "
                "told apart by prefix; use a template that only appends (for reasoning models: one that keeps the "
                "reasoning of earlier turns), or give one conversation for each answer"
            )
        if offsets is not None:
            first = int(np.searchsorted(offsets[:, 0], len(before), side="left"))
            last = int(np.searchsorted(offsets[:, 1], len(after), side="right"))
        else:
            first, last = (len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after))
        target[first : _turn_end(tokenizer, ids, first, last)] = True
    _compare_with_template(tokenizer, messages, ids, target)
    labels = np.where(target, ids, np.int32(IGNORE)).astype(np.int32)
    return ids[:max_length], labels[:max_length]


def _render(tokenizer, messages: list[dict], **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _turn_end(tokenizer, ids: np.ndarray, first: int, last: int) -> int:
    """One past the turn's last special token; `last` when the template closes turns with none."""
    special = np.flatnonzero(np.isin(ids[first:last], tokenizer.all_special_ids))
    return first + int(special[-1]) + 1 if len(special) else last


def _compare_with_template(tokenizer, messages: list[dict], ids: np.ndarray, target: np.ndarray) -> None:
    """Where the template marks assistant turns, both ways must agree up to special tokens, white space and empties."""
    if "{% generation %}" not in tokenizer.chat_template and "{%- generation" not in tokenizer.chat_template:
        return
    encoded = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    mask = np.asarray(encoded["assistant_masks"], dtype=bool)
    if len(mask) != len(ids):
        raise ValueError(f"the chat template gives {len(mask)} tokens with its assistant mask and {len(ids)} without")
    differ = np.flatnonzero(mask != target)
    special = set(tokenizer.all_special_ids)
    wrong = [int(t) for t in differ if ids[t] not in special and tokenizer.decode([int(ids[t])]).strip()]
    if wrong:
        t = wrong[0]
        raise ValueError(
            f"the chat template's own assistant mask and the prefix difference disagree on {len(wrong)} tokens, first "
            f"at position {t} ({tokenizer.decode([int(ids[t])])!r}: mask {bool(mask[t])}, prefix {bool(target[t])}); "
            "mend the template's generation block"
        )


@dataclass(frozen=True)
class TokenStore:
    """n encoded conversations of any length, back to back.

    Attributes:
        input_ids: int32[N], all rows one behind the other.
        labels_mask: bool[N], True on target tokens.
        starts: int64[n + 1]; row i is input_ids[starts[i]:starts[i + 1]].
        meta: n dicts: the sample without its messages, plus "row" (its place in what was handed in).
    """

    input_ids: np.ndarray
    labels_mask: np.ndarray
    starts: np.ndarray
    meta: list[dict]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64[n]."""
        return np.diff(self.starts)

    @property
    def targets(self) -> np.ndarray:
        """N_i, the target tokens of each row that the loss will see (position 0 is never predicted), int64[n]."""
        mask = np.array(self.labels_mask, dtype=bool)
        mask[self.starts[:-1]] = False
        return np.diff(np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])[self.starts])

    def count_targets(self, rows, starts, lengths) -> np.ndarray:
        """Target tokens that the loss sees in stretches of rows, the first token of a stretch not counted.

        Args:
            rows, starts, lengths: int[m] each; stretch k is tokens starts[k] .. starts[k] + lengths[k] of row rows[k].
        """
        before = np.concatenate([[0], np.cumsum(self.labels_mask, dtype=np.int64)])
        first = self.starts[:-1][np.asarray(rows)] + np.asarray(starts)
        return before[first + np.asarray(lengths)] - before[np.minimum(first + 1, first + np.asarray(lengths))]

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Row i as (input_ids int32[T], labels int32[T], -100 off the target tokens)."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of a store of {len(self)} rows")
        i %= len(self)
        span = slice(int(self.starts[i]), int(self.starts[i + 1]))
        ids = np.array(self.input_ids[span])
        return ids, np.where(self.labels_mask[span], ids, np.int32(IGNORE)).astype(np.int32)

    @staticmethod
    def build(
        samples: Iterable[dict], tokenizer, max_length: int, over_long: str = "truncate", progress: bool = True
    ) -> tuple[TokenStore, dict]:
        """Encode samples; nothing is lost without a line in the report.

        Args:
            samples: dicts with "messages"; other keys go to `meta`.
            tokenizer: with a chat template.
            max_length: the longest row in tokens.
            over_long: "truncate" from the right (the paper), "drop", or "error". A question about a long document
                stands at the end of its row, so truncation often takes the whole answer: such a row has no target
                left and is left out, with that reason.
            progress: show a bar when it takes longer than two seconds.

        Returns:
            (store, report). report: counts "samples", "kept", "truncated", "left_out", "tokens_cut",
            "empty_answers", and "rows": one dict for each sample {row, fate: kept|truncated|left_out, tokens, reason}.

        Raises:
            ValueError: an unknown over_long, an over-long row under "error", or no row kept at all.
        """
        if over_long not in OVER_LONG:
            raise ValueError(f"over_long is {over_long!r}; accepted: {', '.join(OVER_LONG)}")
        pieces, masks, meta, rows = [], [], [], []
        empty = cut = 0
        for row, sample in enumerate(tqdm(samples, desc="encode", leave=False, delay=2, disable=not progress)):
            fate, reason, ids = "kept", "", np.empty(0, np.int32)
            try:
                ids, labels = encode_chat(tokenizer, sample.get("messages"))
            except ValueError as error:
                fate, reason = "left_out", f"not encoded: {error}"
            else:
                empty += sum(m["role"] == "assistant" and not m["content"].strip() for m in sample["messages"])
                if len(ids) > max_length:
                    reason = f"{len(ids)} tokens are more than max_length {max_length}"
                    if over_long == "error":
                        raise ValueError(
                            f"sample {row} ({sample.get('document_id', 'no id')}): {reason}; "
                            'raise max_length, or choose over_long="truncate" or "drop"'
                        )
                    fate = "truncated" if over_long == "truncate" else "left_out"
                if fate != "left_out" and not (labels[1:max_length] != IGNORE).any():
                    fate, reason = "left_out", f"no target token in its first {max_length} tokens ({len(ids)} in all)"
            rows.append({"row": row, "fate": fate, "tokens": len(ids), "reason": reason})
            if fate != "left_out":
                cut += max(0, len(ids) - max_length)
                pieces.append(ids[:max_length])
                masks.append(labels[:max_length] != IGNORE)
                meta.append({k: v for k, v in sample.items() if k != "messages"} | {"row": row})
        if rows and not pieces:
            raise ValueError(f"none of {len(rows)} samples could be used; the first: {rows[0]['reason']}")
        fates = Counter(r["fate"] for r in rows)
        report = {"samples": len(rows), **{f: fates[f] for f in ("kept", "truncated", "left_out")}}
        report |= {"tokens_cut": cut, "empty_answers": empty, "max_length": max_length, "rows": rows}
        starts = np.concatenate([[0], np.cumsum([len(p) for p in pieces], dtype=np.int64)]).astype(np.int64)
        flat = [np.concatenate(x) if x else np.empty(0, d) for x, d in ((pieces, np.int32), (masks, bool))]
        return TokenStore(flat[0], flat[1], starts, meta), report

    def save(self, folder: str | Path) -> Path:
        """Write input_ids.npy, labels_mask.npy, starts.npy and, last, meta.json into a folder; returns it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)  # absent until the arrays are complete
        for name in ("input_ids", "labels_mask", "starts"):
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        (folder / "meta.json").write_text(json.dumps(self.meta, ensure_ascii=False), encoding="utf-8")
        return folder

    @staticmethod
    def load(folder: str | Path) -> TokenStore:
        """Open a saved store; the token arrays are memory-mapped, read-only.

        Raises:
            FileNotFoundError: not a saved store, or one whose writing was cut off. ValueError: parts that disagree.
        """
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise FileNotFoundError(f"{folder}: no complete token store here (meta.json is missing); save it again")
        ids, mask, starts = (
            np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False)
            for name, mode in (("input_ids", "r"), ("labels_mask", "r"), ("starts", None))
        )
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if not (len(ids) == len(mask) == starts[-1] and len(meta) == len(starts) - 1):
            raise ValueError(
                f"{folder}: parts disagree ({len(ids)} ids, {len(mask)} mask values, last start {starts[-1]}, "
                f"{len(meta)} meta records for {len(starts) - 1} rows); build the store again"
            )
        return TokenStore(ids, mask, starts, meta)
