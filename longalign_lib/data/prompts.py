"""What the model is asked to write a sample, in English and Chinese, and how its list of questions is read.

Section 3.1 of the LongAlign paper, in our own words: one of four task types, five questions as a numbered list, the answer
to one. Models write lists in many ways; `parse_questions` takes

    1.  1)  (1)  [1]  1、  1:  1 -  ①  一、  （一）  第一题  第一，  Q1:  **Question 1:**  问题一：  First,  II.  a)  | 1 |
    bullets, <li>, questions over two lines or all on one, code fences, JSON lists and objects, questions without numbers

and leaves out introductions, answers, closing words and what a reasoning model thinks aloud. Cost: linear in the reply.
"""

from __future__ import annotations

import json
import re

from longalign_lib.data.documents import Document
from longalign_lib.data.text import language_of

TASKS = ("general", "summary", "reasoning", "extraction")
QUESTIONS = 5  # asked for, and taken at most
LONGEST = 50_000  # characters of a reply that are read

# What each task type asks for, put into ASK_QUESTIONS.
TASK_PROMPTS: dict[str, dict[str, str]] = {
    "en": {
        "general": "Ask about anything that a curious reader may want to know.",
        "summary": "Each question asks for a summary: of the text, of one of its parts, or of one theme in it.",
        "reasoning": "Each answer needs facts from at least two places of the text put together.",
        "extraction": "Each question asks for something definite in the text: a name, a date, a number or a step.",
    },
    "zh": {
        "general": "凡是细心的读者可能想知道的都可以问。",
        "summary": "每个问题都要求总结：总结全文、其中一部分，或文中的一个主题。",
        "reasoning": "每个问题都必须把文中至少两处的事实结合起来才能回答。",
        "extraction": "每个问题都问文中一项具体的信息：人名、日期、数字或步骤。",
    },
}
# Both calls begin with the same words, so that a server that keeps prefixes reads a document once.
SHOW = {"en": "Read this text.\n\n{document}\n\n(End of the text.)\n\n", "zh": "请阅读下面的文章。\n\n{document}\n\n（文章结束。）\n\n"}
ASK_QUESTIONS = {
    "en": SHOW["en"] + (
        "Write five different questions about this text, from its beginning to its end. {task} "
        "Answer with a numbered list of questions, 1 to 5."
    ),
    "zh": SHOW["zh"] + "请针对这篇文章，从开头到结尾，提出五个不同的问题。{task}只写问题，按1到5编号。",
}
ASK_ANSWER = {
    "en": SHOW["en"] + "{question}\n\nAnswer from the text above alone, completely and to the point.",
    "zh": SHOW["zh"] + "{question}\n\n请只根据上文作答，内容完整，切合问题。",
}

_HAN_NUMBER = "[一二三四五六七八九十]{1,2}"
_NUMBERED = re.compile(
    r"^[\s>*_#|`]*(?:"
    rf"(?:Q(?:uestion)?|问题|提问)\s*#?\s*(?:\d{{1,2}}|{_HAN_NUMBER}|one|two|three|four|five)?[*_]*\s*[.:：、)）–—-]"
    rf"|第\s*(?:\d{{1,2}}|{_HAN_NUMBER})\s*(?:(?:个?问题|题|问)[*_]*\s*[.:：、,，)）]?|[.:：、,，)）\s])"
    r"|[(（\[]?\d{1,2}[)）\]]?[*_]*\s*(?:[.．](?!\d)|[、:：)）|题]|\s[–—-]\s|(?<=[)）\]])\s)"
    rf"|[(（]{_HAN_NUMBER}[)）]|{_HAN_NUMBER}[、.．:：)）]|[①-⑳]"
    r"|(?:I{1,3}|IV|VI{0,3})[.)]\s|[a-h]\)\s"
    r"|(?:First|Second|Third|Fourth|Fifth|Finally|Last)(?:ly)?(?: question)?\s*[,:]"
    r")[*_`]*\s*(.*)$",
    flags=re.IGNORECASE,
)
_BULLET = re.compile(r"^[\s>_#]*[-•*‣·+–](?!-)[*_]*\s*(.*)$")
_ANSWER_LINE = re.compile(r"^[\s*_>]*(?:A(?:nswer|ns)?|答案?)\s*\d*[*_]*\s*[:：]", flags=re.IGNORECASE)
_INLINE = re.compile(r"(?<=[?？])[*_]*\s*(?=[(（]?\d{1,2}[.)、）]\s*\D)")
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", flags=re.DOTALL | re.IGNORECASE)


def parse_questions(text: str) -> list[str]:
    """The questions of a model's list, in order, without numbers and markup; see the module's text for the forms.

    Lines before the first item are an introduction and left out; a line without a number continues the item before it,
    unless an empty line stands between. Bullets below numbers are notes, unless the number above only has a heading.
    Where nothing is numbered, each line that ends with a question mark is a question.

    Example:
        >>> parse_questions("Sure!\\n1. **Who** built it?\\n2) When\\n   was that?\\n\\nHope this helps.")
        ['Who built it?', 'When was that?']
    """
    text = _THOUGHT.sub("", re.sub("[\u200b-\u200f\u2060\ufeff]", "", text[:LONGEST]))  # and without what cannot be seen
    if (found := _from_json(text)) is not None:
        return [item for item in map(_clean, found) if item]
    text = re.sub(r"\\([.)*_#-])", r"\1", text)  # 1\. as markdown escapes it
    text = re.sub(r"</?(?:ol|ul|p|br)\s*/?>|</li>", "\n", re.sub(r"<li>", "\n- ", text, flags=re.I), flags=re.I)
    lines = [part for line in text.splitlines() for part in _INLINE.split(line) if not part.strip().startswith("```")]
    numbered = sum(bool(_NUMBERED.match(line)) for line in lines) > 0
    items: list[str] = []
    open_item = False
    for line in lines:
        match, bullet = _NUMBERED.match(line), None
        if not match and (bullet := _BULLET.match(line)) and not numbered:
            match = bullet
        if match:
            items.append(match[1].strip())
            open_item = True
        elif not line.strip() or _ANSWER_LINE.match(line):
            open_item = bool(items) and _heading(items[-1]) and not line.strip()
        elif bullet and open_item and not _heading(items[-1]):
            open_item = False
        elif open_item:
            items[-1] = f"{items[-1]} {(bullet[1] if bullet else line).strip()}".strip()
    if not items:
        items = [line for line in lines if re.search(r"[?？][\s*_\"”]*$", line)]
    return [item for item in map(_clean, items) if item and not item.endswith((":", "："))]


def without_thought(text: str) -> str:
    """A reply without what a reasoning model thinks before it, ended or cut off, with the opening mark or (as some servers give it) without.

    Example:
        >>> without_thought("<think>\\nWell, 7?\\n</think>\\n\\nSeven."), without_thought("Well.</think> Seven."), without_thought("<think>Well")
        ('Seven.', 'Seven.', '')
    """
    if not re.match(r"\s*<think", text, flags=re.IGNORECASE):
        return re.sub(r"\A(?:(?!<think).)*</think(?:ing)?>\s*", "", text, flags=re.DOTALL | re.IGNORECASE)
    return re.sub(r"\A\s*<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)\s*", "", text, flags=re.DOTALL | re.IGNORECASE)


def question_prompt(document: Document, task: str) -> str:
    """The message that asks for five questions. Raises ValueError for an unknown task type."""
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; accepted: {', '.join(TASKS)}")
    language = prompt_language(document)
    return ASK_QUESTIONS[language].format(document=document.text, task=TASK_PROMPTS[language][task])


def answer_prompt(document: Document, question: str) -> str:
    """The message that asks for the answer to one question."""
    return ASK_ANSWER[prompt_language(document)].format(document=document.text, question=question)


def prompt_language(document: Document) -> str:
    """The language of a document's prompts: its own if it is "en" or "zh", otherwise what its letters say."""
    return document.language if document.language in ASK_QUESTIONS else language_of(document.text)


def _heading(item: str) -> bool:
    return not item or item.rstrip("*_ ").endswith((":", "："))


_CODE = re.compile(r"`+([^`]+)`+")
_EMPHASIS = re.compile(r"(?<![\w*])(\*\*|__)(?=[^\s*_])([^*_]*\s[^*_]*|[^*_]*[^\w*_][^*_]*|\w+(?=\*))(?<=\S)\1(?![\w*])")


def _clean(item: str) -> str:
    """Without markdown's emphasis and backticks; what they mark as code, and names such as ``__init__``, stay as they are."""
    parts = _CODE.split(item)  # every second part is code
    parts[::2] = [_EMPHASIS.sub(r"\2", part) for part in parts[::2]]
    return re.sub(r"\A_+(?=[^_])(.*\W)_+\Z", r"\1", "".join(parts).strip(' *"“”|'))


def _from_json(text: str) -> list[str] | None:
    """The strings of a JSON list or object in the reply, cut off or not; None when there is none."""
    start = re.search(r"[\[{]\s*[\[{\"]", text)
    if start is None or any(map(_NUMBERED.match, text[: start.start()].splitlines())):  # brackets inside a question
        return None
    try:
        return _strings(json.JSONDecoder().raw_decode(text[start.start() :])[0]) or None
    except RecursionError:
        return None
    except json.JSONDecodeError:  # cut off by the token limit: the strings that are whole and ask
        strings = re.findall(r'"((?:[^"\\\n]|\\.){1,600}[?？])"', text[start.start() :])
        return [s.replace('\\"', '"') for s in strings] or None


def _strings(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [s for item in value for s in _strings(item)]
    if isinstance(value, dict):
        named = [v for k, v in value.items() if "question" in k.lower() or "问题" in k]
        return [s for item in named or [v for k, v in value.items() if "answer" not in k.lower()] for s in _strings(item)]
    return []
