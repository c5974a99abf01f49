"""The real trainer's gradient under every cutting in one process; and wrong trainers, which the check must see through."""

import invariance_worker as worker
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longalign_lib.train.cutting import cut, make_cuttings, n_targets, random_sequences
from longalign_lib.train.invariance import (
    InvarianceError,
    check_invariance,
    reference_gradient,
    tiny_llama,
    trainer_gradient,
)
from longalign_lib.train.plan import build_plan


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on matrices of 32 columns only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flat(tensors):
    return torch.cat([tensors[n].double().flatten() for n in sorted(tensors)])


def distance(a, b):
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("own_loss", [False, True])
def test_the_reference_is_transformers_own_loss(p, own_loss):
    model, sequences = tiny_llama(), random_sequences(6)
    pairs = [(torch.tensor(x)[None], torch.tensor(y)[None]) for x, y in sequences]
    if own_loss:  # rounded to float32 inside
        losses = [model(input_ids=x, labels=y).loss for x, y in pairs]
    else:
        losses = [F.cross_entropy(model(input_ids=x).logits[0, :-1], y[0, 1:]) for x, y in pairs]
    n = [n_targets(s) for s in sequences]
    loss = sum(losses) / 6 if p else sum(x * k for x, k in zip(losses, n, strict=True)) / sum(n)
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    assert distance(reference_gradient(model, sequences, p), expected) < (1e-6 if own_loss else 1e-14)


# ---- the real trainer, one process


@pytest.mark.parametrize("p", [1.0, 0.5, 0.0])
def test_trainer_in_one_process_under_every_cutting(p, tmp_path, capsys):
    sequences = worker.batch()
    cuttings = list(worker.all_cuttings(1).values())
    assert len({c.accumulation for c in cuttings}) >= 4 and {c.padded for c in cuttings} == {True, False}

    def gradient(cutting, _):
        trainer = worker.make_trainer(tiny_llama(), cutting, tmp_path, exponent=p)
        return trainer_gradient(trainer)

    report = check_invariance(gradient, tiny_llama(), sequences, exponent=p, cuttings=cuttings if p == 1 else cuttings[6:10])
    assert report.passed.all() and report.error.max() <= 1e-12 and (report.error > 0).any()
    capsys.readouterr()


def test_plans_of_every_method_and_capacity_in_one_process(tmp_path, capsys):
    from longalign_lib.train.trainer import LongAlignTrainer

    sequences = worker.batch()
    lengths, targets = [len(x) for x, _ in sequences], [n_targets(s) for s in sequences]
    reference = reference_gradient(tiny_llama(), sequences)
    seen = set()
    for method, capacity, seed, rows in (("naive", 160, 0, 3), ("sorted", 90, 1, 2), ("packed", 64, 2, 1), ("balanced", 100, 3, 1)):
        plan = build_plan(lengths, targets, method=method, capacity=capacity, packs_per_step=16, seed=seed, rows_per_pack=rows)
        assert len(plan.steps()) == 1
        seen.add(len(plan.packs()))
        args = worker.arguments(tmp_path, 16)
        gradient = trainer_gradient(LongAlignTrainer(tiny_llama(), args, store=sequences, plan=plan))
        assert distance(gradient, reference) <= 1e-12
    assert len(seen) >= 3, "the plans are all alike"
    capsys.readouterr()


def test_reading_a_trainers_gradient_takes_no_clipping_and_one_step(tmp_path, capsys):
    cutting = worker.all_cuttings(1)["random packs, accumulation 3"]
    trainer = worker.make_trainer(tiny_llama(), cutting, tmp_path, clip=1e-3)
    gradient = trainer_gradient(trainer)
    assert distance(gradient, reference_gradient(tiny_llama(), worker.batch())) <= 1e-12
    assert trainer.args.max_grad_norm == 1e-3 and trainer.state.global_step == 1
    capsys.readouterr()


# ---- wrong trainers


def plain(weights_of, keep_first=False, model=None, **changes):
    """A loop over ranks and micro-batches in one process that uses no loss of ours; weights_of(cutting, rank, members, N)."""

    def gradient(cutting, sequences):
        own = packed_model() if model is None else model
        own.zero_grad()
        targets = np.array([n_targets(s) for s in sequences], float)
        for r, rank in enumerate(cutting.ranks):
            for members, batch in zip(rank, cutting.batches(sequences, r), strict=True):
                batch |= changes
                if keep_first:
                    batch["labels"] = torch.where(batch["position_ids"] == 0, batch["input_ids"], batch["labels"])
                labels = batch["labels"][:, 1:]
                inputs = {k: v for k, v in batch.items() if k not in ("labels", "loss_weights", "inverse_targets")}
                logits = own(**inputs, use_cache=False).logits[:, :-1]
                losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
                weights = torch.tensor(weights_of(cutting, rank, members, targets)[list(members)])
                lengths = torch.tensor([len(sequences[i][0]) for i in members])
                of_token = weights[:, None] if cutting.padded else weights.repeat_interleave(lengths)[None, 1:]
                (losses * of_token).sum().backward()
        return own

    return gradient


def packed_model():
    from longalign_lib.train import attention

    model = tiny_llama()
    model.set_attn_implementation(attention.register())
    return model


def right(cutting, rank, members, n):
    return 1 / (len(n) * n)


def cause(gradient, **options):
    with pytest.raises(InvarianceError) as error:
        check_invariance(gradient, tiny_llama(), **options)
    return str(error.value)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_right_loop_passes_in_every_form_of_gradient(ranks):
    model = packed_model()
    loop = plain(right, model=model)
    forms = {
        "model": lambda c, s: loop(c, s),
        "none": lambda c, s: loop(c, s) and None,
        "dict": lambda c, s: {f"module.{n}": p.grad for n, p in loop(c, s).named_parameters()},
        "array": lambda c, s: torch.cat([p.grad.flatten() for p in loop(c, s).parameters()]).numpy(),
    }
    for form in forms.values():
        report = check_invariance(form, model, ranks=ranks, short=True)
        assert report.passed.all() and 0 < report.error.max() < 1e-14 and report.ranks.eq(ranks).all()
    assert all(p.grad is None for p in model.parameters())


WRONG = {
    "token mean of each micro-batch, averaged": lambda c, r, b, n: np.full(len(n), 1 / n[list(b)].sum() / len(c.ranks) / c.accumulation),
    "M of each micro-batch, averaged": lambda c, r, b, n: 1 / (n * len(b)) / len(c.ranks) / c.accumulation,
    "M of each rank, averaged": lambda c, r, b, n: 1 / (n * sum(map(len, r))) / len(c.ranks),
    "token mean of the global batch (Trainer's": lambda c, r, b, n: np.full(len(n), 1 / n.sum()),
    "the wanted weights, divided by the accumulation count": lambda c, r, b, n: right(c, r, b, n) / c.accumulation,
    "averaged over them twice": lambda c, r, b, n: right(c, r, b, n) / len(c.ranks),
    "the wanted weights, multiplied by the number of ranks": lambda c, r, b, n: right(c, r, b, n) * len(c.ranks),
    "token mean of each rank, averaged": lambda c, r, b, n: np.full(len(n), 1 / n[[i for x in r for i in x]].sum() / len(c.ranks)),
    "the difference is rounding": lambda c, r, b, n: right(c, r, b, n).astype(np.float32).astype(float),
    "documents are apart and only their weights differ": lambda c, r, b, n: right(c, r, b, n) * (1 + (np.arange(len(n)) == b[0])),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_normalisations_are_named(name):
    said = cause(plain(WRONG[name]), ranks=2)
    assert name in said and "relative error" in said and "worst: '" in said
    assert sum(x in said for x in WRONG) <= 3, said


def test_kept_first_labels_leaks_and_odd_losses_are_told_apart():
    assert "the first label of a document is kept" in cause(plain(right, keep_first=True))
    leaky = tiny_llama()
    leaky.set_attn_implementation("sdpa")  # knows no cu_seq_lens; with positions that run on, a line is one document
    said = cause(plain(right, model=leaky, position_ids=None))
    assert "documents of a line see each other" in said and "one document a line fail too" not in said
    other = tiny_llama(seed=1)
    assert "one document a line fail too" in cause(lambda c, s: plain(right, model=other)(c, s))


def test_random_and_left_over_gradients_are_told():
    random = packed_model()
    for layer in random.model.layers:
        layer.self_attn.attention_dropout = 0.3
    random.train()
    torch.manual_seed(0)
    assert "two calls with the same cutting give other gradients" in cause(plain(right, model=random))
    kept, loop = packed_model(), plain(right)

    def left_over(cutting, sequences):
        for p, new in zip(kept.parameters(), loop(cutting, sequences).parameters(), strict=True):
            p.grad = new.grad.clone() if p.grad is None else p.grad + new.grad
        return kept

    assert "call zero_grad" in cause(left_over)


def test_gradients_that_are_not_finite_never_pass():
    def broken(cutting, sequences):
        model = plain(right)(cutting, sequences)
        if len(cutting.micro_batches) == 3:
            model.model.norm.weight.grad[3] = float("nan")
        return model

    said = cause(broken)
    assert "not finite" in said and "'random packs, accumulation 3'" in said and "2 of 11 cuttings fail" in said
    report = check_invariance(broken, tiny_llama(), raise_error=False)
    assert report.passed.sum() == 9 and report.error.isna().sum() == 2
    assert set(report.worst_parameter[~report.passed]) == {"model.norm.weight"}


def test_bad_input_is_named():
    model, sequences = tiny_llama(), random_sequences(4)
    with pytest.raises(ValueError, match="each of the 4 sequences once"):
        check_invariance(lambda c, s: None, model, sequences, cuttings=[cut("half", [[0], [1, 1]])])
    with pytest.raises(ValueError, match=r"no parameter has a \.grad"):
        check_invariance(lambda c, s: None, model, sequences)
    with pytest.raises(ValueError, match=r"lacks 19 of 20 parameters, 'model\.layers"):
        check_invariance(lambda c, s: {"model.embed_tokens.weight": torch.zeros(97, 32)}, model, sequences)
    with pytest.raises(ValueError, match="needs 18624 numbers, got 3"):
        check_invariance(lambda c, s: np.zeros(3), model, sequences)
    with pytest.raises(ValueError, match="none of the 1 sequences has a target"):
        reference_gradient(model, [(np.arange(4), np.full(4, -100))])
    bad = {n: torch.zeros(3) for n, _ in model.named_parameters()}
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' has 3 numbers, the parameter 3104"):
        check_invariance(lambda c, s: bad, model, sequences, cuttings=make_cuttings([4] * 4))
