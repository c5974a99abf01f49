"""The program that launchers start: ``torchrun … -m longalign_lib.train`` or ``deepspeed … --module longalign_lib.train``.

It loads a token store, makes the plan (or reads one), trains, and saves model and tokenizer in ``output_dir``.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import transformers
from transformers import HfArgumentParser, TrainingArguments

from longalign_lib import models
from longalign_lib.data.tokens import TokenStore
from longalign_lib.train.loss import IGNORE
from longalign_lib.train.plan import audit, build_plan, fit_lengths, micro_steps
from longalign_lib.train.rope import extend_context


@dataclass
class RecipeArguments:
    """What LongAlign adds to transformers' TrainingArguments."""

    data: str = field(metadata={"help": "folder of a token store (longalign_lib.data.tokens)"})
    model: str = field(default="default", metadata={"help": "'default', a model folder or a Hub id"})
    method: str = field(default="balanced", metadata={"help": "naive, sorted, packed or balanced"})
    capacity: int = field(default=65536, metadata={"help": "tokens of a pack"})
    packs_per_step: int = field(default=8, metadata={"help": "packs of a global step, over all ranks"})
    epochs: int = field(default=2, metadata={"help": "passes over the data (the plan holds them all)"})
    exponent: float = field(default=1.0, metadata={"help": "loss weights: 1 = every sequence alike (Eq. 4), 0 = token mean"})
    pack_mean: bool = field(default=False, metadata={"help": "plain packing's loss (Eq. 3) in place of the exponent"})
    denominator: str = field(default="step", metadata={"help": "step (Eq. 4) or epoch"})
    over_long: str = field(default="truncate", metadata={"help": "rows over the capacity: truncate, drop or error"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32 or bfloat16: weights are loaded in this type"})
    rope: str = field(default="none", metadata={"help": "context extension: none, linear, base or yarn"})
    rope_factor: float = field(default=1.0, metadata={"help": "its factor"})
    dry_run: bool = field(default=False, metadata={"help": "print the plan's audit and stop"})


def plan_for(recipe: RecipeArguments, store: TokenStore, seed: int):
    """The plan of a run, and the fates of rows that do not fit."""
    lengths, fates = fit_lengths(store.lengths, recipe.capacity, recipe.over_long)
    targets = np.array([int((store[i][1][1:n] != IGNORE).sum()) for i, n in enumerate(lengths)])
    plan = build_plan(lengths, targets, method=recipe.method, capacity=recipe.capacity,
                      packs_per_step=recipe.packs_per_step, seed=seed, epochs=recipe.epochs)  # fmt: skip
    return plan, lengths, fates


def main(argv: list[str] | None = None) -> None:
    """Parse, plan, train, save."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(RecipeArguments)
    recipe, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if "--seed" in rest:
        seed = int(rest[rest.index("--seed") + 1])
    else:
        seed = 0
    store = TokenStore.load(Path(recipe.data))
    plan, lengths, fates = plan_for(recipe, store, seed)
    facts = audit(plan, lengths) | {"ranks": world, "micro_steps": micro_steps(plan, world), "touched": len(fates)}
    if int(os.environ.get("RANK", "0")) == 0:
        print("plan:", json.dumps(facts), flush=True)
    if recipe.dry_run:
        return
    rest += ["--gradient_accumulation_steps", str(micro_steps(plan, world)), "--per_device_train_batch_size", "1",
             "--num_train_epochs", "1"]  # fmt: skip
    on_cpu = models.pick_device().type == "cpu"
    if on_cpu and "--use_cpu" not in rest:
        rest += ["--use_cpu", "true"]
    if on_cpu and "--deepspeed" in rest:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _deepspeed_without_compiler()
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(rest)
    if on_cpu and args.deepspeed:  # on CUDA, accelerate does this; on the CPU DeepSpeed must be told of the processes
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    train(recipe, args, store, plan, fates)


class LogLines(transformers.TrainerCallback):
    """Append every log entry to a JSONL file as it comes, so that others can watch the run."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One line a log, with the step and the last step."""
        if state.is_world_process_zero and logs:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf8") as file:
                file.write(json.dumps({"step": state.global_step, "max_steps": state.max_steps, **logs}) + "\n")


def train(recipe: RecipeArguments, args: TrainingArguments, store: TokenStore, plan, fates) -> None:
    """Train one run and save it; every rank calls this."""
    import torch

    from longalign_lib.train.trainer import LongAlignTrainer

    if args.process_index != 0:
        transformers.logging.set_verbosity_error()
    dtype = recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    model = models.load_model(recipe.model, dtype=dtype, device="cpu")
    if recipe.rope != "none":
        model = extend_context(model, recipe.rope, recipe.rope_factor)
    model.config.use_cache = False
    exponent = None if recipe.pack_mean else recipe.exponent
    trainer = LongAlignTrainer(model, args, store=store, plan=plan, exponent=exponent, denominator=recipe.denominator,
                               processing_class=models.load_tokenizer(recipe.model))  # fmt: skip
    trainer.add_callback(LogLines(Path(args.output_dir) / "log.jsonl"))
    resume = transformers.trainer_utils.get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(args.output_dir)
    if args.process_index == 0:
        out = Path(args.output_dir)
        plan.save(out / "plan.parquet")
        fates.to_csv(out / "rows_touched.csv", index=False)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _deepspeed_without_compiler() -> None:
    """Keep DeepSpeed on the CPU from compiling its shared-memory collective: gloo does the same work without g++."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    main()
