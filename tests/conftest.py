"""Shared fixtures: a tiny random Llama, the default tokenizer and model, and no connection beyond this machine."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
_reached: list[str] = []


def _audit(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) and not str(args[1][0]).startswith(("127.", "::1", "localhost")):
        _reached.append(f"{event} {args[1][0]}")
    elif event == "socket.getaddrinfo" and args[0] not in (None, "", "localhost", "127.0.0.1", "::1", os.uname().nodename):
        _reached.append(f"{event} {args[0]}")


sys.addaudithook(_audit)


@pytest.fixture(autouse=True)
def no_network():
    """Fail the test during which anything reached beyond loopback."""
    yield
    found = list(_reached)  # fixtures of any scope that ran before this test count too
    _reached.clear()
    assert not found, f"reached for the network: {found}"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def load_bench():
    """name -> benchmarks/NAME.py as a module NAME_bench, so that it shadows nothing; files beside it are not on the path."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"{name}_bench", ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def tiny_model():
    """A random two-layer Llama with grouped key heads, float64, vocabulary 97."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="session")
def tokenizer():
    """The default model's tokenizer."""
    from longalign_lib.models import load_tokenizer

    return load_tokenizer()
