"""Self-Instruct over long documents, as in section 3.1 of the LongAlign paper (prompts and list parsing in `prompts`).

For each document: draw one of four task types; ask the model for five questions of that type as a numbered list; draw
one of those that pass the gates; ask for its answer with the document before it. The sample is

    user       document + "\\n\\n" + question            assistant       answer

    documents ─► workers ─► outcomes.jsonl (a line each, flushed, as they come) ─► instructions.jsonl, rejected.jsonl

Invariants: a document has one outcome, at the end a line in instructions.jsonl or in rejected.jsonl (with the reason and what
the model wrote); the draws depend on (seed, document id) alone, and both files are in the order of the documents, so that
order, concurrency, kills and restarts change nothing; a rerun skips documents that have an outcome. An endpoint's failure is
no outcome: that document is asked again by the next run; instructions.settings.json keeps a folder from being continued with another
model, other prompts, seed or other setting. Cost: two calls a document, each as long as the document.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from longalign_lib.data.documents import Document
from longalign_lib.data.gates import check_answer, check_question
from longalign_lib.data.outcomes import Built, Outcomes, text_hash
from longalign_lib.data.prompts import (
    ASK_ANSWER,
    ASK_QUESTIONS,
    QUESTIONS,
    TASK_PROMPTS,
    TASKS,
    answer_prompt,
    parse_questions,
    prompt_language,
    question_prompt,
    without_thought,
)
from longalign_lib.data.settings import same_settings
from longalign_lib.data.text import unusable
from longalign_lib.data.tokens import encode_chat
from longalign_lib.llm import BudgetError, ChatError, EmptyReplyError, Request
from longalign_lib.llm.loop import submit

__all__ = ["ASK_ANSWER", "ASK_QUESTIONS", "TASKS", "TASK_PROMPTS", "Built", "answer_prompt", "build_instructions",
           "parse_questions", "question_prompt"]  # fmt: skip
GIVE_UP = 3  # documents in a row without an answer
SETTINGS = "instructions.settings.json"


def build_instructions(
    documents: Sequence[Document],
    client,
    tokenizer,
    folder: str | Path,
    seed: int,
    tasks: Sequence[str] = TASKS,
    question_tokens: int = 300,
    answer_tokens: int = 500,
    temperature: float = 0.7,
    answer_temperature: float = 0.0,
    min_overlap: float = 0.5,
    max_repeats: int = 3,
    workers: int = 16,
    progress: bool = True,
) -> Built:
    """Build one sample for each document; see the module's text. Works in a notebook, too, where a loop runs already.

    Args:
        documents: already cut to the lengths wanted; ids must differ.
        client: anything with `async achat(messages, max_tokens=, temperature=, seed=)` that gives `.text` and
            `.finish_reason`, such as `longalign_lib.llm.ChatClient`, which bounds its own concurrency; a client that has
            only a `chat` of the same kind is asked one question at a time.
        tokenizer: "length" is counted with it, chat template included.
        folder: for the files of the module's text; outcomes that stand there are kept and not asked again.
        seed: of the draws, and sent to the endpoint.
        tasks: the task types to draw from.
        question_tokens, answer_tokens: the longest list of questions and the longest answer.
        temperature, answer_temperature: questions are to differ, answers to be the likeliest.
        min_overlap: see `gates.check_answer`.
        max_repeats: so many documents may be asked the very same question; later ones are rejected as duplicates, and so
            is every sample whose question and answer both stood before.
        workers: documents in work at once; each holds its prompt in memory.
        progress: show a bar with counts and the cost so far.

    Raises:
        ValueError: unknown tasks, two documents of one id, a document that has changed since its outcome was written, or a folder
            begun with another model, other prompts, seed or other setting.
        ChatError: the endpoint failed three documents in a row, or a budget is used up (BudgetError); finished work is
            kept and put into the two files first.
    """
    if unknown := [t for t in tasks if t not in TASKS] or ([] if tasks else ["none"]):
        raise ValueError(f"tasks {unknown} unknown; accepted: {', '.join(TASKS)}")
    twice = [i for i, n in Counter(d.id for d in documents).items() if n > 1]
    if twice:
        raise ValueError(f"{len(twice)} ids stand for several documents, first {twice[0]!r}; give each document its own id")
    work = Outcomes(folder, documents)
    shapes = {"seed": seed, "tasks": list(tasks), "question_tokens": question_tokens, "answer_tokens": answer_tokens, "temperature": temperature,
              "answer_temperature": answer_temperature, "min_overlap": min_overlap, "model": str(getattr(client, "label", "")),
              "prompts": text_hash(json.dumps([ASK_QUESTIONS, ASK_ANSWER, TASK_PROMPTS]))}  # fmt: skip
    same_settings(Path(folder) / SETTINGS, shapes, bool(work.outcomes))
    todo = [d for d in documents if d.id not in work.outcomes]
    if not hasattr(client, "achat"):
        workers = 1
    failed: list[dict] = []
    stop: list[Exception] = []
    bar = tqdm(total=len(todo), desc="self-instruct", leave=False, delay=2, disable=not progress)
    settings = (seed, tuple(tasks), min_overlap, (question_tokens, temperature), (answer_tokens, answer_temperature))

    async def worker(queue) -> None:
        for document in queue:
            try:
                work.add(_with_length(await _outcome(document, client, *settings), tokenizer))
                streak[0] = 0
            except ChatError as error:
                failed.append({"document_id": document.id, "reason": str(error)})
                streak[0] += 1
                if isinstance(error, BudgetError):
                    stop.append(error)
                elif streak[0] == GIVE_UP:
                    stop.append(ChatError(f"three documents in a row failed; finished work is kept. Last: {error}"))
            except Exception as error:  # a full disk, a broken client: end in good order, then say so
                stop.append(error)
            bar.update()
            bar.set_postfix_str(f"{work.accepted} taken, {work.rejected} rejected{_cost(client)}", refresh=False)
            if stop:
                return

    async def all_workers() -> None:
        queue = iter(todo)  # shared: each document goes to one worker
        await asyncio.gather(*(worker(queue) for _ in range(max(1, min(workers, len(todo))))))

    streak = [0]
    with bar:
        running = submit(all_workers())
        try:
            running.result()
        except BaseException:  # Ctrl-C: end the work, not only the waiting for it
            running.cancel()
            raise
    built = work.settle(max_repeats)
    order = {d.id: i for i, d in enumerate(documents)}
    built.failed = sorted(failed, key=lambda f: order[f["document_id"]])
    if stop:
        raise stop[0]
    return built


def calls_ahead(
    documents: Sequence[Document], client, folder: str | Path, seed: int, tasks: Sequence[str] = TASKS,
    question_tokens: int = 300, answer_tokens: int = 500, temperature: float = 0.7, answer_temperature: float = 0.0,
    min_overlap: float = 0.5,
) -> tuple[list[Request], list[Request]]:  # fmt: skip
    """What `build_instructions` with these arguments would ask from now on; nothing is asked.

    Documents with an outcome in the folder are left out. Where the client has a call's answer, the way goes on from it, so
    that what a killed run asked already is found in the cache. A question of 40 words stands for one that is not known yet.

    Returns:
        (requests for questions, requests for answers), those that are cached among them.
    """
    known = Outcomes(folder, documents).outcomes
    listing: list[Request] = []
    answering: list[Request] = []

    class Ahead:
        async def achat(self, messages, **settings):
            now.append(Request(messages, **settings))
            reply = client.cached(now[-1])
            if reply is None:
                raise ChatError("not asked yet")
            return reply

    async def all_documents() -> None:
        for document in documents:
            if document.id in known:
                continue
            now.clear()
            try:
                await _outcome(document, Ahead(), seed, tuple(tasks), min_overlap, (question_tokens, temperature), (answer_tokens, answer_temperature))
            except ChatError:
                if len(now) == 1:
                    asked = [{"role": "user", "content": answer_prompt(document, "word " * 40)}]
                    now.append(Request(asked, answer_tokens, answer_temperature, seed))
            listing.extend(now[:1])
            answering.extend(now[1:])

    now: list[Request] = []
    submit(all_documents()).result()
    return listing, answering


def _with_length(outcome: dict, tokenizer) -> dict:
    """A sample with its tokens counted, or as a rejection when the chat template cannot tell its turns apart."""
    if "messages" not in outcome:
        return outcome
    try:
        return outcome | {"length": len(encode_chat(tokenizer, outcome["messages"])[0])}
    except ValueError as error:
        rest = {k: v for k, v in outcome.items() if k not in ("messages", "length")}
        return rest | {"stage": "encoding", "reason": f"unreadable: {error}"}


async def _outcome(document: Document, client, seed: int, tasks, min_overlap, for_questions, for_answer) -> dict:
    """The outcome for one document: a sample (without its length), or a rejection."""
    language = prompt_language(document)
    draw = random.Random(f"{seed}:{document.id}")
    task = draw.choice(list(tasks))
    about = {"source": document.source, "task": task, "language": language, "document_id": document.id}
    about |= {"model": getattr(client, "label", "unknown"), "document_hash": text_hash(document.text)}
    rejection = about | {"stage": "question", "reason": "", "question": "", "answer": "", "raw": "", "dropped": []}
    if reason := unusable(document.text):
        gate = "empty" if reason.startswith("empty") else "unreadable"
        return rejection | {"stage": "document", "reason": f"{gate}: {reason}"}

    async def ask(prompt: str, tokens: int, temperature: float):
        message = [{"role": "user", "content": prompt}]
        settings = {"max_tokens": tokens, "temperature": temperature, "seed": seed}
        try:
            if hasattr(client, "achat"):
                reply = await client.achat(message, **settings)
            else:
                reply = await asyncio.to_thread(client.chat, message, **settings)
        except EmptyReplyError:  # the model's own silence, an outcome like any other; not the endpoint's failure
            return "", "stop"
        return _whole(reply.text or "").strip(), reply.finish_reason

    asked = question_prompt(document, task)
    listed, finish = await ask(asked, *for_questions)
    questions, dropped = [], []
    parsed = parse_questions(listed)
    about["listed"] = len(parsed)
    if finish == "length" and parsed and not parsed[-1].endswith(("?", "？", ".", "。")):
        dropped.append({"question": parsed.pop(), "reason": "cut off: the list reached the token limit"})
    for question in parsed:
        reason = check_question(question, language, questions, document.text)
        if not reason and len(questions) == QUESTIONS:
            reason = f"too many: {QUESTIONS} were asked for"
        if reason:
            dropped.append({"question": question, "reason": reason})
        else:
            questions.append(question)
    rejection |= about | {"raw": listed, "dropped": dropped}
    if not questions:
        first = dropped[0]["reason"] if dropped else "unparsed: no numbered question in the reply"
        return rejection | {"reason": first if listed else "empty: the model wrote nothing"}
    question = draw.choice(questions)
    prompt = answer_prompt(document, question)
    said, finish = await ask(prompt, *for_answer)
    answer = without_thought(said)
    reason = "cut off: the thinking reached the token limit" if said.strip() and not answer and finish == "length" else ""
    reason = reason or check_answer(answer, question, document.text, language, finish, min_overlap)
    if reason:
        return rejection | {"stage": "answer", "question": question, "answer": said, "reason": reason}
    messages = [
        {"role": "user", "content": f"{document.text}\n\n{question}"},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "length": 0, **about, "prompt_hash": text_hash(f"{asked}\n{prompt}"), "dropped": dropped}


def _whole(text: str) -> str:
    """The text with halves of characters (lone surrogates, which no file can hold) replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _cost(client) -> str:
    usage = getattr(client, "usage", None)
    cost = usage.get("cost") if isinstance(usage, dict) else getattr(usage, "cost", None)
    return f", cost {cost:.4g}" if cost else ""
