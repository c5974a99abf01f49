"""Evaluation from the command line: needle, longbench-chat, audit, longbench, mt-bench, retention.

    python -m longalign_lib.evaluate needle --lengths 1000 2000 4000 --depths 0 25 50 75 100 --out OUT
    python -m longalign_lib.evaluate needle --config configs/needle.yaml --model trained/ --out OUT
    python -m longalign_lib.evaluate longbench-chat --base_url URL --served_model NAME --out OUT --dry_run

Each command reads and writes files and may be killed: started again with the same words it goes on where it was. Without
--base_url a model in this process answers. Keys come from the environment alone. Only the command that is named is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "needle": ("needle_command", "hide facts in long texts and ask for them; a grid with intervals"),
    "longbench-chat": ("judge_command", "ask long questions and have the answers rated"),
    "audit": ("judge_command", "measure the judge itself on answers of known quality"),
    "longbench": ("tasks_command", "LongBench's task files, rated"),
    "mt-bench": ("tasks_command", "MT-Bench's two-turn questions, rated"),
    "retention": ("tasks_command", "short tasks: what long training may have cost"),
}


def parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """All commands by name, and the options of the one that is ``wanted``."""
    top = argparse.ArgumentParser(prog="python -m longalign_lib.evaluate", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    if wanted in COMMANDS:
        importlib.import_module(f"longalign_lib.evaluate.{COMMANDS[wanted][0]}").add(commands)
    for name, (_, what) in COMMANDS.items():
        if name not in commands.choices:
            commands.add_parser(name, help=what)
    return top


def main(words: Sequence[str] | None = None) -> None:
    """Run one command; errors that have a fix end with one line."""
    words = list(sys.argv[1:] if words is None else words)
    args = parser(words[0] if words else None).parse_args(words)
    from longalign_lib.llm import ChatError
    from longalign_lib.models import DefaultModelError

    try:
        args.run(args)
    except (ValueError, ChatError, DefaultModelError, OSError) as error:  # JsonlError is a ValueError
        sys.exit(f"{args.command}: {error}")


if __name__ == "__main__":
    main()
