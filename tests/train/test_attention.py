"""Packed = alone, on a stock model, in logits and gradients; what no kernel can do is done in chunks or refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    HrmTextConfig,
    HrmTextForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from longalign_lib.train import attention, row_attention
from longalign_lib.train.collate import collate
from longalign_lib.train.loss import target_losses

SIZE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": 0}  # fmt: skip


def model_inputs(batch):
    return {k: v for k, v in batch.items() if k not in ("labels", "loss_weights", "inverse_targets")}


@pytest.fixture
def packed_model(tiny_model):
    tiny_model.set_attn_implementation(attention.register())
    return tiny_model


def test_packed_logits_equal_logits_alone(packed_model, pack_of):
    store, lines = pack_of([7, 1, 12, 3])
    with torch.no_grad():
        packed = packed_model(**model_inputs(collate(lines, store))).logits[0]  # use_cache at its default, on purpose
        packed_model.set_attn_implementation("sdpa")
        alone = torch.cat([packed_model(input_ids=torch.tensor(ids)[None]).logits[0] for ids, _ in store])
    assert (packed - alone).abs().max() < 1e-12


def test_the_test_sees_a_leak(packed_model, pack_of):
    """Without the borders the same batch is one long document: the comparison above must be able to fail."""
    store, lines = pack_of([7, 12])
    batch = model_inputs(collate(lines, store))
    del batch["cu_seq_lens_q"], batch["cu_seq_lens_k"], batch["position_ids"]
    with torch.no_grad():
        leaky = packed_model(**batch).logits[0, 7:]
        alone = packed_model(input_ids=torch.tensor(store[1][0])[None]).logits[0]
    assert (leaky - alone).abs().max() > 1e-3


def test_gradients_of_a_pack_equal_those_of_its_documents(packed_model, pack_of):
    store, lines = pack_of([9, 4, 15])
    weights = np.array([0.2, 0.5, 0.1])

    def gradient(batches):
        packed_model.zero_grad()
        for batch in batches:
            losses, row, position = target_losses(packed_model, batch)
            (losses * batch["loss_weights"][row, position]).sum().backward()
        return torch.cat([p.grad.flatten() for p in packed_model.parameters()])

    together = gradient([collate(lines, store, weights)])
    one = [lines.iloc[[i]].assign(offset=0) for i in range(3)]
    apart = gradient([collate(x, store, weights[[i]], padded=True) for i, x in enumerate(one)])
    padded = gradient([collate(lines, store, weights, padded=True)])
    scale = apart.norm()
    assert scale > 1e-3
    assert (together - apart).norm() / scale < 1e-6  # losses are taken in float32
    assert (padded - apart).norm() / scale < 1e-6


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_document_loop_against_one_masked_softmax(lengths, seed):
    torch.manual_seed(seed)
    tokens = sum(lengths)
    q, k, v = torch.randn(tokens, 4, 8).double(), torch.randn(tokens, 2, 8).double(), torch.randn(tokens, 2, 8).double()
    borders = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(tokens)
    allowed = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("thd,shd->hts", q, keys) * 0.3
    expected = torch.einsum("hts,shd->thd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), values)
    assert torch.allclose(attention.document_loop_attention(q, k, v, borders, 0.3), expected)


def test_generation_and_padding_still_work(packed_model):
    """The name is safe outside packs: padded batches keep their mask, and a cache continues rightly."""
    ids = torch.randint(3, 97, (2, 10))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0  # left padding
    with torch.no_grad():
        ours = packed_model(input_ids=ids, attention_mask=mask).logits
        cache = DynamicCache(config=packed_model.config)
        packed_model(input_ids=ids[1:, :6], past_key_values=cache)
        continued = packed_model(input_ids=ids[1:, 6:], past_key_values=cache).logits
        generated = packed_model.generate(ids[1:], max_new_tokens=5, do_sample=False)
        packed_model.set_attn_implementation("sdpa")
        theirs = packed_model(input_ids=ids, attention_mask=mask).logits
        static = packed_model.generate(ids[1:], max_new_tokens=5, do_sample=False, cache_implementation="static")
        packed_model.set_attn_implementation(attention.NAME)
        our_static = packed_model.generate(ids[1:], max_new_tokens=5, do_sample=False, cache_implementation="static")
        packed_model.set_attn_implementation("sdpa")
        expected = packed_model.generate(ids[1:], max_new_tokens=5, do_sample=False)
    assert torch.allclose(ours[0, 4:], theirs[0, 4:]) and torch.allclose(ours[1], theirs[1])
    assert torch.allclose(continued[0], theirs[1, 6:])
    assert generated.tolist() == expected.tolist() == static.tolist() == our_static.tolist()


def test_float32_weights_under_autocast_reach_the_kernel_in_16_bit(packed_model, monkeypatch, pack_of):
    seen = []
    loop = attention.document_loop_attention
    monkeypatch.setattr(attention, "document_loop_attention", lambda q, *a, **k: seen.append(q.dtype) or loop(q, *a, **k))
    store, lines = pack_of([7, 12])
    batch = model_inputs(collate(lines, store))
    model = packed_model.float()
    with torch.no_grad():
        exact = model(**batch).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(**batch).logits.float()
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02


class Layer(torch.nn.Module):
    is_causal = True


def masked_softmax(q_THD, k_TGD, v_TGD, lengths, scaling, window=None, softcap=None, sinks=None):
    """The formula, with all scores of the pack at once."""
    tokens, repeat = len(q_THD), q_THD.shape[1] // k_TGD.shape[1]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(tokens)
    back = place[:, None] - place[None]
    allowed = (document[:, None] == document[None]) & (back >= 0) & (back < (window or tokens))
    keys, values = k_TGD.repeat_interleave(repeat, 1), v_TGD.repeat_interleave(repeat, 1)
    scores = torch.einsum("thd,shd->hts", q_THD, keys) * scaling
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    heavy = scores.masked_fill(~allowed, -torch.inf).exp()
    total = heavy.sum(-1) + (0 if sinks is None else sinks.exp()[:, None])
    return torch.einsum("hts,shd->thd", heavy / total[..., None], values)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), window=st.none() | st.integers(1, 10),
    softcap=st.none() | st.floats(0.5, 3), sinks=st.booleans(), chunk=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_windows_soft_caps_and_sinks_against_the_formula(lengths, window, softcap, sinks, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    shapes = [(tokens, 4, 8), (tokens, 2, 8), (tokens, 2, 6), (4,)]  # values of another size than keys
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    q, k, v, sink = inputs
    sink = sink if sinks else None
    borders = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_attention, "CHUNK", chunk)
        out = attention.document_loop_attention(q, k, v, borders, 0.3, window=window, softcap=softcap, sinks=sink)
        ours = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
    expected = masked_softmax(q, k, v, lengths, 0.3, window, softcap, sink)
    theirs = torch.autograd.grad(expected.square().sum(), inputs, allow_unused=True)
    assert torch.allclose(out, expected)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b))


def test_a_window_never_makes_a_mask_of_a_whole_document(monkeypatch):
    sizes = []
    band = row_attention.band
    monkeypatch.setattr(row_attention, "band", lambda *args: sizes.append(band(*args)) or sizes[-1])
    x = torch.randn(3000, 1, 4)
    attention.document_loop_attention(x, x, x, torch.tensor([0, 2500, 3000]), window=100)
    assert len(sizes) == 6 and max(m.numel() for m in sizes) <= row_attention.CHUNK * (row_attention.CHUNK + 99)


@pytest.mark.parametrize("softcap", [None, 1e9], ids=["in the kernel", "in chunks"])
def test_dropout_is_of_the_weights_and_stays_in_its_document(softcap):
    lengths, p = [30, 50], 0.25
    tokens = sum(lengths)
    q = k = torch.zeros(tokens, 1, 4)  # equal weights 1 / (t + 1)
    v = torch.eye(tokens).unsqueeze(1)  # the output is the row of weights itself
    torch.manual_seed(0)
    borders = torch.tensor([0, 30, 80])
    out = attention.document_loop_attention(q, k, v, borders, softcap=softcap, dropout=p)[:, 0]
    weight = torch.cat([torch.arange(1, n + 1) for n in lengths])[:, None] * out
    document = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    seen = (document[:, None] == document[None]).tril()
    assert (weight[~seen] == 0).all()
    kept = weight[seen] > 0
    assert torch.allclose(weight[seen][kept], torch.tensor(1 / (1 - p)))
    assert abs(kept.float().mean() - (1 - p)) < 0.04


def test_dropout_only_in_training():
    x = torch.randn(1, 2, 6, 4)
    call = {"cu_seq_lens_q": torch.tensor([0, 2, 6]), "max_length_q": 4, "dropout": 0.5}
    still, alive = Layer().eval(), Layer().train()
    quiet = [attention.packed_attention(still, x, x, x, **call)[0] for _ in range(2)]
    loud = [attention.packed_attention(alive, x, x, x, **call)[0] for _ in range(2)]
    assert torch.equal(*quiet) and not torch.equal(*loud)


def test_positions_that_restart_make_a_pack_without_borders():
    """transformers' own rule; here also for several lines, and without a mask over the pack."""
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 0]])
    out, _ = attention.packed_attention(Layer(), q, k, v, position_ids=positions, sliding_window=2)
    flat = [x.transpose(1, 2).reshape(14, -1, 8) for x in (q, k, v)]
    expected = masked_softmax(*flat, [3, 2, 2, 6, 1], 8**-0.5, window=2)
    assert torch.allclose(out.reshape(14, 4, 8), expected, atol=1e-6)
    plain, _ = attention.packed_attention(Layer(), q, k, v, position_ids=torch.arange(7)[None])
    rows = masked_softmax(*flat, [7, 7], 8**-0.5)
    assert torch.allclose(plain.reshape(14, 4, 8), rows, atol=1e-6)


@pytest.mark.parametrize("lines", [1, 2])
def test_what_cannot_be_a_pack_is_refused(lines):
    x = torch.randn(lines, 2, 6, 4)
    call = {"cu_seq_lens_q": torch.tensor([0, 6]), "max_length_q": 6}
    if lines == 2:
        with pytest.raises(ValueError, match="a pack is one line"):
            attention.packed_attention(Layer(), x, x, x, **call)
        return
    with pytest.raises(ValueError, match="a pack is one line without a cache"):
        attention.packed_attention(Layer(), x[:, :, :3], x, x, **call)
    with pytest.raises(ValueError, match="position bias, which Layer asks for"):
        attention.packed_attention(Layer(), x, x, x, position_bias=1, **call)
    with pytest.raises(ValueError, match="no mask beside cu_seq_lens_q"):
        attention.packed_attention(Layer(), x, x, x, torch.ones(1, 1, 6, 6, dtype=torch.bool), **call)
    with pytest.raises(ValueError, match="a pack is causal, Layer looks both ways"):
        attention.packed_attention(Layer(), x, x, x, is_causal=False, **call)


def capped(softcap=2.0):
    config = Gemma2Config(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=softcap,
                          query_pre_attn_scalar=1, initializer_range=0.5, pad_token_id=0)  # fmt: skip
    return Gemma2ForCausalLM(config)


def sunk():
    config = GptOssConfig(vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=1,
                          initializer_range=0.5, pad_token_id=0)  # fmt: skip
    return GptOssForCausalLM(config)


@pytest.mark.parametrize("make", [capped, sunk])
def test_caps_sinks_and_windows_also_with_padding_and_caches(make):
    """Outside packs `longalign` is eager attention: prompts, left padding, generation past the window."""
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(3, 97, (2, 10))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0

    def answers(name):
        model.set_attn_implementation(name)
        with torch.no_grad():
            return (model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits[mask.bool()],
                    model.generate(ids[1:], max_new_tokens=6, do_sample=False))  # fmt: skip

    attention.register()
    ours, theirs = answers(attention.NAME), answers("eager")
    assert torch.allclose(ours[0], theirs[0], atol=1e-4) and torch.allclose(ours[1], theirs[1], atol=1e-4)
    assert ours[2].tolist() == theirs[2].tolist()


def logits_of_generation(model, name, **asked):
    """Logits of six greedy steps, stacked [6, B, V]."""
    model.set_attn_implementation(name)
    out = model.generate(**asked, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True,
                         eos_token_id=None, pad_token_id=0)  # fmt: skip
    return torch.stack(out.logits)


def plain():
    return LlamaForCausalLM(LlamaConfig(**SIZE))


def windowed(window=4):
    return PhimoeForCausalLM(PhimoeConfig(**SIZE, num_local_experts=2, num_experts_per_tok=1, sliding_window=window))


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("make", [plain, capped, sunk, windowed])
def test_a_static_cache_is_filled_as_by_eager(make, padding):
    """Its keys are longer than the prompt, which begins at their first: sdpa then wants no mask, but aligned at the start."""
    torch.manual_seed(0)
    model = make().eval()
    asked = {"input_ids": torch.randint(3, 97, (2, 13)), "attention_mask": torch.ones(2, 13, dtype=torch.long)}
    asked["attention_mask"][0, :padding] = 0
    expected = logits_of_generation(model, "eager", **asked)
    ours = logits_of_generation(model, attention.register(), **asked, cache_implementation="static")
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("make", [plain, capped, sunk, windowed])
def test_packs_and_whole_rows_build_no_mask(make, pack_of, monkeypatch):
    def build(*args, **kwargs):
        raise AssertionError("a mask of all pairs of tokens")

    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation(attention.register())
    store, lines = pack_of([7, 12])
    monkeypatch.setattr(attention, "sdpa_mask", build)
    for padded in (False, True):
        model(**model_inputs(collate(lines, store, padded=padded)), use_cache=False)


@pytest.mark.parametrize("window", [4, 64])
def test_a_window_that_only_the_mask_knows(window):
    """PhiMoE's layers hand no window to their attention: `mask_for` notes it, and a row sees what eager lets it see."""
    torch.manual_seed(0)
    model, ids = windowed(window).eval(), torch.randint(3, 97, (2, 20))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation(attention.register())
        ours = model(input_ids=ids, use_cache=False).logits
        whole = windowed(None).eval()
        whole.load_state_dict(model.state_dict())
        assert (whole(input_ids=ids, use_cache=False).logits - expected).abs().max() > (0.01 if window == 4 else -1)
    assert torch.allclose(ours, expected, atol=1e-4)
    x = torch.randn(1, 2, 6, 4)
    note = torch.ones(1, 1, 0, 3, dtype=torch.bool)
    assert torch.equal(*(attention.packed_attention(Layer(), x, x, x, **call)[0] for call in ({"attention_mask": note}, {"sliding_window": 3})))


def test_chunks_are_no_window():
    """Llama 4's chunked layers give their size as windows do; their mask is kept."""
    config = Llama4TextConfig(**SIZE, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=4,
                              layer_types=["chunked_attention", "full_attention"])  # fmt: skip
    torch.manual_seed(0)
    model, ids = Llama4ForCausalLM(config).eval(), torch.randint(3, 97, (1, 13))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation(attention.register())
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-4)


def prefix():
    return HrmTextForCausalLM(HrmTextConfig(**{k: v for k, v in SIZE.items() if k != "num_key_value_heads"}, head_dim=8))


def images():
    text = SIZE | {"vocab_size": 300, "head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"],
                   "query_pre_attn_scalar": 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=290,
                                                       boi_token_index=291, eoi_token_index=292))  # fmt: skip


@pytest.mark.parametrize("make", [prefix, images])
def test_a_mask_that_looks_ahead_is_kept_and_never_packed(make):
    """A prefix or a block of an image is seen from both sides; without one the same model packs."""
    torch.manual_seed(0)
    model, ids = make().eval(), torch.randint(3, 97, (1, 16))
    none = torch.zeros(1, 16, dtype=torch.long)
    block = torch.where((torch.arange(16) >= 2) & (torch.arange(16) < 9), 1, 0)[None]
    answers = {}
    for name in ("eager", attention.register()):
        model.set_attn_implementation(name)
        with torch.no_grad():
            answers[name] = [model(input_ids=ids, token_type_ids=x, use_cache=False).logits for x in (none, block)]
    causal, both = answers["eager"]
    assert (causal - both).abs().max() > 0.1
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(answers["eager"], answers[attention.NAME], strict=True))
    borders = torch.tensor([0, 10, 16], dtype=torch.int32)
    pack = {"input_ids": ids, "position_ids": torch.cat([torch.arange(10), torch.arange(6)])[None], "use_cache": False,
            "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 10, "max_length_k": 10}  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(model(**pack).logits[:, :10], causal[:, :10], atol=1e-3)
        with pytest.raises(ValueError, match="no mask beside cu_seq_lens_q"):
            model(**pack, token_type_ids=block)
