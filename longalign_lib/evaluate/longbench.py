"""LongBench's question answering and summarisation files: read, asked, scored by overlap, and laid out for a judge.

A file holds one task in the published schema, a JSON object a line: input (the question; empty for some summaries),
context (the text), answers (list of accepted ones), length, dataset, language, all_classes, _id. Twelve tasks of three
kinds are known here, as in the paper's tables: single-document QA, multi-document QA, summarisation. LongBench-E's (qasper_e)
are the same tasks with samples of their own, and stay apart from them.

Prompts are our own; `read_prompts` takes the published config/dataset2prompt.json instead. A context that does not fit
loses its middle; the question never does (the published script cuts the whole prompt).

Metrics, best over the accepted answers, 0-100: F1 of words, or ROUGE-L. English is scored as published: F1 without ASCII
punctuation and articles, ROUGE-L as the rouge 1.0.1 package has it (`_rouge_l`). Chinese is not: the published script splits
it into words with jieba; here a character is a word, F1 also folds full-width forms, and ROUGE-L is `lexical.rouge_l`, the
plain F1 without punctuation. Chinese numbers may differ from published ones by many points. The paper's own columns are
GPT-4's ratings: `judge_rows` makes what `judge.rate_all` takes (rubric "qa" 1-3, "summary" 1-5), `table` normalises them.
Cost: one answer a record; English ROUGE-L len(answer) x len(reference) steps of Python.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
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
    """One record: ``task`` is a key of `TASKS`, with _e after it for LongBench-E's; ``length``: words (English) or characters, as the file says."""

    id: str
    task: str
    question: str
    context: str
    answers: tuple[str, ...]
    length: int
    language: str


def task_of(name: str) -> str:
    """The key of `TASKS` for a dataset; LongBench-E's names end in _e. Raises ValueError with the names there are."""
    task = name.removesuffix("_e")
    if task not in TASKS:
        raise ValueError(f"dataset {name!r} is none of the tasks scored here: {', '.join(TASKS)}")
    return task


def read_samples(path: str | Path, limit: int | None = None) -> list[Sample]:
    """The samples of `read_scored`, without the names of what is not scored."""
    return read_scored(path, limit)[0]


def read_scored(path: str | Path, limit: int | None = None) -> tuple[list[Sample], list[str]]:
    """Read one task file, or every .jsonl file of a folder whose first record is of a task scored here.

    Args:
        limit: the first so many of each file; None takes all.

    Returns:
        The samples, and the datasets of a folder that are not scored here (trec, lcc, ...).

    Raises:
        ValueError: a field missing, empty or of the wrong type, an _id seen twice, an unknown dataset in a file that is
            read; file and line named. No file of the folder scored here; a limit below 1.
        FileNotFoundError: nothing there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: give 1 or more questions of each file, or none for all of them")
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no .jsonl file in {path.name}/: give a task file of LongBench (data/qasper.jsonl, say) or their folder")
    samples: dict[tuple[str, str], Sample] = {}
    skipped: list[str] = []
    for file in files:
        for number, record in enumerate(islice(published.records(file), limit)):
            dataset = record.get("dataset", str)
            if path.is_dir() and not number and not _known(dataset):
                skipped.append(dataset)
                break
            sample = _sample(record, file.stem)
            if (sample.task, sample.id) in samples:
                raise ValueError(f"{record.where}: _id {sample.id} occurs twice in {sample.task}")
            samples[sample.task, sample.id] = sample
    if not samples:
        raise ValueError(f"{path.name} has {', '.join(skipped) or 'no record'}: none of the tasks scored here: {', '.join(TASKS)}")
    return list(samples.values()), skipped


def _known(dataset: str) -> bool:
    return dataset.removesuffix("_e") in TASKS


def _sample(record: published.Fields, stem: str) -> Sample:
    """``stem``: of the file; the records of qasper_e.jsonl are qasper_e's, whichever of both names they give."""
    dataset = record.get("dataset", str)
    try:
        task = TASKS[task_of(dataset)]
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None
    question = record.get("input", str, "the question", empty=task.kind == SUMMARY)
    length = record.get("length", int, "words, or characters of a Chinese text")
    answers = tuple(record.texts("answers", "accepted answers"))
    name = stem if stem == f"{dataset}_e" else dataset
    return Sample(record.get("_id", str), name, question.strip(), record.get("context", str), answers, length, record.get("language", str))


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
        measure = _rouge_l if language == "en" else rouge_l
    else:
        measure = _word_f1 if language == "en" else word_f1
    return max(measure(answer, a) for a in accepted)


def _word_f1(answer: str, reference: str) -> float:
    """The published F1 of English words: punctuation (ASCII's) closed up (U.S. is us), then articles dropped."""

    def words(text: str) -> Counter:
        bare = "".join(c for c in text.lower() if c not in string.punctuation)
        return Counter(re.sub(r"\b(a|an|the)\b", " ", bare).split())

    said, wanted = words(answer), words(reference)
    shared = (said & wanted).total()
    return 200 * shared / (said.total() + wanted.total()) if shared else 0.0


def _rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L by the rouge 1.0.1 package, which the published script calls; it differs from the plain F1 by many points.

    Texts are cut at every full stop, case and other punctuation stay. Each sentence of the reference is matched with each of
    the answer; F1 compares how many different words the matches hold with how many different words each text has. The
    package gives up, and the script says 0, where two sentences have about 1,000 words together; this does not.
    """
    said, wanted = _sentences(answer), _sentences(reference)
    if not said or not wanted:
        return 0.0
    shared = len(set().union(*(_common(w, s) for w in wanted for s in said)))
    precision, recall = shared / len(set().union(*said)), shared / len(set().union(*wanted))
    return 200 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence; a sentence of blanks alone is one empty word, as in the package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common(x: Sequence[str], y: Sequence[str]) -> set[str]:
    """The words of a longest common subsequence: of several, the one that the package finds (ties shorten y)."""
    rows = [[0] * (len(y) + 1)]
    for word in x:
        above, row = rows[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    i, j, found = len(x), len(y), set()
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            found.add(x[i])
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def answer_samples(
    answerer, tokenizer, samples: Sequence[Sample], window: int, out: Path | str | None = None, name: str = "model",
    prompts: Mapping[str, str] | None = None, max_new_tokens: int | None = None, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Answer every sample, keep what was said (`answering.ask`: resumable), and score it by overlap.

    Args:
        window: tokens for prompt and answer; a longer context loses its middle.
        prompts: of `read_prompts`; ours where it has none. max_new_tokens: the longest answer; None takes the task's.

    Returns:
        A row a sample: id, task, kind (LongBench-E's by themselves), language, length, tokens, context_tokens, left_out, question, reference, answers,
        answer, status, metric, overlap (0-100; 0 for a failed call), key, ...
    """
    built = [build_prompt(tokenizer, s, window, max_new_tokens, prompts) for s in samples]
    asked = [Prompt(f"{s.task}/{s.id}", p.messages, max_new_tokens or TASKS[task_of(s.task)].max_new_tokens) for s, p in zip(samples, built)]
    rows = []
    for sample, prompt, row in zip(samples, built, ask(answerer, tokenizer, asked, out, name, progress)):
        task = TASKS[task_of(sample.task)]
        kind = task.kind + (" (LongBench-E)" if sample.task.endswith("_e") else "")
        rows.append(row | {
            "task": sample.task, "kind": kind, "language": sample.language, "length": sample.length, "tokens": prompt.tokens,
            "context_tokens": prompt.document_tokens, "left_out": prompt.left_out, "question": sample.question or _ASKED[task.language],
            "reference": sample.answers[0], "answers": list(sample.answers), "metric": task.metric,
            "overlap": score(row["answer"], sample.answers, task.metric, task.language),
        })  # fmt: skip
    return pd.DataFrame(rows)


def build_prompt(tokenizer, sample: Sample, window: int, max_new_tokens: int | None = None, prompts: Mapping[str, str] | None = None):
    """The prompt of one sample as a `longbench_chat.LongPrompt`, its context cut in the middle where it must be."""
    task = TASKS[task_of(sample.task)]
    text = (prompts or {}).get(task_of(sample.task), task.prompt)
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
        rows.setdefault(TASKS[task_of(row["task"])].rubric, []).append(kept | {"reference": reference, "examples": ()})
    return rows


def table(answers: pd.DataFrame, ratings: Mapping[str, pd.DataFrame] | None = None) -> pd.DataFrame:
    """Means by task, and of those by kind (the paper's columns), 0-100, failed answers counted as 0 overlap.

    A kind is the mean of its tasks' means, each task counting the same however many samples it has. Its se is of the samples
    within these tasks, not of the choice of tasks; NaN where a task has one sample.

    Args:
        answers: of `answer_samples`. ratings: rubric -> frame of `judge.rate_all` over `judge_rows`.

    Returns:
        level ("task" or "kind"), name, tasks, n (answers), overlap, se, failed; with ratings also rating (0-100; NaN for a
        kind with a task that has none), rated (answers with one).
    """
    percent = pd.Series(dtype=float)
    for rubric, frame in (ratings or {}).items():
        per_answer = pd.to_numeric(frame.score).groupby(frame.id).mean().map(lambda s, r=rubric: to_percent(s, r))
        percent = per_answer if percent.empty else pd.concat([percent, per_answer])
    tasks = []
    for (kind, name), part in answers.groupby(["kind", "task"], sort=False):
        seen = mean_and_error(part.overlap)
        line = {"level": "task", "name": name, "tasks": 1, "n": len(part), "overlap": seen["mean"], "se": seen["se"],
                "failed": int((part.status != OK).sum()), "kind": kind}  # fmt: skip
        if ratings:
            given = mean_and_error([percent.get(i, float("nan")) for i in part.id])
            line |= {"rating": given["mean"], "rated": given["n"]}
        tasks.append(line)
    kinds = []
    for kind, part in pd.DataFrame(tasks).groupby("kind", sort=False):
        line = {"level": "kind", "name": kind, "tasks": len(part), "n": part.n.sum(), "overlap": part.overlap.mean(),
                "se": math.hypot(*part.se) / len(part), "failed": part.failed.sum()}  # fmt: skip
        if ratings:
            line |= {"rating": part.rating.mean(skipna=False), "rated": part.rated.sum()}
        kinds.append(line)
    return pd.DataFrame(tasks + kinds).drop(columns="kind")
