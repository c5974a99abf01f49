"""The recipes of interop's docstring, run as they stand there, against `LongAlignTrainer`."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from longalign_lib.train import attention
from longalign_lib.train.interop import DatasetStore, batch_loss, planned
from longalign_lib.train.plan import build_plan
from longalign_lib.train.trainer import LongAlignTrainer, RankPacks


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 97, rng.integers(4, 40)).tolist() for _ in range(24)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *x[1:]] for x in ids]})


def settings(tmp_path):
    return dict(output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=1,
                learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, use_cpu=True, logging_steps=1,
                save_strategy="no", report_to=[], disable_tqdm=True, bf16=False)  # fmt: skip


def plan_and_reference(dataset, model, tmp_path):
    """The plan, and what LongAlignTrainer makes of a copy of the model."""
    store = DatasetStore(dataset)
    plan = build_plan(store.lengths, store.targets, method="balanced", capacity=80, packs_per_step=4, seed=1)
    other = copy.deepcopy(model)
    trainer = LongAlignTrainer(other, TrainingArguments(**settings(tmp_path)), store=store, plan=plan)
    trainer.train()
    return store, plan, other, [x["loss"] for x in trainer.state.log_history if "loss" in x]


def same(model, other):
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_plain_accelerate_loop(dataset, tiny_model, tmp_path, capsys):
    from accelerate import Accelerator

    store, plan, other, expected = plan_and_reference(dataset, tiny_model, tmp_path)
    model, losses, total = tiny_model, [], 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    accelerator = Accelerator(cpu=True)
    model.set_attn_implementation(attention.register())
    packs = RankPacks(plan, store, accelerator.process_index, accelerator.num_processes)
    model, optimizer = accelerator.prepare(model, optimizer)
    for index in range(len(packs)):
        loss = batch_loss(model, packs[index], accelerator.device)
        accelerator.backward(loss * accelerator.num_processes)
        total += loss.item()
        if (index + 1) % packs.micro == 0:
            optimizer.step()
            optimizer.zero_grad()
            losses, total = [*losses, total], 0.0
    assert losses == pytest.approx(expected, rel=1e-6) and len(losses) >= 2
    same(tiny_model, other)


def test_trl_sft_trainer(dataset, tiny_model, tmp_path, capsys, tokenizer):
    from trl import SFTConfig, SFTTrainer

    store, plan, other, expected = plan_and_reference(dataset, tiny_model, tmp_path)
    args = SFTConfig(**settings(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    trainer = planned(SFTTrainer)(tiny_model, args, store=store, plan=plan, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    assert [x["loss"] for x in trainer.state.log_history if "loss" in x] == pytest.approx(expected, rel=1e-6)
    same(tiny_model, other)


def test_a_dataset_that_does_not_fit_is_named(dataset):
    with pytest.raises(ValueError, match=r"lacks the columns \['labels'\]"):
        DatasetStore(dataset.remove_columns("labels"))
    with pytest.raises(ValueError, match="row 1 has 2 tokens and 1 labels"):
        DatasetStore(Dataset.from_dict({"input_ids": [[1], [1, 2]], "labels": [[1], [2]]}))
    with pytest.raises(IndexError, match="outside 0"):
        store = DatasetStore(dataset)
        RankPacks(build_plan(store.lengths, method="packed", capacity=80, packs_per_step=4), store, 0, 1)[10**6]
