"""The prediction of Figure 5 against arithmetic by hand, and against the recorded run."""

import json

import numpy as np
import pandas as pd
import pytest

from longalign_lib.train import paper_scale
from longalign_lib.train.cost import StepCost


def test_the_mix_has_the_stated_shares():
    lengths = paper_scale.mix(200_000)
    assert lengths.min() >= 16 and lengths.max() <= 65_536
    assert (lengths > 8192).mean() == pytest.approx(0.1, abs=0.003)
    assert lengths[lengths > 8192].mean() == pytest.approx((8192 + 65_536) / 2, rel=0.01)
    assert np.median(np.log(lengths[lengths <= 8192])) == pytest.approx(6.6, abs=0.02)
    bent = paper_scale.mix(200_000, long="log-uniform")
    assert bent[bent > 8192].mean() == pytest.approx((65_536 - 8192) / np.log(8), rel=0.01)
    with pytest.raises(ValueError, match="long 'flat'"):
        paper_scale.mix(10, long="flat")


def test_parameters_of_the_published_configurations():
    for name, m in paper_scale.MODELS.items():
        h, kv = m["hidden_size"], m["hidden_size"] // m["num_attention_heads"] * m["num_key_value_heads"]
        layer = 2 * h * h + 2 * h * kv + 3 * h * m["intermediate_size"] + 2 * h
        total = m["num_hidden_layers"] * layer + 2 * m["vocab_size"] * h + h
        assert m["parameters"] == pytest.approx(total, rel=0.01), name


def test_a_pack_costs_its_layers_the_head_and_the_traffic():
    cost = paper_scale.pack_cost("7B", StepCost(0.001, 1e-6, 1e-10), StepCost(0.002, 2e-6, 0), slower=3.0)
    traffic = 3 * 2 * 6.74e9 * 7 / 8 / 150e9
    assert float(cost(65_536, 65_536**2)) == pytest.approx(
        3 * (32 * (0.001 + 0.065536 + 65_536**2 * 1e-10) + 0.002 + 0.131072) + traffic)  # fmt: skip


def test_figure_5_from_the_recorded_layers(root):
    """Nine bars stand beside ours; packing comes within a third, and the order of the methods is the paper's."""
    times = json.loads((root / "results" / "layer_times.json").read_text(encoding="utf8"))
    published = {r["model"]: r["values"] for t in json.loads((root / "results" / "paper.json").read_text(encoding="utf8"))["tables"]
                 if t["where"] == "Figure 5" for r in t["rows"] if r["row"] == "hours"}  # fmt: skip
    size = dict(zip(published, paper_scale.MODELS, strict=True))
    frame = pd.DataFrame([{"model": size[m], "method": k, "hours": h} for m, hours in published.items()
                          for k, h in zip(("naive", "packing", "sorted"), hours, strict=True)])  # fmt: skip
    table = paper_scale.beside_paper(times, frame)
    assert len(table) == 12 and table.paper.notna().sum() == 9
    for model, part in table.groupby("model"):
        hours = part.set_index("method")
        assert hours.log_uniform["naive"] > 2 * hours.log_uniform["packing"] > 2 * hours.log_uniform["balanced"], model
        assert hours.log_uniform["packing"] / 1.33 < hours.paper["packing"] < hours.uniform["packing"] * 1.33, model
