"""Prompts of a needle test: hide sentences at chosen depths of a text of a chosen length, and verify what came out.

    [chat template, instruction] hay hay hay. NEEDLE. hay hay hay [question, chat template]
    |<------------------------------ length, in tokens ------------------------------>|

A needle goes on a sentence boundary of the **text** (where a listing has none, between paragraphs); the text is tokenised
afterwards, so nothing depends on one tokenizer's full stop, no special token rides along, and the token count is measured on
the prompt that the model gets. The hay is cut so that the whole prompt has the length asked for, to within `TOLERANCE` tokens.
Each sentence of several has a depth of its own (`needle_variants.depths_of`); the grid's depth is that of the first.

Invariants of every prompt returned: length, sentences whole, each once and in place, no special token inside the text, no
answer in the hay. Cost: about fifteen tokenisations of a prompt; the hay alone is tokenised once for all prompts of a length
(a tokenizer without offsets counts it anew at every look).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from longalign_lib.data.text import sentence_ends, token_ids
from longalign_lib.evaluate.fit import largest
from longalign_lib.evaluate.needle_variants import SPREADS, depths_of
from longalign_lib.evaluate.needles import Needle, normalise

TOLERANCE = 2  # tokens by which a prompt may miss the length asked for; it is never longer
LONG = 600  # characters: a listing or a table may run on for pages without a full stop
MIN_HAY = 32  # tokens of hay below which a prompt is all scaffold
SCAFFOLDS = {
    "en": (
        "Read the text below. One sentence in it answers the question that follows it.\n\n<text>\n{context}\n</text>"
        "\n\nQuestion: {question}\nAnswer in one short sentence, from the text alone."
    ),
    "zh": "请阅读下面的文本，其中有一句话回答了文本之后的问题。\n\n<text>\n{context}\n</text>"
    "\n\n问题：{question}\n请只根据文本，用一句话简短回答。",
}
SEVERAL = {  # where the answer stands in more than one sentence
    "en": SCAFFOLDS["en"].replace("One sentence in it answers", "Sentences at several places in it answer"),
    "zh": SCAFFOLDS["zh"].replace("其中有一句话回答了", "其中有几处句子一起回答了"),
}
_HOLE = "\u27e6hay\u27e7"  # stands for the context while the chat template is rendered


class HayHoldsAnswer(ValueError):
    """The haystack itself answers the question."""


@dataclass(frozen=True)
class NeedlePrompt:
    """A verified prompt.

    Attributes:
        input_ids: of the whole prompt. text: as rendered. message: the user's message in it.
        length, depth: asked for (tokens, percent). depth_achieved: of the first sentence; depths_achieved: of all.
        hay_tokens: of the hay. position: tokens of the prompt before the first sentence.
    """

    input_ids: list[int] = field(repr=False)
    text: str = field(repr=False)
    needle: Needle
    length: int
    depth: float
    depth_achieved: float
    hay_tokens: int
    message: str = field(repr=False)
    depths_achieved: tuple[float, ...]
    position: int

    @property
    def tokens(self) -> int:
        """Length of the whole prompt."""
        return len(self.input_ids)

    @property
    def prompt_hash(self) -> str:
        """16 hex digits of the rendered text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def message_hash(self) -> str:
        """16 hex digits of the user's message: the same whatever chat template goes around it."""
        return hashlib.sha256(self.message.encode()).hexdigest()[:16]

    @property
    def messages(self) -> list[dict]:
        """The prompt as an endpoint wants it."""
        return [{"role": "user", "content": self.message}]


def scaffold_of(needle: Needle) -> str:
    """The message around the text: one sentence answers, or several do."""
    alone = needle.variant in ("single", "keys") or not needle.others
    return (SCAFFOLDS if alone else SEVERAL)[needle.language]


def _render(tokenizer, needle: Needle) -> tuple[str, str]:
    """The rendered prompt before and after the context."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template: load an instruction-tuned model's tokenizer, or set "
            "tokenizer.chat_template to the one that the model was trained with"
        )
    message = scaffold_of(needle).format(context=_HOLE, question=needle.question)
    text = tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True)
    if text.count(_HOLE) != 1:
        raise ValueError(f"the chat template repeats or changes the user's message: {text.count(_HOLE)} contexts, not 1")
    return tuple(text.split(_HOLE))


def _gap(needle: Needle) -> str:
    return "" if needle.language == "zh" else " "


def scaffold_tokens(tokenizer, needle: Needle) -> int:
    """Tokens of a prompt with this needle and no hay: chat template, instruction, needle, question."""
    head, tail = _render(tokenizer, needle)
    return len(token_ids(tokenizer, head + _gap(needle).join(needle.texts) + tail))


@functools.lru_cache(maxsize=4)
def _sentence_starts(hay: str) -> list[int]:
    """Where a needle may stand: where sentences begin; and paragraphs, where no sentence begins for `LONG` characters."""
    space = re.compile(r"\s*")
    starts = [0, *(space.match(hay, end).end() for end in sentence_ends(hay)[:-1])]
    more = [m.end() for m in re.finditer(r"\n[^\S\n]*\n+", hay)]
    for a, b in itertools.pairwise([*starts, len(hay)]):
        if b - a > LONG:
            starts += more[bisect_right(more, a) : bisect_left(more, b)]
    return sorted(set(starts))


@functools.lru_cache(maxsize=4)
def _token_starts(tokenizer, hay: str) -> list[int]:
    """Where each token of the hay begins, in characters."""
    found = tokenizer(hay, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [start for start, _ in found["offset_mapping"]]


def _weave(hay: str, chars: int, places: Sequence[tuple[int, str]], gap: str) -> str:
    """The first ``chars`` characters of the hay with sentences at (position, sentence), ascending."""
    said, done = "", 0
    for cut, sentence in places:
        if cut > done:
            said, done = said + (gap if said else "") + hay[done:cut], cut
        said += ("" if not said or said[-1].isspace() else gap) + sentence
    return said + (gap + hay[done:chars] if chars > done else "")


def build_prompt(tokenizer, needle: Needle, haystack: str, length: int, depth: float, spread: str | None = None) -> NeedlePrompt:
    """Hide ``needle`` in ``haystack`` and verify what came out.

    Args:
        tokenizer: any tokenizer with a chat template.
        haystack: the text to cut from, read from its beginning.
        length: tokens of the whole prompt, chat template included.
        depth: percent of the hay's tokens before the first sentence, 0 to 100; the nearest sentence boundary is taken.
        spread: where further sentences go, "after" or "around"; by default the variant's rule.

    Returns:
        A `NeedlePrompt` of ``length - TOLERANCE`` to ``length`` tokens.

    Raises:
        ValueError: a length that the needle or the scaffold exceeds, a depth outside 0-100, a haystack that is empty,
            too short or holds special tokens; HayHoldsAnswer: one that holds the answer. The message has the numbers.
    """
    if not 0 <= depth <= 100:
        raise ValueError(f"depth {depth!r} is not a percentage between 0 and 100")
    if not haystack.strip():
        raise ValueError("the haystack is empty: give a text, or default_haystack()")
    head, tail = _render(tokenizer, needle)
    scaffold, gap = scaffold_tokens(tokenizer, needle), _gap(needle)
    _check_length(tokenizer, needle, length, scaffold)
    hay, budget = haystack.lstrip(), length - scaffold
    chars = 8 * length
    while True:  # as much hay as may be needed, cut at the same places for all prompts of a length
        part = hay[:chars]
        starts, count = _sentence_starts(part), _counter(tokenizer, part)
        room = largest(count, budget, 0, len(part))
        if room < len(part) - 400 or chars >= len(hay):
            break
        chars *= 4
    hay = part
    usable = starts[: bisect_right(starts, room)]

    def nearest(percent: float) -> int:
        want = percent / 100 * budget
        at = largest(lambda i: count(usable[i]), int(want), 0, len(usable) - 1)
        return min((i for i in (at, at + 1) if i < len(usable)), key=lambda i: abs(count(usable[i]) - want))

    depths = depths_of(depth, len(needle.texts), spread or SPREADS.get(needle.variant, "after"))
    index = [nearest(d) for d in depths]

    def woven(chars: int) -> str:
        order = sorted(range(len(index)), key=lambda i: index[i])  # stable: sentences of one place keep their order
        return _weave(hay, chars, [(usable[index[i]], needle.texts[i]) for i in order], gap)

    def measure(chars: int) -> int:
        return len(token_ids(tokenizer, head + woven(chars) + tail))

    while max(index) and measure(usable[max(index)]) > length:
        index = [min(i, max(index) - 1) for i in index]  # the seams around the needles may cost tokens
    cut = usable[max(index)]
    end = largest(measure, length, cut, min(len(hay), room + 400))
    space = hay.rfind(" ", max(cut, end - 24), end)  # end on a whole word if that stays within the tolerance
    if 0 < end < len(hay) and hay[end - 1 : end + 1].strip() == hay[end - 1 : end + 1] and space > cut:
        end = space if measure(space) >= length - TOLERANCE else end
    text = head + woven(end) + tail
    ids = token_ids(tokenizer, text)
    if len(ids) < length - TOLERANCE and end >= len(hay):
        raise ValueError(
            f"the haystack is too short: with all its {count(len(hay))} tokens the prompt has {len(ids)}, "
            f"{length} were asked for; give more text"
        )
    _verify(tokenizer, ids, text, hay[:end], needle, length, head + gap.join(needle.texts) + tail)
    hay_tokens = count(end)
    reached = tuple(100 * count(usable[i]) / max(1, hay_tokens) for i in index)
    before = text[: text.index(needle.text, len(head))]
    message = scaffold_of(needle).format(context=woven(end), question=needle.question)
    return NeedlePrompt(ids, text, needle, length, depth, reached[0], hay_tokens, message, reached,
                        len(token_ids(tokenizer, before)))  # fmt: skip


def _counter(tokenizer, hay: str):
    """Tokens of the first so many characters: exact for all of the hay, elsewhere but for a token at the cut."""
    if not getattr(tokenizer, "is_fast", False):
        return lambda chars: len(token_ids(tokenizer, hay[:chars]))
    starts = _token_starts(tokenizer, hay)
    return lambda chars: bisect_left(starts, chars)


def _check_length(tokenizer, needle: Needle, length: int, scaffold: int) -> None:
    if length >= scaffold + MIN_HAY:
        return
    alone = len(token_ids(tokenizer, _gap(needle).join(needle.texts)))
    what = f"length {length} is shorter than the scaffold"
    if alone >= length:
        what = f"the needle is longer than the context: it has {alone} tokens, length {length} was asked for"
    raise ValueError(
        f"{what}: template, instruction, needle and question take {scaffold} tokens, and {MIN_HAY} of hay is the least; "
        f"ask for {scaffold + MIN_HAY} or more"
    )


def check_hay(hay: str, needle: Needle) -> None:
    """Refuse a haystack that holds a hidden sentence, the answer, a distractor's answer, or what the question names.

    Of a fact with several words to find (single, keys) all must be there to count as its answer; of several facts, any.

    Raises:
        HayHoldsAnswer: with the words.
    """
    whole = needle.variant in ("single", "keys") or not needle.others
    said = f" {normalise(hay)} "

    def held(words: Sequence[str]) -> list[str]:
        return [w for w in words if f" {normalise(w)} " in said]

    found = [s for s in needle.texts if s in hay] + held(needle.wrong)
    found += held(needle.parts) if not whole or len(held(needle.parts)) == len(needle.parts) else []
    found += needle.keys if len(held(needle.keys)) == len(needle.keys) else ()
    if found:
        words = ", ".join(repr(w) for w in found)
        raise HayHoldsAnswer(f"the haystack already holds the answer or what is asked for ({words}): choose another needle or another text")


def _letters(text: str) -> str:
    """The text without what tokenizers may change and readers do not see: blanks, and width and form of characters."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _verify(tokenizer, ids: list[int], text: str, hay: str, needle: Needle, length: int, empty: str) -> None:
    if not length - TOLERANCE <= len(ids) <= length:
        raise ValueError(f"could not cut the hay to {length} tokens, since a character there takes several: ask for {len(ids)}")
    check_hay(hay, needle)
    back = _letters(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    for sentence in needle.texts:
        if back.count(_letters(sentence)) != 1:
            kept = tokenizer.decode(token_ids(tokenizer, sentence))
            raise ValueError(f"the needle did not survive tokenisation: {sentence!r} becomes {kept!r}; choose another needle, or another tokenizer")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special and token.content in hay)}
    inside = sum(i in special for i in ids) - sum(i in special for i in token_ids(tokenizer, empty))
    if inside:
        found = sorted({t for t in map(tokenizer.convert_ids_to_tokens, special) if t in hay})
        raise ValueError(f"{inside} special token(s) inside the context ({', '.join(found)}): remove them from the haystack")
