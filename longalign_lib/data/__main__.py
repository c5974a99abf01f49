"""Data construction from the command line, a step a word: samples, documents, instruct, verifiable, tokenize, mix, card.

    python -m longalign_lib.data samples    --out OUT                                  # this project's own, to try the rest on
    python -m longalign_lib.data documents  --readers samples python ~/texts wikipedia --n 10000 --out OUT
    python -m longalign_lib.data instruct   --documents OUT/documents.jsonl --base_url URL --llm NAME --out OUT --dry_run
    python -m longalign_lib.data verifiable --documents OUT/documents.jsonl --n 2000 --out OUT/verifiable.jsonl
    python -m longalign_lib.data mix        --suite longalign-10k --long OUT/*.jsonl --short sharegpt.json --out OUT/suite.jsonl
    python -m longalign_lib.data tokenize   OUT/suite.jsonl --out OUT/store --processes 8
    python -m longalign_lib.data card       OUT/instructions.jsonl --rejected OUT/rejected.jsonl --out OUT/card

Every step reads and writes files, and may be killed: started again with the same words it goes on and ends with the same
files; no question that was answered is asked again. Without --base_url the default model answers, on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from longalign_lib.data.hub import SourceError
from longalign_lib.data.jsonl import JsonlError, read_jsonl, write_jsonl
from longalign_lib.llm import ChatClient, ChatError


def samples(args) -> None:
    """Write this project's own texts and hand-written instructions in the formats that the other steps read."""
    from dataclasses import asdict

    from longalign_lib.data.documents import SAMPLES, read_samples
    from longalign_lib.data.written import read_long_samples
    from longalign_lib.models import load_tokenizer

    out, (pages, rejected) = Path(args.out), read_samples()
    long, lost = read_long_samples(pages, tokenizer=load_tokenizer(args.tokenizer))
    if rejected or lost:
        raise ValueError(f"data_samples is damaged: {[*rejected, *lost][0]}; restore it from the repository")
    files = {"documents": [asdict(d) for d in pages], "long": long, "short": read_jsonl(SAMPLES.parent / "instructions" / "short.jsonl")}
    for name, rows in files.items():
        print(f"{len(rows):4} rows: {write_jsonl(out / f'{name}.jsonl', rows)}")


def documents(args) -> None:
    """Collect, count, draw by length, without near-duplicates."""
    from longalign_lib.data.build import build_documents

    path, rejected, report = build_documents(
        args.out, args.readers, n=args.n, min_tokens=args.min_tokens, max_tokens=args.max_tokens, spread=args.spread,
        quotas=_weights(args.quota), chinese=None if args.chinese < 0 else args.chinese, tokenizer=args.tokenizer, seed=args.seed,
        threshold=args.threshold or None, over_long=args.over_long, scan=args.scan or None)  # fmt: skip
    print(pd.DataFrame(report.attrs["readers"]).to_string(index=False), "\n")
    for language, part in report.groupby("language"):
        if args.chinese >= 0 and part.got.sum() > part.wanted.sum():
            print(f"note: {part.got.sum()} documents in {language!r} where the shares asked for {part.wanted.sum()}: the other language had too few\n")
    print(report.to_string(index=False), f"\n\nwritten: {path} ({int(report.got.sum())} documents), {rejected}")


def instruct(args) -> None:
    """Ask an endpoint for questions and answers, a sample a document."""
    from longalign_lib.data.documents import cut_to_tokens
    from longalign_lib.data.instructions import TASKS, build_instructions
    from longalign_lib.models import load_tokenizer

    tokenizer, out = load_tokenizer(args.tokenizer), Path(args.out)
    pages = [cut_to_tokens(d, tokenizer, args.cut) if args.cut else d for d in _read_documents(args.documents)]
    with _client(args, out, tokenizer) as client:
        if args.dry_run:
            for line in _calls_ahead(pages, client, args, tokenizer):
                print(line)
            return
        try:
            built = build_instructions(pages, client, tokenizer, out, seed=args.seed, tasks=args.tasks or TASKS,
                                       question_tokens=args.question_tokens, answer_tokens=args.answer_tokens, workers=2 * client.concurrency)  # fmt: skip
        finally:
            used = {k: round(v, 4) for k, v in client.usage.items()}
            print("used:", ", ".join(f"{k} {v:,}" for k, v in used.items()), flush=True)
    print(f"{len(built.samples)} samples, {len(built.rejected)} rejected, {len(built.failed)} without an answer, in {out}")
    for failure in built.failed[:3]:
        print(f"  {failure['document_id']}: {failure['reason']}", file=sys.stderr)


def verifiable(args) -> None:
    """Write samples whose answers are known by construction; no model is asked."""
    from longalign_lib.data.verifiable_build import ALL_KINDS, build_verifiable
    from longalign_lib.models import load_tokenizer

    path = build_verifiable(_read_documents(args.documents), load_tokenizer(args.tokenizer), args.out, args.n, seed=args.seed,
                            kinds=args.kinds or ALL_KINDS, low=args.min_tokens, high=args.max_tokens)  # fmt: skip
    print(f"{args.n} samples in {path}")


def tokenize(args) -> None:
    """Encode samples with a chat template into a token store."""
    from longalign_lib.data.tokenize import tokenize as build
    from longalign_lib.models import load_tokenizer

    report = build(args.samples, load_tokenizer(args.tokenizer), args.out, args.max_length, over_long=args.over_long,
                   processes=args.processes)  # fmt: skip
    print("\n".join(f"{k}: {v:,}" if isinstance(v, int) else f"{k}: {v}" for k, v in report.items()))


def mix(args) -> None:
    """Choose a suite of long and short samples by name and seed."""
    from longalign_lib.data.mix import TWO_SOURCES, report_table
    from longalign_lib.data.mix import mix as choose

    report = choose(args.suite, args.long, args.short, args.seed, args.out, sources=args.sources or TWO_SOURCES)
    print(report_table(report).to_string(index=False), *report["notes"], f"written: {args.out} ({report['rows']} rows)", sep="\n")


def card(args) -> None:
    """Write a data card: README.md for the Hub and index.html with its pictures inside."""
    from longalign_lib.data.card import write_card

    found = [s for path in args.samples for s in read_jsonl(path)]
    rejected = [r for path in args.rejected for r in read_jsonl(path)]
    cost = _spent(read_jsonl(args.cache, []), args.prices) if args.cache else None
    page = write_card(found, args.out, title=args.title, licence=args.licence, rejected=rejected, cost=cost, read=args.read, seed=args.seed)
    print(f"written: {page} and README.md beside it")


def _spent(answers: list[dict], prices: Sequence[float] | None) -> pd.DataFrame:
    """Answers, tokens and money of a cache file, a row a model."""
    from longalign_lib.data.price import cost_of

    lines = []
    for model, part in pd.DataFrame(answers, columns=["model", "prompt_tokens", "completion_tokens"]).groupby("model"):
        spent = cost_of(part, *(prices or (0, 0)))
        lines.append({"model": model, "answers": len(part), **spent} | ({} if prices else {"cost": "no prices given"}))
    return pd.DataFrame(lines, columns=["model", "answers", "prompt_tokens", "completion_tokens", "cost"])


def _read_documents(paths: Sequence[str]):
    from longalign_lib.data.documents import Document

    fields, found = ("id", "text", "source", "language", "title", "licence"), []
    for path in paths:
        for number, record in enumerate(read_jsonl(path), start=1):
            missing = [k for k in fields[:4] if not isinstance(record.get(k), str)]
            if missing:
                raise ValueError(f"{path}, document {number} lacks {', '.join(missing)}: make the file with the step `documents`")
            found.append(Document(**{k: record.get(k, "") for k in fields}))
    return found


@contextlib.contextmanager
def _client(args, out: Path, tokenizer):
    """A client of the endpoint named, or of the default model served on this machine."""
    from longalign_lib.llm import serve_local
    from longalign_lib.models import model_dir

    with contextlib.ExitStack() as stack:
        url, name = args.base_url, args.llm
        if url and not name:
            raise ValueError(f"--base_url {url} needs --llm, the model's name at that endpoint")
        if not url:
            name, url = model_dir(), "http://127.0.0.1:9/v1"  # nothing is asked of this address
            if not args.dry_run:
                url = stack.enter_context(serve_local(name))
        yield ChatClient(url, name, cache=out / "answers.jsonl", api_key_env=args.api_key_env, max_calls=args.max_calls, timeout=args.timeout,
                         concurrency=args.concurrency, max_total_tokens=args.max_total_tokens, max_cost=args.max_cost,
                         prices=args.prices, dry_run=args.dry_run, carry=True, tokenizer=None if args.base_url else tokenizer)  # fmt: skip


def _calls_ahead(pages, client, args, tokenizer) -> list[str]:
    """What is still to be asked, and what it would take."""
    from longalign_lib.data.instructions import TASKS, calls_ahead

    listing, answering = calls_ahead(pages, client, args.out, args.seed, args.tasks or TASKS, args.question_tokens, args.answer_tokens)
    asked = {"questions": listing, "answers": answering, "together": [*listing, *answering]}
    return [f"{len(pages):,} documents, {len(pages) - len(listing):,} of them need no call (they have an outcome, or no text)",
            *(f"{what}: {client.estimate(requests, tokenizer)}" for what, requests in asked.items()),
            "nothing was asked"]  # fmt: skip


def _weights(given: Sequence[str]) -> dict[str, float] | None:
    """["wikipedia=2", …] as a dict."""
    found = {}
    for item in given:
        name, _, value = item.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"--quota {item!r}: write source=weight, such as wikipedia=2") from None
    return found or None


def parser() -> argparse.ArgumentParser:
    """All options, with help."""
    top = argparse.ArgumentParser(prog="python -m longalign_lib.data", description=__doc__.splitlines()[0])
    steps = top.add_subparsers(dest="step", required=True)

    def step(run, **options):
        sub = steps.add_parser(run.__name__, help=run.__doc__.splitlines()[0], description=run.__doc__.splitlines()[0],
                               formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
        sub.set_defaults(run=run)
        sub.add_argument("--seed", type=int, default=0, help="of every draw")
        if options.get("tokenizer", True):
            sub.add_argument("--tokenizer", default="default", help="'default', a folder or a Hub id; tokens are counted with it")
        return sub

    s = step(samples)
    s.add_argument("--out", required=True, help="folder for documents.jsonl, long.jsonl and short.jsonl")

    s = step(documents)
    s.add_argument("--readers", nargs="+", default=["samples", "python"], help="sources of the Hub by name, 'samples', 'python', folders, name=folder")
    s.add_argument("--out", required=True, help="folder")
    s.add_argument("--n", type=int, default=10_000, help="documents wanted")
    s.add_argument("--min_tokens", type=int, default=8_192)
    s.add_argument("--max_tokens", type=int, default=65_536)
    s.add_argument("--spread", default="even", help="law of lengths, see longalign_lib.data.sampling.law")
    s.add_argument("--quota", nargs="*", default=[], help="weights of sources, such as wikipedia=2; others weigh 1")
    s.add_argument("--chinese", type=float, default=0.1, help="share of Chinese documents, as far as the other language reaches; -1: as they come")
    s.add_argument("--threshold", type=float, default=0.8, help="Jaccard similarity of near-duplicates; 0 keeps them")
    s.add_argument("--over_long", default="drop", choices=["drop", "cut"], help="documents beyond max_tokens")
    s.add_argument("--scan", type=int, default=100_000, help="rows to read of each stream; 0: all")

    s = step(instruct)
    s.add_argument("--documents", nargs="+", required=True, help="JSONL of the step documents")
    s.add_argument("--out", required=True, help="folder for instructions.jsonl, rejected.jsonl, answers.jsonl (the cache)")
    s.add_argument("--base_url", default="", help="an OpenAI-compatible endpoint up to /v1; none: the default model on this machine")
    s.add_argument("--llm", default="", help="the model's name at that endpoint")
    s.add_argument("--api_key_env", default="OPENAI_API_KEY", help="environment variable with the key")
    s.add_argument("--tasks", nargs="*", default=[], help="task types to draw from; none: all four")
    s.add_argument("--cut", type=int, default=0, help="cut documents to so many tokens; 0: whole")
    s.add_argument("--question_tokens", type=int, default=300)
    s.add_argument("--answer_tokens", type=int, default=500)
    s.add_argument("--concurrency", type=int, default=None, help="requests in flight; none: 8, or 1 for the model on this machine")
    s.add_argument("--timeout", type=float, default=600, help="seconds a request")
    s.add_argument("--max_calls", type=int, default=None, help="budget of the folder, kills and reruns counted: answers, and tries of this run")
    s.add_argument("--max_total_tokens", type=int, default=None, help="budget of the folder: tokens read and written")
    s.add_argument("--max_cost", type=float, default=None, help="budget of the folder: money, with --prices")
    s.add_argument("--prices", type=float, nargs=2, default=None, metavar=("READ", "WRITTEN"), help="a million tokens")
    s.add_argument("--dry_run", action="store_true", help="print calls, tokens and cost, ask nothing")

    s = step(verifiable)
    s.add_argument("--documents", nargs="+", required=True)
    s.add_argument("--out", required=True, help="JSONL")
    s.add_argument("--n", type=int, default=2_000)
    s.add_argument("--kinds", nargs="*", default=[], help="none: all")
    s.add_argument("--min_tokens", type=int, default=256)
    s.add_argument("--max_tokens", type=int, default=4_096)

    s = step(tokenize)
    s.add_argument("samples", nargs="+", help="JSONL of samples")
    s.add_argument("--out", required=True, help="folder of the store")
    s.add_argument("--max_length", type=int, default=65_536)
    s.add_argument("--over_long", default="truncate", choices=["truncate", "drop", "error"])
    s.add_argument("--processes", type=int, default=1)

    s = step(mix, tokenizer=False)
    s.add_argument("--suite", default="longalign-10k", help="longalign-0k, -5k, -10k, longalpaca-12k, two-sources")
    s.add_argument("--long", nargs="+", required=True)
    s.add_argument("--short", nargs="+", required=True, help="ShareGPT's format, or samples")
    s.add_argument("--sources", nargs=2, default=None, help="of two-sources")
    s.add_argument("--out", required=True, help="JSONL")

    s = step(card, tokenizer=False)
    s.add_argument("samples", nargs="+", help="JSONL of samples")
    s.add_argument("--out", required=True, help="folder")
    s.add_argument("--rejected", nargs="*", default=[], help="JSONL of rejections")
    s.add_argument("--cache", default="", help="answers.jsonl of the step instruct, for the cost")
    s.add_argument("--prices", type=float, nargs=2, default=None, metavar=("READ", "WRITTEN"), help="a million tokens")
    s.add_argument("--title", default="Long instructions")
    s.add_argument("--licence", default="", help="an identifier such as cc-by-4.0")
    s.add_argument("--read", type=int, default=2, help="samples of each task to print")
    return top


def main(words: Sequence[str] | None = None) -> None:
    """Run one step; errors that have a fix end with one line."""
    args = parser().parse_args(words)
    try:
        args.run(args)
    except (ValueError, FileNotFoundError, JsonlError, ChatError, SourceError, OSError) as error:
        sys.exit(f"{args.step}: {error}")


if __name__ == "__main__":
    main()
