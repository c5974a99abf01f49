"""A Trainer that follows a Plan: stock models, exact loss weights, any number of ranks.

What it changes in transformers' Trainer, and nothing else:
- batches come from the plan: rank r reads the packs that `plan.assign` deals to it, micro-step by micro-step; ranks
  that a short last step leaves without a pack run an empty one, so collectives match;
- the loss is the **sum** of weighted token losses (`weights.token_weights`: all weights of a global step sum to one), times
  the number of ranks, because DDP and DeepSpeed average gradients over ranks. Nothing is divided by the accumulation count;
- logs carry ``loss`` (the objective), ``loss_token_mean`` and ``loss_sequence_mean``, which compare across batch methods and
  exponents, and ``tokens_per_second``.

Cost beside Trainer's: one all-reduce of five numbers a log.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from longalign_lib.train import attention
from longalign_lib.train.collate import collate, empty_pack
from longalign_lib.train.loss import target_losses
from longalign_lib.train.plan import Plan, assign, micro_steps
from longalign_lib.train.weights import plan_weights


class RankPacks(Dataset):
    """The packs of one rank in the order of its micro-steps: item ``step * micro_steps + micro`` is a batch of tensors."""

    def __init__(self, plan: Plan, store, rank: int, world_size: int, weights=None, pad_id: int = 0, balance: bool = True):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside 0..{world_size - 1}")
        self.plan, self.store, self.pad_id = plan, store, pad_id
        self.micro = micro_steps(plan, world_size)
        self.steps = int(plan.table.step.max()) + 1
        weights = plan_weights(plan) if weights is None else weights
        self._lines = {pack: lines for pack, lines in plan.table.assign(weight=weights).groupby("pack")}
        dealt = assign(plan, world_size, balance)
        mine = dealt[dealt["rank"] == rank]
        self._pack = {(s, m): p for s, m, p in zip(mine.step, mine.micro, mine.pack, strict=True)}

    def __len__(self) -> int:
        return self.steps * self.micro

    def __getitem__(self, index: int) -> dict:
        pack = self._pack.get(divmod(index, self.micro))
        if pack is None:
            return empty_pack(self.pad_id, self.plan.padded) | {"tokens": 0}
        lines = self._lines[pack].sort_values("offset")
        batch = collate(lines, self.store, lines.weight, padded=self.plan.padded, pad_id=self.pad_id)
        return batch | {"tokens": int(lines.length.sum())}


# transformers before 5.2x has no `loss_is_scaled_for_ga` and divides every loss that is not its own by the accumulation count.
_KNOWS_SCALED_LOSS = hasattr(Trainer, "loss_is_scaled_for_ga")


def _refuse_other_mixers(model, name: str) -> None:
    """Raise ValueError for a model in which documents of a pack meet elsewhere than in attention, or by another attention."""
    config = model.config.get_text_config()
    others = sorted({kind for kind in getattr(config, "layer_types", None) or () if not kind.endswith("attention")})
    recurrent = any(word in type(model).__name__ for word in ("Mamba", "Rwkv", "Jamba", "FalconH1"))
    if config._attn_implementation != name or others or recurrent or "Bloom" in type(model).__name__:
        raise ValueError(
            f"{type(model).__name__} does not keep documents of a pack apart under attention {name!r} "
            f"(attention in use: {config._attn_implementation!r}, other layers: {others or 'see the model'}): "
            "use a model whose only mixing layers are transformers attention, or a padded plan (naive, sorted)"
        )


def _only(items: list):
    return items[0]


class LongAlignTrainer(Trainer):
    """Trainer over a plan.

    Args:
        model: a causal language model; it is switched to the ``longalign`` attention unless ``attention_name`` is None.
        args: TrainingArguments; ``gradient_accumulation_steps`` must be the plan's micro-steps at this world size (a
            ValueError says the number), ``per_device_train_batch_size`` 1 (a batch is a pack).
        store: row -> (input_ids, labels), such as a TokenStore.
        plan: who sits where; it covers all epochs, so Trainer sees one.
        exponent, denominator: the loss weights, see `weights.token_weights`; exponent None is Eq. 3's plain packing.
        balance: see `plan.assign`.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model, args, *, store, plan: Plan, exponent: float | None = 1.0, denominator: str = "step",
                 balance: bool = True, attention_name: str | None = attention.NAME, **kwargs):  # fmt: skip
        needed = micro_steps(plan, args.world_size)
        if args.gradient_accumulation_steps != needed or args.per_device_train_batch_size != 1:
            raise ValueError(
                f"this plan has {plan.packs_per_step} packs a step, so {args.world_size} ranks need "
                f"gradient_accumulation_steps={needed} and per_device_train_batch_size=1; got "
                f"{args.gradient_accumulation_steps} and {args.per_device_train_batch_size}"
            )
        if args.num_train_epochs != 1:
            raise ValueError(f"the plan holds its {plan.epochs} epochs itself: set num_train_epochs=1, not {args.num_train_epochs}")
        args.remove_unused_columns = False
        if attention_name is not None and not plan.padded:
            attention.register()
            model.set_attn_implementation(attention_name)
            _refuse_other_mixers(model, attention_name)
        self.plan, self.store = plan, store
        pad = getattr(model.config, "pad_token_id", None) or 0
        self.rank_packs = RankPacks(plan, store, args.process_index, args.world_size,
                                    plan_weights(plan, exponent, denominator), pad, balance)  # fmt: skip
        self._sums, self._since = [0.0] * 5, time.perf_counter()
        super().__init__(model=model, args=args, train_dataset=self.rank_packs, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """This rank's packs in the plan's order; accelerate must not shard or shuffle them again."""
        return DataLoader(self.rank_packs, batch_size=1, shuffle=False, collate_fn=_only,
                          num_workers=self.args.dataloader_num_workers)  # fmt: skip

    def _get_num_items_in_batch(self, batch_samples, device):
        return None  # the weights already hold the global denominator

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted sum of token losses, times the ranks that gradients are averaged over."""
        if return_outputs:
            raise ValueError("LongAlignTrainer computes no outputs beside the loss; use heldout.held_out_loss to evaluate")
        tokens = inputs.pop("tokens")
        losses, row, position = target_losses(model, inputs)
        weighted = (losses * inputs["loss_weights"][row, position]).sum()
        with torch.no_grad():
            inverse = inputs["inverse_targets"][row, position]
            real = (inverse > 0).float()
            sequences = inverse.sum()  # sum over targets of 1 / N_i counts the sequences
            news = [(losses * real).sum(), real.sum(), (losses * inverse).sum(), sequences, tokens]
            self._sums = [a + float(b) for a, b in zip(self._sums, news, strict=True)]
        scale = self.args.world_size
        if not _KNOWS_SCALED_LOSS:  # then Trainer will divide by the accumulation count: take that back
            scale *= self.current_gradient_accumulation_steps
        return weighted * scale

    def log(self, logs: dict, *args, **kwargs) -> None:
        """Add the comparable means since the last log, over all ranks."""
        if "loss" in logs:
            sums = torch.tensor(self._sums, dtype=torch.float64, device=self.args.device)
            if self.args.world_size > 1:
                dist.all_reduce(sums)
            token_loss, targets, sequence_loss, sequences, tokens = sums.tolist()
            now = time.perf_counter()
            logs |= {"loss_token_mean": token_loss / max(targets, 1), "loss_sequence_mean": sequence_loss / max(sequences, 1),
                     "sequences": round(sequences), "targets": round(targets),
                     "tokens_per_second": round(tokens / (now - self._since), 1)}  # fmt: skip
            self._sums, self._since = [0.0] * 5, now
        super().log(logs, *args, **kwargs)
