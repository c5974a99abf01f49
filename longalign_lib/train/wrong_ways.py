"""The usual wrong normalisations of a loss over packs, micro-batches and ranks: how far their gradients are off, and how to tell them.

Documents that do not see each other have losses L_i of their own, whatever the cutting, so every normalisation is a gradient
``sum_i w_i grad L_i`` with other weights w_i of a target token. The n gradients grad L_i are computed once, by transformers
alone, and a way's error needs no run of its own:

    |sum (w_i - v_i) grad L_i|^2 = (w - v)^T G (w - v),      G_ij = <grad L_i, grad L_j>

The same gradients explain one that is off (`explain`): the weights that it was made with are a least-squares fit; what no
weights explain is no question of normalisation. Cost: n backward passes, n gradients in memory.
Letters: M sequences with targets, N_i targets of each, R ranks, A micro-batches a rank, K lines.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from longalign_lib.train import probe
from longalign_lib.train.cutting import Cutting, make_cuttings, n_targets, random_sequences
from longalign_lib.train.families import text_config, unwrap
from longalign_lib.train.loss import IGNORE


def _sums(targets, groups, of: Callable = np.sum) -> np.ndarray:
    """float[n]: of every sequence, the sum over its group of ``of(targets)``."""
    found = np.zeros(len(targets))
    for group in groups:
        found[list(group)] = of(targets[list(group)])
    return found


def _sequence_mean(targets, groups, mean_over: int) -> np.ndarray:
    """Mean over groups of each group's mean over sequences of the mean token loss."""
    return 1 / (targets * np.maximum(_sums(targets, groups, np.count_nonzero), 1) * mean_over)


def _token_mean(targets, groups, mean_over: int) -> np.ndarray:
    return 1 / (np.maximum(_sums(targets, groups), 1) * mean_over)


def _ranks(c: Cutting):
    return [[i for batch in rank for i in batch] for rank in c.ranks]


def _published(targets, c: Cutting, visible: int | None = None, rows: bool = False) -> np.ndarray:
    """K = devices that a process sees, M = sequences of the K packs around a micro-batch's first; no accumulation count in M.

    A pack is a micro-batch, or with ``rows`` a line of it: several packs a device, all weighted by the first one's M.
    """
    k = visible or len(c.ranks)
    packs, weights, first = c.lines if rows else c.micro_batches, np.zeros(len(targets)), 0
    for batch in c.micro_batches:
        m = sum(np.count_nonzero(targets[list(pack)]) for pack in packs[first // k * k : first // k * k + k])
        weights[list(batch)] = k / (targets[list(batch)] * max(m, 1) * len(c.ranks) * c.accumulation)
        first += len(batch) if rows and c.padded else 1
    return weights


RIGHT = "sequence mean of the global batch (Eq. 2 = Eq. 4)"
TOKEN = "token mean of the global batch"
# name -> function(targets float[n], cutting) -> weight of a target token of each sequence
WAYS: dict[str, Callable] = {
    RIGHT: lambda n, c: _sequence_mean(n, [range(len(n))], 1),
    TOKEN + " (Trainer's num_items_in_batch)": lambda n, c: _token_mean(n, [range(len(n))], 1),
    "token mean of each micro-batch, averaged": lambda n, c: _token_mean(n, c.micro_batches, len(c.ranks) * c.accumulation),
    "token mean of each rank, averaged": lambda n, c: _token_mean(n, _ranks(c), len(c.ranks)),
    "token mean of each pack, averaged (Eq. 3)": lambda n, c: _token_mean(n, c.lines, sum(n[list(x)].any() for x in c.lines)),
    "M of each micro-batch, averaged": lambda n, c: _sequence_mean(n, c.micro_batches, len(c.ranks) * c.accumulation),
    "M of each rank, averaged": lambda n, c: _sequence_mean(n, _ranks(c), len(c.ranks)),
    "published code (K = visible devices, M of a micro-step)": _published,
    "published code, one visible device a process": lambda n, c: _published(n, c, 1),
    "published code, several packs a device (M of the first)": lambda n, c: _published(n, c, rows=True),
}


def way_weights(way: str, targets, cutting: Cutting) -> np.ndarray:
    """Weight of a target token of each sequence under one of `WAYS`; float64[n], 0 for sequences without targets."""
    if way not in WAYS:
        raise ValueError(f"way {way!r} is not one of {', '.join(WAYS)}")
    targets = np.asarray(targets, dtype=float)
    with np.errstate(divide="ignore"):
        return np.where(targets > 0, WAYS[way](targets, cutting), 0.0)


def wanted_weights(targets, exponent: float = 1.0) -> np.ndarray:
    """N_i^-p / sum_j N_j^(1-p), the family that `weights.token_weights` gives a step; written out here as an oracle."""
    targets = [int(n) for n in targets]
    total = sum(n ** (1.0 - exponent) for n in targets if n)
    return np.array([n**-exponent / total if n else 0.0 for n in targets])


def sequence_gradients(model, sequences, borders=()) -> torch.Tensor:
    """Gradients of each sequence's summed loss, one sequence at a time, by the model's own logits.

    Args:
        model: a causal transformers model, not sharded. Parameters that need no gradient are left out.
        sequences: (input_ids, labels) of each.
        borders: pairs (i, j): the loss of predicting the first token of sequence j at the end of sequence i instead.

    Returns:
        [n, P] in the parameters' dtype, rows flat over `named_parameters`.
    """
    inner = unwrap(model)
    params = [p for p in inner.parameters() if p.requires_grad]
    rows = []
    with probe.as_before(inner), probe.switched(inner, "sdpa"):  # eager rounds its softmax to float32
        for k in borders or range(len(sequences)):
            ids, labels = (torch.as_tensor(np.asarray(x, dtype=np.int64), device=params[0].device) for x in sequences[k[0] if borders else k])
            logits = inner(input_ids=ids[None], use_cache=False).logits[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if borders:
                loss = F.cross_entropy(logits[-1:], torch.as_tensor([int(sequences[k[1]][0][0])], device=logits.device))
            else:
                loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
            grads = torch.autograd.grad(loss, params, allow_unused=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, grads, strict=True)]))
    return torch.stack(rows)


def products(gradients: torch.Tensor, columns: int = 2**20) -> np.ndarray:
    """G_ij, the inner products of rows, summed in float64 some columns at a time; float64[n, n]."""
    parts = (gradients[:, at : at + columns].double() for at in range(0, gradients.shape[1], columns))
    return sum(part @ part.T for part in parts).cpu().numpy()


def naive_ways(model, sequences=None, cuttings=None, *, exponent: float = 1.0, ranks: int = 2, seed: int = 0) -> pd.DataFrame:
    """How far the gradient of each of `WAYS` is from the wanted one.

    Args:
        model: a causal transformers model; parameters that need no gradient are left out.
        sequences: (input_ids, labels) of each; random ones by default.
        cuttings: of these sequences; `make_cuttings` for this number of ranks by default.
        exponent: what is wanted: 1 is Eq. 2, 0 the token mean.
        ranks, seed: of the cuttings and sequences made here.

    Returns:
        A row a way: way, error (the largest |g - g*| / |g*| over the cuttings), smallest_error, cutting (the worst),
        scale (g's best factor onto g* there), direction_error (what is left after each cutting's own best factor, the largest
        over the cuttings, which need not be in the worst one), largest_weight and smallest_weight (of a sequence, over its
        wanted one, in any cutting).
    """
    sequences = random_sequences(vocabulary=text_config(unwrap(model)).vocab_size, seed=seed) if sequences is None else sequences
    cuttings = make_cuttings([len(x) for x, _ in sequences], ranks, seed=seed) if cuttings is None else cuttings
    targets = np.array([n_targets(s) for s in sequences])
    wanted, gram = wanted_weights(targets, exponent), products(sequence_gradients(model, sequences))
    size = wanted @ gram @ wanted
    rows = []
    for way in WAYS:
        found = []
        for cutting in cuttings:
            weights = way_weights(way, targets, cutting)
            off = weights - wanted
            factor = (weights @ gram @ wanted) / (weights @ gram @ weights)
            left = factor * weights - wanted
            ratio = weights[targets > 0] / wanted[targets > 0]
            found.append({"way": way, "error": max(off @ gram @ off / size, 0) ** 0.5, "cutting": cutting.name, "scale": factor,
                          "direction_error": max(left @ gram @ left / size, 0) ** 0.5,
                          "largest_weight": ratio.max(), "smallest_weight": ratio.min()})  # fmt: skip
        every = pd.DataFrame(found)
        rows.append({**found[int(every.error.argmax())], "smallest_error": every.error.min(), "direction_error": every.direction_error.max(),
                     "largest_weight": every.largest_weight.max(), "smallest_weight": every.smallest_weight.min()})  # fmt: skip
    names = ["way", "error", "smallest_error", "cutting", "scale", "direction_error", "largest_weight", "smallest_weight"]
    return pd.DataFrame(rows)[names]


RIGHT_WEIGHTS = "the wanted weights"
FACTORS: dict[str, Callable] = {  # what a gradient may be multiplied by beside its weights
    "": lambda c: 1.0,
    "divided by the accumulation count": lambda c: 1 / c.accumulation,
    "divided by the number of ranks (averaged over them twice)": lambda c: 1 / len(c.ranks),
    "divided by accumulation count and ranks": lambda c: 1 / len(c.ranks) / c.accumulation,
    "multiplied by the number of ranks (summed over them, not averaged)": lambda c: float(len(c.ranks)),
    "multiplied by the accumulation count": lambda c: float(c.accumulation),
}


def explain(gradient: torch.Tensor, gradients: torch.Tensor) -> tuple[np.ndarray, float]:
    """The weights that a gradient was made with.

    Args:
        gradient: [P], flat.
        gradients: [n, P] of `sequence_gradients`, also with rows for borders below.

    Returns:
        float64[n], weight of each row (best fit), and the share of the gradient's size that they leave unexplained.
    """
    columns = gradients.double().T
    fit = torch.linalg.lstsq(columns, gradient.double()[:, None]).solution[:, 0]
    left = (columns @ fit - gradient.double()).norm() / gradient.double().norm()
    return fit.cpu().numpy(), float(left)


def named_causes(fits: dict[Cutting, np.ndarray], targets, wanted, tolerance: float) -> list[str]:
    """The `WAYS` and `FACTORS` that give the fitted weights in every one of these cuttings, in words."""
    has = np.asarray(targets) > 0
    weights = {RIGHT_WEIGHTS: lambda c: wanted} | {w: (lambda c, w=w: way_weights(w, targets, c)) for w in WAYS}
    for factor, by in FACTORS.items():  # the plainest factor that explains it is enough
        found = [f"{way}, {factor}" if factor else way for way, of in weights.items()
                 if all(np.allclose(fit[has], of(c)[has] * by(c), rtol=tolerance, atol=0) for c, fit in fits.items())]  # fmt: skip
        if found:
            return found[:1] if found[0].startswith(RIGHT_WEIGHTS) else found
    return []
