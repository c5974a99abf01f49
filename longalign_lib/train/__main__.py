"""The program that launchers start: ``torchrun … -m longalign_lib.train`` or ``deepspeed … --module longalign_lib.train``.

It loads a token store, makes the plan (or reads one), trains, and saves model and tokenizer in ``output_dir``.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from transformers import HfArgumentParser, TrainingArguments

from longalign_lib import models
from longalign_lib.data.tokens import TokenStore
from longalign_lib.train.audit import audit, report
from longalign_lib.train.plan import build_plan, micro_steps
from longalign_lib.train.rope import extend_context
from longalign_lib.train.rows import fit_rows


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
    over_long: str = field(default="truncate", metadata={"help": "rows over the capacity: truncate, split, drop or error"})
    max_ranks: int | None = field(default=None, metadata={"help": "most ranks to balance for (balanced); default: packs_per_step"})
    pool: int | None = field(default=None, metadata={"help": "steps whose packs are sorted by cost together (balanced): 1 mixes most, default: all of an epoch"})
    dtype: str = field(default="auto", metadata={"help": "type of the weights: float32, bfloat16, or auto (bfloat16 with --bf16 and DeepSpeed, which keeps float32 masters)"})
    rope: str = field(default="none", metadata={"help": "context extension: none, linear, base or yarn"})
    rope_factor: float = field(default=1.0, metadata={"help": "its factor"})
    dry_run: bool = field(default=False, metadata={"help": "print the plan's audit and stop"})


def plan_for(recipe: RecipeArguments, store: TokenStore, seed: int):
    """The plan of a run, and the fates of rows that do not fit or have no target."""
    pieces, fates = fit_rows(store.lengths, recipe.capacity, recipe.over_long, store.count_targets)
    plan = build_plan(pieces, method=recipe.method, capacity=recipe.capacity, packs_per_step=recipe.packs_per_step,
                      max_ranks=recipe.max_ranks, pool=recipe.pool, seed=seed, epochs=recipe.epochs)  # fmt: skip
    return plan, fates


SET_BY_THE_PLAN = ("--num_train_epochs", "--per_device_train_batch_size", "--gradient_accumulation_steps")


def check_options(words: list[str]) -> list[str]:
    """Split ``--name=value`` into two words; refuse options that the plan sets."""
    words = [x for w in words for x in (w.split("=", 1) if w.startswith("--") and "=" in w else [w])]
    for word in words:
        if word in SET_BY_THE_PLAN:
            raise ValueError(f"{word} is set by the plan: use --epochs, --capacity and --packs_per_step instead")
    return words


def check_window(model, plan, name: str) -> None:
    """Raise ValueError when a row of the plan is longer than the model's window."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = int(plan.table.length.max())
    if window and longest > window:
        raise ValueError(
            f"a row has {longest} tokens and the window of model {Path(name).name!r} is {window}: lower --capacity (rows "
            f"are then cut), or extend the model with --rope yarn --rope_factor {longest / window:.2f}"
        )


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


def main(argv: list[str] | None = None) -> None:
    """Parse, plan, train, save."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(RecipeArguments)
    argv = check_options(argv)
    if "-h" in argv or "--help" in argv:
        HfArgumentParser((RecipeArguments, TrainingArguments)).parse_args_into_dataclasses(argv)
    recipe, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if "--seed" not in rest:
        rest += ["--seed", "0"]
    seed = int(dict(itertools.pairwise(rest)).get("--seed", "0"))
    if recipe.rope == "none" and recipe.rope_factor != 1:
        raise ValueError(f"--rope_factor {recipe.rope_factor} without --rope: choose linear, base or yarn")
    store = TokenStore.load(Path(recipe.data))
    plan, fates = plan_for(recipe, store, seed)
    facts = audit(plan, store.lengths, fates) | report(plan, world) | {"ranks": world, "micro_steps": micro_steps(plan, world)}
    facts["touched"] = fates.fate.value_counts().to_dict()
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
    # bf16 weights only where an optimiser keeps float32 masters: plain AdamW would lose small updates in them
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    names["auto"] = torch.bfloat16 if args.bf16 and args.deepspeed else torch.float32
    if recipe.dtype not in names:
        raise ValueError(f"--dtype {recipe.dtype!r} is not one of {', '.join(names)}")
    dtype = names[recipe.dtype]
    model = models.load_model(recipe.model, dtype=dtype, device="cpu")
    if recipe.rope != "none":
        model = extend_context(model, recipe.rope, recipe.rope_factor)
    check_window(model, plan, recipe.model)
    model.config.use_cache = False
    settings = {k: v for k, v in vars(recipe).items() if k not in ("data", "dry_run")}
    settings |= {"seed": args.seed, "learning_rate": args.learning_rate, "rows": len(store), "tokens": int(store.lengths.sum())}
    check_same_run(Path(args.output_dir), settings)
    if args.process_index == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(args.output_dir) / "run_settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf8")
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
