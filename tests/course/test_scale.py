"""Tables of memory and hours: they say what their sources say, and what must be so for any rates."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

from longalign_lib.course import scale
from longalign_lib.train import memory
from longalign_lib.train.paper_scale import MODELS, figure5


@pytest.fixture(scope="module")
def layers(pytestconfig):
    return json.loads((pytestconfig.rootpath / "results" / "layer_times.json").read_text())


def test_memory_table_sums_divides_and_judges():
    table = scale.memory_table()
    assert len(table) == 3 * 2 * 5 and set(table.gpus) == {1, 8}
    assert table[["weights", "gradients", "optimizer", "activations", "logits"]].sum(axis=1).tolist() == pytest.approx(table.total.tolist())
    at = table.set_index(["model", "gpus", "way"])
    seven, way = memory.parameters(SimpleNamespace(**MODELS["7B"])), "ZeRO-2"
    assert at.loc[("7B", 1, way)].optimizer == pytest.approx(12 * seven / 2**30)  # two moments and a float32 master
    assert at.loc[("7B", 8, way)].optimizer == pytest.approx(12 * seven / 8 / 2**30)
    assert at.loc[("7B", 8, "DDP, autocast")].total == at.loc[("7B", 1, "DDP, autocast")].total
    assert (table.groupby(["model", "gpus"]).activations.nunique() == 1).all()  # nothing but the pack changes them
    assert table[table.verdict == "fits"].total.max() * 1.25 <= scale.ROOM < table[table.verdict == "no"].total.min()
    assert {"fits", "maybe", "no"} == set(table.verdict)


@pytest.mark.parametrize(("total", "expected"), [(63.36, "fits"), (63.37, "maybe"), (79.2, "maybe"), (79.21, "no")])
def test_verdicts_keep_a_quarter_in_reserve(total, expected):
    assert scale.verdict(total) == expected


def test_estimates_lie_within_a_quarter_of_every_recorded_peak(layers, pytestconfig):
    from transformers import AutoConfig

    from longalign_lib.models import resolve

    recorded = json.loads((pytestconfig.rootpath / "results" / "throughput.json").read_text())
    table = scale.measured_peaks(recorded, layers, AutoConfig.from_pretrained(resolve("default")))
    assert len(table) == 5 and table.error.abs().max() < 0.25
    assert table.measured.tolist()[:2] == [r["peak_gib"] for r in recorded["rows"] if r["table"] == "recompute"]
    assert [c.split(":")[0] for c in table.case[2:]] == ["6B", "7B", "13B"]


def test_eight_gpus_take_the_hours_of_the_published_comparison(layers):
    ours = scale.hours_table(layers, gpus=(8,)).set_index(["model", "plan"]).hours
    theirs = figure5(layers).replace({"method": {"packing": "packed"}}).set_index(["model", "method"]).hours
    assert len(ours) == 12
    for run, hours in ours.items():
        assert hours == pytest.approx(theirs[run], rel=0.02), run


def test_hours_follow_what_must_be_so(layers):
    table = scale.hours_table(layers, rows=4000, seed=1).set_index(["model", "plan", "gpus"])
    alone, eight = table.xs(1, level="gpus"), table.xs(8, level="gpus")
    assert (alone.idle < 1e-9).all() and (alone.idle >= 0).all()  # nobody to wait for
    assert (eight.hours < alone.hours).all() and (eight.gpu_hours == eight.hours * 8).all()
    assert alone.hours.xs("naive", level="plan").tolist() == pytest.approx(alone.hours.xs("sorted", level="plan").tolist())  # row by row
    best = eight.hours.unstack("plan")
    assert (best.balanced < best.packed).all() and (best.packed < best.naive).all()
    few, many = (scale.hours_table(layers, rows=n).hours.sum() for n in (8_000, 40_000))
    assert few == pytest.approx(many, rel=0.06)  # a sample of the rows, scaled to all of them


def test_a_dry_run_needs_no_weights_and_agrees_with_the_table(tmp_path):
    model, data = scale.stand_in(tmp_path, "7B", rows=300)
    assert not list(model.glob("*.safetensors")) and sum(f.stat().st_size for f in model.iterdir()) < 10_000
    asked = {(g, c): scale.dry_run(scale.dry_run_options(model, data, g, c)) for g, c in ((8, "zero3"), (1, "paper"), (1, "zero3_offload"))}
    shared, alone = asked[8, "zero3"], asked[1, "paper"]
    table = scale.memory_table().set_index(["model", "gpus", "way"]).total
    assert shared["predicted"]["gib"]["total"] == pytest.approx(table["7B", 8, "ZeRO-3"], rel=0.02)
    assert alone["predicted"]["gib"]["total"] == pytest.approx(table["7B", 1, "ZeRO-3, all offloaded (paper)"], rel=0.02)
    halfway = asked[1, "zero3_offload"]["predicted"]["gib"]["total"]
    assert halfway == pytest.approx(table["7B", 1, "ZeRO-3, optimizer offloaded"], rel=0.02)
    assert shared["plan"]["rows"] == 600 and shared["plan"]["tokens_lost"] == 0 and shared["plan"]["steps"] == alone["plan"]["steps"]
    assert shared["plan"]["micro_steps"] == 1 and alone["plan"]["micro_steps"] == 8
    assert alone["predicted"]["hours"] > 6 * shared["predicted"]["hours"] and alone["predicted"]["idle"] == pytest.approx(0, abs=1e-6)


def test_every_way_has_a_bar_of_its_own():
    assert pd.Series(scale.WAYS).map(str).is_unique
