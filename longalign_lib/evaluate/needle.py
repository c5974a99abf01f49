"""Needle in a Haystack: hide a fact at a chosen depth of a text of a chosen length, and ask for it.

    [chat template, instruction] hay hay hay. NEEDLE. hay hay hay [question, chat template]
    |<------------------------------ length, in tokens ------------------------------>|

The needle goes on a sentence boundary of the **text**; the text is tokenised afterwards, so nothing depends on one
tokenizer's full stop, no special token rides along, and the token count is measured on the prompt that the model gets.
The hay is cut so that the whole prompt has the length asked for, to within `TOLERANCE` tokens.

`run_grid` asks every (length, depth, repeat) once and appends each answer to a JSONL file under a key of the model's
weights, its name and the prompt: a run that was cut off continues, and two models never share a record.
Cost: about ten tokenisations a prompt; one forward pass over it, less what `generate.Greedy` reuses.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from longalign_lib.data.jsonl import append_jsonl, read_jsonl
from longalign_lib.data.text import sentence_ends, token_ids
from longalign_lib.evaluate.fit import largest
from longalign_lib.evaluate.generate import Greedy, fingerprint, window_of
from longalign_lib.evaluate.needles import Needle, default_haystack, needle_family, recall

TOLERANCE = 2  # tokens by which a prompt may miss the length asked for; it is never longer
MIN_HAY = 32  # tokens of hay below which a prompt is all scaffold
SCAFFOLDS = {
    "en": (
        "Read the text below. One sentence in it answers the question that follows it.\n\n<text>\n{context}\n</text>"
        "\n\nQuestion: {question}\nAnswer in one short sentence, from the text alone."
    ),
    "zh": "请阅读下面的文本，其中有一句话回答了文本之后的问题。\n\n<text>\n{context}\n</text>"
    "\n\n问题：{question}\n请只根据文本，用一句话简短回答。",
}
_HOLE = "\u27e6hay\u27e7"  # stands for the context while the chat template is rendered


@dataclass(frozen=True)
class NeedlePrompt:
    """A verified prompt: token ids, rendered text, what was asked for and what was achieved (depths in percent)."""

    input_ids: list[int] = field(repr=False)
    text: str = field(repr=False)
    needle: Needle
    length: int
    depth: float
    depth_achieved: float
    hay_tokens: int

    @property
    def tokens(self) -> int:
        """Length of the whole prompt."""
        return len(self.input_ids)

    @property
    def prompt_hash(self) -> str:
        """16 hex digits of the rendered text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def _render(tokenizer, needle: Needle) -> tuple[str, str]:
    """The rendered prompt before and after the context."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template: load an instruction-tuned model's tokenizer, or set "
            "tokenizer.chat_template to the one that the model was trained with"
        )
    message = SCAFFOLDS[needle.language].format(context=_HOLE, question=needle.question)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    if text.count(_HOLE) != 1:
        raise ValueError(
            f"the chat template repeats or changes the user's message: {text.count(_HOLE)} contexts, not 1"
        )
    return tuple(text.split(_HOLE))


def scaffold_tokens(tokenizer, needle: Needle) -> int:
    """Tokens of a prompt with this needle and no hay: chat template, instruction, needle, question."""
    head, tail = _render(tokenizer, needle)
    return len(token_ids(tokenizer, head + needle.text + tail))


def build_prompt(tokenizer, needle: Needle, haystack: str, length: int, depth: float) -> NeedlePrompt:
    """Hide ``needle`` in ``haystack`` and verify what came out.

    Args:
        tokenizer: any tokenizer with a chat template.
        haystack: the text to cut from, read from its beginning.
        length: tokens of the whole prompt, chat template included.
        depth: percent of the hay's tokens before the needle, 0 to 100; the nearest sentence boundary is taken.

    Returns:
        A `NeedlePrompt` of ``length - TOLERANCE`` to ``length`` tokens.

    Raises:
        ValueError: a length that the scaffold alone exceeds, a depth outside 0-100, a haystack that is empty,
            too short, holds special tokens or already answers the question; the message has the numbers.
    """
    if not 0 <= depth <= 100:
        raise ValueError(f"depth {depth!r} is not a percentage between 0 and 100")
    if not haystack.strip():
        raise ValueError("the haystack is empty: give a text, or default_haystack()")
    head, tail = _render(tokenizer, needle)
    scaffold = scaffold_tokens(tokenizer, needle)
    if length < scaffold + MIN_HAY:
        raise ValueError(
            f"length {length} is shorter than the scaffold: template, instruction, needle and question take {scaffold} "
            f"tokens, and {MIN_HAY} of hay is the least; ask for {scaffold + MIN_HAY} or more"
        )
    hay = haystack.lstrip()[
        : 40 * length
    ]  # no tokenizer needs this many characters a token; keeps long haystacks cheap
    starts = [0] + [re.compile(r"\s*").match(hay, end).end() for end in sentence_ends(hay)[:-1]]  # of sentences

    def count(chars: int) -> int:
        return len(token_ids(tokenizer, hay[:chars]))

    budget = length - scaffold
    room = largest(count, budget, 0, min(len(hay), 8 * budget + 64))
    if room == min(len(hay), 8 * budget + 64) < len(hay):
        room = largest(count, budget, room, len(hay))
    usable = starts[: bisect_right(starts, room)]
    want = depth / 100 * budget
    at = largest(lambda i: count(usable[i]), int(want), 0, len(usable) - 1)
    at = min((i for i in (at, at + 1) if i < len(usable)), key=lambda i: abs(count(usable[i]) - want))
    gap = "" if needle.language == "zh" else " "

    def whole(cut: int, chars: int) -> str:
        glue = "" if not cut or hay[cut - 1].isspace() else gap
        return head + hay[:cut] + glue + needle.text + (gap + hay[cut:chars] if chars > cut else "") + tail

    while at and len(token_ids(tokenizer, whole(usable[at], usable[at]))) > length:
        at -= 1  # the seams around the needle may cost a token
    cut = usable[at]

    def measure(chars: int) -> int:
        return len(token_ids(tokenizer, whole(cut, chars)))

    end = largest(measure, length, cut, min(len(hay), room + 400))
    space = hay.rfind(" ", max(cut, end - 24), end)  # end on a whole word if that stays within the tolerance
    if 0 < end < len(hay) and hay[end - 1 : end + 1].strip() == hay[end - 1 : end + 1] and space > cut:
        end = space if measure(space) >= length - TOLERANCE else end
    text = whole(cut, end)
    ids = token_ids(tokenizer, text)
    if len(ids) < length - TOLERANCE and end >= len(hay):
        raise ValueError(
            f"the haystack is too short: with all its {count(len(hay))} tokens the prompt has {len(ids)}, "
            f"{length} were asked for; give more text"
        )
    _verify(tokenizer, ids, text, hay[:end], needle, length, head + needle.text + tail)
    hay_tokens, hay_before = count(end), count(cut)
    return NeedlePrompt(ids, text, needle, length, depth, 100 * hay_before / max(1, hay_tokens), hay_tokens)


def _verify(tokenizer, ids: list[int], text: str, hay: str, needle: Needle, length: int, empty: str) -> None:
    if not length - TOLERANCE <= len(ids) <= length:
        raise ValueError(f"could not cut the hay to {length} tokens: the nearest is {len(ids)}")
    if needle.text in hay or recall(hay, needle.parts) == 1:
        raise ValueError(f"the haystack already holds the answer {needle.parts}: choose another needle or another text")
    back = " ".join(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).split())
    if back.count(" ".join(needle.text.split())) != 1:
        raise ValueError(f"the needle did not survive tokenisation: {needle.text!r}")
    special = set(tokenizer.all_special_ids)
    inside = sum(i in special for i in ids) - sum(i in special for i in token_ids(tokenizer, empty))
    if inside:
        found = sorted({t for t in tokenizer.all_special_tokens if t in hay})
        raise ValueError(
            f"{inside} special token(s) inside the context ({', '.join(found)}): remove them from the haystack"
        )


def _check_distinct(**axes) -> None:
    for name, values in axes.items():
        if not len(values) or len(set(values)) != len(values):
            raise ValueError(f"{name} must be different values, at least one; got {list(values)}")


def build_grid(
    tokenizer, lengths: Sequence[int], depths: Sequence[float], repeats: int = 1,
    needles: Sequence[Needle] | None = None, haystack: str | Sequence[str] | None = None, seed: int = 0,
) -> list[tuple[int, NeedlePrompt]]:  # fmt: skip
    """All prompts of a grid as (repeat, prompt): each cell and repeat draws its own needle, each repeat its own hay.

    Args:
        haystack: None for the language reference in an order drawn per repeat; a text for all repeats; or one a repeat.
        needles: the pool to draw from; 64 of the English family by default.

    Raises:
        ValueError: as `build_prompt`, before any model runs; duplicated lengths or depths; repeats < 1.
    """
    _check_distinct(lengths=lengths, depths=depths)
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    pool = list(needles) if needles is not None else needle_family(64, seed)
    if not pool:
        raise ValueError("no needles to draw from")
    prompts = []
    for repeat in range(repeats):
        hay = (
            haystack if isinstance(haystack, str) else haystack[repeat] if haystack else default_haystack(seed + repeat)
        )
        for length in sorted(lengths):
            for depth in sorted(depths):
                needle = random.Random(f"{seed}-{length}-{float(depth)}-{repeat}").choice(pool)
                prompts.append((repeat, build_prompt(tokenizer, needle, hay, length, depth)))
    return prompts


def run_grid(
    model, tokenizer, lengths: Sequence[int], depths: Sequence[float], repeats: int = 1,
    needles: Sequence[Needle] | None = None, out: Path | str | None = None, *, name: str = "model",
    haystack: str | Sequence[str] | None = None, seed: int = 0, max_new_tokens: int = 32,
    allow_beyond_window: bool = False, reuse_prefix: bool = True, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Ask a model for every needle of a grid.

    Args:
        lengths: prompt lengths in tokens. depths: percent. repeats: prompts a cell. Others: see `build_grid`.
        out: JSONL file that answers are appended to and read back from; None keeps them in memory.
        name: what figures and tables call this model; part of the key, beside a fingerprint of the weights.
        max_new_tokens: answer length, counted against the window with the prompt.
        allow_beyond_window: ask anyway when a prompt does not fit the model's window (to see what breaks).

    Returns:
        A row a prompt: model, length, depth, repeat, tokens, depth_achieved, needle, question, parts, answer, score
        (share of parts, NaN if failed), hit (all parts), status ("ok" or "failed: reason"), seconds, reused, finish.

    Raises:
        ValueError: a prompt beyond the window (both numbers are named), and all that `build_grid` raises.
    """
    _check_distinct(lengths=lengths)
    window, longest = window_of(model), max(lengths) + max_new_tokens
    if longest > window and not allow_beyond_window:
        raise ValueError(
            f"length {max(lengths)} + {max_new_tokens} new tokens = {longest} is beyond the model's window of "
            f"{window}; shorten it, or pass allow_beyond_window=True to see what happens there"
        )
    prompts = build_grid(tokenizer, lengths, depths, repeats, needles, haystack, seed)
    identity, greedy = fingerprint(model), Greedy(model, tokenizer, reuse_prefix)
    broken: list[dict] = []  # torn lines of a killed run: those cells are simply asked again
    old = read_jsonl(out, broken) if out is not None and Path(out).is_file() else []
    known = {r["key"]: r for r in old if r.get("status") == "ok"}
    rows = []
    for repeat, prompt in tqdm(prompts, desc=f"needles, {name}", disable=not progress, leave=False):
        key = hashlib.sha256(json.dumps([identity, name, prompt.prompt_hash, max_new_tokens]).encode()).hexdigest()[:24]
        row = known.get(key)
        if row is None:
            row = {"key": key, "model": name, "fingerprint": identity, "prompt_hash": prompt.prompt_hash}
            row |= _cell(prompt) | {"repeat": repeat}
            row |= _ask(greedy, prompt, max_new_tokens) | {"beyond_window": prompt.tokens + max_new_tokens > window}
            if out is not None:
                append_jsonl(out, row)
        rows.append(
            row | _cell(prompt) | {"repeat": repeat}
        )  # as asked for now: a known prompt may have come from another grid
    return pd.DataFrame(rows)


def _cell(prompt: NeedlePrompt) -> dict:
    """The record of a prompt, before it is answered."""
    needle = {"needle": prompt.needle.text, "question": prompt.needle.question, "parts": list(prompt.needle.parts)}
    where = {"length": prompt.length, "depth": prompt.depth, "depth_achieved": round(prompt.depth_achieved, 2)}
    return where | {"tokens": prompt.tokens} | needle


def _ask(greedy: Greedy, prompt: NeedlePrompt, max_new_tokens: int) -> dict:
    """The answer and its score; a model that fails on one prompt marks the cell and leaves the rest of the grid."""
    try:
        said = greedy.answer(prompt.input_ids, max_new_tokens)
    except RuntimeError as error:  # out of memory, mostly
        reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return {
            "answer": None,
            "score": None,
            "hit": None,
            "status": reason,
            "seconds": None,
            "reused": 0,
            "finish": "",
        }
    score = recall(said.text, prompt.needle.parts)
    return {
        "answer": said.text, "score": score, "hit": score == 1, "status": "ok", "seconds": round(said.seconds, 3),
        "reused": said.reused, "finish": said.finish,
    }  # fmt: skip
