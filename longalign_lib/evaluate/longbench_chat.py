"""LongBench-Chat: real questions about long documents, answered by a model and kept one by one.

An item is a question about one document with an expert's reference and rated example answers (for the judge). The model
gets document and question as one user message; a document that does not fit the window loses its **middle**, as in
the paper (section 4.1), and how much was lost is recorded. Answers come from a model in process or from any chat
endpoint, and each is appended to a JSONL file under a hash of model and prompt, so that a run that was cut off
continues.
Cost: one forward pass over each prompt and the tokens of each answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from longalign_lib.data.documents import Document
from longalign_lib.data.jsonl import append_jsonl, iter_jsonl, read_jsonl
from longalign_lib.data.text import token_ids
from longalign_lib.evaluate.fit import cut_middle
from longalign_lib.evaluate.generate import Greedy, fingerprint

SAMPLES = Path(__file__).resolve().parents[2] / "data_samples" / "longbench_chat"


@dataclass(frozen=True)
class Item:
    """A question about a document. ``answers``: rated examples, {"text", "score"} each, best first."""

    id: str
    document_id: str
    language: str
    question: str
    reference: str
    answers: tuple[dict, ...]


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
        ValueError: a record without one of the fields, a score that is no number, an id seen twice; names file and id.
        FileNotFoundError: nothing there.
    """
    folder = Path(folder) if folder is not None else SAMPLES
    files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"no .jsonl file in {folder.name}/: give a folder of items, or one file")
    items: dict[str, Item] = {}
    for path in files:
        for number, record in enumerate(iter_jsonl(path), start=1):
            where = f"{path.name}, record {number} ({record.get('id', 'no id')})"
            fields = {k: record.get(k) for k in ("id", "document_id", "language", "question", "reference")}
            empty = [k for k, v in fields.items() if not isinstance(v, str) or not v.strip()]
            answers = record.get("answers")
            if empty or not isinstance(answers, list):
                raise ValueError(f"{where}: {', '.join(empty) or 'answers'} missing or of the wrong type")
            for a in answers:
                if (
                    not isinstance(a, dict)
                    or not isinstance(a.get("text"), str)
                    or type(a.get("score")) not in (int, float)
                ):
                    raise ValueError(
                        f"{where}: an example answer needs a text and a number as its score, got {str(a)[:60]}"
                    )
            if fields["id"] in items:
                raise ValueError(f"{where}: this id occurs twice")
            best_first = sorted(answers, key=lambda a: -a["score"])
            items[fields["id"]] = Item(
                **fields, answers=tuple({"text": a["text"], "score": a["score"]} for a in best_first)
            )
    return list(items.values())


def build_prompt(tokenizer, item: Item, document: str, window: int, max_new_tokens: int) -> LongPrompt:
    """Document and question as one user message of at most ``window - max_new_tokens`` tokens, template included.

    Raises:
        ValueError: a window that the question and the template alone exceed.
    """

    def rendered(text: str) -> tuple[list[dict], int]:
        messages = [{"role": "user", "content": f"{text}\n\n{item.question}"}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return messages, len(token_ids(tokenizer, whole))

    whole, scaffold = len(token_ids(tokenizer, document)), rendered("")[1]
    room = window - max_new_tokens - scaffold
    if room < 32:
        raise ValueError(
            f"a window of {window} tokens has no room for the document of {item.id}: question and template take "
            f"{scaffold}, the answer {max_new_tokens}; ask for a window of {scaffold + max_new_tokens + 32} or more"
        )
    while True:
        text, left_out = cut_middle(tokenizer, document, room)
        messages, tokens = rendered(text)
        if tokens <= window - max_new_tokens:
            return LongPrompt(messages, tokens, whole, left_out)
        room -= tokens - (window - max_new_tokens)


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
        A row an item: id, language, question, reference, document_tokens, left_out, tokens, answer, status, model, key.

    Raises:
        KeyError: an item whose document is not among ``documents``.
    """
    missing = sorted({i.document_id for i in items} - set(documents))
    if missing:
        raise KeyError(f"no document for {', '.join(missing)}; there are {', '.join(sorted(documents))}")
    remote = hasattr(answerer, "chat")
    identity = str(getattr(answerer, "model", "")) if remote else fingerprint(answerer)
    greedy = None if remote else Greedy(answerer, tokenizer)
    old = read_jsonl(out, rejected=[]) if out is not None and Path(out).is_file() else []
    known = {r["key"]: r for r in old if r.get("status") == "ok"}
    rows = []
    for item in tqdm(items, desc=f"questions, {name}", disable=not progress, leave=False):
        prompt = build_prompt(tokenizer, item, documents[item.document_id].text, window, max_new_tokens)
        content = json.dumps([identity, name, prompt.prompt_hash, max_new_tokens])
        row = {"key": hashlib.sha256(content.encode()).hexdigest()[:24], "model": name, "id": item.id}
        if row["key"] not in known:
            row |= {"prompt_hash": prompt.prompt_hash, "tokens": prompt.tokens} | _answer(
                answerer, greedy, prompt, max_new_tokens
            )
            if out is not None:
                append_jsonl(out, row)
        else:
            row = known[row["key"]]
        facts = {"language": item.language, "document_tokens": prompt.document_tokens, "left_out": prompt.left_out}
        rows.append(row | facts | {"question": item.question, "reference": item.reference})
    return pd.DataFrame(rows)


def _answer(answerer, greedy: Greedy | None, prompt: LongPrompt, max_new_tokens: int) -> dict:
    """The answer, or why there is none: one failed item does not lose the others."""
    try:
        if greedy is None:
            text = answerer.chat(prompt.messages, max_tokens=max_new_tokens, temperature=0.0).text
        else:
            tokenizer = greedy.tokenizer
            whole = tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
            text = greedy.answer(token_ids(tokenizer, whole), max_new_tokens).text
    except (RuntimeError, OSError) as error:
        return {"answer": "", "status": f"failed: {type(error).__name__}: {str(error)[:200]}"}
    return {"answer": text, "status": "ok"}
