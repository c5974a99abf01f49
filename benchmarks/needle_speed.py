"""A needle grid answered three ways, timed: every prompt anew, shared beginnings once, and answers written together besides.

    python benchmarks/needle_speed.py                                    # this machine's device; the default model
    python benchmarks/needle_speed.py --random --tokenizer FOLDER        # a random model of its sizes: times alone

    plain loop      transformers' own `generate`, a prompt at a time
    kept beginning  `prefix.complete` with batch=1: each shared beginning computed once
    and groups      `prefix.complete`: answers are also written side by side

Depths are spread evenly from 0 to 100, lengths between the two ends. `bound` is the most that exact beginnings allow, `reached` the share
of what can be saved. `same answers` counts those equal to the plain loop's in the same dtype; in bfloat16 sums are rounded in another order, and
a near-tie may fall otherwise. Every finished way is kept in ``--out`` at once, and a rerun continues after it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from throughput import SIZES
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longalign_lib.course.results import write_result
from longalign_lib.evaluate import prefix
from longalign_lib.evaluate.needle import build_grid
from longalign_lib.models import load_model, load_tokenizer, pick_device

WAYS = ("plain loop", "kept beginning", "and groups")


def plain(model, tokenizer, prompts, most: int) -> tuple[list[str], int]:
    """(answers, prompt tokens computed) by transformers' generate."""
    said = []
    for ids in tqdm(prompts, desc="plain loop", leave=False):
        tokens = torch.tensor([ids], device=model.device)
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=most, pad_token_id=0)
        said.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip())
    return said, sum(map(len, prompts))


def peak_mib() -> float:
    """Most memory of the device, or of this process on a CPU, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


def measure(way: str, model, tokenizer, prompts, most: int) -> dict:
    """One way over all prompts."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began, first = time.perf_counter(), []
    if way == "plain loop":
        answers, computed = plain(model, tokenizer, prompts, most)
    else:
        said, report = prefix.complete(model, tokenizer, prompts, most, lambda *_: first.append(time.perf_counter() - began),
                                       batch=1 if way == "kept beginning" else None)  # fmt: skip
        answers, computed = [a.text for a in said], report.computed_tokens
    return {"way": way, "seconds": time.perf_counter() - began, "computed": computed, "answers": answers, "memory_mib": peak_mib()}


def main() -> None:
    """Run what is not there yet, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="default: results/needle_speed_cpu.json or results/needle_speed_cuda.json")
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="tokens; default: 5 up to 4,000 on a CPU, 10 up to 8,000 on CUDA")
    parser.add_argument("--depths", type=int, default=0, help="how many; default: 5 on a CPU, 10 on CUDA")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--model", default="default")
    parser.add_argument("--random", action="store_true", help="a random model of the default model's sizes: every answer has all its tokens")
    parser.add_argument("--tokenizer", default="default", help="a folder, where the default model is not at hand")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting new ways after so many seconds")
    args = parser.parse_args()
    device, began = pick_device(), time.monotonic()
    cuda = device.type == "cuda"
    lengths = args.lengths or ([800 * k for k in range(1, 11)] if cuda else [1000, 1750, 2500, 3250, 4000])
    depths = np.linspace(0, 100, args.depths or (10 if cuda else 5)).round(3).tolist()
    out = Path(args.out or f"results/needle_speed_{'cuda' if cuda else 'cpu'}.json")
    tokenizer = load_tokenizer() if args.tokenizer == "default" else AutoTokenizer.from_pretrained(args.tokenizer)
    prompts = [p.input_ids for _, p in build_grid(tokenizer, lengths, depths)]
    least, factor = prefix.bound(prompts)
    rows = json.loads(out.read_text(encoding="utf8"))["rows"] if out.is_file() else []
    for dtype in args.dtypes:
        todo = [w for w in WAYS if not any((r["dtype"], r["way"]) == (dtype, w) for r in rows)]
        if not todo:
            continue
        if args.random:
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=8192 + 64)).to(device, getattr(torch, dtype)).eval()
            model.generation_config.eos_token_id = None
        else:
            model = load_model(args.model, getattr(torch, dtype))
        prefix.complete(model, tokenizer, [prompts[0][:64], prompts[-1][:80]], 4, progress=False)  # kernels and threads start
        plain(model, tokenizer, [prompts[0][:64]], 4)
        for way in todo:
            if time.monotonic() - began > args.seconds:
                break
            rows.append({"dtype": dtype} | measure(way, model, tokenizer, prompts, args.max_new_tokens))
            print(f"{dtype} {way}: {rows[-1]['seconds']:.1f} s", flush=True)
            wanted = next((r["answers"] for r in rows if (r["dtype"], r["way"]) == (dtype, "plain loop")), None)
            asked = sum(map(len, prompts))
            saved = (asked - rows[-1]["computed"]) / (asked - least)
            rows[-1] |= {"same_answers": None if wanted is None else sum(a == b for a, b in zip(wanted, rows[-1]["answers"], strict=True)),
                         "reached": saved}  # fmt: skip
            out.parent.mkdir(parents=True, exist_ok=True)
            write_result(out, "gpu" if cuda else "ci", 0, rows=rows, lengths=lengths, depths=depths, prompts=len(prompts), prompt_tokens=asked,
                         least_tokens=least, bound=factor, expected_factor=prefix.expected_factor(lengths, depths), max_new_tokens=args.max_new_tokens,
                         model="random, the default model's sizes" if args.random else args.model)  # fmt: skip
    table = pd.DataFrame(rows).drop(columns="answers")
    first = table[table.way == WAYS[0]].set_index("dtype").seconds
    table["times_faster"] = table.dtype.map(first) / table.seconds
    print(f"\n{len(prompts)} prompts, {sum(map(len, prompts)):,} tokens; bound {factor:.2f}")
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
