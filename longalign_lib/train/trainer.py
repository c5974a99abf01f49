"""A Trainer that follows a Plan: stock models, exact loss weights, any number of ranks.

What it changes in transformers' Trainer, and nothing else:
- batches come from the plan: rank r reads the packs that `plan.assign` deals to it, micro-step by micro-step; ranks
  that a short step leaves without a pack run an empty one, so collectives match;
- the loss is the **sum** of weighted token losses (`weights.token_weights`: all weights of a global step sum to one), times
  the number of ranks, because DDP and DeepSpeed average gradients over ranks. Nothing is divided by the accumulation count;
- a loss that is not finite stops the run before the optimiser sees it, and the message names the rows;
- logs carry ``loss`` (the objective) and, from the plan alone or from sums kept on the device: ``loss_token_mean`` and
  ``loss_sequence_mean``, which compare across batch methods and exponents, ``tokens_per_second``, ``fill``,
  ``idle_estimated`` (share of rank-time spent waiting, if time follows FLOPs), ``tflops_per_device`` and, where the
  device's peak is known, ``mfu``;
- a document longer than the model's window is refused; a pack may be longer;
- what would change the order of the plan or add a term to the loss is refused (`check_arguments`, `refuse_other_losses`);
- a checkpoint counts when its marker is written, after all ranks are done (`checkpoint`); weights that are not finite are
  never written; a checkpoint of another plan, other data or another loss is not resumed.

Cost beside Trainer's: one host sync a step (is the loss finite?), one all-reduce of four numbers a log.
"""

from __future__ import annotations

import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from longalign_lib.train import attention, checkpoint, families
from longalign_lib.train.collate import collate, empty_pack
from longalign_lib.train.cost import StepCost, from_config, peak_flops
from longalign_lib.train.loss import target_losses
from longalign_lib.train.plan import Plan, assign, micro_steps
from longalign_lib.train.weights import plan_weights


class RankPacks(Dataset):
    """The packs of one rank in the order of its micro-steps: item ``step * micro_steps + micro`` is a batch of tensors.

    Steps count from the plan's first, which is not 0 in the file of a later shard (`shards`).
    """

    def __init__(self, plan: Plan, store, rank: int, world_size: int, weights=None, pad_id: int = 0, balance: bool = True):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside 0..{world_size - 1}")
        self.plan, self.store, self.pad_id = plan, store, pad_id
        self.micro = micro_steps(plan, world_size)
        first = int(plan.table.step.min())
        self.steps = int(plan.table.step.max()) + 1 - first
        weights = plan_weights(plan) if weights is None else weights
        self._lines = {pack: lines for pack, lines in plan.table.assign(weight=weights).groupby("pack")}
        dealt = assign(plan, world_size, balance)
        mine = dealt[dealt["rank"] == rank]
        self._pack = {(s - first, m): p for s, m, p in zip(mine.step, mine.micro, mine.pack, strict=True)}

    def __len__(self) -> int:
        return self.steps * self.micro

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} is outside 0..{len(self) - 1}")
        pack = self._pack.get(divmod(index, self.micro))
        if pack is None:
            return empty_pack(self.pad_id, self.plan.padded) | {"pack": -1}
        lines = self._lines[pack].sort_values("offset")
        batch = collate(lines, self.store, lines.weight, padded=self.plan.padded, pad_id=self.pad_id)
        return batch | {"pack": int(pack)}


# transformers before 5.19 has no `loss_is_scaled_for_ga` and divides every loss that is not its own by the accumulation count.
_KNOWS_SCALED_LOSS = hasattr(Trainer, "loss_is_scaled_for_ga")


def _only(items: list):
    return items[0]


class PlanMixin:
    """What `LongAlignTrainer` adds to Trainer, for other subclasses of it too (see `interop.planned`).

    Args:
        model: a causal language model; it is switched to the ``longalign`` attention unless ``attention_name`` is None.
        args: TrainingArguments; ``gradient_accumulation_steps`` must be the plan's micro-steps at this world size (a
            ValueError says the number), ``per_device_train_batch_size`` 1 (a batch is a pack); see `check_arguments`.
        store: row -> (input_ids, labels), such as a TokenStore.
        plan: who sits where; it covers all epochs, so Trainer sees one. Its steps count from its first: of a plan made by
            shards, each file is a run of its own, and ``optimizers`` hands optimiser and schedule on to the next.
        exponent, denominator: the loss weights, see `weights.token_weights`; exponent None is Eq. 3's plain packing.
        balance: see `plan.assign`.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model, args, *, store, plan: Plan, exponent: float | None = 1.0, denominator: str = "step",
                 balance: bool = True, attention_name: str | None = attention.NAME, **kwargs):  # fmt: skip
        check_arguments(args, plan)
        refuse_other_losses(model, kwargs.get("compute_loss_func"))
        args.remove_unused_columns = False
        if args.n_gpu > 1:  # Trainer would split each pack over them with nn.DataParallel
            warnings.warn(f"one process trains on one of the {args.n_gpu} GPUs that it sees: start it with torchrun "
                          f"--nproc_per_node {args.n_gpu} to use all, or set CUDA_VISIBLE_DEVICES", stacklevel=3)  # fmt: skip
            args._n_gpu = 1
        if attention_name is not None and not plan.padded:
            attention.register()
            model.set_attn_implementation(attention_name)
            families.refuse(model, attention_name)
        elif attention_name is not None:
            families.refuse_padded(model, int(plan.table.groupby("pack").size().max()))
        families.check_window(model, plan)
        self.plan, self.store = plan, store
        self.rank_packs = RankPacks(plan, store, args.process_index, args.world_size,
                                    plan_weights(plan, exponent, denominator), filler(model), balance)  # fmt: skip
        self._loss = "mean of packs" if exponent is None else f"exponent {float(exponent)} over the {denominator}"
        self._facts = step_facts(plan, args.world_size, model.config, balance)
        self._sums, self._since, self._logged = None, None, 0
        self._step_losses: list = []  # (pack, losses, row, position) of the step at hand
        super().__init__(model=model, args=args, **{"train_dataset": self.rank_packs} | kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trainer's own, once the checkpoint is known to be whole and of this plan, data, loss and engine.

        Args:
            resume_from_checkpoint: its folder; True takes the newest whole one in ``output_dir``.

        Raises:
            ValueError: it is not whole or belongs to another run (see `checkpoint.require`), or there is none.
        """
        if resume_from_checkpoint is True:
            out = self.args.output_dir
            resume_from_checkpoint = checkpoint.find(out, self.fingerprints(), say=self.args.process_index == 0)
            if resume_from_checkpoint is None:
                raise ValueError(f"{out} holds no whole checkpoint: leave out resume_from_checkpoint to begin at the first step")
            resume_from_checkpoint = str(resume_from_checkpoint)
        elif resume_from_checkpoint:
            checkpoint.require(resume_from_checkpoint, self.fingerprints())
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """This rank's packs in the plan's order; accelerate must not shard or shuffle them again."""
        return DataLoader(self.rank_packs, batch_size=1, shuffle=False, collate_fn=_only,
                          num_workers=self.args.dataloader_num_workers)  # fmt: skip

    def _get_num_items_in_batch(self, batch_samples, device):
        return None  # the weights already hold the global denominator

    def _prepare_input(self, data):
        """Move to the device; unlike Trainer under DeepSpeed, leave the weights' type alone (bf16 would round 1 / N_i)."""
        if isinstance(data, torch.Tensor) and data.is_floating_point():
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted sum of token losses, times the ranks that gradients are averaged over."""
        if return_outputs:
            raise ValueError("LongAlignTrainer computes no outputs beside the loss; use heldout.held_out_loss to evaluate")
        if self._since is None:
            self._since, self._logged = time.perf_counter(), self.state.global_step
        pack = inputs.pop("pack")
        losses, row, position = target_losses(model, inputs)
        weighted = (losses * inputs["loss_weights"][row, position].to(losses.dtype)).sum()
        with torch.no_grad():
            inverse = inputs["inverse_targets"][row, position].to(losses.dtype)
            real = (inverse > 0).to(losses.dtype)
            # sum over targets of 1 / N_i counts the sequences
            news = torch.stack([(losses * real).sum(), real.sum(), (losses * inverse).sum(), inverse.sum()]).double()
            self._sums = news if self._sums is None else self._sums + news
        self._step_losses.append((pack, losses.detach(), row, position))
        if self.accelerator.sync_gradients:  # the last micro-step: nothing has reached the optimiser yet
            self._stop_if_not_finite()
        scale = self.args.world_size
        # an older Trainer will divide by the accumulation count (unless, as TRL does there, a loss function is set): take that back
        if not _KNOWS_SCALED_LOSS and self.compute_loss_func is None:
            scale *= self.current_gradient_accumulation_steps
        return weighted * scale

    def _stop_if_not_finite(self) -> None:
        """Raise FloatingPointError naming the rows of this step whose loss is NaN or infinite."""
        held, self._step_losses = self._step_losses, []
        if bool(torch.isfinite(torch.stack([x.sum() for _, x, _, _ in held])).all()):
            return
        bad: set[int] = set()
        for pack, losses, row, position in held:
            if pack < 0:
                continue
            lines = self.plan.table[self.plan.table.pack == pack].sort_values("offset")
            off = ~torch.isfinite(losses)
            at = (row[off] if self.plan.padded else position[off]).cpu().numpy()
            which = at if self.plan.padded else np.searchsorted(lines.offset.to_numpy(), at, side="right") - 1
            bad |= set(lines.row.to_numpy()[which].tolist())
        names = ", ".join(str(r) for r in sorted(bad)[:20]) + (" ..." if len(bad) > 20 else "")
        raise FloatingPointError(
            f"step {self.state.global_step}: the loss of {len(bad)} row(s) is not finite: {names}. Nothing of this step has "
            "been learned. Look at these rows; if they are sound, the weights diverged in an earlier step: lower the "
            "learning rate and resume from the last checkpoint"
        )

    def log(self, logs: dict, *args, **kwargs) -> None:
        """Add the comparable means since the last log, over all ranks, and what the plan says about these steps."""
        if "loss" in logs and self._sums is not None:
            sums = self._sums.clone()
            if self.args.world_size > 1:
                dist.all_reduce(sums)
            token_loss, targets, sequence_loss, sequences = sums.tolist()
            now = time.perf_counter()
            seconds, steps = now - self._since, slice(self._logged, self.state.global_step)
            facts = {k: float(v[steps].sum()) for k, v in self._facts.items()}
            logs |= {"loss_token_mean": token_loss / max(targets, 1), "loss_sequence_mean": sequence_loss / max(sequences, 1),
                     "sequences": round(sequences), "targets": round(targets),
                     "tokens_per_second": round(facts["tokens"] / seconds, 1), "fill": facts["tokens"] / max(facts["room"], 1)}  # fmt: skip
            if facts["flops"]:
                speed = facts["flops"] / seconds / self.args.world_size
                peak = peak_flops(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
                logs |= {"idle_estimated": 1 - facts["flops"] / max(facts["worst_flops"], 1), "tflops_per_device": round(speed / 1e12, 3)}
                logs |= {"mfu": round(speed / peak, 4)} if peak else {}
            self._sums, self._since, self._logged = None, now, self.state.global_step
        super().log(logs, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        """Trainer's own. On several CPU processes transformers 5.17 asks torch for the device "cpu:0", which torch.load does not know."""
        if self.args.device.type == "cpu" and "_setup_devices" in vars(self.args):
            vars(self.args)["_setup_devices"] = torch.device("cpu")
        super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model, trial=None) -> None:
        """Trainer's own checkpoint; marked whole once every rank is done, and only then are older ones deleted.

        Weights that are not finite are no checkpoint: FloatingPointError, and the ones before it stay.
        """
        folder = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"
        self._stop_if_weights_are_not_finite(folder)
        if self.args.should_save:
            checkpoint.clear(folder)  # left by a kill, perhaps of more ranks
        if self.args.world_size > 1:
            dist.barrier()
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        if self.args.world_size > 1:
            dist.barrier()
        if self.args.should_save:
            checkpoint.mark(folder, self.fingerprints() | {"step": self.state.global_step, "ranks": self.args.world_size})
            checkpoint.rotate(self.args.output_dir, keep)

    def _stop_if_weights_are_not_finite(self, folder: str) -> None:
        """A finite loss may have an infinite gradient; the update then ruins the weights, which the next loss would show too late."""
        ruined = torch.zeros((), device=self.args.device)
        for p in self.model.parameters():
            held = getattr(p, "ds_tensor", p)  # ZeRO-3: this rank's part of it
            ruined += (~torch.isfinite(held.detach())).any().to(ruined)
        if self.args.world_size > 1:
            dist.all_reduce(ruined)
        if ruined:
            raise FloatingPointError(
                f"step {self.state.global_step}: weights are not finite after this update (a gradient overflowed), so "
                f"{folder.rpartition('/')[2]} is not written. Lower the learning rate or set --max_grad_norm, and start again: "
                "the run continues from the checkpoint before it"
            )

    def fingerprints(self) -> dict:
        """What a checkpoint must agree with to be resumed: plan, data, loss, and the engine that wrote it."""
        if not hasattr(self, "_prints"):
            config = self.args.hf_deepspeed_config.config if self.is_deepspeed_enabled else None
            self._prints = {"plan": checkpoint.plan_fingerprint(self.plan), "data": checkpoint.data_fingerprint(self.store),
                            "loss": self._loss, "engine": checkpoint.engine(config)}  # fmt: skip
        return self._prints


class LongAlignTrainer(PlanMixin, Trainer):
    """transformers' Trainer over a plan; arguments as `PlanMixin`, further ones go to Trainer."""


def check_arguments(args, plan: Plan) -> None:
    """Raise ValueError for TrainingArguments under which a run would not follow the plan: what is off, and what to set."""
    needed, steps = micro_steps(plan, args.world_size), int(np.ptp(plan.table.step)) + 1
    if args.gradient_accumulation_steps != needed or args.per_device_train_batch_size != 1:
        raise ValueError(
            f"this plan has {plan.packs_per_step} packs a step, so {args.world_size} ranks need "
            f"gradient_accumulation_steps={needed} and per_device_train_batch_size=1; got "
            f"{args.gradient_accumulation_steps} and {args.per_device_train_batch_size}"
        )
    if args.num_train_epochs != 1:
        raise ValueError(f"the plan holds its {plan.epochs} epochs itself: set num_train_epochs=1, not {args.num_train_epochs}")
    if args.max_steps > steps:
        raise ValueError(f"max_steps={args.max_steps} would go through the {steps} steps of this plan more than once: leave it out, or "
                         "give build_plan more epochs")  # fmt: skip
    if args.ignore_data_skip:
        raise ValueError("ignore_data_skip=True would begin a resumed run at the plan's first step again: leave it out")
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor={args.label_smoothing_factor} has no part in the weighted sum of token losses: set it to 0")


def refuse_other_losses(model, loss_function=None) -> None:
    """Raise ValueError for a loss that would be left out: a function of the user's, or a router's auxiliary loss in the config.

    The auxiliary loss is of all tokens of a batch, so a sum over packs depends on how the step was cut into them.
    """
    if loss_function is not None:
        raise ValueError("compute_loss_func would not be called, the loss is the weighted sum of token losses: leave it out")
    for config in (model.config, families.text_config(model)):
        share = getattr(config, "router_aux_loss_coef", None)
        if getattr(config, "output_router_logits", False) and share != 0:
            raise ValueError(
                f"{type(config).__name__} has output_router_logits=True, which adds the router's auxiliary loss (router_aux_loss_coef "
                f"{share}) in a stock Trainer. It is of a batch, not of tokens, and has no place in the weighted sum: set "
                "output_router_logits to False in model.config (in config.json for python -m longalign_lib.train)"
            )


def filler(model) -> int:
    """The token that fills padded rows and empty packs, never a target: the model's padding token, or 0 where it has none.

    A token without an embedding (-1, or one that was never added) counts as none.
    """
    pad = getattr(model.config, "pad_token_id", None)
    rows = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    return pad if isinstance(pad, int) and 0 <= pad < rows else 0


def step_facts(plan: Plan, world_size: int, config, balance: bool = True) -> dict[str, np.ndarray]:
    """Of every step: tokens, room (tokens that packs could hold, padding included), flops, and worst_flops.

    Entry 0 is the plan's first step. ``worst_flops`` is the sum over micro-steps of the dearest pack, times the ranks: what the step costs in rank-time if
    everyone waits for the slowest. Both are 0 for models whose FLOPs are not known from their config.
    """
    packs = plan.packs()
    room = packs.slots if plan.padded else np.full(len(packs), plan.capacity)
    step = packs.step - packs.step.min()
    steps = int(step.max()) + 1
    facts = {"tokens": np.bincount(step, packs.tokens, steps), "room": np.bincount(step, room, steps)}
    try:
        cost = from_config(config.get_text_config(), 1.0)
    except (AttributeError, TypeError):
        return facts | {"flops": np.zeros(steps), "worst_flops": np.zeros(steps)}
    return facts | _flops(plan, world_size, cost, balance, steps)


def _flops(plan: Plan, world_size: int, cost: StepCost, balance: bool, steps: int) -> dict[str, np.ndarray]:
    dealt = assign(plan, world_size, balance, cost=lambda p: cost(p.slots, p.squares))
    dealt["step"] -= dealt.step.min()
    worst = dealt.groupby(["step", "micro"]).cost.max().groupby("step").sum().reindex(range(steps), fill_value=0.0)
    return {"flops": np.bincount(dealt.step, dealt.cost, steps), "worst_flops": world_size * worst.to_numpy()}
