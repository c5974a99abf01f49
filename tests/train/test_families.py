"""What padded plans refuse is wrong, and what they accept is right, against the stock model on every row alone."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from transformers import TrainingArguments

from longalign_lib.train import attention, families
from longalign_lib.train.collate import collate
from longalign_lib.train.loss import target_losses
from longalign_lib.train.plan import build_plan
from longalign_lib.train.trainer import LongAlignTrainer

SIZE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0}  # fmt: skip
DYNAMIC = {"max_position_embeddings": 8,
           "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}}  # fmt: skip
LONG = {"max_position_embeddings": 32, "original_max_position_embeddings": 8, "rope_parameters": {
    "rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}}  # fmt: skip
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
BOTH, POSITIONS, ROPE = "looks both ways", "counts positions from padding_idx", "RoPE takes other frequencies for a row beside a longer one"
MODELS = {  # name: (class, configuration, settings beside SIZE, what is said of one row a pack, and of several)
    "Llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {}, None, None),
    "GPT-NeoX, whose configuration has is_decoder False": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {}, None, None),
    "Bart, whose cross attention looks both ways": (hf.BartForCausalLM, hf.BartConfig, {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48}, None, None),
    "BERT, decoder": (hf.BertLMHeadModel, hf.BertConfig, {"is_decoder": True}, None, None),
    "BERT": (hf.BertLMHeadModel, hf.BertConfig, {}, rf"{BOTH}.*is_decoder=True", rf"{BOTH}.*is_decoder=True"),
    "XLNet": (hf.XLNetLMHeadModel, hf.XLNetConfig, XLNET, BOTH, BOTH),
    "RoBERTa": (hf.RobertaForCausalLM, hf.RobertaConfig, {"is_decoder": True, "pad_token_id": 1}, POSITIONS, POSITIONS),
    "Llama, dynamic": (hf.LlamaForCausalLM, hf.LlamaConfig, DYNAMIC, None, ROPE),
    "Phi-3, longrope": (hf.Phi3ForCausalLM, hf.Phi3Config, LONG, None, ROPE),
}  # fmt: skip


def build(name):
    make, config, settings, *_ = MODELS[name]
    torch.manual_seed(0)
    size = {k: v for k, v in SIZE.items() if not (k == "max_position_embeddings" and name == "XLNet")}
    return make(config(**size | settings)).eval()


def worst_difference(model, rows_per_pack: int) -> float:
    """Largest difference of a token's loss in padded packs from the stock model's on the row alone."""
    rng = np.random.default_rng(0)
    store = [(x, x) for x in (rng.integers(3, 97, n) for n in (5, 21, 9, 6))]
    worst = 0.0
    for first in range(0, 4, rows_per_pack):
        here = range(first, first + rows_per_pack)
        lines = pd.DataFrame({"offset": np.arange(rows_per_pack) * 21, "row": here, "length": [len(store[i][0]) for i in here]})
        with torch.no_grad():
            losses, row, _ = target_losses(model, collate(lines, store, padded=True))
            for k, i in enumerate(here):
                ids = torch.tensor(store[i][0])
                references = [model(input_ids=ids[None], use_cache=False).logits[0, :-1]]
                if not families.rope_types(model) & set(families.BATCH_DEPENDENT_ROPE):  # and with no answer in sight
                    seen = [model(input_ids=ids[None, :n], use_cache=False).logits[0, -1] for n in range(1, len(ids))]
                    references.append(torch.stack(seen))
                for logits in references:
                    worst = max(worst, float((losses[row == k] - F.cross_entropy(logits, ids[1:], reduction="none")).abs().max()))
    return worst


@pytest.mark.parametrize("rows_per_pack", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_are_refused_where_they_would_get_other_losses(name, rows_per_pack):
    said = MODELS[name][3 if rows_per_pack == 1 else 4]
    model = build(name)
    if said is None:
        assert families.refuse_padded(model, rows_per_pack) is None
        assert worst_difference(model, rows_per_pack) < 1e-4
    else:
        with pytest.raises(ValueError, match=rf"{type(model).__name__} cannot be trained on a padded plan: it.*{said}"):
            families.refuse_padded(model, rows_per_pack)
        assert worst_difference(model, rows_per_pack) > 0.01


ADVICE = {"BERT": "Use a model whose", "RoBERTa": "Use a model whose", "Llama, dynamic": r"Use a padded plan \(naive, sorted\) with rows_per_pack=1 for",
          "Bart, whose cross attention looks both ways": r"Use a padded plan \(naive, sorted\) for it"}  # fmt: skip


@pytest.mark.parametrize("name", ADVICE)
def test_packs_are_sent_to_a_padded_plan_only_where_it_holds(name):
    model = build(name)
    model.set_attn_implementation(attention.register())
    with pytest.raises(ValueError, match=rf"cannot keep documents of a pack apart.*{ADVICE[name]}"):
        families.refuse(model)


def test_a_causal_model_that_is_told_to_look_both_ways_is_refused():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, is_causal=False))
    assert BOTH in families.padded_reasons(model)[0] and BOTH in families.reasons(model)[0]


@pytest.mark.parametrize("name, rows_per_pack, said", [("BERT", 1, BOTH), ("RoBERTa", 1, POSITIONS), ("Llama, dynamic", 2, ROPE)])
def test_the_trainer_asks_unless_the_attention_is_left_alone(name, rows_per_pack, said, tmp_path):
    store = [(x, x) for x in np.random.default_rng(0).integers(3, 97, (4, 8))]
    plan = build_plan([8] * 4, method="naive", capacity=32, packs_per_step=4 // rows_per_pack, rows_per_pack=rows_per_pack)
    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4 // rows_per_pack,
                             num_train_epochs=1, use_cpu=True, save_strategy="no", report_to=[])  # fmt: skip
    with pytest.raises(ValueError, match=f"cannot be trained on a padded plan.*{said}"):
        LongAlignTrainer(build(name), args, store=store, plan=plan)
    LongAlignTrainer(build(name), args, store=store, plan=plan, attention_name=None)
    if rows_per_pack == 2:
        args.gradient_accumulation_steps = 4
        LongAlignTrainer(build(name), args, store=store, plan=build_plan([8] * 4, method="naive", capacity=32, packs_per_step=4))


def test_a_bridge_from_another_sense_may_look_both_ways():
    model = build("Llama")
    for name in ("qformer", "layer"):
        assert families.refuse_padded(model, 4) is None
        setattr(model, name, torch.nn.Module())
        getattr(model, name).is_decoder = False
    with pytest.raises(ValueError, match=BOTH):
        families.refuse_padded(model, 4)
