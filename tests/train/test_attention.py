"""Packed = alone, on a stock model, in logits and gradients; everything that would break it is refused or caught."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from longalign_lib.train import attention
from longalign_lib.train.collate import collate, empty_pack
from longalign_lib.train.loss import IGNORE, target_losses


def pack_of(lengths, seed=0, vocab=97):
    """A store of random rows and the plan lines of one pack that holds them all."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, vocab, n) for n in lengths]  # token 0 is an ordinary token
    store = [(x, np.where(np.arange(len(x)) >= len(x) // 2, x, IGNORE)) for x in ids]
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return store, pd.DataFrame({"offset": offsets, "row": range(len(lengths)), "length": lengths})


def model_inputs(batch):
    return {k: v for k, v in batch.items() if k not in ("labels", "loss_weights", "inverse_targets")}


@pytest.fixture
def packed_model(tiny_model):
    tiny_model.set_attn_implementation(attention.register())
    return tiny_model


def test_packed_logits_equal_logits_alone(packed_model):
    store, lines = pack_of([7, 1, 12, 3])
    with torch.no_grad():
        packed = packed_model(**model_inputs(collate(lines, store))).logits[0]  # use_cache at its default, on purpose
        packed_model.set_attn_implementation("sdpa")
        alone = torch.cat([packed_model(input_ids=torch.tensor(ids)[None]).logits[0] for ids, _ in store])
    assert (packed - alone).abs().max() < 1e-12


def test_the_test_sees_a_leak(packed_model):
    """Without the borders the same batch is one long document: the comparison above must be able to fail."""
    store, lines = pack_of([7, 12])
    batch = model_inputs(collate(lines, store))
    del batch["cu_seq_lens_q"], batch["cu_seq_lens_k"]
    with torch.no_grad():
        leaky = packed_model(**batch).logits[0, 7:]
        alone = packed_model(input_ids=torch.tensor(store[1][0])[None]).logits[0]
    assert (leaky - alone).abs().max() > 1e-3


def test_gradients_of_a_pack_equal_those_of_its_documents(packed_model):
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


def test_float32_weights_under_autocast_reach_the_kernel_in_16_bit(packed_model, monkeypatch):
    seen = []
    loop = attention.document_loop_attention
    monkeypatch.setattr(attention, "document_loop_attention", lambda q, *rest: seen.append(q.dtype) or loop(q, *rest))
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


@pytest.mark.parametrize(
    "asked, message",
    [({"softcap": 50.0}, "softcap"), ({"sliding_window": 4}, "sliding window of 4"), ({"s_aux": 1}, "sinks"),
     ({"dropout": 0.1}, "dropout 0.1"), ({"position_bias": 1}, "position bias")],
)  # fmt: skip
def test_what_it_cannot_compute_is_refused(asked, message):
    x = torch.randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match=message):
        attention.packed_attention(Layer(), x, x, x, None, cu_seq_lens_q=torch.tensor([0, 6]), max_length_q=6, **asked)


def test_a_pack_of_two_lines_is_refused():
    x = torch.randn(2, 2, 6, 4)
    with pytest.raises(ValueError, match="a pack is one line"):
        attention.packed_attention(Layer(), x, x, x, None, cu_seq_lens_q=torch.tensor([0, 6]), max_length_q=6)


def test_collate_lays_out_what_the_docstring_says():
    store, lines = pack_of([3, 2])
    batch = collate(lines, store, [0.5, 0.25])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5] and batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == 3
    first = batch["labels"][0, [0, 3]].tolist()
    assert first == [IGNORE, IGNORE], "a document's first token must never be a target"
    target = batch["labels"][0] != IGNORE
    assert target.tolist() == [False, True, True, False, True]
    assert batch["loss_weights"][0].tolist() == [0, 0.5, 0.5, 0, 0.25]
    assert batch["inverse_targets"][0].tolist() == [0, 0.5, 0.5, 0, 1]
    padded = collate(lines.assign(offset=[0, 3]), store, [0.5, 0.25], padded=True, pad_id=9)
    assert padded["input_ids"].shape == (2, 3) and padded["input_ids"][1, 2] == 9 and padded["labels"][1, 2] == IGNORE
    assert "cu_seq_lens_q" not in padded


def test_collate_weighs_the_right_rows_in_any_order():
    store, lines = pack_of([5, 5])
    weights = [0.9, 0.1]
    straight = collate(lines, store, weights)
    turned = collate(lines.iloc[::-1], store, weights[::-1])
    assert torch.equal(straight["loss_weights"], turned["loss_weights"]) and straight["loss_weights"].max() > 0.8


def test_collate_refuses_a_plan_of_other_data():
    store, lines = pack_of([3, 2])
    with pytest.raises(ValueError, match="row 1 has 2 tokens, the plan says 5"):
        collate(lines.assign(length=[3, 5]), store)


def test_an_empty_pack_weighs_nothing():
    batch = empty_pack()
    assert batch["loss_weights"].sum() == 0 and (batch["labels"] == IGNORE).all()
