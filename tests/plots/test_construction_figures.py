"""Figures of notebook 01 draw the numbers that they are given."""

import pandas as pd

from longalign_lib.plots import construction as draw


def test_bars_of_tokenizers(tmp_path):
    frame = pd.DataFrame([{"tokenizer": t, "language": x, "characters": c} for t, x, c in (("a", "en", 4.0), ("a", "zh", 0.5), ("b", "en", 1.0), ("b", "zh", 0.3))])
    (ax,) = draw.characters_a_token(frame, tmp_path).axes
    assert sorted(p.get_width() for p in ax.patches) == [0.3, 0.5, 1.0, 4.0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert (tmp_path / "characters_a_token.png").stat().st_size > 5_000


def test_ranges_are_summed_and_in_order(tmp_path):
    report = pd.DataFrame({"source": ["x", "y", "x"], "tokens": ["9000-9999", "1000-1999", "9000-9999"], "available": [5, 7, 1],
                           "wanted": [2, 2, 1], "got": [2, 3, 1]})  # fmt: skip
    (ax,) = draw.drawn(report, tmp_path).axes
    assert [p.get_height() for p in ax.patches] == [7, 6, 3, 3] and ax.lines[0].get_ydata().tolist() == [2, 3]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1,000–1,999", "9,000–9,999"]
    assert ax.get_yscale() == "linear" and ax.get_ylim()[0] == 0 and ax.get_ylabel().startswith("documents")


def test_a_language_without_documents_has_no_range(tmp_path):
    report = pd.DataFrame({"source": ["(none)", "x"], "tokens": ["", "1000-1999"], "available": [0, 5], "wanted": [2, 2], "got": [0, 4]})
    (ax,) = draw.drawn(report, tmp_path).axes
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1,000–1,999"] and [p.get_height() for p in ax.patches] == [5, 4]


def test_gates_show_intervals_and_counts(tmp_path):
    frame = pd.DataFrame([{"reason": "empty", "bad": 2, "recall": 1.0, "recall_low": 0.3, "recall_high": 1.0, "fired": 4,
                           "precision": 0.5, "precision_low": 0.2, "precision_high": 0.8}])  # fmt: skip
    left, right = draw.gate_scores(frame, tmp_path).axes
    assert [t.get_text() for t in left.texts + right.texts] == ["of 2", "of 4"]
    assert right.lines[0].get_xdata().tolist() == [50.0] and left.get_yticklabels()[0].get_text() == "empty"
