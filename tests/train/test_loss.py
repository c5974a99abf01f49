"""The weighted loss against transformers' own logits."""

import torch
import torch.nn.functional as F

from longalign_lib.train.loss import (
    IGNORE,
    sequence_losses,
    takes_logits_to_keep,
    target_losses,
)  # fmt: skip


def test_target_losses_equal_full_logits(tiny_model):
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (2, 20))
    labels = torch.where(torch.rand(2, 20) < 0.4, ids, IGNORE)
    labels[:, 0] = IGNORE
    batch = {"input_ids": ids, "labels": labels, "loss_weights": torch.ones(2, 20)}
    losses, row, position = target_losses(tiny_model, batch)
    logits = tiny_model(input_ids=ids, use_cache=False).logits
    full = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORE, reduction="none")
    assert losses.numel() == int((labels[:, 1:] != IGNORE).sum()) > 5
    assert torch.allclose(losses, full[row, position - 1], atol=1e-12)
    assert (labels[row, position] != IGNORE).all()


def test_a_batch_without_targets_still_runs_the_model(tiny_model):
    ids = torch.randint(3, 97, (1, 5))
    batch = {"input_ids": ids, "labels": torch.full((1, 5), IGNORE)}
    losses, row, position = target_losses(tiny_model, batch)
    assert losses.shape == (1,) and losses.requires_grad and (row.item(), position.item()) == (0, 0)


def test_models_without_logits_to_keep_are_served_too(tiny_model):
    class Plain(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, use_cache=False):
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    plain = Plain(tiny_model)
    assert takes_logits_to_keep(tiny_model) and not takes_logits_to_keep(plain)
    ids = torch.randint(3, 97, (1, 12))
    batch = {"input_ids": ids, "labels": ids.clone()}
    assert torch.allclose(target_losses(plain, batch)[0], target_losses(tiny_model, batch)[0], atol=1e-6)


def test_sequence_losses_sum_by_number():
    total, n = sequence_losses(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 3)
    assert total.tolist() == [1, 0, 6] and n.tolist() == [1, 0, 2]
