"""Needles: small invented facts to hide in a long text, each with a question and the words a right answer must hold.

A single famous sentence would test whether a model knows that sentence. So needles are drawn from a seeded family: a
template (where something is kept, what opens a gate, what to do in a town) filled with names that no haystack holds.
The score is deterministic: the share of a needle's parts that occur in the answer, after both are normalised.

Invariants: the same (n, seed, language) gives the same needles; the n needles of a call have different texts; every
part occurs in its needle's texts and none in its question. `default_haystack` is text that holds none of them. Several
sentences for one question (distractors, chains) are drawn by `needle_variants`. Cost: milliseconds.
"""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from dataclasses import dataclass

from longalign_lib.data.documents import python_topics, read_samples


@dataclass(frozen=True)
class Needle:
    """A fact to hide, or several for one question.

    Attributes:
        text: the sentence whose depth the grid's axis gives.
        parts: what an answer must hold, all of them, to score 1. language: "en" or "zh".
        variant: see `needle_variants`. others: further sentences to hide. wrong: what only distractors hold.
        keys: words by which the question names the fact; a haystack that holds all of them is refused.
    """

    text: str
    question: str
    parts: tuple[str, ...]
    language: str = "en"
    variant: str = "single"
    others: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All sentences to hide, in their order."""
        return (self.text, *self.others)


# The example that made the test popular, kept so that grids can be set beside others'; never the only default needle.
CLASSIC = Needle(
    "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
    "What is the best thing to do in San Francisco?",
    ("sandwich", "Dolores Park"),
)

_TOWNS = (
    "Orlavik",
    "Bramhurst",
    "Castelmora",
    "Tindhal",
    "Quenby",
    "Vasterlo",
    "Marrowdale",
    "Ilsenkirk",
    "Port Hewell",
)
_NAMES = ("Anneke", "Tobias", "Marisol", "Oyelaran", "Katrin", "Benedek", "Sunniva", "Rafaela", "Wendell")
_COLOURS = ("green", "yellow", "purple", "orange", "silver", "crimson")
_ACTS = (
    ("drink lemonade", "lemonade"), ("fly a kite", "kite"), ("play the accordion", "accordion"),
    ("eat a pancake", "pancake"), ("paint a watercolour", "watercolour"), ("ride a tandem", "tandem"),
    ("feed the ducks", "ducks"),
)  # fmt: skip
_SPOTS = ("old lighthouse", "walled orchard", "chapel garden", "stone pier", "tram museum", "willow meadow")
_THINGS = ("umbrella", "violin", "teapot", "compass", "lantern", "telescope")
_PLACES = ("bakery", "boathouse", "greenhouse", "windmill", "bell tower", "barn")
_GATES = ("harbour gate", "garden door", "library vault", "ferry locker", "tower hatch")
_ZH_TOWNS = ("青岚镇", "白石渡", "云梦坡", "柳林口", "望溪村", "松涛寨")
_ZH_NAMES = ("周小满", "陆知遥", "沈听雨", "何以宁", "顾长风")
_ZH_THINGS = ("铜壶", "竹笛", "油纸伞", "砚台", "灯笼")
_ZH_PLACES = ("钟楼", "磨坊", "药铺", "船屋", "茶园")


def _draw_en(rng: random.Random) -> Needle:
    pick, town, name = rng.choice, rng.choice(_TOWNS), rng.choice(_NAMES)
    kind = rng.randrange(3)
    if kind == 0:
        (act, word), spot = pick(_ACTS), pick(_SPOTS)
        text = f"The best thing to do in {town} is to {act} in the {spot} with {name}."
        return Needle(text, f"What is the best thing to do in {town}?", (word, spot), keys=(town,))
    if kind == 1:
        thing, place = f"{pick(_COLOURS)} {pick(_THINGS)}", pick(_PLACES)
        text = f"{name} from {town} keeps the {thing} in the {place}."
        return Needle(text, f"Where does {name} from {town} keep the {thing}?", (place,), keys=(name, town, thing))
    gate, code = pick(_GATES), str(rng.randrange(1000, 10000))
    fact = f"the code that opens the {gate} in {town}"
    return Needle(f"T{fact[1:]} is {code}.", f"What is {fact}?", (code,), keys=(gate, town))


def _draw_zh(rng: random.Random) -> Needle:
    town, name, thing = rng.choice(_ZH_TOWNS), rng.choice(_ZH_NAMES), rng.choice(_ZH_THINGS)
    if rng.randrange(2):
        place = rng.choice(_ZH_PLACES)
        text, keys = f"{town}的{name}把{thing}放在{place}里。", (town, name, thing)
        return Needle(text, f"{town}的{name}把{thing}放在哪里？", (place,), "zh", keys=keys)
    code, keys = str(rng.randrange(1000, 10000)), (name, town)
    return Needle(f"{name}在{town}的门牌密码是{code}。", f"{name}在{town}的门牌密码是多少？", (code,), "zh", keys=keys)


_FAMILIES = {"en": _draw_en, "zh": _draw_zh}


def needle_family(n: int, seed: int = 0, language: str = "en") -> list[Needle]:
    """Draw ``n`` different needles.

    Raises:
        ValueError: an unknown language, or more needles than the family holds.
    """
    if language not in _FAMILIES:
        raise ValueError(f"no needles in language {language!r}; there are {', '.join(_FAMILIES)}")
    rng, found = random.Random(f"needles-{language}-{seed}"), {}
    for attempt in itertools.count():
        if len(found) >= n:
            return list(found.values())
        if attempt > 1000 + 20 * n:
            raise ValueError(
                f"asked for {n} different needles, the {language!r} family gave {len(found)}: ask for fewer"
            )
        needle = _FAMILIES[language](rng)
        found.setdefault(needle.text, needle)


def default_haystack(seed: int = 0, language: str = "en") -> str:
    """Text to hide needles in, its pieces in seeded order.

    English: the interpreter's own language reference, about 110k tokens of prose that every Python carries. Chinese: the
    four Chinese documents of data_samples, about 15,000 characters.
    """
    if language not in _FAMILIES:
        raise ValueError(f"no haystack in language {language!r}; there are {', '.join(_FAMILIES)}")
    pages = python_topics() if language == "en" else [d for d in read_samples()[0] if d.language == "zh"]
    texts = [d.text.strip() for d in pages]
    random.Random(f"haystack-{seed}").shuffle(texts)
    return "\n\n".join(texts)


def normalise(text: str, decimals: bool = False) -> str:
    """Unicode-normalised, case-folded words, one space between; a Chinese character is a word; 7,421 becomes 7421.

    Args:
        decimals: keep 3.5 as one word; otherwise it is two.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"([\u3400-\u9fff\uf900-\ufaff])", r" \1 ", text)
    return " ".join(re.sub(r"[^\w.]+|_+|(?<!\d)\.|\.(?!\d)" if decimals else r"[\W_]+", " ", text).split())


def parts_found(answer: str, parts: tuple[str, ...] | list[str]) -> list[bool]:
    """For each part, whether the answer holds it as whole words; 7421 is none of 0.7421."""
    said = normalise(answer, decimals=True)
    return [f" {normalise(part, decimals=True)} " in f" {said} " for part in parts]


def recall(answer: str, parts: tuple[str, ...] | list[str]) -> float:
    """Share of the parts that the answer holds, 0 to 1."""
    if not parts or not all(normalise(p) for p in parts):
        raise ValueError(f"a needle needs parts with letters or digits to look for, got {parts!r}")
    return sum(parts_found(answer, parts)) / len(parts)
