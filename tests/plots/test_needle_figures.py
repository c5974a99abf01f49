import matplotlib.colors
import numpy as np
import pandas as pd
import pytest

from longalign_lib.plots import needle as draw


def texts(ax):
    return [t.get_text() for t in ax.texts]


def cells(models, lengths, depths, n=3, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for model in models:
        for length in lengths:
            for depth in depths:
                hits = int(rng.integers(n + 1))
                rows.append({"model": model, "length": length, "depth": depth, "n": n, "failed": 0, "hits": hits, "low": 0.1, "high": 0.9,
                             "recall": hits / n})  # fmt: skip
    return pd.DataFrame(rows)


def test_cells_show_hits_interval_and_failures(tmp_path):
    grid = cells(["before", "after"], [500, 9000], [0, 100])
    grid.loc[0, ["n", "failed", "hits", "low", "high", "recall"]] = [0, 3, 0, 0, 1, np.nan]
    grid.loc[1, ["n", "failed", "hits"]] = [2, 1, 1]
    fig = draw.needle_grids(grid, window=8192, out=tmp_path)
    first, second = fig.axes[:2]
    assert texts(first).count("failed") == 1
    assert "1/2" in texts(first) and "10–90\n1 failed" in texts(first) and "10–90" in texts(second)
    assert [p.get_hatch() for p in first.patches].count("////") == 2 and not second.patches
    assert list(first.lines[0].get_xdata()) == [0.5, 0.5]  # the window's line, between 500 and 9,000
    assert "8,192 tokens: dashed line" in fig._supxlabel.get_text() and "hatched" in fig._supxlabel.get_text()
    assert np.isnan(first.images[0].get_array().filled(np.nan)[0, 0])  # the failed cell has no colour
    mine = grid[grid.model == "after"]
    assert second.get_title(loc="left") == f"after: {mine.hits.sum()} of {mine.n.sum()} found"
    assert pd.read_csv(tmp_path / "needle_grids.csv").equals(grid.astype({"depth": int}))
    assert (tmp_path / "needle_grids.png").stat().st_size > 5000
    svg = (tmp_path / "needle_grids.svg").read_bytes()
    draw.needle_grids(grid, window=8192, out=tmp_path)
    assert svg.startswith(b"<?xml") and (tmp_path / "needle_grids.svg").read_bytes() == svg  # the same figure, the same bytes


def test_colours_stand_where_depth_and_length_say():
    grid = cells(["m"], [4000, 1000, 2000], [100, 0, 50]).sample(frac=1, random_state=3)
    image = draw.needle_grids(grid).axes[0].images[0].get_array()
    for row in grid.itertuples():
        assert image[[0, 50, 100].index(row.depth), [1000, 2000, 4000].index(row.length)] == pytest.approx(row.recall)


def test_large_grids_show_the_intervals_width_in_place_of_text(tmp_path):
    grid = cells(["a", "b"], range(1000, 13_000, 1000), range(0, 100, 9))
    fig = draw.needle_grids(grid, 8192, tmp_path)
    panels = [ax for ax in fig.axes if ax.images and ax.get_xlabel()]
    assert len(panels) == 4 and not any(ax.texts for ax in panels)
    assert sorted(ax.get_title(loc="left") for ax in panels)[2:] == ["how wide the 95% interval is"] * 2
    width = next(ax for ax in panels if ax.get_title(loc="left").startswith("how")).images[0].get_array()
    assert width.shape == (12, 12) and np.allclose(width, 0.8)
    ten = draw.needle_grids(cells(["a", "b"], range(1000, 11_000, 1000), range(0, 100, 10)))
    assert len([ax for ax in ten.axes if ax.texts]) == 2  # ten by ten still has its numbers, side by side


def test_a_window_that_the_grid_does_not_cross_goes_to_the_caption():
    fig = draw.needle_grids(cells(["a"], [500, 900], [0]), window=16_384)
    assert not fig.axes[0].lines and "16,384 tokens: not crossed" in fig._supxlabel.get_text()


def test_bad_tables():
    grid = cells(["a"], [500], [0])
    with pytest.raises(ValueError, match="lack low, high"):
        draw.needle_grids(grid.drop(columns=["low", "high"]))
    with pytest.raises(ValueError, match="given twice"):
        draw.needle_grids(pd.concat([grid, grid]))


# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as seen without one kind of cones.
SEEN = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(rgb):
    """Linear light of sRGB."""
    rgb = np.asarray(rgb, float)
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def to_lab(light):
    """CIELAB of linear sRGB (D65)."""
    xyz = np.clip(light, 0, 1) @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    t = xyz / np.array([0.9505, 1, 1.089])
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


@pytest.mark.parametrize("kind", SEEN)
def test_colours_stay_apart_without_one_kind_of_cones(kind):
    ends = linear([matplotlib.colors.to_rgb(draw.HIT_OR_MISS(v)) for v in (0.0, 0.5, 1.0)])
    seen = to_lab(ends @ np.array(SEEN[kind]).T)
    assert all(np.linalg.norm(seen[i] - seen[j]) > 25 for i, j in ((0, 1), (1, 2), (0, 2)))  # CIE76; 2.3 is just noticeable


def test_shares_keep_their_numbers(tmp_path):
    shares = pd.DataFrame([{"label": "a", "hits": 1, "n": 2, "low": 0.1, "high": 0.9}, {"label": "none", "hits": 0, "n": 0, "low": 0.0, "high": 1.0}])
    fig = draw.proportions(shares, tmp_path)
    assert pd.read_csv(tmp_path / "proportions.csv").equals(shares) and (tmp_path / "proportions.svg").is_file()
    assert fig.axes[0].lines[0].get_xdata()[0] == 50
