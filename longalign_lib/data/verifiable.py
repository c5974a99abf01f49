"""Verifiable long instructions: real documents, made-up facts put into them, questions whose answers are known.

No model is asked, so every answer is right by construction and costs nothing. Facts stand at sentence boundaries of
the text (not of its tokens), at depths drawn uniformly; other facts of the same family serve as distractors.

    retrieve  one fact asked for                   hop    the answer needs two facts
    list      several facts asked for              order  keys in the order in which they appear
    count     how many of some keys have a fact    chain  a hop among others of its kind, so that both facts are needed
    code      a default, parameters or a constant, read from real code or from a listing put in (`verifiable_code`)

    ... a real sentence. The access code of the north archive is 48213. The next real sentence ...

    What is the access code of the north archive?  ->  The access code of the north archive is 48213.

Replies are marked by `is_right` (`verifiable_answers`); `verifiable_build` writes files of samples that survive kills.

Invariants: the whole chat has at most max_tokens tokens; a key or value that the document already holds is not used, nor the
place that a hop asks about, and each stands in the text as often as the inserted sentences say; no question holds its
answer; the same arguments give the same samples. Cost: two tokenisations a sample and one of each document; 2,000 samples of
up to 4k tokens take about half a minute on one core.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm

from longalign_lib.data.documents import Document
from longalign_lib.data.facts import FAMILIES
from longalign_lib.data.text import language_of, sentence_ends
from longalign_lib.data.tokens import encode_chat
from longalign_lib.data.verifiable_answers import is_right
from longalign_lib.data.verifiable_items import ALL_KINDS, KINDS, Item, even, make_item

__all__ = ["ALL_KINDS", "KINDS", "Item", "insert_sentences", "is_right", "make_item", "retrieval_samples"]


def retrieval_samples(
    documents: Sequence[Document],
    tokenizer,
    n: int,
    max_tokens: int,
    seed: int,
    min_tokens: int = 256,
    kinds: Sequence[str] = ("retrieve",),
    max_facts: int = 3,
    progress: bool = True,
) -> list[dict]:
    """Build n verifiable samples over real documents.

    Args:
        documents: at least one; a sample's language is its document's. A document shorter than the drawn length is
            continued with others of its language.
        tokenizer: with a chat template; lengths are counted with it.
        n: how many samples.
        max_tokens, min_tokens: the whole chat's length is drawn uniformly between them (and hit within a sentence).
        seed: of this call's own generator.
        kinds: drawn uniformly from these (all are in ALL_KINDS); see the module's text.
        max_facts: a "retrieve" sample holds 1 to max_facts facts of which one is asked for.
        progress: show a bar when it takes longer than two seconds.

    Returns:
        n samples: {"messages", "length" (tokens), "source", "task" ("verifiable:<kind>"), "language", "document_id",
        "model": "none", "prompt_hash", "expected" (strings the answer must hold), "wrong" (strings it must not hold),
        "pairs" (of a list: key and value), "depths" (0..1, of the text)}.

    Raises:
        ValueError: an unknown kind, no documents, or bounds that no sample can meet.
    """
    check_arguments(documents, kinds, min_tokens, max_tokens)
    rng = np.random.default_rng(seed)
    pool = Pool(documents, tokenizer)
    samples = []
    for _ in tqdm(range(n), desc="verifiable", leave=False, delay=2, disable=not progress):
        kind = str(rng.choice(list(kinds)))
        samples.append(draw_sample(pool, kind, min_tokens, max_tokens, max_facts, rng))
    return samples


def check_arguments(documents: Sequence[Document], kinds: Sequence[str], min_tokens: int, max_tokens: int) -> None:
    """Raise ValueError for an unknown kind, no documents, or bounds in the wrong order."""
    unknown = [kind for kind in kinds if kind not in ALL_KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds {unknown or '()'} unknown; accepted: {', '.join(ALL_KINDS)}")
    if not documents:
        raise ValueError("no documents given; read some with longalign_lib.data.documents")
    if not 0 < min_tokens <= max_tokens:
        raise ValueError(f"min_tokens {min_tokens} and max_tokens {max_tokens}: need 0 < min_tokens <= max_tokens")


def insert_sentences(
    body: str, sentences: Sequence[str], depths: Sequence[float], language: str
) -> tuple[str, list[float]]:
    """Put sentences into a text at its sentence boundaries nearest to the wanted depths.

    Args:
        body: the text. sentences: to insert. depths: wanted places, 0 (before all) to 1 (behind all).
        language: "en" puts a space around them, "zh" none.

    Returns:
        (text, depths achieved, as fractions of the body's characters).
    """
    places = np.array([0, *sentence_ends(body)])
    chosen = [int(places[np.abs(places - d * len(body)).argmin()]) for d in depths]
    gap = " " if language == "en" else ""
    text = body
    for i in sorted(range(len(sentences)), key=lambda i: (chosen[i], i), reverse=True):
        p = chosen[i]
        piece = sentences[i] + gap if p == 0 else gap + sentences[i]
        text = text[:p] + piece + text[p:]
    return text, [round(p / max(1, len(body)), 4) for p in chosen]


# ------------------------------------------------------------------------------------------------------------- bodies
class Pool:
    """Documents cut into sentences with the token count of each, so that a body of any length is a sum away."""

    def __init__(self, documents: Sequence[Document], tokenizer) -> None:
        self.tokenizer = tokenizer
        self.documents = list(documents)
        self.language = [d.language if d.language in FAMILIES else language_of(d.text) for d in documents]
        self.ends: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        for document in self.documents:
            ends = np.array(sentence_ends(document.text))
            pieces = [document.text[a:b] for a, b in zip([0, *ends[:-1]], ends)]
            ids = self.tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
            self.ends.append(ends)
            self.counts.append(np.array([len(x) for x in ids], dtype=np.int64))

    def body(self, first: int, budget: int, rng: np.random.Generator) -> tuple[str, str, list[Document]]:
        """A text of `budget` tokens or a sentence less, from document `first` on: (text, language, documents)."""
        language = self.language[first]
        others = [i for i in range(len(self.documents)) if self.language[i] == language and i != first]
        texts, used = [], []
        for i in [first, *(int(j) for j in rng.permutation(others))] if others else [first]:
            cumulative = np.concatenate([[0], np.cumsum(self.counts[i])])
            latest = int(np.searchsorted(cumulative, cumulative[-1] - budget, side="right"))
            start = int(rng.integers(latest)) if latest > 0 else 0
            stop = int(np.searchsorted(cumulative, cumulative[start] + budget, side="right")) - 1
            if stop <= start:
                break
            begin = 0 if start == 0 else int(self.ends[i][start - 1])
            texts.append(self.documents[i].text[begin : int(self.ends[i][stop - 1])].strip())
            used.append(self.documents[i])
            budget -= int(cumulative[stop] - cumulative[start]) + 2
            if latest > 0 or budget < 16:
                break
        return "\n\n".join(texts), language, used


def draw_sample(pool: Pool, kind: str, low: int, high: int, max_facts: int, rng: np.random.Generator) -> dict:
    """One sample of low to high tokens, its wanted length drawn uniformly between them."""
    for attempt in range(60):
        if attempt % 6 == 0:  # another document and length; the five attempts behind this one correct its room
            first, target = int(rng.integers(len(pool.documents))), int(rng.integers(low, high + 1))
            room = target
        text, language, used = pool.body(first, max(24, room), rng)
        if not text:  # the next sentence there is longer than the room: draw another place
            continue
        try:
            item = make_item(kind, language, text, rng, max_facts)
        except ValueError:  # this text holds too many of the names; another place may not
            continue
        depths = rng.random(len(item.sentences))
        text, depths = insert_sentences(text, item.sentences, sorted(depths) if item.ordered else depths, language)
        if not _unique(item, text):
            continue
        user = f"{text}\n\n{item.question}"
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": item.answer}]
        length = len(encode_chat(pool.tokenizer, messages)[0])
        if low <= length <= min(high, target + 4):
            return {
                "messages": messages,
                "length": length,
                "source": used[0].source,
                "task": f"verifiable:{kind}",
                "language": language,
                "document_id": "+".join(d.id for d in used),
                "model": "none",
                "prompt_hash": hashlib.sha256(user.encode()).hexdigest()[:16],
                "expected": list(item.expected),
                "wrong": list(item.wrong),
                "pairs": [list(pair) for pair in item.pairs],
                "depths": depths or list(item.spots),
            }
        room -= length - target  # facts, question, answer and the chat's frame take their part
    raise ValueError(
        f"no {kind} sample of {low} to {high} tokens could be built: either the documents of one language hold too few "
        "tokens (add documents or lower min_tokens), or the chat's frame, the facts and one sentence need more (raise "
        "max_tokens)"
    )


def _unique(item: Item, text: str) -> bool:
    """True when each name stands in the text as often as in what was inserted, and the question holds no answer."""
    inserted, held, asked = even("\n".join(item.sentences)), even(text), item.question.lower()
    names = [even(name) for name in item.names]
    holds = item.ordered or not any(value.lower() in asked for value in item.expected)
    return holds and all(held.count(name) == inserted.count(name) for name in names)
