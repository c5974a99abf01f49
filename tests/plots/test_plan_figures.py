"""Figures about plans: what they draw and write is what was handed in, and no label lies on another."""

import itertools

import numpy as np
import pandas as pd
import pytest

from longalign_lib.plots import plan as figures
from longalign_lib.plots import train as draw
from longalign_lib.train.audit import report, weight_shares
from longalign_lib.train.cost import Simulation, StepCost, simulate
from longalign_lib.train.plan import build_plan


def labels_that_overlap(fig) -> list[tuple[str, str]]:
    """Pairs of visible texts (titles, ticks, axis labels, notes) whose boxes share more than a pixel or two."""
    fig.canvas.draw()
    texts = [fig._supxlabel] if fig._supxlabel else []
    for ax in fig.axes:
        texts += [ax.xaxis.label, ax.yaxis.label, ax._left_title, ax.title, *ax.texts]
        texts += [*ax.get_xticklabels(), *ax.get_yticklabels()]
    boxes = [(t.get_text(), t.get_window_extent().padded(-1.5)) for t in texts if t.get_text().strip() and t.get_visible()]
    return [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]


@pytest.fixture(scope="module")
def lengths():
    r = np.random.default_rng(0)
    return np.where(r.random(600) < 0.1, r.integers(8192, 65_537, 600), r.integers(16, 3000, 600))


def test_the_check_of_overlaps_can_fail():
    fig, ax = figures.style.new("half")
    ax.text(0.5, 0.5, "one")
    ax.text(0.5, 0.5, "two")
    assert labels_that_overlap(figures.style.finish(fig, "x", {})) == [("one", "two")]


def test_long_tail_counts_rows_and_tokens(tmp_path):
    rows = np.array([1, 2048, 2049, 20_000])
    fig = figures.long_tail({"four": rows}, out=tmp_path)
    bins = pd.read_csv(tmp_path / "long_tail.csv").set_index("to")
    assert bins.rows[2048] == 0.5 and bins.rows[4096] == 0.25, "a row of exactly 2,048 tokens belongs in the first bin"
    assert bins.tokens[2048] == pytest.approx(2049 / rows.sum()) and bins.rows.sum() == bins.tokens.sum() == 1
    assert "25% of rows are over 8k" in fig.axes[0].get_title(loc="left")


def test_time_shares_are_bars_end_to_end(tmp_path):
    frame = pd.DataFrame({"data": ["a", "a", "b", "b"], "plan": ["naive", "balanced"] * 2, "work": [0.2, 0.9, 0.3, 0.99],
                          "fixed": [0.1, 0.0, 0.1, 0.0], "padding": [0.1, 0.0, 0.0, 0.0], "waiting": [0.6, 0.1, 0.6, 0.01],
                          "speed_up": [1.0, 3.5, 1.0, 4.0]})  # fmt: skip
    fig = figures.time_shares(frame, tmp_path)
    bars = [(b.get_y(), b.get_x(), b.get_width()) for b in fig.axes[0].patches]
    ends = {y: sum(w for z, _, w in bars if z == y) for y, _, _ in bars}
    assert [pytest.approx(1)] * 2 == list(ends.values())
    assert "3.50x" in [t.get_text() for t in fig.axes[0].texts]
    assert pd.read_csv(tmp_path / "time_shares.csv").equals(frame)
    assert not labels_that_overlap(fig)


def test_figures_of_real_plans(tmp_path, lengths):
    reports, shares = [], []
    for k, (name, method, algorithm) in itertools.product(
        (8, 16), (("packed", "packed", None), ("balanced", "balanced", None), ("balanced, best-fit packs", "balanced", "best_fit_decreasing"))
    ):
        plan = build_plan(lengths, method=method, algorithm=algorithm, capacity=65_536, packs_per_step=k, max_ranks=8)
        reports.append({"plan": name, "packs_per_step": k, "pool": None, "filling": name} | report(plan, 8))
        shares.append(weight_shares(plan).assign(plan=name, packs_per_step=k))
    reports, shares = pd.DataFrame(reports), pd.concat(shares)
    fig = figures.sequences_a_step(reports, tmp_path)
    row = reports.iloc[0]
    assert f"{row.M_min:,} · {row.M_median:,.0f} · {row.M_max:,}" in [t.get_text() for t in fig.axes[0].texts]
    assert not labels_that_overlap(fig)
    fig = figures.weight_ratios(shares, tmp_path)
    drawn = {line.get_label(): line.get_ydata() for line in fig.axes[1].lines}
    wanted = shares[(shares.packs_per_step == 16) & (shares.plan == "balanced")].ratio
    assert np.allclose(drawn["balanced"], wanted)
    fig = figures.balance_against_bias(reports, out=tmp_path)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["packed", "balanced", "balanced, best-fit packs"]
    assert {p.stem for p in tmp_path.glob("*.png")} == {p.stem for p in tmp_path.glob("*.csv")} == {
        "sequences_a_step", "weight_ratios", "balance_against_bias"}  # fmt: skip


def test_one_plan_and_one_size_can_be_drawn():
    one = pd.DataFrame({"plan": ["packed"], "packs_per_step": 8, "M_min": 5, "M_median": 5.0, "M_max": 5, "filling": "best fit", "pool": 1.0,
                        "worst_over_mean": 1.0, "long_ratio": 1.0, "length": "to 10", "rows": 1.0, "ratio": 1.0, "data": "d",
                        "method": "naive", "rows_per_pack": 1, "padding": 0.0})  # fmt: skip
    for figure in (figures.sequences_a_step, figures.balance_against_bias, figures.weight_ratios, figures.padding_by_rows):
        assert figure(one).axes[0].lines, figure.__name__
    figures.long_tail({"equal": np.full(5, 100)})


def test_padding_lines_end_in_their_numbers():
    frame = pd.DataFrame({"data": "d", "method": ["naive"] * 3 + ["sorted"] * 3, "rows_per_pack": [1, 2, 4] * 2,
                          "padding": [0, 0.4, 0.613, 0, 0.001, 0.0052]})  # fmt: skip
    fig = figures.padding_by_rows(frame)
    assert [t.get_text() for t in fig.axes[0].texts] == ["naive 61%", "sorted 0.5%"]
    assert not labels_that_overlap(fig)


def test_timeline_shows_a_rank_without_a_pack_as_waiting():
    plan = build_plan(np.full(3, 10), method="naive", capacity=16, packs_per_step=4, max_ranks=4)
    run = simulate(plan, 4, StepCost(0.0, 1.0, 0.0))
    assert isinstance(run, Simulation) and run.timeline["rank"].max() == 2
    fig = draw.timelines({"naive": run}, steps=1)
    grey = [c for c in fig.axes[0].collections if np.allclose(c.get_facecolor()[0][:3], 0xDD / 255)]
    assert len(grey) == 3 and all(c.get_paths()[0].get_extents().x1 == pytest.approx(10) for c in grey)
    assert fig.axes[0].get_xlabel().startswith("simulated seconds")


def test_captions_say_what_the_times_are_of():
    run = simulate(build_plan([10], method="naive", capacity=16, packs_per_step=1), 1, StepCost(0.0, 1.0, 0.0))
    shares = pd.DataFrame({"data": "d", "plan": ["naive"], "work": 1.0, "fixed": 0.0, "padding": 0.0, "waiting": 0.0, "speed_up": 1.0})
    for draws in (lambda **more: draw.timelines({"naive": run}, steps=1, **more), lambda **more: figures.time_shares(shares.assign(**more))):
        assert " · simulated: a 7B model" in draws(of="simulated: a 7B model")._supxlabel.get_text()
        assert "simulated: " not in draws()._supxlabel.get_text()


def test_every_plan_of_the_comparison_has_its_own_colour():
    plans = ["naive", "sorted", "packed, next-fit", "packed", "balanced, best-fit packs", "balanced"]
    assert len({figures.PLANNER_COLOURS[p] for p in plans}) == len(plans)


@pytest.mark.parametrize("value, words", [(0.194, "19%"), (0.0996, "10%"), (0.0041, "0.4%"), (0.00012, "0.012%"), (0, "0.000%")])
def test_small_shares_keep_their_digits(value, words):
    assert figures.percent(value) == words


@pytest.mark.parametrize("figure", [figures.padding_by_rows, figures.time_shares, figures.sequences_a_step, figures.weight_ratios,
                                    figures.balance_against_bias])  # fmt: skip
def test_a_frame_that_lacks_columns_is_named(figure):
    with pytest.raises(ValueError, match=r"the frame lacks columns .* needed: "):
        figure(pd.DataFrame({"plan": ["naive"], "data": ["d"]}))
    with pytest.raises(ValueError, match=r"the frame (lacks columns|has no rows)"):
        figure(pd.DataFrame())
