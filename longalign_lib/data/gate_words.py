"""What the gates look at: content words, names, numbers, shared runs of words; English and Chinese, no model.

English words lose their endings ("opened", "opens" -> "open"); Chinese text counts by pairs of characters, as it has no
spaces. Cost: linear in the text, apart from `same_words`, which is quadratic in the length of two questions.
"""

from __future__ import annotations

import bisect
import re
from fractions import Fraction

from longalign_lib.data.numerals import numbers_in
from longalign_lib.data.text import language_of

HAN = r"[\u3400-\u9fff]"
STOP = frozenset(
    "about above according after again also although among another answer because been before being between both but "
    "called cannot could does document during each either every following from given have having here into "
    "itself just like made make many might more most much must need only other over passage question same several "
    "shall should since some such text than that their them then there therefore these they this those through thus "
    "under until upon used using very what when where whether which while will with within without would your".split()
)
# Words of requests ("Summarise the main points of the article") say nothing about what a document is about.
_ASKING = frozenset(
    "article aspect author briefly chapter compare content describe detail discuss example excerpt explain explanation "
    "find following give idea identify important information key list main mention name outline overview page paper "
    "paragraph part piece point provide purpose quote report say section sentence state story suggest summarise "
    "summarize summary tell theme title topic true false word write whole entire short first last kind type many long "
    "according happen reason difference role describe state effect".split()
)
_ASKING_ZH = re.compile(
    "什么|多少|多[长大高远久](?:时间)?|需要|最[多少]|能|时间|哪[一个些几里年种天位]*|怎[么样]*|如何|为何|为什么|是否|请问?|总结|概括|根据|上文|下文|文中|文章|本文|作者|介绍|说明|"
    "解释|描述|列出|指出|分别|主要|内容|一下|几[个位种条]|谁|吗|呢|的|了|是|在|有|和|与|及|它|其|这|那|句话|用|两|一"
)
_LITTLE_ZH = re.compile("[的了和与及或在是为有被把从到对于就都也还而则所将已]")  # pairs do not reach across these
_LITTLE = frozenset(
    "a an the it its is are was were be been he she him her his they them their we you i me my and or of to in on at by for "
    "from as with no not yes so do did does this that there here if but than then also too only very".split()
)
# Function words of languages that a model may slip into, none of them a word of English.
_FOREIGN = {
    "de": "der und ist nicht ein eine das des dem den mit auf für sich auch wird wurde sind von zu",
    "fr": "le les est une et dans pour qui que sur avec sont pas du des était il elle au",
    "es": "el los las una es por para con que se del como fue y su sin está",
    "it": "il gli una che per con sono della di non è nel dei più è",
    "pt": "os uma para com não por que foi dos mais seu ao do da em",
}
FUNCTION_WORDS = {name: frozenset(words.split()) for name, words in _FOREIGN.items()}
_ENGLISH = frozenset("the of and to in is was it for that with as on by at from this are be not or were which who".split())
_CAPITAL = re.compile(r"(?<![.!?:;\n\"“(•*>#-])(?<!^)[ ]([A-Z][a-z]{2,})\b")


def content(text: str, language: str) -> set[str]:
    """Words that say something: stems of English words of four letters or more, pairs of Chinese characters, numbers."""
    if language == "zh":
        return _pairs(_LITTLE_ZH.sub(" ", text)) | set(re.findall(r"\d{2,}|[a-z]{2,}", text.lower()))
    return {stem(w) for w in re.findall(r"[a-z0-9_]{4,}", text.lower()) if w not in STOP}


def _pairs(text: str) -> set[str]:
    return {run[i : i + 2] for run in re.findall(f"{HAN}+", text) for i in range(len(run) - 1)}


def stem(word: str) -> str:
    """An English word without its commonest endings."""
    return re.sub(r"(?:ing|ed|es|s|ly|e)$", "", word) if len(word) > 3 else word


def asked_about(question: str, language: str) -> set[str]:
    """The content of a question without the words that only ask."""
    if language == "zh":
        return _pairs(_ASKING_ZH.sub(" ", question)) | set(re.findall(r"\d{2,}|[a-z]{2,}", question.lower()))
    asking = {stem(w) for w in _ASKING}
    return content(question, language) - asking


def missing_numbers(answer: str, document: str, question: str) -> list[Fraction]:
    """Numbers above 12 or with a fraction that neither document nor question holds and the answer does not work out.

    Numbers of list items ("3. ") do not count. A sum, difference, product or quotient of a number that is known and another
    (or a power of ten, or a number up to 12), rounded as it is written, is known, and so is what follows from it.
    """
    said = set(numbers_in(re.sub(r"(?m)^[ \t]*\(?\d{1,2}[.)、]\s", " ", answer)))
    there = set(numbers_in(document)) | set(numbers_in(question))
    known, missing = sorted(said & there)[:40], said - there
    round_ones = {Fraction(n) for n in (*range(1, 13), 100, 1000, 10_000)}
    for _ in range(3):  # results of results of results
        made = sorted({r for a in known for b in {*known, *round_ones} for r in (a + b, abs(a - b), a * b, a / b if b else a, b / a if a else b)})
        found = {n for n in missing if _near(made, n)}
        if not found or len(known) > 60:
            break
        known, missing = known + sorted(found), missing - found
    return sorted(n for n in missing if n > 12 or n.denominator > 1)


def _near(ascending: list[Fraction], n: Fraction) -> bool:
    """True when one of the numbers is n after rounding to the places that n is written with."""
    places = next((p for p in range(7) if (n * 10**p).denominator == 1), 6)
    half = Fraction(1, 2 * 10**places)
    return bisect.bisect_left(ascending, n - half) < bisect.bisect_right(ascending, n + half)


def stands(number: str, document: str) -> bool:
    """True when the digits stand in the document as a number of their own, or their value does in other writing."""
    return bool(re.search(rf"(?<!\d){re.escape(number)}(?!\d)", document)) or bool(
        set(numbers_in(number)) & set(numbers_in(document))
    )


def unknown_names(answer: str, document: str, question: str) -> list[str]:
    """Capitalised English words inside the answer's sentences that stand in neither document nor question."""
    there = {stem(w) for w in re.findall(r"[a-z]+", f"{document} {question}".lower())}
    names = dict.fromkeys(m[1] for m in _CAPITAL.finditer(answer))
    return [n for n in names if stem(n.lower()) not in there]


def other_language(text: str, language: str) -> str:
    """The language that a text is in when it is not `language`, else "". Short texts and numbers are given the benefit."""
    letters = re.findall(r"[^\W\d_]", text)
    strange = {"ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7af]", "ru": r"[\u0400-\u04ff]", "ar": r"[\u0600-\u06ff]"}
    for name, script in strange.items():
        if len(re.findall(script, text)) > 0.3 * max(1, len(letters)):
            return name
    if letters and language_of(text) != language:
        return language_of(text)
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = {name: sum(w in foreign for w in words) for name, foreign in FUNCTION_WORDS.items()}
    best = max(counts, key=counts.get)
    if language == "en" and counts[best] >= max(3, 0.15 * len(words)) and counts[best] > sum(w in _ENGLISH for w in words):
        return best
    return ""


def little_words_stand(answer: str, document: str) -> bool:
    """True when an answer of short words and signs ("m, cm and ft.") names something, all of it in the document."""
    words = [w for w in re.findall(r"[^\W_]+", answer.lower()) if w not in _LITTLE]
    there = set(re.findall(r"[^\W_]+", document.lower())) if words else set()
    return bool(words) and all(w in there or (re.search(HAN, w) and w in document) for w in words)


def same_words(a: str, b: str, language: str) -> bool:
    """True when two questions ask the same: one's words all in the other's, in nearly the same order.

    The measure is Self-Instruct's, ROUGE-L of 0.7 or more, and in addition neither may hold a word of its own beyond the
    other's: "When was the north bridge built?" and "When was the south bridge built?" differ.
    """
    if language == "zh":
        x, y = ([c for c in re.findall(rf"{HAN}|\w+", re.sub("[的了呢吗是在]", "", t.lower()))] for t in (a, b))
        left, right = set(x), set(y)
    else:
        x, y = (re.findall(r"\w+", t.lower().replace("in which year", "in what year")) for t in (a, b))
        left, right = ({stem(w) for w in t if w not in _LITTLE} for t in (x, y))
    if not x or not y or not (left <= right or right <= left):
        return False
    return 2 * common_run(x, y) / (len(x) + len(y)) >= 0.7


def common_run(x: list[str], y: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(y) + 1)
    for a in x:
        last = 0
        for j, b in enumerate(y, start=1):
            last, row[j] = row[j], last + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


def shingles(text: str, language: str) -> set[tuple[str, ...]]:
    """Runs of eight words (Chinese: sixteen characters), for finding what is copied."""
    pieces, n = (re.findall(r"\w", text), 16) if language == "zh" else (re.findall(r"\w+", text.lower()), 8)
    return {tuple(pieces[i : i + n]) for i in range(len(pieces) - n + 1)}
