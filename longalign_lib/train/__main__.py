"""The program that launchers start, on one GPU or many nodes.

    torchrun --nproc_per_node 8 -m longalign_lib.train --data STORE --output_dir OUT …
    deepspeed --num_gpus 8 --module longalign_lib.train --data STORE --output_dir OUT --deepspeed configs/zero3_offload.json …
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT -m longalign_lib.train …

It makes the plan, trains, and saves model and tokenizer in ``--output_dir``. Started again after a kill, it continues from the
last whole checkpoint with the samples not yet seen; on another number of processes too. All of transformers'
TrainingArguments are options, except those that the plan sets.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments

from longalign_lib import models
from longalign_lib.data.tokens import TokenStore
from longalign_lib.files import whole
from longalign_lib.train import checkpoint
from longalign_lib.train.audit import audit, report
from longalign_lib.train.cost import PEAKS
from longalign_lib.train.plan import build_plan, micro_steps
from longalign_lib.train.rows import fit_rows
from longalign_lib.train.run import leave, predict, train


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
    compile_layers: bool = field(default=False, metadata={"help": "torch.compile every decoder layer: faster steps on a GPU, after some seconds"})
    rope: str = field(default="none", metadata={"help": "context extension: none, linear, base or yarn"})
    rope_factor: float = field(default=1.0, metadata={"help": "its factor"})
    dry_run: bool = field(default=False, metadata={"help": "print the plan's audit, memory and time for --gpus GPUs, and stop"})
    gpus: int = field(default=0, metadata={"help": "GPUs that --dry_run predicts for; default: the processes at hand"})
    gpu: str = field(default="H100", metadata={"help": "kind of GPU that --dry_run predicts for: " + ", ".join(PEAKS)})


def plan_for(recipe: RecipeArguments, store: TokenStore, seed: int):
    """The plan of a run, and the fates of rows that do not fit or have no target."""
    pieces, fates = fit_rows(store.lengths, recipe.capacity, recipe.over_long, store.count_targets)
    plan = build_plan(pieces, method=recipe.method, capacity=recipe.capacity, packs_per_step=recipe.packs_per_step,
                      max_ranks=recipe.max_ranks, pool=recipe.pool, seed=seed, epochs=recipe.epochs)  # fmt: skip
    return plan, fates


SET_BY_THE_PLAN = dict.fromkeys(("--num_train_epochs", "--per_device_train_batch_size", "--gradient_accumulation_steps", "--max_steps"),
                                "use --epochs, --capacity and --packs_per_step instead")  # fmt: skip
SET_BY_THE_PLAN["--ignore_data_skip"] = "a resumed run continues with the samples not yet seen; leave it out"
SET_BY_THE_PLAN["--resume_from_checkpoint"] = "a run goes on by itself from the last whole checkpoint in --output_dir; leave it out"


def check_options(words: list[str]) -> list[str]:
    """Split ``--name=value`` into two words, spell names with underscores; refuse options that the plan or the run itself sets."""
    words = [x for w in words for x in (w.split("=", 1) if w.startswith("--") and "=" in w else [w])]
    words = ["--" + w[2:].replace("-", "_") if w.startswith("--") else w for w in words]
    for word in words:
        if word in SET_BY_THE_PLAN:
            raise ValueError(f"{word} cannot be set here: {SET_BY_THE_PLAN[word]}")
    return words


def parser(*kinds: type) -> HfArgumentParser:
    """A parser of these dataclasses; names are spelt out, since ``--max_step`` would pass `check_options` and be ``--max_steps``."""
    return HfArgumentParser(kinds, allow_abbrev=False)


def training_options(words: list[str]) -> argparse.Namespace:
    """transformers' own options among ``words``, typed; ValueError for a word that is none of them. Touches no device."""
    found, unknown = parser(TrainingArguments).parse_known_args(words)
    if unknown:
        raise ValueError(f"{' '.join(unknown)}: no such option; python -m longalign_lib.train --help lists all")
    return found


def main(argv: list[str] | None = None) -> None:
    """Parse, plan, train, save."""
    argv = check_options(list(sys.argv[1:] if argv is None else argv))
    if "-h" in argv or "--help" in argv:
        parser(RecipeArguments, TrainingArguments).parse_args_into_dataclasses(argv)
    recipe, rest = parser(RecipeArguments).parse_args_into_dataclasses(argv, return_remaining_strings=True)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if "--seed" not in rest:
        rest += ["--seed", "0"]
    options = training_options(rest)
    if recipe.rope == "none" and recipe.rope_factor != 1:
        raise ValueError(f"--rope_factor {recipe.rope_factor} without --rope: choose linear, base or yarn")
    if recipe.gpu not in PEAKS:
        raise ValueError(f"--gpu {recipe.gpu!r} is not one of {', '.join(PEAKS)}")
    store = TokenStore.load(Path(recipe.data))
    plan, fates = plan_for(recipe, store, options.seed)
    ranks = recipe.gpus if recipe.dry_run and recipe.gpus else world
    facts = audit(plan, store.lengths, fates) | report(plan, ranks) | {"ranks": ranks, "micro_steps": micro_steps(plan, ranks)}
    facts["touched"] = fates.fate.value_counts().to_dict()
    if rank == 0:
        print("plan:", _json(facts), flush=True)
    if recipe.dry_run:
        if rank == 0:
            newer = getattr(options, "activation_checkpointing", None)  # its name from transformers 5.2x on
            recompute = bool(options.gradient_checkpointing if newer is None else newer)
            print("predicted:", _json(predict(recipe, plan, ranks, options.deepspeed, recompute)), flush=True)
        return
    rest += ["--gradient_accumulation_steps", str(micro_steps(plan, world)), "--per_device_train_batch_size", "1",
             "--num_train_epochs", "1"]  # fmt: skip
    on_cpu = models.pick_device().type == "cpu"
    if on_cpu and "--use_cpu" not in rest:
        rest += ["--use_cpu", "true"]
    if on_cpu and options.deepspeed:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _deepspeed_without_compiler()
    resume, changed = _resume(options, plan, store, world, rank)
    rest += changed
    (args,) = parser(TrainingArguments).parse_args_into_dataclasses(rest)
    if on_cpu and args.deepspeed:  # on CUDA, accelerate does this; on the CPU DeepSpeed must be told of the processes
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    train(recipe, args, store, plan, fates, resume)


def _json(facts: dict) -> str:
    """One line of JSON; what is not a number (a mean over no rows) is null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}, allow_nan=False)


def _resume(options: argparse.Namespace, plan, store, world: int, rank: int) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, and further options: DeepSpeed's universal loading where the ranks differ."""
    if not options.output_dir:
        raise ValueError("--output_dir is missing: name the folder for checkpoints, logs and the model")
    out = Path(options.output_dir)
    config = json.loads(Path(options.deepspeed).read_text(encoding="utf8")) if options.deepspeed else None
    facts = {"plan": checkpoint.plan_fingerprint(plan), "data": checkpoint.data_fingerprint(store), "engine": checkpoint.engine(config)}
    found = checkpoint.find(out, facts, say=rank == 0)
    if found is None:
        return None, []
    before = checkpoint.read_mark(found)["ranks"]
    if rank == 0:
        print(f"resuming from {found.name} (made by {before} processes, now {world})", flush=True)
    if config is None or before == world:
        return found, []
    checkpoint.make_universal(found, rank)
    config["checkpoint"] = config.get("checkpoint", {}) | {"load_universal": True}
    changed = out / "deepspeed_universal.json"
    if rank == 0:
        with whole(changed) as half:
            half.write_text(json.dumps(config, indent=1) + "\n", encoding="utf8")
    checkpoint.wait_for(changed, config)
    return found, ["--deepspeed", str(changed)]


def _deepspeed_without_compiler() -> None:
    """Keep DeepSpeed on the CPU from compiling its shared-memory collective: gloo does the same work without g++."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    main()
    leave()
