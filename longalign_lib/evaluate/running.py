"""What the evaluation commands share besides their options: who answers, who judges, the window, and the files of a run.

Cost: a model in this process is loaded by `who`, unless it is a dry run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from longalign_lib.data.jsonl import write_jsonl
from longalign_lib.evaluate.options import Answerer, answerer, client, settings_of
from longalign_lib.files import whole


def who(args) -> tuple[Answerer, object, object]:
    """(Answerer; the model or client that answers, None in a dry run of a model; its tokenizer)."""
    from longalign_lib.models import load_tokenizer

    found = answerer(args, keep=False)  # answers.jsonl keeps them, by model and name
    if "window" in args:
        window(args, found)  # refused before a model is loaded
    if found.client is not None:
        return found, found.client, load_tokenizer(args.tokenizer)
    return found, None if args.dry_run else found.model, load_tokenizer(args.model) if args.dry_run else found.tokenizer


def judge(args):
    """The judge's ChatClient with its answers kept in OUT/judge_cache.jsonl, or None where none is named."""
    return client(args, Path(args.out) / "judge_cache.jsonl", "judge_") if args.judge_base_url else None


def paid(judge) -> str:
    """What a judge has used so far: calls, answers it had given before, tokens, and the cost where prices are known."""
    use = getattr(judge, "usage", {})
    cost = f", cost {use['cost']:.4f}" if use.get("cost") else ""
    return f"{use.get('calls', 0)} calls, {use.get('cached', 0)} kept, {use.get('prompt_tokens', 0) + use.get('completion_tokens', 0):,} tokens{cost}"


def config_of(name: str):
    """What `generate.window_of` reads of a model, without its weights."""
    import types

    from transformers import AutoConfig

    from longalign_lib.models import resolve

    return types.SimpleNamespace(config=AutoConfig.from_pretrained(resolve(name)))


def window(args, answers: Answerer) -> int:
    """``--window``, or the tokens that the model's configuration promises.

    Raises:
        ValueError: an endpoint without ``--window``; one beyond the window of a model in this process, without ``--beyond_window``.
    """
    if answers.client is not None:
        if not args.window:
            raise ValueError("--window is needed with an endpoint: the tokens that its model takes for prompt and answer")
        return args.window
    from longalign_lib.evaluate.generate import window_of
    from longalign_lib.evaluate.needle import check_window

    config = config_of(args.model)
    if args.window and not args.beyond_window:
        most = min(args.window, args.max_new_tokens or 0)
        check_window(config, args.window - most, most, "--beyond_window")
    return args.window or window_of(config)


def save(out: Path, args, rows: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> None:
    """results.jsonl, a CSV a table, settings.json; each whole or not at all."""
    write_jsonl(out / "results.jsonl", rows.to_dict("records"))
    for name, frame in tables.items():
        with whole(out / f"{name}.csv") as half:
            frame.to_csv(half, index=False)
    with whole(out / "settings.json") as half:
        half.write_text(settings_of(args) + "\n", encoding="utf-8")
