"""How good are the quality gates? Their precision and recall on samples that people labelled.

A gate that nobody measured is an opinion. `data_samples/gates/labelled.jsonl` holds questions and answers about the
documents of `data_samples/`, each labelled good, or bad with the gate that should catch it, in two parts: the rules were
adjusted on "tune"; "held_out" was written before the last round of that, and is only measured. One hand wrote both parts and
the gates, so even the second says little about what an unknown model gets wrong: label a hundred of its samples yourself.

    recall     of the samples labelled bad for a reason, the share that any gate rejects
    precision  of the samples that a gate rejects, the share that is labelled bad

Invariants: every labelled sample is judged once; intervals are Wilson's at 95%. Cost: milliseconds a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from scipy.stats import binomtest

from longalign_lib.data.documents import read_samples
from longalign_lib.data.gates import GATES, check_answer, check_question
from longalign_lib.data.jsonl import read_jsonl

LABELLED = Path(__file__).resolve().parents[2] / "data_samples" / "gates" / "labelled.jsonl"
PARTS = ("tune", "held_out")


def read_labelled(path: str | Path = LABELLED, part: str | None = None) -> list[dict]:
    """The labelled samples, those that name a document_id with its text put in as "document".

    Args:
        path: JSONL with id, part, document_id or document, language, question, answer, label (good|bad), reason (the gate
            that should catch it, "" for good ones), and where needed earlier (questions already taken), finish_reason.
        part: "tune" or "held_out"; None gives both.

    Raises:
        ValueError: an unknown part, label, reason or document.
    """
    if part not in (None, *PARTS):
        raise ValueError(f"part {part!r} is unknown; accepted: {', '.join(PARTS)}, or None for both")
    texts = {d.id: d.text for d in read_samples()[0]}
    found = []
    for record in read_jsonl(path):
        where = f"{Path(path).name}, sample {record.get('id')!r}"
        label, reason = record.get("label"), record.get("reason", "")
        if label not in ("good", "bad") or (label == "bad") != (reason in GATES) or (label == "good") != (reason == ""):
            raise ValueError(f"{where}: label {label!r} with reason {reason!r}; a good one has \"\", a bad one a gate's name")
        if "document" not in record and record.get("document_id") not in texts:
            raise ValueError(f"{where}: document_id {record.get('document_id')!r} is none of {', '.join(sorted(texts))}")
        if part in (None, record.get("part")):
            found.append({"document": texts.get(record.get("document_id"), "")} | record)
    return found


def judge(sample: Mapping) -> str:
    """Why the gates reject a labelled sample, "gate: detail", or ""."""
    about = sample["document"], sample["language"]
    reason = check_question(sample["question"], about[1], sample.get("earlier", ()), document=about[0])
    return reason or check_answer(
        sample["answer"], sample["question"], *about, finish_reason=sample.get("finish_reason", "stop")
    )


def measure_gates(labelled: Sequence[Mapping]) -> pd.DataFrame:
    """Recall for each reason and precision for each gate, with 95% Wilson intervals.

    Args:
        labelled: as `read_labelled` gives them.

    Returns:
        one row a gate that is labelled or that fired, and "all" at the end: reason; bad (samples labelled with it),
        caught (of these, by any gate), recall, recall_low, recall_high; fired (samples that this gate rejected), right
        (of these, labelled bad for whatever reason), precision, precision_low, precision_high. A share of nothing is NaN.

    Raises:
        ValueError: no samples.
    """
    if not labelled:
        raise ValueError("no labelled samples given; read some with read_labelled()")
    judged = [(sample["reason"], judge(sample).split(":")[0]) for sample in labelled]
    rows = []
    for name in (*GATES, "all"):
        bad = [fired for reason, fired in judged if reason and name in (reason, "all")]
        rejected = [reason for reason, fired in judged if fired and name in (fired, "all")]
        if bad or rejected or name == "all":
            caught, right = sum(map(bool, bad)), sum(map(bool, rejected))
            rows.append({"reason": name, "bad": len(bad), "caught": caught, **_share("recall", caught, len(bad)),
                         "fired": len(rejected), "right": right, **_share("precision", right, len(rejected))})  # fmt: skip
    return pd.DataFrame(rows)


def mistakes(labelled: Sequence[Mapping]) -> pd.DataFrame:
    """The labelled samples that the gates get wrong: id, language, label, reason (labelled), gates (say), question, answer."""
    columns = ["id", "language", "label", "reason", "gates", "question", "answer"]
    rows = [{**sample, "gates": judge(sample)} for sample in labelled]
    return pd.DataFrame([r for r in rows if bool(r["gates"]) != (r["label"] == "bad")], columns=columns)


def _share(name: str, hits: int, of: int) -> dict[str, float]:
    if not of:
        return {name: float("nan"), f"{name}_low": float("nan"), f"{name}_high": float("nan")}
    interval = binomtest(hits, of).proportion_ci(method="wilson")
    return {name: hits / of, f"{name}_low": float(interval.low), f"{name}_high": float(interval.high)}
