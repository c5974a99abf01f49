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
    assert off["optimizer"] == off["gradients"] == 0 and off["host"] == pytest.approx(16 * parameters(SMOL) / 2**30)
    assert off["total"] == pytest.approx(by_stage[3]["total"] - by_stage[3]["optimizer"] - by_stage[3]["gradients"])


@pytest.mark.parametrize("ranks", [1, 8])
def test_offloaded_states_are_those_of_deepspeeds_own_estimator(ranks):
    zero3 = pytest.importorskip("deepspeed.runtime.zero.stage3").estimate_zero3_model_states_mem_needs
    zero2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2").estimate_zero2_model_states_mem_needs
    n = parameters(SMOL)
    for stage, parameters_too in ((3, False), (3, True), (2, False)):
        ours = estimate(SMOL, 4096, ranks=ranks, zero_stage=stage, offload_optimizer=True, offload_parameters=parameters_too)
        if stage == 3:
            host, gpu, _ = zero3(n, n // SMOL.num_hidden_layers, ranks, cpu_offload_params=parameters_too, additional_buffer_factor=1)
        else:
            host, gpu = zero2(n, ranks, additional_buffer_factor=1)
        if (stage, ranks) != (2, 8):  # ZeRO-2's host there is 4 bytes a rank instead, for loading the model in every process
            assert ours["host"] * 2**30 == pytest.approx(host, rel=1e-6), (stage, parameters_too)
        assert (ours["weights"] + ours["gradients"] + ours["optimizer"]) * 2**30 == pytest.approx(gpu, rel=1e-6), (stage, parameters_too)


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="zero_stage 4"):
        estimate(SMOL, 10, zero_stage=4)
    with pytest.raises(ValueError, match="parameters needs ZeRO-3, not 2"):
        estimate(SMOL, 10, zero_stage=2, offload_parameters=True)
    with pytest.raises(ValueError, match="optimizer needs ZeRO, not None"):
        estimate(SMOL, 10, offload_optimizer=True)
