"""Greedy answers to many prompts, each shared beginning computed once (first, simple form: sorted ids, one kept cache)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from longalign_lib.evaluate.generate import Answer, Greedy


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
    """(least tokens to compute, total / least) when only exact beginnings are shared: the nodes of a trie of ids."""
    rows = sorted([int(i) for i in p] for p in prompts)
    least, before = 0, []
    for row in rows:
        least += len(row) - next((k for k, (a, b) in enumerate(zip(row, before)) if a != b), min(len(row), len(before)))
        before = row
    return least, sum(map(len, rows)) / least


def complete(
    model, tokenizer, prompts: Sequence, max_new_tokens: int = 32, on_answer: Callable[[int, Answer], None] | None = None,
    *, on_error: Callable[[int, RuntimeError], None] | None = None, reuse_prefix: bool = True, stop: Sequence[str] = (),
    batch: int = 1, chunk: int = 4096, progress: bool = True, desc: str = "prompts",
) -> tuple[list[Answer | None], PrefillReport]:  # fmt: skip
    """Answer prompts (1-d arrays of token ids, any order); ``on_answer(index, answer)`` as each is done."""
    rows = [np.asarray(p) for p in prompts]
    greedy, answers = Greedy(model, tokenizer, reuse_prefix, chunk), [None] * len(rows)
    with tqdm(total=sum(map(len, rows)), desc=desc, unit="tok", unit_scale=True, disable=not progress, leave=False) as bar:
        for i in sorted(range(len(rows)), key=lambda i: rows[i].tolist()):
            try:
                answers[i] = greedy.answer(rows[i], max_new_tokens)
            except RuntimeError as error:
                if on_error is None:
                    raise
                on_error(i, error)
            else:
                if on_answer is not None:
                    on_answer(i, answers[i])
            bar.update(len(rows[i]))
    computed = sum(a.prompt_tokens - a.reused for a in answers if a is not None)
    done = [r for r, a in zip(rows, answers) if a is not None]
    return answers, PrefillReport(sum(map(len, done)), computed, bound(done)[0] if done else 0)
