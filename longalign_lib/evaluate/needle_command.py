"""The command `needle`: a grid from words or YAML, asked, tallied, drawn; several models in one folder side by side.

    python -m longalign_lib.evaluate needle --lengths 1000 2000 4000 --depths 0 25 50 75 100 --repeats 3 --out OUT
    python -m longalign_lib.evaluate needle --config configs/needle.yaml --base_url URL --served_model NAME --out OUT --dry_run

In OUT: needle.jsonl (a record a prompt, appended at once), prompts/ (what was asked, once a hash), needle_answers.csv,
needle_grids.csv, .png and .svg, needle_areas.csv, .png and .svg, prefill.json. Words given beside --config override it. Tables and
figures show every model of the folder that was asked the prompts of this grid with this --max_new_tokens, the one of this run last.

Invariant: killed at any moment and started again with the same words, it asks what is left and ends with the same tables.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from longalign_lib.evaluate import options, running
from longalign_lib.evaluate.needle_config import GridSpec, haystack_of, load_config, spec_of
from longalign_lib.evaluate.needle_variants import VARIANTS
from longalign_lib.files import whole


def add(subparsers) -> None:
    """Add the command `needle` to a parser of commands."""
    parser = subparsers.add_parser("needle", help="hide facts in long texts and ask for them; a grid with intervals",
                                   description=__doc__.splitlines()[0])  # fmt: skip
    grid = parser.add_argument_group("grid (what is not given here or in the config has the config's defaults)")
    grid.add_argument("--config", default="", help="YAML file, see configs/needle.yaml")
    grid.add_argument("--lengths", type=int, nargs="+", help="tokens of whole prompts")
    grid.add_argument("--depths", type=float, nargs="+", help="percent of the text before the needle")
    grid.add_argument("--repeats", type=int, help="prompts a cell, each with its own needle and text")
    grid.add_argument("--variant", choices=VARIANTS, help="see evaluate/needle_variants.py")
    grid.add_argument("--language", choices=("en", "zh"))
    grid.add_argument("--count", type=int, help="sentences to hide; none: the variant's number")
    grid.add_argument("--haystack", help="folder of texts to hide needles in; none: the built-in text")
    parser.add_argument("--tokenizer", default="", help="counts the prompts of an endpoint's model; none: the default model's")
    parser.add_argument("--window", type=int, default=None, help="training window to mark, tokens; none: the model's own")
    parser.add_argument("--beyond_window", action="store_true", help="ask prompts that do not fit the model's window too")
    parser.add_argument("--no_reuse", action="store_true", help="compute every prompt from its beginning")
    parser.add_argument("--no_prompts", action="store_true", help="do not save the prompts as text (large grids)")
    options.add_model_options(parser)
    options.add_endpoint_options(parser, "judge_", served="model")
    parser.set_defaults(run=run, seed=None, max_new_tokens=None)


def spec_from(args) -> GridSpec:
    """The grid of the config file, with the words that were given in place of the file's."""
    spec = load_config(args.config) if args.config else spec_of({})
    given = {"lengths": args.lengths, "depths": args.depths}
    given = {k: tuple(v) for k, v in given.items() if v is not None}
    names = ("repeats", "variant", "language", "count", "seed", "max_new_tokens")
    given |= {k: getattr(args, k) for k in names if getattr(args, k) is not None}
    if "variant" in given and spec.needles is None and given["variant"] != spec.variant:
        given = {"count": None, "spread": None} | given
    if args.haystack:
        given["haystack"] = haystack_of(args.haystack, given.get("language", spec.language))
    if spec.needles is not None and (clash := sorted({"variant", "language", "count"} & set(given))):
        raise ValueError(f"--{clash[0]} cannot change the needle that the config spells out; take it out of {Path(args.config).name}")
    return replace(spec, **given)


def run(args) -> None:
    """Ask the grid, write records, tables and figures, print the summary."""
    from longalign_lib.evaluate.needle import build_grid, check_window
    from longalign_lib.evaluate.needle_ask import ask
    from longalign_lib.evaluate.needle_score import judged
    from longalign_lib.models import load_tokenizer

    spec, out = spec_from(args), Path(args.out)
    args.seed, args.max_new_tokens = spec.seed, 32 if spec.max_new_tokens is None else spec.max_new_tokens
    who, endpoint = options.answerer(args, keep=False), bool(args.base_url)  # needle.jsonl keeps the answers
    tokenizer = load_tokenizer((args.tokenizer or "default") if endpoint else args.model)
    window = args.window
    if not endpoint:
        config = running.config_of(args.model)
        window = window or config.config.get_text_config().max_position_embeddings
        if not args.beyond_window:
            check_window(config, max(spec.lengths), args.max_new_tokens, "--beyond_window")
    prompts = build_grid(tokenizer, **spec.drawn())
    if args.dry_run:
        print("\n".join(ahead(prompts, who, out, args)))
        return
    judge = running.judge(args)
    frame, report = ask(
        who.client if endpoint else who.model, tokenizer, prompts, out / "needle.jsonl", name=who.name, max_new_tokens=args.max_new_tokens,
        reuse_prefix=not args.no_reuse, prompts_dir=None if args.no_prompts else out / "prompts")  # fmt: skip
    paid = []
    if judge is not None:
        frame = judged(frame, chat_judge(judge))
        paid = [f"judge {judge.label}: {running.paid(judge)}"]
    rows = _with_others(frame, out / "needle.jsonl")
    said = write(rows, out, window)
    print("\n".join([said, *rows.attrs["left_out"], *paid, *_prefill(report, out), f"written: {out}"]))


def ahead(prompts, who: options.Answerer, out: Path, args) -> list[str]:
    """What a run would take: prompts, tokens, calls, and the prefill that kept beginnings save."""
    from longalign_lib.data.jsonl import read_jsonl
    from longalign_lib.evaluate import prefix
    from longalign_lib.evaluate.needle_ask import ends_of, identity_of, key_of

    records, endpoint = out / "needle.jsonl", who.client is not None
    old = [r for r in read_jsonl(records, []) if r.get("status") == "ok"] if records.is_file() else []
    left = [p for _, p in prompts]
    if old:  # only then does it matter who is asked, and a model in this process is loaded
        identity, known = identity_of(who.client or who.model), {r.get("key") for r in old}
        ends = [] if endpoint else ends_of(who.model, who.tokenizer)
        left = [p for p in left if key_of(identity, p, endpoint, args.max_new_tokens, who.name, ends) not in known]
    tokens = sum(p.tokens for p in left)
    lines = [f"{len(prompts)} prompts, {sum(p.tokens for _, p in prompts):,} tokens; {len(prompts) - len(left)} answered already",
             f"{len(left)} calls: {tokens:,} prompt tokens, at most {len(left) * args.max_new_tokens:,} new ones"]  # fmt: skip
    if endpoint and left:
        lines.append(str(who.client.estimate([{"messages": p.messages, "max_tokens": args.max_new_tokens} for p in left])))
    if left:
        least, factor = prefix.bound([p.input_ids for p in left])
        where = "a server that keeps prefixes" if endpoint else "this run"
        lines.append(f"prompts share beginnings: {where} can do with {least:,} prompt tokens computed, {factor:.2f} times fewer")
    return [*lines, "nothing was asked"]


def chat_judge(client):
    """A judge for `needle_score.judged` that rates from 1 to 10 by `judge`'s rubric, through a ChatClient."""
    from longalign_lib.evaluate.judge import judge_messages, parse_rating

    def judge(question: str, reference: str, answer: str) -> float | None:
        reply = client.chat(judge_messages(question, reference, answer), max_tokens=256)
        return parse_rating(reply.text, "chat", reply.finish_reason)[0]

    return judge


def _with_others(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The rows of this run, and before them those of other models of the file on the same prompts, repeats and longest answer. Of a model
    asked twice for a prompt, with another template or other end tokens, the later row stays. ``attrs["left_out"]``: a line on the rest."""
    from longalign_lib.evaluate.needle_ask import read_results

    old, me, name = read_results(path), frame.fingerprint.iloc[0], frame.model.iloc[0]
    most, at = frame.max_new_tokens.iloc[0], ["model", "fingerprint", "message_hash", "repeat"]
    asked = set(zip(frame.message_hash, frame.repeat, strict=True))
    same = np.array([(h, r) in asked for h, r in zip(old.message_hash, old.repeat, strict=True)])
    old = old[same & ~((old.model == name) & (old.fingerprint == me))]
    others = old[old.max_new_tokens == most]
    keys = others.groupby(at).key.transform("last") if len(others) else others.key
    others = others[others.key == keys].copy()
    lost = old.drop(index=others.index)
    weights = pd.concat([others, frame]).groupby("model").fingerprint.nunique()
    clash = others.model.map(weights) > 1  # other models of the same name: told apart by their weights
    others.loc[clash, "model"] = [f"{m} ({f[:6]})" for m, f in zip(others.model[clash], others.fingerprint[clash], strict=True)]
    rows = pd.concat([others, frame], ignore_index=True) if len(others) else frame.copy()
    line = (f"left out: {len(lost)} answers of {', '.join(dict.fromkeys(lost.model))} with another --max_new_tokens than {most} (or none on "
            "record), template or end tokens")  # fmt: skip
    rows.attrs["left_out"] = [line] if len(lost) else []
    return rows


def write(frame: pd.DataFrame, out: Path, window: int | None) -> str:
    """Tables and figures of a frame into ``out``; the summary as text."""
    from longalign_lib.evaluate.needle_score import areas, cells, compare
    from longalign_lib.plots import needle as draw

    lists = {c: frame[c].map(lambda v: json.dumps(v, ensure_ascii=False)) for c in ("parts", "others", "wrong_parts", "depths_achieved")}
    with whole(out / "needle_answers.csv") as half:
        frame.assign(**lists).to_csv(half, index=False)
    table = areas(frame, window)
    draw.needle_grids(cells(frame), window, out)
    lines = table.assign(label=[f"{r.model}, {r.area} {r.value}".strip() for r in table.itertuples()])
    draw.proportions(lines, out, name="needle_areas")
    shown = table.assign(found=[f"{r.hits} of {r.n}" for r in table.itertuples()],
                         interval=[f"{r.low:.0%} to {r.high:.0%}" for r in table.itertuples()],
                         recall=[f"{v:.2f}" for v in table.recall])  # fmt: skip
    said = [shown[["model", "area", "value", "found", "interval", "recall", "failed"]].to_string(index=False)]
    if "judge" in frame and frame.judge.notna().any():
        means = frame.groupby("model", sort=False).judge.agg(["mean", "count"])
        said += [f"judge, 1-10: {m} {r['mean']:.2f} over {int(r['count'])} rated" for m, r in means.iterrows()]
    names = list(dict.fromkeys(frame.model))
    for before in names[:-1]:
        t = compare(frame, before, names[-1])["hits"]
        said.append(f"{names[-1]} against {before}, same prompts: {t['n']} pairs, found only by the first {t['better']}, only by the "
                    f"second {t['worse']}, exact two-sided p = {t['p']:.3g}")  # fmt: skip
    off = (frame.depth_achieved - frame.depth).abs().max()
    said.append(f"needles stand within {off:.1f} points of the depth asked (depth_achieved in needle_answers.csv)")
    for row in frame[frame.status != "ok"].drop_duplicates("status").head(3).itertuples():
        said.append(f"{row.model}, length {row.length}, depth {row.depth:g}: {row.status}")
    return "\n".join(said)


def _prefill(report, out: Path) -> list[str]:
    if report is None or not report.prompt_tokens:
        return []
    with whole(out / "prefill.json") as half:
        half.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    factor, most = report.prompt_tokens / max(1, report.computed_tokens), report.prompt_tokens / max(1, report.least)
    return [f"prefill: {report.computed_tokens:,} of {report.prompt_tokens:,} prompt tokens computed, {factor:.2f} times fewer; "
            f"{most:.2f} times is the most that shared beginnings allow: {report.reached:.1%} of what can be saved" + (f" (no reuse: {report.no_reuse})" if report.no_reuse else "")]  # fmt: skip
