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
    between, falling = (paper_scale.mix(200_000, long=x) for x in ("between", "falling"))
    assert between[between > 8192].mean() == pytest.approx(((8192 + 65_536) / 2 + (65_536 - 8192) / np.log(8)) / 2, rel=0.01)
    assert falling[falling > 8192].mean() == pytest.approx(8192 + (65_536 - 8192) / 3, rel=0.01)  # the mean of a triangle
    for x in (bent, between, falling):
        assert x.min() >= 16 and x.max() <= 65_536 and (x > 8192).mean() == pytest.approx(0.1, abs=0.003)
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


def test_attention_and_links_of_ones_own():
    layer, head = StepCost(0.001, 1e-6, 1e-10), StepCost(0.002, 2e-6, 1e-13)
    base = paper_scale.pack_cost("7B", layer, head, slower=3.0)
    other = paper_scale.pack_cost("7B", layer, head, slower=3.0, attention_share=0.5, link=75e9)
    # causal scores and values: 2 products of 2 x width FLOPs over half the pairs; forward, again forward, backward twice that
    flops = 32 * 4 * (2 * 2 * 4096 * 65_536**2 / 2)
    assert float(other(0, 65_536**2) - other(0, 0)) == pytest.approx(flops / (0.5 * 312e12))
    assert float(other(0, 0) - base(0, 0)) == pytest.approx(3 * 2 * 6.74e9 * 7 / 8 / 150e9)
    assert float(other(1000, 0) - other(0, 0)) == pytest.approx(float(base(1000, 0) - base(0, 0)))


@pytest.fixture(scope="module")
def record(root):
    """Layer times as recorded, and the nine published bars as a frame."""
    times = json.loads((root / "results" / "layer_times.json").read_text(encoding="utf8"))
    published = {r["model"]: r["values"] for t in json.loads((root / "results" / "paper.json").read_text(encoding="utf8"))["tables"]
                 if t["where"] == "Figure 5" for r in t["rows"] if r["row"] == "hours"}  # fmt: skip
    size = dict(zip(published, paper_scale.MODELS, strict=True))
    frame = pd.DataFrame([{"model": size[m], "method": k, "hours": h} for m, hours in published.items()
                          for k, h in zip(("naive", "packing", "sorted"), hours, strict=True)])  # fmt: skip
    return times, frame


def test_what_each_reason_is_worth(record, monkeypatch):
    times, published = record
    monkeypatch.setitem(paper_scale.ASSUMED, "rows an epoch (1,500 to 2,000 steps of 96 rows in two epochs)", 2000)
    paper_scale._plans.cache_clear()
    try:
        table = paper_scale.reasons(times, published)
        plan = paper_scale._plans("between", 2, 0, 8)["naive"]
        hours = {wait: paper_scale.figure5(times, "between", wait=wait).set_index(["model", "method"]) for wait in ("micro-step", "step")}
    finally:
        paper_scale._plans.cache_clear()
    assert table.index[0] == "the paper" and table.shape == (6, 10) and (table.iloc[0, :9] == 1).all()
    assert table.iloc[0, 9] == pytest.approx((45.4 / 20.5 + 67.2 / 23.4 + 117.2 / 41.2) / 3)
    assert table.loc["as predicted, 12 rows a pack", "13B naive"] == pytest.approx(hours["micro-step"].hours["13B", "naive"] / 117.2)
    # ranks that wait once a step: a loop over steps and ranks
    part = times["models"]["13B"]
    cost = paper_scale.pack_cost("13B", StepCost(**part["layer"]), StepCost(**part["head"]), 989 / 312)
    seconds = worked = 0.0
    for _, lines in plan.table.groupby("step"):
        work = [float(cost(n, n**2)) for n in lines.sort_values("pack").length.tolist()]  # dealt like cards: no balancing
        seconds, worked = seconds + max(sum(work[r::8]) for r in range(8)), worked + sum(work)
    adam = plan.table.step.nunique() * 30 * 13.02e9 / 200e9
    assert hours["step"].hours["13B", "naive"] == pytest.approx((seconds + adam) / 3600)
    assert hours["step"].idle["13B", "naive"] == pytest.approx(1 - worked / (8 * seconds))
    assert (hours["step"].hours <= hours["micro-step"].hours * (1 + 1e-12)).all()
    with pytest.raises(ValueError, match="wait 'never' is not"):
        paper_scale.figure5(times, wait="never")


def test_figure_5_from_the_recorded_layers(record):
    """Nine bars stand beside ours; packing comes within a third, and the order of the methods is the paper's."""
    table = paper_scale.beside_paper(*record)
    assert len(table) == 12 and table.paper.notna().sum() == 9
    for model, part in table.groupby("model"):
        hours = part.set_index("method")
        assert hours.log_uniform["naive"] > 2 * hours.log_uniform["packing"] > 2 * hours.log_uniform["balanced"], model
        assert hours.log_uniform["packing"] / 1.33 < hours.paper["packing"] < hours.uniform["packing"] * 1.33, model


def test_what_the_notebook_says_of_the_reasons(record):
    """Only less waiting brings naive over packing down to the paper's; slow links slow sorted batches most."""
    table = paper_scale.reasons(*record)
    waits = table["naive over packing"]
    assert 1.6 < waits["waiting once a step"] < 1.75 < 2.6 < waits["the paper"] < 2.7
    assert waits.drop(["the paper", "waiting once a step"]).between(3.6, 3.85).all()
    base, slow = table.loc["as predicted, 12 rows a pack"], table.loc["collectives at 50 GB/s"]
    assert base[["6B packing", "7B packing", "13B packing"]].between(1.17, 1.26).all() and base[["6B naive", "7B naive", "13B naive"]].between(1.45, 2.1).all()
    assert slow["13B sorted"] - base["13B sorted"] > 0.1 > 0.05 > slow["13B packing"] - base["13B packing"] > 0
    for name in ("fewer long rows near 64k", "attention at 60% of an A800's peak"):
        assert (table.loc[name].iloc[:9] < base.iloc[:9]).all() and table.loc[name, ["6B packing", "7B packing", "13B packing"]].between(0.8, 0.95).all()
