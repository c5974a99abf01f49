"""Figures of a data card draw what they are given."""

import numpy as np
import pandas as pd
import pytest

from longalign_lib.plots import card as figures


def test_lengths_are_stacked_by_language(tmp_path):
    length = np.random.default_rng(0).integers(10, 9000, 200)
    frame = pd.DataFrame({"length": length, "language": np.where(np.arange(200) % 10, "en", "zh")})
    left, right = figures.sample_lengths(frame, tmp_path).axes
    assert sum(bar.get_height() for bar in left.patches) == 200
    table = pd.read_csv(tmp_path / "sample_lengths.csv")
    assert table.groupby("language").samples.sum().to_dict() == {"en": 180, "zh": 20}
    x, y = right.lines[1].get_data()
    half = np.searchsorted(y, 0.5)
    assert length[length <= x[half]].sum() == pytest.approx(length.sum() / 2, rel=0.05)


def test_origins_and_variety(tmp_path):
    frame = pd.DataFrame({"source": ["a", "a", "b"], "task": ["t", "u", "t"]})
    (ax,) = figures.origins(frame, tmp_path).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "a"] and sum(p.get_width() for p in ax.patches) == 3
    opening = pd.DataFrame({"opening": [f"o {k}" for k in range(20)], "questions": range(20, 0, -1), "share": np.arange(20, 0, -1) / 210})
    left, right = figures.variety(opening, np.array([0.0, 1.0, 0.5]), tmp_path).axes
    assert left.get_title(loc="left").endswith("(8 more beginnings)") and sum(p.get_height() for p in right.patches) == 3
    assert [t.get_text() for t in left.get_yticklabels()][-1] == "o 0"


def test_what_no_font_can_draw_is_numbered_not_boxed(monkeypatch):
    from longalign_lib.plots import style

    assert style.can_draw("What is") and not style.can_draw("\U0010fffd")
    monkeypatch.setattr(style, "can_draw", str.isascii)
    frame = pd.DataFrame({"opening": ["what is", "为 什"], "questions": [2, 1], "share": [2 / 3, 1 / 3]})
    fig = figures.variety(frame, np.zeros(3))
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["Chinese, no. 2", "what is"]
    assert "numbered" in fig.get_supxlabel() and "numbered" not in figures.variety(frame[:1], np.zeros(3)).get_supxlabel()


@pytest.mark.parametrize("text, named", [("为 什", "Chinese"), ("なぜ 橋", "Japanese"), ("왜", "Korean"), ("какой мост", "Cyrillic"), ("what 为", "Chinese"),
                                         ("\U0010fffd", "text")])  # fmt: skip
def test_what_cannot_be_drawn_is_named_by_its_script(text, named):
    assert figures.script(text) == named
