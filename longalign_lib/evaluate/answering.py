"""Ask many prompts of one model, keep each answer at once, and never ask again what was answered.

A prompt is a list of chat messages with an id. Whoever answers is a causal language model of transformers in this process,
or anything with ``chat`` (an `llm.ChatClient`: any OpenAI-compatible endpoint, which gets several requests at a time).

Invariants: an answer is one fsynced JSONL line under a hash of model fingerprint, prompt and settings, of a model in this process
its token ids (the chat template's work) and end tokens too, so a run that was killed goes on with the next one and two models
never read each other's, as far as weights or names tell them apart (`identity_of`); one failure does not lose the others, and is
asked again by the next run. A reply without text is an answer, "", unless a filter or a refusal took it. Decoding is greedy
(temperature 0). Cost: the model's; a millisecond a record, and the tokenizer's over each prompt.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from longalign_lib.data.jsonl import append_jsonl, read_jsonl
from longalign_lib.data.text import token_ids
from longalign_lib.evaluate.generate import Greedy, fingerprint
from longalign_lib.llm import EmptyReplyError

OK = "ok"


@dataclass(frozen=True)
class Prompt:
    """What is asked: chat messages, under an id of its file, and how long the answer may be (tokens)."""

    id: str
    messages: Sequence[Mapping]
    max_new_tokens: int = 256

    @property
    def prompt_hash(self) -> str:
        """16 hex digits of the messages."""
        return hashlib.sha256(json.dumps(list(self.messages), ensure_ascii=False).encode()).hexdigest()[:16]


def identity_of(answerer) -> str:
    """What tells two models apart: the fingerprint of the weights, or an endpoint's address (all ports of this machine are one) and
    model name."""
    if not hasattr(answerer, "chat"):
        return fingerprint(answerer)
    if hasattr(answerer, "hash"):
        return answerer.hash([{"role": "user", "content": ""}], 1)[:16]
    return str(getattr(answerer, "model", ""))


def key_of(identity: str, name: str, prompt: Prompt, ids: Sequence[int] = (), ends: Sequence[int] = ()) -> str:
    """24 hex digits of model, prompt and settings: the name under which an answer is kept.

    Args:
        ids, ends: what a model in this process gets for the prompt, and the tokens that end its answer, sorted.
    """
    seen = [list(ids), list(ends)] if ids or ends else []
    content = json.dumps([identity, name, prompt.prompt_hash, prompt.max_new_tokens, *seen])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def ask(
    answerer, tokenizer, prompts: Sequence[Prompt], out: Path | str | None = None, name: str = "model", progress: bool = True,
    desc: str = "questions",
) -> list[dict]:  # fmt: skip
    """Answers, one for each prompt, in order.

    Args:
        answerer: see the module's head; an endpoint's ``concurrency`` says how many requests are in flight.
        tokenizer: of the model in this process; an endpoint needs none here.
        out: JSONL file of the answers, read back at the next call; None keeps none.
        name: what tables call this model; part of the key.

    Returns:
        {"key", "model", "id", "prompt_hash", "answer", "status" ("ok" or "failed: why"), "finish"} each.
    """
    remote, identity = hasattr(answerer, "chat"), identity_of(answerer)
    greedy = None if remote else Greedy(answerer, tokenizer)
    known, lock = known_answers(out), threading.Lock()
    ends = [] if remote else sorted(greedy.ends)
    keys = [key_of(identity, name, p, () if remote else rendered_ids(tokenizer, p.messages), ends) for p in prompts]
    rows: dict[str, dict] = {key: known[key] for key in keys if key in known}
    new = {key: p for key, p in zip(keys, prompts) if key not in known}

    def one(key: str, prompt: Prompt) -> dict:
        row = {"key": key, "model": name, "id": prompt.id, "prompt_hash": prompt.prompt_hash} | _answer(answerer, greedy, prompt)
        if out is not None:
            with lock:
                append_jsonl(out, row)
        return row

    with tqdm(total=len(prompts), initial=len(prompts) - len(new), desc=f"{desc}, {name}", disable=not progress, leave=False) as bar:
        workers = max(1, int(getattr(answerer, "concurrency", 1) or 1)) if remote else 1
        if workers == 1:
            for key, prompt in new.items():
                rows[key] = one(key, prompt)
                bar.update()
        else:
            with ThreadPoolExecutor(workers) as pool:
                tasks = {pool.submit(one, key, prompt): key for key, prompt in new.items()}
                try:
                    for task in as_completed(tasks):
                        rows[tasks[task]] = task.result()
                        bar.update()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [rows[key] | {"id": p.id} for key, p in zip(keys, prompts)]


def known_answers(out: Path | str | None) -> dict[str, dict]:
    """The good answers of a file, by key; a torn line (an earlier kill) is passed over and asked again."""
    old = read_jsonl(out, rejected=[]) if out is not None and Path(out).is_file() else []
    return {r["key"]: r for r in old if r.get("status") == OK and isinstance(r.get("answer"), str) and "key" in r}


def _answer(answerer, greedy: Greedy | None, prompt: Prompt) -> dict:
    """The answer, or why there is none: one failed item does not lose the others."""
    try:
        if greedy is None:
            reply = answerer.chat([dict(m) for m in prompt.messages], max_tokens=prompt.max_new_tokens, temperature=0.0)
            text, finish = reply.text, getattr(reply, "finish_reason", "")
        else:
            said = greedy.answer(rendered_ids(greedy.tokenizer, prompt.messages), prompt.max_new_tokens)
            text, finish = said.text, said.finish
    except (RuntimeError, OSError) as error:  # ChatError is a RuntimeError; so is a GPU that is out of memory
        if (finish := empty_reply(error)) is not None:
            return {"answer": "", "status": OK, "finish": finish}
        return {"answer": "", "status": f"failed: {type(error).__name__}: {str(error)[:200]}", "finish": ""}
    return {"answer": text, "status": OK, "finish": finish}


def empty_reply(error: Exception) -> str | None:
    """The finish reason of a reply in which the model said nothing; None for any other error, a filter's or a refusal too."""
    if not isinstance(error, EmptyReplyError) or error.finish in ("content_filter", "refusal"):
        return None
    return error.finish


def rendered_ids(tokenizer, messages: Sequence[Mapping]) -> list[int]:
    """Token ids of the messages in the chat template, ready for the answer.

    Raises:
        ValueError: a tokenizer without chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: give an instruction-tuned model, or set tokenizer.chat_template")
    whole = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    return token_ids(tokenizer, whole)
