"""RoPE formulas against transformers, and models rebuilt by them."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longalign_lib.train import rope

WINDOW = 64


def tiny_config(**changes):
    settings_ = dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    return LlamaConfig(**{**settings_, **changes})


@pytest.fixture()
def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


def logits(model, length=80, seed=0):
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 97, (1, length)))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("method", ["linear", "yarn"])
@pytest.mark.parametrize(
    "head_dim, theta, window, factor",
    [
        (64, 100_000.0, 8192, 2.0),
        (128, 10_000.0, 4096, 16.0),
        (128, 500_000.0, 8192, 3.5),
        (8, 100.0, 64, 2.0),
    ],
)
def test_formulas_are_those_of_transformers(method, head_dim, theta, window, factor):
    parameters = {"rope_type": method, "rope_theta": theta, "factor": factor}
    if method == "yarn":
        parameters["original_max_position_embeddings"] = window
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=int(window * factor),
        rope_parameters=parameters,
    )
    theirs, scale = ROPE_INIT_FUNCTIONS[method](config)
    ours = rope.inverse_frequencies(head_dim, theta, method, factor, window=window)
    np.testing.assert_allclose(ours, theirs.double().numpy(), rtol=2e-5)
    assert rope.attention_scale(method, factor) == pytest.approx(scale)
    assert not np.allclose(ours, rope.inverse_frequencies(head_dim, theta))  # the method did something


@pytest.mark.parametrize("theta", [10_000.0, 100_000.0])
def test_none_and_base_are_plain_rope(theta):
    for method, base in (("none", theta), ("base", theta * 200)):
        config = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": base})
        theirs = LlamaForCausalLM(config).model.rotary_emb.inv_freq.double().numpy()
        np.testing.assert_allclose(rope.inverse_frequencies(16, theta, method), theirs, rtol=2e-5)


def test_worked_example_by_hand():
    assert rope.inverse_frequencies(4, 100.0).tolist() == pytest.approx([1.0, 0.1])
    assert rope.wavelengths([1.0, 0.1]).tolist() == pytest.approx([2 * math.pi, 20 * math.pi])
    assert rope.attention_scale("yarn", 2.0) == pytest.approx(1 + 0.1 * math.log(2))
    assert rope.attention_scale("linear", 2.0) == rope.attention_scale("yarn", 1.0) == 1.0


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    plain = rope.inverse_frequencies(64, 100_000.0)
    yarn = rope.inverse_frequencies(64, 100_000.0, "yarn", 4.0, window=8192)
    turns = 8192 / rope.wavelengths(plain)
    fast, slow = turns > 40, turns < 0.9  # a margin of one index, as the ramp's ends are whole indices
    assert fast.sum() > 5 and slow.sum() > 5
    np.testing.assert_allclose(yarn[fast], plain[fast])
    np.testing.assert_allclose(yarn[slow], plain[slow] / 4)
    between = ~fast & ~slow
    assert between.any() and np.all(yarn[between] <= plain[between]) and np.all(yarn[between] >= plain[between] / 4)


@settings(max_examples=60, deadline=None)
@given(
    half=st.integers(2, 64),
    theta=st.floats(50, 1e7),
    factor=st.floats(1, 64),
    window=st.integers(256, 131_072),
    method=st.sampled_from(rope.METHODS),
)
def test_frequencies_fall_and_never_exceed_the_plain_ones(half, theta, factor, window, method):
    w = rope.inverse_frequencies(2 * half, theta, method, factor, window=window)
    assert w.shape == (half,) and np.all(np.diff(w) < 0) and np.all(w > 0)
    assert np.all(w <= rope.inverse_frequencies(2 * half, theta) * (1 + 1e-12))


@settings(max_examples=40, deadline=None)
@given(half=st.integers(2, 64), theta=st.floats(50, 1e7), factor=st.floats(1.01, 64))
def test_ntk_base_slows_the_slowest_pair_by_the_factor(half, theta, factor):
    b = rope.ntk_base_factor(factor, 2 * half)
    slow = (
        rope.inverse_frequencies(2 * half, theta)[-1]
        / rope.inverse_frequencies(2 * half, theta, "base", base_factor=b)[-1]
    )
    assert slow == pytest.approx(factor)


def test_unseen_angles_by_brute_force():
    window, longer = 256, 512
    plain = rope.inverse_frequencies(16, 10_000.0)
    for method, kwargs in (
        ("none", {}),
        ("linear", {"factor": 2.0}),
        ("base", {"base_factor": 2.0}),
        ("base", {"base_factor": 50.0}),
    ):
        new = rope.inverse_frequencies(16, 10_000.0, method, **kwargs)
        expected = []
        for w, v in zip(plain, new):
            seen = np.arange(window + 1) * w
            met = np.arange(longer + 1) * v
            whole_turn = seen.max() >= 2 * np.pi
            expected.append(not whole_turn and bool((met > seen.max() * (1 + 1e-9)).any()))
        assert rope.unseen_angles(new, plain, window, longer).tolist() == expected
        assert any(expected) is (method == "none" or kwargs == {"base_factor": 2.0})


def test_none_leaves_logits_identical_and_is_another_object(tiny):
    same = rope.extend_context(tiny)
    assert same is not tiny and torch.equal(logits(same), logits(tiny))
    assert same.config.max_position_embeddings == WINDOW


@pytest.mark.parametrize(
    "method, kwargs, theta", [("linear", {}, 100.0), ("yarn", {}, 100.0), ("base", {"base_factor": 10.0}, 1000.0)]
)
def test_rebuilt_model_equals_one_built_from_the_extended_config(tiny, method, kwargs, theta):
    before, plain_config = logits(tiny), copy.deepcopy(tiny.config.to_dict())
    longer = rope.extend_context(tiny, method, 2.0, **kwargs)
    oracle = LlamaForCausalLM(rope.extend_context(tiny.config, method, 2.0, **kwargs)).eval()
    oracle.load_state_dict(tiny.state_dict())
    assert torch.equal(logits(longer), logits(oracle))
    assert (logits(longer) - before).abs().max() > 1e-3  # it did change something
    assert torch.equal(logits(tiny), before) and tiny.config.to_dict() == plain_config  # and not the given model
    assert longer.config.max_position_embeddings == 2 * WINDOW and longer.config.rope_parameters["rope_theta"] == theta
    assert longer.model.rotary_emb.inv_freq.dtype == torch.float32 and not longer.training


def test_yarn_applies_its_attention_factor(tiny):
    longer = rope.extend_context(tiny, "yarn", 4.0)
    assert longer.model.rotary_emb.attention_scaling == pytest.approx(rope.attention_scale("yarn", 4.0))
    cos, sin = longer.model.rotary_emb(torch.zeros(1, 1, 1), torch.arange(9)[None])
    expected = rope.attention_scale("yarn", 4.0) ** 2
    np.testing.assert_allclose((cos**2 + sin**2).numpy(), expected, rtol=1e-5)


def test_extended_model_survives_save_and_load_without_warning(tiny, tmp_path, caplog):
    longer = rope.extend_context(tiny, "yarn", 1.7)  # 64 * 1.7 is no whole number
    assert longer.config.max_position_embeddings == 109
    longer.save_pretrained(tmp_path)
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        again = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert torch.equal(logits(again), logits(longer))
    assert again.config.rope_parameters["original_max_position_embeddings"] == WINDOW
    assert not [r for r in caplog.records if "rope" in r.getMessage().lower()]


def test_weights_are_shared_or_copied_and_ties_kept():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=True))
    shared = rope.extend_context(model, "yarn", 2.0)
    own = rope.extend_context(model, "yarn", 2.0, copy_weights=True)
    for other, same in ((shared, True), (own, False)):
        assert (other.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()) is same
        assert other.lm_head.weight is other.model.embed_tokens.weight
    with torch.no_grad():
        own.lm_head.weight.zero_()
    assert model.lm_head.weight.abs().sum() > 0


def test_bf16_model_keeps_float32_frequencies(tiny):
    longer = rope.extend_context(copy.deepcopy(tiny).to(torch.bfloat16), "linear", 2.0)
    assert longer.dtype == torch.bfloat16 and longer.model.rotary_emb.inv_freq.dtype == torch.float32


def test_other_architecture():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    model = Qwen2ForCausalLM(config).eval()
    longer = rope.extend_context(model, "yarn", 2.0)
    assert (logits(longer) - logits(model)).abs().max() > 1e-3


def test_a_document_reads_the_same_alone_and_beside_a_longer_one(tiny):
    longer = rope.extend_context(tiny, "yarn", 2.0)
    a, b = torch.arange(20) % 97, (torch.arange(100) * 7) % 97
    packed = torch.cat([a, b])[None]
    positions = torch.cat([torch.arange(20), torch.arange(100)])[None]
    with torch.no_grad():
        alone = longer(input_ids=a[None], use_cache=False).logits
        inside = longer(input_ids=packed, position_ids=positions, use_cache=False).logits[:, :20]
    torch.testing.assert_close(inside, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", rope.BATCH_DEPENDENT)
def test_batch_dependent_methods_are_refused_with_the_reason(tiny, kind):
    with pytest.raises(ValueError, match="largest position in the batch"):
        rope.extend_context(tiny, kind, 2.0)
    parameters = {"rope_type": kind, "rope_theta": 100.0, "factor": 2.0}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": WINDOW}
    config = tiny_config(rope_parameters=parameters, max_position_embeddings=2 * WINDOW)
    for method, factor in (("none", None), ("yarn", 2.0)):
        with pytest.raises(ValueError, match=f"{kind}.*largest position"):
            rope.extend_context(config, method, factor)
    # the reason is true: the same short text, with and without a long neighbour
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        alone = model(input_ids=ids, use_cache=False).logits
        long_positions = torch.stack([torch.arange(20), torch.arange(200, 220)])
        beside = model(input_ids=ids.repeat(2, 1), position_ids=long_positions, use_cache=False).logits[:1]
    assert (alone - beside).abs().max() > 1e-3


@pytest.mark.parametrize(
    "args, message",
    [
        (("ntk", 2.0), "'ntk' is not known: use one of none, linear, base, yarn"),
        (("none", 2.0), "factor=2.0 with method 'none'"),
        (("yarn", None), "factor=None with method 'yarn'"),
        (("yarn", 1.0), "above 1"),
        (("linear", 0.5), "above 1"),
        (("yarn", float("nan")), "above 1"),
    ],
)
def test_bad_arguments_name_the_offender(tiny, args, message):
    with pytest.raises(ValueError, match=message):
        rope.extend_context(tiny, *args)


def test_bad_models_and_numbers_are_refused(tiny):
    twice = rope.extend_context(tiny, "yarn", 2.0)
    with pytest.raises(ValueError, match="already rescaled"):
        rope.extend_context(twice, "linear", 2.0)
    with pytest.raises(TypeError, match="dict"):
        rope.extend_context({}, "yarn", 2.0)
    broken = copy.deepcopy(tiny)
    broken.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="no rotary module"):
        rope.extend_context(broken, "yarn", 2.0)
    for call, message in [
        (lambda: rope.inverse_frequencies(7, 100.0), "head_dim=7"),
        (lambda: rope.inverse_frequencies(8, 100.0, "linear", 0.5), "factor=0.5"),
        (lambda: rope.inverse_frequencies(8, 1.0), "theta=1.0"),
        (lambda: rope.yarn_ramp(8, 100.0, 64, 1.0, 32.0), "beta_slow=32.0"),
        (lambda: rope.ntk_base_factor(2.0, 2), "head_dim=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_rotary_of_its_own_kind_is_noticed(tiny):
    class Odd(type(tiny.model.rotary_emb)):
        def __init__(self, config):
            super().__init__(config)
            self.inv_freq = self.inv_freq * 0.5

    tiny.model.rotary_emb = Odd(tiny.config)
    with pytest.raises(RuntimeError, match="other frequencies"):
        rope.extend_context(tiny, "yarn", 2.0)
