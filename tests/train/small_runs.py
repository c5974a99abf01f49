"""What tests of the trainer train with: random rows, their sizes, and arguments of plain SGD on the CPU."""

import numpy as np
from transformers import TrainingArguments

from longalign_lib.train.loss import IGNORE
from longalign_lib.train.plan import build_plan


def make_store(n=24, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        ids = rng.integers(3, 97, rng.integers(4, 40))
        rows.append((ids, np.where(np.arange(len(ids)) >= rng.integers(1, len(ids)), ids, IGNORE)))
    return rows


def sizes(store):
    return np.array([len(x) for x, _ in store]), np.array([int((y[1:] != IGNORE).sum()) for _, y in store])


def arguments(tmp_path, accumulation, **more):
    return TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=accumulation,
        num_train_epochs=1, learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, **more,
    )  # fmt: skip


def saving(tmp_path, **more):
    """A trainer's arguments that save every step; and the plan and store of at least three steps for it."""
    store = make_store()
    plan = build_plan(*sizes(store), method="packed", capacity=80, packs_per_step=2, seed=1)
    assert len(plan.steps()) >= 3
    args = arguments(tmp_path, 2, **more)
    args.save_strategy, args.save_steps, args.save_total_limit = "steps", 1, 2
    return args, {"store": store, "plan": plan}
