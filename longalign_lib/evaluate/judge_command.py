"""The commands longbench-chat and audit: long questions answered and rated, and the judge itself measured.

    python -m longalign_lib.evaluate longbench-chat --window 8192 --out OUT --judge_base_url URL --judge_model NAME
    python -m longalign_lib.evaluate longbench-chat --cases LongBench_Chat/ --base_url URL --served_model NAME --window 65536 --out OUT
    python -m longalign_lib.evaluate audit --out OUT --judge_base_url URL --judge_model NAME

In OUT: answers.jsonl and judge_cache.jsonl (appended as answers come, so a killed run goes on), results.jsonl, CSV tables, settings.json;
audit.png, ladders.png and their SVG. Without a judge, word overlap stands in its place and is called that. Cost: the models'.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from longalign_lib.evaluate import running
from longalign_lib.evaluate.options import add_common_options, add_endpoint_options, add_model_options


def add(subparsers) -> None:
    """Add both commands to an argparse subparsers object."""
    parser = subparsers.add_parser("longbench-chat", help="ask long questions and have the answers rated")
    _questions(parser)
    parser.add_argument("--window", type=int, default=0, help="tokens for prompt and answer; 0: the model's own")
    parser.add_argument("--beyond_window", action="store_true", help="ask prompts that do not fit the model's window too")
    parser.add_argument("--rounds", type=int, default=2, help="ratings of each answer, the examples in another order each time")
    parser.add_argument("--tokenizer", default="default", help="counts tokens where an endpoint answers")
    add_model_options(parser, 512)
    add_endpoint_options(parser, "judge_", served="model")
    parser.set_defaults(run=longbench_chat)

    parser = subparsers.add_parser("audit", help="measure the judge itself on answers of known quality")
    _questions(parser)
    parser.add_argument("--probes", nargs="+", default=None, help="some of: ladder repeats order length injection swap; none: all")
    parser.add_argument("--repeats", type=int, default=3, help="times that the same prompt is rated")
    add_common_options(parser)
    add_endpoint_options(parser, "judge_", served="model")
    parser.set_defaults(run=audit)


def _questions(parser) -> None:
    parser.add_argument("--items", default=None, help="folder or file of questions; none: data_samples/longbench_chat")
    parser.add_argument("--cases", default=None, help="the published test_cases.json or its folder, in place of --items")
    parser.add_argument("--documents", default=None, help="folder of the documents' files that --cases names; none: its own")
    parser.add_argument("--limit", type=int, default=None, help="the first so many questions")
    parser.add_argument("--rating_alone", action="store_true", help="ask the judge for a rating without a reason (small judges)")
    parser.add_argument("--judge_tokens", type=int, default=400, help="longest reply of the judge, in tokens")


def _read(args) -> tuple[list, dict]:
    from longalign_lib.data.documents import read_samples
    from longalign_lib.evaluate import longbench_chat as L

    if args.cases and args.items:
        raise ValueError("give --cases or --items, not both")
    if args.cases:
        items, documents = L.read_published(args.cases, documents=args.documents)
    else:
        items, documents = L.read_items(args.items), {d.id: d for d in read_samples()[0]}
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {args.limit}")
    return items[: args.limit], documents


def longbench_chat(args) -> None:
    """Answer every question, rate the answers, print what they got and how sure that is."""
    from longalign_lib.evaluate import judge as J
    from longalign_lib.evaluate import lexical
    from longalign_lib.evaluate import longbench_chat as L

    items, documents = _read(args)
    if args.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, got {args.rounds}")
    who, model, tokenizer = running.who(args)
    window, judge, out = running.window(args, who), running.judge(args), Path(args.out)
    if args.dry_run:
        tokens = [L.build_prompt(tokenizer, i, documents[i.document_id].text, window, args.max_new_tokens).tokens for i in items]
        print(f"{len(items)} questions, {sum(tokens):,} prompt tokens, at most {len(items) * args.max_new_tokens:,} new ones; "
              f"{len(items) * args.rounds if judge else 0} calls of a judge; nothing was asked")  # fmt: skip
        return
    answers = L.answer_items(model, tokenizer, items, documents, window, args.max_new_tokens, out / "answers.jsonl", who.name)
    good = answers[answers.status == "ok"]
    if good.empty:
        raise ValueError(f"no question was answered: {answers.status.iloc[0]}")
    examples = {i.id: i.answers for i in items}
    rows = [{"id": r.id, "question": r.question, "reference": r.reference, "answer": r.answer, "examples": examples[r.id]} for r in good.itertuples()]
    overlap = lexical.rate_all(rows)
    ratings = overlap
    if judge is not None:
        ratings = J.rate_all(judge, rows, rounds=args.rounds, seed=args.seed, max_tokens=args.judge_tokens, explain=not args.rating_alone)
    lost = [J.unanswered(r.id, r.status) for r in answers[answers.status != "ok"].itertuples()]
    ratings = pd.DataFrame([*ratings.to_dict("records"), *lost]) if lost else ratings
    got = J.summarise(ratings)
    label = lexical.LABEL if judge is None else judge.label
    table = pd.DataFrame([{"model": who.name, "judge": label, "asked": len(answers), "answered": len(good), "shortened": int((answers.left_out > 0).sum())}
                          | got | {"rouge_l": float(overlap.percent.mean())}])  # fmt: skip
    running.save(out, args, answers, {"ratings": ratings, "scores": table})
    print(table.round(2).T.to_string(header=False))
    for reason in list(dict.fromkeys(ratings.reason[ratings.reason != ""]))[:3]:
        print(f"not rated: {reason}")
    print(f"\n{'no judge was named (--judge_base_url): the numbers are word overlap' if judge is None else 'judge: ' + running.paid(judge)}; written to {out}")


def audit(args) -> None:
    """Measure the judge; without one, the word count that stands in for it."""
    from longalign_lib.evaluate import audit as A
    from longalign_lib.evaluate.known_judges import KnownJudge
    from longalign_lib.plots import judge as draw

    items, _ = _read(args)
    how = {"seed": args.seed, "probes": args.probes or A.PROBES, "repeats": args.repeats, "explain": not args.rating_alone, "max_tokens": args.judge_tokens}
    judge, out = running.judge(args), Path(args.out)
    if args.dry_run:
        _, asked, pairs = A.requests(items, **how)
        print(f"{len(items)} questions: {len(asked)} ratings, {2 * len(pairs)} comparisons")
        print(f"{judge.estimate(asked) if judge is not None else 'no judge was named: word overlap costs nothing'}\nnothing was asked")
        return
    judge = judge or KnownJudge()
    found = A.audit(judge, items, **how)
    out.mkdir(parents=True, exist_ok=True)
    running.save(out, args, found.calls, {"audit": found.table, "pairs": found.pairs})
    draw.audits(found.table, out)
    if "ladder" in how["probes"]:
        draw.ladders(A.ladder_frame(found.calls, judge.label), out)
    print(found.table.drop(columns="judge").round(2).to_string(index=False))
    wrong = [f"{r.probe}: {r.finding}" for r in found.table.itertuples() if r.finding]
    print(f"\n{judge.label}: " + ("; ".join(wrong) if wrong else f"nothing found with {len(items)} questions (which does not prove that nothing is there)"))
    print(f"{running.paid(judge)}; written to {out}")
