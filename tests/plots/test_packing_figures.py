"""Figures about packing: the numbers beside each picture follow from what was handed in."""

import numpy as np
import pandas as pd
import pytest
from test_plan_figures import labels_that_overlap

from longalign_lib.plots import packing as figures


def test_a_worked_example_is_drawn_block_by_block(tmp_path):
    packings = {"next_fit": [0, 0, 1, 2], "best_fit_decreasing": [0, 0, 1, 0]}
    fig = figures.packing_picture([3, 4, 5, 2], packings, 9, cost=lambda n: n**2, out=tmp_path)
    first = [(p.get_y() + p.get_height() / 2, p.get_x(), p.get_width()) for p in fig.axes[0].patches]
    assert [round(w) for y, x, w in first if round(y) == 0] == [9, 3, 4], "the grey line of a pack, then its rows in order"
    second = [(p.get_y() + p.get_height() / 2, p.get_x(), p.get_width()) for p in fig.axes[1].patches]
    assert [(round(x), round(w)) for y, x, w in second if round(y) == 0] == [(0, 9), (0, 4), (4, 3), (7, 2)], "longest first"
    assert fig.axes[1].get_title(loc="left") == "best_fit_decreasing: 2 packs, 78% full"
    assert [t.get_text() for t in fig.axes[1].texts if "cost" in t.get_text()] == ["cost 29", "cost 25"]
    assert pd.read_csv(tmp_path / "packing_picture.csv").tokens.sum() == 28
    assert not labels_that_overlap(fig)


def test_race_with_peers_that_do_not_finish(tmp_path):
    lines = [{"data": "the mix", "algorithm": name, "rows": rows, "seconds": s, "fill": fill, "bound": 0.99999}
             for name, fill, times in (("next_fit", 0.8, (0.001, 0.01, 0.1)), ("best_fit_decreasing", 0.9999, (0.004, 0.02, 0.15)),
                                       ("a slow peer", 0.9998, (0.3, 40.0)), ("exact", 1.0, (1.0, 2.0, 3.0)))
             for rows, s in zip((10_000, 100_000, 1_000_000), times)]  # fmt: skip
    fig = figures.packing_race(pd.DataFrame(lines), tmp_path)
    assert [t.get_text() for t in fig.axes[1].texts] == ["20%", "0.010%", "0.020% (100,000 rows)", "0.000%"]
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["10k", "100k", "1M"]
    assert [t.get_text() for t in fig.axes[1].get_yticklabels()] == ["next_fit", "best_fit_decreasing", "a slow peer", "exact"]
    slow = [line for line in fig.axes[0].lines if list(line.get_ydata()) == [0.3, 40.0]]
    assert len(slow) == 1 and slow[0].get_linestyle() == "--"
    assert len(pd.read_csv(tmp_path / "packing_race.csv")) == 11
    assert not labels_that_overlap(fig)


def test_every_contender_has_a_look_of_its_own():
    names = [*figures.ALGORITHM_COLOURS, *(f"peer {k}" for k in range(8))]
    frame = pd.DataFrame([{"data": "d", "algorithm": a, "rows": 10_000 * k, "seconds": k / 10, "fill": 0.9} for a in names for k in (1, 10)])
    fig = figures.packing_race(frame)
    looks = {(line.get_color(), line.get_marker()) for line in fig.axes[0].lines}
    assert len(looks) == 12


def test_pack_contents_counts_rows_and_relative_cost(tmp_path):
    frame = pd.DataFrame({"algorithm": ["a"] * 3 + ["b"] * 3, "pack": [0, 1, 1, 0, 0, 1], "length": [60, 30, 20, 60, 20, 30],
                          "cost": [36.0, 9.0, 4.0, 36.0, 4.0, 9.0]})  # fmt: skip
    fig = figures.pack_contents(frame, 100, shown=5, out=tmp_path)
    packs = pd.read_csv(tmp_path / "pack_contents.csv").set_index(["algorithm", "pack"])
    assert packs.rows.tolist() == [1, 2, 2, 1] and packs.tokens[("b", 0)] == 80
    assert packs.cost[("a", 0)] == pytest.approx(36 / 24.5) and packs.groupby("algorithm").cost.mean().tolist() == [1, 1]
    assert fig.axes[1].get_title(loc="left") == "1 to 2 rows a pack"
    blocks = [len(c.get_paths()) for c in fig.axes[0].collections]
    assert blocks == [1, 2], "the dearest pack on top, a block a row"
    assert not labels_that_overlap(fig)


def test_fill_against_buffer_draws_the_whole_table_dashed(tmp_path):
    frame = pd.DataFrame({"data": ["x"] * 3, "buffer_rows": [16, 64, 256], "fill": [0.9, 0.99, 1.0], "mean_wait": [15.0, 60.0, 200.0],
                          "longest_wait": [40, 300, 900]})  # fmt: skip
    fig = figures.fill_against_buffer(frame, {"x": 0.995}, tmp_path)
    line, dashed = fig.axes[0].lines
    assert np.allclose(line.get_ydata(), [0.1, 0.01, figures.LEAST]) and np.allclose(dashed.get_ydata(), 0.005)
    assert not labels_that_overlap(fig)
    with pytest.raises(ValueError, match=r"best lacks \['x'\]; it has \[\]"):
        figures.fill_against_buffer(frame, {})
    fig = figures.fill_against_buffer(frame, {"x": 0.995}, bound={"x": 0.998})
    assert np.allclose(fig.axes[0].lines[2].get_ydata(), 0.002) and "dotted: no packing" in fig._supxlabel.get_text()
    with pytest.raises(ValueError, match=r"bound lacks \['x'\]; it has \['y'\]"):
        figures.fill_against_buffer(frame, {"x": 0.995}, bound={"y": 1.0})


def test_planning_cost_draws_a_line_a_contender(tmp_path):
    frame = pd.DataFrame({"rows": [10**4, 10**6] * 2, "contender": ["plan: packed"] * 2 + ["plan: balanced"] * 2,
                          "seconds": [0.01, 0.3, 0.02, 1.5], "peak_mb": [3.0, 250.0, 4.0, 260.0]})  # fmt: skip
    fig = figures.planning_cost(frame, tmp_path)
    assert [line.get_ydata().tolist() for line in fig.axes[1].lines] == [[3, 250], [4, 260]]
    assert [line.get_ydata().tolist() for line in fig.axes[0].lines] == [[0.01, 0.3], [0.02, 1.5]]
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ["packed", "balanced"]
    assert len(pd.read_csv(tmp_path / "planning_cost.csv")) == 4


@pytest.mark.parametrize("figure, more", [(figures.planning_cost, ()), (figures.packing_race, ()), (figures.pack_contents, (10,)), (figures.fill_against_buffer, ({},))])
def test_a_frame_that_lacks_columns_is_named(figure, more):
    with pytest.raises(ValueError, match=r"the frame (lacks columns|has no rows)"):
        figure(pd.DataFrame({"data": ["d"]}), *more)
    with pytest.raises(ValueError, match=r"the frame (lacks columns|has no rows)"):
        figure(pd.DataFrame(), *more)
