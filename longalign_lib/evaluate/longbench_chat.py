"""LongBench-Chat: real questions about long documents, answered by a model and kept one by one.

An item is a question about one document with an expert's reference and rated example answers (for the judge). The model
gets document and question as one user message; a document that does not fit the window loses its **middle**, as in
the paper (section 4.1), and how much was lost is recorded. Answers come from a model in process or from any chat
endpoint, and each is appended to a JSONL file under a hash of model and prompt, so that a run that was cut off
continues.

Two file formats are read: our own (`read_items`, data_samples/longbench_chat) and the published one (`read_published`):
test_cases.json, a JSON array of {"idx", "prompt", "query", "answer"}, whose prompt is the document and the query together,
and few_shots.json, whose entry idx - 1 is a list of {"answer", "score"}. Files that name a document's file in place of the
prompt are read too.
Cost: one forward pass over each prompt and the tokens of each answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from longalign_lib.data.documents import Document
from longalign_lib.data.text import language_of, token_ids
from longalign_lib.evaluate import published
from longalign_lib.evaluate.answering import Prompt, ask, rendered_ids
from longalign_lib.evaluate.fit import cut_middle
from longalign_lib.evaluate.published import Fields

SAMPLES = Path(__file__).resolve().parents[2] / "data_samples" / "longbench_chat"


CASES, SHOTS = "test_cases.json", "few_shots.json"


@dataclass(frozen=True)
class Item:
    """A question about a document. ``answers``: rated examples, {"text", "score"} each, best first.

    ``asked``: what stands behind the document in the prompt, where that is not the question ("" for nothing: the
    document of a published case may hold its question already).
    """

    id: str
    document_id: str
    language: str
    question: str
    reference: str
    answers: tuple[dict, ...]
    asked: str | None = None


@dataclass(frozen=True)
class LongPrompt:
    """What a model is asked: messages, token count after the chat template, tokens of the document before and lost."""

    messages: list[dict]
    tokens: int
    document_tokens: int
    left_out: int

    @property
    def prompt_hash(self) -> str:
        """16 hex digits of the messages."""
        return hashlib.sha256(json.dumps(self.messages, ensure_ascii=False).encode()).hexdigest()[:16]


def read_items(folder: str | Path | None = None) -> list[Item]:
    """Read the items of every .jsonl file of a folder (or of one file), by file name and line.

    Args:
        folder: None means data_samples/longbench_chat of this repository.

    Raises:
        ValueError: a record without one of the fields, a score that is no number, an id seen twice; names file and line.
        FileNotFoundError: nothing there.
    """
    folder = Path(folder) if folder is not None else SAMPLES
    files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"no .jsonl file in {folder.name}/: give a folder of items, or one file")
    items: dict[str, Item] = {}
    for path in files:
        for record in published.records(path):
            fields = {k: record.get(k, str) for k in ("id", "document_id", "language", "question", "reference")}
            answers = _rated(record.get("answers", list, "rated answers", empty=True), record.where, "text")
            if fields["id"] in items:
                raise ValueError(f"{record.where}: the id {fields['id']} occurs twice")
            items[fields["id"]] = Item(**fields, answers=answers)
    return list(items.values())


def _rated(answers: Sequence, where: str, text: str) -> tuple[dict, ...]:
    """Rated examples as {"text", "score"}, best first; ``text`` names the field that holds the answer."""
    found = []
    for number, answer in enumerate(answers, start=1):
        record = Fields(answer, f"{where}, example answer {number}")
        score = record.get("score", (int, float), "the rating of this answer, a number")
        found.append({"text": record.get(text, str), "score": score})
    return tuple(sorted(found, key=lambda a: -a["score"]))


def read_published(
    cases: str | Path, shots: str | Path | None = None, documents: str | Path | None = None
) -> tuple[list[Item], dict[str, Document]]:
    """Read LongBench-Chat's published files (repository THUDM/LongAlign, folder LongBench_Chat).

    A case needs ``query`` and ``answer``, and its document: in ``prompt`` (document and query together, as published), in
    ``context``, or in a text file that ``file`` names. ``idx`` (from 1) and ``language`` are made up where they are missing.

    Args:
        cases: test_cases.json, or a folder that holds it. JSON array or JSON Lines.
        shots: few_shots.json; by default the one beside the cases. Without one, items have no rated examples.
        documents: the folder of the documents' files; by default the cases' own. No path may lead out of it.

    Returns:
        (items, documents by id). An item's id is "lbc-" and its idx.

    Raises:
        ValueError: a key missing, empty or of the wrong type, an idx seen twice, fewer few-shots than cases, a path that
            leaves the folder; names file and line. FileNotFoundError: cases, few-shots or a document missing.
    """
    cases = Path(cases) / CASES if Path(cases).is_dir() else Path(cases)
    if shots is None:
        shots = cases.with_name(SHOTS) if cases.with_name(SHOTS).is_file() else None
    rated = list(published.records(shots)) if shots is not None else []
    items, texts = {}, {}
    for number, case in enumerate(published.records(cases), start=1):
        idx = case.get("idx", int) if "idx" in case else number
        query, answer, name = case.get("query", str), case.get("answer", str, "the reference"), f"lbc-{idx}"
        if name in items:
            raise ValueError(f"{case.where}: idx {idx} occurs twice")
        text, asked = _document(case, query, documents or cases.parent)
        if rated and not 1 <= idx <= len(rated):
            raise ValueError(f"{case.where}: idx {idx} has no entry in {Path(shots).name}, which has {len(rated)}; idx counts from 1")
        examples = rated[idx - 1] if rated else None
        if examples is not None and not isinstance(examples.values, list):
            raise ValueError(f"{examples.where}: entry {idx} must be a list of {{answer, score}}")
        graded = _rated(examples.values, examples.where, "answer") if examples is not None else ()
        language = case.get("language", str) if "language" in case else language_of(query)
        items[name] = Item(name, name, language, query.strip(), answer.strip(), graded, asked)
        texts[name] = Document(name, text, "local", language)
    return list(items.values()), texts


def _document(case: Fields, query: str, folder: str | Path) -> tuple[str, str | None]:
    """(the document, what is asked behind it; None: the query)."""
    if "prompt" in case:
        prompt = case.get("prompt", str)
        ends = prompt.rstrip().endswith(query.strip())
        text = prompt.rstrip()[: -len(query.strip())].rstrip() if ends else prompt
        return (text, None) if ends and text else (prompt, "")
    if "context" in case:
        return case.get("context", str), None
    if "file" not in case:
        case.get("prompt", str, "the document and the query; or context, or file with the document's path")
    path = published.inside(folder, case.get("file", str), case.where)
    text = published.read_text(path)
    if not text.strip():
        raise ValueError(f"{case.where}: the document {path.name} is empty")
    return text, None


def fit_prompt(
    tokenizer, messages_of: Callable[[str], list[dict]], document: str, window: int, max_new_tokens: int, what: str
) -> LongPrompt:
    """The messages for as much of a document as fits; what does not fit is left out of its middle.

    Args:
        messages_of: text -> chat messages around it.
        window: tokens for prompt, template included, and answer. what: names the item in the error.

    Raises:
        ValueError: a window that messages and template alone exceed, with the smallest one that works.
    """
    whole, scaffold = len(token_ids(tokenizer, document)), len(rendered_ids(tokenizer, messages_of("")))
    room = window - max_new_tokens - scaffold
    if room < min(32, whole):
        raise ValueError(
            f"a window of {window} tokens has no room for the document of {what}: question and template take "
            f"{scaffold}, the answer {max_new_tokens}; ask for a window of {scaffold + max_new_tokens + 32} or more"
        )
    while True:
        text, left_out = cut_middle(tokenizer, document, room)
        messages = messages_of(text)
        tokens = len(rendered_ids(tokenizer, messages))
        if tokens <= window - max_new_tokens:
            return LongPrompt(messages, tokens, whole, left_out)
        room -= tokens - (window - max_new_tokens)


def build_prompt(tokenizer, item: Item, document: str, window: int, max_new_tokens: int) -> LongPrompt:
    """Document and question as one user message of at most ``window - max_new_tokens`` tokens, template included.

    Raises:
        ValueError: a window that the question and the template alone exceed.
    """
    asked = item.question if item.asked is None else item.asked

    def messages_of(text: str) -> list[dict]:
        return [{"role": "user", "content": f"{text}\n\n{asked}" if asked else text}]

    return fit_prompt(tokenizer, messages_of, document, window, max_new_tokens, item.id)


def answer_items(
    answerer, tokenizer, items: Sequence[Item], documents: Mapping[str, Document], window: int,
    max_new_tokens: int = 256, out: Path | str | None = None, name: str = "model", progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Answer every item and keep what was said.

    Args:
        answerer: a causal language model of transformers, or any object with ``chat`` (an `llm.ChatClient`).
        tokenizer: counts tokens, and for a model in process encodes the prompt.
        documents: by id.
        window: tokens for prompt and answer; longer documents lose their middle.
        out: JSONL file of the answers, read back at the next call; None keeps none.
        name: what tables call this model; part of the key.

    Returns:
        A row an item: id, language, question, reference, document_tokens, left_out, tokens, answer, status, finish, model,
        prompt_hash, key.

    Raises:
        KeyError: an item whose document is not among ``documents``.
    """
    missing = sorted({i.document_id for i in items} - set(documents))
    if missing:
        raise KeyError(f"no document for {', '.join(missing)}; there are {', '.join(sorted(documents))}")
    built = [build_prompt(tokenizer, i, documents[i.document_id].text, window, max_new_tokens) for i in items]
    prompts = [Prompt(i.id, p.messages, max_new_tokens) for i, p in zip(items, built)]
    rows = []
    for item, prompt, row in zip(items, built, ask(answerer, tokenizer, prompts, out, name, progress)):
        facts = {"language": item.language, "document_tokens": prompt.document_tokens, "left_out": prompt.left_out}
        rows.append(row | facts | {"tokens": prompt.tokens, "question": item.question, "reference": item.reference})
    return pd.DataFrame(rows)
