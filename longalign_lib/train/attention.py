"""Attention for packs in stock models: every document sees itself and nothing else.

Registered with transformers under the name ``longalign``; a model loaded or switched to it
(``model.set_attn_implementation("longalign")``) keeps packs apart whenever ``cu_seq_lens_q`` comes with the batch. Restarting
``position_ids`` alone do it only where the model hands them on to its attention (CTRL, GPT-BigCode, Moshi and Persimmon do not, and
leak without borders). Four ways, the first that can do what the layer asks for:

    flash-attn-4   CUDA, 16 bit, the package installed: plain causal attention of packs with a long document (`LEAST_WORK`)
    flash-attn     CUDA, 16 bit, the package installed: windows, soft caps, dropout     sum of l^2 work, no T x T mask
    torch varlen   CUDA, 16 bit: windows                                                the same kernel family, in torch
    document loop  any device and dtype, everything: windows, soft caps, sinks,         sum of l^2 work, or l * window;
                   dropout                                                              no mask beyond a chunk of a document

The loop computes a document by `row_attention.causal_attention`. It reads the borders on the host: one synchronisation a layer on
CUDA; the kernels need none.

flash-attn-4 (pure Python, for Hopper and newer) took half the time of torch's kernel for long documents on one H100, and made whole steps
at 32k and 64k 1.6 to 1.8 times faster. At 8k steps were slower, although the kernel alone was not: compiled layers break at its call. ``LONGALIGN_FLASH_ATTN_4=0`` leaves it alone. The flash-attn way is tested against its documented signature only: that
package was on no machine that this was written on.

Invariants: a pack is causal within its documents; a window of w tokens counts the token itself, as in transformers.
`families.refuse` says before training which models this cannot serve. Shapes: B packs, H query heads, G key/value heads,
R = H / G, T tokens, L keys, D head size.
"""

from __future__ import annotations

import inspect
import itertools
import os

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from longalign_lib.train.row_attention import band, causal_attention, sdpa, softmax_attention

NAME = "longalign"
LARGEST_KERNEL_HEAD = 256
LARGEST_HEAD_4 = 128  # of flash-attn-4's kernels for Hopper, backward pass included
LEAST_WORK = 1e11  # FLOPs of a pack's longest document in one forward pass, from which flash-attn-4 is taken; about half a millisecond


def packed_attention(
    module, query, key, value, attention_mask=None, scaling: float | None = None, dropout: float = 0.0, cu_seq_lens_q=None,
    max_length_q: int | None = None, sliding_window: int | None = None, softcap: float | None = None, s_aux=None,
    position_ids=None, is_causal: bool | None = None, **kwargs,
):  # fmt: skip
    """Attention function in transformers' interface.

    Args:
        module: the attention layer; its ``is_causal`` is respected outside packs, and a pack must be causal.
        query [B, H, T, D], key [B, G, T', D], value [B, G, T', D']; G divides H.
        attention_mask: None, or what `mask_for` made: a mask for batches that are not packs, or a window's note.
        scaling: multiplies the scores; ``D ** -0.5`` by default.
        dropout: of the attention weights, in training.
        cu_seq_lens_q: int32[S + 1], borders of the documents of a pack; B must be 1.
        max_length_q: tokens of the longest document.
        sliding_window: a token sees itself and the ``sliding_window - 1`` tokens before it; by default what the note says.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        s_aux: float[H], attention sinks: a key a head whose score is this and whose value is zero.
        position_ids: int[B, T]; where they restart in a batch without mask and borders, a document begins.

    Returns:
        ``(output [B, T, H, D'], None)``.

    Raises:
        ValueError: a pack with more than one line, a cache, padding or bidirectional attention; a position bias.
    """
    if attention_mask is not None and attention_mask.shape[-2] == 0:  # the note of a window
        sliding_window, attention_mask = sliding_window or attention_mask.shape[-1], None
    asked = {"scaling": scaling, "window": sliding_window or None, "softcap": softcap, "sinks": s_aux,
             "dropout": dropout if module.training else 0.0}  # fmt: skip
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"attention {NAME!r} adds no position bias, which {type(module).__name__} asks for; use 'eager'")
    batch, _, tokens, _ = query.shape
    forward_only = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is None:
        causal = attention_mask is None and tokens > 1 and forward_only
        borders = _borders(position_ids, query, key) if causal else None
        if borders is None:
            return _one_document_a_row(query, key, value, attention_mask, causal, asked).transpose(1, 2).contiguous(), None
        cu_seq_lens_q, max_length_q = borders
    elif batch != 1 or tokens != key.shape[2]:
        raise ValueError(f"a pack is one line without a cache, got query {tuple(query.shape)}, key {tuple(key.shape)}")
    elif attention_mask is not None:
        raise ValueError("a pack takes no mask beside cu_seq_lens_q: leave attention_mask out (a pack has no padding); a model that "
                         f"lays its own over the causal one, perhaps this {type(module).__name__}, cannot be packed")  # fmt: skip
    elif not forward_only:
        raise ValueError(f"a pack is causal, {type(module).__name__} looks both ways; load that part with another attention")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary embedding hands back float32 under autocast; the kernels want 16 bit
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    # [B, H, T, D] -> [B T, H, D]
    q_THD, k_TGD, v_TGD = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    way = way_for(query, softcap=softcap, sinks=s_aux, dropout=asked["dropout"], window=asked["window"], longest=max_length_q or 0)
    if way == "document loop":
        out = document_loop_attention(q_THD, k_TGD, v_TGD, cu_seq_lens_q, **asked)
    else:
        del asked["sinks"]
        out = KERNELS[way](q_THD, k_TGD, v_TGD, cu_seq_lens_q, max_length_q or int(cu_seq_lens_q.diff().max()), **asked)
    return out.unflatten(0, (batch, tokens)), None


def way_for(query, *, softcap=None, sinks=None, dropout: float = 0.0, window: int | None = None, longest: int = 0) -> str:
    """Name of the way that a pack takes: a key of `KERNELS`, or "document loop" (see the module's head).

    Args:
        query [B, H, T, D]: its device, type and sizes count.
        longest: tokens of the pack's longest document, 0 if unknown.
    """
    _, heads, _, size = query.shape
    kernels = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and size <= LARGEST_KERNEL_HEAD
    if not kernels or sinks is not None:
        return "document loop"
    plain = softcap is None and dropout == 0
    if _FLASH_ATTN_4 is not None and plain and window is None and size <= LARGEST_HEAD_4 and 2 * heads * size * longest**2 >= LEAST_WORK:
        return "flash-attn-4"
    if _flash_attn() is not None:
        return "flash-attn"
    return "torch varlen" if plain else "document loop"


def document_loop_attention(
    q_THD, k_TGD, v_TGD, cu_seq_lens, scaling: float | None = None, *, window: int | None = None,
    softcap: float | None = None, sinks=None, dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Causal attention one document at a time; any device and dtype; [T, H, D] in, [T, H, D'] out."""
    parts = []
    for start, end in itertools.pairwise(cu_seq_lens.tolist()):
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q_THD, k_TGD, v_TGD))
        parts.append(causal_attention(q, k, v, scaling, window, softcap, sinks, dropout)[0].transpose(0, 1))
    return torch.cat(parts)


def varlen_attention(
    q_THD, k_TGD, v_TGD, cu_seq_lens, max_length: int, scaling: float | None = None, *, window: int | None = None,
    softcap: None = None, dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of all documents in one CUDA kernel of torch; bf16 or fp16; [T, H, D] in, [T, H, D'] out."""
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None or dropout:
        raise ValueError(f"torch's varlen kernel has no soft cap and no dropout, got softcap={softcap}, dropout={dropout}")
    # fewer key heads: torch 2.13 wants it said, torch 2.11 has no such argument and does it (measured, gradients too)
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    q, k, v, size = _one_head_size(q_THD, k_TGD, v_TGD)
    out = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, int(max_length), int(max_length),
                      scale=_scale(q_THD, scaling), window_size=_before(window), **grouped)  # fmt: skip
    return out[..., :size]


def flash_attention(
    q_THD, k_TGD, v_TGD, cu_seq_lens, max_length: int, scaling: float | None = None, *, window: int | None = None,
    softcap: float | None = None, dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """The same by the flash-attn package (>= 2.6), which also knows soft caps, dropout and fewer key heads."""
    q, k, v, size = _one_head_size(q_THD, k_TGD, v_TGD)
    out = _flash_attn()(q, k, v, cu_seq_lens, cu_seq_lens, int(max_length), int(max_length), dropout_p=dropout, causal=True,
                        softmax_scale=_scale(q_THD, scaling), window_size=_before(window), softcap=softcap or 0.0)  # fmt: skip
    return out[..., :size]


@torch.compiler.disable
def flash_attention_4(
    q_THD, k_TGD, v_TGD, cu_seq_lens, max_length: int, scaling: float | None = None, *, window: None = None,
    softcap: None = None, dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """The same by flash-attn-4, whose kernels are compiled when first called (some seconds)."""
    if window is not None or softcap is not None or dropout:
        raise ValueError(f"flash-attn-4 is used for plain causal attention only, got window={window}, softcap={softcap}, dropout={dropout}")
    q, k, v, size = _one_head_size(q_THD, k_TGD, v_TGD)
    out = _FLASH_ATTN_4(q, k, v, cu_seqlens_q=cu_seq_lens, cu_seqlens_k=cu_seq_lens, max_seqlen_q=int(max_length),
                        max_seqlen_k=int(max_length), causal=True, softmax_scale=_scale(q_THD, scaling))  # fmt: skip
    return (out[0] if isinstance(out, tuple) else out)[..., :size]


KERNELS = {"flash-attn-4": flash_attention_4, "flash-attn": flash_attention, "torch varlen": varlen_attention}


def mask_for(*args, attention_mask=None, **kwargs):
    """Mask function beside `packed_attention`: none for packs and unpadded prompts, sdpa's own for padding and caches.

    transformers hands over a 2-D ``attention_mask`` where there is padding; without this function it would be
    dropped silently. A model that lays a mask of its own over the causal one (``use_vmap``, or blocks that look ahead) keeps it.

    Returns:
        None, where every token sees all before it; bool[B, 1, T, L], sdpa's mask; or bool[1, 1, 0, w], no mask but the note of a
        window of w tokens, for layers that know theirs by the mask alone (Qwen2-MoE, PhiMoE).
    """
    tokens, seen, window = (kwargs.get(x) for x in ("q_length", "kv_length", "local_size"))
    plain = attention_mask is None or bool(attention_mask.all())
    if plain and tokens == seen and not kwargs.get("use_vmap") and not _looks_ahead(**kwargs):
        if window is None or window >= seen:
            return None
        if getattr(kwargs.get("config"), "attention_chunk_size", None) is None:  # else perhaps no window but a chunk
            return torch.ones(1, 1, 0, window, dtype=torch.bool, device=kwargs.get("device"))
    if None not in (tokens, seen) and seen > tokens > 1:
        kwargs["allow_is_causal_skip"] = False  # sdpa's own None means aligned at the start of a static cache, ours at the end
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def register() -> str:
    """Make ``longalign`` known to transformers; returns the name. Calling it again changes nothing."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, mask_for)
    return NAME


def backend() -> str:
    """Which way packs take here in 16 bit, in words."""
    if not torch.cuda.is_available():
        return "one causal sdpa call a document"
    usual = "torch varlen attention" if _flash_attn() is None else "flash-attn"
    return usual if _FLASH_ATTN_4 is None else f"flash-attn-4 for long documents, else {usual}"


def _find_flash_attn():
    """``flash_attn_varlen_func``, or None where the package is absent, broken or another one (flash-attn-4 has no such name)."""
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError):
        return None
    return flash_attn_varlen_func


def _find_flash_attn_4():
    """flash-attn-4's ``flash_attn_varlen_func``, or None without a GPU or the package, or where the environment says no."""
    if os.environ.get("LONGALIGN_FLASH_ATTN_4", "1") == "0" or not torch.cuda.is_available():
        return None
    try:
        from flash_attn.cute.interface import flash_attn_varlen_func
    except Exception:  # it compiles things at import: whatever keeps it from doing so, another way computes the same
        return None
    return flash_attn_varlen_func


_FLASH_ATTN = _find_flash_attn()  # once, at import: torch.compile cannot follow an import
_FLASH_ATTN_4 = _find_flash_attn_4()


def _flash_attn():
    return _FLASH_ATTN


def _one_document_a_row(query, key, value, mask, causal: bool, asked: dict) -> torch.Tensor:
    """Attention outside packs: rows of prompts, padding with a mask, new tokens after a cache; [B, H, T, D']."""
    tokens, seen = query.shape[2], key.shape[2]
    if causal and tokens == seen:
        return causal_attention(query, key, value, **asked)
    if causal:  # new tokens after a cache: aligned at the end
        mask = band(seen - tokens, seen, 0, seen, asked["window"], query.device)
    if asked["softcap"] is not None or asked["sinks"] is not None:
        return softmax_attention(query, key, value, mask, asked["scaling"], asked["softcap"], asked["sinks"], asked["dropout"])
    return sdpa(query, key, value, mask, asked["scaling"], asked["dropout"])


def _looks_ahead(mask_function=None, q_length: int = 0, batch_size: int = 1, device=None, allow_is_causal_skip: bool = True, **_) -> bool:
    """Whether a token sees the next one, as in a prefix or a block of an image; O(B T), and nothing where transformers says causal."""
    if mask_function is None or allow_is_causal_skip:
        return False
    row, at = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length - 1, device=device)[None]
    return bool(mask_function(row, torch.zeros_like(row), at, at + 1).any())


def _borders(position_ids, query, key):
    """``(cu_seq_lens int32[S + 1], longest)`` where positions restart within rows, None where they do not or are not known."""
    batch, _, tokens, _ = query.shape
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != tokens or key.shape[2] != tokens:
        return None
    begins = torch.ones(batch, tokens, dtype=torch.bool, device=query.device)
    begins[:, 1:] = (position_ids.diff(dim=1) != 1).expand(batch, -1)
    starts = begins.flatten().nonzero().flatten()
    if len(starts) == batch:
        return None
    borders = torch.cat([starts, starts.new_tensor([batch * tokens])])
    return borders.int(), int(borders.diff().max())


def _before(window: int | None) -> tuple[int, int]:
    """A window in the kernels' words: tokens seen before and after the own one, -1 for all."""
    return (-1, 0) if window is None else (window - 1, 0)


def _scale(q_THD, scaling: float | None) -> float:
    return q_THD.shape[-1] ** -0.5 if scaling is None else scaling


def _one_head_size(q_THD, k_TGD, v_TGD):
    """Pad with zeros to one head size, a multiple of 8, as the kernels want; also the size of the values that were given."""
    size = v_TGD.shape[-1]
    width = -(-max(q_THD.shape[-1], size) // 8) * 8
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] != width else x for x in (q_THD, k_TGD, v_TGD))
    return q.contiguous(), k.contiguous(), v.contiguous(), size
