"""Quality gates: why a generated question or answer is not taken.

A gate looks at the text alone (no model) and gives a reason, "gate: detail", or "" for a pass.

    question gates  empty, injection, wrong language, too short, too long, duplicate, not a question, needs nothing
    answer gates    empty, too long, injection, refusal, cut off, wrong language, echo, loop, copy, too short, not grounded

They are cheap filters with known blind spots. The grounding gate compares words, names and numbers: a fluent falsehood
made of the document's own words passes, and a right answer in quite other words may not. How often, is measured on
labelled samples by `gate_scores`. Cost: linear in the text; a document's words are collected anew for each call.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

from longalign_lib.data import gate_words as words
from longalign_lib.data.gate_words import HAN
from longalign_lib.data.text import sentence_ends

GATES = (
    "unparsed", "unreadable", "empty", "injection", "wrong language", "too short", "too long", "duplicate", "not a question", "needs nothing",
    "refusal", "cut off", "echo", "loop", "copy", "not grounded",
)  # fmt: skip
LONGEST = 50_000  # characters of an answer: several times what a model is asked for

_REFUSAL = re.compile(
    r"\bas an? (?:ai|language model|artificial)\b|\bi(?: am|'m) (?:sorry|unable|not able)\b|\bi apologi[sz]e\b"
    r"|\bi (?:cannot|can't|can not|could not|couldn't) (?:answer|help|assist|provide|find|determine)"
    r"|\bi (?:do not|don't) have (?:access|enough|the (?:text|document)|any)\b|\bplease provide (?:the|more)\b"
    r"|作为(?:一[个名位])?(?:人工智能|AI|语言模型|助手)|很?抱歉|对不起[，,]|我(?:无法|不能)(?:回答|提供|给出|确定)?|请提供",
    flags=re.IGNORECASE,
)
# An answer that only says that there is none.
_NO_ANSWER = re.compile(
    r"\b(?:text|document|passage|article|story|author|excerpt|information|it)\b[^.]{0,40}?"
    r"\b(?:does not|doesn't|do not|did not|is not|isn't|never) (?:\w+ )?"
    r"(?:mention|provide|contain|say|specif|state|give|include|tell|reveal|disclose|available|given|mentioned|stated)"
    r"|\b(?:no (?:information|mention|details?)\b|(?:not|cannot be) (?:mentioned|stated|specified|determined|answered)\b)"
    r"|(?:没有|未|并未|并没有|没)(?:明确)?(?:提到|提及|说明|给出|提供|写明|介绍|透露)|无法(?:得知|确定|判断|回答|知道)|不得而知",
    flags=re.IGNORECASE,
)
_ORDER = (
    "analy[sz]e|arrange|assess|calculate|characteri[sz]e|check|choose|classify|collect|compare|complete|compute|contrast|define|derive|describe|determine|discuss"
    "|draw|enumerate|estimate|evaluate|explain|extract|find|give|identify|illustrate|infer|justify|list|name|outline|point out"
    "|provide|quote|rank|reconstruct|recount|relate|retell|say|set out|show|sketch|state|suggest|sum up|summari[sz]e|tell|trace|verify|work out|write"
)
_ASKS = re.compile(
    r"[?？]|^(?:what|which|who|whom|whose|when|where|why|how|is|are|was|were|do|does|did|can|could)\b"
    rf"|(?:^|[.!:;,]\s+|\bthen\s|\band\s)(?:please\s)?(?:then\s)?(?:{_ORDER})\b"
    r"|(?:^|[，。；：、])(?:请|列|说|总结|概括|解释|描述|比较|指出|找|分析|计算)|(?:什么|哪|谁|为何|如何|怎|几|多少|是否|吗|呢)",
    flags=re.IGNORECASE,
)
# Sentences of a document that speak to the model and not to its reader: commands, not "the parser ignores previous blanks".
_ORDERS = re.compile(
    r"(?:^|[.!?:;,>()\"“–—-]|\b(?:please|now|and|must))\s*(?:"
    r"(?:ignore|disregard|forget|override)\s(?:[\w']+\s){0,4}?(?:instructions?|prompts?|questions?|user|above|previous|prior)\b"
    r"|do not (?:answer|obey|help) (?:the|any|this|that)\b|you are now (?:an?|in|the|acting)\b"
    r"|(?:instead,? )?(?:say|write|output|reply|respond|answer|print)\s+(?:only|nothing but)\b"
    r"|instead,? (?:say|write|output|reply|respond|print)\b)"
    r"|\b(?:note|attention|message|instructions?)(?: to| for|,)? (?:any |the |all )?(?:ai|assistants?|language models?|llms?)\b"
    r"|(?:忽略|无视|忘记|不要理会|不要回答|不要管|不必理会)(?:所有|一切|你|之前|上面|以上|上述|前面|用户|此前|任何|文中|本文)"
    r"|你现在是一|[致给](?:所有)?(?:AI|人工智能助手|语言模型)|(?:只|直接)(?:输出|回复)|只回答[“\"：:]",
    flags=re.IGNORECASE,
)
_ABOUT_ORDERS = re.compile(r"instruct|ignore|disregard|\bAI\b|assistant|prompt|hidden|note to|指令|提示|忽略|助手", flags=re.I)
_THE_TEXT = re.compile(
    r"\b(?:the|this)\s(?:\w+\s)?(?:text|article|passage|document|story|chapter|paper|authors?|writers?|narrator|report|page|excerpt)\b"
    r"|[上本全原]文|文[中章]|作者|这篇|这段",
    flags=re.IGNORECASE,
)
_YOU = re.compile(r"\b(?:you|your|yours)\b|[你您]", flags=re.IGNORECASE)
_AFFIRMS = re.compile(r"(?:yes|no|true|false|correct|indeed|是|不|对|没|有|会|能|可以)", flags=re.IGNORECASE)
_DANGLING = re.compile(
    r"(?:[,，、;；:：(（\[]|\b(?:the|an?|and|or|but|of|to|in|on|at|by|for|from|with|that|which|who|because|so|as|is|are|was|were))$"
)


def check_question(question: str, language: str, earlier: Collection[str] = (), document: str = "") -> str:
    """Why a question is rejected, or "".

    Args:
        question: one question.
        language: the document's, "en" or "zh".
        earlier: questions already taken for this document.
        document: its text; without it no one can see whether the question needs it.
    """
    text = question.strip()
    if not text:
        return "empty: no text"
    if len(text) > LONGEST:
        return f"too long: {len(text):,} characters"
    if order := _followed(text, "", document, language):
        return f"injection: it follows the document's {order!r}"
    if (found := words.other_language(text, language)) and re.search(r"[^\W\d_]", text):
        return f"wrong language: {found}, the document is {language}"
    size, least, unit = _size(text, language), *((4, "characters") if language == "zh" else (3, "words"))
    if size < least:
        return f"too short: {size} {unit}, at least {least} wanted"
    most = 300 if language == "zh" else 150
    if size > most:
        return f"too long: {size} {unit}, at most {most} wanted"
    for other in earlier:
        if _normal(text) == _normal(other) or words.same_words(text, other, language):
            return f"duplicate: the same question as {other.strip()!r}"
    if not _ASKS.search(text):
        return "not a question: it asks for nothing"
    return _needless(text, document, language) if document else ""


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
        min_overlap: the share of the answer's content words that must stand in the document or the question, and of those
            that the question did not bring, in the document.
    """
    text = answer.strip()
    if not text:
        return "empty: no text"
    if len(text) > LONGEST:
        return f"too long: {len(text):,} characters, at most {LONGEST:,} wanted"
    if order := _followed(text, question, document, language):
        return f"injection: it follows the document's {order!r}"
    if match := _REFUSAL.search(text[:200]) or (_size(text, language) <= 40 and _NO_ANSWER.search(text)):
        return f"refusal: {match[0]!r}"
    if finish_reason == "length":
        return "cut off: the answer reached the token limit"
    found = words.other_language(text, language)
    if found and not (language == "zh" and _size(text, "en") <= 4 and words.little_words_stand(text, document)):
        return f"wrong language: {found}, the document is {language}"
    if _echoes(text, question, language):
        return "echo: the answer repeats the question"
    if loop := _loop(text, language):
        return f"loop: {loop}"
    if copied := _copied(text, document, language):
        return f"copy: {copied}"
    return _grounded(text, question, document, language, min_overlap) or _unfinished(text, language)


def grounding(answer: str, document: str, question: str, language: str) -> float | None:
    """Share of the answer's content words that occur in the document or the question (Chinese: character pairs).

    Returns:
        0..1, or None when the answer has no content word.
    """
    wanted = words.content(answer, language)
    if not wanted:
        return None
    return len(wanted & (words.content(document, language) | words.content(question, language))) / len(wanted)


# ------------------------------------------------------------------------------------------------------ single gates
def _grounded(text: str, question: str, document: str, language: str, least: float) -> str:
    said, there, asked = (
        {w for w in words.content(t, language) if not w.isdigit()} for t in (text, document, question)
    )
    if not said and not re.search(r"\d", text):
        return "" if words.little_words_stand(text, document) else "too short: no content word"
    if missing := words.missing_numbers(text, document, question):
        return f"not grounded: {float(missing[0]):g} does not stand in the document"
    if not said and (missing := [n for n in re.findall(r"\d+", text) if not words.stands(n, document)]):
        return f"not grounded: {missing[0]} does not stand in the document"
    if language == "en" and (names := words.unknown_names(text, document, question)):
        return f"not grounded: the name {names[0]} does not stand in the document"
    if said and (share := len(said & (there | asked)) / len(said)) < least:
        return f"not grounded: {share:.0%} of its words stand in the document or question, {least:.0%} wanted"
    new = said - asked
    stand = len(new & there)
    few = len(new) < 3  # too few to judge by, where yes, no or numbers that stand carry the answer
    if new and stand < (1 if few else least * len(new)) and not (few and (_AFFIRMS.match(text) or re.search(r"\d", text))):
        return f"not grounded: {stand} of the {len(new)} words beyond the question's stand in the document"
    return ""


def _needless(question: str, document: str, language: str) -> str:
    """A question that could be answered without the document, whatever it says of "the text above"."""
    asked, named = words.asked_about(question, language), _THE_TEXT.search(question)
    stand = len(asked & words.content(document, language)) if asked else 0
    if _YOU.search(question) and len(asked) < 2 and not named:
        return "needs nothing: it is addressed to the model"
    least = 1 / 3 if language == "en" else 1 / 5  # Chinese pairs of characters are seldom the document's own
    if asked and (stand == 0 and len(asked) > 1 if named else stand < least * len(asked)):
        return f"needs nothing: {stand} of the {len(asked)} things that it asks about stand in the document"
    return ""


def _followed(text: str, question: str, document: str, language: str) -> str:
    """The order in the document that the text follows: half of its own words stand there and nowhere else; or ""."""
    if not document or not _ORDERS.search(document) or _ABOUT_ORDERS.search(question or text):
        return ""
    ends = sentence_ends(document)
    pieces = [document[a:b] for a, b in zip([0, *ends[:-1]], ends)]
    orders = [p for p in pieces if _ORDERS.search(p)]
    rest = words.content("\n".join(p for p in pieces if not _ORDERS.search(p)), language)
    asked = words.content(question, language)
    own = words.content(text, language) - asked
    told = words.content("\n".join(orders), language) - rest - asked
    return orders[0].strip()[:80] if own and len(own & told) >= 0.5 * len(own) else ""


def _echoes(text: str, question: str, language: str) -> bool:
    text = re.sub(r"^\W*(?:question|q|问题|问)\s*[:：]\s*", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\s*\b(?:answer|a|答案?)\s*[:：]\s*$", "", text, flags=re.IGNORECASE)
    if _normal(text) == _normal(question):
        return True
    said, asked = words.content(text, language), words.content(question, language)
    wanted = words.asked_about(question, language)
    if not said or said - asked or _AFFIRMS.match(text) or not wanted:
        return False
    return len(wanted & said) >= 0.8 * len(wanted) and not re.search(r"\d", re.sub(r"\d+", _drop_in(question), text))


def _drop_in(question: str):
    return lambda match: "" if match[0] in question else match[0]


def _loop(text: str, language: str) -> str:
    ends = sentence_ends(text)
    lines = [_normal(line) for a, b in zip([0, *ends[:-1]], ends) for line in text[a:b].splitlines()]
    counted = Counter(line for line in lines if _size(line, language) > 2)
    line, times = max(counted.items(), key=lambda pair: pair[1], default=("", 0))
    if times >= 3:
        return f"{line[:60]!r} stands in it {times} times"
    pieces, n = (re.findall(HAN, text), 6) if language == "zh" else (re.findall(r"\w+", text.lower()), 4)
    runs = [tuple(pieces[i : i + n]) for i in range(len(pieces) - n + 1)]
    if len(runs) >= 30 and len(set(runs)) < 0.5 * len(runs):
        return f"{len(set(runs)) / len(runs):.0%} of its runs of {n} {'characters' if language == 'zh' else 'words'} differ"
    return ""


def _copied(text: str, document: str, language: str) -> str:
    long = 300 if language == "zh" else 150  # characters, words
    if len(text) < 0.4 * len(document) and _size(text, language) < long:
        return ""
    mine, whole = words.shingles(text, language), words.shingles(document, language)
    shared = len(mine & whole)
    if len(whole) < 20 or not mine or shared < 0.8 * len(mine):
        return ""
    if shared > 0.5 * len(whole):
        return f"it repeats {shared / len(whole):.0%} of the document"
    return f"{_size(text, language)} words of it stand in the document as they are" if shared >= long else ""


def _unfinished(text: str, language: str) -> str:
    last = text.splitlines()[-1].strip()
    if _DANGLING.search(last) and _size(last, language) > 3:
        return f"cut off: it ends with {last[-12:]!r}"
    listed = re.match(r"[-*•|]|\(?\d{1,2}[.)、]|```", last)
    if not listed and _size(last, language) >= (30 if language == "zh" else 14) and re.search(r"\w$", last):
        return f"cut off: it ends without a full stop, with {last[-12:]!r}"
    return ""


def _size(text: str, language: str) -> int:
    return len(re.findall(HAN, text)) if language == "zh" else len(re.findall(r"\w+", text))


def _normal(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()
