"""Figures about loss weights draw the numbers that they are given."""

import pandas as pd
import pytest

from longalign_lib.plots import weights as draw


def test_packs_show_what_every_sequence_weighs(tmp_path):
    table = pd.DataFrame({"row": [0, 1, 2], "pack": [0, 0, 1], "offset": [0, 10, 0], "length": [10, 6, 16], "targets": [2, 4, 8],
                          "Eq. 4": [1 / 6, 1 / 12, 1 / 24], "other": [0.1, 0.1, 0.05]})  # fmt: skip
    axes = draw.shaded_packs(table, ["Eq. 4", "other"], tmp_path).axes
    assert [t.get_text() for t in axes[0].texts] == ["2 x 0.167\n= 0.33", "4 x 0.083\n= 0.33", "8 x 0.042\n= 0.33"]
    targets = next(p for p in axes[0].patches if p.get_x() in (8, 12))
    assert targets.get_width() in (2, 4, 8) and len(axes[0].patches) == 6
    assert (tmp_path / "shaded_packs.png").stat().st_size > 5_000


def test_shares_and_bias(tmp_path):
    shares = pd.DataFrame({"row": [0, 1], "pack": 0, "targets": [3, 9], "p = 1": [0.5, 0.5], "Eq. 3 (plain packing)": [0.25, 0.75]})
    (ax,) = draw.weight_shares(shares, tmp_path).axes
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[0.5, 0.5], [0.25, 0.75]]
    frame = pd.DataFrame([{"plan": p, "way": w, "length": b, "ratio": r} for p in ("a", "b", "c") for w in ("x", "y")
                          for b, r in (("to 1,024", 0.5), ("over 1,024 to 2,048", 1.0), ("over 2,048", 2.0))])  # fmt: skip
    axes = draw.bias_by_length(frame, tmp_path).axes
    assert axes[0].lines[0].get_ydata().tolist() == [0.5, 1, 2] and [a.get_title(loc="left") for a in axes[:3]] == ["a", "b", "c"]
    assert [t.get_text() for t in axes[2].get_xticklabels()] == ["≤ 1,024", "≤ 2,048", "> 2,048"]


def test_errors_from_the_luckiest_to_the_worst(tmp_path):
    frame = pd.DataFrame({"way": ["right", "wrong"], "smallest_error": [0.0, 0.01], "error": [1e-16, 2.0]})
    (ax,) = draw.naive_errors(frame, tmp_path).axes
    assert [t.get_text() for t in ax.texts] == ["1e-16", "2.00"]
    assert ax.collections[1].get_offsets()[:, 0].tolist() == pytest.approx([1e-17, 0.01])
