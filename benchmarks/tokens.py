"""Chats to tokens, ours beside the published way, on the same rows: tokens/s, bytes on disk, peak memory; then opening, and cost.

    python benchmarks/tokens.py            1,000 rows of the mix (up to 64k tokens), a 100 GB store opened; results/tokens.json
    python benchmarks/tokens.py --quick    40 rows of up to 8k tokens; writes only where --out is given

The rows: verifiable samples over the project's documents and Python's own texts, with the lengths of "the mix" (`paper_scale.mix`:
one in ten between 8k and 64k tokens), and the short instructions of data_samples, mixed by `data.mix`.

The published way (`published`, below) encodes one row after the other and pads each to 65,536 int64 ids and as many int64
labels, all rows in two arrays that are saved at the end. Here the arrays are made once and filled, so that it pays for no copy.
Ours is `data.tokenize`, alone on one thread, with the tokenizer's threads on all cores, and as two processes.

Each run is a fresh process. Its clock starts when tokenizer and libraries are loaded and stops when all files are closed (two
processes load them once more, on the clock). Peak memory is the largest resident size of the process and its children together,
sampled every 20 ms, or of the process alone as the system counted it, if that is larger; "working" is that less the size when
the clock starts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

PAD = 65_536
ANSWER = 300  # tokens of an answer that a model writes; those of the verifiable samples are a short sentence
SHORT = Path(__file__).resolve().parents[1] / "data_samples" / "instructions" / "short.jsonl"
WAYS = ("published", "ours, one thread", "ours", "ours, two processes")
PRICES = {"own server": (0.0, 0.0), "0.15 in, 0.60 out": (0.15, 0.6), "1 in, 4 out": (1.0, 4.0), "3 in, 15 out": (3.0, 15.0), "8 in, 24 out": (8.0, 24.0)}


def make_rows(folder: Path, rows: int, longest: int, seed: int) -> Path:
    """The rows of the benchmark as a JSONL of samples, made once a folder."""
    from longalign_lib.data.documents import python_source, python_topics, read_samples
    from longalign_lib.data.jsonl import iter_jsonl, write_jsonl
    from longalign_lib.data.mix import mix
    from longalign_lib.data.verifiable import retrieval_samples
    from longalign_lib.models import load_tokenizer
    from longalign_lib.train.paper_scale import mix as lengths_of_the_mix

    out = folder / f"mix_{rows}_{longest}_{seed}.jsonl"
    if out.is_file():
        return out
    documents = read_samples()[0] + python_topics() + (python_source() if longest > 8192 else [])
    lengths = np.sort(np.clip(lengths_of_the_mix(rows, seed), 128, longest))
    n_long = max(1, int((lengths > min(8192, longest // 2)).sum()))
    written = [x for x in iter_jsonl(SHORT)][: len(lengths) // 10]
    bins = [*np.array_split(lengths[len(written) : -n_long], 10 if rows > 100 else 2), lengths[-n_long:]]
    made = [retrieval_samples(documents, load_tokenizer(), len(b), int(b[-1]), seed + k, max(128, min(int(b[0]), int(b[-1]) - 64)), progress=False)
            for k, b in enumerate(bins) if len(b)]  # fmt: skip
    write_jsonl(folder / "long.jsonl", made[-1])
    write_jsonl(folder / "short.jsonl", [*written, *(s for part in made[:-1] for s in part)])
    mix("longalign-10k", folder / "long.jsonl", folder / "short.jsonl", seed, out, progress=False)
    return out


# --------------------------------------------------------------------------------------------------------------- ways
def published(samples: Path, tokenizer, out: Path) -> dict:
    """Every row alone, padded to PAD ids and PAD labels of int64; labels on answers and their end token."""
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
    system = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False).split("<|im_start|>user")[0]
    with samples.open(encoding="utf-8") as handle:
        chats = [json.loads(line)["messages"] for line in handle]
    inputs = np.full((len(chats), PAD), tokenizer.pad_token_id or 0, dtype=np.int64)
    labels = np.full((len(chats), PAD), -100, dtype=np.int64)
    tokens = targets = 0
    for row, messages in enumerate(chats):
        ids = encode(system)
        wanted = [-100] * len(ids)
        for message in messages:
            head, body = encode(f"<|im_start|>{message['role']}\n"), encode(message["content"] + "<|im_end|>")
            ids += head + body + encode("\n")
            wanted += [-100] * len(head) + (body if message["role"] == "assistant" else [-100] * len(body)) + [-100]
        n = min(len(ids), PAD)
        inputs[row, :n], labels[row, :n] = ids[:n], wanted[:n]
        tokens, targets = tokens + n, targets + sum(x != -100 for x in wanted[:n])
    np.save(out / "inputs.npy", inputs)
    np.save(out / "labels.npy", labels)
    return {"tokens": tokens, "targets": targets}


def ours(samples: Path, tokenizer, out: Path, processes: int) -> dict:
    """`data.tokenize`."""
    from longalign_lib.data.tokenize import tokenize

    report = tokenize(samples, tokenizer, out, max_length=PAD, processes=processes, progress=False)
    return {"tokens": report["tokens"], "targets": report["targets"]}


def run_one(way: str, samples: Path, out: Path) -> dict:
    """Run one way in this process."""
    from longalign_lib.data import tokenize  # noqa: F401  (libraries are loaded before the clock starts)
    from longalign_lib.models import load_tokenizer

    tokenizer = load_tokenizer()
    tokenizer("warm", add_special_tokens=False)
    samples.read_bytes()  # from the disk into the system's cache
    base, began = psutil.Process().memory_info().rss, time.perf_counter()
    found = published(samples, tokenizer, out) if way == "published" else ours(samples, tokenizer, out, 2 if "two" in way else 1)
    return found | {"seconds": time.perf_counter() - began, "base_mb": base / 1e6, "own_peak": own_peak()}


def own_peak() -> int:
    """This process's largest resident size so far, in bytes; 0 where the system does not tell."""
    with contextlib.suppress(FileNotFoundError), open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return 0


def measure(way: str, samples: Path, repeats: int) -> dict:
    """Run one way in fresh processes; returns its line, times of the middle run."""
    lines = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=samples.parent) as folder:
            env = {**os.environ, "TOKENIZERS_PARALLELISM": "false" if way in ("published", "ours, one thread") else "true"}
            command = [sys.executable, __file__, "--one", way, "--samples", str(samples), "--out", folder]
            child = psutil.Popen(command, stdout=subprocess.PIPE, env=env, text=True)
            peak = watch(child)
            with child.stdout as output:
                text = output.read()
            if child.wait():
                raise RuntimeError(f"{way} failed with exit status {child.returncode}")
            size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        line = json.loads(text.splitlines()[-1])
        lines.append(line | {"bytes": size, "peak_mb": max(peak, line.pop("own_peak")) / 1e6})
    line = sorted(lines, key=lambda x: x["seconds"])[len(lines) // 2]
    line["peak_mb"] = max(x["peak_mb"] for x in lines)
    return {"way": way, "runs": repeats, **line, "tokens_per_second": line["tokens"] / line["seconds"],
            "bytes_per_token": line["bytes"] / line["tokens"], "working_mb": line["peak_mb"] - line["base_mb"]}  # fmt: skip


def watch(child: psutil.Popen) -> int:
    """The largest resident size of a process and its children together until it ends, in bytes."""
    peak = 0
    while child.poll() is None:
        with contextlib.suppress(psutil.Error):
            family = [child, *child.children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in family))
        time.sleep(0.02)
    return peak


# ------------------------------------------------------------------------------------------------------------ opening
def opening(samples: Path, copies: int) -> dict:
    """Open a store whose shards are a few real ones under many names (hard links take no space), and use it."""
    from longalign_lib.data import store as files
    from longalign_lib.data.tokenize import tokenize
    from longalign_lib.data.tokens import TokenStore
    from longalign_lib.models import load_tokenizer

    with tempfile.TemporaryDirectory(dir=samples.parent) as folder:
        folder = Path(folder)
        tokenize(samples, load_tokenizer(), folder, max_length=PAD, progress=False)
        shards = [folder / files.SHARD.format(k) for k in range(len(list(folder.glob(files.SHARD.replace("{:05d}", "*")))))]
        for k in range(len(shards), copies * len(shards)):
            os.link(shards[k % len(shards)], folder / files.SHARD.format(k))
        files.write_index(folder, {})
        base, began = psutil.Process().memory_info().rss, time.perf_counter()
        store = TokenStore.load(folder)
        opened = time.perf_counter() - began
        rows = len(store)
        lengths, targets = store.lengths, store.targets
        counted = store.count_targets(np.arange(rows), np.zeros(rows, dtype=np.int64), lengths)
        known = time.perf_counter() - began
        picked = np.random.default_rng(0).integers(0, rows, 200)
        start = time.perf_counter()
        read = [len(store[int(i)][0]) for i in picked]
        row = (time.perf_counter() - start) / len(picked)
        assert read == lengths[picked].tolist() and (counted == targets).all()
        return {"gigabytes": copies * sum(s.stat().st_size for s in shards) / 1e9, "shards": copies * len(shards), "rows": rows, "tokens": int(lengths.sum()), "open_s": opened,
                "open_lengths_targets_s": known, "row_ms": 1000 * row, "memory_mb": (psutil.Process().memory_info().rss - base) / 1e6}  # fmt: skip


def costs(samples: Path) -> list[dict]:
    """What 10,000 long samples like these cost at several prices: their documents counted, ANSWER tokens for each answer."""
    from longalign_lib.data.jsonl import iter_jsonl
    from longalign_lib.data.price import price_table, self_instruct_calls
    from longalign_lib.data.tokens import TokenStore
    from longalign_lib.models import load_tokenizer

    store, _ = TokenStore.build((s for s in iter_jsonl(samples) if s["part"] == "long"), load_tokenizer(), PAD, progress=False)
    calls = self_instruct_calls(store.lengths - store.targets + ANSWER, np.full(len(store), ANSWER))
    return price_table(calls, PRICES).to_dict("records")


def main(argv: list[str] | None = None) -> dict:
    """Run, print, write; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/tokens.json")
    parser.add_argument("--quick", action="store_true", help="40 rows, one run each; writes only where --out is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", default="build/tokens", help="folder for the rows and for what is measured")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="which to run; the first is what others are compared with")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(run_one(args.one, args.samples, Path(args.out))))
        return {}
    rows, longest, repeats, copies = (40, 8192, 1, 20) if args.quick else (1000, PAD, args.repeats, 10_000)
    folder = Path(args.work)
    folder.mkdir(parents=True, exist_ok=True)
    samples = make_rows(folder, rows, longest, args.seed)
    lines = [measure(way, samples, repeats) for way in args.ways]
    theirs = lines[0]
    for line in lines:
        line |= {"times_smaller": theirs["bytes"] / line["bytes"], "times_faster": theirs["seconds"] / line["seconds"],
                 "times_less_memory": theirs["working_mb"] / line["working_mb"]}  # fmt: skip
    table = pd.DataFrame(lines)
    print(table.drop(columns=["runs", "bytes", "base_mb"]).to_string(index=False, float_format=lambda x: f"{x:,.4g}"))
    opened = opening(samples, copies)
    print("\nopening a store: " + ", ".join(f"{k} {v:,.4g}" for k, v in opened.items()))
    bill = costs(samples)
    mean = statistics.mean((x["prompt_tokens"] + x["completion_tokens"]) / x["samples"] for x in bill)
    print(f"\n10,000 long samples like these, {mean:,.0f} tokens of calls each, answers of {ANSWER}:\n{pd.DataFrame(bill).to_string(index=False)}")
    numbers = {"rows": rows, "longest": longest, "tokens": lines[0]["tokens"], "ways": lines, "opening": opened, "cost": bill}
    if not (args.quick and args.out == parser.get_default("out")):
        from longalign_lib.course.results import write_result

        path = write_result(args.out, "ci", args.seed, cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), **numbers)
        print(f"\nwritten to {path}")
    return numbers


if __name__ == "__main__":
    main()
