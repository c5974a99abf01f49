"""Which kernel a pack takes, and what each is given: stand-ins of the kernels' own signatures, held against the formula."""

import sys
import types

import pytest
import torch
from test_attention import Layer, masked_softmax

from longalign_lib.train import attention


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
