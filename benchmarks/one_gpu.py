"""The recipe on one GPU: extend the window with YaRN, train on packs, look for needles before and after.

    python benchmarks/one_gpu.py            # about six minutes on one H100; a rerun continues where it stopped

Three models answer the same needle grid, up to twice the window: as shipped, with YaRN and no training, and after the training
run of notebook 06 at the `gpu` profile (YaRN, factor 2). Writes results/one_gpu.json with every cell.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from longalign_lib import course
from longalign_lib.course import training
from longalign_lib.course.results import write_result
from longalign_lib.data.tokens import TokenStore
from longalign_lib.evaluate.needle import run_grid
from longalign_lib.models import load_model, load_tokenizer
from longalign_lib.train.heldout import held_out_loss, means
from longalign_lib.train.rope import extend_context


def main() -> None:
    """Train if needed, ask every model, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="gpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--build", type=Path, default=Path("build/out"))
    parser.add_argument("--out", type=Path, default=Path("results/one_gpu.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000, 6000, 8000, 10_000, 12_000, 14_000, 16_000])
    parser.add_argument("--depths", type=float, nargs="+", default=[0, 20, 40, 60, 80, 100])
    args = parser.parse_args()
    out = course.start(args.profile, args.seed, args.build, "one_gpu")
    settings = training.settings(args.profile, args.seed)
    trained = course.trained_model(args.profile, args.seed, args.build)
    run = json.loads((trained / "run.json").read_text())
    log = [json.loads(x) for x in (trained / "log.jsonl").read_text().splitlines()]
    yarn = settings["rope"] if settings["rope"] != "none" else "yarn"
    factor = settings["rope_factor"] if settings["rope"] != "none" else 2.0
    makers = {"as shipped": load_model, f"{yarn} x{factor:g}, untrained": lambda: extend_context(load_model(), yarn, factor),
              f"{yarn} x{factor:g}, trained": lambda: load_model(trained)}  # fmt: skip
    store = TokenStore.load(args.build / args.profile / "06_training" / "held_out")
    grids, held = [], {}
    for name, make in makers.items():
        model = make()
        held[name] = means(held_out_loss(model, store))
        grids.append(run_grid(model, load_tokenizer(), args.lengths, args.depths, out=out / "needles.jsonl", name=name,
                              seed=args.seed, allow_beyond_window=True))  # fmt: skip
        del model
    grid = pd.concat(grids)
    table = grid.pivot_table(index="model", columns="length", values="hit", aggfunc="sum", sort=False).astype(int)
    print(table, "\n", pd.DataFrame(held).T.round(4), "\n", run)
    keep = ["model", "length", "depth", "tokens", "depth_achieved", "needle", "answer", "score", "hit", "status"]
    write_result(args.out, args.profile, args.seed, settings=settings, training_seconds=run["seconds"], held_out=held,
                 steps=[{k: x[k] for k in ("step", "loss", "loss_token_mean", "tokens_per_second", "sequences")} for x in log if "loss" in x],
                 needles=json.loads(grid[keep].to_json(orient="records")))  # fmt: skip


if __name__ == "__main__":
    main()
