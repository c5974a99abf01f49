"""Weights of wrong normalisations against runs that really make the mistake: stock Trainer, plain loops, the equations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from longalign_lib.train.cutting import cut, n_targets, random_sequences
from longalign_lib.train.invariance import tiny_llama, trainer_gradient
from longalign_lib.train.weights import token_weights
from longalign_lib.train.wrong_ways import (
    FACTORS,
    RIGHT,
    WAYS,
    explain,
    naive_ways,
    products,
    sequence_gradients,
    wanted_weights,
    way_weights,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on matrices of 32 columns only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sequences():
    """Twelve sequences whose first label is -100, as collators make them."""
    return [(x, np.where(np.arange(len(y)) > 0, y, -100)) for x, y in random_sequences(12)]


@pytest.fixture(scope="module")
def gradients(sequences):
    return sequence_gradients(tiny_llama(), sequences)


def way(start):
    (name,) = (w for w in WAYS if w.startswith(start))
    return name


def predicted(name, sequences, gradients, cutting):
    return torch.tensor(way_weights(name, [n_targets(s) for s in sequences], cutting)) @ gradients


def off(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("knows_items", [True, False])
def test_stock_trainer_takes_token_means(knows_items, sequences, gradients, tmp_path, capsys):
    groups = np.split(np.arange(12), 4)

    def collate(rows):
        width = max(len(r["ids"]) for r in rows)
        pad = lambda x, value: torch.tensor([*x, *[value] * (width - len(x))])  # noqa: E731
        return {"input_ids": torch.stack([pad(r["ids"], 0) for r in rows]), "labels": torch.stack([pad(r["labels"], -100) for r in rows])}

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=4, max_steps=1,
                             optim="sgd", learning_rate=1.0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
                             remove_unused_columns=False)  # fmt: skip
    data = [{"ids": x.tolist(), "labels": y.tolist()} for x, y in sequences]
    trainer = InOrder(tiny_llama(), args, train_dataset=data, data_collator=collate)
    trainer.model_accepts_loss_kwargs = knows_items
    got = trainer_gradient(trainer)
    got = torch.cat([got[n].flatten() for n, _ in tiny_llama().named_parameters()])
    cutting = cut("rows of three", groups, padded=True)
    mine, other = way("token mean of the global"), way("token mean of each micro-batch")
    mine, other = (mine, other) if knows_items else (other, mine)
    assert off(got, predicted(mine, sequences, gradients, cutting)) < 1e-6  # transformers' loss is in float32
    assert off(got, predicted(other, sequences, gradients, cutting)) > 0.1
    capsys.readouterr()


def test_equation_3_and_means_of_means_by_real_packed_runs(sequences, gradients):
    cutting = cut("packs", [[0, 3, 5], [1, 2], [4], [6, 7, 8, 9, 10, 11]], ranks=2)
    model, per_pack, per_sequence = tiny_llama(), [], []
    for rank in (0, 1):
        for batch in cutting.batches(sequences, rank):
            logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, :-1]
            labels = batch["labels"][0, 1:]
            losses = F.cross_entropy(logits, labels, reduction="none")
            document = (batch["position_ids"][0, 1:] == 0).cumsum(0)
            per_pack.append(losses.sum() / (labels != -100).sum())
            means = [losses[document == d].sum() / (labels[document == d] != -100).sum() for d in document.unique()]
            per_sequence.append(torch.stack(means).mean())
    flat = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss / 4, list(model.parameters()), retain_graph=True)])  # noqa: E731
    eq3 = flat(sum(per_pack))
    for name in (way("token mean of each pack"), way("token mean of each micro-batch")):
        assert off(eq3, predicted(name, sequences, gradients, cutting)) < 1e-12
    assert off(flat(sum(per_sequence)), predicted(way("M of each micro-batch"), sequences, gradients, cutting)) < 1e-12


def test_weights_by_hand():
    n = [4, 1, 2, 2, 5, 0]
    c = cut("x", [[0, 1], [2], [3, 4], [5]], ranks=2)  # rank 0: [0 1] [3 4], rank 1: [2] [5]
    by_hand = {
        RIGHT: [1 / 20, 1 / 5, 1 / 10, 1 / 10, 1 / 25, 0],
        "token mean of the global": [1 / 14] * 5 + [0],
        "token mean of each rank": [1 / 24, 1 / 24, 1 / 4, 1 / 24, 1 / 24, 0],
        "token mean of each micro": [1 / 20, 1 / 20, 1 / 8, 1 / 28, 1 / 28, 0],
        "token mean of each pack": [1 / 15, 1 / 15, 1 / 6, 1 / 21, 1 / 21, 0],
        "M of each micro": [1 / 32, 1 / 8, 1 / 8, 1 / 16, 1 / 40, 0],
        "M of each rank": [1 / 32, 1 / 8, 1 / 4, 1 / 16, 1 / 40, 0],
        # two devices: packs 0 and 1 hold 3 sequences, packs 2 and 3 hold 2; two micro-steps
        "published code (K": [2 / 4 / 3 / 4, 2 / 4 / 3, 2 / 4 / 3 / 2, 2 / 4 / 2 / 2, 2 / 4 / 2 / 5, 0],
        "published code, one": [1 / 4 / 2 / 4, 1 / 4 / 2, 1 / 4 / 2, 1 / 4 / 2 / 2, 1 / 4 / 2 / 5, 0],
    }
    for start, weights in by_hand.items():
        assert way_weights(way(start), n, c).tolist() == pytest.approx(weights), start
    rows = cut("rows", [[0, 1], [2], [3, 4], [5]], ranks=2, padded=True)  # lines 0 | 1 | 2 | 3 | 4 | 5
    assert way_weights(way("token mean of each pack"), n, rows).tolist() == pytest.approx(by_hand[RIGHT])
    # the first lines of the micro-batches are 0, 2, 3, 5; lines 0 1 | 2 3 | 4 5 hold 2, 2 and 1 sequences with targets
    several = [2 / 4 / 2 / 4, 2 / 4 / 2, 2 / 4 / 2 / 2, 2 / 4 / 2 / 2, 2 / 4 / 2 / 5, 0]
    assert way_weights(way("published code, several"), n, rows).tolist() == pytest.approx(several)
    with pytest.raises(ValueError, match="way 'mean' is not one of sequence mean"):
        way_weights("mean", n, c)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 2.0])
def test_wanted_weights_are_those_of_the_library(p):
    n = [4, 1, 0, 7, 30]
    assert wanted_weights(n, p) == pytest.approx(token_weights(n, [0] * 5, p))


def test_the_frame_against_gradients_made_one_by_one(sequences, gradients):
    cuttings = [cut("a", [[0, 1, 2], range(3, 12)], 2), cut("b", [range(6), [6], [7], range(8, 12)], 2),
                cut("c", [range(6), range(6, 12)], 2, padded=True)]  # fmt: skip
    table = naive_ways(tiny_llama(), sequences, cuttings)
    assert table.way.tolist() == list(WAYS)
    wanted = torch.tensor(wanted_weights([n_targets(s) for s in sequences])) @ gradients
    for row in table.itertuples():
        made = [predicted(row.way, sequences, gradients, c) for c in cuttings]
        best = [(g @ wanted) / (g @ g) for g in made]
        errors, left = [off(g, wanted) for g in made], [off(b * g, wanted) for b, g in zip(best, made)]
        assert [row.error, row.smallest_error] == pytest.approx([max(errors), min(errors)], abs=1e-14)
        worst = int(np.argmax(errors))
        assert row.cutting == cuttings[worst].name and row.scale == pytest.approx(float(best[worst]))
        assert row.direction_error == pytest.approx(max(left), abs=1e-9)
    by = table.set_index("way")
    assert by.error[RIGHT] == 0 and (table.error[1:] > 0.1).all()
    assert naive_ways(tiny_llama(), sequences, cuttings, exponent=0).set_index("way").error[way("token mean of the global")] < 1e-15


def test_the_largest_error_of_direction_may_be_in_another_cutting_than_the_largest_error():
    """Two lines of six stand for twelve: six times too long, straight on. In packs of 1, 1 | 1, 9 the two micro-steps weigh 3 and 0.6."""
    rows, several = random_sequences(12), way("published code, several")
    whole, torn = cut("whole", [range(6), range(6, 12)], 2, padded=True), cut("torn", [[0], [1], [2], range(3, 12)], 2)
    alone = naive_ways(tiny_llama(), rows, [whole]).set_index("way").loc[several]
    assert alone.direction_error < 1e-9 and [alone.smallest_weight, alone.largest_weight] == pytest.approx([6, 6])
    both = naive_ways(tiny_llama(), rows, [whole, torn]).set_index("way").loc[several]
    assert both.cutting == "whole" and both.error == pytest.approx(5) and both.scale == pytest.approx(1 / 6)
    assert both.direction_error > 0.1 and [both.smallest_weight, both.largest_weight] == pytest.approx([0.6, 6])


def test_explain_finds_weights_and_products_are_inner_products(gradients):
    weights = torch.linspace(-1, 2, 12, dtype=torch.float64)
    fit, left = explain(weights @ gradients, gradients)
    assert fit == pytest.approx(weights.numpy(), abs=1e-10) and left < 1e-12
    _, left = explain(weights @ gradients + torch.randn(gradients.shape[1], dtype=torch.float64), gradients)
    assert left > 0.5
    assert products(gradients, columns=1000) == pytest.approx((gradients @ gradients.T).numpy(), rel=1e-12)
    assert FACTORS["divided by the accumulation count"](cut("x", [[0], [1]])) == 0.5


def test_frozen_parameters_are_left_out(sequences):
    model = tiny_llama().requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    assert sequence_gradients(model, sequences[:3]).shape == (3, 32)
    assert (naive_ways(model).error[1:] > 0.01).all()
