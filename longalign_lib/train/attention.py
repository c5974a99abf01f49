"""Attention for packs in stock models: every document sees itself and nothing else.

Registered with transformers under the name ``longalign``; a model loaded or switched to it
(``model.set_attn_implementation("longalign")``) keeps packs apart whenever ``cu_seq_lens_q`` comes with the batch. Two ways:

    CUDA, 16 bit   ``torch.nn.attention.varlen`` (the FlashAttention-2 kernel that torch carries)
    elsewhere      a causal ``scaled_dot_product_attention`` a document: no T x T mask, sum of l^2 work instead of T^2

With flash-attn installed, ``attn_implementation="flash_attention_2"`` takes the same batches. What the kernels cannot do
(soft-capped scores, a sliding window shorter than a document, attention sinks, dropout in training) is refused by name.
Shapes: B packs, H query heads, G key/value heads, T tokens, D head size.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "longalign"


def packed_attention(
    module, query, key, value, attention_mask=None, scaling: float | None = None, dropout: float = 0.0,
    cu_seq_lens_q=None, max_length_q: int | None = None, **kwargs,
):  # fmt: skip
    """Attention function in transformers' interface.

    Args:
        module: the attention layer; outside packs its ``is_causal`` is respected, a pack is always causal.
        query [B, H, T, D], key and value [B, G, T', D]; G divides H.
        attention_mask: None, or a mask that `mask_for` made for batches that are not packs.
        scaling: multiplies the scores; ``D ** -0.5`` by default.
        cu_seq_lens_q: int32[S + 1], borders of the documents of a pack; B must be 1.
        max_length_q: tokens of the longest document.

    Returns:
        ``(output [B, T, H, D], None)``.

    Raises:
        ValueError: the layer needs something that this attention does not compute; the message names it.
    """
    _refuse(module, kwargs, dropout if module.training else 0.0, max_length_q or query.shape[2])
    if cu_seq_lens_q is None:
        tokens, seen = query.shape[2], key.shape[2]
        causal = attention_mask is None and tokens > 1 and getattr(module, "is_causal", True)
        if causal and tokens != seen:  # new tokens after a cache: aligned at the end, which is_causal is not
            attention_mask = torch.ones(tokens, seen, dtype=torch.bool, device=query.device).tril(seen - tokens)
            causal = False
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, is_causal=causal,
                                             scale=scaling, enable_gqa=query.shape[1] != key.shape[1])  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(f"a pack is one line without a cache, got query {tuple(query.shape)}, key {tuple(key.shape)}")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary embedding hands back float32 under autocast; the kernels want 16 bit
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    # [1, H, T, D] -> [T, H, D]
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        out = varlen_attention(q_THD, k_TGD, v_TGD, cu_seq_lens_q, max_length_q, scaling)
    else:
        out = document_loop_attention(q_THD, k_TGD, v_TGD, cu_seq_lens_q, scaling)
    return out.unsqueeze(0), None


def document_loop_attention(q_THD, k_TGD, v_TGD, cu_seq_lens, scaling: float | None = None) -> torch.Tensor:
    """Causal attention one document at a time; any device and dtype; [T, H, D] in and out."""
    parts = []
    grouped = q_THD.shape[1] != k_TGD.shape[1]
    borders = cu_seq_lens.tolist()
    for start, end in itertools.pairwise(borders):
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q_THD, k_TGD, v_TGD))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def varlen_attention(q_THD, k_TGD, v_TGD, cu_seq_lens, max_length: int, scaling: float | None = None) -> torch.Tensor:
    """Causal attention of all documents in one CUDA kernel; bf16 or fp16; [T, H, D] in and out."""
    from torch.nn.attention.varlen import varlen_attn

    repeat = q_THD.shape[1] // k_TGD.shape[1]
    if repeat > 1:  # torch 2.11's kernel wants as many key heads as query heads
        k_TGD, v_TGD = k_TGD.repeat_interleave(repeat, dim=1), v_TGD.repeat_interleave(repeat, dim=1)
    return varlen_attn(q_THD.contiguous(), k_TGD.contiguous(), v_TGD.contiguous(), cu_seq_lens, cu_seq_lens,
                       int(max_length), int(max_length), scale=scaling, window_size=(-1, 0))  # fmt: skip


def _refuse(module, kwargs: dict, dropout: float, longest: int) -> None:
    window = kwargs.get("sliding_window")
    reasons = {
        "soft-capped attention scores (softcap)": kwargs.get("softcap") is not None,
        f"a sliding window of {window} tokens, shorter than a document of {longest}": bool(window) and window < longest,
        "attention sinks (s_aux)": kwargs.get("s_aux") is not None,
        "a position bias": kwargs.get("position_bias") is not None,
        f"attention dropout {dropout}": dropout > 0,
    }
    for reason, present in reasons.items():
        if present:
            raise ValueError(
                f"attention {NAME!r} cannot compute {reason}, which {type(module).__name__} asks for; "
                "load the model with attn_implementation='eager' or 'flash_attention_2' and check it with a leak test"
            )


def mask_for(*args, attention_mask=None, **kwargs):
    """Mask function beside `packed_attention`: none for packs and unpadded prompts, sdpa's own for padding and caches.

    transformers hands over a 2-D ``attention_mask`` where there is padding; without this function it would be
    dropped silently.
    """
    plain = attention_mask is None or bool(attention_mask.all())
    if plain and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def register() -> str:
    """Make ``longalign`` known to transformers; returns the name. Calling it again changes nothing."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, mask_for)
    return NAME


def backend() -> str:
    """Which way packs take here, in words."""
    if not torch.cuda.is_available():
        return "one causal sdpa call a document"
    import importlib.util

    return "flash-attn" if importlib.util.find_spec("flash_attn") else "torch varlen attention"
