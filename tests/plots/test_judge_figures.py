import numpy as np
import pandas as pd
import pytest

from longalign_lib.evaluate.audit import PROBES, audit
from longalign_lib.evaluate.known_judges import KnownJudge
from longalign_lib.evaluate.longbench_chat import read_items
from longalign_lib.plots import judge as draw


def texts(ax):
    return [t.get_text() for t in ax.texts]


def test_ladders_draw_a_line_a_question_and_count_what_is_missing(tmp_path):
    ladder = pd.DataFrame([{"scorer": s, "id": 1, "known": k, "score": None if s == "b" else k, "scale": (1, 10)}
                           for s in "ab" for k in (2, 6, 10)])  # fmt: skip
    fig = draw.ladders(ladder, tmp_path)
    assert "no score given" in texts(fig.axes[1]) and "0 of 3 answers" in fig.axes[1].get_title(loc="left")
    assert list(fig.axes[0].lines[0].get_ydata()) == [2, 6, 10] == list(fig.axes[0].lines[0].get_xdata())
    assert (tmp_path / "ladders.svg").read_text().lstrip().startswith("<?xml")


def test_ladders_tick_the_levels_and_name_one_that_some_questions_lack():
    rows = [{"scorer": "a", "id": i, "known": k, "score": k, "scale": (0, 4)} for i in (1, 2, 3) for k in range(5) if (i, k) != (2, 1)]
    fig = draw.ladders(pd.DataFrame(rows))
    ax = fig.axes[0]
    assert ax.get_title(loc="left") == "a\n14 of 14 answers got a score\nlevel 1 made for 2 of 3 questions"
    assert ax.get_xticks().tolist() == [0, 1, 2, 3, 4] and ax.get_xlim() == (-0.5, 4.5)
    beside = [np.round(line.get_xdata() - line.get_ydata(), 9).tolist() for line in ax.lines]
    assert beside == [[-0.3] * 5, [0] * 4, [0.3] * 5] and "0.3 beside the levels" in fig.get_supxlabel()


def test_differences_are_told_in_standard_errors(tmp_path):
    fig = draw.differences(pd.DataFrame({"label": ["x", "y"], "difference": [1.0, -0.5]}), se=0.5, out=tmp_path)
    assert texts(fig.axes[0]) == ["+1.00, 2.0 se", "-0.50, 1.0 se"]


def test_an_audit_has_a_panel_a_probe_and_a_mark_a_judge(tmp_path):
    judges = [KnownJudge("none"), KnownJudge("obedient"), KnownJudge("asleep")]
    table = pd.concat([audit(j, read_items()[:4], progress=False).table for j in judges], ignore_index=True)
    fig = draw.audits(table, tmp_path)
    assert len([ax for ax in fig.axes if ax.get_visible()]) == len(PROBES) == len(draw.PANELS)
    at = [p[0] for p in draw.PANELS].index("injection")
    marks = [line for line in fig.axes[at].lines if line.get_marker() in "oD"]
    want = table[(table.probe == "injection") & (table.measure == "rise (points)")]
    assert [float(np.ravel(m.get_xdata())[0]) for m in marks] == want.value.tolist()
    assert [m.get_marker() for m in marks] == ["D" if f else "o" for f in want.finding] == ["o", "D", "o"]
    labels = [t.get_text().replace("\n", " ") for t in fig.axes[0].get_yticklabels()]
    assert labels == [j.label for j in judges]  # whole, on as many lines as they need
    fig.canvas.draw()
    page, columns = fig.bbox, [ax.get_yticklabels() for ax in fig.axes[::3]]
    assert len({t.get_fontsize() for c in columns for t in c}) == 1
    words = [t for c in columns for t in c] + [ax._left_title for ax in fig.axes]
    assert all(t.get_window_extent().x0 >= page.x0 and t.get_window_extent().x1 <= page.x1 for t in words)
    assert texts(fig.axes[0]) == ["no value"]  # one rating for everything gives no correlation
    assert pd.read_csv(tmp_path / "audit.csv").value.round(6).equals(table.value.round(6))
    with pytest.raises(ValueError, match="lacks finding"):
        draw.audits(table.drop(columns="finding"))
