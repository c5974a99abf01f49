"""Time forward and backward passes of the default model over packs, and check packed attention on this device.

    python benchmarks/step_times.py --out results/step_times.json

Two tables, printed and written with their provenance: seconds and peak memory of packs of different documents (what
`train.cost.fit` turns into a step-cost model), and the largest difference between logits of a pack and of its documents
alone, for every attention path that runs here.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
import torch

from longalign_lib.course.results import write_result
from longalign_lib.models import load_model, pick_device
from longalign_lib.train import attention, cost
from longalign_lib.train.collate import collate

PACKS = {
    "cuda": [[512], [2048], [8192], [16384], [32768], [65536], [512] * 64, [8192] * 8, [1024] * 32 + [32768],
             [1024] * 64, [256] * 256, [4096] * 4],
    "cpu": [[128], [512], [1024], [2048], [256] * 4, [512] * 4],
}  # fmt: skip


def attention_paths(seed: int) -> pd.DataFrame:
    """Largest logit difference, packed against alone, in each dtype; the reference runs in float32 with sdpa."""
    device, rng = pick_device(), np.random.default_rng(seed)
    lengths = [700, 31, 1024, 290]
    store = [(rng.integers(10, 49_000, n), np.full(n, -100)) for n in lengths]
    lines = pd.DataFrame({"row": range(4), "length": lengths, "offset": np.cumsum([0, *lengths[:-1]])})
    batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in collate(lines, store).items()}
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "loss_weights", "inverse_targets")}
    attention.register()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(dtype=dtype)
        with torch.no_grad():
            alone = torch.cat([model(input_ids=torch.as_tensor(x, device=device)[None]).logits[0].float() for x, _ in store])
            model.set_attn_implementation(attention.NAME)
            packed = model(**inputs).logits[0].float()
            leaky = model(**{k: v for k, v in inputs.items() if "seq_lens" not in k and "max" not in k and k != "position_ids"}).logits[0].float()
        path = attention.backend() if dtype is torch.bfloat16 else "one causal sdpa call a document"
        scale = alone.norm()
        rows.append({"dtype": str(dtype).removeprefix("torch."), "path": path, "largest": float((packed - alone).abs().max()),
                     "relative": float((packed - alone).norm() / scale),
                     "relative_without_borders": float((leaky - alone).norm() / scale)})  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/step_times.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    paths = attention_paths(args.seed)
    model = load_model()
    times = cost.measure(model, PACKS[pick_device().type], repeats=args.repeats, seed=args.seed)
    fitted = cost.fit(times.slots, times.squares, times.seconds)
    times["predicted"] = fitted(times.slots, times.squares)
    print(paths.to_string(), "\n")
    print(times.round(4).to_string(), "\n")
    print(fitted)
    write_result(args.out, "gpu" if torch.cuda.is_available() else "ci", args.seed, dtype=str(model.dtype),
                 attention=paths.to_dict("records"), times=times.replace({np.nan: None}).to_dict("records"),
                 fit=vars(fitted))  # fmt: skip


if __name__ == "__main__":
    main()
