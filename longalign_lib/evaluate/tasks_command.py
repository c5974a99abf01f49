"""The commands longbench, mt-bench and retention: options, files and printed tables around the modules of those names.

    python -m longalign_lib.evaluate longbench data/ --window 8192 --out OUT
    python -m longalign_lib.evaluate mt-bench question.jsonl --out OUT --judge_base_url URL --judge_model NAME
    python -m longalign_lib.evaluate retention --model trained/ --tasks general --out OUT

Answers are kept one by one in OUT/answers.jsonl and ratings in the judge's cache, so a killed run goes on. Without a judge,
longbench prints word overlap alone and mt-bench keeps answers without a rating.
Cost: the models'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longalign_lib.evaluate import running
from longalign_lib.evaluate.options import add_endpoint_options, add_model_options, answerer


def add(subparsers) -> None:
    """Add the three commands to an argparse subparsers object."""
    parser = subparsers.add_parser("longbench", help="LongBench's task files, rated")
    parser.add_argument("files", help="a task file of LongBench, or a folder of them")
    parser.add_argument("--window", type=int, default=0, help="tokens for prompt and answer; 0: the model's own")
    parser.add_argument("--prompts", default=None, help="a file like config/dataset2prompt.json; none: our own prompts")
    _shared(parser, 512)
    parser.set_defaults(run=longbench, max_new_tokens=None)  # None: each task's own

    parser = subparsers.add_parser("mt-bench", help="MT-Bench's two-turn questions, rated")
    parser.add_argument("questions", help="question.jsonl")
    parser.add_argument("--references", default=None, help="a file like reference_answer/gpt-4.jsonl")
    _shared(parser, 1024)
    parser.set_defaults(run=mt_bench)

    parser = subparsers.add_parser("retention", help="short tasks: what long training may have cost")
    parser.add_argument("--tasks", nargs="+", default=["general"], help="general (offline), arc, hellaswag, truthfulqa, mmlu")
    parser.add_argument("--shots", type=int, default=None, help="examples in front of a question; none: the paper's")
    parser.add_argument("--limit", type=int, default=None, help="the first so many questions of each task")
    parser.add_argument("--batch_size", type=int, default=8, help="choices a forward pass")
    add_model_options(parser)
    parser.set_defaults(run=retention)


def _shared(parser, max_new_tokens: int) -> None:
    parser.add_argument("--limit", type=int, default=None, help="the first so many questions of each file")
    parser.add_argument("--rounds", type=int, default=1, help="ratings of each answer")
    parser.add_argument("--beyond_window", action="store_true", help="ask prompts that do not fit the model's window too")
    parser.add_argument("--tokenizer", default="default", help="counts tokens where an endpoint answers")
    add_model_options(parser, max_new_tokens)
    add_endpoint_options(parser, "judge_", served="model")


def longbench(args) -> None:
    """Answer, score by overlap, and rate where a judge is named."""
    from longalign_lib.evaluate import judge as J
    from longalign_lib.evaluate import longbench as L

    samples, skipped = L.read_scored(args.files, args.limit)
    if skipped:
        print(f"not scored here, left out: {', '.join(skipped)}")
    prompts = L.read_prompts(args.prompts) if args.prompts else None
    most = args.max_new_tokens
    who, model, tokenizer = running.who(argparse.Namespace(**(vars(args) | {"max_new_tokens": 512 if most is None else most})))
    window, judge, out = running.window(args, who), running.judge(args), Path(args.out)
    if args.dry_run:
        tokens = [L.build_prompt(tokenizer, s, window, most, prompts).tokens for s in samples]
        print(f"{len(samples)} questions, {sum(tokens):,} prompt tokens; {len(samples) * args.rounds if judge else 0} calls of a judge")
        return
    answers = L.answer_samples(model, tokenizer, samples, window, out / "answers.jsonl", who.name, prompts, most)
    rows = L.judge_rows(answers)
    rated = {r: J.rate_all(judge, rows[r], r, rounds=args.rounds, seed=args.seed) for r in rows} if judge is not None else None
    table = L.table(answers, rated)
    running.save(out, args, answers, {"scores": table} | {f"ratings_{k}": v for k, v in (rated or {}).items()})
    print(table.round(1).to_string(index=False))
    if (answers.language != "en").any():
        print("\nChinese overlap is by characters, the published script's by words: not to be set beside published numbers")
    print(f"\noverlap: lexical, no judge{f'; rating: {judge.label}, {running.paid(judge)}' if judge is not None else ''}; written to {out}")


def mt_bench(args) -> None:
    """Ask both turns; rate them where a judge is named."""
    from longalign_lib.evaluate import mt_bench as M
    from longalign_lib.evaluate.answering import rendered_ids
    from longalign_lib.evaluate.generate import window_of
    from longalign_lib.evaluate.needle import check_window

    questions = M.read_questions(args.questions, args.references)[: args.limit]
    who, model, tokenizer = running.who(args)
    window = None
    if who.client is None and not args.beyond_window:
        config = running.config_of(args.model)
        window = window_of(config)
        longest = max((len(rendered_ids(tokenizer, M.conversation(q))) for q in questions), default=0)
        check_window(config, longest, args.max_new_tokens, "--beyond_window")
    judge, out = running.judge(args), Path(args.out)
    if args.dry_run:
        calls = 2 * len(questions) * args.rounds if judge is not None else 0
        print(f"{len(questions)} questions, {2 * len(questions)} answers; {calls} calls of a judge")
        return
    answers = M.answer_questions(model, tokenizer, questions, args.max_new_tokens, out / "answers.jsonl", who.name, window=window)
    if judge is None:
        running.save(out, args, answers, {})
        good = (answers.status == "ok").sum()
        print(f"{good} of {len(answers)} answers in {out}; no judge was named (--judge_base_url), so none is rated")
        return
    ratings = M.rate_answers(judge, answers, args.rounds, args.seed)
    table = M.table(ratings)
    running.save(out, args, answers, {"scores": table, "ratings": ratings})
    print(table.round(2).to_string(index=False))
    print(f"\nrated by {judge.label}: {running.paid(judge)}; written to {out}")


def retention(args) -> None:
    """Run lm-evaluation-harness on the offline task, or on the paper's with a network."""
    from longalign_lib.evaluate import retention as R
    from longalign_lib.models import HUB_NAME

    if args.base_url:
        raise ValueError("retention reads log-likelihoods of a model in this process: give --model, not --base_url")
    who = answerer(args)
    if not args.dry_run:
        scores, items = R.evaluate(who.model, who.tokenizer, args.tasks, args.shots, args.limit, args.batch_size, args.seed, name=who.name)
        running.save(Path(args.out), args, items, {"scores": scores})
        print(scores.round(3).to_string(index=False), f"\n\nwritten to {args.out}")
    model = HUB_NAME if args.model == "default" else args.model
    print("\nthe paper's short tasks, with a network:", *R.harness_commands(model, "OUT"), sep="\n  ")
