"""One training run from a plan: load and extend the model, train with `LongAlignTrainer`, save; and what it would take.

``output_dir`` holds, from the start: run_settings.json, plan.parquet, rows_touched.csv, log.jsonl (a line a log entry); during
the run checkpoint-N folders; at the end the model (safetensors) and its tokenizer.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path

import transformers
from transformers import TrainingArguments

from longalign_lib import models
from longalign_lib.data.tokens import TokenStore
from longalign_lib.files import whole
from longalign_lib.train import checkpoint, families, memory, speed
from longalign_lib.train.cost import PEAKS, from_config, simulate
from longalign_lib.train.rope import extend_context

# Shares of the data sheet's peak that layers of a 7B model reached on an H100 (results/layer_times.json)
LINEAR_SHARE, ATTENTION_SHARE = 0.53, 0.29


def check_same_run(out: Path, settings: dict) -> None:
    """Raise ValueError when ``out`` holds checkpoints of a run with other settings."""
    file = out / "run_settings.json"
    if not any(out.glob("checkpoint-*")) or not file.is_file():
        return
    old = json.loads(file.read_text(encoding="utf8"))
    for key, value in settings.items():
        if old.get(key) != value:
            raise ValueError(
                f"{out.name} holds checkpoints of another run ({key}: {old.get(key)!r} there, {value!r} now): "
                "give another --output_dir, or delete it"
            )


class LogLines(transformers.TrainerCallback):
    """Append every log entry to a JSONL file as it comes, so that others can watch the run."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        """A resumed run takes the steps after its checkpoint again: their old lines go."""
        if state.is_world_process_zero:
            checkpoint.trim_log(self.path, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One line a log, with the step and the last step."""
        if state.is_world_process_zero and logs:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf8") as file:
                file.write(json.dumps({"step": state.global_step, "max_steps": state.max_steps, **logs}) + "\n")


def predict(recipe, plan, ranks: int, deepspeed: str | None, recompute: bool) -> dict:
    """Memory a GPU and hours of a run on ``ranks`` GPUs of the kind ``recipe.gpu``: arithmetic, nothing is loaded.

    Returns:
        gpus, gpu, gib (parts and total of `memory.estimate`), hours, idle (share of rank-time), seconds_a_step; for a model
        whose config does not tell its sizes ``unknown``, the reason, in place of all numbers.
    """
    config = transformers.AutoConfig.from_pretrained(models.resolve(recipe.model)).get_text_config()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [name for name in sizes if not isinstance(getattr(config, name, None), int)]
    if missing:
        return {"gpus": ranks, "gpu": recipe.gpu, "unknown": f"{type(config).__name__} does not tell {', '.join(missing)}: memory and "
                                                             "time are estimated for models with the sizes of a Llama"}  # fmt: skip
    zero = json.loads(Path(deepspeed).read_text(encoding="utf8")).get("zero_optimization", {}) if deepspeed else None
    kept = memory.estimate(
        config, int(plan.packs().slots.max()), ranks=ranks, zero_stage=zero.get("stage", 0) if zero is not None else None,
        offload_optimizer=bool(zero and zero.get("offload_optimizer", {}).get("device", "none") != "none"),
        offload_parameters=bool(zero and zero.get("offload_param", {}).get("device", "none") != "none"), recompute=recompute,
    )  # fmt: skip
    peak = PEAKS[recipe.gpu]
    cost = from_config(config, LINEAR_SHARE * peak, recompute, attention_flops_per_second=ATTENTION_SHARE * peak)
    run = simulate(plan, ranks, cost)
    return {"gpus": ranks, "gpu": recipe.gpu, "gib": {k: round(v, 2) for k, v in kept.items()}, "hours": round(run.seconds / 3600, 3),
            "idle": round(run.idle, 4), "seconds_a_step": round(run.seconds / (int(plan.table.step.max()) + 1), 3)}  # fmt: skip


def train(recipe, args: TrainingArguments, store: TokenStore, plan, fates, resume: Path | None = None) -> None:
    """Train one run and save it; every rank calls this."""
    import torch

    from longalign_lib.train.trainer import LongAlignTrainer, check_arguments

    if args.process_index != 0:
        transformers.logging.set_verbosity_error()
    check_arguments(args, plan)  # before the weights are read
    # bf16 weights only where an optimiser keeps float32 masters: plain AdamW would lose small updates in them
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    names["auto"] = torch.bfloat16 if args.bf16 and args.deepspeed else torch.float32
    if recipe.dtype not in names:
        raise ValueError(f"--dtype {recipe.dtype!r} is not one of {', '.join(names)}")
    model = models.load_model(recipe.model, dtype=names[recipe.dtype], device="cpu")
    if recipe.rope != "none":
        model = extend_context(model, recipe.rope, recipe.rope_factor)
    families.check_window(model, plan)
    model.config.use_cache = False
    if args.save_only_model:
        raise ValueError("--save_only_model leaves out the optimiser's state, so nothing could be continued: leave it out, or take "
                         "--save_strategy no, which saves the model at the end alone")  # fmt: skip
    if recipe.compile_layers:
        if args.deepspeed and args.hf_deepspeed_config.is_zero3():
            raise ValueError("--compile_layers does not go with ZeRO-3, whose hooks gather weights inside the layers: leave it out")
        speed.compile_layers(model)
    out = Path(args.output_dir)
    settings = {k: v for k, v in vars(recipe).items() if k not in ("data", "dry_run", "gpus", "gpu")}
    settings |= {"seed": args.seed, "learning_rate": args.learning_rate, "rows": len(store), "tokens": int(store.lengths.sum())}
    if resume is not None:
        check_same_run(out, settings)
    if args.process_index == 0:
        with whole(out / "run_settings.json") as half:  # other ranks may be reading it in `check_same_run`
            half.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf8")
        plan.save(out / "plan.parquet")
        fates.to_csv(out / "rows_touched.csv", index=False)
    exponent = None if recipe.pack_mean else recipe.exponent
    trainer = LongAlignTrainer(model, args, store=store, plan=plan, exponent=exponent, denominator=recipe.denominator,
                               processing_class=models.load_tokenizer(recipe.model))  # fmt: skip
    trainer.add_callback(LogLines(out / "log.jsonl"))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model(args.output_dir)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave() -> None:
    """End this process, its work done and saved: as the interpreter would, but without destroying gloo's threads.

    DeepSpeed's engine keeps process groups alive past `destroy_process_group`, and a gloo thread that is still joinable
    when the interpreter tears down aborts a run that had finished ("terminate called without an active exception", seen
    once in some thirty runs of two processes). So exit handlers run, output is flushed, and the process ends at once.
    On one process, and on CUDA's NCCL, nothing of the kind was seen and the normal way out is taken.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return
    gloo = "gloo" in str(dist.get_backend())
    dist.barrier()
    if not gloo:
        dist.destroy_process_group()
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
