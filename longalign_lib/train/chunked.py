"""Cross entropy of a language head, some rows at a time: the logits of all positions never exist at once.

    loss_n = logsumexp_v z_nv - z_ny,     z = f(scale * (hidden W^T + b)),   f(z) = softcap * tanh(z / softcap) or z

Forward keeps only ``loss_n``; backward makes each chunk's logits again. With p = softmax(z), e the one-hot label and g_n the
gradient that arrives for loss n (so any weights may be applied outside),

    d hidden_n = g_n (p_n - e_n) W,         d W = sum_n (p_n - e_n)^T (g_n hidden_n),         p_ny - 1 = expm1(-loss_n)

`head_losses` reaches it through a stock model: for one call the head's ``forward`` takes the final hidden states and gives
losses, which the model's output carries in ``logits``. The head still runs as a module, so hooks work as ever: ZeRO-3 gathers
its weight before its forward and again before its backward. What a model does to its head's output (Gemma 2 caps it, Granite
divides it) is learnt, not listed: once a model, its forward runs between stand-ins of body and head, and must give the
numbers that the head's stand-in gave, times one factor or under one cap.

Shapes: N positions, C rows of a chunk, D hidden size, V vocabulary. Memory beside inputs and gradients: two chunks of logits
C x V, and for 16-bit weights one float32 V x D. Cost: four products of N x D x V where the plain loss has three. No host syncs.
Liger's fused loss and torch's `linear_cross_entropy` were measured beside it (`benchmarks/losses.py`): right, in bfloat16 leaner,
and slower but for Liger with the head of a 7B model (28 ms against 34 in bfloat16), so this is the one way everywhere.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from longalign_lib.train.families import unwrap

IGNORE = -100
CHUNK_BYTES = 2**28  # of one float32 (float64) copy of a chunk's logits
_LEARNT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> (head, arguments that it needs or a reason)


def chunk_rows(vocabulary: int, dtype: torch.dtype = torch.float32, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows of a chunk of which one copy of the logits, at least float32, takes at most ``chunk_bytes`` (one row if it must)."""
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes {chunk_bytes} must be at least 1, e.g. {CHUNK_BYTES}")
    return max(1, chunk_bytes // (vocabulary * max(4, dtype.itemsize)))


def chunked_cross_entropy(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, *,
                          bias: torch.Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
                          chunk: int | None = None) -> torch.Tensor:  # fmt: skip
    """Per-position cross entropy of a linear head.

    Args:
        hidden_ND, weight_VD, bias: float[N, D], float[V, D] and float[V] or None: final hidden states and the head.
        labels_N: int64[N]; positions of label ``IGNORE`` have loss 0 and no gradient.
        softcap: cap of Gemma 2's tanh, or None.
        logit_scale: factor of the logits (Cohere's ``logit_scale``, Granite's 1 / ``logits_scaling``), before the cap.
        chunk: rows at a time; None takes as many as `CHUNK_BYTES` allow.

    Returns:
        float32[N] (float64 for float64 input), differentiable in hidden, weight and bias for any weights applied to it.
        Under autocast the products run in its type, as in nn.Linear.

    Raises:
        ValueError: shapes or types that do not fit, a chunk below 1, a cap that is not positive.

    Example:
        >>> chunked_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4]), chunk=1)
        tensor([1.6094, 1.6094])
    """
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_ND.shape)} and weight {tuple(weight_VD.shape)} must be [N, D] and [V, D]")
    if labels_N.shape != hidden_ND.shape[:1] or labels_N.dtype != torch.int64:
        raise ValueError(f"labels {tuple(labels_N.shape)} {labels_N.dtype} must be int64[{len(hidden_ND)}], one a hidden state")
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{len(weight_VD)}], one a row of the weight")
    if (softcap is not None and not softcap > 0) or (chunk is not None and chunk < 1):
        raise ValueError(f"softcap {softcap} must be positive or None, chunk {chunk} at least 1 row or None")
    dtype, device = hidden_ND.dtype, hidden_ND.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(device)
    elif weight_VD.dtype != dtype:
        raise ValueError(f"hidden is {dtype} and weight {weight_VD.dtype}: give both one type, or use autocast")
    rows = chunk or chunk_rows(len(weight_VD), dtype)
    return _Chunked.apply(hidden_ND, weight_VD, bias, labels_N, softcap, logit_scale, rows, dtype)


class _Chunked(torch.autograd.Function):
    """The weight is saved as it came, never a view or a cast of it: ZeRO-3 empties and refills ``weight.data`` in between."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, softcap, scale, chunk, dtype):
        """Losses of all positions; ``dtype`` is the type of the products."""
        wide = torch.promote_types(dtype, torch.float32)
        losses_N = torch.empty(labels_N.shape, dtype=wide, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight = weight_VD.to(dtype)
            for rows in (slice(at, at + chunk) for at in range(0, len(labels_N), chunk)):
                z_CV = _logits(hidden_ND[rows].to(dtype), weight, bias_V, scale)
                if softcap is not None:
                    z_CV = z_CV.to(wide).div_(softcap).tanh_().mul_(softcap)
                z_CV = torch.log_softmax(z_CV, dim=-1, dtype=wide)
                losses_N[rows] = -z_CV.gather(1, _indices(labels_N[rows, None])).squeeze(1)
        losses_N.masked_fill_(labels_N == IGNORE, 0)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, losses_N)
        ctx.rest = softcap, scale, chunk, dtype
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):
        """Gradients of hidden, weight and bias, as far as each is wanted."""
        hidden_ND, weight_VD, bias_V, labels_N, losses_N = ctx.saved_tensors
        softcap, scale, chunk, dtype = ctx.rest
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = losses_N.dtype
        factor_N1 = (grad_N.masked_fill(labels_N == IGNORE, 0) * scale)[:, None]
        of_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        of_weight = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
        of_bias = torch.zeros_like(bias_V, dtype=wide) if wants_bias else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight = weight_VD.to(dtype)
            for rows in (slice(at, at + chunk) for at in range(0, len(labels_N), chunk)):
                hidden_CD = hidden_ND[rows].to(dtype)
                d_CV = _logits(hidden_CD, weight, bias_V, scale)
                d_CV = _minus_one_hot(d_CV, _indices(labels_N[rows, None]), torch.expm1(-losses_N[rows, None]), softcap)
                if wants_hidden:
                    of_hidden[rows] = (d_CV @ weight) * factor_N1[rows]
                if wants_weight and dtype == wide:
                    of_weight.addmm_(d_CV.t(), hidden_CD * factor_N1[rows])
                elif wants_weight:  # summed over chunks in float32
                    of_weight += d_CV.t() @ (hidden_CD * factor_N1[rows]).to(dtype)
                if wants_bias:
                    of_bias += d_CV.t() @ factor_N1[rows, 0].to(dtype)
        of_weight = of_weight.to(weight_VD.dtype) if wants_weight else None
        return of_hidden, of_weight, of_bias.to(bias_V.dtype) if wants_bias else None, None, None, None, None, None


def _indices(labels: torch.Tensor) -> torch.Tensor:
    """Labels with 0 for ``IGNORE``; any other negative one stays, and indexing fails on it as it does in torch."""
    return labels.masked_fill(labels == IGNORE, 0)


def _logits(hidden_CD, weight_VD, bias_V, scale: float) -> torch.Tensor:
    z_CV = hidden_CD @ weight_VD.t()  # not F.linear, which DeepSpeed replaces
    if bias_V is not None:
        z_CV += bias_V.to(z_CV.dtype)
    return z_CV.mul_(scale) if scale != 1 else z_CV


def _minus_one_hot(z_CV, label_C1, target_C1, softcap: float | None) -> torch.Tensor:
    """Derivative of losses in logits before the cap; the target's entry, ``target_C1``, stays exact where p is in 16 bits."""
    if softcap is None:
        return torch.softmax(z_CV, dim=-1).scatter_(1, label_C1, target_C1.to(z_CV.dtype))
    tanh_CV = (z_CV.to(target_C1.dtype) / softcap).tanh_()
    d_CV = torch.softmax(tanh_CV * softcap, dim=-1).scatter_(1, label_C1, target_C1)
    return d_CV.mul_(tanh_CV.square_().neg_().add_(1)).to(z_CV.dtype)


def why_not(model) -> str | None:
    """Why this model's logits are not made in chunks, or None if they are. The first call runs the head's surroundings once."""
    found = _learn(unwrap(model))
    return found if isinstance(found, str) else None


def head_losses(model, inputs: dict, row, position, labels, chunk_bytes: int = CHUNK_BYTES) -> torch.Tensor:
    """Cross entropy of ``labels`` under a model's predictions at ``(row, position)``.

    Args:
        model: a causal language model, also inside DDP, DeepSpeed or PEFT wrappers.
        inputs: keyword arguments of its forward, without labels.
        row, position, labels: int64[N].
        chunk_bytes: see `chunk_rows`.

    Returns:
        float32[N] (float64 for a float64 model), differentiable.

    Raises:
        ValueError: `why_not` has a reason.
        RuntimeError: the head did not run exactly once.
    """
    inner = unwrap(model)
    math = _learn(inner)
    if isinstance(math, str):
        raise ValueError(f"{type(inner).__name__}: {math}")
    head, kept = inner.get_output_embeddings(), []

    def forward(hidden_BTD):
        rows = chunk_rows(len(head.weight), hidden_BTD.dtype, chunk_bytes)
        return chunked_cross_entropy(hidden_BTD[row, position], head.weight, labels, bias=head.bias, chunk=rows, **math)

    def keep(module, args, output):  # runs after all other hooks of the head, so it keeps what they made of the losses
        kept.append(output)
        return output.detach().clone()  # the model scales or caps this copy, in place if it likes

    def swap(module, args, output):  # runs before all other hooks of the model, so that they see the losses
        if len(kept) != 1:
            raise RuntimeError(f"the head of {type(inner).__name__} ran {len(kept)} times in one forward, not once")
        output.logits = kept.pop()
        return output

    hooks = [head.register_forward_hook(keep), inner.register_forward_hook(swap, prepend=True)]
    head.forward = forward
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        del head.forward
        for hook in hooks:
            hook.remove()


def _learn(inner) -> dict | str:
    """What `_probe` finds, once for a head and the settings of its model (a cap may be changed between two calls)."""
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    config = inner.config.get_text_config() if hasattr(inner, "config") else None
    settings = tuple(v for v in vars(config).values() if v is None or isinstance(v, int | float | str)) if config is not None else ()
    of_head, known, found = _LEARNT.get(inner, (None, None, None))
    if of_head is None or of_head() is not head or known != settings:
        found = _probe(inner, head)
        _LEARNT[inner] = weakref.ref(head or inner), settings, found
    return found


class _Output(tuple):
    """What a model's body returns, with the hidden states and None for all else."""

    def __getattr__(self, name):
        return self[0] if name == "last_hidden_state" else None


class _StandIn:
    """Answers every call alike; has the other module's numbers (not its modules, which stand in too)."""

    def __init__(self, other: nn.Module, answer):
        self.other, self.answer, self.calls = other, answer, 0

    def __getattr__(self, name):
        value = getattr(self.other, name)
        return _StandIn(value, self.answer) if isinstance(value, nn.Module) else value

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.answer


@torch.no_grad()
def _probe(inner, head) -> dict | str:
    """Run the model's forward between stand-ins of body and head, and read off what it does to the head's output."""
    if hasattr(inner, "_orig_mod") or getattr(inner, "_compiled_call_impl", None) is not None:
        return "it is compiled as a whole (compile its decoder layers instead)"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return f"its head is {type(head).__name__} with a forward of its own, not a plain torch.nn.Linear"
    if type(head.weight) not in (torch.Tensor, nn.Parameter) or inner.base_model_prefix not in inner._modules:
        return f"its head's weight is a {type(head.weight).__name__}, its body should be {inner.base_model_prefix!r}"
    path = next(name for name, module in inner.named_modules(remove_duplicate=False) if module is head)
    parent, name, body = inner.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], inner.base_model_prefix
    x = torch.linspace(-50, 50, head.out_features, dtype=torch.float64)[None, None]
    x[..., 0], x[..., -1] = 1, 1e9  # come out as the factor and as the cap
    stand_in, real = _StandIn(head, x), inner._modules[body]
    inner._modules[body] = _StandIn(real, _Output((torch.zeros(1, 1, head.in_features, dtype=x.dtype),)))
    parent._modules[name] = stand_in
    try:
        y = type(inner).forward(inner, input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits
    except Exception as error:  # whatever a model's forward may stumble over: then it keeps the stock path
        return f"its forward cannot be followed from body to head ({type(error).__name__}: {str(error)[:200]})"
    finally:
        inner._modules[body], parent._modules[name] = real, head
    if stand_in.calls != 1 or y.shape != x.shape:
        return f"it calls its head {stand_in.calls} times and gives logits {tuple(y.shape)} for {tuple(x.shape)} from its head"
    y = y.double()
    factor, cap = y[0, 0, 0].item(), y[0, 0, -1].item()
    if factor and torch.allclose(y, x * factor, rtol=1e-6, atol=0):
        return {"logit_scale": factor}
    if cap > 0 and torch.allclose(y, cap * torch.tanh(x / cap), rtol=1e-5, atol=0):
        return {"softcap": cap}
    return "it does more to its head's output than one factor or one tanh cap"
