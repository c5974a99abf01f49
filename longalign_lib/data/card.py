"""A data card: one page that says what a set of samples is, with pictures, what was rejected, what it cost, and samples to read.

It is written twice from the same text: README.md with the front matter that the Hub shows as a dataset card, and index.html, one
file with its pictures inside. What a model or a document wrote stands in code blocks there, longer in their fence than anything
in it, and is escaped in the page: text that looks like markup stays text. Cost: a pass over the samples.
"""

from __future__ import annotations

import base64
import html
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from longalign_lib.data.diversity import nearest, openings
from longalign_lib.files import whole
from longalign_lib.plots import card as figures
from longalign_lib.plots import data as data_figures

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**12, "1M<n<10M"))
HEAD, TAIL = 500, 160  # characters of a document that are shown


def question_of(sample: dict) -> str:
    """The last user turn, without the document before it."""
    user = [m["content"] for m in sample["messages"] if m["role"] == "user"]
    return user[-1].rsplit("\n\n", 1)[-1] if user else ""


def write_card(samples: Sequence[dict], out: Path | str, *, title: str = "Long instructions", licence: str = "", rejected: Sequence[dict] = (),
               cost: pd.DataFrame | None = None, facts: dict | None = None, read: int = 2, seed: int = 0, most_questions: int = 5_000) -> Path:  # fmt: skip
    """Write the card of a set of samples into a folder.

    Args:
        samples: dicts with messages and length; source, task, language, document_id, model are shown where they are.
        out: folder for README.md, index.html, and the pictures with their numbers.
        title, licence: as they are to stand on the card; no licence leaves a line that asks for one.
        rejected: dicts with reason, and question, answer, document_id where they are.
        cost: a table to show under "Cost".
        facts: more lines for the first table, such as the tokenizer that counted.
        read: samples of each task, and rejections of each reason, to print.
        seed: of the choice of samples to read, and of the questions compared where there are more than ``most_questions``.

    Returns:
        the path of index.html.

    Raises:
        ValueError: no samples; or one has no messages or no length.
    """
    out = Path(out)
    usable, unusable = [], []
    for k, s in enumerate(samples):
        reason = _unusable(s)
        (unusable if reason else usable).append({"id": f"sample {k}", "reason": f"not shown on this card: {reason}"} if reason else s)
    samples, rejected = usable, [*rejected, *unusable]
    table = _table(samples)
    figures.sample_lengths(table, out)
    figures.origins(table, out)
    parts = [f"# {title}", _facts(table, rejected, facts or {}, licence)]
    parts += ["## Lengths", "![tokens of the samples](sample_lengths.png)"]
    parts += ["## Sources and tasks", "![samples by source and task](origins.png)"]
    several = table.groupby(["task", "language"]).size().unstack(fill_value=0)
    parts += [_markdown(several.assign(tokens=table.groupby("task").length.sum()).reset_index())]
    asked = table.question.tolist()
    if len(asked) > most_questions:
        asked = random.Random(seed).sample(asked, most_questions)
    note = f"{len(asked):,} of {len(table):,} questions. " if len(asked) < len(table) else ""
    alike = nearest(asked)
    begun = openings(asked)
    figures.variety(begun, alike, out)
    parts += ["## Variety", f"{note}{np.mean(alike >= 0.7):.1%} of the questions share 70% of their word pairs with another one.",
              "![how questions begin and how alike they are](variety.png)", _markdown(begun[:12])]  # fmt: skip
    parts += ["## Rejections", *_rejections(table, rejected, out, read, seed)]
    parts += ["## Cost", "No cost was recorded." if cost is None else _markdown(cost)]
    parts += ["## Samples to read", *_to_read(samples, table, read, seed)]
    text = "\n\n".join(parts) + "\n"
    front = {"pretty_name": title, "language": sorted(set(table.language) - {""}), "task_categories": ["text-generation"],
             "size_categories": [next(name for most, name in SIZES if len(table) < most)]} | ({"license": licence} if licence else {})  # fmt: skip
    with whole(out / "README.md") as half:
        half.write_text(f"---\n{yaml.safe_dump(front, allow_unicode=True, sort_keys=False)}---\n\n{text}", encoding="utf8")
    with whole(out / "index.html") as half:
        half.write_text(_page(title, text, out), encoding="utf8")
    return out / "index.html"


def _unusable(sample: dict) -> str:
    """Why a sample with messages cannot be shown: a content that is no text, or text that no file can hold."""
    for number, message in enumerate(sample.get("messages") or ()):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str):
            return f"message {number} has no text"
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            return f"message {number} holds half a character (a lone surrogate)"
    return ""


def _table(samples: Sequence[dict]) -> pd.DataFrame:
    if not samples:
        raise ValueError("a card needs samples, and there are none: give a JSONL file of samples with messages and length")
    rows = []
    for k, s in enumerate(samples):
        if not s.get("messages") or not isinstance(s.get("length"), int):
            raise ValueError(f"sample {k} has no messages or no length (tokens): {str(s)[:80]!r}")
        rows.append({"length": s["length"], "question": question_of(s)} | {n: str(s.get(n) or "unknown") for n in
                    ("source", "task", "language", "document_id", "model")})  # fmt: skip
    return pd.DataFrame(rows)


def _facts(table: pd.DataFrame, rejected, facts: dict, licence: str) -> str:
    rows = {
        "samples": f"{len(table):,}", "tokens": f"{table.length.sum():,}",
        "tokens a sample": f"median {table.length.median():,.0f}, longest {table.length.max():,}",
        "documents": f"{table.document_id.nunique():,}",
        "languages": ", ".join(f"{k} {n / len(table):.0%}" for k, n in table.language.value_counts().items()),
        "written by": ", ".join(f"{k} ({n:,})" for k, n in table.model.value_counts().items()),
        "rejected": f"{len(rejected):,}", **{k: str(v) for k, v in facts.items()},
        "licence": licence or "not given: sources differ, see their own terms",
    }  # fmt: skip
    return _markdown(pd.DataFrame({"": rows.keys(), " ": rows.values()}))


def _rejections(table: pd.DataFrame, rejected, out: Path, read: int, seed: int) -> list[str]:
    if not rejected:
        return ["None on record."]
    both = pd.DataFrame({"outcome": ["accepted"] * len(table) + ["rejected"] * len(rejected),
                         "reason": [""] * len(table) + [str(r.get("reason", "no reason given")) for r in rejected]})  # fmt: skip
    data_figures.outcomes(both, out)
    parts = ["![accepted and rejected](outcomes.png)"]
    for gate, group in sorted(_groups(rejected, lambda r: str(r.get("reason", "")).split(":")[0]).items()):
        for r in random.Random(f"{seed}:{gate}").sample(group, min(read, len(group))):
            names = ("document_id", "id", "reason", "question", "answer", *(() if r.get("question") else ("raw",)))  # raw: the list it wrote
            shown = [f"{name}: {_cut(str(r[name]))}" for name in names if r.get(name)]
            parts.append(_block("\n".join(shown)))
    return parts


def _to_read(samples, table: pd.DataFrame, read: int, seed: int) -> list[str]:
    parts = []
    for task, places in sorted(_groups(range(len(samples)), lambda k: table.task[k]).items()):
        parts.append(f"### {_plain(task)}")
        for k in sorted(random.Random(f"{seed}:{task}").sample(places, min(read, len(places)))):
            line = table.loc[k]
            said = "\n\n".join(f"[{m['role']}]\n{_cut(m['content'])}" for m in samples[k]["messages"])
            parts += [f"{_plain(line.document_id)} · {_plain(line.source)} · {_plain(line.language)} · {line.length:,} tokens", _block(said)]
    return parts


def _groups(items, key) -> dict[str, list]:
    groups: dict[str, list] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _cut(text: str) -> str:
    left_out = len(text) - HEAD - TAIL
    return text if left_out < 100 else f"{text[:HEAD]} … [{left_out:,} characters] … {text[-TAIL:]}"


def _block(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(x) for x in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _plain(value) -> str:
    """A value in a line or a table's cell of markdown: no markup, no line break."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$])", r"\\\1", re.sub(r"\s+", " ", str(value)))


def _markdown(table: pd.DataFrame) -> str:
    def line(cells):
        return "| " + " | ".join(cells) + " |"

    shown = [[_plain(f"{x:,}" if isinstance(x, (int, np.integer)) else f"{x:,.4g}" if isinstance(x, float) else x) for x in row]
             for row in table.itertuples(index=False, name=None)]  # fmt: skip
    return "\n".join([line(_plain(c) for c in table.columns), line(["---"] * len(table.columns)), *(line(r) for r in shown)])


STYLE = """body{max-width:54rem;margin:2rem auto;padding:0 1rem;font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff}
img{max-width:100%}table{border-collapse:collapse;margin:1rem 0}td,th{border-bottom:1px solid #ccc;padding:.25rem .8rem;text-align:left}
pre{background:#f5f5f2;padding:.8rem;white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px}"""


def _page(title: str, text: str, out: Path) -> str:
    import mistune

    body = mistune.create_markdown(escape=True, plugins=["table"])(text)

    def inside(match: re.Match) -> str:
        picture = out / html.unescape(match[1])
        return f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"' if picture.is_file() else match[0]

    body = re.sub(r'src="([\w.-]+\.png)"', inside, body)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n")  # fmt: skip
