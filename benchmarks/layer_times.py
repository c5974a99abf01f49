"""Time decoder layers of the paper's widths on one device: what a prediction of its Figure 5 is made of.

    python benchmarks/layer_times.py --out results/layer_times.json

A 6B to 13B model does not train on one 80 GB device, a few of its layers do. For each of the paper's three models two random
ones of 1 and 3 layers are timed over packs of 1k to 64k tokens, in bfloat16 with activations recomputed; the difference is two
layers, the rest is embedding and head. `train.paper_scale` adds layers up again. The largest matrix product's speed is
measured beside them.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longalign_lib.course.results import write_result
from longalign_lib.models import pick_device
from longalign_lib.train import cost
from longalign_lib.train.paper_scale import MODELS

PACKS = [[1024], [8192], [16384], [32768], [65536], [1024] * 16, [1024] * 64, [8192] * 8, [16384] * 4, [2048] * 8 + [32768]]
TINY = [[64], [128], [256], [512], [64] * 8]


def matrix_product_speed(size: int, repeats: int = 20) -> float:
    """FLOP/s of a square bfloat16 matrix product."""
    device = pick_device()
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for k in range(repeats + 3):
        if k == 3:
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - began)


def timed(model_facts: dict, layers: int, packs: list, repeats: int, tiny: bool):
    """Times of a random model with the widths given and ``layers`` layers."""
    widths = {k: v // 64 if tiny else v for k, v in model_facts.items() if k in ("hidden_size", "intermediate_size", "vocab_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if tiny else {
        k: model_facts[k] for k in ("num_attention_heads", "num_key_value_heads")}  # fmt: skip
    config = LlamaConfig(**widths, **heads, num_hidden_layers=layers, max_position_embeddings=65_536, rope_theta=2e6)
    torch.manual_seed(0)
    with torch.device(pick_device()):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.train()
    times = cost.measure(model, packs, repeats=repeats)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return times.assign(layers=layers)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/layer_times.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="widths / 64 and short packs: to try the script on a CPU")
    args = parser.parse_args()
    packs, found = TINY if args.tiny else PACKS, {}
    product = matrix_product_speed(512 if args.tiny else 8192)
    for name, facts in MODELS.items():
        one, three = (timed(facts, n, packs, args.repeats, args.tiny) for n in (1, 3))
        layer = cost.fit(one.slots, one.squares, np.maximum((three.seconds - one.seconds) / 2, 1e-5))
        head = cost.fit(one.slots, one.squares, np.maximum(one.seconds - layer(one.slots, one.squares), 1e-5))
        found[name] = {"layer": vars(layer), "head": vars(head), "times": [t.replace({np.nan: None}).to_dict("records") for t in (one, three)]}
        shown = one[["documents", "longest", "slots", "seconds", "peak_gib"]].assign(
            three=three.seconds, layer=(three.seconds - one.seconds) / 2, layer_fitted=layer(one.slots, one.squares))  # fmt: skip
        print(name, layer, head, shown.round(4).to_string(), sep="\n", flush=True)
    print(f"matrix product: {product / 1e12:.0f} TFLOP/s")
    write_result(args.out, "gpu" if torch.cuda.is_available() else "ci", 0, models=found, matrix_product_flops=product,
                 dtype="bfloat16", recompute=True)  # fmt: skip


if __name__ == "__main__":
    main()
