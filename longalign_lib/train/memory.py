"""How much memory will a run take, on every GPU and on the host? Arithmetic over a model's sizes, checked against measured peaks.

    states       bytes a parameter: with DeepSpeed in bf16 weights 2, gradients 2, float32 masters and Adam's two moments 12;
                 under plain autocast weights 4, gradients 4, moments 8, and a 16-bit copy of what is in use. ZeRO divides by
                 the ranks: stage 1 the 12, stage 2 the gradients too, stage 3 the weights too. Offloading the optimizer moves
                 the 12 and the gradients to the host, where they are float32 (4); offloading the parameters moves the weights
    activations  bytes a token and layer of a Llama-like layer with fused attention: 24 h + 6 k + 8 f (h hidden size, k width
                 of the keys, f of the feed-forward layer), all of it for every layer; with recomputation 2 h for every layer
                 and the whole once
    logits       of a chunk of positions, in 16 and 32 bits with their gradient; with recomputation only what goes beyond a layer

Not in it: fragmentation, NCCL buffers, the CUDA context (0.5 to 1 GiB), the host's pinned buffers (DeepSpeed's own estimate
adds half again for them). Against peaks recorded on an H100, none of which offload, it is within a quarter; with offloading
the states are those of DeepSpeed's estimator (tests/train/test_memory.py).
"""

from __future__ import annotations

GIB = 2**30


def parameters(config) -> int:
    """Weights of a Llama-like model from its config, embedding and head included (one matrix when tied)."""
    h, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or h // config.num_attention_heads
    wide = config.num_attention_heads * head_dim
    kv = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim
    layer = 2 * h * wide + 2 * h * kv + 3 * h * config.intermediate_size + 2 * h
    ends = config.vocab_size * h * (1 if getattr(config, "tie_word_embeddings", False) else 2)
    return layers * layer + ends + h


def estimate(config, tokens: int, *, ranks: int = 1, zero_stage: int | None = None, offload_optimizer: bool = False,
             offload_parameters: bool = False, recompute: bool = True, logits_chunk: int = 2048) -> dict:  # fmt: skip
    """Peak memory of training on packs of ``tokens`` tokens, in GiB.

    Args:
        config: a Hugging Face config of a Llama-like model.
        tokens: tokens of the largest pack (slots, padding included).
        ranks: GPUs.
        zero_stage: 0 to 3 with DeepSpeed in bf16; None is plain or DDP training under bf16 autocast.
        offload_optimizer, offload_parameters: whether ZeRO keeps them in host memory.
        recompute: gradient checkpointing.
        logits_chunk: positions whose logits exist at a time.

    Returns:
        weights, gradients, optimizer, activations, logits, total (a GPU), host (all ranks of one host together).

    Raises:
        ValueError: a stage that is not 0..3 or None, or offloading without a stage that does it.
    """
    if zero_stage not in (None, 0, 1, 2, 3):
        raise ValueError(f"zero_stage {zero_stage!r} is not 0, 1, 2, 3 or None")
    if (offload_parameters and zero_stage != 3) or (offload_optimizer and not zero_stage):
        raise ValueError(f"offloading the {'parameters needs ZeRO-3' if offload_parameters else 'optimizer needs ZeRO'}, not {zero_stage}")
    n, h, layers = parameters(config), config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or h // config.num_attention_heads
    kv = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim
    stage = zero_stage or 0
    plain = zero_stage is None
    weights = n * (6 if plain else 2) / (ranks if stage == 3 else 1)
    gradients = n * (4 if plain else 2) / (ranks if stage >= 2 else 1)
    optimizer = n * (8 if plain else 12) / (ranks if stage >= 1 else 1)
    host = 0.0
    if stage == 3:  # what is collected for the layer at hand
        weights += 2 * (n / layers) * 2
    if offload_optimizer:
        host, optimizer, gradients = host + (12 + 4) * n, 0.0, 0.0
    if offload_parameters:
        host, weights = host + 2 * n, 2 * (n / layers) * 2
    whole = tokens * (24 * h + 6 * kv + 8 * config.intermediate_size)
    activations = tokens * 2 * h * layers + whole if recompute else whole * layers
    logits = min(tokens, logits_chunk) * config.vocab_size * 10
    logits = max(0, logits - whole) if recompute else logits  # never there while a layer is being recomputed
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": activations, "logits": logits}
    return {k: v / GIB for k, v in parts.items()} | {"total": sum(parts.values()) / GIB, "host": host / GIB}
