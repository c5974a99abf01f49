"""Tokens a second and memory of training steps: batch methods, attention ways and peers, on one device.

    python benchmarks/throughput.py --out results/throughput.json

A random model of the default model's sizes (135M), bfloat16 weights, fused AdamW, no recomputation unless said. Three tables:

    batches     seven fixed batches, all positions as targets: layers as they are and compiled
    methods     the long-tail mix cut at 8k to 64k tokens, by naive, sorted, packed and balanced plans, beside two ways that
                stock trainers offer: padded rows through sdpa, and packs through flex attention; and, where flash-attn-4 is
                installed, packs through its kernels
    recompute   64k tokens with and without recomputed activations

TFLOP/s counts 6 FLOPs a weight and token and 6 x layers x hidden a token pair (causal half), nothing twice. Every finished row is
kept in ``--out`` at once, and a rerun continues after it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from layer_times import matrix_product_speed
from transformers import LlamaConfig, LlamaForCausalLM

from longalign_lib.course.results import write_result
from longalign_lib.models import pick_device
from longalign_lib.train import attention, cost, speed
from longalign_lib.train.collate import collate
from longalign_lib.train.loss import target_losses
from longalign_lib.train.paper_scale import mix
from longalign_lib.train.plan import METHODS, build_plan

SIZES = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
             vocab_size=49_152, tie_word_embeddings=True, rope_theta=100_000.0)  # fmt: skip
BATCHES = {"1 x 512": [512], "1 x 8,192": [8192], "1 x 32,768": [32_768], "1 x 65,536": [65_536], "64 x 512": [512] * 64,
           "8 x 8,192": [8192] * 8, "32 x 1,024 + 1 x 32,768": [1024] * 32 + [32_768]}  # fmt: skip
PROTOTYPE = dict(zip(BATCHES, (3_300, 58_000, 50_000, 30_000, 139_000, 103_000, 74_000)))  # tokens/s of an earlier, simpler loop
FOURTH = attention._FLASH_ATTN_4  # flash-attn-4's function, where it is installed
WINDOWS = (8192, 16_384, 32_768, 65_536)


def make_model(tiny: bool, compiled: bool, way: str = attention.NAME):
    """A random model on the device, with its optimiser."""
    sizes = SIZES | (dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3, vocab_size=512) if tiny else {})
    torch.manual_seed(0)
    attention.register()
    device = pick_device()
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=65_536)).to(torch.bfloat16)
    model.config.use_cache = False
    model.set_attn_implementation(way)
    model.train()
    if compiled:
        speed.compile_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=device.type == "cuda")
    return model, optimizer


def batch_of(lengths, rng, vocabulary: int, padded: bool = False) -> dict:
    """A pack (or padded rows) of random tokens with every position a target, on the device."""
    ids = [rng.integers(10, vocabulary, int(n)) for n in lengths]
    width = int(max(lengths))
    offsets = np.arange(len(ids)) * width if padded else np.cumsum([0, *lengths[:-1]])
    lines = pd.DataFrame({"row": range(len(ids)), "length": lengths, "offset": offsets})
    batch = collate(lines, [(x, x) for x in ids], padded=padded)
    return {k: v.to(pick_device()) if hasattr(v, "to") else v for k, v in batch.items()}


def step(model, optimizer, batch, ours: bool = True):
    """One training step; the stock way lets the model compute its own logits and mean loss."""
    if ours:
        losses, _, _ = target_losses(model, batch)
        losses.mean().backward()
    else:
        model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(model, optimizer, batches: list[dict], repeats: int, ours: bool = True) -> dict:
    """Median seconds of a pass over all batches, and peak memory; the first pass warms up."""
    cuda, seconds = torch.cuda.is_available(), []
    for k in range(repeats + 1):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for batch in batches:
            step(model, optimizer, batch, ours)
        if cuda:
            torch.cuda.synchronize()
            if k == 0:
                torch.cuda.reset_peak_memory_stats()
        seconds.append(time.perf_counter() - began)
    return {"seconds": float(np.median(seconds[1:])), "first_seconds": seconds[0],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}  # fmt: skip


def rates(facts: dict, tokens: int, squares: float, config) -> dict:
    """Tokens/s and TFLOP/s of real tokens (padding is no work done)."""
    flops = float(cost.from_config(config, 1.0)(tokens, squares))
    return facts | {"tokens": tokens, "tokens_per_second": tokens / facts["seconds"], "tflops": flops / facts["seconds"] / 1e12}


def fixed_batch(name: str, compiled: bool, tiny: bool, repeats: int) -> dict:
    """One of the seven fixed batches."""
    lengths = [max(4, n // 256) for n in BATCHES[name]] if tiny else BATCHES[name]
    model, optimizer = make_model(tiny, compiled)
    batch = batch_of(lengths, np.random.default_rng(0), model.config.vocab_size)
    facts = timed(model, optimizer, [batch], repeats)
    return rates(facts, sum(lengths), float(np.square(lengths, dtype=float).sum()), model.config) | kernels(model, optimizer, batch)


def kernels(model, optimizer, batch, most: int = 10) -> dict:
    """The kernels that took the most device time in one step, each with its share of all; nothing without CUDA."""
    if not torch.cuda.is_available():
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step(model, optimizer, batch)
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    whole = sum(e.self_device_time_total for e in events)
    return {"device_ms": whole / 1e3, "kernels": [{"kernel": e.key[:110], "calls": e.count, "ms": round(e.self_device_time_total / 1e3, 3),
                                                   "share": round(e.self_device_time_total / whole, 4)} for e in events[:most]]}  # fmt: skip


def method_run(window: int, way: str, tiny: bool, repeats: int, compiled: bool, most_tokens: int) -> dict:
    """Packs drawn from a plan of the mix at one window; ``way`` is a method, "sdpa, padded" or "flex, packed"."""
    capacity = window // 128 if tiny else window
    lengths = np.maximum(np.minimum(mix(40_000), window) // (128 if tiny else 1), 4)
    method = {"sdpa, padded": "naive", "flex, packed": "packed", "flash-attn-4, packed": "packed"}.get(way, way)
    attn = {"flex, packed": "flex_attention", "sdpa, padded": "sdpa", "naive": "sdpa", "sorted": "sdpa"}.get(way, attention.NAME)
    fourth = way.startswith("flash-attn-4")  # for all packs; ours takes it by `attention.LEAST_WORK`
    attention._FLASH_ATTN, attention._FLASH_ATTN_4, attention.LEAST_WORK = None, FOURTH if fourth else None, 0  # None: torch's varlen kernel
    rows = 1 if way == "naive" else max(1, min(8, 65_536 // window))
    common = dict(packs_per_step=8, max_ranks=1, seed=0)
    plan = build_plan(lengths, method=method, capacity=capacity * (rows if method in ("naive", "sorted") else 1),
                      rows_per_pack=rows if method in ("naive", "sorted") else 1, **common)  # fmt: skip
    ours = way in METHODS or fourth
    model, optimizer = make_model(tiny, compiled and attn != "flex_attention", attn)
    rng, batches, tokens, squares, slots = np.random.default_rng(0), [], 0, 0.0, 0
    packs = dict(list(plan.table.groupby("pack").length))
    for pack in rng.permutation(list(packs)):
        held = packs[pack].to_numpy()
        batch = batch_of(held, rng, model.config.vocab_size, padded=plan.padded)
        if not ours:
            keep = {"input_ids", "labels"} | ({"position_ids"} if not plan.padded else set())
            batch = {k: v for k, v in batch.items() if k in keep} | {"use_cache": False}
            if plan.padded:
                batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1], device=pick_device()) <
                                           torch.as_tensor(held, device=pick_device())[:, None]).long()  # fmt: skip
        batches.append(batch)
        tokens, squares = tokens + int(held.sum()), squares + float(np.square(held, dtype=float).sum())
        slots += batch["input_ids"].numel()
        if slots >= most_tokens // (128 if tiny else 1):
            break
    facts = timed(model, optimizer, batches, repeats, ours)
    return rates(facts, tokens, squares, model.config) | {"real_share": tokens / slots, "batches": len(batches)}


def recomputed(on: bool, tiny: bool, repeats: int) -> dict:
    """One 64k document with or without recomputed activations."""
    model, optimizer = make_model(tiny, compiled=False)
    if on:
        model.gradient_checkpointing_enable()
    lengths = [512 if tiny else 65_536]
    facts = timed(model, optimizer, [batch_of(lengths, np.random.default_rng(0), model.config.vocab_size)], repeats)
    return rates(facts, lengths[0], float(lengths[0]) ** 2, model.config)


def jobs(args) -> dict:
    """Name -> function of every row of the three tables."""
    found = {}
    for compiled in (True, False):
        for name in BATCHES:
            found["batches", name, "compiled" if compiled else "as it is"] = lambda n=name, c=compiled: fixed_batch(n, c, args.tiny, args.repeats)
    for on in (True, False):
        found["recompute", "1 x 65,536", "recomputed" if on else "kept"] = lambda o=on: recomputed(o, args.tiny, 2)
    fourth = ("flash-attn-4, packed",) if FOURTH else ()
    for window in WINDOWS:
        for way in (*METHODS, "sdpa, padded", "flex, packed", *fourth):
            found["methods", f"{window:,}", way] = lambda w=window, y=way: method_run(w, y, args.tiny, 1, args.compile, args.most_tokens)
    return {k: v for k, v in found.items() if not args.only or k[0] in args.only.split(",")}


def main() -> None:
    """Run what is not there yet, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/throughput.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most_tokens", type=int, default=524_288, help="slots of the packs drawn from a plan")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting new rows after so many seconds")
    parser.add_argument("--only", default="", help="tables, with commas: batches,recompute,methods")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile layers in the methods table")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short rows: to try the script on a CPU")
    args = parser.parse_args()
    out, began = Path(args.out), time.monotonic()
    rows = json.loads(out.read_text(encoding="utf8"))["rows"] if out.is_file() else []
    done = {(r["table"], r["case"], r["way"]) for r in rows}
    product = matrix_product_speed(8192 if torch.cuda.is_available() else 256)
    for (table, case, way), run in jobs(args).items():
        if (table, case, way) in done or time.monotonic() - began > args.seconds:
            continue
        try:
            row = run()
            row |= {"share_of_matrix_product": row["tflops"] * 1e12 / product}
            if table == "batches":
                row["prototype_tokens_per_second"] = PROTOTYPE[case]
                row["times_prototype"] = row["tokens_per_second"] / PROTOTYPE[case]
        except (torch.OutOfMemoryError, RuntimeError, ValueError, ImportError) as error:
            row = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        rows.append({"table": table, "case": case, "way": way} | row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items() if k != "kernels"}, flush=True)
        gc.collect()
        if table == "batches":  # each batch gets kernels of its own shape, the plans' packs share theirs
            torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        out.parent.mkdir(parents=True, exist_ok=True)
        write_result(out, "gpu" if torch.cuda.is_available() else "ci", 0, rows=rows, matrix_product_flops=product,
                     dtype="bfloat16", model="random, the default model's sizes", compiled_methods=args.compile)  # fmt: skip
    print(pd.DataFrame(rows).drop(columns=["first_seconds", "seconds", "kernels"], errors="ignore").round(3).to_string())


if __name__ == "__main__":
    main()
