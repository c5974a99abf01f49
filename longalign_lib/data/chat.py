"""Chats to tokens: any tokenizer's own chat template, labels on the assistant's answers alone.

An answer is what the rendering up to and including its turn has beyond the rendering of the turns before it followed by
the generation prompt (prefix difference, on characters), less the header where a template has no such prompt; a token is a
target when it lies inside but for white space (of a tokenizer without offsets: wholly inside). The special token that
ends the turn (`<|im_end|>`, `<|eot_id|>`, `</s>`) is a target, as the model must learn to stop; white space that the
template puts behind it is not. Where a template closes turns with no special token, none is added; where it writes the eos
token between turns only, earlier answers have it and the last one, which none follows, has not.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    -100 ............................................ -100 Hello ! <|im_end|> -100

Where the template marks answers itself (`{% generation %}`), its marks are compared with the prefix difference: more than
white space and special tokens between them is an error. A template that renders a turn otherwise once later turns follow
(reasoning models drop the thoughts of earlier turns) has no prefix difference there; its marks are taken, and without
marks it is an error that names the way out: one conversation for each answer, as the model sees it when it answers.

Invariants: input_ids are those of `tokenizer.apply_chat_template`; labels are UNSHIFTED (labels[t] is input_ids[t] or
-100; the loss shifts); token id 0 is an ordinary token. Cost: one tokenisation of a chat, three renderings an answer.
Shapes: T tokens of a chat.
"""

from __future__ import annotations

import datetime
import re
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import jinja2
import numpy as np

IGNORE = -100
ROLES = ("system", "user", "assistant")
ANSWERS = ("all", "last")
# For tokenizers without a template: `tokenizer.chat_template = PLAIN_TEMPLATE`. Answers end with the eos token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
_DATE = re.compile(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)")
_HALF = re.compile("[\ud800-\udfff]")
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def check_messages(messages: Sequence[dict]) -> None:
    """Raise ValueError unless this is a conversation: texts, at most one system turn, first, then user and assistant in turn."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a non-empty list of {{role, content}}, got {type(messages).__name__}")
    before = None
    for position, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise ValueError(f"message {position} has role {role!r}; accepted: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {position} ({role}) has content of type {type(content).__name__}; give a string")
        if not content.isascii() and _HALF.search(content):
            raise ValueError(f"message {position} ({role}) holds half of a surrogate pair, which is no text; read it as UTF-8")
        if role == "system" and position:
            raise ValueError(f"message {position} is a system turn; it may only stand first")
        if role == "assistant" and before in (None, "system"):
            raise ValueError("the first turn after the system message must be the user's; drop what stands before it")
        if role == before:
            raise ValueError(f"message {position} is a second {role} turn in a row; join the two or drop one")
        before = role
    if before == "system":
        raise ValueError("the first turn after the system message must be the user's; there is none")
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("the conversation has no assistant turn, so there is nothing to learn from it")


def encode_chat(
    tokenizer, messages: Sequence[dict], max_length: int | None = None, answers: str = "all", **template
) -> tuple[np.ndarray, np.ndarray]:
    """Render one conversation with the tokenizer's chat template and label the assistant's tokens.

    Args:
        tokenizer: with a chat template.
        messages: turns {"role": system|user|assistant, "content": text}; assistant turns without text are masked.
        max_length: cut from the right beyond this many tokens (the paper's way); None keeps all.
        answers: "all" labels every answer, "last" the last one alone.
        template: passed on to the template, e.g. ``enable_thinking=False``, or ``chat_template=...`` for another one.

    Returns:
        (input_ids int32[T], labels int32[T]); labels[t] == input_ids[t] on target tokens, -100 elsewhere.

    Raises:
        ValueError: a broken conversation, or one that the template refuses; a tokenizer without a chat template; a
            template whose answers cannot be told apart.
    """
    (result,) = encode_chats(tokenizer, [messages], answers, **template)
    if isinstance(result, ValueError):
        raise result
    return result[0][:max_length], result[1][:max_length]


def encode_chats(
    tokenizer, conversations: Sequence[Sequence[dict]], answers: str | Sequence[str] = "all", **template
) -> list[tuple[np.ndarray, np.ndarray] | ValueError]:
    """Encode several conversations with one call of the tokenizer, which uses all cores where it is a fast one.

    Arguments are those of `encode_chat`; ``answers`` may be one choice for each conversation. Returns for each conversation
    its (input_ids, labels), whole, or the ValueError that it raised.
    """
    need_template(tokenizer, template.get("chat_template"))
    choices = [answers] * len(conversations) if isinstance(answers, str) else list(answers)
    results: list = [None] * len(conversations)
    texts, spans, places = [], [], []
    for i, (messages, choice) in enumerate(zip(conversations, choices, strict=True)):
        if choice not in ANSWERS:
            raise ValueError(f"answers is {choice!r}; accepted: {', '.join(ANSWERS)}")
        try:
            check_messages(messages)
            text, found = answer_spans(tokenizer, list(messages), choice, **template)
        except ValueError as error:
            results[i] = error
        else:
            texts.append(text)
            spans.append(found)
            places.append(i)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False) if texts else {}
    control = control_ids(tokenizer)
    for k, (i, text) in enumerate(zip(places, texts)):
        ids = np.asarray(encoded["input_ids"][k], dtype=np.int32)
        find = _by_offsets(encoded.encodings[k], text) if tokenizer.is_fast else _by_prefixes(tokenizer, text, ids)
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        for start, end in spans[k]:
            first, last = find(start, end)
            last = _turn_end(ids, first, last, control)
            labels[first:last] = ids[first:last]
        results[i] = ids, labels
    return results


def need_template(tokenizer, given: str | None = None) -> str:
    """The chat template in use; ValueError for a tokenizer without one."""
    if given is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r} has no chat template: set "
            "tokenizer.chat_template (longalign_lib.data.chat.PLAIN_TEMPLATE is a plain one), or use an "
            "instruction-tuned model's tokenizer"
        )
    return tokenizer.get_chat_template(given)


def fix_date(chat_template: str, day: datetime.date) -> str:
    """The template with the date that it would write (`strftime_now('...')`) fixed to one day.

    Templates such as Llama 3.2's put today's date into the system turn: the same sample would give other tokens tomorrow.

    Raises:
        ValueError: the template asks for the date in a way that is not a literal format.
    """
    fixed = _DATE.sub(lambda m: repr(day.strftime(m.group(1) or m.group(2) or "")), chat_template)
    if "strftime_now(" in fixed:
        raise ValueError("the chat template computes its date format; give a template with the date written out")
    return fixed


def control_ids(tokenizer) -> np.ndarray:
    """Ids of the tokenizer's special tokens, named by it or only added as special, int64[n] in order."""
    known = _CONTROL.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        known = (len(tokenizer), np.array(sorted(added | set(tokenizer.all_special_ids)), dtype=np.int64))
        _CONTROL[tokenizer] = known
    return known[1]


_CONTROL: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


# -------------------------------------------------------------------------------------------------------------- spans
def answer_spans(
    tokenizer, messages: list[dict], answers: str = "all", **template
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the characters [start, end) of each answer that is not blank, its end included.

    Raises:
        ValueError: the template refuses the conversation, rewrites turns, or its own marks tell another story.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    wanted = [i for i in (turns if answers == "all" else turns[-1:]) if messages[i]["content"].strip()]
    marked = _MARKS.search(tokenizer.get_chat_template(template.get("chat_template"))) is not None
    text, marks = _render_marked(tokenizer, messages, template) if marked else (_render(tokenizer, messages, template), [])
    by_turn = dict(zip(turns, marks)) if len(marks) == len(turns) else {}
    spans = []
    for turn in wanted:
        before = _render(tokenizer, messages[:turn], template, add_generation_prompt=True)
        after = text if turn == len(messages) - 1 else _render(tokenizer, messages[: turn + 1], template)
        appended = text.startswith(before) and text.startswith(after.rstrip()) and len(after) > len(before)
        if appended:
            start, end = len(before), len(after)
            if before == _render(tokenizer, messages[:turn], template):  # there is no generation prompt
                start = _past_header(tokenizer, text, start, messages[: turn + 1], template)
            inside = [m for m in marks if m[0] < end and m[1] > start]
            if marked:
                _compare(tokenizer, text, (start, end), inside, turn)
            span = (max([start, *(m[0] for m in inside[:1])]), end)
            spans.append(_with_end_token(tokenizer, text, span, [tokenizer.eos_token or ""]))
        elif turn in by_turn:
            spans.append(_with_end_token(tokenizer, text, by_turn[turn]))
        elif marked:
            raise ValueError(f"the chat template marks {len(marks)} answers of {len(turns)}, and rewrites turn {turn}")
        else:
            raise ValueError(_not_appended(text, before, turn, len(messages)))
    return text, spans


def _not_appended(text: str, before: str, turn: int, turns: int) -> str:
    if turn < turns - 1:
        return (
            f"the chat template renders turn {turn} differently once later turns follow, so its tokens cannot be told "
            'apart by prefix; make one conversation of each answer (tokenize(..., answers="each") does), or set a template '
            "that only appends or marks answers with {% generation %}"
        )
    at = next((k for k, (a, b) in enumerate(zip(before, text)) if a != b), min(len(before), len(text)))
    return (
        f"the chat template's generation prompt ends with {before[at:]!r}, which does not stand before the answer that it "
        f"renders ({text[at : at + 30]!r} ...); pass the template's option that agrees with the data (such as "
        "enable_thinking=False), or set a template that marks answers with {% generation %}"
    )


def _past_header(tokenizer, text: str, start: int, messages: list[dict], template: dict) -> int:
    """Where the last turn's answer starts, behind what stands between `start` and another answer in its place."""
    probe = "\ue000" * 3
    header, found, _ = _render(tokenizer, [*messages[:-1], {**messages[-1], "content": probe}], template)[start:].partition(probe)
    if not found or not text.startswith(header, start):
        raise ValueError(
            f"the chat template has no generation prompt, and what it writes before the answer of turn {len(messages) - 1} "
            f"({text[start : start + 30]!r} ...) depends on the answer, so its start cannot be told; heed "
            "add_generation_prompt in the template, or mark answers with {% generation %}"
        )
    return start + len(header) if header.strip() else start  # a space goes with the first word


def _compare(tokenizer, text: str, span: tuple[int, int], marks: list[tuple[int, int]], turn: int) -> None:
    """Marks inside a turn and its prefix difference agree but for white space and added tokens."""
    at, end = span
    gaps = []
    for a, b in marks:
        gaps.append(text[min(at, a) : max(at, a)])  # text that is not marked, or a mark that begins in the prompt
        at = b
    gaps.append(text[min(at, end) : max(at, end)])
    added = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    strip = re.compile("|".join(map(re.escape, added)) or r"(?!)")
    left = [gap for gap in (strip.sub("", gap).strip() for gap in gaps) if gap]
    if left:
        raise ValueError(
            f"the chat template's own assistant mask and the prefix difference disagree on turn {turn}, by "
            f"{left[0][:60]!r}; mend the template's generation block"
        )


def _with_end_token(tokenizer, text: str, span: tuple[int, int], ends: Sequence[str] | None = None) -> tuple[int, int]:
    """A span that does not end with a special token, stretched over the one (of `ends`) that stands right behind it."""
    start, end = span
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    if text[start:end].rstrip().endswith(tuple(special)):
        return span
    return start, end + max((len(t) for t in ends or special if text.startswith(t, end)), default=0)


def _render(tokenizer, messages: list[dict], template: dict, **options) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **template, **options)
    except jinja2.exceptions.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error


def _render_marked(tokenizer, messages: list[dict], template: dict) -> tuple[str, list[tuple[int, int]]]:
    """The rendering, and the characters that the template's generation blocks wrote."""
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {**tokenizer.special_tokens_map, **template}
    options["chat_template"] = tokenizer.get_chat_template(template.get("chat_template"))
    try:
        texts, marks = render_jinja_template([messages], return_assistant_tokens_mask=True, **options)
    except jinja2.exceptions.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    return texts[0], [tuple(m) for m in marks[0] if m[1] > m[0]]


# ------------------------------------------------------------------------------------------------------------- tokens
def _by_offsets(encoding, text: str) -> Callable[[int, int], tuple[int, int]]:
    """Characters -> tokens inside, but for white space of a word at the edge, by the fast tokenizer's offsets."""
    tokens = range(len(encoding))

    def find(start: int, end: int) -> tuple[int, int]:
        def reaches_in(t: int) -> bool:
            a, b = encoding.token_to_chars(t)
            return bool(text[max(a, start) : min(b, end)].strip()) and not (text[a:start] + text[end:b]).strip()

        first = bisect_left(tokens, start, key=lambda t: encoding.token_to_chars(t)[0])
        last = bisect_right(tokens, end, lo=first, key=lambda t: encoding.token_to_chars(t)[1])
        return first - (first > 0 and reaches_in(first - 1)), last + (last < len(tokens) and reaches_in(last))

    return find


def _by_prefixes(tokenizer, text: str, ids: np.ndarray) -> Callable[[int, int], tuple[int, int]]:
    """The same for a tokenizer without offsets: a prefix of the text has as many tokens as its ids agree on."""

    def agreed(end: int) -> tuple[int, bool]:
        part = np.asarray(tokenizer(text[:end], add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
        n = min(len(part), len(ids))
        differ = np.flatnonzero(part[:n] != ids[:n])
        return (int(differ[0]), False) if len(differ) else (n, n == len(part))

    def find(start: int, end: int) -> tuple[int, int]:
        first, clean = agreed(start)
        return first + (not clean), max(first, agreed(end)[0])  # a token over the edge is no target

    return find


def _turn_end(ids: np.ndarray, first: int, last: int, control: np.ndarray) -> int:
    """One past the turn's last special token; `last` when the template closes turns with none."""
    special = np.flatnonzero(np.isin(ids[first:last], control))
    return first + int(special[-1]) + 1 if len(special) else last
