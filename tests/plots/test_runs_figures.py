"""Figures about whole runs draw what they are given."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from longalign_lib.plots import runs, style


@pytest.fixture
def held():
    parts = dict(weights=[10.0, 5.0] * 4, gradients=[10.0, 5.0] * 4, optimizer=[60.0, 5.0] * 4, activations=20.0, logits=0.0)
    keys = dict(model=["6B"] * 4 + ["7B"] * 4, gpus=[1, 1, 8, 8] * 2, way=["DDP", "ZeRO-3"] * 4)
    frame = pd.DataFrame(keys | parts)
    return frame.assign(total=frame[list(parts)].sum(axis=1))


def test_bars_of_memory_end_at_their_totals_and_what_does_not_fit_is_coloured(held, tmp_path):
    figure = runs.memory_bars(held, 79.2, tmp_path)
    assert len(figure.axes) == 4
    for ax in figure.axes:
        assert max(p.get_x() + p.get_width() for p in ax.patches) == 100 and len(ax.patches) == 2 * 4  # no logits: no part
        assert [t.get_text() for t in ax.texts] == ["100", "35"]
        assert [to_hex(t.get_color()) for t in ax.texts] == [style.COLOURS[4].lower(), "#000000"]
        assert [line.get_xdata()[0] for line in ax.lines] == [79.2]
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["6B on 1 GPU", "7B on 1 GPU", "6B on 8 GPUs", "7B on 8 GPUs"]
    assert pd.read_csv(tmp_path / "memory.csv").total.tolist() == held.total.tolist()


def log(losses, first=1):
    return pd.DataFrame({"step": np.arange(first, first + len(losses)), "loss": losses})


def test_losses_are_drawn_with_their_differences_from_the_first(tmp_path):
    one, two, three = log([4.0, 2.0]), log([4.0, 2.0]), log([4.0, 2.002])
    above, below = runs.same_losses({"one": one, "two": two, "three": three}, tmp_path).axes
    assert [line.get_label() for line in above.lines] == ["one", "two", "three"]
    assert [line.get_ydata().tolist() for line in below.lines] == [[1e-9, 1e-9], [1e-9, pytest.approx(1e-3)]]  # equal ones on the floor
    assert below.get_ylim()[1] > 1e-3
    table = pd.read_csv(tmp_path / "same_losses.csv")
    assert table.off.tolist() == [0, 0, 0, 0, 0, pytest.approx(1e-3)]


def test_runs_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="two took other steps than 'one'"):
        runs.same_losses({"one": log([1.0, 2.0]), "two": log([1.0])})


def test_a_killed_run_shows_who_took_which_step(tmp_path):
    whole = log([6.0, 5.0, 4.0, 3.0, 2.0])
    again = {"on two": whole, "on one": whole.assign(loss=whole.loss + 0.01)}
    above, below = runs.killed_and_resumed(whole, whole[:3], again, 1, tmp_path).axes
    assert above.get_title(loc="left") == "Killed at step 3, continued from the checkpoint of step 1"
    lanes = [points.get_offsets()[:, 0].tolist() for points in below.collections]
    assert lanes == [[1, 2, 3], [2, 3, 4, 5], [2, 3, 4, 5]]
    faces = [to_hex(c) for c in below.collections[0].get_facecolors()]
    assert faces == ["#000000", "#ffffff", "#ffffff"]  # hollow: lost and taken again
    assert [t.get_text() for t in below.get_yticklabels()] == ["first start", "on two", "on one"]
    table = pd.read_csv(tmp_path / "killed.csv")
    assert table.groupby("run").step.apply(list).to_dict() == {"whole": [1, 2, 3, 4, 5], "killed": [1, 2, 3], "on two": [2, 3, 4, 5],
                                                               "on one": [2, 3, 4, 5]}  # fmt: skip


def test_speeds_mark_what_ran_out_of_memory_and_leave_out_what_was_not_tried(tmp_path):
    rows = [("8k", "packed", 85e3, 0.13, 6.0), ("64k", "packed", 40e3, 0.32, 36.0), ("8k", "flex", 48e3, 0.07, 11.0),
            ("64k", "flex", np.nan, np.nan, np.nan), ("8k", "naive", 30e3, 0.05, 5.0)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["case", "way", "tokens_per_second", "share", "peak_gib"])
    figure = runs.speeds(frame, tmp_path)
    speed, share, peak = figure.axes
    assert sorted(p.get_height() for p in speed.patches if p.get_height()) == [30, 40, 48, 85]
    assert max(p.get_height() for p in share.patches) == pytest.approx(32) and max(p.get_height() for p in peak.patches) == 36
    marks = [len(c.get_offsets()) for c in speed.collections]
    assert sum(marks) == 1 and np.isclose(speed.collections[1].get_offsets()[0][0], 1, atol=0.3)  # flex at 64k; naive there was not tried
    assert [t.get_text() for t in speed.get_xticklabels()] == ["8k", "64k"]


def test_many_cases_stand_below_each_other_each_name_once(tmp_path):
    frame = pd.DataFrame({"case": [f"a long name {k}" for k in range(6)], "way": "packed", "tokens_per_second": np.arange(6) * 1e3,
                          "share": 0.5, "peak_gib": 1.0})  # fmt: skip
    speed, _, peak = runs.speeds(frame, tmp_path, cases_are="sizes").axes
    assert speed.get_position().y0 > peak.get_position().y1 and speed.get_position().x0 == pytest.approx(peak.get_position().x0)
    assert [t.get_text() for t in peak.get_xticklabels()] == frame.case.tolist()
    assert not any(t.get_visible() for t in speed.get_xticklabels()) and (speed.get_xlabel(), peak.get_xlabel()) == ("", "sizes")


def test_figures_need_no_folder(held):
    assert runs.memory_bars(held, 79.2) is not None


def test_waiting_is_drawn_where_it_was_predicted_and_measured(tmp_path):
    frame = pd.DataFrame({"case": ["a", "a", "b"], "plan": ["packed", "naive", "packed"], "waiting": [0.1, 0.4, 0.2],
                          "waiting_timed": [0.2, None, 0.25], "waiting_flops": [0.3, 0.5, 0.35], "waiting_timed_all": [0.6, 0.3, 0.7]})  # fmt: skip
    fig = runs.waiting_beside(frame, tmp_path)
    first, second = fig.axes
    drawn = {c.get_label(): c.get_offsets().filled(-1).tolist() for c in first.collections if c.get_label()[0] != "_"}
    assert drawn["measured"] == [[10, 0], [40, 1]] and drawn["one step: predicted from FLOPs"] == [[30, 0], [50, 1]]
    nan_free = {label: [at for at in places if at[0] >= 0] for label, places in drawn.items()}
    assert nan_free["from packs timed alone"] == [[20, 0]]
    assert nan_free["all steps: from packs timed alone"] == [[60, 0.2], [30, 1.2]]  # a little below, and not joined to the others
    assert [line[:, 0].tolist() for line in first.collections[0].get_segments()] == [[10, 30], [40, 50]]
    assert [t.get_text() for t in second.texts] == ["not run"] and not first.texts
    assert pd.read_csv(tmp_path / "waiting_measured.csv").waiting.tolist() == [0.1, 0.4, 0.2]
