"""Started by torchrun: gradients of many cuttings of one batch through the real trainer, one case after the other.

``torchrun … invariance_worker.py FOLDER KIND…`` (kinds: ddp, deepspeed, and each with _short) writes a FOLDER/*.safetensors a case
(``gradient/NAME`` as the optimiser got it, ``weights/NAME`` after one step of SGD with learning rate 1, ``seen`` loss weights)
and FOLDER/cases.json. What is right is for the test to say.
"""

import contextlib
import copy
import json
import os
import sys
import warnings
from pathlib import Path

import torch

from longalign_lib.train.cutting import make_cuttings, random_sequences
from longalign_lib.train.invariance import check_invariance, tiny_llama, trainer_gradient
from longalign_lib.train.run import leave

ROOT = Path(__file__).resolve().parent.parent.parent
CLIP = 0.3  # a norm under the gradient's own, which is 1.2
# name -> (file in configs/, what is changed in its zero_optimization)
CPU = {"device": "cpu"}
ZERO = {
    "zero1": ("zero2", {"stage": 1}),
    "zero1_offload": ("zero2", {"stage": 1, "offload_optimizer": CPU}),
    "zero2": ("zero2", {}),
    "zero2_offload": ("zero2", {"offload_optimizer": CPU}),
    "zero3": ("zero3", {}),
    "zero3_offload": ("zero3_offload", {"offload_optimizer": CPU}),
    "zero3_offload_all": ("paper", {"offload_optimizer": CPU, "offload_param": CPU}),
}
BY_HAND = ("random packs, accumulation 3", "padded rows, accumulation 2", "a pack too few for the last micro-step")


def batch():
    """The sequences, one of them without a target."""
    sequences = random_sequences(13, seed=1)
    sequences[5] = (sequences[5][0], sequences[5][1] * 0 - 100)
    return sequences


def all_cuttings(world):
    return {c.name: c for c in make_cuttings([len(x) for x, _ in batch()], world, short=True, seed=2)}


def deepspeed_config(name):
    file, changes = ZERO[name]
    config = json.loads((ROOT / "configs" / f"{file}.json").read_text())
    config["zero_optimization"] |= changes
    config["optimizer"] = {"type": "SGD", "params": {"lr": 1.0}}  # the weights then show the gradient
    return config | {"zero_force_ds_cpu_optimizer": False}


def arguments(folder, accumulation, **more):
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=accumulation, num_train_epochs=1,
        learning_rate=1.0, lr_scheduler_type="constant", optim="sgd", use_cpu=True, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, **more,
    )  # fmt: skip


def make_trainer(model, cutting, folder, clip=0.0, exponent=1.0, **more):
    from longalign_lib.train.trainer import LongAlignTrainer

    args, sequences = arguments(folder, cutting.accumulation, max_grad_norm=clip, **more), batch()
    return LongAlignTrainer(model, args, store=sequences, plan=cutting.plan(sequences), balance=False, exponent=exponent)


def run(cutting, folder, dtype, config=None, clip=0.0, **more):
    """One step: gradient before the optimiser (not with clip), weights after it, and the norm that Trainer logged."""
    if config is not None:
        import deepspeed
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # the case before had another plan for the processes
        gathered = deepspeed.zero.GatheredParameters
        more["deepspeed"] = copy.deepcopy(config)
    trainer, seen = make_trainer(tiny_llama(dtype=dtype), cutting, folder, clip, **more), []
    compute_loss = trainer.compute_loss

    def look(model, inputs, **kwargs):
        seen.append(inputs["loss_weights"].double().flatten())
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = look
    gradient = {} if clip else trainer_gradient(trainer)
    if clip:
        trainer.train()
    params = dict(trainer.model.named_parameters())
    with gathered(list(params.values())) if config else contextlib.nullcontext():
        weights = {n: p.detach().clone() for n, p in params.items()}
    (norm,) = (x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x)
    tensors = {f"gradient/{n}": g for n, g in gradient.items()} | {f"weights/{n}": w for n, w in weights.items()}
    return tensors | {"seen": torch.cat(seen).unique()}, float(norm)


def cases(kind, world):
    """(case, cutting, dtype, config, options) of a launch."""
    cuttings = all_cuttings(world)
    clipped = cuttings["random packs, accumulation 2"]
    if kind.startswith("ddp"):
        for name, cutting in cuttings.items():
            if kind == "ddp_short" and name not in BY_HAND:
                continue
            yield name, cutting, torch.float64, None, {}
        yield "clip", clipped, torch.float64, None, {"clip": CLIP}
        return
    by_hand = [n for n in BY_HAND if n in cuttings]
    for number, zero in enumerate(ZERO):
        config = deepspeed_config(zero)
        for name in by_hand if kind == "deepspeed" else [by_hand[number % len(by_hand)]]:
            yield f"{zero}: {name}", cuttings[name], torch.float32, config, {}
        if kind == "deepspeed":
            yield f"{zero}: clip", clipped, torch.float32, config, {"clip": CLIP}
    yield "zero2: bf16", clipped, torch.float32, deepspeed_config("zero2"), {"bf16": True}


def helper_in_processes(folder, rank):
    """`check_invariance` itself, called by every rank; also of a trainer that forgets the factor of the ranks."""
    sequences, cuttings = batch(), [c for n, c in all_cuttings(torch.distributed.get_world_size()).items() if n in BY_HAND]

    def right(cutting, _):
        return trainer_gradient(make_trainer(tiny_llama(), cutting, folder))

    def wrong(cutting, _):
        trainer = make_trainer(tiny_llama(), cutting, folder)
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: compute_loss(*a, **k) / trainer.args.world_size
        return trainer_gradient(trainer)

    said = {}
    for function in (right, wrong):
        report = check_invariance(function, tiny_llama(), sequences, cuttings=cuttings, raise_error=False)
        said[function.__name__] = {"error": report.error.tolist(), "causes": report.attrs["causes"], "ranks": report.ranks.tolist()}
    if rank == 0:
        (Path(folder) / "helper.json").write_text(json.dumps(said))


def main(folder, kinds):
    import transformers
    from safetensors.torch import save_file

    transformers.logging.set_verbosity_error()
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    done = {}
    for kind in kinds:  # ddp first: what DeepSpeed leaves in the environment would change it
        if kind.startswith("deepspeed"):
            os.environ["DS_ACCELERATOR"] = "cpu"
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler; gloo does the same
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        for number, (case, cutting, dtype, config, options) in enumerate(cases(kind, world)):
            tensors, norm = run(cutting, folder, dtype, config, **options)
            done[case] = {"file": f"{kind}{number}.safetensors", "norm": norm, "clip": options.get("clip", 0.0)}
            if rank == 0:
                save_file({n: t.contiguous() for n, t in tensors.items()}, Path(folder) / done[case]["file"])
        if kind.startswith("ddp"):
            helper_in_processes(folder, rank)
    if rank == 0:
        (Path(folder) / "cases.json").write_text(json.dumps(done))
    leave()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], sys.argv[2:])
