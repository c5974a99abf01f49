"""Greedy answers, one prompt at a time, with a key-value cache that is kept from one prompt to the next.

Prompts of a needle grid share their beginning: the same text up to the needle. `Greedy` keeps the cache of the last
prompt, crops it to the longest common beginning (compared token by token) and computes only the rest. In float32 the
answers are those of a fresh cache; in bfloat16 sums are rounded in another order, so a near-tie may fall otherwise.

Where a cache cannot be cropped exactly (sliding windows, recurrent layers, RoPE that depends on the longest position),
nothing is reused. Long prompts go through the model in chunks, which bounds the attention mask to chunk x length; through
recurrent layers and such RoPE in one pass, because some recurrent layers start each pass of several tokens from nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import time
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

WORTH = 0.1  # share of a prompt below which reuse is not worth leaving the plain causal kernel for a masked one
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
STATES = ("past_key_values", "cache_params", "state")  # what forward calls its cache: attention, Mamba, RWKV
CHUNK = 2**25  # bytes of a weight that `checksum` reads at a time
MIX = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio in 64 bits, as a signed number


@dataclass(frozen=True)
class Answer:
    """What a model said. ``finish``: "stop" or "length"; ``reused``: prompt tokens taken from the kept cache."""

    text: str
    tokens: int
    prompt_tokens: int
    reused: int
    seconds: float
    finish: str


def window_of(model) -> int:
    """The longest sequence, in tokens, that the model's configuration promises."""
    return int(model.config.get_text_config().max_position_embeddings)


def checksum(tensor: torch.Tensor) -> int:
    """64 bits that every bit of a tensor enters: its words times odd numbers of their places, summed modulo 2^64.

    One word that changes always changes the sum (an odd number has an inverse); on any device it is the same.
    """
    flat, total = tensor.detach().contiguous().reshape(-1).view(torch.uint8), 0
    for first in range(0, len(flat), CHUNK):
        part = flat[first : first + CHUNK]
        words = torch.nn.functional.pad(part, (0, -len(part) % 8)).clone().view(torch.int64)
        place = torch.arange(first // 8, first // 8 + len(words), device=words.device)
        total += int((words * (place * MIX | 1)).sum())
    return total % 2**64


def fingerprint(model) -> str:
    """16 hex digits that tell weights and configuration apart, whatever the name. Every weight is read: half a second a gigabyte."""
    digest, seen = hashlib.sha256(), set()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        if weight.data_ptr() not in seen or not weight.numel():  # tied weights once
            digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}{checksum(weight)}".encode())
            seen.add(weight.data_ptr())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _threads(device: torch.device, lines: int):
    """On a CPU, one thread to write one answer token by token. Two save 40% on idle cores; when one of them waits for a busy core,
    both wait, at every layer: three times slower, measured. Several answers at once are work enough for all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" and lines == 1 else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Greedy:
    """Answers prompts greedily; see the module's head for what is kept between calls.

    Args:
        model, tokenizer: a causal language model of transformers and its tokenizer.
        reuse_prefix: keep the cache between prompts where that is exact.
        chunk: prompt tokens a forward pass, where the module's head allows several.
    """

    def __init__(self, model, tokenizer, reuse_prefix: bool = True, chunk: int = 4096):
        self.model, self.tokenizer = model, tokenizer
        config = model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        ropes = [rope, *(r for r in rope.values() if isinstance(r, dict))]  # one, or one a kind of layer
        self.whole = any(r.get("rope_type") in LENGTH_DEPENDENT_ROPE for r in ropes)
        self.turns = {r.get("original_max_position_embeddings") for r in ropes if r.get("rope_type") == "longrope"}
        takes = inspect.signature(type(model).forward).parameters
        self.state = next((name for name in STATES if name in takes), STATES[0])
        self.places = "position_ids" in takes
        self._empty()
        layers = {type(layer) for layer in self.cache.layers} if self.cache is not None else set()
        if hasattr(config, "layers_block_type"):  # recurrent layers, which in transformers 5.17 not every cache shows
            layers.add(None)
        self.cropable = layers == {DynamicLayer}
        self.chunks = not self.whole and bool(layers) and layers <= {DynamicLayer, DynamicSlidingWindowLayer}
        self.reuse = reuse_prefix and not self.whole and self.cropable
        self.chunk = chunk
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        self.ends = {int(e) for e in (*ends, tokenizer.eos_token_id) if e is not None}
        self.cache, self.held = None, []  # the cache and the token ids it stands for

    def _keep(self, ids: list[int]) -> int:
        """Crop the cache to the beginning shared with ``ids``, always leaving one token to compute; tokens kept."""
        same = 0
        for mine, theirs in zip(self.held, ids[:-1]):
            if mine != theirs:
                break
            same += 1
        if not (self.reuse and self.cache is not None and same >= WORTH * len(ids)):
            self._empty()
            return 0
        if len(self.held) > same:
            self.cache.crop(same - len(self.held))  # negative: how many tokens to forget
        self.held = self.held[:same]
        return same

    def _empty(self) -> None:
        """An empty cache; a model with a state of its own makes that in its first pass."""
        self.cache, self.held = DynamicCache(config=self.model.config) if self.state == STATES[0] else None, []

    def _reset_rope(self) -> None:
        """Frequencies as the model was made with: dynamic RoPE keeps those of the longest sequence it has seen."""
        for module in self.model.modules():
            for name, frequencies in module.named_buffers(recurse=False):
                kind = name.removesuffix("inv_freq")
                if kind != name and hasattr(module, f"{kind}original_inv_freq"):
                    frequencies.copy_(getattr(module, f"{kind}original_inv_freq"))
                    setattr(module, f"{kind}max_seq_len_cached", module.original_max_seq_len)

    def _forward(self, ids: list[int]) -> int:
        """Run ``ids`` after what the cache holds; the likeliest next token."""
        tokens, first = torch.tensor([ids], device=self.model.device), len(self.held)
        more = {self.state: self.cache}
        if self.places:
            more["position_ids"] = torch.arange(first, first + len(ids), device=tokens.device)[None]
        out = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **more)
        if self.state != STATES[0]:
            self.cache = getattr(out, self.state)
        self.held += ids
        return int(out.logits[0, -1].argmax())

    def _next(self, token: int) -> int:
        """Append a token; where LongRoPE turns to its other factors, everything is computed again with them."""
        ids = [token]
        if len(self.held) in self.turns:
            ids = self.held + ids
            self._empty()
        return self._forward(ids)

    def _filled(self) -> bool:
        """Whether the cache holds what was run, as far as it counts tokens."""
        if self.state != STATES[0]:
            return self.cache is not None
        counts = [layer.get_seq_length() for layer in self.cache.layers if isinstance(layer, DynamicLayer)]
        return len(self.held) in counts if counts else bool(self.cache.layers)

    @torch.inference_mode()
    def prefill(self, input_ids) -> tuple[int, int]:
        """Compute a prompt, of which the cache then holds everything.

        Returns:
            (the likeliest next token, prompt tokens taken from the cache of the prompt before).

        Raises:
            ValueError: an empty prompt, or a model that does not fill its cache.
        """
        ids = [int(i) for i in input_ids]
        if not ids:
            raise ValueError("the prompt has no tokens")
        try:
            kept = self._keep(ids)
            if self.whole and not self.turns:
                self._reset_rope()
            step = self.chunk if self.chunks else len(ids)
            for first in range(kept, len(ids), step):
                token = self._forward(ids[first : first + step])
            if not self._filled():
                raise ValueError(f"{type(self.model).__name__} does not fill the {self.state} it is given")
        except BaseException:
            self.cache, self.held = None, []  # half a forward pass may have written to it
            raise
        return token, kept

    def threads(self, lines: int = 1):
        """A context with as many threads as writing ``lines`` answers at once is worth."""
        return _threads(self.model.device, lines)

    @torch.inference_mode()
    def answer(self, input_ids, max_new_tokens: int = 32) -> Answer:
        """Continue a prompt until an end token or ``max_new_tokens``.

        Args:
            input_ids: token ids of the whole prompt, a list or 1-D array.
        """
        start, ids = time.perf_counter(), [int(i) for i in input_ids]
        token, kept = self.prefill(ids)
        try:
            said = []
            with self.threads():
                while token not in self.ends and len(said) < max_new_tokens:
                    said.append(token)
                    if len(said) < max_new_tokens:
                        token = self._next(token)
        except BaseException:
            self.cache, self.held = None, []
            raise
        finish = "stop" if token in self.ends else "length"
        text = self.tokenizer.decode(said, skip_special_tokens=True).strip()
        return Answer(text, len(said), len(ids), kept, time.perf_counter() - start, finish)
