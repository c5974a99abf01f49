"""Plan, weights, collator and attention in other people's loops: TRL's SFTTrainer, plain accelerate, plain PyTorch.

TRL, with rows that a `datasets.Dataset` holds as ``input_ids`` and ``labels`` (-100 where nothing is to be learned):

    store = DatasetStore(dataset)
    plan = build_plan(store.lengths, store.targets, method="balanced", capacity=65_536, packs_per_step=8)
    args = SFTConfig(gradient_accumulation_steps=8 // world_size, per_device_train_batch_size=1, num_train_epochs=1,
                     dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, ...)
    trainer = planned(SFTTrainer)(model, args, store=store, plan=plan, train_dataset=dataset)

accelerate, without its own accumulation (the weights of a step sum to one, so nothing is to be divided):

    accelerator = Accelerator()
    model.set_attn_implementation(attention.register())
    packs = RankPacks(plan, store, accelerator.process_index, accelerator.num_processes)
    model, optimizer = accelerator.prepare(model, optimizer)
    for index in range(len(packs)):
        loss = batch_loss(model, packs[index], accelerator.device)
        accelerator.backward(loss * accelerator.num_processes)      # gradients are averaged over ranks: take that back
        if (index + 1) % packs.micro == 0:
            optimizer.step()
            optimizer.zero_grad()

Both are run by tests/train/test_interop.py, against `LongAlignTrainer`.
"""

from __future__ import annotations

import numpy as np
import torch

from longalign_lib.train.loss import IGNORE, target_losses
from longalign_lib.train.trainer import PlanMixin


class DatasetStore:
    """A `datasets.Dataset` with columns ``input_ids`` and ``labels`` as a store: row -> (input_ids, labels).

    ValueError when a column is missing, or a row's labels are not as long as its tokens.
    """

    def __init__(self, dataset):
        missing = {"input_ids", "labels"} - set(dataset.column_names)
        if missing:
            raise ValueError(f"the dataset lacks the columns {sorted(missing)}; it has {dataset.column_names}")
        self.dataset = dataset
        self.lengths = np.array([len(x) for x in dataset["input_ids"]], dtype=np.int64)
        labels = [np.asarray(x) for x in dataset["labels"]]
        off = [i for i, x in enumerate(labels) if len(x) != self.lengths[i]]
        if off:
            raise ValueError(f"row {off[0]} has {self.lengths[off[0]]} tokens and {len(labels[off[0]])} labels ({len(off)} such rows)")
        self.targets = np.array([int((x[1:] != IGNORE).sum()) for x in labels], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        found = self.dataset[int(row)]
        return np.asarray(found["input_ids"]), np.asarray(found["labels"])


def planned(trainer_class: type) -> type:
    """A subclass of ``trainer_class`` (a Trainer, such as TRL's SFTTrainer) that follows a plan: arguments of `PlanMixin`."""
    return type(f"Planned{trainer_class.__name__}", (PlanMixin, trainer_class), {})


def batch_loss(model, batch: dict, device=None) -> torch.Tensor:
    """The weighted sum of losses of one batch of `RankPacks`: sums over the batches of a step are the step's loss.

    Args:
        model: a causal language model that runs attention ``longalign`` (`attention.register`).
        batch: an item of `RankPacks`, or what `collate` makes.
        device: where to; the model's by default.
    """
    device = next(model.parameters()).device if device is None else device
    batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items() if k != "pack"}
    losses, row, position = target_losses(model, batch)
    return (losses * batch["loss_weights"][row, position].to(losses.dtype)).sum()
