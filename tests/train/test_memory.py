"""The memory estimate against real parameter counts and peaks recorded on an H100."""

import json
from types import SimpleNamespace

import pytest

from longalign_lib.train.memory import estimate, parameters
from longalign_lib.train.paper_scale import MODELS

SMOL = SimpleNamespace(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                       vocab_size=49_152, tie_word_embeddings=True)  # fmt: skip


def test_parameters_against_a_model(tiny_model):
    assert parameters(tiny_model.config) == sum(p.numel() for p in tiny_model.parameters())
    assert parameters(SMOL) == pytest.approx(134.5e6, rel=0.001)


def test_against_peaks_recorded_on_an_h100(root):
    """Layers of the paper's widths, weights and gradients in bf16, recomputed: no optimiser state in these runs."""
    recorded = json.loads((root / "results" / "layer_times.json").read_text(encoding="utf8"))["models"]
    compared = 0
    for name, facts in recorded.items():
        for times in facts["times"]:
            config = SimpleNamespace(**{**MODELS[name], "num_hidden_layers": times[0]["layers"]}, tie_word_embeddings=False)
            for t in times:
                if t["slots"] < 8192:
                    continue
                ours = estimate(config, t["slots"], zero_stage=0, recompute=True)
                assert ours["total"] - ours["optimizer"] == pytest.approx(t["peak_gib"], rel=0.25), (name, t)
                compared += 1
    assert compared >= 40


def test_zero_divides_and_offloading_moves():
    whole = estimate(SMOL, 4096, zero_stage=0)
    by_stage = [estimate(SMOL, 4096, ranks=8, zero_stage=s) for s in range(4)]
    assert by_stage[0]["optimizer"] == whole["optimizer"] == 8 * by_stage[1]["optimizer"]
    assert by_stage[1]["gradients"] == 8 * by_stage[2]["gradients"] and by_stage[3]["weights"] < by_stage[2]["weights"]
    off = estimate(SMOL, 4096, ranks=8, zero_stage=3, offload_optimizer=True)
    assert off["optimizer"] == 0 and off["host"] == pytest.approx(12 * parameters(SMOL) / 2**30)
    assert off["total"] == pytest.approx(by_stage[3]["total"] - by_stage[3]["optimizer"])


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="zero_stage 4"):
        estimate(SMOL, 10, zero_stage=4)
    with pytest.raises(ValueError, match="parameters needs ZeRO-3, not 2"):
        estimate(SMOL, 10, zero_stage=2, offload_parameters=True)
    with pytest.raises(ValueError, match="optimizer needs ZeRO, not None"):
        estimate(SMOL, 10, offload_optimizer=True)
