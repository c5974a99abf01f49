"""Loss by position against transformers' own full logits."""

import math

import numpy as np
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from longalign_lib.train import position_loss


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).eval()


IDS = np.random.default_rng(0).integers(0, 97, 53)


@pytest.mark.parametrize("chunk", [1, 7, 52, 1000])
def test_losses_are_those_of_the_full_logits(tiny, chunk):
    got = position_loss.token_losses(tiny, IDS, chunk)
    with torch.no_grad():
        logits = tiny(input_ids=torch.from_numpy(IDS)[None], use_cache=False).logits[0]
        own = tiny(input_ids=torch.from_numpy(IDS)[None], labels=torch.from_numpy(IDS)[None], use_cache=False).loss
    expected = [-torch.log_softmax(logits[t - 1].double(), -1)[IDS[t]].item() for t in range(1, len(IDS))]
    assert got.shape == IDS.shape and got.dtype == np.float32 and math.isnan(got[0])
    np.testing.assert_allclose(got[1:], expected, rtol=1e-4, atol=1e-5)
    assert np.nanmean(got) == pytest.approx(own.item(), rel=1e-5)


def test_buckets_hold_every_position_once(tiny):
    frame = position_loss.loss_by_position(tiny, IDS, bucket=20)
    losses = position_loss.token_losses(tiny, IDS)
    assert frame[["start", "end", "tokens"]].values.tolist() == [[0, 20, 19], [20, 40, 20], [40, 53, 13]]
    assert (frame["mean"] * frame.tokens).sum() / frame.tokens.sum() == pytest.approx(np.nanmean(losses))
    part = losses[20:40].astype(float)
    assert frame["se"][1] == pytest.approx(math.sqrt(((part - part.mean()) ** 2).sum() / 19 / 20))


def test_single_tokens_have_no_standard_error():
    frame = position_loss.by_position([math.nan, 2.0, 3.0], 1)
    assert frame.tokens.tolist() == [0, 1, 1] and frame["mean"].tolist()[1:] == [2.0, 3.0] and frame["se"].isna().all()


@pytest.mark.parametrize(
    "ids, message",
    [([5], "at least 2 tokens"), ([[1, 2]], "shape"), ([1, 97], "97 is outside"), ([1, -1], "-1 is outside")],
)
def test_bad_ids_are_named(tiny, ids, message):
    with pytest.raises(ValueError, match=message):
        position_loss.token_losses(tiny, ids)


FAMILIES = {"Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0}, "Cohere": {"logit_scale": 0.3}, "FalconH1": {"lm_head_multiplier": 0.3},
            "RecurrentGemma": {"logits_soft_cap": 3.0, "attention_window_size": 64}, "ModernBertDecoder": {}}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_models_that_change_their_logits_after_the_head(name):
    """Caps, scales under any name, and a transform before the head: what the model itself would give."""
    small = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2} if "Bert" in name else {}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**small, **FAMILIES[name])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # logits far enough from 0 for a cap or a scale to matter
        logits = model(input_ids=torch.from_numpy(IDS)[None], use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(IDS)[1:], reduction="none")
    np.testing.assert_allclose(position_loss.token_losses(model, IDS, 7)[1:], expected, rtol=1e-3, atol=1e-3)


def test_bad_sizes_are_refused(tiny):
    with pytest.raises(ValueError, match="chunk=0"):
        position_loss.token_losses(tiny, IDS, 0)
    with pytest.raises(ValueError, match="bucket=0"):
        position_loss.by_position([1.0], 0)
