"""Run a model for a look, and leave it as it was: batches of random documents, recorded calls, switched attention.

Invariant of `as_before`: training flags, attention, rotary tables and random generators are the same afterwards, also after an
error. Cost: none beside the runs themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from longalign_lib.train import attention as packed
from longalign_lib.train.collate import collate
from longalign_lib.train.families import reasons, text_config

NOT_INPUTS = ("labels", "loss_weights", "inverse_targets", "pack")  # what a batch of ours holds beside a model's inputs


def random_tokens(model, n: int, rng: np.random.Generator, avoid=None) -> torch.Tensor:
    """n ordinary tokens, none of the special ones that the configuration names; int64[n], different from `avoid` everywhere."""
    special = {v for c in (text_config(model), model.config) for k, v in vars(c).items() if k.endswith("token_id") and isinstance(v, int)}
    table = model.get_input_embeddings().weight
    usable = np.setdiff1d(np.arange(table.shape[0]), list(special))
    ids = rng.choice(usable, n)
    if avoid is not None:
        same = ids == avoid.cpu().numpy()
        ids[same] = usable[(np.searchsorted(usable, ids[same]) + 1) % len(usable)]
    return torch.as_tensor(ids, device=table.device)


def pack_inputs(documents) -> dict:
    """This library's own batch of documents: the keys of `collate` that a model reads, with ``use_cache=False``."""
    lengths = [len(x) for x in documents]
    lines = pd.DataFrame({"offset": np.cumsum([0, *lengths[:-1]]), "row": range(len(lengths)), "start": 0, "length": lengths})
    batch = collate(lines, [(x.cpu().numpy(), x.cpu().numpy()) for x in documents])
    return model_inputs(batch, documents[0].device) | {"use_cache": False}


def model_inputs(batch: dict, device) -> dict:
    """A batch without labels and weights, on a device."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k not in NOT_INPUTS}


def document_lengths(batch: dict) -> list[int]:
    """Tokens of each document of a batch, from its ``cu_seq_lens_q`` or from ``position_ids`` that restart.

    Raises:
        ValueError: neither tells more than one document.
    """
    borders = batch.get("cu_seq_lens_q")
    if borders is None and batch.get("position_ids") is not None:
        positions = batch["position_ids"].expand(batch["input_ids"].shape)
        begins = F.pad(positions.diff(dim=1) != 1, (1, 0), value=True).flatten().nonzero().flatten()
        borders = F.pad(begins, (0, 1), value=positions.numel())
    if borders is None or len(borders) < 3:
        raise ValueError(
            f"a batch of {', '.join(sorted(batch))} does not tell two documents (no cu_seq_lens_q, no position_ids that restart); "
            "give lengths=[...], tokens a document in the order of the lines"
        )
    return torch.as_tensor(borders).diff().tolist()


def rebuild(batch: dict) -> Callable:
    """A maker of batches like this one with other documents in it."""

    def build(documents) -> dict:
        ids = batch["input_ids"].clone()
        tokens = torch.cat(list(documents))
        ids.view(-1)[: len(tokens)] = tokens
        return batch | {"input_ids": ids}

    return build


def switch(model, name: str) -> None:
    """Set the attention; ValueError where the model would ignore that."""
    if name == packed.NAME:
        packed.register()
    if name != text_config(model)._attn_implementation and not model._can_set_attn_implementation():
        raise ValueError(f"{type(model).__name__} cannot be switched to attention {name!r}: {'; '.join(reasons(model, packed.NAME))}")
    model.set_attn_implementation(name)


@contextlib.contextmanager
def switched(model, name: str):
    """Another attention for a while; models that ignore the choice keep their own."""
    before = text_config(model)._attn_implementation
    able = model._can_set_attn_implementation()
    if able:
        switch(model, name)
    try:
        yield
    finally:
        if able:
            switch(model, before)


@contextlib.contextmanager
def as_before(model):
    """Evaluation mode with gradients; at the end everything is as it was (see the module's head)."""
    device = next(model.parameters()).device
    flags = [(m, m.training) for m in model.modules()]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation_internal")}
    used = [(c, c._attn_implementation_internal) for c in configs.values()]
    rotary = [(m, dict(vars(m)), {k: (v, v.clone()) for k, v in m._buffers.items()}) for m in model.modules() if hasattr(m, "rope_type")]
    model.eval()
    kind = {} if device.type == "cpu" else {"device_type": device.type}
    try:
        with torch.random.fork_rng([device] if kind else [], **kind), torch.enable_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        for config, name in used:
            config._attn_implementation_internal = name
        for module, attributes, buffers in rotary:
            vars(module).clear()
            vars(module).update(attributes, _buffers={name: table.copy_(was) for name, (table, was) in buffers.items()})


@contextlib.contextmanager
def recorded(model, seen: dict):
    """Keep in `seen` the arguments of the model's last call, positional ids under ``input_ids``."""

    def record(module, args, kwargs):
        seen.clear()
        seen.update(kwargs, **({"input_ids": args[0]} if args else {}))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def caught_embeddings(model):
    """Yield a list that receives the next call's input embeddings as a leaf: gradients stop and can be read there."""
    caught = []

    def catch(module, args, out):
        if not caught and out.ndim == 3:
            caught.append(out.detach().requires_grad_())
            return caught[0].clone()  # models may write into it
        return None

    handle = model.get_input_embeddings().register_forward_hook(catch)
    try:
        yield caught
    finally:
        handle.remove()
