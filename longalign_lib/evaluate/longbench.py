"""LongBench's question answering and summarisation files: read, asked, scored by overlap, and laid out for a judge.

A file holds one task in the published schema, a JSON object a line: input (the question; empty for some summaries),
context (the text), answers (list of accepted ones), length, dataset, language, all_classes, _id. Twelve tasks of three
kinds are known here, as in the paper's tables: single-document QA, multi-document QA, summarisation.

Prompts are our own; `read_prompts` takes the published config/dataset2prompt.json instead. A context that does not fit
loses its middle; the question never does (the published script cuts the whole prompt).

Metrics, best over the accepted answers, 0-100: F1 of words, lower-cased, without punctuation and English articles; or
ROUGE-L. Chinese is compared by characters, where the published script first splits it into words with jieba, so Chinese
numbers are near the published ones and not equal. ROUGE-L here is the plain F1. The paper's own columns are GPT-4's ratings:
`judge_rows` makes what `judge.rate_all` takes (rubric "qa" 1-3, "summary" 1-5), `table` normalises them to 0-100.
Cost: one answer a record.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from longalign_lib.evaluate import published
from longalign_lib.evaluate.answering import OK, Prompt, ask
from longalign_lib.evaluate.judge import to_percent
from longalign_lib.evaluate.lexical import rouge_l, word_f1
from longalign_lib.evaluate.longbench_chat import fit_prompt
from longalign_lib.evaluate.stats import mean_and_error

SINGLE, MULTI, SUMMARY = "single-document QA", "multi-document QA", "summarisation"
_BRIEF = " Give the answer only, in as few words as possible.\n\nQuestion: {input}"
_QA = "Text:\n{context}\n\nAnswer the question from the text above." + _BRIEF
_YES_NO = "\nIf it is a yes-or-no question, answer yes or no. If the text does not answer it, say: unanswerable."
_QA_ZH = "文章：\n{context}\n\n请根据上文回答问题，只写答案，尽量简短。\n\n问题：{input}"
_MANY = "Passages:\n{context}\n\nAnswer the question from these passages." + _BRIEF
_SUM = "{context}\n\nWrite a summary of the text above, about a page long, that keeps its main points and figures.\n\n{input}"
_MEETING = "Transcript of a meeting:\n{context}\n\nAnswer from the transcript, in a few sentences.\n\n{input}"
_SUM_ZH = "会议记录：\n{context}\n\n请写一段话，总结以上会议的主要内容。\n\n{input}"


@dataclass(frozen=True)
class Task:
    """A LongBench task: its kind, language, metric ("f1" or "rouge_l"), longest answer in tokens, and our prompt."""

    kind: str
    language: str
    metric: str
    max_new_tokens: int
    prompt: str

    @property
    def rubric(self) -> str:
        """The judge's rubric for it."""
        return "summary" if self.kind == SUMMARY else "qa"


TASKS = {
    "narrativeqa": Task(SINGLE, "en", "f1", 128, _QA),
    "qasper": Task(SINGLE, "en", "f1", 128, _QA + _YES_NO),
    "multifieldqa_en": Task(SINGLE, "en", "f1", 64, _QA),
    "multifieldqa_zh": Task(SINGLE, "zh", "f1", 64, _QA_ZH),
    "hotpotqa": Task(MULTI, "en", "f1", 32, _MANY),
    "2wikimqa": Task(MULTI, "en", "f1", 32, _MANY),
    "musique": Task(MULTI, "en", "f1", 32, _MANY),
    "dureader": Task(MULTI, "zh", "rouge_l", 128, _QA_ZH),
    "gov_report": Task(SUMMARY, "en", "rouge_l", 512, _SUM),
    "qmsum": Task(SUMMARY, "en", "rouge_l", 512, _MEETING),
    "multi_news": Task(SUMMARY, "en", "rouge_l", 512, _SUM),
    "vcsum": Task(SUMMARY, "zh", "rouge_l", 512, _SUM_ZH),
}
_ASKED = {"en": "Summarise the text.", "zh": "请总结全文。"}  # what the judge is told where the file asks nothing


@dataclass(frozen=True)
class Sample:
    """One record: ``task`` is a key of `TASKS`; ``length``: words (English) or characters, as the file says."""

    id: str
    task: str
    question: str
    context: str
    answers: tuple[str, ...]
    length: int
    language: str


def task_of(name: str) -> str:
    """The task a dataset belongs to; LongBench-E's names end in _e. Raises ValueError with the names there are."""
    task = name.removesuffix("_e")
    if task not in TASKS:
        raise ValueError(f"dataset {name!r} is none of the tasks scored here: {', '.join(TASKS)}")
    return task


def read_samples(path: str | Path, limit: int | None = None) -> list[Sample]:
    """Read one task file, or every .jsonl file of a folder.

    Args:
        limit: the first so many of each file; None takes all.

    Raises:
        ValueError: a field missing, empty or of the wrong type, an unknown dataset, an _id seen twice; file and line named.
        FileNotFoundError: nothing there.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no .jsonl file in {path.name}/: give a task file of LongBench (data/qasper.jsonl, say) or their folder")
    samples: dict[tuple[str, str], Sample] = {}
    for file in files:
        for number, record in enumerate(published.records(file)):
            if limit is not None and number >= limit:
                break
            sample = _sample(record)
            if (sample.task, sample.id) in samples:
                raise ValueError(f"{record.where}: _id {sample.id} occurs twice in {sample.task}")
            samples[sample.task, sample.id] = sample
    return list(samples.values())


def _sample(record: published.Fields) -> Sample:
    dataset = record.get("dataset", str)
    try:
        task = task_of(dataset)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None
    question = record.get("input", str, "the question", empty=TASKS[task].kind == SUMMARY)
    length = record.get("length", int, "words, or characters of a Chinese text")
    answers = tuple(record.texts("answers", "accepted answers"))
    return Sample(record.get("_id", str), task, question.strip(), record.get("context", str), answers, length, record.get("language", str))


def read_prompts(path: str | Path) -> dict[str, str]:
    """Prompts from a file like the published config/dataset2prompt.json: task -> text with {context} and {input}.

    Raises:
        ValueError: no JSON object of texts, or a prompt without {context} for a task scored here.
    """
    try:
        found = json.loads(published.read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{Path(path).name}, line {error.lineno} is not valid JSON ({error.msg})") from None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(f"{Path(path).name} must be one JSON object of texts, task -> prompt with {{context}} and {{input}}")
    known = {k: v for k, v in found.items() if k in TASKS}
    wrong = [k for k, v in known.items() if "{context}" not in v or ("{input}" not in v and TASKS[k].kind != SUMMARY)]
    if wrong or not known:
        raise ValueError(f"{Path(path).name}: {', '.join(wrong) or 'no prompt for any of ' + ', '.join(TASKS)}; "
                         "a prompt needs {context}, and {input} where there is a question")  # fmt: skip
    return known


def fill(prompt: str, context: str, question: str) -> str:
    """A prompt with both places filled in one pass, so that braces inside a text stay what they are."""
    values = {"{context}": context, "{input}": question}
    return re.sub(r"\{context\}|\{input\}", lambda m: values[m[0]], prompt).strip()


def score(answer: str, accepted: Sequence[str], metric: str, language: str = "en") -> float:
    """Overlap with the nearest of the accepted answers, 0-100.

    Args:
        metric: "f1" (words, or characters of Chinese) or "rouge_l".
    """
    if metric not in ("f1", "rouge_l"):
        raise ValueError(f"unknown metric {metric!r}; choose f1 or rouge_l")
    if metric == "rouge_l":
        return max(rouge_l(answer, a) for a in accepted)
    return max(word_f1(_plain(answer, language), _plain(a, language)) for a in accepted)


def _plain(text: str, language: str) -> str:
    """English as the published metric reads it: punctuation closed up (U.S. is us), then articles dropped."""
    if language != "en":
        return text
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare)


def answer_samples(
    answerer, tokenizer, samples: Sequence[Sample], window: int, out: Path | str | None = None, name: str = "model",
    prompts: Mapping[str, str] | None = None, max_new_tokens: int | None = None, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Answer every sample, keep what was said (`answering.ask`: resumable), and score it by overlap.

    Args:
        window: tokens for prompt and answer; a longer context loses its middle.
        prompts: of `read_prompts`; ours where it has none. max_new_tokens: the longest answer; None takes the task's.

    Returns:
        A row a sample: id, task, kind, language, length, tokens, context_tokens, left_out, question, reference, answers,
        answer, status, metric, overlap (0-100; 0 for a failed call), key, ...
    """
    built = [build_prompt(tokenizer, s, window, max_new_tokens, prompts) for s in samples]
    asked = [Prompt(f"{s.task}/{s.id}", p.messages, max_new_tokens or TASKS[s.task].max_new_tokens) for s, p in zip(samples, built)]
    rows = []
    for sample, prompt, row in zip(samples, built, ask(answerer, tokenizer, asked, out, name, progress)):
        task = TASKS[sample.task]
        rows.append(row | {
            "task": sample.task, "kind": task.kind, "language": sample.language, "length": sample.length, "tokens": prompt.tokens,
            "context_tokens": prompt.document_tokens, "left_out": prompt.left_out, "question": sample.question or _ASKED[task.language],
            "reference": sample.answers[0], "answers": list(sample.answers), "metric": task.metric,
            "overlap": score(row["answer"], sample.answers, task.metric, task.language),
        })  # fmt: skip
    return pd.DataFrame(rows)


def build_prompt(tokenizer, sample: Sample, window: int, max_new_tokens: int | None = None, prompts: Mapping[str, str] | None = None):
    """The prompt of one sample as a `longbench_chat.LongPrompt`, its context cut in the middle where it must be."""
    task = TASKS[sample.task]
    text = (prompts or {}).get(sample.task, task.prompt)
    return fit_prompt(tokenizer, lambda context: [{"role": "user", "content": fill(text, context, sample.question)}],
                      sample.context, window, max_new_tokens or task.max_new_tokens, f"{sample.task} {sample.id}")  # fmt: skip


def judge_rows(answers: pd.DataFrame) -> dict[str, list[dict]]:
    """What `judge.rate_all` takes, by rubric; where several answers are accepted the reference lists them.

    An answer that the model did not give is not shown to a judge: it has no rating, and `table` counts it as failed.
    """
    rows: dict[str, list[dict]] = {}
    for row in answers[answers.status == OK].to_dict("records"):
        reference = row["reference"] if len(row["answers"]) == 1 else "Any of these:\n" + "\n".join(f"- {a}" for a in row["answers"])
        kept = {k: row[k] for k in ("id", "task", "kind", "model", "question", "answer")}
        rows.setdefault(TASKS[row["task"]].rubric, []).append(kept | {"reference": reference, "examples": ()})
    return rows


def table(answers: pd.DataFrame, ratings: Mapping[str, pd.DataFrame] | None = None) -> pd.DataFrame:
    """Means by task and by kind (the paper's columns), 0-100, failed answers counted as 0 overlap.

    Args:
        answers: of `answer_samples`. ratings: rubric -> frame of `judge.rate_all` over `judge_rows`.

    Returns:
        level ("task" or "kind"), name, n, overlap, se, failed; with ratings also rating (0-100), rated (answers with one).
    """
    percent = pd.Series(dtype=float)
    for rubric, frame in (ratings or {}).items():
        per_answer = pd.to_numeric(frame.score).groupby(frame.id).mean().map(lambda s, r=rubric: to_percent(s, r))
        percent = per_answer if percent.empty else pd.concat([percent, per_answer])
    lines = []
    for level in ("task", "kind"):
        for name, part in answers.groupby(level, sort=False):
            seen = mean_and_error(part.overlap)
            failed = int((part.status != OK).sum())
            line = {"level": level, "name": name, "n": len(part), "overlap": seen["mean"], "se": seen["se"], "failed": failed}
            if ratings:
                given = mean_and_error([percent.get(i, float("nan")) for i in part.id])
                line |= {"rating": given["mean"], "rated": given["n"]}
            lines.append(line)
    return pd.DataFrame(lines)
