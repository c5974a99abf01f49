"""Causal attention of whole documents, a row each, on any device: what the document loop calls.

Plain attention is one ``scaled_dot_product_attention`` of torch, whose kernels hold no scores. A window shorter than the document
goes in chunks of query rows with the keys that those rows see: l * (window + CHUNK) work and a mask of CHUNK x (window + CHUNK).
Soft caps and sinks, which no kernel of torch knows, take the same chunks with their scores in memory, computed once more in the
backward pass, so that no more than one chunk's scores are ever held.

Shapes: B rows, H query heads, G key/value heads, R = H / G, T tokens, L keys, D head size of keys, D' of values.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

CHUNK = 512  # query rows whose scores are held at once
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def causal_attention(q, k, v, scaling=None, window=None, softcap=None, sinks=None, dropout: float = 0.0) -> torch.Tensor:
    """Causal attention of whole documents, a row each: q [B, H, T, D], k [B, G, T, D], v [B, G, T, D'] -> [B, H, T, D'].

    A window shorter than T, a soft cap or sinks are done in chunks of query rows with the keys that those rows see.
    """
    tokens = q.shape[2]
    window = None if window is None or window >= tokens else window
    plain = softcap is None and sinks is None
    if plain and window is None:
        return sdpa(q, k, v, None, scaling, dropout, causal=True)
    parts = []
    for start in range(0, tokens, CHUNK):
        end = min(start + CHUNK, tokens)
        first = 0 if window is None else max(0, start - window + 1)
        seen = band(start, end, first, end, window, q.device)
        q_part, k_part, v_part = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]
        if plain:
            parts.append(sdpa(q_part, k_part, v_part, seen, scaling, dropout))
        else:
            parts.append(checkpoint(softmax_attention, q_part, k_part, v_part, seen, scaling, softcap, sinks, dropout,
                                    use_reentrant=False, preserve_rng_state=dropout > 0))  # fmt: skip
    return torch.cat(parts, dim=2)


def sdpa(q, k, v, mask, scaling: float | None, dropout: float, causal: bool = False) -> torch.Tensor:
    """``scaled_dot_product_attention`` with fewer key heads, never by cuDNN.

    Measured on an H100 (torch 2.11, bf16): cuDNN's backward pass with a mask is wrong, relative error 1.4, where the gradient lies
    otherwise in memory than the output, as in chunks of a document; and cuDNN plans anew for every new length.
    """
    repeat = q.shape[1] // k.shape[1]
    # no kernel on CUDA takes fewer key heads with a mask or in float32: torch would hold all T x T scores instead
    if repeat > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    with sdpa_kernel(NOT_CUDNN) if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling,
                                              enable_gqa=q.shape[1] != k.shape[1])  # fmt: skip


def band(start: int, end: int, first: int, last: int, window: int | None, device) -> torch.Tensor:
    """Which of the keys first..last the query rows start..end see: bool [end - start, last - first]."""
    back = torch.arange(start, end, device=device)[:, None] - torch.arange(first, last, device=device)[None]
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def softmax_attention(q, k, v, mask=None, scaling=None, softcap=None, sinks=None, dropout: float = 0.0) -> torch.Tensor:
    """Attention with its scores in memory, at least in float32: what kernels without soft caps and sinks leave to do.

    Args:
        q [B, H, T, D], k [B, G, L, D], v [B, G, L, D'].
        mask: None, bool (True is seen) or additive, broadcast to [B, H, T, L] with one head.
        scaling, softcap, sinks, dropout: as in `packed_attention`.

    Returns:
        [B, H, T, D'] in the dtype of q.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    groups = k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q_BGRTD = q.to(exact).unflatten(1, (groups, -1))
        scores = q_BGRTD @ k.to(exact).unsqueeze(2).mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            mask = mask.unsqueeze(-3) if mask.ndim > 2 else mask  # one more dimension for the heads of a group
            lowest = torch.finfo(exact).min  # not -inf: a row of padding sees nothing and must not become NaN
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask.to(exact)
        if sinks is not None:
            sink = sinks.to(exact).view(1, groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(-1)
        weights = weights if sinks is None else weights[..., :-1]
        weights = F.dropout(weights, dropout) if dropout else weights
        return (weights @ v.to(exact).unsqueeze(2)).flatten(1, 2).to(q.dtype)
