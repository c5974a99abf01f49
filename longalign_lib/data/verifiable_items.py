"""One question whose answer is known: the facts drawn, the sentences to insert, how to ask and what must be said.

    retrieve  one of 1 to max_facts facts          count  for how many of 3 to 6 keys the text gives a value
    list      the values of 2 to 4 keys            hop    a person, then that person's number
    order     2 to 4 keys as the text has them     chain  the same among 1 to 3 other such pairs
    code      a default, parameters or a constant of real code or of a listing put in

Invariants: no name or value that the text already holds, on one line or over two, is used, and no place that it holds asked
about; draws come from the generator handed in alone, and those of the first five kinds never change, as trained runs depend
on them. Cost: microseconds and one pass over the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from longalign_lib.data.facts import FAMILIES, HOP_PEOPLE, HOP_PLACES, HOPS, SEVERAL
from longalign_lib.data.verifiable_code import ask_code, code_facts, draw_listing, introduction, rivals

KINDS = ("retrieve", "list", "order", "count", "hop")
ALL_KINDS = (*KINDS, "chain", "code")


@dataclass(frozen=True)
class Item:
    """What is put into a document and asked: sentences to insert, question, answer, the strings it must hold (or not)."""

    sentences: tuple[str, ...]
    question: str
    answer: str
    expected: tuple[str, ...]
    names: tuple[str, ...]  # keys and values that the document must not hold beforehand
    ordered: bool = False  # the sentences must keep their order
    wrong: tuple[str, ...] = ()  # what a right reply does not hold: values of the other facts
    pairs: tuple[tuple[str, str], ...] = ()  # "list": each key with its value, in the order asked for
    spots: tuple[float, ...] = ()  # where the answer stands when nothing is inserted, 0..1
    place: str = ""  # "hop", "chain": what is asked about, which the document must not hold beforehand either


def make_item(kind: str, language: str, body: str, rng: np.random.Generator, max_facts: int = 3) -> Item:
    """Draw the facts and the question of one sample; names that the body already holds are drawn again."""
    draws, held = {"hop": _hop, "chain": _chain}, even(body)
    for _ in range(50):
        if kind == "code":
            item = _code(language, body, rng)
        else:
            item = draws[kind](language, rng) if kind in draws else _facts(kind, language, rng, max_facts)
        if not any(name and even(name) in held for name in (*item.names, item.place)):
            return item
    raise ValueError(f"no {kind} facts are left that the document does not already name; give another document")


def even(text: str) -> str:
    """Text in lower case without line ends, so that a name that is wrapped over two lines is found."""
    return re.sub(r"(?<=[一-鿿-]) ", "", " ".join(text.lower().split()))


def _hop(language: str, rng: np.random.Generator) -> Item:
    options = HOPS[language]
    first, second, question, answer = options[int(rng.integers(len(options)))]
    a, b, v = str(rng.choice(HOP_PLACES[language])), HOP_PEOPLE[language](rng), str(int(rng.integers(101, 9999)))
    fill = {"a": a, "b": b, "v": v}
    return Item((first.format(**fill), second.format(**fill)), question.format(**fill), answer.format(**fill), (v,),
                (b, v), place=a)  # fmt: skip


def _chain(language: str, rng: np.random.Generator) -> Item:
    """A hop beside one to three others of the same kind: "the badge number of" alone no longer finds the answer."""
    options = HOPS[language]
    first, second, question, answer = options[int(rng.integers(len(options)))]
    count = int(rng.integers(2, 5))
    places = [str(p) for p in rng.choice(HOP_PLACES[language], size=count, replace=False)]
    people: list[str] = []
    while len(people) < count:
        if (person := HOP_PEOPLE[language](rng)) not in people:
            people.append(person)
    values = [str(v) for v in rng.choice(np.arange(101, 10_000), size=count, replace=False)]
    fills = [{"a": a, "b": b, "v": v} for a, b, v in zip(places, people, values)]
    sentences = tuple(template.format(**fill) for fill in fills for template in (first, second))
    return Item(sentences, question.format(**fills[0]), answer.format(**fills[0]), (values[0],), (*people, *values),
                wrong=tuple(values[1:]), place=places[0])  # fmt: skip


def _code(language: str, body: str, rng: np.random.Generator) -> Item:
    """A question about the text's own code where it has some that can be asked about, else about a listing put in."""
    if facts := code_facts(body):
        fact = facts[int(rng.integers(len(facts)))]
        return Item((), *ask_code(fact, language), fact.values, (), wrong=rivals(fact, facts), spots=(fact.place,))
    listing, facts = draw_listing(rng)
    fact = facts[int(rng.integers(len(facts)))]
    sentence = introduction(language, rng) + listing
    names = tuple(f.name for f in facts[:1])
    return Item((sentence,), *ask_code(fact, language), fact.values, names, wrong=rivals(fact, facts, listing))


def _facts(kind: str, language: str, rng: np.random.Generator, max_facts: int) -> Item:
    families = FAMILIES[language]
    family = families[int(rng.integers(len(families)))]
    count = int(rng.integers(1, max_facts + 1)) if kind == "retrieve" else int(rng.integers(2, 5))
    absent = int(rng.integers(1, 3)) if kind == "count" else 0
    keys = [str(k) for k in rng.choice(family.keys, size=count + absent, replace=False)]
    values: list[str] = []
    while len(values) < count:
        value = family.value(rng)
        if value not in values:
            values.append(value)
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    sentences = tuple(pick(family.facts).format(k=k, v=v) for k, v in zip(keys, values))
    names = (*keys, *values)
    if kind == "retrieve":
        k, v = keys[0], values[0]
        return Item(sentences, pick(family.questions).format(k=k), pick(family.answers).format(k=k, v=v), (v,), names,
                    wrong=tuple(values[1:]))  # fmt: skip
    question, answer = SEVERAL[language][kind]
    comma, asked = SEVERAL[language]["order"][1], [str(k) for k in rng.permutation(keys)]
    question = question.format(p=family.plural, keys=comma.join(asked))
    if kind == "list":
        parts = [family.answers[0].format(k=k, v=values[keys.index(k)]).rstrip(".。") for k in asked]
        stop = "." if language == "en" else "。"
        pairs = tuple((k, values[keys.index(k)]) for k in asked)
        return Item(sentences, question, answer.join(parts) + stop, tuple(values), names, pairs=pairs)
    if kind == "order":
        return Item(sentences, question, answer.join(keys), tuple(keys), names, ordered=True)
    text = answer.format(p=family.plural, n=count, keys=comma.join(keys[:count]))
    wrong = tuple(str(n) for n in (2, 3, 4) if n not in (count, len(keys)))
    return Item(sentences, question, text, (str(count),), names, wrong=wrong)
