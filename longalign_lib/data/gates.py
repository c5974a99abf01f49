"""Quality gates: why a generated question or answer is not taken.

A gate looks at the text alone (no model) and gives a reason, "gate: detail", or "" for a pass. They are cheap filters
with known blind spots: the grounding gate compares words, so a fluent falsehood made of the document's own words
passes, and a right answer in other words may not.

    question gates  empty, too short, wrong language, duplicate, not a question
    answer gates    empty, refusal, cut off, wrong language, too short, echo, not grounded

Cost: linear in the text; a document's words are collected once for each call.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from longalign_lib.data.text import language_of

GATES = (
    "unparsed", "empty", "too short", "wrong language", "duplicate", "not a question", "refusal", "cut off", "echo",
    "not grounded",
)  # fmt: skip

_REFUSAL = re.compile(
    r"(?:\bas an ai\b|\bi (?:am|'m) (?:sorry|unable|not able)\b"
    r"|\bi (?:cannot|can't|can not) (?:answer|help|assist|provide)"
    r"|\bi (?:do not|don't) have (?:access|enough|the (?:text|document))|\bplease provide (?:the|more)\b"
    r"|作为(?:一个)?(?:人工智能|AI)|很?抱歉|对不起，|我无法|请提供)",
    flags=re.IGNORECASE,
)
_ASKS = re.compile(
    r"\?|？|^(?:what|which|who|whom|whose|when|where|why|how|is|are|was|were|do|does|did|can|could|list|name|describe"
    r"|explain|summari[sz]e|give|identify|compare|extract|outline|find|provide|write|state|discuss|analy[sz]e)\b"
    r"|^(?:请|列|说|总结|概括|解释|描述|比较|指出|找)|(?:什么|哪|谁|为何|如何|怎|几|多少|是否|吗|呢)",
    flags=re.IGNORECASE,
)
_STOP = frozenset(
    "about above according after again also although among another answer because been before being between both but "
    "called cannot could does document during each either every following from given have having here into "
    "itself just like made make many might more most much must need only other over passage question same several "
    "shall should since some such text than that their them then there therefore these they this those through thus "
    "under until upon used using very what when where whether which while will with within without would your".split()
)


def check_question(question: str, language: str, earlier: Collection[str] = ()) -> str:
    """Why a question is rejected, or "".

    Args:
        question: one question.
        language: the document's, "en" or "zh".
        earlier: questions already taken for this document.
    """
    text = question.strip()
    if not text:
        return "empty: no text"
    if re.search(r"[^\W\d_]", text) and language_of(text) != language:
        return f"wrong language: {language_of(text)}, the document is {language}"
    size, least, unit = _size(text, language), *((4, "characters") if language == "zh" else (3, "words"))
    if size < least:
        return f"too short: {size} {unit}, at least {least} wanted"
    if _normal(text) in {_normal(q) for q in earlier}:
        return "duplicate: the same question again"
    if not _ASKS.search(text):
        return "not a question: it asks for nothing"
    return ""


def check_answer(
    answer: str,
    question: str,
    document: str,
    language: str,
    finish_reason: str = "stop",
    min_overlap: float = 0.5,
) -> str:
    """Why an answer is rejected, or "".

    Args:
        answer, question, document: texts.
        language: the document's, "en" or "zh".
        finish_reason: as the endpoint said; "length" means the answer was cut off.
        min_overlap: the share of the answer's content words that must stand in the document or the question.
    """
    text = answer.strip()
    if not text:
        return "empty: no text"
    if match := _REFUSAL.search(text[:200]):
        return f"refusal: {match[0]!r}"
    if finish_reason == "length":
        return "cut off: the answer reached the token limit"
    if re.search(r"[^\W\d_]", text) and language_of(text) != language:
        return f"wrong language: {language_of(text)}, the document is {language}"
    if _normal(text) == _normal(question):
        return "echo: the answer repeats the question"
    overlap = grounding(text, document, question, language)
    if overlap is None:
        return "too short: no content word" if not re.search(r"\d", text) else _numbers_stand(text, document)
    if overlap < min_overlap:
        return f"not grounded: {overlap:.0%} of its words stand in the document or question, {min_overlap:.0%} wanted"
    return ""


def grounding(answer: str, document: str, question: str, language: str) -> float | None:
    """Share of the answer's content words that occur in the document or the question (Chinese: character pairs).

    Returns:
        0..1, or None when the answer has no content word.
    """
    wanted = _content(answer, language)
    if not wanted:
        return None
    return len(wanted & (_content(document, language) | _content(question, language))) / len(wanted)


def _content(text: str, language: str) -> set[str]:
    if language == "zh":
        runs = re.findall(r"[\u3400-\u9fff]+", text)
        return {run[i : i + 2] for run in runs for i in range(len(run) - 1)} | set(re.findall(r"\d{2,}", text))
    words = re.findall(r"[a-z0-9_]{4,}", text.lower())
    return {re.sub(r"(?:ing|ed|es|s|ly)$", "", w) for w in words if w not in _STOP}


def _numbers_stand(answer: str, document: str) -> str:
    numbers = re.findall(r"\d+(?:[.,:]\d+)*", answer)
    missing = [n for n in numbers if not re.search(rf"(?<!\d){re.escape(n)}(?!\d)", document)]
    return f"not grounded: {missing[0]} does not stand in the document" if missing else ""


def _size(text: str, language: str) -> int:
    return len(re.findall(r"[\u3400-\u9fff]", text)) if language == "zh" else len(re.findall(r"\w+", text))


def _normal(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()
