"""Ask every prompt of a needle grid once, keep each answer at once, and never ask again what was answered.

Who is asked is a causal language model of transformers in this process, or a `ChatClient` (any OpenAI-compatible endpoint).
The model gets token ids through `prefix.complete`, which computes each shared beginning once; the endpoint gets messages,
``client.concurrency`` at a time.

    key = hash(weights, prompt ids, end tokens, longest answer)          of a model in this process
    key = hash(address, served name, own name, messages, longest answer) of an endpoint, whose weights nobody here can see

All ports of this machine are one address (a local server's port changes with every start): two local servers that serve other
weights under one served name need own names (``name``), or they read each other's answers.

Invariants: a record is one fsynced JSONL line, written before the next answer is awaited, so a kill loses no more than the
answers in flight; a torn last line is asked again; a failed prompt is a record with its reason, and is asked again at the next
start; records of two models never share a key, as far as weights or names tell them apart. A reply without text is an answer, ""
(a miss), unless a filter or a refusal took it. An answer known from another cell or under another name is copied to a line of
its own. Cost: the model's.
"""

from __future__ import annotations

import hashlib
import json
import queue
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from longalign_lib.data.jsonl import append_jsonl, read_jsonl
from longalign_lib.evaluate import prefix
from longalign_lib.evaluate.answering import empty_reply
from longalign_lib.evaluate.generate import Greedy, fingerprint, window_of
from longalign_lib.evaluate.needle_prompt import NeedlePrompt
from longalign_lib.evaluate.needles import parts_found, recall
from longalign_lib.files import whole
from longalign_lib.llm import ChatClient, ChatError, loop

CELL = ("length", "depth", "repeat")
HOPELESS = (401, 404)  # what every other question would get too
EMPTY = {"answer": None, "score": None, "hit": None, "wrong": None, "seconds": None, "reused": 0, "finish": "", "computed": None}


def identity_of(model) -> str:
    """16 hex digits that tell apart who answers: the weights, or the endpoint (this machine without its port) with its model's name."""
    if isinstance(model, ChatClient):
        return hashlib.sha256(model.hash([{"role": "user", "content": ""}], 1).encode()).hexdigest()[:16]
    return fingerprint(model)


def ends_of(model, tokenizer) -> list[int]:
    """The tokens that end an answer, sorted; none for an endpoint, whose server knows them."""
    return [] if isinstance(model, ChatClient) else sorted(Greedy(model, tokenizer).ends)


def key_of(identity: str, prompt: NeedlePrompt, endpoint: bool, max_new_tokens: int, name: str = "", ends: Sequence[int] = ()) -> str:
    """24 hex digits of all that shapes an answer. ``name`` counts for an endpoint alone: other weights may be served there tomorrow.

    Args:
        ends: of `ends_of`.
    """
    asked = [name, *prompt.messages] if endpoint else prompt.input_ids
    settings = {"max_new_tokens": max_new_tokens, "temperature": 0} | ({"ends": list(ends)} if ends else {})
    return hashlib.sha256(json.dumps([identity, asked, settings], sort_keys=True).encode()).hexdigest()[:24]


def score(answer: str, prompt: NeedlePrompt) -> dict:
    """``score``: share of the needle's parts in the answer; ``wrong``: distractors' words in it; ``hit``: all parts, none wrong."""
    needle = prompt.needle
    share, wrong = recall(answer, needle.parts), sum(parts_found(answer, needle.wrong))
    return {"score": share, "wrong": wrong, "hit": share == 1 and not wrong}


def record_of(prompt: NeedlePrompt, repeat: int) -> dict:
    """What is known of a prompt before it is answered."""
    needle = prompt.needle
    return {
        "length": prompt.length, "depth": prompt.depth, "repeat": repeat, "variant": needle.variant, "language": needle.language,
        "tokens": prompt.tokens, "depth_achieved": round(prompt.depth_achieved, 2), "position": prompt.position,
        "depths_achieved": [round(d, 2) for d in prompt.depths_achieved], "needle": needle.text, "others": list(needle.others),
        "question": needle.question, "parts": list(needle.parts), "wrong_parts": list(needle.wrong),
        "prompt_hash": prompt.prompt_hash, "message_hash": prompt.message_hash,
    }  # fmt: skip


def read_results(path: Path | str, broken: list[dict] | None = None) -> pd.DataFrame:
    """The data frame of a JSONL file: the last record of every cell's prompt and model, answered ones before failed ones.

    Args:
        broken: gets {"id": "file:line", "reason"} of lines that a kill tore; without it they are passed over, since what
            they held is asked again.
    """
    found: dict[tuple, dict] = {}
    for row in read_jsonl(path, [] if broken is None else broken):
        place = tuple(row.get(k) for k in ("model", "key", *CELL))
        if place not in found or row.get("status") == "ok" or found[place].get("status") != "ok":
            found[place] = row
    return pd.DataFrame(list(found.values()))


def ask(
    model, tokenizer, prompts: Sequence[tuple[int, NeedlePrompt]], out: Path | str | None = None, *, name: str = "model",
    max_new_tokens: int = 32, reuse_prefix: bool = True, prompts_dir: Path | str | None = None, progress: bool = True,
) -> tuple[pd.DataFrame, prefix.PrefillReport | None]:  # fmt: skip
    """Ask a model for the needles of (repeat, prompt) pairs.

    Args:
        model: a model in this process, or a ChatClient (``tokenizer`` is then not used).
        out: JSONL file that records are appended to and answers are taken from; None keeps them in memory.
        name: what tables call this model; give another one when an endpoint serves other weights under the old served name.
        prompts_dir: folder for what was asked, a text a prompt, named by its hash; None writes none.

    Returns:
        (a row a prompt, in order; the report of saved prefill, or None if nothing was computed in this process).
    """
    endpoint, identity, ends = isinstance(model, ChatClient), identity_of(model), ends_of(model, tokenizer)
    known, written = {}, set()  # answers by key, and the cells that have theirs in the file
    for row in read_jsonl(out, []) if out is not None and Path(out).is_file() else []:
        if row.get("status") == "ok" and {"key", "model", "answer", *CELL} <= set(row):
            known[row["key"]] = row
            if "max_new_tokens" in row:  # a record from before it was kept gets a line with it
                written.add((row["model"], row["key"], *(row[k] for k in CELL)))
    keys = [key_of(identity, p, endpoint, max_new_tokens, name, ends) for _, p in prompts]
    rows: list[dict | None] = [None] * len(prompts)

    def keep(i: int, more: dict) -> None:
        repeat, prompt = prompts[i]
        about = {"key": keys[i], "model": name, "fingerprint": identity, "max_new_tokens": max_new_tokens}
        row = about | record_of(prompt, repeat) | EMPTY | more
        rows[i] = row
        if out is not None and (name, keys[i], *(row[k] for k in CELL)) not in written:
            append_jsonl(out, row)

    open_: dict[str, list[int]] = {}  # by key: equal prompts are asked once
    for i, (_, prompt) in enumerate(prompts):
        if prompts_dir is not None:
            _save_prompt(Path(prompts_dir), prompt, endpoint)
        if keys[i] in known:
            old = known[keys[i]]
            kept = {k: old.get(k, v) for k, v in EMPTY.items()} | score(old["answer"], prompt) | {"status": "ok"}
            keep(i, kept)
        else:
            open_.setdefault(keys[i], []).append(i)
    todo = list(open_.values())

    def answered(k: int, more: dict) -> None:
        for i in todo[k]:
            if "answer" in more:
                more = more | score(more["answer"], prompts[i][1])
            keep(i, more)

    first = [prompts[group[0]][1] for group in todo]
    report = None
    if first and endpoint:
        _ask_endpoint(model, first, max_new_tokens, answered, progress, name)
    elif first:
        report = _ask_model(model, tokenizer, first, max_new_tokens, answered, reuse_prefix, progress, name)
    window = None if endpoint else window_of(model)
    frame = pd.DataFrame(rows)
    frame["beyond_window"] = [window is not None and p.tokens + max_new_tokens > window for _, p in prompts]
    return frame, report


def _ask_model(model, tokenizer, prompts, most, answered: Callable[[int, dict], None], reuse, progress, name):
    def on_answer(k: int, said) -> None:
        answered(k, {"answer": said.text, "status": "ok", "seconds": round(said.seconds, 3), "reused": said.reused,
                     "computed": said.prompt_tokens - said.reused, "finish": said.finish})  # fmt: skip

    def on_error(k: int, error: RuntimeError) -> None:  # out of memory, mostly: the rest of the grid is asked all the same
        answered(k, {"status": f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"})

    ids = [np.asarray(p.input_ids) for p in prompts]
    _, report = prefix.complete(model, tokenizer, ids, most, on_answer, on_error=on_error, reuse_prefix=reuse,
                                progress=progress, desc=f"needles, {name}")  # fmt: skip
    return report


def _ask_endpoint(client: ChatClient, prompts, most, answered: Callable[[int, dict], None], progress, name) -> None:
    left, said, refused = iter(enumerate(prompts)), queue.SimpleQueue(), []

    async def worker() -> None:
        for k, prompt in left:
            try:
                if refused:
                    raise ChatError(f"not asked, since another question got: {refused[0]}")
                outcome = await client.achat(prompt.messages, max_tokens=most)
            except ChatError as error:
                outcome = error
                if error.status in HOPELESS:
                    refused.append(error)
            said.put((k, outcome))

    async def work() -> None:
        import asyncio

        try:
            await asyncio.gather(*(worker() for _ in range(client.concurrency)))
        finally:
            said.put(None)

    future = loop.submit(work())
    try:
        with tqdm(total=len(prompts), desc=f"needles, {name}", disable=not progress, leave=False) as bar:
            while (answer := said.get()) is not None:
                k, outcome = answer
                if isinstance(outcome, ChatError) and (finish := empty_reply(outcome)) is not None:
                    answered(k, {"answer": "", "status": "ok", "finish": finish})
                elif isinstance(outcome, ChatError):
                    answered(k, {"status": f"failed: {type(outcome).__name__}: {str(outcome)[:300]}"})
                else:
                    answered(k, {"answer": outcome.text, "status": "ok", "finish": outcome.finish_reason})
                bar.update()
        future.result()
    finally:
        future.cancel()


def _save_prompt(folder: Path, prompt: NeedlePrompt, endpoint: bool) -> None:
    path = folder / f"{prompt.message_hash if endpoint else prompt.prompt_hash}.txt"
    if not path.is_file():
        with whole(path) as half:
            half.write_text(prompt.message if endpoint else prompt.text, encoding="utf-8", newline="\n")
