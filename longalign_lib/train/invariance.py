"""Does the gradient depend on how a global batch is cut? A test for any trainer, ours or yours.

One set of sequences is cut in many ways (`cutting.make_cuttings`: packing, order, micro-batch size, accumulation, padded or
packed, ranks). Your function gives the gradient of each; all must equal the gradient of the unpacked batch, one document at a
time by transformers' own logits:

    L = sum_i w_i L_i,    w_i = N_i^-p / sum_j N_j^(1-p)      p = 1: Eq. 2, every sequence alike; p = 0: the token mean

The error is |g - g*| / |g*| over all parameters. What fails is explained: the weights that the gradient was really made with
are fitted and named (`wrong_ways`); what no weights explain is a leak, a border or a mask. Run it in float64 on a tiny model,
where everything right agrees to 1e-12 and nothing wrong hides in rounding.

Invariants: the model's weights, flags and attention are as before; its ``.grad`` is cleared. Cost: n backward passes for the
reference, one call of your function a cutting; on failure n gradients in memory (not for models where that takes over 1 GiB).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import TrainerCallback

from longalign_lib.train import wrong_ways
from longalign_lib.train.cutting import Cutting, cut, make_cuttings, n_targets, random_sequences
from longalign_lib.train.families import text_config, unwrap
from longalign_lib.train.wrong_ways import naive_ways, sequence_gradients, wanted_weights

__all__ = ["Cutting", "InvarianceError", "check_invariance", "cut", "naive_ways", "reference_gradient", "tiny_llama",
           "trainer_gradient"]  # fmt: skip

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}
MOST_BYTES = 2**30  # of the gradients that an explanation needs


class InvarianceError(RuntimeError):
    """The gradient depends on the cutting, or is that of another loss; ``report`` is the frame of all cuttings."""

    def __init__(self, message: str, report: pd.DataFrame):
        super().__init__(message)
        self.report = report


def check_invariance(
    gradient: Callable, model, sequences=None, *, exponent: float = 1.0, ranks: int | None = None, cuttings=None, short: bool = False,
    reference: dict | None = None, tolerance: float | None = None, seed: int = 0, raise_error: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Test that a trainer's gradient is that of the unpacked batch, however the batch is cut.

    Args:
        gradient: (cutting, sequences) -> the gradient of the whole global batch: a dict name -> tensor, a flat tensor or array in
            the order of ``model.named_parameters()``, or a model whose ``.grad`` is read (None reads ``model``'s, cleared
            before). In several processes every rank runs its part and must return the whole. See `trainer_gradient`.
        model: the causal transformers model, before any update; not sharded (give ``reference`` for one that is).
        sequences: (input_ids, labels) of each, labels unshifted with -100 off the targets; random ones by default.
        exponent: p of the loss that is wanted.
        ranks: ranks that the cuttings are for; by default the processes at hand.
        cuttings: a list of `Cutting`; `make_cuttings` by default.
        short: also cuttings that leave ranks without a micro-batch in the last micro-step.
        reference: name -> gradient to compare with, in place of `reference_gradient`.
        tolerance: largest relative error; `TOLERANCE` of the model's dtype by default.
        seed: of sequences and cuttings.
        raise_error: raise, or only report.

    Returns:
        A row a cutting: cutting, ranks, accumulation, padded, micro_batches (their sizes), error, scale (best factor of g* in
        g), worst_parameter, worst_error (its own relative error), tolerance, passed; ``attrs["causes"]`` has likely causes.

    Raises:
        InvarianceError: names the worst cutting and likely causes.
        ValueError: a gradient without a parameter, of the wrong size, or cuttings that miss a sequence.

    Example:
        >>> model = tiny_llama()
        >>> def gradient(cutting, sequences):  # one M for the whole batch: right; documents told apart by position_ids
        ...     for batch in cutting.batches(sequences, weights=[1 / len(sequences) / n_targets(s) for s in sequences]):
        ...         logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[:, :-1]
        ...         losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        ...         (losses * batch["loss_weights"][:, 1:]).sum().backward()
        >>> check_invariance(gradient, model).passed.all()  # doctest: +SKIP
    """
    inner = unwrap(model)
    named = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    if sequences is None:
        sequences = random_sequences(vocabulary=text_config(inner).vocab_size, seed=seed)
    ranks = _processes() if ranks is None else ranks
    cuttings = make_cuttings([len(x) for x, _ in sequences], ranks, short=short, seed=seed) if cuttings is None else list(cuttings)
    for c in cuttings:
        if sorted(i for batch in c.micro_batches for i in batch) != list(range(len(sequences))):
            raise ValueError(f"cutting {c.name!r} must hold each of the {len(sequences)} sequences once, it holds {c.ranks}")
    wanted = reference_gradient(inner, sequences, exponent) if reference is None else reference
    want, sizes = _flat(wanted, named), {name: p.numel() for name, p in named.items()}
    limit = TOLERANCE[next(iter(named.values())).dtype] if tolerance is None else tolerance
    rows, off = [], {}
    for c in cuttings:
        got = _call(gradient, c, sequences, inner, named)
        error = float((got - want).norm() / want.norm())
        parts = {name: float(d.norm() / max(w.norm(), 1e-30)) for name, d, w in
                 zip(sizes, (got - want).split(list(sizes.values())), want.split(list(sizes.values())), strict=True)}  # fmt: skip
        worst = max(parts, key=lambda name, parts=parts: np.nan_to_num(parts[name], nan=np.inf))
        if not error <= limit and (not off or got.numel() * 8 * len(cuttings) <= MOST_BYTES):
            off[c] = got
        rows.append({"cutting": c.name, "ranks": len(c.ranks), "accumulation": c.accumulation, "padded": c.padded,
                     "micro_batches": [len(b) for b in c.micro_batches], "error": error, "scale": float(got @ want / (want @ want)),
                     "worst_parameter": worst, "worst_error": parts[worst], "tolerance": limit, "passed": error <= limit})  # fmt: skip
    inner.zero_grad(set_to_none=True)
    report = pd.DataFrame(rows)
    failed = report[~report.passed]
    worst = cuttings[int(report.error.fillna(np.inf).argmax())]
    report.attrs["causes"] = []
    if len(failed):
        again = off.get(worst) is not None and _call(gradient, worst, sequences, inner, named)
        inner.zero_grad(set_to_none=True)
        report.attrs["causes"] = _causes(inner, sequences, exponent, report, off, limit, worst, again)
        if raise_error:
            raise InvarianceError(_message(report, worst), report)
    return report


def reference_gradient(model, sequences, exponent: float = 1.0) -> dict[str, torch.Tensor]:
    """Gradient of the unpacked batch: name -> tensor, summed in float64 over the sequences, one document at a time."""
    inner = unwrap(model)
    weights, total = wanted_weights([n_targets(s) for s in sequences], exponent), 0
    if not weights.any():
        raise ValueError(f"none of the {len(sequences)} sequences has a target: there is no loss")
    for weight, sequence in zip(weights, sequences, strict=True):
        if weight:
            total = total + weight * sequence_gradients(inner, [sequence])[0].double()
    named = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    parts = total.split([p.numel() for p in named.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


def trainer_gradient(trainer) -> dict[str, torch.Tensor]:
    """Run a transformers Trainer up to its first update and return the gradient that its optimiser got.

    Plain, DDP, and DeepSpeed ZeRO-1, 2 and 3 with or without offload (gathered to every rank just before the engine's step).
    The trainer does make that update: give it a model of its own, such as a deep copy. Clipping (``max_grad_norm``) is left out
    of what is returned, under DeepSpeed it still happens in the update.

    Returns:
        name -> tensor on the CPU.
    """
    kept: dict[str, torch.Tensor] = {}

    class Tap(TrainerCallback):
        """Reads gradients where they are whole: before the optimiser, or before DeepSpeed's own step."""

        def on_train_begin(self, args, state, control, **kwargs):
            """DeepSpeed takes its step inside backward, so read before that."""
            if trainer.is_deepspeed_enabled:
                engine, step = trainer.model_wrapped, trainer.model_wrapped.step

                def read_then_step(*a, **k):
                    if engine.is_gradient_accumulation_boundary() and not kept:
                        kept.update(_deepspeed_gradients(engine))
                    return step(*a, **k)

                engine.step = read_then_step

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            """Plain and DDP."""
            if not kept:
                inner = unwrap(trainer.model)
                kept.update({n: p.grad.detach().cpu().clone() for n, p in inner.named_parameters() if p.grad is not None})

        def on_step_end(self, args, state, control, **kwargs):
            """One update is enough."""
            control.should_training_stop = True

    clip, trainer.args.max_grad_norm = trainer.args.max_grad_norm, 0.0
    tap = Tap()
    trainer.add_callback(tap)
    try:
        trainer.train()
    finally:
        trainer.args.max_grad_norm = clip
        trainer.remove_callback(tap)
    return kept


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float64):
    """A random two-layer Llama with grouped key heads and tied embeddings, vocabulary 97: 19 thousand weights.

    Its norms are torch's, which compute in the model's type: transformers' go through float32 even in a float64 model, which
    rounds gradients at 1e-8 and hides what is smaller.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                         tie_word_embeddings=True, use_cache=False)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm).__name__ == "LlamaRMSNorm":
                setattr(module, name, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    return model.to(dtype).eval()


def _deepspeed_gradients(engine) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    found = {name: safe_get_full_grad(p) for name, p in unwrap(engine).named_parameters() if p.requires_grad}
    return {name: g.detach().cpu().clone() for name, g in found.items() if g is not None}


def _processes() -> int:
    up = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if up else 1


def _call(gradient, cutting, sequences, inner, named) -> torch.Tensor:
    """One gradient, flat, float64, on the CPU."""
    inner.zero_grad(set_to_none=True)
    found = gradient(cutting, sequences)
    if found is None or isinstance(found, nn.Module):
        holder = dict(unwrap(inner if found is None else found).named_parameters())
        found = {n: p.grad for n, p in holder.items() if p.grad is not None}
        if not found:
            raise ValueError("no parameter has a .grad after the call: return a dict of gradients, or the model that holds them")
    elif not isinstance(found, dict):
        found = torch.as_tensor(found).flatten()
        if found.numel() != sum(p.numel() for p in named.values()):
            raise ValueError(f"a flat gradient needs {sum(p.numel() for p in named.values())} numbers, got {found.numel()}")
        return found.detach().cpu().double()
    return _flat(found, named)


def _flat(gradients: dict, named) -> torch.Tensor:
    clean = {k.replace("_orig_mod.", "").removeprefix("module."): v for k, v in gradients.items()}
    missing = [name for name in named if name not in clean]
    if missing:
        raise ValueError(f"the gradient lacks {len(missing)} of {len(named)} parameters, {missing[0]!r} first; it has {list(clean)[:4]}")
    parts = [torch.as_tensor(clean[name]).detach().cpu().double() for name in named]
    wrong = [name for name, g in zip(named, parts, strict=True) if g.numel() != named[name].numel()]
    if wrong:
        raise ValueError(f"the gradient of {wrong[0]!r} has {clean[wrong[0]].numel()} numbers, the parameter {named[wrong[0]].numel()}")
    return torch.cat([g.flatten() for g in parts])


def _causes(inner, sequences, exponent, report, off, limit, worst, again) -> list[str]:
    """What explains the failed cuttings, the surest first."""
    if not np.isfinite(report.error).all():
        return ["the gradient is not finite: look at the losses of the worst cutting, e.g. a micro-batch without targets divided by zero"]
    if again is not False and float((again - off[worst]).norm() / off[worst].norm()) > limit:
        return ["two calls with the same cutting give other gradients: dropout or other random state, or gradients left over from "
                "the call before (call zero_grad)"]  # fmt: skip
    many = {c for c in off if not c.padded and max(len(b) for b in c.micro_batches) > 1}
    several = report.cutting.isin([c.name for c in many])
    leaky = "documents of a line see each other, or their positions run on: run leak.check_no_leak on this model and batch"
    n, size = len(sequences), sum(p.numel() for p in inner.parameters() if p.requires_grad)
    if size * 8 * n > MOST_BYTES or len(off) < (~report.passed).sum():
        return ["(the model is too large for an explanation: repeat with tiny_llama)", *wrong_ways.WAYS, leaky]
    targets = np.array([n_targets(s) for s in sequences])
    wanted, own = wanted_weights(targets, exponent), sequence_gradients(inner, sequences).cpu()
    own, places = own[targets > 0], np.flatnonzero(targets > 0)
    loose, fits, unexplained = max(1e-6, 20 * limit), {}, {}
    for c, got in off.items():
        fit, left = wrong_ways.explain(got, own)
        fits[c] = np.zeros(n)
        fits[c][places] = fit
        if left > loose:
            unexplained[c] = left
    if not unexplained:
        names = wrong_ways.named_causes(fits, targets, wanted, loose * 100)
        if names == [wrong_ways.RIGHT_WEIGHTS]:
            return ["the weights are right and the difference is rounding: weights, losses or gradients pass through a shorter type "
                    "than the model's (transformers' RMSNorm and eager attention go through float32; tiny_llama does not)"]  # fmt: skip
        ratio = fits[worst][places] / wanted[places]
        few = ", ".join(f"{i}: {x:.3g}" for i, x in zip(places, ratio, strict=True))
        return [*(f"the gradient is exactly that of: {x}" for x in names),
                f"documents are apart and only their weights differ; in the worst cutting a sequence weighs, over its due, {few}"]  # fmt: skip
    c = max(unexplained, key=unexplained.get)
    pairs = [(i, j) for line in c.lines for i, j in itertools.pairwise(line)]
    if pairs and wrong_ways.explain(off[c], torch.cat([own, sequence_gradients(inner, sequences, pairs).cpu()]))[1] <= loose:
        return ["the first label of a document is kept: the last token of one document is asked to predict the first of the next; "
                "set it to -100"]  # fmt: skip
    if not (~report.passed & ~several).any():
        return [leaky]
    return ["cuttings with one document a line fail too, and no weights of documents explain it: labels shifted twice or not at "
            "all, padding that is a target or is attended to, another model, dtype or dropout than the reference's", leaky]  # fmt: skip


def _message(report: pd.DataFrame, worst: Cutting) -> str:
    row = report.iloc[int(report.error.fillna(np.inf).argmax())]
    lines = [f"the gradient depends on the cutting, or is another loss's: {(~report.passed).sum()} of {len(report)} cuttings fail",
             f"  worst: {row.cutting!r} ({'padded' if row.padded else 'packed'}, {row.ranks} rank(s), accumulation {row.accumulation}, "
             f"sequences a micro-batch {row.micro_batches}): relative error {row.error:.2g}, allowed {row.tolerance:g}",
             f"  its best factor is {row.scale:.4g}, its worst parameter {row.worst_parameter} ({row.worst_error:.2g})",
             f"  smallest error: {report.error.min():.2g} in {report.cutting[report.error.argmin()]!r}", "likely causes:"]  # fmt: skip
    return "\n".join([*lines, *(f"  - {x}" for x in report.attrs["causes"])])
