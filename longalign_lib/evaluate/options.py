"""Command-line options that every evaluation shares, and what they stand for: somebody who answers.

    parser = subparsers.add_parser("my-test"); add_model_options(parser); parser.set_defaults(run=run)
    def run(args):
        who = answerer(args)                       # a model in this process, or an endpoint
        said = who([[{"role": "user", "content": "Hello"}]])      # one str a conversation, in order; None if that one failed

`Answerer.model` and `.tokenizer` are there for a model in this process, `.client` for an endpoint. A judge is asked through
options of its own: ``add_endpoint_options(parser, "judge_")`` and ``client(args, cache, "judge_")``.

Invariants: keys come from the environment alone; a question that failed is None and has its reason in ``failures``, and the
others are answered all the same; answers are greedy (temperature 0). Nothing is loaded or asked before the first question.
Cost: none by itself.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from longalign_lib.llm import ChatClient, ChatError, Request
from longalign_lib.models import FOLDER_NAME

DTYPES = ("auto", "float32", "bfloat16", "float16")
Messages = Sequence[Mapping]


def add_common_options(parser: argparse.ArgumentParser, out: str | None = None) -> None:
    """``--out`` (a folder; required unless ``out`` is its default), ``--seed``, ``--dry_run``."""
    parser.add_argument("--out", required=out is None, default=out, help="folder for answers, tables and figures")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.add_argument("--dry_run", action="store_true", help="print what would be asked and what it would take; ask nothing")


def add_endpoint_options(parser: argparse.ArgumentParser, prefix: str = "", served: str = "served_model") -> None:
    """Address, name and budgets of an OpenAI-compatible endpoint, each option with ``prefix`` before it ("judge_", say)."""
    group = parser.add_argument_group(f"endpoint{' of the ' + prefix.strip('_') if prefix else ''}")
    add = functools.partial(_add, group, prefix)
    add("base_url", default="", help="an OpenAI-compatible endpoint up to /v1")
    add(served, dest="served_model", default="", help="the model's name at that endpoint")
    add("api_key_env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    add("concurrency", type=int, default=8, help="requests in flight")
    add("timeout", type=float, default=600, help="seconds a request")
    add("retries", type=int, default=4, help="tries after the first one")
    add("max_calls", type=int, default=None, help="budget of this run: requests; none: no limit")
    add("max_total_tokens", type=int, default=None, help="budget: tokens read and written; none: no limit")
    add("max_cost", type=float, default=None, help="budget: money, with the prices; none: no limit")
    add("prices", type=float, nargs=2, default=None, metavar=("READ", "WRITTEN"), help="money a million tokens")


def add_model_options(parser: argparse.ArgumentParser, max_new_tokens: int = 32, out: str | None = None) -> None:
    """The model to be tested, in this process or behind an endpoint, and `add_common_options`."""
    group = parser.add_argument_group("model in this process")
    group.add_argument("--model", default="default", help="'default', a folder or a Hub id; not used with --base_url")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 where the hardware computes it")
    group.add_argument("--name", default="", help="what tables and figures call the model; none: its own name")
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, help="longest answer, in tokens")
    add_endpoint_options(parser)
    add_common_options(parser, out)


def _add(group, prefix: str, name: str, dest: str | None = None, **more) -> None:
    group.add_argument(f"--{prefix}{name}", dest=prefix + (dest or name), **more)


def client(args, cache: str | Path | None = None, prefix: str = "", tokenizer=None) -> ChatClient:
    """The endpoint that the options with this prefix name.

    Raises:
        ValueError: an address without a model's name, or none at all. ChatError: no key in the environment.
    """
    url, name = getattr(args, f"{prefix}base_url"), getattr(args, f"{prefix}served_model")
    if not url:
        raise ValueError(f"no endpoint: give --{prefix}base_url, such as http://127.0.0.1:8000/v1")
    if not name:
        raise ValueError(f"--{prefix}base_url {url} needs --{prefix}{'model' if prefix else 'served_model'}, the model's name at that endpoint")
    get = {k: getattr(args, prefix + k) for k in ("api_key_env", "concurrency", "timeout", "max_calls", "max_total_tokens", "max_cost", "prices")}
    return ChatClient(url, name, cache=cache, max_retries=getattr(args, f"{prefix}retries"), dry_run=args.dry_run,
                      tokenizer=tokenizer, **get)  # fmt: skip


@dataclass
class Answerer:
    """Answers conversations greedily; call it with a list of them.

    Attributes:
        name: for tables and figures. kind: "model" (in this process) or "endpoint".
        client: the endpoint's ChatClient, or None. failures: {index in the last call: reason}.
    """

    name: str
    max_new_tokens: int = 32
    client: ChatClient | None = None
    load: Callable | None = field(default=None, repr=False)
    failures: dict[int, str] = field(default_factory=dict, repr=False)

    @property
    def kind(self) -> str:
        """ "endpoint" or "model"."""
        return "endpoint" if self.client is not None else "model"

    @functools.cached_property
    def _loaded(self) -> tuple:
        if self.load is None:
            raise ValueError(f"{self.name} is an endpoint: there is no model in this process")
        return self.load()

    @property
    def model(self):
        """The model in this process, loaded when first asked for."""
        return self._loaded[0]

    @property
    def tokenizer(self):
        """Its tokenizer."""
        return self._loaded[1]

    @functools.cached_property
    def identity(self) -> str:
        """16 hex digits: of the weights in this process; of an endpoint's address and model name."""
        if self.client is None:
            from longalign_lib.evaluate.generate import fingerprint

            return fingerprint(self.model)
        return hashlib.sha256(self.client.hash([{"role": "user", "content": ""}], 1).encode()).hexdigest()[:16]

    def __call__(self, conversations: Sequence[Messages], max_new_tokens: int | None = None, progress: bool = True,
                 on_answer: Callable[[int, str], None] | None = None) -> list[str | None]:  # fmt: skip
        """An answer a conversation, in order; None for those that failed (see ``failures``).

        Args:
            conversations: lists of messages {"role", "content"}.
            max_new_tokens: the longest answer; the one of the options by default.
            on_answer: called with (index, answer) as answers come, to save them. An endpoint's ChatClient has its own cache.
        """
        most, self.failures = max_new_tokens or self.max_new_tokens, {}
        if self.client is not None:
            said = self.client.chat_many([Request(c, most) for c in conversations], progress, desc=self.name)
            self.failures = {i: str(s) for i, s in enumerate(said) if isinstance(s, ChatError)}
            texts = [None if isinstance(s, ChatError) else s.text for s in said]
            for i, text in enumerate(texts):
                if on_answer is not None and text is not None:
                    on_answer(i, text)
            return texts
        return self._in_process(conversations, most, progress, on_answer)

    def _in_process(self, conversations, most, progress, on_answer) -> list[str | None]:
        from longalign_lib.data.text import token_ids
        from longalign_lib.evaluate.generate import Greedy

        model, tokenizer = self._loaded
        greedy, texts = Greedy(model, tokenizer), []
        for i, messages in enumerate(tqdm(conversations, desc=self.name, disable=not progress, leave=False)):
            prompt = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
            try:
                texts.append(greedy.answer(token_ids(tokenizer, prompt), most).text)
            except RuntimeError as error:  # out of memory, mostly: the other questions are asked all the same
                self.failures[i] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                texts.append(None)
            if on_answer is not None and texts[-1] is not None:
                on_answer(i, texts[-1])
        return texts


def answerer(args, cache: str | Path | None = None, keep: bool = True) -> Answerer:
    """Who answers, as the options say: the endpoint if ``--base_url`` is given, else a model in this process.

    Args:
        cache: JSONL file for an endpoint's answers; ``OUT/answers_cache.jsonl`` by default. keep: False for no such file, where
            the caller keeps answers itself.

    Raises:
        ValueError, ChatError: as `client`; an endpoint with ``--dtype``, answers of no token.
    """
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be 1 or more, got {args.max_new_tokens}")
    if args.base_url:
        found = client(args, (cache or Path(args.out) / "answers_cache.jsonl") if keep else None)
        return Answerer(args.name or found.label, args.max_new_tokens, found)
    if args.served_model:
        raise ValueError(f"--served_model {args.served_model} needs --base_url, the endpoint that serves it")

    def load():
        import torch

        from longalign_lib.models import load_model, load_tokenizer

        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        tokenizer = load_tokenizer(args.model)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"--model {Path(args.model).name} has no chat template: give an instruction-tuned model")
        return load_model(args.model, dtype), tokenizer

    shown = Path(args.model).name if args.model != "default" or os.environ.get("LONGALIGN_MODEL") else FOLDER_NAME
    return Answerer(args.name or shown, args.max_new_tokens, None, load)


def settings_of(args) -> str:
    """The options as one line of JSON, without anything of this machine, for records of a run."""
    kept = {k: v for k, v in vars(args).items() if k not in ("run", "command", "out") and not callable(v)}
    kept["model"] = Path(str(kept.get("model", ""))).name
    return json.dumps(kept, sort_keys=True, default=str)
