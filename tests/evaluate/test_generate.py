import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longalign_lib.evaluate import generate
from longalign_lib.evaluate.generate import Greedy, fingerprint, window_of


def reference(model, tokenizer, ids, n):
    """transformers' own greedy search."""
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=n, pad_token_id=0
    )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def test_answers_equal_transformers_with_reuse_and_chunks(model, tokenizer):
    rng, greedy = random.Random(0), Greedy(model, tokenizer, chunk=37)
    shared, answers, reused = [rng.randrange(3, 900) for _ in range(300)], [], 0
    for cut in (0, 40, 40, 150, 290, 120, 300):
        ids = shared[:cut] + [rng.randrange(3, 900) for _ in range(20)]
        said = greedy.answer(ids, 12)
        assert said.text == reference(model, tokenizer, ids, 12)
        assert said.prompt_tokens == len(ids) and said.seconds > 0
        assert greedy.cache.get_seq_length() == len(greedy.held) >= len(ids)
        answers.append(said.text)
        reused += said.reused
    assert reused >= 40 + 40 + 150 + 120 + 120 and len(set(answers)) >= 5  # it did reuse, and answers differ


def test_same_prompt_twice_and_without_reuse(model, tokenizer):
    ids = list(range(5, 80))
    warm, cold = Greedy(model, tokenizer), Greedy(model, tokenizer, reuse_prefix=False)
    a, b, c = warm.answer(ids, 8), warm.answer(ids, 8), cold.answer(ids, 8)
    assert a.text == b.text == c.text and b.reused == len(ids) - 1
    assert cold.answer(ids, 8).reused == 0


def test_stops_at_end_token_and_counts(model, tokenizer):
    ids = list(range(5, 60))
    greedy = Greedy(model, tokenizer)
    long = greedy.answer(ids, 6)
    assert (long.tokens, long.finish) == (6, "length")
    greedy.ends = set(range(1500))
    assert (greedy.answer(ids, 6).tokens, greedy.answer(ids, 6).finish) == (0, "stop")


def test_length_dependent_rope_is_never_reused(make_model, tokenizer):
    model = make_model()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    greedy = Greedy(model, tokenizer, chunk=8)
    ids = list(range(5, 60))
    assert greedy.answer(ids, 3).reused == greedy.answer(ids, 3).reused == 0


BASE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
STATE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
FAMILIES = {
    "mamba": STATE | {"state_size": 8},
    "mamba2": STATE | {"state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": STATE | {"state_size": 8},
    "rwkv": STATE | {"attention_hidden_size": 32, "context_length": 512},
    "bamba": BASE | MAMBA | {"attn_layer_indices": [1]},
    "jamba": BASE | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False, "expert_layer_period": 2,
                     "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "recurrent_gemma": BASE | {"num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 32},
    "llama": BASE | {"max_position_embeddings": 40, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "phi3": BASE | {"original_max_position_embeddings": 48, "pad_token_id": 0, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4,
        "original_max_position_embeddings": 48}},
}  # fmt: skip


class Numbers:
    """A tokenizer that writes ids as they are."""

    eos_token_id = None

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, map(int, ids)))


def family(name):
    """A fresh random model whose answers depend on the whole prompt."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **FAMILIES[name])).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.25)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_as_a_fresh_model_does(name):
    rng = random.Random(1)
    shared = [rng.randrange(4, 97) for _ in range(44)]
    cuts = [(40, 10), (40, 5), (44, 1), (10, 33), (20, 20)]
    prompts = [shared[:cut] + [rng.randrange(4, 97) for _ in range(more)] for cut, more in cuts]
    # Phi-3's `generate` keeps keys of the short factors in transformers 5.17; without a cache there are none to keep
    wanted = [Numbers().decode(family(name).generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), do_sample=False, max_new_tokens=12,
                                                     pad_token_id=0, use_cache=name != "phi3")[0, len(p) :]) for p in prompts]  # fmt: skip
    assert len(set(wanted)) == len(prompts)
    model = family(name)
    for chunk in (4096, 7):  # the second after the first has been over the same, longer and shorter prompts
        greedy = Greedy(model, Numbers(), chunk=chunk)
        said = [greedy.answer(p, 12) for p in prompts]
        assert [a.text for a in said] == wanted and not sum(a.reused for a in said)


def test_a_cache_that_is_not_filled_is_told(model, tokenizer, monkeypatch):
    plain = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, past_key_values=None, **more: plain(self, **more))
    with pytest.raises(ValueError, match="does not fill the past_key_values"):
        Greedy(model, tokenizer).answer(list(range(5, 60)))


def test_a_failed_call_leaves_no_half_written_cache(model, tokenizer, monkeypatch):
    greedy, ids = Greedy(model, tokenizer, chunk=16), list(range(5, 90))
    good = greedy.answer(ids, 8)
    layer = model.model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError):
            greedy.answer(ids[:40] + ids, 8)
    assert greedy.answer(ids, 8).text == good.text and greedy.held[: len(ids)] == ids


def test_fingerprint_sees_weights_and_config_not_names(make_model, model):
    twin = make_model()
    twin.config._name_or_path = "elsewhere"
    assert fingerprint(model) == fingerprint(twin) != fingerprint(make_model(seed=1))
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.001)
    assert fingerprint(twin) != fingerprint(model) != fingerprint(make_model(window=4096))
    assert window_of(model) == 2048


def test_fingerprint_sees_every_single_weight(make_model, model, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 1000 * 8)  # several chunks, and a last one that is no whole word
    twin, wanted, rng = make_model(), fingerprint(model), random.Random(0)
    assert fingerprint(twin) == wanted
    for name, weight in twin.named_parameters():
        flat = weight.data.view(-1)
        for place in {0, len(flat) - 1, rng.randrange(len(flat))}:
            before = flat[place].item()
            flat[place] = torch.nextafter(flat[place], torch.tensor(9.0))  # the last bit of one number
            assert fingerprint(twin) != wanted, (name, place)
            flat[place] = before
        if weight.ndim == 2:  # rows that change places
            weight.data[[0, 1]] = weight.data[[1, 0]]
            assert fingerprint(twin) != wanted, name
            weight.data[[0, 1]] = weight.data[[1, 0]]
    assert fingerprint(twin) == wanted
    half = torch.arange(7, dtype=torch.bfloat16)  # 14 bytes: padded with zeros, read whatever the place in memory
    assert generate.checksum(half) == generate.checksum(torch.cat([half[:1], half])[1:]) != generate.checksum(half.flip(0))


def test_empty_prompt(model, tokenizer):
    with pytest.raises(ValueError, match="no tokens"):
        Greedy(model, tokenizer).answer([])
