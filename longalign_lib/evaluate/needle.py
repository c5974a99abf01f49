"""Needle in a Haystack: hide facts at chosen depths of texts of chosen lengths, and ask for them.

`needle_prompt` builds and verifies one prompt, `needle_ask` asks and keeps answers; here a grid of lengths, depths and repeats
is made of the one and given to the other. `needle_score` makes tables of it, `needle_config` reads grids from YAML.

Invariants: the same arguments give the same prompts; a smaller grid asks a part of a larger one's prompts; nothing is asked
before every prompt of the grid is verified; two models never share a record. Cost: one forward pass over each prompt, less
what `prefix.complete` computes once for several.
"""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from longalign_lib.evaluate.generate import window_of
from longalign_lib.evaluate.needle_ask import ask
from longalign_lib.evaluate.needle_prompt import (
    MIN_HAY,
    SCAFFOLDS,
    TOLERANCE,
    HayHoldsAnswer,
    NeedlePrompt,
    build_prompt,
    scaffold_tokens,
)
from longalign_lib.evaluate.needle_score import judged
from longalign_lib.evaluate.needle_variants import draw
from longalign_lib.evaluate.needles import Needle, default_haystack
from longalign_lib.llm import ChatClient

__all__ = ["MIN_HAY", "SCAFFOLDS", "TOLERANCE", "NeedlePrompt", "build_grid", "build_prompt", "default_haystack", "run_grid", "scaffold_tokens"]
REDRAWS = 20  # more needles tried for a cell when the hay happens to hold an answer


def check_distinct(**axes) -> None:
    """Raises ValueError for an axis without values or with one twice."""
    for name, values in axes.items():
        if not len(values) or len(set(values)) != len(values):
            twice = sorted({v for v in values if list(values).count(v) > 1})
            raise ValueError(f"{name} must be different values, at least one; got {list(values)}" + (f" ({twice} twice)" if twice else ""))


def build_grid(
    tokenizer, lengths: Sequence[int], depths: Sequence[float], repeats: int = 1,
    needles: Sequence[Needle] | None = None, haystack: str | Sequence[str] | None = None, seed: int = 0, *,
    variant: str = "single", language: str = "en", count: int | None = None, spread: str | None = None,
) -> list[tuple[int, NeedlePrompt]]:  # fmt: skip
    """All prompts of a grid as (repeat, prompt): each cell and repeat draws its own needle, each repeat its own hay.

    Args:
        haystack: None for the built-in one in an order drawn per repeat; a text for all repeats; or one a repeat.
        needles: the pool to draw from; by default 64 of the family of ``variant`` and ``language`` with ``count`` sentences.
            Repeats of a cell get different ones as far as they go; one whose answer the hay happens to hold is
            replaced by another draw.

    Raises:
        ValueError: as `build_prompt`, before any model runs; duplicated lengths or depths; repeats < 1.
    """
    check_distinct(lengths=lengths, depths=depths)
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    pool = list(needles) if needles is not None else draw(variant, 64, seed, language, count)
    if not pool:
        raise ValueError("no needles to draw from")
    if haystack is not None and not isinstance(haystack, str) and len(haystack) < repeats:
        raise ValueError(f"{len(haystack)} haystacks for {repeats} repeats: give one text for all, or one a repeat")
    prompts, used = [], defaultdict(set)
    for repeat in range(repeats):
        hay = default_haystack(seed + repeat, language) if haystack is None else haystack
        hay = hay if isinstance(hay, str) else hay[repeat]
        for length in sorted(lengths):
            for depth in sorted(depths):
                rng = random.Random(f"{seed}-{length}-{float(depth)}-{repeat}")
                fresh = [n for n in pool if n.texts not in used[length, depth]] or pool  # another one each repeat
                first = rng.choice(fresh)
                others = [n for n in rng.sample(fresh, len(fresh)) if n is not first] + [n for n in pool if n not in fresh]
                prompt = _first_that_fits(tokenizer, [first, *others[:REDRAWS]], hay, length, depth, spread)
                used[length, depth].add(prompt.needle.texts)
                prompts.append((repeat, prompt))
    return prompts


def _first_that_fits(tokenizer, needles: Sequence[Needle], hay: str, length: int, depth: float, spread: str | None) -> NeedlePrompt:
    for needle in needles[:-1]:
        with contextlib.suppress(HayHoldsAnswer):
            return build_prompt(tokenizer, needle, hay, length, depth, spread)
    return build_prompt(tokenizer, needles[-1], hay, length, depth, spread)


def check_window(model, longest: int, max_new_tokens: int, knob: str = "allow_beyond_window=True") -> None:
    """Raises ValueError when prompt and answer do not fit the model's window; both numbers are named."""
    window = window_of(model)
    if longest + max_new_tokens > window:
        raise ValueError(
            f"length {longest} + {max_new_tokens} new tokens = {longest + max_new_tokens} is beyond the model's window of "
            f"{window}; shorten it, or pass {knob} to see what happens there"
        )


def run_grid(
    model, tokenizer, lengths: Sequence[int], depths: Sequence[float], repeats: int = 1,
    needles: Sequence[Needle] | None = None, out: Path | str | None = None, *, name: str = "model",
    haystack: str | Sequence[str] | None = None, seed: int = 0, max_new_tokens: int = 32,
    allow_beyond_window: bool = False, reuse_prefix: bool = True, progress: bool = True, prompts_dir: Path | str | None = None,
    judge: Callable[[str, str, str], float | None] | None = None, **drawn,
) -> pd.DataFrame:  # fmt: skip
    """Ask a model for every needle of a grid.

    Args:
        model: of transformers, in this process, or a ChatClient; ``tokenizer`` counts the tokens in both cases.
        lengths: prompt lengths in tokens. depths: percent. repeats: prompts a cell. Others: see `build_grid`, for
            ``variant``, ``language``, ``count``, ``spread`` too.
        out: JSONL file that answers are appended to and read back from; None keeps them in memory.
        name: what figures and tables call this model.
        max_new_tokens: answer length, counted against the window with the prompt.
        allow_beyond_window: ask anyway when a prompt does not fit the model's window (to see what breaks).
        prompts_dir: folder for the rendered prompts, once a hash; None writes none.
        judge: gives a second score; see `needle_score.judged`.

    Returns:
        A row a prompt: model, length, depth, repeat, tokens, depth_achieved, needle, question, parts, answer, score (share
        of parts, NaN if failed), hit (all parts, no distractor's), wrong, status ("ok" or "failed: reason"), seconds,
        reused, finish, hashes. ``frame.attrs["prefill"]``: the report of saved prefill, or None.

    Raises:
        ValueError: a prompt beyond the window (both numbers are named), and all that `build_grid` raises.
    """
    check_distinct(lengths=lengths)
    if not isinstance(model, ChatClient) and not allow_beyond_window:
        check_window(model, max(lengths), max_new_tokens)
    prompts = build_grid(tokenizer, lengths, depths, repeats, needles, haystack, seed, **drawn)
    frame, report = ask(model, tokenizer, prompts, out, name=name, max_new_tokens=max_new_tokens,
                        reuse_prefix=reuse_prefix, prompts_dir=prompts_dir, progress=progress)  # fmt: skip
    if judge is not None:
        frame = judged(frame, judge, progress)
    frame.attrs["prefill"] = report
    return frame
