"""Started by torchrun from benchmarks/multi_gpu.py: the cases of one launch, one after the other, on every rank.

``multi_gpu_worker.py WORK.json`` reads which cases to run, appends a line a finished row to FOLDER/rows.jsonl (rank 0), and names the
case at hand in the file that it is told, so that a launch that dies says where. One model and backend a launch; a case is

    steps, window, method   every rank first times packs of its own alone, without collectives (what waiting follows from; once a
                            model, whatever the backend), then all train together with `LongAlignTrainer`. On CUDA the last step is
                            profiled, not timed: its kernels say how long ranks computed and waited (`multi_gpu_kernels`)
    gradient, type          the gradient of one step, held against the file that the launch on one rank wrote
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from multi_gpu_kernels import Profile, shares
from throughput import SIZES
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from longalign_lib.files import whole
from longalign_lib.models import pick_device
from longalign_lib.train import cost
from longalign_lib.train.invariance import trainer_gradient
from longalign_lib.train.paper_scale import four_plans, mix
from longalign_lib.train.plan import Plan, assign, micro_steps
from longalign_lib.train.run import leave
from longalign_lib.train.trainer import LongAlignTrainer

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "135M": SIZES,
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
               vocab_size=49_152, tie_word_embeddings=True, rope_theta=100_000.0),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=512, tie_word_embeddings=True),
}  # fmt: skip
BACKENDS = ("ddp", "zero3")
RANKS = 8  # most ranks that the plans are balanced for; a step has as many packs
GRADIENT_WINDOW = 16_384
ALONE = 12  # packs that a rank times alone; the others lie between them
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


class RandomRows:
    """Rows of random tokens, all of them targets: item i is (input_ids, labels), the same on every rank and in every run."""

    def __init__(self, lengths, vocabulary: int, seed: int):
        self.lengths, self.vocabulary, self.seed = np.asarray(lengths), vocabulary, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int):
        ids = np.random.default_rng([self.seed, row]).integers(10, self.vocabulary, int(self.lengths[row]))
        return ids, ids


class Clock(TrainerCallback):
    """Seconds of every optimiser step, the device's work included; ``marks`` are the ends, the first the start of training.

    On CUDA the last step runs under ``profile``.
    """

    def __init__(self):
        self.marks: list[float] = []
        self.profile = Profile()

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def on_train_begin(self, args, state, control, **kwargs):
        """Start."""
        self._mark()

    def on_step_begin(self, args, state, control, **kwargs):
        """The last step is profiled."""
        if state.global_step == state.max_steps - 1:
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        """A step is over; peak memory is counted from the end of the first."""
        self._mark()
        self.profile.stop()
        if len(self.marks) == 2 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


def plans_of(window: int, steps: int, seed: int, scale: int = 1) -> tuple[np.ndarray, dict[str, Plan]]:
    """Lengths of the mix cut at ``window``, as many as fill about ``steps`` steps, and the four plans of them.

    ``scale`` divides all lengths, for a try on a CPU.
    """
    lengths = np.maximum(np.minimum(mix(40_000, seed), window) // scale, 4)
    capacity = window // scale
    rows = int(np.searchsorted(np.cumsum(lengths), steps * RANKS * capacity * 0.98))
    return lengths[:rows], four_plans(lengths[:rows], capacity, RANKS, RANKS, seed)


def idle_share(dealt: pd.DataFrame, seconds: pd.Series, world: int, wait: str = "micro") -> float:
    """Share of rank-time spent waiting for the slowest rank.

    Args:
        dealt: `plan.assign`'s frame.
        seconds: pack -> what it takes alone.
        world: ranks.
        wait: "micro": ranks meet in every micro-step, as ZeRO-3 makes them; "step": once a step, as DDP does.
    """
    table = dealt.assign(seconds=dealt.pack.map(seconds))
    if table.seconds.isna().any():
        raise ValueError(f"packs {table.pack[table.seconds.isna()].tolist()[:5]} have not been timed")
    meet = ["step", "micro"] if wait == "micro" else ["step"]
    slowest = table.groupby([*meet, "rank"]).seconds.sum().groupby(meet).max().sum()
    return float(1 - table.seconds.sum() / (world * slowest))


def waiting(plan: Plan, method: str, world: int, seconds: pd.Series, timed: list[int], config, recompute: bool) -> dict:
    """Waiting on ``world`` ranks from packs timed alone, beside what FLOPs say, and the same with coefficients fitted to ``timed``.

    ``idle_...`` is over all steps, ``idle_last_...`` of the last, the one whose kernels are watched.
    """
    packs = plan.packs().set_index("pack")
    counted = cost.from_config(config, 1.0, recompute)
    fitted = cost.fit(packs.slots[timed], packs.squares[timed], seconds[timed]) if len(timed) >= 3 else counted
    dealt = assign(plan, world, method == "balanced")
    busy = dealt.assign(seconds=dealt.pack.map(seconds)).groupby(["step", "rank"]).seconds.sum().unstack(fill_value=0.0)
    facts = {"packs": len(packs), "packs_timed": len(timed), "slowest_over_mean": float((busy.max(axis=1) / (busy.sum(axis=1) / world)).mean())}
    for name, guess in (("measured", seconds), ("from_flops", None), ("fitted", None)):
        if guess is None:
            law = counted if name == "from_flops" else fitted
            guess = pd.Series(law(packs.slots, packs.squares), packs.index)
        for steps, which in ((dealt, "idle"), (dealt[dealt.step == dealt.step.max()], "idle_last")):
            facts |= {f"{which}_{name}": idle_share(steps, guess, world), f"{which}_a_step_{name}": idle_share(steps, guess, world, "step")}
    return facts


def critical_seconds(plan: Plan, method: str, world: int, seconds: pd.Series, wait: str) -> np.ndarray:
    """Of every step, the seconds of the ranks that the others wait for, collectives and optimiser left out."""
    table = assign(plan, world, method == "balanced")
    meet = ["step", "micro"] if wait == "micro" else ["step"]
    busy = table.assign(seconds=table.pack.map(seconds)).groupby([*meet, "rank"]).seconds.sum()
    return busy.groupby(meet).max().groupby("step").sum().sort_index().to_numpy()


class Launch:
    """What all cases of a launch share: model sizes, backend, ranks, folder."""

    def __init__(self, work: dict):
        self.work, self.rank, self.world = work, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.folder, self.cuda = Path(work["folder"]), torch.cuda.is_available()
        self.tiny, self.backend, self.name = work["tiny"], work["backend"], work["model"]
        if self.backend not in BACKENDS:
            raise ValueError(f"backend {self.backend!r} is not one of {', '.join(BACKENDS)}")
        self.recompute = self.name != "135M"
        if self.cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl")
        else:
            dist.init_process_group("gloo")
        if self.backend == "zero3":
            import deepspeed

            if not self.cuda:
                os.environ["DS_ACCELERATOR"] = "cpu"
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler; gloo does the same
            deepspeed.init_distributed(dist_backend="nccl" if self.cuda else "gloo", verbose=False)

    def model(self, dtype: torch.dtype):
        """The random model, the same on every rank."""
        torch.manual_seed(0)
        sizes = MODELS["tiny" if self.tiny else self.name]
        with torch.device(pick_device()):
            model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=65_536, pad_token_id=0, use_cache=False))
        return model.to(dtype).train()

    def trainer(self, plan: Plan, method: str, lengths, bf16: bool):
        """A `LongAlignTrainer`, weights as the recipe has them: bfloat16 under DeepSpeed, which keeps float32 masters."""
        if self.backend == "zero3":
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state()  # the case before had another plan
        model = self.model(torch.bfloat16 if bf16 and self.backend == "zero3" else torch.float32)
        config = json.loads((ROOT / "configs" / "zero3.json").read_text(encoding="utf8")) if self.backend == "zero3" else None
        args = TrainingArguments(
            output_dir=str(self.folder / f"trainer_{self.backend}_{self.world}"), per_device_train_batch_size=1, num_train_epochs=1,
            gradient_accumulation_steps=micro_steps(plan, self.world), learning_rate=1e-5, lr_scheduler_type="constant",
            adam_beta2=0.95, bf16=bf16, use_cpu=not self.cuda, logging_steps=10_000, save_strategy="no", report_to=[],
            disable_tqdm=True, gradient_checkpointing=self.recompute, deepspeed=config, ddp_find_unused_parameters=False,
            optim="adamw_torch_fused" if self.cuda and config is None else "adamw_torch",
        )  # fmt: skip
        return LongAlignTrainer(model, args, store=RandomRows(lengths, model.config.vocab_size, self.work["seed"]), plan=plan,
                                balance=method == "balanced")  # fmt: skip

    def alone(self, window: int, plan: Plan, method: str) -> tuple[pd.Series, list[int], object]:
        """Seconds of every pack without collectives, the packs that were timed, and the model's config.

        A rank times at most `ALONE` of the packs that it is dealt, evenly spread over their FLOPs, and the others follow
        by linear interpolation. They are timed once a model: a file keeps them for the other backend.
        """
        sizes = LlamaConfig(**MODELS["tiny" if self.tiny else self.name])
        kept = self.folder / f"alone_{self.name}_{window}_{method}_{self.world}.json"
        packs = plan.packs().set_index("pack")
        flops = pd.Series(cost.from_config(sizes, 1.0, self.recompute)(packs.slots, packs.squares), packs.index)
        if not kept.is_file():
            dealt = assign(plan, self.world, method == "balanced")
            mine = flops[dealt.pack[dealt["rank"] == self.rank]].sort_values()
            mine = mine.iloc[np.unique(np.linspace(0, len(mine) - 1, ALONE).round().astype(int))].index.tolist()
            rows = plan.table.groupby("pack").length.apply(list)
            if plan.padded and plan.rows_per_pack > 1:
                raise ValueError("padded packs of several rows cannot be timed as packs of documents")
            model = self.model(torch.bfloat16 if self.cuda and self.backend == "zero3" else torch.float32)
            if self.recompute:
                model.gradient_checkpointing_enable()
            cast = self.cuda and self.backend == "ddp"
            with torch.autocast("cuda", torch.bfloat16) if cast else contextlib.nullcontext():
                largest = rows[mine[-1]]  # once more, in front: it pays for the allocations
                timed = cost.measure(model, [largest, *(rows[p] for p in mine)], seed=self.work["seed"], all_targets=True).iloc[1:]
            parts: list = [None] * self.world
            dist.all_gather_object(parts, dict(zip(mine, timed.seconds.tolist(), strict=True)))
            if self.rank == 0:
                with whole(kept) as half:
                    half.write_text(json.dumps({k: v for part in parts for k, v in part.items()}), encoding="utf8")
            dist.barrier()
        seconds = {int(k): v for k, v in json.loads(kept.read_text(encoding="utf8")).items()}
        known = flops[list(seconds)].sort_values()
        between = np.interp(flops, known, [seconds[p] for p in known.index])
        return pd.Series(between, packs.index), list(seconds), sizes

    def write(self, *rows: dict) -> None:
        """Append rows to the file, with what all of this launch share."""
        if self.rank == 0:
            shared = {"world": self.world, "backend": self.backend, "model": self.name}
            with open(self.folder / "rows.jsonl", "a", encoding="utf8") as file:
                file.writelines(json.dumps({"table": row.pop("table"), **shared, **row}) + "\n" for row in rows)

    def steps(self, window: int, method: str) -> None:
        """Time packs alone, then train; writes rows of the tables waiting and steps."""
        lengths, plans = plans_of(window, self.work["steps"][str(window)], self.work["seed"], self.work["scale"])
        plan = plans[method]
        seconds, timed_alone, config = self.alone(window, plan, method)
        free()
        case = {"window": window, "method": method}
        for world in (2, 4, RANKS):
            self.write({"table": "waiting", **case, "ranks": world, "timed_on": self.world,
                        **waiting(plan, method, world, seconds, timed_alone, config, self.recompute)})  # fmt: skip
        if self.cuda:
            torch.cuda.reset_accumulated_memory_stats()
        trainer, clock = self.trainer(plan, method, lengths, bf16=self.cuda), Clock()
        trainer.add_callback(clock)
        trainer.train()
        kernels: list = [None] * self.world
        dist.all_gather_object(kernels, clock.profile.kernels())
        held = torch.cuda.memory_stats() if self.cuda else {}
        peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if self.cuda else float("nan"))
        walls = torch.tensor(np.diff(clock.marks))
        if self.world > 1:
            peak, walls = peak.to(pick_device()), walls.to(pick_device())
            dist.all_reduce(peak, dist.ReduceOp.MAX)
            dist.all_reduce(walls, dist.ReduceOp.MAX)
        walls, tokens = walls.cpu().numpy(), plan.table.groupby("step").length.sum().to_numpy()
        wait = "micro" if self.backend == "zero3" else "step"
        critical = critical_seconds(plan, method, self.world, seconds, wait)
        timed = slice(1, -1 if self.cuda else None)  # the first step warms up, the last is profiled
        self.write({"table": "steps", **case, "recompute": self.recompute, "steps": len(walls), "tokens": int(tokens[timed].sum()),
                    "tokens_all": int(tokens.sum()),
                    "step_seconds": [round(x, 5) for x in walls.tolist()],
                    "tokens_per_second": float(tokens[timed].sum() / walls[timed].sum()),
                    "critical_seconds": [round(x, 5) for x in critical.tolist()],
                    "beside_packs": float(1 - critical[timed].sum() / walls[timed].sum()), **shares(kernels), "peak_gib": float(peak),
                    "fill": float(plan.fill()), "reserved_gib": held.get("reserved_bytes.all.peak", 0) / 2**30,
                    "allocation_retries": held.get("num_alloc_retries"), "allocator": os.environ.get(ALLOCATOR, "default")})  # fmt: skip
        drop(trainer)

    def gradient(self, kind: str) -> None:
        """Gradient of one step against that of one rank, in the same type; one rank writes it, and bf16 against float32."""
        from safetensors.torch import load_file, save_file

        window = GRADIENT_WINDOW
        lengths, plans = plans_of(window, 1, self.work["seed"], self.work["scale"])
        trainer = self.trainer(plans["balanced"], "balanced", lengths, bf16=kind == "bfloat16" and self.cuda)
        found = trainer_gradient(trainer)
        drop(trainer)
        if self.rank == 0:
            file = self.folder / f"gradient_{self.backend}_{self.name}_{kind}.safetensors"
            exact = self.folder / f"gradient_ddp_{self.name}_float32.safetensors"
            if self.world == 1:
                with whole(file) as half:
                    save_file({k: v.float().contiguous() for k, v in found.items()}, half)
            error = distance(found, load_file(file)) if file.is_file() else None
            self.write({"table": "gradients", "type": kind, "window": window, "packs": RANKS, "error_to_one_rank": error,
                        "error_to_float32": distance(found, load_file(exact)) if exact.is_file() else None})  # fmt: skip
        dist.barrier()

    def run(self) -> None:
        """All cases that are left, until the time is up."""
        until = time.time() + self.work["seconds"]
        for case in self.work["cases"]:
            late = torch.tensor(float(time.time() > until), device=pick_device() if self.cuda else "cpu")
            dist.broadcast(late, 0)
            if late:
                break
            if self.rank == 0:
                Path(self.work["current"]).write_text(json.dumps(case), encoding="utf8")
                print(f"{self.world} x {self.backend}, {self.name}: {case}", flush=True)
            getattr(self, case[0])(*case[1:])
            free()
        if self.rank == 0:
            Path(self.work["current"]).unlink(missing_ok=True)


def distance(found: dict, wanted: dict) -> float:
    """|found - wanted| / |wanted| over all tensors, summed in float64.

    Raises:
        ValueError: the names differ.
    """
    if found.keys() != wanted.keys():
        raise ValueError(f"the gradients have other parameters: {sorted(found.keys() ^ wanted.keys())[:3]}")
    off = sum(float((found[k].double() - wanted[k].double()).square().sum()) for k in wanted)
    return (off / sum(float(wanted[k].double().square().sum()) for k in wanted)) ** 0.5


def drop(trainer) -> None:
    """Let go of a trainer's tensors on the device."""
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = None


def free() -> None:
    """Collect garbage, return cached blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Run the cases of the work file."""
    import transformers

    transformers.logging.set_verbosity_error()
    Launch(json.loads(Path(sys.argv[1]).read_text(encoding="utf8"))).run()
    leave()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
