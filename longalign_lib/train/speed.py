"""Faster steps without touching a model's file: compile its decoder layers, one by one.

A decoder layer is small arithmetic between large products: norms, rotations, gates, each a pass over memory and a launch.
``torch.compile`` fuses them. Layer by layer it compiles in seconds (all layers share one compilation), leaves the head and the
loss alone (`chunked.head_losses` replaces them), and goes along with gradient checkpointing, DDP and DeepSpeed, which wrap whole
modules. Documents of a pack stay apart: the attention kernel is one opaque call inside the compiled layer.

It pays on a GPU, most where steps are bound by launches (packs under 16k tokens). Packs differ in length: the second length
met compiles once more for all lengths.
"""

from __future__ import annotations

from torch import nn


def decoder_layers(model) -> nn.ModuleList:
    """The model's longest list of equal layers; ValueError when it has none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1 and len(m) > 0]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers of one type: compile it as a whole, or not at all")
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def compile_layers(model, **options) -> int:
    """Compile every decoder layer in place; returns how many.

    Args:
        model: a causal language model, before it is wrapped by DDP or DeepSpeed.
        options: for ``torch.nn.Module.compile``, such as ``mode="max-autotune-no-cudagraphs"``.
    """
    layers = decoder_layers(model)
    for layer in layers:
        layer.compile(**options)
    return len(layers)
