"""Packed = alone, on a stock model, in logits and gradients; what no kernel can do is done in chunks or refused."""

import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from longalign_lib.train import attention, row_attention
from longalign_lib.train.collate import collate
from longalign_lib.train.loss import target_losses


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


def fake_kernel(seen: dict):
    """A stand-in for a CUDA kernel of flash attention's shape, computed by the formula from what it is given."""

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap=None, **rest):
        assert torch.equal(cu_q, cu_k) and max_q == max_k == int(cu_q.diff().max()) and type(max_q) is int
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and q.is_contiguous()
        before, after = window
        assert after == 0
        seen.update(rest, key_heads=k.shape[1], softcap=softcap)
        return masked_softmax(q, k, v, cu_q.diff().tolist(), scale, None if before < 0 else before + 1, softcap)

    return kernel


PACK = {"cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32), "max_length_q": 7}


def pack_tensors(head=6, value_head=4):
    torch.manual_seed(0)
    return torch.randn(1, 4, 12, head), torch.randn(1, 2, 12, head), torch.randn(1, 2, 12, value_head)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("has_gqa", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_what_torchs_varlen_kernel_is_given(monkeypatch, has_gqa, window):
    seen = {}
    kernel = fake_kernel(seen)

    def new(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return kernel(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size, gqa=enable_gqa)

    def old(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return kernel(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new if has_gqa else old)
    monkeypatch.setattr(attention, "way_for", lambda *args, **kwargs: "torch varlen")
    q, k, v = pack_tensors()
    out, _ = attention.packed_attention(Layer(), q, k, v, sliding_window=window, **PACK)
    monkeypatch.undo()
    expected, _ = attention.packed_attention(Layer(), q, k, v, sliding_window=window, **PACK)
    assert out.shape == (1, 12, 4, 4) and torch.allclose(out, expected, atol=1e-6)
    assert seen["key_heads"] == 2 and seen.get("gqa", True)


def test_what_flash_attn_is_given(monkeypatch):
    """Against the package's documented signature; the package itself was on no machine this was written on."""
    seen = {}
    kernel = fake_kernel(seen)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
        assert causal
        window = (window_size[0], 0)
        return kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window, softcap,
                      dropout=dropout_p)  # fmt: skip

    monkeypatch.setattr(attention, "_flash_attn", lambda: flash_attn_varlen_func)
    monkeypatch.setattr(attention, "way_for", lambda *args, **kwargs: "flash-attn")
    q, k, v = pack_tensors()
    asked = {"sliding_window": 4, "softcap": 1.5, "dropout": 0.5}
    out, _ = attention.packed_attention(Layer().train(), q, k, v, **asked, **PACK)
    monkeypatch.undo()
    expected, _ = attention.packed_attention(Layer().eval(), q, k, v, **asked, **PACK)
    assert torch.allclose(out, expected, atol=1e-6)
    assert seen == {"key_heads": 2, "softcap": 1.5, "dropout": 0.5}


def test_what_flash_attn_4_is_given(monkeypatch):
    """Against the signature that ran on an H100 (4.0.0b36), which hands back the output, or that and more."""
    seen = {}
    kernel = fake_kernel(seen)

    def flash_attn_varlen_func(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                               softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0):  # fmt: skip
        assert causal and qv is None and window_size == (None, None)
        return kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, (-1, 0)), None

    monkeypatch.setattr(attention, "_FLASH_ATTN_4", flash_attn_varlen_func)
    monkeypatch.setattr(attention, "way_for", lambda *args, **kwargs: "flash-attn-4")
    q, k, v = pack_tensors()
    out, _ = attention.packed_attention(Layer(), q, k, v, scaling=0.3, **PACK)
    with pytest.raises(ValueError, match="plain causal attention only, got window=4"):
        attention.packed_attention(Layer(), q, k, v, sliding_window=4, **PACK)
    monkeypatch.undo()
    expected, _ = attention.packed_attention(Layer(), q, k, v, scaling=0.3, **PACK)
    assert torch.allclose(out, expected, atol=1e-6) and seen["key_heads"] == 2


class OnGPU:
    """What `way_for` reads of a tensor."""

    def __init__(self, dtype=torch.bfloat16, head=64, is_cuda=True):
        self.dtype, self.shape, self.is_cuda = dtype, (1, 8, 100, head), is_cuda


@pytest.mark.parametrize(
    "query, asked, without_package, with_package",
    [(OnGPU(), {}, "torch varlen", "flash-attn"), (OnGPU(torch.float16), {}, "torch varlen", "flash-attn"),
     (OnGPU(torch.float32), {}, "document loop", "document loop"), (OnGPU(is_cuda=False), {}, "document loop", "document loop"),
     (OnGPU(head=512), {}, "document loop", "document loop"), (OnGPU(), {"softcap": 30.0}, "document loop", "flash-attn"),
     (OnGPU(), {"dropout": 0.1}, "document loop", "flash-attn"), (OnGPU(), {"sinks": 1}, "document loop", "document loop")],
)  # fmt: skip
def test_the_first_way_that_can_do_it_is_taken(monkeypatch, query, asked, without_package, with_package):
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    assert attention.way_for(query, **asked) == without_package
    monkeypatch.setattr(attention, "_FLASH_ATTN_4", print)
    assert attention.way_for(query, **asked, longest=100) == without_package
    monkeypatch.setattr(attention, "_flash_attn", lambda: print)
    assert attention.way_for(query, **asked) == with_package


@pytest.mark.parametrize("query, asked", [(OnGPU(torch.float32), {}), (OnGPU(is_cuda=False), {}), (OnGPU(head=256), {}), (OnGPU(), {"window": 512}),
                                          (OnGPU(), {"softcap": 30.0}), (OnGPU(), {"dropout": 0.1}), (OnGPU(), {"sinks": 1})])  # fmt: skip
def test_flash_attn_4_is_for_plain_packs_with_a_long_document(monkeypatch, query, asked):
    monkeypatch.setattr(attention, "_FLASH_ATTN_4", print)
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    assert attention.way_for(query, **asked, longest=100_000) != "flash-attn-4"
    border = (attention.LEAST_WORK / (2 * 8 * 64)) ** 0.5  # 8 heads of 64: a forward pass's causal half of 4 H D l^2
    assert attention.way_for(OnGPU(), longest=int(border) + 1) == "flash-attn-4" != attention.way_for(OnGPU(), longest=int(border) - 1)


def test_flash_attn_4_is_looked_for_on_gpus_and_unless_told_not_to(monkeypatch):
    package = types.SimpleNamespace(flash_attn_varlen_func=print)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention._find_flash_attn_4() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention._find_flash_attn_4() is print
    monkeypatch.setattr(attention, "_FLASH_ATTN_4", print)
    assert attention.backend() == "flash-attn-4 for long documents, else torch varlen attention"
    monkeypatch.setenv("LONGALIGN_FLASH_ATTN_4", "0")
    assert attention._find_flash_attn_4() is None


def test_varlen_refuses_what_it_would_ignore():
    x = torch.randn(6, 2, 8)
    with pytest.raises(ValueError, match="no soft cap and no dropout, got softcap=50"):
        attention.varlen_attention(x, x, x, torch.tensor([0, 6]), 6, softcap=50.0)


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
