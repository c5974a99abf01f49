"""``python -m longalign_lib.course``: what ``make course`` and ``make outputs`` call."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longalign_lib.course import PROFILES


def main(argv: list[str] | None = None) -> int:
    """Run the course; 0 when every notebook ended well, 1 when one failed, 2 when the arguments are off."""
    parser = argparse.ArgumentParser(prog="python -m longalign_lib.course", description="Run the notebooks in order.")
    parser.add_argument("--profile", default="ci", help=f"one of {', '.join(PROFILES)} (default: ci)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw in the course (default: 0)")
    parser.add_argument("--only", default="", help="run only these, comma-separated: 03 or 03,04")
    parser.add_argument("--notebooks", type=Path, default=Path("notebooks"), help="folder of the notebooks")
    parser.add_argument("--build", type=Path, default=Path("build"), help="folder for everything that is written")
    parser.add_argument("--online", action="store_true", help="let notebooks use the network (a Hub model, an API)")
    parser.add_argument("--write-back", action="store_true", help="put the outputs into notebooks/ (make outputs)")
    args = parser.parse_args(argv)
    from longalign_lib.course.outputs import write_back
    from longalign_lib.course.runner import run_course

    try:
        results = run_course(
            args.notebooks, args.build, args.profile, args.seed, args.only, offline=not args.online
        )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if any(r.status != "ok" for r in results):
        return 1
    print(f"\npages: {args.build}/html/  executed notebooks: {args.build}/executed/")
    if args.write_back:
        for r in results:
            write_back(args.build / "executed" / f"{r.name}.ipynb", args.notebooks / f"{r.name}.ipynb")
    return 0


if __name__ == "__main__":
    sys.exit(main())
