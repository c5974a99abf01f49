"""Sample files to a token store: shard by shard, in several processes, going on where a kill ended it.

    plan      read the files once: cut them into shards of `shard_samples` lines or `SHARD_BYTES`, hash each one's bytes and settings
    encode    each shard that is not there with its hash: read its lines, encode, write the Arrow file whole
    index     when all are there: rejected.jsonl, report.json, and last index.arrow, which makes it a store

Invariants: the files depend on samples, tokenizer and settings alone, not on processes or on where a run was cut off; a
kill loses the shards being made; changed samples or settings remake the shards that they touch; every line is a row or a
rejection with file and line. With one process the tokenizer's own threads use all cores; several processes take a shard
each. Cost: two passes over the text; a process holds a shard's encoded rows and a fifth of a megabyte of text (or one sample).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from longalign_lib.data import store as files
from longalign_lib.data.chat import fix_date, need_template
from longalign_lib.data.encode import encode_rows, summary
from longalign_lib.data.formats import LONGEST_LINE, parse_line
from longalign_lib.data.jsonl import write_jsonl
from longalign_lib.data.tokens import clear
from longalign_lib.files import whole

FORMAT = 1  # of the shards; another number remakes all
SHARD_BYTES = 2**22  # of samples, after which a shard ends: a million tokens or so, held in memory until they are written


@dataclass(frozen=True)
class Task:
    """One shard to make: lines of a file, what they are numbered from, and where the shard goes."""

    source: Path
    offset: int
    size: int
    line: int
    sample: int
    samples: int
    key: str
    out: Path


def tokenize(
    samples: str | Path | Sequence[str | Path], tokenizer, out: str | Path, max_length: int = 65_536,
    over_long: str = "truncate", answers: str = "all", processes: int = 1, shard_samples: int = 1024,
    day: str | None = None, progress: bool = True, **template,
) -> dict:  # fmt: skip
    """Encode samples files into a token store; a rerun after a kill goes on and yields the same files.

    Args:
        samples: JSONL files of samples (a line {"messages": [...], ...}), in order.
        tokenizer: with a chat template.
        out: folder of the store, for `TokenStore.load`.
        max_length, over_long, answers: see `encode.encode_rows`.
        processes: 1 works here, the tokenizer's threads on all cores; more start that many processes (scripts then need
            the ``if __name__ == "__main__"`` guard).
        shard_samples: most lines of a shard, which also ends at `SHARD_BYTES`; what a kill can lose is this much of each process's work.
        day: ISO date that a template with a date writes; by default the day on which the store was begun.
        template: passed on to the chat template, see `chat.encode_chat`.

    Returns:
        report, also in out/report.json: the counts of `encode.summary`; "rejected" (lines that are no row, listed in
        out/rejected.jsonl as {"id": "file:line", "row", "reason"}), "bytes" on disk, "settings". Returned alone:
        "shards", "shards_found" (finished by an earlier run).

    Raises:
        FileNotFoundError: a samples file is missing. ValueError: an unknown choice, an over-long row under "error", a
            tokenizer without a chat template, or no usable sample.
    """
    sources = [Path(p) for p in ([samples] if isinstance(samples, (str, Path)) else samples)]
    for source in sources:
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no such samples file")
    if processes < 1 or shard_samples < 1:
        raise ValueError(f"processes is {processes} and shard_samples {shard_samples}; both must be at least 1")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    choices = {"max_length": max_length, "over_long": over_long, "answers": answers}
    list(encode_rows([], tokenizer, **choices))  # an unknown choice is named before anything is read
    template, day = _template(tokenizer, template, day, out)
    settings = {"format": FORMAT, "tokenizer": tokenizer_hash(tokenizer), **choices, "day": day, "template": template}
    tasks = list(plan(sources, settings, out, shard_samples, progress))
    known = {task.out: files.shard_facts(task.out) for task in tasks}
    facts = {path: found for path, found in known.items() if found}
    missing = [t for t in tasks if facts.get(t.out, {}).get("key") != t.key]
    gone = set(out.glob(files.SHARD.replace("{:05d}", "*"))) - set(known)
    if missing or gone:
        _forget(out, gone)
    facts |= dict(_make(missing, tokenizer, choices, template, processes, progress, sum(t.samples for t in tasks)))
    return _finish(out, [facts[t.out] for t in tasks], settings) | {"shards": len(tasks), "shards_found": len(tasks) - len(missing)}


def tokenizer_hash(tokenizer) -> str:
    """16 hex digits of what the tokenizer does to text: vocabulary, merges, added tokens (not its template)."""
    if tokenizer.is_fast:
        rules = {k: v for k, v in json.loads(tokenizer.backend_tokenizer.to_str()).items() if k not in ("truncation", "padding")}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]


def plan(sources: Sequence[Path], settings: dict, out: Path, shard_samples: int, progress: bool = False) -> Iterator[Task]:
    """Cut the files into shards: one pass over their bytes, none of them kept."""
    sample = number = 0
    bar = tqdm(total=sum(p.stat().st_size for p in sources), unit="B", unit_scale=True, desc="read", leave=False, delay=2, disable=not progress)
    for source in sources:
        with source.open("rb") as handle:
            offset, line, end = 0, 1, False
            while not end:
                begin = {"source": source, "offset": offset, "line": line, "sample": sample}
                digest = hashlib.sha256(json.dumps([settings, source.name, line, sample], sort_keys=True).encode())
                while sample - begin["sample"] < shard_samples and offset - begin["offset"] < SHARD_BYTES:
                    raw = handle.readline()
                    end = not raw
                    if end:
                        break
                    digest.update(raw)
                    offset, line, sample = offset + len(raw), line + 1, sample + (not raw.isspace())
                bar.update(offset - begin["offset"])
                if sample > begin["sample"]:
                    path = out / files.SHARD.format(number)
                    yield Task(**begin, size=offset - begin["offset"], samples=sample - begin["sample"], key=digest.hexdigest(), out=path)
                    number += 1
    bar.close()


def make_shard(task: Task, tokenizer, choices: dict, template: dict) -> dict:
    """Encode one shard's lines and write it; returns its facts."""
    rejected: list[dict] = []
    places: dict[int, str] = {}

    def numbered() -> Iterator[tuple[int, dict]]:
        with task.source.open("rb") as handle:
            handle.seek(task.offset)
            sample, left = task.sample, task.size
            for line in range(task.line, task.line + task.size):
                raw = handle.readline()
                left -= len(raw)
                if not raw.isspace():
                    record, reason = parse_line(raw, line == 1, LONGEST_LINE)
                    places[sample] = f"{task.source.name}:{line}"
                    if record is None:
                        rejected.append({"id": places[sample], "row": sample, "reason": reason})
                    else:
                        yield sample, record
                    sample += 1
                if left <= 0:
                    return

    dtype = files.id_type(1 + max(tokenizer.get_vocab().values()))
    small = lambda row: row | {"input_ids": files.narrow(row["input_ids"], dtype)} if "input_ids" in row else row  # noqa: E731
    rows = [small(row) for row in encode_rows(numbered(), tokenizer, **choices, **template)]
    rejected += [{"id": places[r["sample"]], "row": r["sample"], "reason": r["reason"]} for r in rows if r["fate"] == "left_out"]
    counts = summary(rows) | {"unreadable": task.samples - len({r["sample"] for r in rows})}
    facts = {"key": task.key, "counts": counts, "rejected": sorted(rejected, key=lambda r: r["row"])}
    kept = [r for r in rows if r["fate"] != "left_out"]
    files.write_shard(task.out, kept, dtype, facts)
    return facts


# ------------------------------------------------------------------------------------------------------------ helpers
def _template(tokenizer, template: dict, day: str | None, out: Path) -> tuple[dict, str | None]:
    """The template's options with its text, a date in it fixed to the day on which the store was begun."""
    text = need_template(tokenizer, template.get("chat_template"))
    begun = out / "begun.json"
    if "strftime_now(" not in text:
        return template | {"chat_template": text}, None
    if day is None and begun.is_file():
        day = json.loads(begun.read_text(encoding="utf-8"))["day"]
    day = datetime.date.fromisoformat(day or datetime.datetime.now(datetime.UTC).date().isoformat())
    with whole(begun) as half:
        half.write_text(json.dumps({"day": day.isoformat()}) + "\n", encoding="utf-8")
    return template | {"chat_template": fix_date(text, day)}, day.isoformat()


def _forget(out: Path, gone: Iterable[Path]) -> None:
    """Take the index away while shards change, and what an earlier store left that this one does not replace."""
    (out / files.INDEX).unlink(missing_ok=True)
    if (out / "meta.json").is_file():
        clear(out)
    for path in gone:
        path.unlink(missing_ok=True)


def _make(tasks, tokenizer, choices, template, processes: int, progress: bool, total: int) -> Iterator[tuple[Path, dict]]:
    """Make shards, here or in processes, and yield (path, facts) as they come."""
    done = total - sum(t.samples for t in tasks)
    with tqdm(total=total, initial=done, unit="sample", desc="tokenize", leave=False, delay=2, disable=not progress) as bar:
        if processes == 1 or len(tasks) < 2:
            for task in tasks:
                yield task.out, make_shard(task, tokenizer, choices, template)
                bar.update(task.samples)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(tasks)), context, _begin, (tokenizer, choices, template)) as pool:
            running = {pool.submit(_work, task): task for task in tasks}
            try:
                for future in as_completed(running):
                    yield running[future].out, future.result()
                    bar.update(running[future].samples)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _begin(*arguments) -> None:
    """A worker's start: one thread a process, and an end when its parent has ended, however it did."""
    global _SHARED
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _SHARED = arguments
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(task: Task) -> dict:
    return make_shard(task, *_SHARED)


_SHARED: tuple = ()


def _finish(out: Path, facts: Iterable[dict], settings: dict) -> dict:
    """Write rejected.jsonl, report.json and the index; returns the report."""
    counts: Counter = Counter()
    rejected: list[dict] = []
    for found in facts:
        counts.update(found["counts"])
        rejected += found["rejected"]
    report = dict(counts)
    report["samples"] = report.get("samples", 0) + report.pop("unreadable", 0)
    report["rejected"] = len(rejected)
    write_jsonl(out / "rejected.jsonl", rejected)
    if rejected and not (report["kept"] or report["truncated"]):
        raise ValueError(f"none of {report['samples']} samples could be used; the first, {rejected[0]['id']}: {rejected[0]['reason']}")
    report["settings"] = {k: v for k, v in settings.items() if k != "template"}
    files.write_index(out, report)
    report["bytes"] = sum(p.stat().st_size for p in [out / files.INDEX, *out.glob(files.SHARD.replace("{:05d}", "*"))])
    with whole(out / "report.json") as half:
        half.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report
