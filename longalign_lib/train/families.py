"""Which models can be trained on packs, and which on padded rows, decided before training.

A pack keeps its documents apart if tokens of different documents meet nowhere. In a causal model they can meet in

    attention                      apart under ``longalign``, if the model takes its attention from transformers' interface
    convolutions, recurrences      Mamba, RWKV, linear attention, gated delta nets: their state runs on over borders
    rotary tables of the batch     `dynamic` and `longrope` RoPE choose frequencies by the longest document beside it
    masks that are not documents   chunked attention, sparse attention by a top-k over the line

Padded rows meet nowhere, but a model can still see what stands behind its row, or count positions in a way of its own.

`reasons` names what stands in the way of packs, `padded_reasons` of padded rows; `refuse` and `refuse_padded` raise it. They read
the configuration and the modules and run nothing, so they work on sharded models and cost milliseconds; what they cannot know,
`leak.check_no_leak` measures, and `likely_causes` explains.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from longalign_lib.train.attention import NAME

APART = ("full_attention", "sliding_attention", "attention")  # layer types that `longalign` computes
FEED_FORWARD = ("moe", "dense", "mlp", "sparse")  # layer types of parts that mix no tokens
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
OWN_MASKS = ("sdpa", "eager", "flex_attention")  # documents by position_ids alone, any mask that a model lays over them
MIXERS = re.compile(
    r"Mamba|Rwkv|RecurrentBlock|RGLRU|RgLru|ShortConv|Lightning|LinearAttention|DeltaNet|DeltaAttention|LSTM|SSM|Retention"
)
OTHER_SENSES = re.compile(r"audio|vision|visual|image|speech")  # towers beside the text model
BRIDGES = re.compile(r"cross|encoder_attn|qformer|perceiver|resampler")  # layers that read another part's output, in any direction
NEVER_CAUSAL = ("XLNet", "CpmAnt")  # they say nowhere that they look both ways
OWN_POSITIONS = "it counts positions from padding_idx + 1, not from the 0 that batches of a plan begin at: it would train at other positions"
FIXED_ROPE = "set a fixed type first (longalign_lib.train.rope.extend_context: 'yarn', 'linear' or 'base')"


def reasons(model, attention: str = NAME) -> list[str]:
    """Why documents of a pack would meet in this model; empty if nothing speaks against packs.

    Args:
        model: a transformers model, also inside DDP, DeepSpeed or PEFT wrappers.
        attention: the attention that packs will run under; 'sdpa', 'eager' and 'flex_attention' get the model's own masks.

    Returns:
        One clause a reason.
    """
    model = unwrap(model)
    config = text_config(model)
    modules = [m for name, m in model.named_modules() if not OTHER_SENSES.search(name) and not isinstance(m, PreTrainedModel)]
    own_masks = attention in OWN_MASKS
    found = []
    if getattr(model.config, "is_encoder_decoder", False):
        found.append("it is an encoder-decoder: packs are for causal models")
    elif any(getattr(m, "is_causal", True) is False for m in modules) or _looks_both_ways(model, config):
        found.append("its attention looks both ways: packs are for causal models")
    if _counts_positions_itself(model):
        found.append(OWN_POSITIONS)
    if any(hasattr(m, "prepare_dynamic_mask") for m in modules) and not own_masks:
        found.append("its layers make a mask of their own (prepare_dynamic_mask), which knows no documents")
    if _alibi(model, config) and not own_masks:
        found.append("its ALiBi position bias is added outside transformers' attention interface")
    if not model._can_set_attn_implementation() and not own_masks:
        found.append(f"its layers compute attention themselves and would ignore {attention!r} (no AttentionInterface)")
    types = {str(kind) for kind in getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()}
    others = sorted(kind for kind in types if kind not in APART + FEED_FORWARD and not (own_masks and kind == "chunked_attention"))
    if others:
        found.append(f"its layers of type {', '.join(map(repr, others))} mix tokens in a way that knows no documents")
    mixers = sorted({type(m).__name__ for m in modules if isinstance(m, nn.Conv1d) or MIXERS.search(type(m).__name__)})
    if mixers:
        found.append(f"its modules {', '.join(mixers)} carry a state or a convolution over the borders of documents")
    ropes = rope_types(model) & set(BATCH_DEPENDENT_ROPE)
    if ropes:
        found.append(f"its {'/'.join(sorted(ropes))} RoPE takes other frequencies for a document beside a long one than alone; "
                     f"{FIXED_ROPE}")  # fmt: skip
    if getattr(config, "attention_chunk_size", None) and not others and not own_masks:
        found.append(f"it attends within chunks of {config.attention_chunk_size} tokens, which only a mask expresses")
    if getattr(config, "index_topk", None):
        found.append(f"its sparse attention picks the best {config.index_topk} keys of the whole line")
    return found


def padded_reasons(model, rows_per_pack: int = 1) -> list[str]:
    """Why rows padded on the right, without a mask, would not get the losses that they get alone; empty if nothing speaks against it.

    Args:
        model: a transformers model, also inside wrappers.
        rows_per_pack: rows of a batch; with one there is no padding.

    Returns:
        One clause a reason.
    """
    model = unwrap(model)
    found = []
    if getattr(model.config, "is_encoder_decoder", False):
        found.append("it is an encoder-decoder: plans are for causal models")
    elif _looks_both_ways(model, text_config(model)):
        hint = " (is_decoder=True in its configuration makes it causal)" if getattr(text_config(model), "is_decoder", None) is False else ""
        found.append(f"its attention looks both ways, at padding and at the tokens that it is asked for{hint}")
    if _counts_positions_itself(model):
        found.append(OWN_POSITIONS)
    ropes = rope_types(model) & set(BATCH_DEPENDENT_ROPE)
    if ropes and rows_per_pack > 1:
        found.append(f"its {'/'.join(sorted(ropes))} RoPE takes other frequencies for a row beside a longer one than alone; "
                     f"set rows_per_pack=1, or {FIXED_ROPE}")  # fmt: skip
    return found


def refuse(model, attention: str = NAME) -> None:
    """Raise ValueError with all `reasons` for a model that cannot be trained on packs; return None for any other.

    Call it after ``model.set_attn_implementation(attention)``: a model that is not switched is refused too.
    """
    model = unwrap(model)
    found = reasons(model, attention)
    if found:
        padded = "a padded plan (naive, sorted) for it, or "
        if padded_reasons(model, 2):
            padded = "" if padded_reasons(model, 1) else "a padded plan (naive, sorted) with rows_per_pack=1 for it, or "
        raise ValueError(
            f"{type(model).__name__} cannot keep documents of a pack apart under attention {attention!r}: {'; '.join(found)}. "
            f"Use {padded}a model whose only mixing layers are transformers attention"
        )
    used = text_config(model)._attn_implementation
    if used != attention:
        raise ValueError(
            f"{type(model).__name__} runs attention {used!r}, not {attention!r}: call model.set_attn_implementation({attention!r})"
        )


def refuse_padded(model, rows_per_pack: int = 1) -> None:
    """Raise ValueError with all `padded_reasons` for a model that cannot be trained on padded rows; return None for any other."""
    found = padded_reasons(model, rows_per_pack)
    if found:
        raise ValueError(f"{type(unwrap(model)).__name__} cannot be trained on a padded plan: {'; '.join(found)}")


def check_window(model, plan) -> None:
    """Raise ValueError when a document of the plan is longer than the model's window; a pack of several may be."""
    window = getattr(text_config(unwrap(model)), "max_position_embeddings", None)
    longest = int(plan.table.length.max())
    if window and longest > window:
        raise ValueError(
            f"a row has {longest} tokens and the window of this {type(unwrap(model)).__name__} is {window}: lower --capacity (rows are "
            f"then cut), or extend the model with --rope yarn --rope_factor {longest / window:.2f} (train.rope.extend_context)"
        )


def likely_causes(model, asked: dict, attention: str, documents) -> list[str]:
    """What in the call of a model usually makes the documents of a pack meet.

    Args:
        model: a transformers model.
        asked: keyword arguments that its forward got, ``input_ids`` among them.
        attention: the implementation it ran.
        documents: the pack's documents, in order.

    Returns:
        Sentences, the surest first; never empty.
    """
    causes = []
    mask, positions, ids = asked.get("attention_mask"), asked.get("position_ids"), asked["input_ids"]
    borders = asked.get("cu_seq_lens_q") is not None
    cached = asked.get("use_cache")
    cached = getattr(text_config(model), "use_cache", True) if cached is None else cached
    if attention in OWN_MASKS:
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            causes.append(f"a 2-D attention_mask was given{' (all ones)' if bool(mask.all()) else ''}: transformers then does not "
                          "look for documents in position_ids; leave it out")  # fmt: skip
        if positions is None:
            causes.append(f"no position_ids: {attention!r} knows documents by positions that restart"
                          + (" and ignores cu_seq_lens_q" if borders else ""))  # fmt: skip
        if cached:
            causes.append("use_cache is not False: with a cache transformers does not look for documents in position_ids")
    elif not borders and positions is None:
        causes.append(f"neither cu_seq_lens_q nor position_ids: {attention!r} cannot know the documents")
    elif not borders and attention.startswith("flash") and ids.shape[0] > 1:
        causes.append("flash attention reads documents from position_ids in batches of one line only")
    if positions is not None and position_errors(positions, ids, documents).max() > 0:
        causes.append("position_ids run on over the borders of documents: restart them at 0")
    if attention in OWN_MASKS and not causes:
        causes.append(f"{type(model).__name__} may not hand position_ids to transformers' masks (OPT, Falcon and GPT-OSS do not): "
                      f"try attention {NAME!r} with cu_seq_lens_q")  # fmt: skip
    causes += [f"the model itself: {reason}" for reason in reasons(model, attention)]
    window = getattr(text_config(model), "sliding_window", None)
    if window and window < max(map(len, documents)):
        causes.append(f"a sliding window of {window} tokens, which {attention!r} or the model's masks may treat differently in packs")
    return causes or [f"attention {attention!r} keeps no borders in this model, or one of its layers mixes tokens by itself"]


def position_errors(positions, ids, documents) -> np.ndarray:
    """How far, at most, the positions of each document are from 0, 1, 2 ...; positions [B or 1, T] (or one axis more), ids [B, T]."""
    flat = (positions if positions.ndim == 2 else positions[0]).expand(ids.shape).flatten().cpu()
    parts = flat[: sum(map(len, documents))].split([len(x) for x in documents])
    return np.array([(x - torch.arange(len(x))).abs().max().item() for x in parts])


def rope_types(model) -> set[str]:
    """The RoPE types of a model's rotary modules and configuration, such as {"default"} or {"default", "linear"}."""
    parameters = getattr(text_config(model), "rope_parameters", None) or {}
    several = [x for x in parameters.values() if isinstance(x, dict)]  # one a layer type
    types = {x.get("rope_type") for x in (several or [parameters])}
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        types |= set(kind.values()) if isinstance(kind, dict) else {kind}
    return {kind for kind in types if isinstance(kind, str)}


def text_config(model):
    """The configuration of the part of a model that writes text."""
    return model.config.get_text_config(decoder=True)


def unwrap(model):
    """The transformers model inside DDP, DeepSpeed (``module``) and PEFT (``get_base_model``) wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _alibi(model, config) -> bool:
    inner = getattr(config, "attn_config", None)
    named = getattr(config, "position_embedding_type", "") == "alibi" or type(model).__name__.startswith("Bloom")
    return named or bool(getattr(config, "alibi", False)) or bool(getattr(inner, "alibi", False))


def _looks_both_ways(model, config) -> bool:
    """Whether tokens see those behind them: by the configuration, or by a layer that reads the text and is no decoder's."""
    if type(model).__name__.startswith(NEVER_CAUSAL) or False in (getattr(config, "is_causal", True), getattr(config, "causal", True)):
        return True
    layers = [m for name, m in model.named_modules() if not (OTHER_SENSES.search(name) or BRIDGES.search(name) or isinstance(m, PreTrainedModel))]
    return any(getattr(m, "is_decoder", getattr(m, "is_causal", True)) is False for m in layers)


def _counts_positions_itself(model) -> bool:
    """RoBERTa and its kin: the table of positions has a row for padding, and the first token takes the row after it."""
    return any(isinstance(m, nn.Embedding) and m.padding_idx is not None and "position" in name for name, m in model.named_modules())
