"""Ways to keep documents of a pack apart in attention, timed: forward and backward pass of one layer, and its peak memory.

    python benchmarks/attention.py             # this machine's device; a few minutes
    python benchmarks/attention.py --quick     # the smallest packs only, seconds

    document loop       one causal sdpa call a document                            no mask; work sum of l^2
    sdpa, block mask    what transformers does with position_ids that restart      T x T bool mask; work T^2
    flex attention      compiled, with a block mask of documents                   forward only on CPUs (it has no backward there)
    torch varlen        CUDA: the kernel that `longalign` takes                    no mask; work sum of l^2
    flash-attn          CUDA, where the package is installed
    flash-attn-4        CUDA, where that package is installed (pure Python, its kernels are compiled when first called)

One layer of the default model: 9 query heads, 3 key heads of 64. A mask is built once a forward pass and serves all layers:
its time stands apart (`prepare_s`), its memory is part of the peak, which is that of both passes where there are two.
`difference` is the largest error at 64 places, where the softmax is written out in float64, of the largest output there. On the
CPU every case runs in a process of its own, whose peak of resident memory over its inputs is taken.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
import torch.nn.functional as F

from longalign_lib.course.results import write_result
from longalign_lib.models import pick_device
from longalign_lib.train import attention

HEADS, KEY_HEADS, HEAD_SIZE = 9, 3, 64
TOKENS = {"cpu": [2048, 4096, 8192], "cuda": [8192, 16_384, 32_768, 65_536]}
MIB = 2**20


def packs(tokens: int) -> dict[str, list[int]]:
    """Packs of so many tokens: few and many documents, and one long beside many short."""
    return {"1 document": [tokens], "8 documents": [tokens // 8] * 8, "64 documents": [tokens // 64] * 64,
            "1 long, 32 short": [tokens // 2] + [tokens // 64] * 32}  # fmt: skip


def document_of(borders) -> torch.Tensor:
    """Number of the document of every token."""
    return torch.repeat_interleave(torch.arange(len(borders) - 1, device=borders.device), borders.diff().long())


def block_mask(borders) -> torch.Tensor:
    """bool [T, T]: same document and not after."""
    document = document_of(borders)
    place = torch.arange(len(document), device=borders.device)
    return (document[:, None] == document[None]) & (place[:, None] >= place[None])


def flex_mask(borders):
    """The same for flex attention, in blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    document = document_of(borders)

    def seen(batch, head, query, key):
        return (document[query] == document[key]) & (query >= key)

    tokens = len(document)
    return create_block_mask(seen, None, None, tokens, tokens, device=str(borders.device), _compile=borders.is_cuda)


def lines(*tensors):
    """[T, H, D] -> [1, H, T, D]."""
    return [x.transpose(0, 1).unsqueeze(0) for x in tensors]


def dense(q, k, v, borders, longest, mask):
    """sdpa as transformers calls it with a mask: key heads repeated."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = lines(q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


@functools.cache
def compiled_flex():
    """Flex attention is meant to be compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q, k, v, borders, longest, mask):
    """Flex attention with fewer key heads."""
    q, k, v = lines(q, k, v)
    return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


WAYS = {  # name: (prepares once a forward pass, computes a layer)
    "document loop": (lambda borders: None, lambda q, k, v, b, longest, _: attention.document_loop_attention(q, k, v, b)),
    "sdpa, block mask": (block_mask, dense),
    "flex attention": (flex_mask, flex),
    "torch varlen": (lambda borders: None, lambda q, k, v, b, longest, _: attention.varlen_attention(q, k, v, b, longest)),
    "flash-attn": (lambda borders: None, lambda q, k, v, b, longest, _: attention.flash_attention(q, k, v, b, longest)),
    "flash-attn-4": (lambda borders: None, lambda q, k, v, b, longest, _: attention.flash_attention_4(q, k, v, b, longest)),
}  # fmt: skip


def ways(device: str) -> list[str]:
    """The ways that run on this device."""
    some = ["document loop", "sdpa, block mask", "flex attention"]
    if device == "cuda":
        some += ["torch varlen"] + (["flash-attn"] if attention._FLASH_ATTN else []) + (["flash-attn-4"] if attention._FLASH_ATTN_4 else [])
    return some


def measure(way: str, lengths: list[int], device: str, dtype: torch.dtype, repeats: int, seed: int) -> dict:
    """Median seconds and peak MiB of one layer on one pack; a reason where it does not run."""
    backward = not (way == "flex attention" and device == "cpu")
    generator = torch.Generator().manual_seed(seed)
    tokens, longest = sum(lengths), max(lengths)
    q, k, v, g = (torch.randn(tokens, h, HEAD_SIZE, generator=generator).to(device, dtype) for h in (HEADS, KEY_HEADS, KEY_HEADS, HEADS))
    borders = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32, device=device)
    prepare, compute = WAYS[way]

    def layer(state, backward):
        inputs = [x.detach().requires_grad_(backward) for x in (q, k, v)]
        out = compute(*inputs, borders, longest, state)
        if backward:
            torch.autograd.grad(out, inputs, g)
        return out.detach()

    def clock(call):
        started = time.perf_counter()
        value = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, value

    result = {"status": "ran"}
    try:
        if way != "flex attention":  # libraries load at the first call; flex attention compiles for the pack itself
            small = [min(n, 64) for n in lengths[:2]]
            warm = torch.tensor([0, *np.cumsum(small)], dtype=torch.int32, device=device)
            compute(q[: sum(small)], k[: sum(small)], v[: sum(small)], warm, max(small), prepare(warm))
        else:
            state = prepare(borders)
            layer(state, backward), layer(state, False)
            del state
        before = reset_peak(device)
        result["prepare_s"], state = clock(lambda: prepare(borders))
        out = clock(lambda: layer(state, backward))[1]
        result["peak_mib"] = (peak(device) - before) / MIB
        result["forward_s"] = statistics.median(clock(lambda: layer(state, False))[0] for _ in range(repeats))
        if backward:
            result["both_s"] = statistics.median(clock(lambda: layer(state, True))[0] for _ in range(repeats))
        work = 2 * HEADS * HEAD_SIZE * sum(n * n for n in lengths)  # a causal forward pass: half of 4 H D l^2; backward 2.5 times that
        result["useful_tflops"] = work * 3.5 / result["both_s"] / 1e12 if backward else work / result["forward_s"] / 1e12
        result["difference"] = difference(out, q, k, v, borders, seed)
    except torch.OutOfMemoryError:
        result["status"] = "out of memory"
    except Exception as error:  # a way that does not run here is a result too
        result["status"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return result


def difference(out, q, k, v, borders, seed: int, places: int = 64) -> float:
    """Largest error at some places of a pack, of the largest output there; the softmax is written out, in float64."""
    wrong, largest, repeat = 0.0, 0.0, q.shape[1] // k.shape[1]
    for place in np.random.default_rng(seed).integers(0, len(q), places).tolist():
        first = int(borders[(borders <= place).sum() - 1])
        keys, values = (x[first : place + 1].detach().double().repeat_interleave(repeat, 1) for x in (k, v))
        shares = torch.einsum("hd,khd->hk", q[place].detach().double(), keys).div(HEAD_SIZE**0.5).softmax(1)
        right = torch.einsum("hk,khd->hd", shares, values)
        wrong, largest = max(wrong, float((out[place].double() - right).abs().max())), max(largest, float(right.abs().max()))
    return wrong / largest


def reset_peak(device: str) -> int:
    """Bytes in use now, from which the peak is counted."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")  # Linux: forget the peak of resident memory
    return psutil.Process().memory_info().rss


def peak(device: str) -> int:
    """Highest bytes in use since `reset_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="default: results/attention_cpu.json or results/attention_cuda.json")
    parser.add_argument("--quick", action="store_true", help="the smallest packs, two repeats; writes only where --out is given")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="", help="default: bfloat16 on CUDA, float32 on the CPU")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(WAYS), help="ways to leave out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = pick_device().type
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    sizes = TOKENS[device][:1] if args.quick else TOKENS[device]
    repeats = 2 if args.quick else args.repeats
    rows = []
    for tokens in sizes:
        for pack, lengths in packs(tokens).items():
            for way in [way for way in ways(device) if way not in args.skip]:
                call = (way, lengths, device, dtype, repeats, args.seed)
                result = measure(*call) if device == "cuda" else apart(call)
                rows.append({"tokens": tokens, "pack": pack, "way": way, **result})
                print(f"{tokens:6d}  {pack:17s} {way:17s} {result['status']:8s} {result.get('forward_s', 0):.4f} s forward", flush=True)
    table = pd.DataFrame(rows)
    print("\n" + table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    if args.quick and not args.out:
        return
    path = write_result(args.out or f"results/attention_{device}.json", "gpu" if device == "cuda" else "ci", args.seed, dtype=str(dtype).removeprefix("torch."),
                        heads=[HEADS, KEY_HEADS, HEAD_SIZE], threads=torch.get_num_threads(), repeats=repeats, attention=json.loads(table.to_json(orient="records")))  # fmt: skip
    print(f"\nwritten to {path}")


def apart(call: tuple) -> dict:
    """`measure` in a process of its own, so that no case sees the memory that another left behind."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *call).result()


if __name__ == "__main__":
    main()
