"""What has become of each document of a Self-Instruct run, in files that survive kills.

    outcomes.jsonl       the journal: a line an outcome, flushed to the disk, in the order in which they come
    instructions.jsonl   at the end: the samples, in the order of the documents
    rejected.jsonl       at the end: everything else, with stage and reason, in the order of the documents

An outcome that changes files at the end (a sample that now repeats another, or no longer does) goes into the journal first. The
journal goes when both files stand, so a kill at any moment leaves every outcome in at least one file, and a document that
is found in two keeps the outcome found first. Duplicates across documents are looked for at the end, when the order is known.
Cost: every outcome in memory, with its document's text.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longalign_lib.data.documents import Document
from longalign_lib.data.jsonl import append_jsonl, read_jsonl, write_jsonl

FILES = ("instructions.jsonl", "rejected.jsonl", "outcomes.jsonl")


@dataclass
class Built:
    """Everything that came of a run (and of earlier ones in the same folder).

    Attributes:
        samples: accepted, in LongAlign-10k's schema plus source, task, language, document_id, model, prompt_hash; further
            document_hash, listed (questions in the model's list) and dropped (questions not taken, with reasons).
        rejected: outcomes without a sample: the same keys where known, with stage, reason, question, answer, raw.
        failed: documents that the endpoint gave no answer for in this run: {"document_id", "reason"}.
    """

    samples: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    failed: list[dict] = field(default_factory=list)


class Outcomes:
    """The outcomes of a folder: read, added to, and at the end put into two files in the order of the documents.

    Attributes:
        outcomes: by document id. accepted, rejected: how many of each.

    Raises:
        ValueError: a document that has changed since its outcome was written.
    """

    def __init__(self, folder: str | Path, documents: Sequence[Document]) -> None:
        self.order = [d.id for d in documents]
        self.accepted_path, self.rejected_path, self.journal = (Path(folder) / name for name in FILES)
        torn: list[dict] = []  # a line cut off by a kill: its document is simply built again
        self.outcomes: dict[str, dict] = {}
        self.accepted = self.rejected = 0
        hashes = {d.id: text_hash(d.text) for d in documents}
        for path in (self.accepted_path, self.rejected_path, self.journal):
            for outcome in read_jsonl(path, torn) if path.is_file() else []:
                if (name := outcome.get("document_id")) is None:
                    raise ValueError(f"{path}: a record without document_id; give a folder of this builder, or a new one")
                if outcome.get("document_hash", hashes.get(name)) != hashes.get(name, outcome.get("document_hash")):
                    raise ValueError(
                        f"{path}: document {name!r} has another text now than when its outcome was written; use another "
                        "folder, or delete its line to build it again"
                    )
                self._keep(outcome)

    def _keep(self, outcome: dict) -> None:
        if outcome["document_id"] not in self.outcomes:
            self.accepted += "reason" not in outcome
            self.rejected += "reason" in outcome
            self.outcomes[outcome["document_id"]] = outcome

    def add(self, outcome: dict) -> None:
        """Write one outcome down, on the disk before this returns."""
        append_jsonl(self.journal, outcome)
        self._keep(outcome)

    def settle(self, max_repeats: int) -> Built:
        """Look for duplicates across documents, write both files, and only then let go of the journal."""
        mine = set(self.order)
        names = [name for name in self.outcomes if name not in mine] + [n for n in self.order if n in self.outcomes]
        built = Built()
        for outcome in across(map(self.outcomes.__getitem__, names), max_repeats):
            (built.rejected if "reason" in outcome else built.samples).append(outcome)
        for outcome in (*built.samples, *built.rejected):  # it changes files: until both stand, the journal holds it
            if ("reason" in outcome) != ("reason" in self.outcomes[outcome["document_id"]]):
                append_jsonl(self.journal, outcome)
        for path, records in ((self.accepted_path, built.samples), (self.rejected_path, built.rejected)):
            if records or path.is_file():
                write_jsonl(path, records)
        self.journal.unlink(missing_ok=True)
        return built


def across(outcomes: Iterable[dict], max_repeats: int) -> Iterable[dict]:
    """The outcomes in order, samples that repeat earlier ones turned into rejections of stage "corpus".

    Such a rejection holds its messages, so that it can become a sample again when a later run sees it in another order.
    """
    plain = lambda text: re.sub(r"\W+", " ", text.lower()).strip()  # noqa: E731
    first: dict[tuple[str, str], str] = {}
    times: Counter[str] = Counter()
    for outcome in outcomes:
        if "messages" not in outcome:
            yield outcome
            continue
        sample = {k: v for k, v in outcome.items() if k not in ("stage", "reason", "question", "answer", "raw")}
        question, answer = sample["messages"][0]["content"].rsplit("\n\n", 1)[-1], sample["messages"][1]["content"]
        key = plain(question), plain(answer)
        reason = ""
        if key in first:
            reason = f"duplicate: question and answer are those of document {first[key]}"
        elif times[key[0]] >= max_repeats:
            reason = f"duplicate: {times[key[0]]} other documents are asked the same question"
        else:
            first[key] = sample["document_id"]
            times[key[0]] += 1
        why = {"stage": "corpus", "reason": reason, "question": question, "answer": answer, "raw": ""}
        yield sample | why if reason else sample


def text_hash(text: str) -> str:
    """Sixteen hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
