"""Fixtures of the training tests: a pack of random documents, and a folder with a tiny model and a store."""

import numpy as np
import pandas as pd
import pytest
import torch

from longalign_lib.data.tokens import TokenStore
from longalign_lib.train.loss import IGNORE


@pytest.fixture(scope="session")
def pack_of():
    """A function (lengths) -> a store of random rows and the plan lines of one pack that holds them all."""

    def make(lengths, seed=0, vocab=97):
        rng = np.random.default_rng(seed)
        ids = [rng.integers(0, vocab, n) for n in lengths]  # token 0 is an ordinary token
        store = [(x, np.where(np.arange(len(x)) >= len(x) // 2, x, IGNORE)) for x in ids]
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        return store, pd.DataFrame({"offset": offsets, "row": range(len(lengths)), "length": lengths})

    return make


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A tiny random Llama with the default tokenizer (``model``), and a store of 60 random rows (``data``)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from longalign_lib.models import load_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("run"), load_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=512, pad_token_id=2, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 60)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    mask = rng.random(starts[-1]) < 0.4
    mask[starts[:-1] + 2] = True
    TokenStore(rng.integers(3, 500, starts[-1]).astype(np.int32), mask, starts, [{} for _ in lengths]).save(folder / "data")
    return folder
