"""Ways to compute the cross entropy of a language head, timed: forward and backward pass, peak memory, and how right they are.

    python benchmarks/losses.py             # this machine's device: results/losses_cpu.json or results/losses_cuda.json
    python benchmarks/losses.py --quick     # small sizes, seconds

    all logits      N x V logits at once, as stock models make them             memory N V
    chunked         `chunked.chunked_cross_entropy`, which the trainer takes    memory of two chunks
    torch           F.linear_cross_entropy with its own choices (torch 2.13)    chunks; from 2.13 on
    Liger           LigerFusedLinearCrossEntropyLoss, where it is installed     chunks; CUDA; no per-token weights but reduction none

Every target has a weight of its own, applied outside: the loss is the sum of weighted token losses. ``error_hidden`` and
``error_weight`` are relative errors of the two gradients against float64, so a way that forgets the weights has an error of
order one. The head is the default model's (576 x 49,152), on CUDA a 7B model's (4,096 x 32,000) too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import accumulate
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from longalign_lib.course.results import write_result
from longalign_lib.models import pick_device, pick_dtype
from longalign_lib.train.chunked import chunked_cross_entropy

HEADS = {"135M": (576, 49_152), "7B": (4096, 32_000)}


def all_logits(hidden, weight, labels):
    """What a stock model does."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")


def torchs(hidden, weight, labels):
    """torch's own chunks, sizes and accumulation as it chooses them for this device."""
    return F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=torch.nn.LinearCrossEntropyOptions())


def liger(hidden, weight, labels):
    """Liger's fused head and loss; 0.8.2 and newer have right gradients for reduction "none"."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, labels)


WAYS = {"all logits": all_logits, "chunked": chunked_cross_entropy, "torch": torchs, "Liger": liger}


def problem(n: int, d: int, v: int, dtype, device):
    """Hidden states of size one, a head that gives logits of size one, labels, and weights as of sequences of many lengths."""
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, d, generator=make), torch.randn(v, d, generator=make) / d**0.5
    weights = torch.rand(n, generator=make) ** 4 / n
    return (hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(),
            torch.randint(v, (n,), generator=make).to(device), weights.to(device))  # fmt: skip


def truth(hidden, weight, labels, weights, rows: int = 256):
    """Both gradients in float64, by softmax minus one-hot, a few rows at a time."""
    weight, of_hidden = weight.detach().double(), []
    of_weight = torch.zeros_like(weight)
    for part, label, w in zip(hidden.detach().double().split(rows), labels.split(rows), weights.double().split(rows), strict=True):
        d = torch.softmax(part @ weight.T, dim=-1)
        d[torch.arange(len(label), device=d.device), label] -= 1
        d *= w[:, None]
        of_hidden.append(d @ weight)
        of_weight += d.T @ part
    return torch.cat(of_hidden), of_weight


def peak_bytes(run, cuda: bool) -> int:
    """Most bytes that torch's allocator holds during ``run()`` beyond what it held before; what the process keeps does not count."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf8"))["traceEvents"]
    moves = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(accumulate((size for _, size in moves), initial=0))


def measure(way: str, n: int, d: int, v: int, dtype, device, repeats: int) -> dict:
    """Median seconds, peak MiB over the inputs, errors; or the reason why it does not run here.

    On the CPU the peak counts the two gradients, on CUDA not: there those of the step before are held when it begins.
    """
    hidden, weight, labels, weights = problem(n, d, v, dtype, device)
    cuda = device.type == "cuda"

    def once():
        hidden.grad = weight.grad = None
        (WAYS[way](hidden, weight, labels) * weights).sum().backward()
        torch.cuda.synchronize() if cuda else None

    try:
        once()  # warms up
        if not cuda:  # a block from before its watch confuses torch's profiler: it counts the release where an older one had the address
            hidden.grad = weight.grad = None
        peak, seconds = peak_bytes(once, cuda), []
        for _ in range(repeats):
            began = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - began)
    except Exception as error:  # a way that does not run here is a result too
        return {"status": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    found = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    off = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth(hidden, weight, labels, weights), strict=True)]
    return {"status": "ran", "seconds": statistics.median(seconds), "peak_mib": peak / 2**20, "error_hidden": off[0], "error_weight": off[1]}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="default: results/losses_cpu.json or results/losses_cuda.json")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes only where --out is given")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = pick_device()
    positions = 64 if args.quick else 16_384 if device.type == "cuda" else 4096
    heads = {"small": (16, 512)} if args.quick else HEADS if device.type == "cuda" else {"135M": HEADS["135M"]}
    rows = []
    for name, (d, v) in heads.items():
        for dtype in dict.fromkeys((torch.float32, pick_dtype(device))):  # no bfloat16 on CPUs that emulate it: minutes a way
            for way in WAYS:
                facts = {"head": name, "positions": positions, "dtype": str(dtype)[6:], "way": way}
                rows.append(facts | measure(way, positions, d, v, dtype, device, args.repeats))
                print(rows[-1], flush=True)
    print("\n" + pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    if args.quick and not args.out:
        return
    out = args.out or f"results/losses_{device.type}.json"
    print("written to", write_result(out, "gpu" if device.type == "cuda" else "ci", 0, threads=torch.get_num_threads(), losses=rows))


if __name__ == "__main__":
    main()
