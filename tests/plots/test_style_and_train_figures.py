"""Figures write what they drew: the numbers beside the picture are those that were handed in."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from longalign_lib.plots import style
from longalign_lib.plots import train as draw
from longalign_lib.train.cost import StepCost, simulate
from longalign_lib.train.plan import build_plan


def caption(fig):
    return fig._supxlabel.get_text()


def test_finish_writes_picture_numbers_and_caption(tmp_path):
    style.set_caption(profile="ci", seed="7")
    fig, ax = style.new("half")
    ax.plot([1, 2])
    style.finish(fig, "line", {"y": np.array([1, 2])}, tmp_path, note="a note")
    assert (tmp_path / "line.png").stat().st_size > 3000
    assert json.loads((tmp_path / "line.json").read_text()) == {"y": [1, 2]}
    assert caption(fig).startswith("a note · profile ci · seed 7 · device ") and "commit" in caption(fig)
    assert not plt.get_fignums(), "a figure left open would be shown twice in a notebook"
    with pytest.raises(ValueError, match="width 'huge' is not one of"):
        style.new("huge")


def test_recorded_results_name_their_own_run():
    style.set_caption(profile="ci", seed="7")
    with style.recorded({"profile": "gpu", "seed": 0, "device": "a large GPU", "commit": "abc", "date": "2026-01-01", "versions": {}}):
        fig, _ = style.new()
        style.finish(fig, "x", {})
    assert caption(fig) == "profile gpu · seed 0 · device a large GPU · commit abc · date 2026-01-01"
    fig, _ = style.new()
    style.finish(fig, "x", {})
    assert "profile ci" in caption(fig)


def test_training_figures_keep_their_numbers(tmp_path):
    lengths = np.random.default_rng(0).integers(5, 200, 60)
    plans = {m: build_plan(lengths, method=m, capacity=256, packs_per_step=8, max_ranks=4) for m in ("naive", "balanced")}
    runs = {m: simulate(p, 4, StepCost(0.1, 1e-3, 1e-5)) for m, p in plans.items()}
    draw.length_histogram({"rows": lengths}, tmp_path)
    assert pd.read_csv(tmp_path / "lengths.csv").rows.sum() == 60
    draw.timelines(runs, steps=2, out=tmp_path)
    assert set(pd.read_csv(tmp_path / "timelines.csv").method) == {"naive", "balanced"}
    draw.pack_layout(plans["balanced"].table, 256, packs=3, out=tmp_path)
    assert pd.read_csv(tmp_path / "packs.csv").pack.nunique() == 3
    draw.attention_masks([3, 2], tmp_path)
    assert json.loads((tmp_path / "masks.json").read_text()) == {"lengths": [3, 2], "causal": 15, "per_document": 9}
    draw.padded_batches([lengths[:4]], ["four"], tmp_path)
    assert pd.read_csv(tmp_path / "padding.csv").padded_to.unique().tolist() == [lengths[:4].max()]
    log = pd.DataFrame({"step": [1, 2], "loss_sequence_mean": [2.0, 1.0], "loss_token_mean": [2.0, 1.5], "tokens_per_second": [9, 9]})
    draw.training_curve(log, tmp_path)
    rows = pd.DataFrame({"row": [0, 1], "loss": [1.0, 2.0], "task": ["a", "b"]})
    draw.held_out_change(rows, rows.assign(loss=[0.5, 2.5]), tmp_path)
    assert pd.read_csv(tmp_path / "held_out.csv").loss_after.tolist() == [0.5, 2.5]
    assert len(list(tmp_path.glob("*.png"))) == 7


@pytest.mark.parametrize("every", [1, 4, 7])
def test_masks_count_all_pairs_and_keep_their_place_however_few_are_drawn(tmp_path, every):
    lengths = [13, 1, 26, 9]
    document = np.repeat(range(4), lengths)
    looks = [(q, k) for q in range(49) for k in range(q + 1)]  # query and key, one by one
    fig = draw.attention_masks(lengths, tmp_path, every=every)
    own = sum(document[q] == document[k] for q, k in looks)
    assert json.loads((tmp_path / "masks.json").read_text()) == {"lengths": lengths, "causal": len(looks), "per_document": own}
    plain, apart = fig.axes
    assert plain.get_title(loc="left") == f"plain causal: {len(looks):,} pairs" and f" {own:,} pairs" in apart.get_title(loc="left")
    left, right, below, above = apart.images[0].get_extent()
    assert (left, above) == (-0.5, -0.5) and right == below and 0 <= right + 0.5 - 49 < every
    for ax, wanted in ((plain, lambda q, k: k <= q), (apart, lambda q, k: k <= q and document[q] == document[k])):
        drawn = ~np.ma.getmaskarray(np.ma.masked_invalid(ax.images[0].get_array()))
        assert drawn.tolist() == [[bool(wanted(q, k)) for k in range(0, 49, every)] for q in range(0, 49, every)]
    assert (f"one token in {every} is drawn" in caption(fig)) == (every > 1)
