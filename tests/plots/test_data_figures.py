"""Figures about data: what is drawn is what was given, and it is saved beside the picture."""

from __future__ import annotations

import pandas as pd
import pytest

from longalign_lib.plots import data as figures


def test_document_lengths(tmp_path):
    frame = pd.DataFrame({"source": ["arxiv"] * 3 + ["books"], "tokens": [900, 20_000, 3_000, 50]})
    fig = figures.document_lengths(frame, tmp_path, window=8192)
    (ax,) = fig.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["books", "arxiv"]  # by median, shortest below
    drawn = [sorted(c.get_offsets()[:, 0].tolist()) for c in ax.collections]
    assert drawn == [[50], [900, 3_000, 20_000]]
    assert {"1", "3", "window 8,192"} <= {t.get_text() for t in ax.texts}
    assert (tmp_path / "document_lengths.png").stat().st_size > 5_000
    assert pd.read_csv(tmp_path / "document_lengths.csv")["tokens"].tolist() == frame["tokens"].tolist()


def test_samples_overview(tmp_path):
    frame = pd.DataFrame(
        {"task": ["a", "a", "a", "b"], "language": ["en", "zh", "en", "zh"], "length": [5, 6, 7, 8], "more": 1}
    )
    left, right = figures.samples_overview(frame, tmp_path).axes
    bars = [(bar.get_x(), bar.get_width()) for bar in left.patches]  # en of b, a; then zh of b, a behind them
    assert bars == [(0, 0), (0, 2), (0, 1), (2, 1)]
    assert [t.get_text() for t in left.get_yticklabels()] == ["b", "a"]
    assert sorted(x for c in right.collections for x in c.get_offsets()[:, 0]) == [5, 6, 7, 8]
    assert (tmp_path / "samples.csv").is_file()


def test_outcomes_count_gates_not_details(tmp_path):
    reasons = ["", "", "cut off: x", "cut off: y", "cut off: z", "empty: q"]
    frame = pd.DataFrame({"outcome": ["accepted"] * 2 + ["rejected"] * 4, "reason": reasons})
    (ax,) = figures.outcomes(frame, tmp_path).axes
    shown = dict(zip([t.get_text() for t in ax.get_yticklabels()], [bar.get_width() for bar in ax.patches]))
    assert shown == {"accepted": 2, "rejected: cut off": 3, "rejected: empty": 1}
    only = figures.outcomes(frame[:2]).axes[0]  # nothing rejected
    assert [t.get_text() for t in only.get_yticklabels()] == ["accepted"]


@pytest.mark.parametrize("draw", [figures.document_lengths, figures.samples_overview, figures.outcomes])
def test_a_frame_that_cannot_be_drawn_is_named(draw):
    with pytest.raises(ValueError, match=r"the frame lacks columns .*needed: one row a document or sample with"):
        draw(pd.DataFrame({"x": [1]}))
