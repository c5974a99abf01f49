"""Self-Instruct over long documents, as in section 3.1 of the LongAlign paper (prompts in our own words).

For each document: draw one of four task types; ask the model for five questions of that type as a numbered list; draw
one of those that pass the gates; ask for its answer with the document before it. The sample is

    user       document + "\\n\\n" + question            assistant       answer

Invariants: a document has one outcome, a line in instructions.jsonl or in rejected.jsonl (with the reason and what the
model wrote); the draws depend on (seed, document id) alone, so order and restarts change nothing; a rerun skips
documents that have an outcome. An endpoint's failure is no outcome: that document is asked again by the next run.
Cost: two calls a document, each as long as the document.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from longalign_lib.data.documents import Document
from longalign_lib.data.gates import check_answer, check_question
from longalign_lib.data.jsonl import append_jsonl, read_jsonl
from longalign_lib.data.text import language_of
from longalign_lib.data.tokens import encode_chat
from longalign_lib.llm import ChatError

TASKS = ("general", "summary", "reasoning", "extraction")

# What each task type asks for, put into ASK_QUESTIONS.
TASK_PROMPTS: dict[str, dict[str, str]] = {
    "en": {
        "general": "Ask about anything that a curious reader may want to know.",
        "summary": "Each question asks for a summary: of the text, of one of its parts, or of one theme in it.",
        "reasoning": "Each answer needs facts from at least two places of the text put together.",
        "extraction": "Each question asks for something definite in the text: a name, a date, a number or a step.",
    },
    "zh": {
        "general": "凡是细心的读者可能想知道的都可以问。",
        "summary": "每个问题都要求总结：总结全文、其中一部分，或文中的一个主题。",
        "reasoning": "每个问题都必须把文中至少两处的事实结合起来才能回答。",
        "extraction": "每个问题都问文中一项具体的信息：人名、日期、数字或步骤。",
    },
}
ASK_QUESTIONS = {
    "en": (
        "Read this text.\n\n{document}\n\n(End of the text.)\n\nWrite five different questions about this text, from "
        "its beginning to its end. {task} Answer with a numbered list of questions, 1 to 5."
    ),
    "zh": (
        "请阅读下面的文章。\n\n{document}\n\n（文章结束。）\n\n请针对这篇文章，从开头到结尾，提出五个不同的问题。{task}"
        "只写问题，按1到5编号。"
    ),
}
ASK_ANSWER = {
    "en": "{document}\n\n{question}\n\nAnswer from the text above alone, completely and to the point.",
    "zh": "{document}\n\n{question}\n\n请只根据上文作答，内容完整，切合问题。",
}

# "1." "2)" "(3)" "4、" "Question 5:" "Q:" "第6题" and bullets, with or without markdown stars.
_ITEM = re.compile(
    r"^[\s>*_#]*(?:(?:Q(?:uestion)?|问题|第)?\s*[(（\[]?\d{1,2}[)）\]]?\s*(?:[.．](?!\d)|[、:：)）题])"
    r"|(?:Q(?:uestion)?|问题)\s*[:：]|[-•*])[*_]*\s*(.*)$",
    flags=re.IGNORECASE,
)
_ANSWER_LINE = re.compile(r"^\s*(?:A(?:nswer)?|答案?)\s*[:：]", flags=re.IGNORECASE)


@dataclass
class Built:
    """Everything that came of a run (and of earlier ones in the same folder).

    Attributes:
        samples: accepted, in LongAlign-10k's schema plus source, task, language, document_id, model, prompt_hash.
        rejected: outcomes without a sample, with stage, reason, question, answer, raw.
        failed: documents that the endpoint gave no answer for in this run: {"document_id", "reason"}.
    """

    samples: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    failed: list[dict] = field(default_factory=list)


def parse_questions(text: str) -> list[str]:
    """The items of a numbered (or bulleted) list, in order, without numbers and markup.

    Lines before the first item are an introduction and left out; a line without a number continues the item before it,
    unless an empty line stands between.

    Example:
        >>> parse_questions("Sure!\\n1. **Who** built it?\\n2) When\\n   was that?\\n\\nHope this helps.")
        ['Who built it?', 'When was that?']
    """
    items: list[str] = []
    open_item = False
    for line in text.splitlines():
        match = _ITEM.match(line)
        if match:
            items.append(match[1].strip())
            open_item = True
        elif not line.strip() or _ANSWER_LINE.match(line):
            open_item = bool(items) and not items[-1] and not line.strip()
        elif open_item:
            items[-1] = f"{items[-1]} {line.strip()}".strip()
    cleaned = (re.sub(r"\*\*|__|`", "", item).strip(' *_"“”') for item in items)
    return [item for item in cleaned if item]


def question_prompt(document: Document, task: str) -> str:
    """The message that asks for five questions. Raises ValueError for an unknown task type."""
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; accepted: {', '.join(TASKS)}")
    language = _language(document)
    return ASK_QUESTIONS[language].format(document=document.text, task=TASK_PROMPTS[language][task])


def answer_prompt(document: Document, question: str) -> str:
    """The message that asks for the answer to one question."""
    return ASK_ANSWER[_language(document)].format(document=document.text, question=question)


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
    progress: bool = True,
) -> Built:
    """Build one sample for each document; see the module's text.

    Args:
        documents: already cut to the lengths wanted; ids must differ.
        client: anything with `.chat(messages, max_tokens=, temperature=, seed=)` that gives `.text` and
            `.finish_reason`, such as `longalign_lib.llm.ChatClient`.
        tokenizer: "length" is counted with it, chat template included.
        folder: for instructions.jsonl and rejected.jsonl; what stands there is kept and not asked again.
        seed: of the draws, and sent to the endpoint.
        tasks: the task types to draw from.
        question_tokens, answer_tokens: the longest list of questions and the longest answer.
        temperature, answer_temperature: questions are to differ, answers to be the likeliest.
        min_overlap: see `gates.check_answer`. progress: show a bar.

    Raises:
        ChatError: the endpoint failed three documents in a row.
    """
    folder = Path(folder)
    accepted_path, rejected_path = folder / "instructions.jsonl", folder / "rejected.jsonl"
    torn: list[dict] = []  # a line cut off by a kill: its document is simply built again
    built = Built(*(read_jsonl(p, torn) if p.is_file() else [] for p in (accepted_path, rejected_path)))
    done = {record["document_id"] for record in built.samples + built.rejected}
    limits = ((question_tokens, temperature), (answer_tokens, answer_temperature))
    in_a_row = 0
    for document in tqdm(documents, desc="self-instruct", leave=False, delay=2, disable=not progress):
        if document.id in done:
            continue
        try:
            outcome = _one(document, client, seed, tasks, min_overlap, *limits)
        except ChatError as error:
            built.failed.append({"document_id": document.id, "reason": str(error)})
            in_a_row += 1
            if in_a_row == 3:
                raise ChatError(f"three documents in a row failed; finished work is kept. Last: {error}") from error
            continue
        in_a_row = 0
        done.add(document.id)
        if "messages" in outcome:
            outcome["length"] = len(encode_chat(tokenizer, outcome["messages"])[0])
        (built.samples if "messages" in outcome else built.rejected).append(outcome)
        append_jsonl(accepted_path if "messages" in outcome else rejected_path, outcome)
    return built


def _one(document: Document, client, seed: int, tasks, min_overlap, for_questions, for_answer) -> dict:
    """The outcome for one document: a sample (without its length), or a rejection."""
    language = _language(document)
    draw = random.Random(f"{seed}:{document.id}")
    task = draw.choice(list(tasks))
    about = {"source": document.source, "task": task, "language": language, "document_id": document.id}
    about["model"] = getattr(client, "label", "unknown")

    def ask(prompt: str, tokens: int, temperature: float):
        message = [{"role": "user", "content": prompt}]
        return client.chat(message, max_tokens=tokens, temperature=temperature, seed=seed)

    asked = question_prompt(document, task)
    listed = ask(asked, *for_questions)
    questions, dropped = [], []
    parsed = parse_questions(listed.text)
    if listed.finish_reason == "length" and parsed and not parsed[-1].endswith(("?", "？", ".", "。")):
        dropped.append({"question": parsed.pop(), "reason": "cut off: the list reached the token limit"})
    for question in parsed:
        reason = check_question(question, language, questions)
        if reason:
            dropped.append({"question": question, "reason": reason})
        else:
            questions.append(question)
    rejection = about | {"stage": "question", "question": "", "answer": "", "raw": listed.text, "dropped": dropped}
    if not questions:
        first = dropped[0]["reason"] if dropped else "unparsed: no numbered question in the reply"
        return rejection | {"reason": first if listed.text.strip() else "empty: the model wrote nothing"}
    question = draw.choice(questions)
    prompt = answer_prompt(document, question)
    reply = ask(prompt, *for_answer)
    answer = reply.text.strip()
    reason = check_answer(answer, question, document.text, language, reply.finish_reason, min_overlap)
    if reason:
        return rejection | {"stage": "answer", "question": question, "answer": answer, "reason": reason}
    messages = [
        {"role": "user", "content": f"{document.text}\n\n{question}"},
        {"role": "assistant", "content": answer},
    ]
    prompt_hash = hashlib.sha256(f"{asked}\n{prompt}".encode()).hexdigest()[:16]
    return {"messages": messages, "length": 0, **about, "prompt_hash": prompt_hash, "dropped": dropped}


def _language(document: Document) -> str:
    return document.language if document.language in ASK_QUESTIONS else language_of(document.text)
