"""Instructions that were written by hand for this project, in the schema in which a model's samples come.

data_samples/instructions/long.jsonl names a document where a sample holds its text; here the two are joined, as
`instructions.build_instructions` joins them. They stand beside generated samples to show what good ones look like, and to
train on where no strong model is at hand. Cost: reading two small files, and one tokenisation where lengths are wanted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from longalign_lib.data.documents import SAMPLES, Document, read_samples
from longalign_lib.data.jsonl import read_jsonl
from longalign_lib.data.tokens import encode_chat

LONG = SAMPLES.parent / "instructions" / "long.jsonl"
BY_HAND = "hand-written"


def read_long_samples(documents: Sequence[Document] | None = None, path: Path | str | None = None, tokenizer=None) -> tuple[list[dict], list[dict]]:
    """Hand-written questions and answers joined with their documents.

    Args:
        documents: None means `documents.read_samples`.
        path: JSONL of {"id", "document_id", "task", "language", "question", "answer"}; None means this project's file.
        tokenizer: "length" is counted with it, chat template included; None leaves it 0.

    Returns:
        (samples in LongAlign-10k's schema with id, source, task, language, document_id, model "hand-written" and prompt_hash,
        rejected: {"id", "reason"} of those whose document is not there or that lack a field).
    """
    known = {d.id: d for d in (read_samples()[0] if documents is None else documents)}
    samples, rejected = [], []
    for number, item in enumerate(read_jsonl(path or LONG), start=1):
        name = str(item.get("id") or f"record {number}")
        missing = [k for k in ("document_id", "task", "language", "question", "answer") if not item.get(k)]
        document = known.get(item.get("document_id"))
        if missing or document is None:
            rejected.append({"id": name, "reason": f"lacks {', '.join(missing)}" if missing else f"no document {item['document_id']!r}"})
            continue
        prompt = f"{document.text}\n\n{item['question']}"
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": item["answer"]}]
        length = len(encode_chat(tokenizer, messages)[0]) if tokenizer else 0
        samples.append({"messages": messages, "length": length, "id": name, "source": document.source, "task": item["task"],
                        "language": item["language"], "document_id": document.id, "model": BY_HAND,
                        "prompt_hash": hashlib.sha256(prompt.encode()).hexdigest()[:16]})  # fmt: skip
    return samples, rejected
