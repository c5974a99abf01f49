"""The leak test finds every leak that is planted, passes stock models that keep packs apart, and leaves no trace.

`FAMILIES` are tiny random models with large weights, so that windows, soft caps, sinks and RoPE matter in the logits: the oracle is
transformers' own eager attention on every document alone.
"""

import copy
import random

import numpy as np
import pytest
import torch
import transformers as hf

from longalign_lib.train import attention, families, probe
from longalign_lib.train.leak import CHECKS, LeakError, check_no_leak

SIZE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = ["sliding_attention", "full_attention"]
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
          "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
          "moe_intermediate_size": 16, "first_k_dense_replace": 1}  # fmt: skip
FAMILIES = {  # name: (class stem, settings beside SIZE)
    "Llama": ("Llama", {}),
    "Llama, YaRN": ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                                  "original_max_position_embeddings": 64}}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "Qwen3": ("Qwen3", HEAD),
    "Qwen3-MoE": ("Qwen3Moe", HEAD | EXPERTS),
    "Mistral, window": ("Mistral", {"sliding_window": 4}),
    "Qwen2-MoE, window": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 16, "use_sliding_window": True, "sliding_window": 4,
                                                 "max_window_layers": 2}),
    "PhiMoE, window": ("Phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Gemma 2": ("Gemma2", HEAD | {"sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 1}),
    "Gemma 3": ("Gemma3", HEAD | {"sliding_window": 4, "layer_types": LOCAL, "query_pre_attn_scalar": 1}),
    "Phi-3, window": ("Phi3", {"sliding_window": 4}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "OLMo 2": ("Olmo2", {}),
    "Granite": ("Granite", {"attention_multiplier": 0.5}),
    "StableLM": ("StableLm", {}),
    "Cohere": ("Cohere", {"logit_scale": 1.0}),
    "Cohere 2": ("Cohere2", HEAD | {"sliding_window": 4, "layer_types": LOCAL}),
    "GLM-4": ("Glm4", HEAD),
    "SmolLM3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "DeepSeek-V3": ("DeepseekV3", LATENT),
    "GPT-OSS": ("GptOss", HEAD | {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": LOCAL}),
    "OPT": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "GPT-2": ("GPT2", GPT2),
}  # fmt: skip
STOCK_LEAKS = {"GPT-OSS", "OPT"}  # their forward does not hand position_ids to the mask, in transformers 5.17 and 5.23
RECURRENT = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2,
             "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}
LONG = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}  # fmt: skip
REFUSED = {  # name: (class stem, settings, what the refusal says, whether packs leak on this machine when tried all the same)
    "Llama, dynamic RoPE": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}, "dynamic RoPE", True),
    "Phi-3, longrope": ("Phi3", {"rope_parameters": LONG, "max_position_embeddings": 32, "original_max_position_embeddings": 8}, "longrope RoPE", True),
    "Qwen3-Next": ("Qwen3Next", HEAD | EXPERTS | RECURRENT, "'linear_attention'.*Conv1d, Qwen3NextGatedDeltaNet", None),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, "'conv'.*Lfm2ShortConv", True),
    "Mamba": ("Mamba", {"state_size": 4}, "MambaMixer", True),
    "Jamba": ("Jamba", {"num_experts": 2, "use_mamba_kernels": False, "attn_layer_offset": 1, "attn_layer_period": 2,
                        "mamba_d_state": 4}, "JambaMambaMixer", True),
    "RWKV": ("Rwkv", {"attention_hidden_size": 32}, "ignore 'longalign'.*RwkvSelfAttention", None),
    "Bloom": ("Bloom", {"n_layer": 2, "n_head": 4}, "ALiBi.*no AttentionInterface", None),
    "MPT": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, "ALiBi.*no AttentionInterface", None),
    "Falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "no AttentionInterface", None),
    "Falcon, ALiBi": ("Falcon", {"alibi": True}, "ALiBi.*no AttentionInterface", None),
    "Doge": ("Doge", {}, "prepare_dynamic_mask", None),
    "Llama 4": ("Llama4", HEAD | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4,
                                  "layer_types": ["chunked_attention", "full_attention"]}, "'chunked_attention'", None),
}  # fmt: skip


def tiny(stem: str, settings: dict, seed: int = 0, dtype=torch.float32):
    """A random model in which attention matters; its causal class is `stem`ForCausalLM."""
    config_name = next(n for n in (f"{stem}TextConfig", f"{stem}Config") if hasattr(hf, n))
    class_name = next(n for n in (f"{stem}LMHeadModel", f"{stem}ForCausalLM") if hasattr(hf, n))
    torch.manual_seed(seed)
    size = {} if stem == "GPT2" else {k: v for k, v in SIZE.items() if not (k == "intermediate_size" and stem in ("Mamba", "OPT"))}
    return getattr(hf, class_name)(getattr(hf, config_name)(**size | settings)).to(dtype).eval()


def failed(report) -> set:
    return set(report.check[~report.passed])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def llama():
    return tiny("Llama", {}, dtype=torch.float64)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_packs_apart_under_longalign(name):
    model = tiny(*FAMILIES[name])
    model.set_attn_implementation(attention.register())
    families.refuse(model)
    report = check_no_leak(model)
    assert set(report.check) == set(CHECKS) and len(report) == 4 + 12 + 12 + 4 + 1
    assert report.movement[report.check.isin(["logits", "alone"])].max() < 1e-5


OWN_MASKS = [(name, backend) for name in FAMILIES if name not in STOCK_LEAKS for backend in ("sdpa", "eager")]


@pytest.mark.parametrize("name, backend", [x for x in OWN_MASKS if x != ("Gemma 2", "sdpa")])
def test_families_keep_packs_apart_with_transformers_own_masks(name, backend):
    """position_ids that restart and use_cache=False, the one way that works without kernels of documents."""
    check_no_leak(tiny(*FAMILIES[name]), attention=backend)


def test_sdpa_without_the_soft_cap_of_gemma_2_is_found_out():
    """transformers 5.23 refuses it, 5.17 ignores the soft cap: then every document differs from itself under eager attention."""
    with pytest.raises((ValueError, LeakError), match=r"does not support an attention|softcap|differs from itself alone") as error:
        check_no_leak(tiny(*FAMILIES["Gemma 2"]), attention="sdpa")
    assert not isinstance(error.value, LeakError) or failed(error.value.report) == {"alone", "parameters"}


@pytest.mark.parametrize("name", STOCK_LEAKS)
def test_families_whose_own_masks_know_no_documents_are_caught(name):
    with pytest.raises(LeakError, match="may not hand position_ids to transformers' masks") as error:
        check_no_leak(tiny(*FAMILIES[name]), attention="eager")
    assert failed(error.value.report) == {"logits", "gradients", "alone", "parameters"}


@pytest.mark.parametrize("name", ["Qwen2, window", "Gemma 2", "GPT-OSS", "GPT-2", "Gemma 3"])
def test_what_the_families_are_chosen_for_matters(name, monkeypatch):
    """Without its window, soft cap, sinks or restarting positions the packed model differs from itself alone."""
    drop = {"Qwen2, window": "sliding_window", "Gemma 3": "sliding_window", "Gemma 2": "softcap", "GPT-OSS": "s_aux"}.get(name)
    whole = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", lambda *a, **k: whole(*a, **{x: y for x, y in k.items() if x != drop}))
    if drop == "sliding_window":  # and its note
        monkeypatch.setattr(attention, "mask_for", lambda **kwargs: None)
    build = probe.pack_inputs if drop else lambda d: probe.pack_inputs(d) | {"position_ids": torch.arange(sum(map(len, d)))[None]}
    report = check_no_leak(tiny(*FAMILIES[name]), attention="longalign", make_batch=build, raise_error=False)
    monkeypatch.undo()
    attention.register()
    assert failed(report) == {"alone", "parameters"} | ({"positions"} if not drop else set())
    assert report.movement[report.check == "alone"].max() > 0.01


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_refused_with_the_reason(name):
    stem, settings, message, leaks = REFUSED[name]
    model = tiny(stem, settings)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(attention.register())
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot keep documents of a pack apart.*{message}.*padded plan"):
        families.refuse(model)
    if leaks:  # and rightly so
        with pytest.raises(LeakError, match="the model itself: its"):
            check_no_leak(model)


def test_a_model_that_was_not_switched_is_refused(llama):
    with pytest.raises(ValueError, match="runs attention 'sdpa', not 'longalign'"):
        families.refuse(llama)
    with pytest.raises(ValueError, match=r"FalconForCausalLM cannot be switched to attention 'longalign'.*no AttentionInterface"):
        check_no_leak(tiny("Falcon", {}), attention="longalign")
    encoder = hf.BertLMHeadModel(hf.BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    assert "looks both ways" in families.reasons(encoder)[0]
    assert "encoder-decoder" in families.reasons(hf.T5ForConditionalGeneration(hf.T5Config(
        vocab_size=97, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)))[0]  # fmt: skip


def only(*keys, **more):
    """A collator that hands over some keys of ours, and others."""
    return lambda documents: {k: v for k, v in probe.pack_inputs(documents).items() if k in ("input_ids", *keys)} | more


def running_on(documents):
    return probe.pack_inputs(documents) | {"position_ids": torch.arange(sum(map(len, documents)))[None]}


def ones(documents):
    ids = torch.cat(documents)[None]
    return only("position_ids", "use_cache", attention_mask=torch.ones_like(ids))(documents)


TRAPS = {  # name: (attention, collator, checks that fail, cause)
    "use_cache": ("sdpa", only("position_ids"), "logits gradients alone parameters", "use_cache is not False"),
    "use_cache, eager": ("eager", only("position_ids"), "logits gradients alone parameters", "use_cache is not False"),
    "all ones": ("sdpa", ones, "logits gradients alone parameters", r"attention_mask was given \(all ones\).*leave it out"),
    "borders alone": ("sdpa", only("cu_seq_lens_q", "max_length_q", "use_cache"), "positions logits gradients alone parameters",
                      "no position_ids: 'sdpa' knows documents by positions that restart and ignores cu_seq_lens_q"),
    "nothing": ("longalign", only(), "positions logits gradients alone parameters", "neither cu_seq_lens_q nor position_ids"),
    "running on": ("sdpa", running_on, "positions logits gradients alone parameters", "position_ids run on over the borders"),
    "running on, borders": ("longalign", running_on, "positions", "position_ids run on over the borders"),  # RoPE does not mind
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_caught_and_named(llama, name):
    backend, collator, checks, cause = TRAPS[name]
    with pytest.raises(LeakError, match=rf"(?s)LlamaForCausalLM with attention '{backend}', float64.*likely causes:\n  - .*{cause}") as error:
        check_no_leak(llama, attention=backend, make_batch=collator)
    assert failed(error.value.report) == set(checks.split())
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", TRAPS)
def test_the_same_traps_by_the_callers_own_batch_and_forward(llama, name):
    backend, collator, checks, _ = TRAPS[name]
    documents = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (6, 8, 3)]
    mine = collator(documents) | {"labels": torch.cat(documents)[None]}
    llama.set_attn_implementation(attention.register() if backend == "longalign" else backend)
    report = check_no_leak(llama, mine, lengths=[6, 8, 3], forward=lambda m, b: m(**b).logits, raise_error=False)
    assert failed(report) == set(checks.split()) and report.attrs["causes"]
    healed = probe.pack_inputs(documents)
    assert check_no_leak(llama, healed).passed.all() and not check_no_leak(llama, healed).attrs["causes"]


def test_positions_alone_are_enough_for_longalign(llama):
    assert check_no_leak(llama, attention="longalign", make_batch=only("position_ids")).passed.all()


def test_lines_of_several_documents(llama):
    """Two lines of a batch, cut by positions; the second ends in padding that belongs to no document."""
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1]])
    batch = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert probe.document_lengths(batch) == [4, 5, 7, 2]
    for backend in ("longalign", "sdpa"):
        assert check_no_leak(llama, batch, attention=backend).passed.all()
        assert check_no_leak(llama, batch, attention=backend, lengths=[4, 5, 7]).seen_in.isin([0, 1, 2]).sum() == 6 + 6 + 3 + 3


def leaking(gradient_only: bool):
    """A forward that lets document 1 see document 0, by a hair or in its gradient only."""

    def forward(model, batch):
        caught = []
        handle = model.get_input_embeddings().register_forward_hook(lambda m, i, o: caught.append(o))
        logits = model(**batch).logits
        handle.remove()
        extra = caught[0][0, 0].sum()
        extra = (extra - extra.detach() if gradient_only else extra.detach()) * 1e-3
        return torch.cat([logits[:, :9], logits[:, 9:10] + extra, logits[:, 10:]], dim=1)

    return forward


def test_one_token_that_sees_a_neighbour_is_enough(llama):
    report = check_no_leak(llama, attention="longalign", forward=leaking(False), checks=("logits", "gradients"), raise_error=False)
    bad = report[~report.passed]
    assert bad[["check", "changed", "seen_in"]].to_numpy().tolist() == [["logits", 0, 1]]


def test_a_leak_of_gradients_only(llama):
    # cross entropy does not feel a shift of all logits of a token, so shift some of them
    def forward(model, batch):
        logits = leaking(True)(model, batch)
        return torch.cat([logits[..., :50], logits[..., 50:].detach()], dim=-1)

    report = check_no_leak(llama, attention="longalign", forward=forward, checks=("logits", "gradients"), raise_error=False)
    bad = report[~report.passed]
    assert bad[["check", "changed", "seen_in"]].to_numpy().tolist() == [["gradients", 0, 1]]


def test_gradients_that_are_lost_are_caught(llama):
    """The pack's logits are right, but a layer's gradient is not the documents' own."""
    report = check_no_leak(llama, attention="longalign", forward=lambda m, b: m(**b).logits * 0.5 + m(**b).logits.detach() * 0.5,
                           raise_error=False)  # fmt: skip
    assert failed(report) == {"parameters"}
    assert report.movement[report.check == "parameters"].item() == pytest.approx(1, rel=1e-4)  # half is missing, as much is left


def test_what_is_not_a_number_does_not_pass(llama):
    def forward(model, batch):
        logits = model(**batch).logits
        return torch.where(torch.arange(29)[:, None] < 9, logits, torch.nan)

    report = check_no_leak(llama, attention="longalign", forward=forward, checks=("alone",), raise_error=False)
    assert report.passed.tolist() == [True, False, False, False]
    with pytest.raises(LeakError, match="differs from itself alone by nan"):
        check_no_leak(llama, attention="longalign", forward=forward, checks=("alone",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_pass_and_still_show_leaks(dtype):
    model = tiny("Llama", {}, dtype=dtype)
    assert check_no_leak(model, attention="longalign").passed.all()
    assert {"logits", "gradients", "alone"} <= failed(check_no_leak(model, attention="longalign", make_batch=only(), raise_error=False))


@pytest.mark.parametrize("name", ["Llama, dynamic RoPE", "Phi-3, longrope"])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails, name):
    """Also for models whose rotary table changes with what it reads, and after an error."""
    stem, settings, *_ = REFUSED[name]
    model = tiny(stem, settings | {"attention_dropout": 0.3}).train()
    model.model.layers[0].eval()
    model.set_attn_implementation("eager")
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    weights = copy.deepcopy(model.state_dict())
    rotary = {k: v for k, v in vars(model.model.rotary_emb).items() if isinstance(v, (int, float, str))}
    tables = {k: (id(v), v.clone()) for k, v in model.model.rotary_emb.named_buffers()}
    gradients = {k: p.grad.clone() for k, p in model.named_parameters()}
    flags = [m.training for m in model.modules()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)

    def forward(m, batch):
        torch.rand(3)
        if fails and not torch.is_grad_enabled() and len(calls) == 2:
            raise KeyError("the caller's own error")
        calls.append(1)
        return m(**batch).logits

    calls = []
    if fails:
        with pytest.raises(KeyError, match="own error"):
            check_no_leak(model, attention="longalign", forward=forward)
    else:
        report = check_no_leak(model, attention="longalign", forward=forward, raise_error=False)
        assert failed(report) >= {"alone"}
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert [m.training for m in model.modules()] == flags and model.config._attn_implementation == "eager"
    assert all(torch.equal(p.grad, gradients[k]) for k, p in model.named_parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert {k: v for k, v in vars(model.model.rotary_emb).items() if isinstance(v, (int, float, str))} == rotary
    now = dict(model.model.rotary_emb.named_buffers())
    assert {k: id(v) for k, v in now.items()} == {k: i for k, (i, _) in tables.items()}
    assert all(torch.equal(now[k], v) for k, (_, v) in tables.items())
    assert not model._forward_pre_hooks and not model.get_input_embeddings()._forward_hooks


def test_wrapped_models(llama):
    wrapped = torch.nn.Module()
    wrapped.module = llama
    assert check_no_leak(wrapped, attention="longalign").passed.all()
    assert families.unwrap(wrapped) is llama
    llama.set_attn_implementation(attention.register())
    assert families.refuse(wrapped) is None


@pytest.mark.parametrize(
    "call, message",
    [({"checks": ("logits", "gradient")}, r"checks \['gradient'\] are none of positions, logits"),
     ({"checks": ()}, "none of positions"),
     ({"lengths": [12]}, "a leak needs two documents, got lengths \\[12\\]"),
     ({"batch": {"input_ids": torch.ones(1, 9, dtype=torch.long)}}, "a batch of input_ids does not tell two documents"),
     ({"batch": {"input_ids": torch.ones(1, 9, dtype=torch.long), "position_ids": torch.arange(9)[None]}}, "give lengths"),
     ({"make_batch": lambda d: probe.pack_inputs(d[::-1])}, "do not begin with the documents end to end"),
     ({"forward": lambda m, b: m(**b).logits[:, -1:]}, r"logits of all 29 tokens \[B, T, V\], got torch.Size\(\[1, 1, 97\]\)"),
     ({"forward": lambda m, b: 3}, "got <class 'int'>"),
     ({"forward": lambda m, b: m(input_ids=torch.ones(1, 29, dtype=torch.long)).logits}, "changing document 0 changed not even its own")],
)  # fmt: skip
def test_bad_calls_are_explained(llama, call, message):
    with pytest.raises(ValueError, match=message):
        check_no_leak(llama, **call)


def test_frozen_parameters_are_said(llama):
    llama.requires_grad_(False)
    report = check_no_leak(llama, attention="longalign", checks=[c for c in CHECKS if c != "parameters"])
    assert report.passed.all()
    with pytest.raises(ValueError, match="leave 'parameters' out of checks"):
        check_no_leak(llama, attention="longalign")
    llama.model.norm.weight.requires_grad_(True)
    assert check_no_leak(llama, attention="longalign").seen_in.iloc[-1] == "model.norm.weight"


def test_random_tokens_are_ordinary_and_differ():
    model = tiny("Llama", {"vocab_size": 8})
    rng = np.random.default_rng(0)
    ids = probe.random_tokens(model, 400, rng)
    assert set(ids.tolist()) == {3, 4, 5, 6, 7}
    other = probe.random_tokens(model, 400, rng, avoid=ids)
    assert set(other.tolist()) == {3, 4, 5, 6, 7} and not (ids == other).any()


@pytest.mark.slow
def test_flex_attention_forward():
    """Flex attention has no backward pass on the CPU and compiles for some seconds."""
    model = tiny("Llama", {"hidden_size": 64})
    check_no_leak(model, attention="flex_attention", checks=("positions", "logits", "alone"))
    with pytest.raises(LeakError, match="use_cache is not False"):
        check_no_leak(model, attention="flex_attention", make_batch=only("position_ids"), checks=("logits", "alone"))
