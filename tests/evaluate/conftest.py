"""A tiny random model and two toy tokenizers of different kinds, for tests of evaluation without the real model."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longalign_lib.evaluate import needle

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def toy_tokenizer(kind: str, text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE ("bytes"), or a BPE on words joined by U+2581 like Llama's ("words"); both add a BOS."""
    specials = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        core, split = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=specials, initial_alphabet=split.alphabet(), show_progress=False
        )
        core.decoder = decoders.ByteLevel()
    else:
        core, split = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True)), pre_tokenizers.Metaspace()
        fallback = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=specials + fallback, show_progress=False)
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    core.pre_tokenizer = split
    core.train_from_iterator([text[:60_000]], trainer)
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(autouse=True)
def one_thread():
    """Two tiny layers gain nothing from threads, and threads that wait for a busy core cost seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def hay() -> str:
    return needle.default_haystack(0)


@pytest.fixture(scope="session", params=["bytes", "words"])
def any_tokenizer(request, hay):
    return toy_tokenizer(request.param, hay)


@pytest.fixture(scope="session")
def tokenizer(hay):
    return toy_tokenizer("bytes", hay)


def tiny_model(seed: int = 0, window: int = 2048) -> LlamaForCausalLM:
    """Two layers, float32, random weights that are large enough for the answers to differ from prompt to prompt."""
    config = LlamaConfig(
        vocab_size=1500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=window, initializer_range=0.5, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    torch.random.set_rng_state(state)
    return model


@pytest.fixture(scope="session")
def make_model():
    return tiny_model


@pytest.fixture(scope="session")
def model():
    return tiny_model()
