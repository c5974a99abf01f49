"""What long training may have cost: short tasks before and after, by lm-evaluation-harness (`lm_eval`).

A thin call. The harness scores the choices of a question by the log-likelihood of each behind the question; ``acc`` takes
the likeliest, ``acc_norm`` the likeliest for its number of characters. Ours is the way there and back: a model in memory
goes in, two plain frames come out (a row a metric, a row a question), and a file of both.

`GENERAL` runs without a network: 40 easy questions of data_samples/retention. They show that a model still knows what it
knew, with a standard error of up to 8 points; they are no benchmark. `PAPER_TASKS` are the paper's four at the shots of
the leaderboard that it cites (25, 10, 0, 5): they need a network for their data. `harness_commands` prints the same as commands.
Invariants: the harness seeds Python's, NumPy's and torch's global generators; they are put back. Cost: one forward pass a choice.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from longalign_lib.files import whole

GENERAL = "longalign_general_knowledge"
SAMPLES = Path(__file__).resolve().parents[2] / "data_samples" / "retention"


@dataclass(frozen=True)
class Shots:
    """A task of the harness: its name there, examples in front of each question, and the metric that the paper's column holds."""

    task: str
    shots: int
    metric: str


PAPER_TASKS = {
    "arc": Shots("arc_challenge", 25, "acc_norm"),
    "hellaswag": Shots("hellaswag", 10, "acc_norm"),
    "truthfulqa": Shots("truthfulqa_mc2", 0, "acc"),
    "mmlu": Shots("mmlu", 5, "acc"),
}
NAMES = ("general", *PAPER_TASKS)


def harness_commands(model: str, out: str = "OUT", names: Sequence[str] = tuple(PAPER_TASKS)) -> list[str]:
    """The harness's own commands for the paper's tasks, one a number of shots; they need a network for the data."""
    return [
        f"lm_eval --model hf --model_args pretrained={model},dtype=bfloat16 --tasks {PAPER_TASKS[n].task} "
        f"--num_fewshot {PAPER_TASKS[n].shots} --batch_size auto --output_path {out}/{n}"
        for n in names
    ]


def general_task(folder: str | Path | None = None) -> dict:
    """The offline task's definition, with the questions' file found wherever the library runs from.

    Raises:
        FileNotFoundError: the YAML or its questions are missing. ValueError: a question that cannot be scored, with its line.
    """
    from longalign_lib.evaluate import published

    folder = Path(folder) if folder is not None else SAMPLES
    config = yaml.safe_load(published.read_text(folder / "general_knowledge.yaml"))
    questions = folder / Path(config["dataset_kwargs"]["data_files"]["test"]).name
    for record in published.records(questions):
        choices, answer = record.texts("choices"), record.get("answer", int)
        record.get("question", str)
        if not 0 <= answer < len(choices) or len(set(choices)) < len(choices):
            raise ValueError(f"{record.where}: answer {answer} must be the index of one of {len(choices)} different choices")
    return config | {"dataset_kwargs": {"data_files": {"test": str(questions.resolve())}}}


def _harness():
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        fix = "pip install 'longalign-lib[retention]'"
        raise ValueError(f"lm-evaluation-harness is not installed ({error.name} is missing): {fix}") from None
    return lm_eval, HFLM, TaskManager


@contextlib.contextmanager
def _own_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def evaluate(
    model, tokenizer, names: Sequence[str] = ("general",), shots: int | None = None, limit: int | None = None, batch_size: int = 8,
    seed: int = 0, out: Path | str | None = None, name: str = "model", folder: str | Path | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Run the harness on a model in memory.

    Args:
        model, tokenizer: a causal language model of transformers, and its tokenizer.
        names: of `NAMES`; all but "general" fetch their data by the `datasets` library.
        shots: examples in front of each question; None takes the paper's (general: 0).
        limit: the first so many questions of each task; None takes all.
        out: JSON file for both frames. folder: where the offline task lies; data_samples/retention by default.

    Returns:
        (scores, items): scores has task, metric, value (0-1), stderr, n, shots, model; items has task, doc_id, question,
        choices, target, loglikelihoods, said (index), right, model.

    Raises:
        ValueError: an unknown name, the harness is missing, a bad question; OSError: data that could not be fetched.
    """
    unknown = [n for n in names if n not in NAMES]
    if unknown or not names:
        raise ValueError(f"unknown task {', '.join(unknown) or '(none)'}; choose among {', '.join(NAMES)}")
    tasks = {n: general_task(folder) if n == "general" else PAPER_TASKS[n].task for n in names}  # bad questions first: loading costs more
    lm_eval, HFLM, TaskManager = _harness()
    scores, items = [], []
    with _own_generators():
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=_window(model))
        manager = TaskManager(include_defaults=any(n != "general" for n in names))
        for task_name, task in tasks.items():
            given = shots if shots is not None else PAPER_TASKS[task_name].shots if task_name in PAPER_TASKS else 0
            found = lm_eval.simple_evaluate(
                model=harness, tasks=[task], num_fewshot=given, limit=limit, task_manager=manager, bootstrap_iters=100, log_samples=True,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
            lines = _items(found, task_name, name)
            items += lines
            scores += _scores(found, task_name, given, name, len(lines))
    frames = pd.DataFrame(scores), pd.DataFrame(items)
    if out is not None:
        with whole(out) as half:
            half.write_text(json.dumps({"scores": scores, "items": items}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return frames


def _window(model) -> int:
    return int(model.config.get_text_config().max_position_embeddings)


def _scores(found: dict, name: str, shots: int, model: str, n: int) -> list[dict]:
    """The harness's metrics of the task (of the group, where a task is one: mmlu)."""
    wanted = GENERAL if name == "general" else PAPER_TASKS[name].task
    values = found["results"][wanted]
    lines = []
    for key, value in values.items():
        metric = key.split(",")[0]
        if metric.endswith("_stderr") or not isinstance(value, (int, float)) or "," not in key:
            continue
        error = values.get(key.replace(metric, f"{metric}_stderr", 1))
        stderr = float(error) if isinstance(error, (int, float)) else float("nan")
        line = {"task": name, "metric": metric, "value": float(value), "stderr": stderr, "n": n, "shots": shots, "model": model}
        lines.append(line | {"paper_metric": name in PAPER_TASKS and PAPER_TASKS[name].metric == metric})
    return lines


def _items(found: dict, name: str, model: str) -> list[dict]:
    lines = []
    for task, samples in found["samples"].items():
        for sample in samples:
            said = [float(r[0][0] if isinstance(r[0], (list, tuple)) else r[0]) for r in sample["resps"]]
            line = {"task": name, "part": task, "doc_id": sample["doc_id"], "id": sample["doc"].get("id", ""), "loglikelihoods": said}
            line |= {"said": int(np.argmax(said)), "target": sample["target"], "right": sample.get("acc"), "model": model}
            lines.append(line)
    return lines
