"""Greedy answers to many prompts: each shared beginning is computed once, and answers are written side by side.

Prompts of a needle grid are the same text up to the needle and differ after it. What follows a needle must be computed again,
because every token after it attends to it. So the least number of prompt tokens to compute is the number of nodes of a trie of
the prompts' ids (`bound`). In sorted order the longest beginning that a prompt shares with any before it is shared with the one
just before it, so one kept cache, cropped from prompt to prompt, reaches that number.

How much that is, for lengths L_j and n depths d_i (shares of 1) over one text: the trunk reaches to the deepest needle and is
computed once, what stands behind each needle is alone:

    computed = max_ij(d_i L_j) + sum_ij (1 - d_i) L_j        asked = n sum_j L_j        factor = asked / computed

With depths spread evenly from 0 to 1 sum_i (1 - d_i) = n / 2, and the factor is 2 / (1 + 2 max L / (n sum L)): 1.67 for ten depths of
one length, 1.93 for ten depths of ten lengths, never more than 2. Deeper needles save more: with the depths 10, 20 ... 100 it is 1.82
and 2.14 (`expected_factor` for any depths; instruction and question are left out).

Writing is bound by reading weights, so a group of prompts writes together: their caches, left-padded to the longest, become one
batch. A group is as large as its keys and values fit (`room_of`) and as its first prompt is willing to wait (`PATIENCE`); where a cache cannot be stacked exactly (sliding windows,
recurrent layers, RoPE that depends on the longest position) each prompt writes alone.

Invariants: in float32 the answers are those of one prompt at a time; every answer is reported as its group ends; a group that
fails for memory is asked again one by one. Cost: the bound, plus one token a prompt; caches of a group are held twice for a moment, a
layer at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from longalign_lib.evaluate.generate import Answer, Greedy

ROOM = 2**30  # bytes of keys and values that a group may take on a CPU
SHARE = 0.25  # and of the free memory of a GPU
PATIENCE = 10.0  # seconds after which a group is written as it is, so that a kill loses no more


@dataclass(frozen=True)
class PrefillReport:
    """Prompt tokens in all, those computed, the least possible, and why nothing was reused ("" if it was)."""

    prompt_tokens: int
    computed_tokens: int
    least: int
    no_reuse: str = ""

    @property
    def saved(self) -> int:
        """Prompt tokens taken from the kept cache."""
        return self.prompt_tokens - self.computed_tokens

    @property
    def reached(self) -> float:
        """Saved tokens as a share of what could be saved; 1 where nothing can."""
        return self.saved / (self.prompt_tokens - self.least) if self.prompt_tokens > self.least else 1.0


def bound(prompts: Sequence) -> tuple[int, float]:
    """(least tokens to compute, total / least) when only exact beginnings are shared: the nodes of a trie of ids.

    Raises:
        ValueError: no prompt, or an empty one.
    """
    rows = sorted([int(i) for i in p] for p in prompts)
    if not rows or not rows[0]:
        raise ValueError("bound needs prompts of at least one token each")
    least, before = 0, []
    for row in rows:
        least += len(row) - next((k for k, (a, b) in enumerate(zip(row, before)) if a != b), min(len(row), len(before)))
        before = row
    return least, sum(map(len, rows)) / least


def expected_factor(lengths: Sequence[int], depths: Sequence[float]) -> float:
    """The factor of the module's head for any lengths (tokens) and depths (percent), scaffold and question left out.

    Raises:
        ValueError: no lengths or depths, a depth outside 0-100.
    """
    if not len(lengths) or not len(depths) or not all(0 <= d <= 100 for d in depths):
        raise ValueError(f"need lengths and depths in percent, 0 to 100; got {list(lengths)} and {list(depths)}")
    shares = [d / 100 for d in depths]
    return len(shares) * sum(lengths) / (max(shares) * max(lengths) + sum(1 - d for d in shares) * sum(lengths))


def room_of(device: torch.device) -> int:
    """Bytes of keys and values that a group may take: `ROOM`, or `SHARE` of a GPU's free memory."""
    return int(torch.cuda.mem_get_info(device)[0] * SHARE) if device.type == "cuda" else ROOM


def complete(
    model, tokenizer, prompts: Sequence, max_new_tokens: int = 32, on_answer: Callable[[int, Answer], None] | None = None,
    *, on_error: Callable[[int, RuntimeError], None] | None = None, reuse_prefix: bool = True, batch: int | None = None,
    room: int | None = None, patience: float = PATIENCE, chunk: int = 4096, progress: bool = True, desc: str = "prompts",
) -> tuple[list[Answer | None], PrefillReport]:  # fmt: skip
    """Answer prompts greedily.

    Args:
        prompts: 1-d arrays or lists of token ids, in any order.
        on_answer: called with (index, answer) as groups end. on_error: with (index, error) for a prompt that fails; without it
            the error is raised.
        reuse_prefix: keep the cache between prompts where that is exact.
        batch: prompts that write together at most; None as many as fit ``room``, 1 each alone.
        room: bytes of keys and values of a group; None takes `room_of`.
        patience: seconds after which a group is written as it is.
        chunk: prompt tokens a forward pass.

    Returns:
        (answers in the prompts' order, None for those that failed; the report of saved prefill over those answered).

    Raises:
        ValueError: an empty prompt, a batch or room below 1.
    """
    if (batch is not None and batch < 1) or (room is not None and room < 1):
        raise ValueError(f"batch and room must be 1 or more, got {batch} and {room}")
    rows = [np.asarray(p) for p in prompts]
    greedy, answers = Greedy(model, tokenizer, reuse_prefix, chunk), [None] * len(rows)
    room = room_of(model.device) if room is None else room
    most = batch or len(rows) if greedy.cropable and not greedy.whole else 1
    with tqdm(total=sum(map(len, rows)), desc=desc, unit="tok", unit_scale=True, disable=not progress, leave=False) as bar:

        def done(i: int, said: Answer | RuntimeError) -> None:
            bar.update(len(rows[i]))
            if isinstance(said, Answer):
                answers[i] = said
                if on_answer is not None:
                    on_answer(i, said)
            elif on_error is None:
                raise said
            else:
                on_error(i, said)

        held: list[_Held] = []
        since = 0.0
        for i in sorted(range(len(rows)), key=lambda i: rows[i].tolist()):
            try:
                said = _prefill(greedy, i, rows[i], max_new_tokens, alone=most == 1)
            except RuntimeError as error:
                done(i, error)
                continue
            if isinstance(said, Answer):
                done(i, said)
                continue
            if held and (len(held) + 1) * max(len(rows[i]), *(h.tokens for h in held)) * said.bytes_per_token > room:
                _write(greedy, held, rows, max_new_tokens, done)
                held = []
            since = since if held else time.perf_counter() - said.seconds
            held.append(said)
            if len(held) >= most or time.perf_counter() - since > patience:
                _write(greedy, held, rows, max_new_tokens, done)
                held = []
        if held:
            _write(greedy, held, rows, max_new_tokens, done)
    finished = [r for r, a in zip(rows, answers) if a is not None]
    computed = sum(a.prompt_tokens - a.reused for a in answers if a is not None)
    why = "" if greedy.reuse else "asked not to" if not reuse_prefix else "positions depend on the longest prompt" if greedy.whole else (
        "sliding windows or recurrent layers: the cache cannot be cropped")  # fmt: skip
    return answers, PrefillReport(sum(map(len, finished)), computed, bound(finished)[0] if finished else 0, why)


@dataclass
class _Held:
    """A prompt whose prefill is done: its first token and a copy of its keys and values, a pair a layer, [1, heads, tokens, size]."""

    index: int
    tokens: int
    reused: int
    seconds: float
    first: int
    layers: list

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, over all layers."""
        return sum(x.numel() * x.element_size() for pair in self.layers for x in pair) // self.tokens


@torch.inference_mode()
def _prefill(greedy: Greedy, index: int, ids: np.ndarray, most: int, alone: bool) -> _Held | Answer:
    """Compute a prompt and copy its cache; or its whole answer where it must write alone."""
    if alone:
        return greedy.answer(ids, most)
    start = time.perf_counter()
    first, kept = greedy.prefill(ids)
    layers = [(layer.keys.clone(), layer.values.clone()) for layer in greedy.cache.layers]
    return _Held(index, len(ids), kept, time.perf_counter() - start, first, layers)


def _write(greedy: Greedy, held: list[_Held], rows: list, most: int, done: Callable) -> None:
    """Write the answers of a group, together; one by one if that fails (for memory, mostly)."""
    try:
        start = time.perf_counter()
        said = _together(greedy, held, most)
        seconds = (time.perf_counter() - start) / len(held)
    except RuntimeError:
        indices = [h.index for h in held]
        for h in held:
            h.layers = []
        if len(indices) == 1:
            greedy.cache, greedy.held = None, []
        for i in indices:
            try:
                answer = greedy.answer(rows[i], most)
            except RuntimeError as error:
                done(i, error)
            else:
                done(i, answer)
        return
    for h, (tokens, finish) in zip(held, said, strict=True):
        text = greedy.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        done(h.index, Answer(text, len(tokens), h.tokens, h.reused, h.seconds + seconds, finish))


@torch.inference_mode()
def _together(greedy: Greedy, held: list[_Held], most: int) -> list[tuple[list[int], str]]:
    """(tokens, finish) of each prompt; frees the held caches as it stacks them."""
    model, longest = greedy.model, max(h.tokens for h in held)
    device, cache = model.device, DynamicCache(config=model.config)
    for number in range(len(held[0].layers)):
        pair = []
        for which in (0, 1):
            like = held[0].layers[number][which]
            whole = like.new_zeros((len(held), like.shape[1], longest, like.shape[3]))
            for line, h in enumerate(held):
                whole[line, :, longest - h.tokens :] = h.layers[number][which][0]
            pair.append(whole)
        for h in held:
            h.layers[number] = None
        cache.update(*pair, number)
    lengths = torch.tensor([h.tokens for h in held], device=device)
    seen = (torch.arange(longest, device=device)[None] >= (longest - lengths)[:, None]).long()
    said, now, open_ = [[] for _ in held], [h.first for h in held], set(range(len(held)))
    with greedy.threads(len(held)):
        for step in range(most):
            open_ -= {line for line in open_ if now[line] in greedy.ends}
            for line in open_:
                said[line].append(now[line])
            if not open_ or step == most - 1:
                break
            seen = torch.cat([seen, seen.new_ones((len(held), 1))], 1)
            out = model(input_ids=torch.tensor(now, device=device)[:, None], attention_mask=seen, position_ids=(lengths + step)[:, None],
                        past_key_values=cache, use_cache=True, logits_to_keep=1)  # fmt: skip
            now = out.logits[:, -1].argmax(-1).tolist()
    return [(tokens, "length" if line in open_ and now[line] not in greedy.ends else "stop") for line, tokens in enumerate(said)]
