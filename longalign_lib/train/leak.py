"""The leak test: do documents of a pack stay apart in this model, with these inputs?

Five checks, each on random documents packed as a trainer would pack them:

    positions    every document's ``position_ids`` begin at 0 and count by one
    logits       all tokens of document j are replaced; the logits of no other document may move
    gradients    the loss of document i; its gradient at the input embeddings of every other document must be exactly zero
    alone        the logits of every document in the pack = its logits alone
    parameters   the gradient of the pack's summed loss at the parameters = the sum of the documents' own gradients

The first three need no reference and are exact up to rounding of kernels; the last two compare with plain runs of each document
by another attention ('eager'), so they also catch a window, a soft cap or a position that the pack computes wrongly.

Movement is the largest over tokens of ||difference|| / root mean square of ||logits||, so one token that sees a neighbour is
enough. Allowed is `TOLERANCE` of the dtype, the price of another order of sums; for embeddings' gradients nothing.

Invariants: weights, ``.grad``, training flags, attention, rotary tables and random generators are as before afterwards.
Cost: 1 + `changed` forward passes and 1 + `changed` backward passes over the pack, two passes a document; two copies of
the gradients for the last check. Shapes: B lines, T tokens a line, V vocabulary, E embedding size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from longalign_lib.train import probe
from longalign_lib.train.families import likely_causes, position_errors, text_config, unwrap

CHECKS = ("positions", "logits", "gradients", "alone", "parameters")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.08}
LENGTHS = (9, 1, 14, 5)


class LeakError(RuntimeError):
    """Documents of a pack are not apart; ``report`` is the frame of all comparisons."""

    def __init__(self, message: str, report: pd.DataFrame):
        super().__init__(message)
        self.report = report


def check_no_leak(
    model, batch: dict | None = None, *, lengths=None, attention: str | None = None, reference: str = "eager",
    make_batch=None, forward=None, checks=CHECKS, changed: int = 4, tolerance: float | None = None, seed: int = 0,
    raise_error: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Test that no document of a pack sees another, with the inputs that a trainer gives.

    Args:
        model: a causal transformers model, not sharded; of a wrapped one (DDP, PEFT) the inside is called, unless `forward` is given.
        batch: a batch of your own trainer with ``input_ids`` int[B, T]; by default random documents, packed by `make_batch`.
        lengths: tokens of each document, in the order of the lines; by default read from the batch's ``cu_seq_lens_q`` or
            restarting ``position_ids``, or 9, 1, 14, 5 where documents are made.
        attention: switch the model to this implementation for the test, such as "longalign" or "sdpa"; None leaves it.
        reference: implementation of the runs alone; "eager" knows everything, "sdpa" needs no L x L memory.
        make_batch: documents (list of int64 tensors) -> batch, your collator; `probe.pack_inputs` by default.
        forward: (model, batch) -> logits [B, T, V] or an output with ``logits``, your trainer's way to call the model.
        checks: which of `CHECKS`; a kernel without a backward pass takes "positions", "logits" and "alone".
        changed: documents that are changed and differentiated, spread over the pack.
        tolerance: allowed movement; `TOLERANCE` of the model's dtype by default.
        seed: of documents and changes.
        raise_error: raise, or only report.

    Returns:
        A line a comparison: check, changed, seen_in (document numbers; for "parameters" the worst parameter), movement,
        tolerance, passed. ``report.attrs["causes"]`` lists likely causes.

    Raises:
        LeakError: a comparison failed; the message names documents, sizes and likely causes.
        ValueError: unknown checks; a batch whose documents cannot be told; a forward that ignores its batch.

    Example:
        >>> check_no_leak(model, attention="longalign")  # doctest: +SKIP
        >>> check_no_leak(model, make_batch=lambda documents: my_collator([{"input_ids": d} for d in documents]))  # doctest: +SKIP
    """
    unknown = sorted(set(checks) - set(CHECKS))
    if unknown or not checks:
        raise ValueError(f"checks {unknown or list(checks)} are none of {', '.join(CHECKS)}")
    inner = unwrap(model)
    rng = np.random.default_rng(seed)
    if batch is None:
        documents = [probe.random_tokens(inner, n, rng) for n in (LENGTHS if lengths is None else lengths)]
        build = make_batch or probe.pack_inputs
    else:
        batch = probe.model_inputs(batch, next(inner.parameters()).device)
        lengths = probe.document_lengths(batch) if lengths is None else lengths
        documents = list(batch["input_ids"].flatten()[: sum(lengths)].split(list(lengths)))
        build = probe.rebuild(batch)
    if len(documents) < 2:
        raise ValueError(f"a leak needs two documents, got lengths {[len(x) for x in documents]}")
    run = _Run(model, inner, documents, build, forward, reference, {})
    with probe.as_before(inner), probe.recorded(inner, run.seen):
        if attention is not None:
            probe.switch(inner, attention)
        with torch.no_grad():
            base = _logits(run)
        name, asked = text_config(inner)._attn_implementation, {"input_ids": build(documents)["input_ids"], **run.seen}
        limit = TOLERANCE.get(base.dtype, 1e-4) if tolerance is None else tolerance
        some = sorted({round(x) for x in np.linspace(0, len(documents) - 1, min(changed, len(documents)))})
        rows = _positions(run, asked) if "positions" in checks else []
        if "logits" in checks:
            rows += _moved_logits(run, base, some, limit, rng)
        if "gradients" in checks:
            rows += _embedding_gradients(run, some)
        if "alone" in checks:
            rows += _alone(run, base, limit)
        if "parameters" in checks:
            rows += _parameter_gradients(run, limit)
    report = pd.DataFrame(rows, columns=["check", "changed", "seen_in", "movement", "tolerance"])
    report["passed"] = report.movement <= report.tolerance  # not a number never passes
    failed = report[~report.passed]
    report.attrs["causes"] = likely_causes(inner, asked, name, documents) if len(failed) else []
    if raise_error and len(failed):
        raise LeakError(_message(inner, name, base.dtype, report), report)
    return report


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is tested: how documents become logits. `seen` receives the keyword arguments of the model's last call."""

    model: object
    inner: object
    documents: list
    build: Callable
    forward: Callable | None
    reference: str
    seen: dict

    @property
    def spans(self) -> list[slice]:
        """Where each document lies in the lines laid end to end."""
        ends = np.cumsum([len(x) for x in self.documents]).tolist()
        return [slice(a, b) for a, b in itertools.pairwise([0, *ends])]


def _logits(run: _Run, documents=None) -> torch.Tensor:
    """Logits of the pack with its lines laid end to end: [tokens, V]."""
    documents = run.documents if documents is None else documents
    batch = run.build(documents)
    ids = batch["input_ids"].flatten()
    wanted = torch.cat(list(documents))
    if not torch.equal(ids[: len(wanted)].to(wanted), wanted):
        raise ValueError("the batch's input_ids do not begin with the documents end to end: keep their order, pad only at the end")
    out = run.forward(run.model, batch) if run.forward else run.inner(**batch)
    out = getattr(out, "logits", out)
    if not isinstance(out, torch.Tensor) or out.ndim != 3 or out.shape[:2].numel() != len(ids):
        raise ValueError(f"forward must give logits of all {len(ids)} tokens [B, T, V], got {getattr(out, 'shape', type(out))}")
    return out.flatten(0, 1)


def _positions(run: _Run, asked: dict) -> list[tuple]:
    positions = asked.get("position_ids")
    tokens = asked["input_ids"].shape[1]
    if positions is None:  # the model counts each line
        positions = torch.arange(tokens, device=asked["input_ids"].device)[None]
    worst = position_errors(positions, asked["input_ids"], run.documents)
    return [("positions", "", i, float(x), 0.0) for i, x in enumerate(worst)]


def _moved_logits(run: _Run, base, some, limit, rng) -> list[tuple]:
    rows = []
    for j in some:
        fresh = probe.random_tokens(run.inner, len(run.documents[j]), rng, avoid=run.documents[j])
        with torch.no_grad():
            moved = _logits(run, [fresh if i == j else x for i, x in enumerate(run.documents)])
        if torch.equal(moved[run.spans[j]], base[run.spans[j]]):
            raise ValueError(f"changing document {j} changed not even its own logits: does forward read the batch it is given?")
        rows += [("logits", j, i, _distance(moved[here], base[here]), limit) for i, here in enumerate(run.spans) if i != j]
    return rows


def _embedding_gradients(run: _Run, some) -> list[tuple]:
    with probe.caught_embeddings(run.inner) as caught:
        logits = _logits(run)
    rows = []
    for i in some:
        loss = _loss(logits[run.spans[i]], run.documents[i])
        (gradient,) = torch.autograd.grad(loss, caught, retain_graph=True)
        sizes = gradient.flatten(0, 1).norm(dim=-1)
        own = sizes[run.spans[i]].max()
        if not own > 0:
            raise ValueError(f"the loss of document {i} has no gradient at its own embeddings: {own}")
        rows += [("gradients", j, i, float(sizes[there].max() / own), 0.0) for j, there in enumerate(run.spans) if j != i]
    return rows


def _alone(run: _Run, base, limit) -> list[tuple]:
    rows = []
    with torch.no_grad(), probe.switched(run.inner, run.reference):
        for i, (ids, here) in enumerate(zip(run.documents, run.spans, strict=True)):
            alone = run.inner(input_ids=ids[None], use_cache=False).logits[0]
            rows.append(("alone", "", i, _distance(base[here], alone), limit))
    return rows


def _parameter_gradients(run: _Run, limit) -> list[tuple]:
    named = {name: p for name, p in run.inner.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("no parameter requires a gradient: leave 'parameters' out of checks")

    def gradients(loss):
        return torch.autograd.grad(loss, list(named.values()), allow_unused=True)

    logits = _logits(run)
    pairs = list(zip(run.documents, run.spans, strict=True))
    difference = [None if g is None else g.float() if g.element_size() < 4 else g
                  for g in gradients(sum(_loss(logits[here], ids) for ids, here in pairs))]  # fmt: skip
    size = sum(float(g.norm()) ** 2 for g in difference if g is not None) ** 0.5
    del logits
    with probe.switched(run.inner, run.reference):
        for ids in run.documents:
            for k, g in enumerate(gradients(_loss(run.inner(input_ids=ids[None], use_cache=False).logits[0], ids))):
                if g is not None:
                    difference[k] = -g if difference[k] is None else difference[k] - g
    left = {name: float(d.norm()) for name, d in zip(named, difference, strict=True) if d is not None}
    if not size > 0:
        raise ValueError(f"the pack's loss has a gradient of size {size} at the {len(named)} parameters: nothing to compare")
    movement = sum(x**2 for x in left.values()) ** 0.5 / size
    return [("parameters", "", max(left, key=left.get), movement, limit)]


def _loss(logits_TV, ids) -> torch.Tensor:
    """Summed cross entropy of one document; its last token is asked for its first, so that one token has a loss too."""
    logits = logits_TV.float() if logits_TV.element_size() < 4 else logits_TV
    return F.cross_entropy(logits, ids.roll(-1), reduction="sum")


def _distance(a_TV, b_TV) -> float:
    """Largest over tokens of ||a - b|| over the root mean square of ||b||."""
    moved, size = [], []
    for a, b in zip(a_TV.detach().split(512), b_TV.detach().split(512), strict=True):  # a vocabulary in float64 is large
        moved.append((a.double() - b.double()).norm(dim=-1))
        size.append(b.double().norm(dim=-1))
    return float(torch.cat(moved).max() / torch.cat(size).square().mean().sqrt())


def _message(model, attention: str, dtype, report: pd.DataFrame) -> str:
    say = {
        "positions": "positions of document {seen_in} are off by up to {movement:g}",
        "logits": "changing document {changed} moved the logits of document {seen_in} by {movement:.2g} of their size",
        "gradients": "the loss of document {seen_in} has a gradient at the embeddings of document {changed}, {movement:.2g} of its own",
        "alone": "document {seen_in} differs from itself alone by {movement:.2g} of its logits",
        "parameters": "the gradient differs from the documents' own by {movement:.2g} of its size, most in {seen_in}",
    }
    lines = [f"documents of a pack are not apart in {type(model).__name__} with attention {attention!r}, {str(dtype)[6:]}:"]
    for check, part in report[~report.passed].groupby("check", sort=False):
        worst = part.iloc[int(part.movement.fillna(np.inf).argmax())]
        lines.append(f"  {check}: {say[check].format(**worst)} (allowed {worst.tolerance:g}); "
                     f"{len(part)} of {(report.check == check).sum()} comparisons fail")  # fmt: skip
    return "\n".join([*lines, "likely causes:", *(f"  - {x}" for x in report.attrs["causes"])])


