import matplotlib.colors
import numpy as np
import pandas as pd
import pytest

from longalign_lib.plots import evaluate as draw


def texts(ax):
    return [t.get_text() for t in ax.texts]


@pytest.fixture
def grid():
    rows = [
        {"model": m, "length": n, "depth": d, "score": float((k + d) % 3 > 0), "hit": (k + d) % 3 > 0}
        for m in ("before", "after") for n in (500, 9000) for d in (0, 100) for k in range(3)
    ]  # fmt: skip
    rows[0] |= {"score": None, "hit": None}
    return pd.DataFrame(rows)


def test_cells_count_hits_of_those_asked_and_failures_apart(grid, tmp_path):
    fig = draw.needle_grids(grid, window=8192, out=tmp_path)
    saved = pd.read_csv(tmp_path / "needle_grids.csv")
    for row in saved.itertuples():
        cell = grid[(grid.model == row.model) & (grid.length == row.length) & (grid.depth == row.depth)]
        assert (row.n, row.failed) == (cell.score.notna().sum(), cell.score.isna().sum())
        assert row.hits == cell.hit.eq(True).sum()
    assert saved.failed.sum() == 1 and saved.hits.sum() == grid.hit.eq(True).sum() and len(saved) == 8
    assert f"{saved.hits[0]}/{saved.n[0]}" in texts(fig.axes[0])
    assert list(fig.axes[1].lines[0].get_xdata()) == [0.5, 0.5]  # the window's line, between 500 and 9,000
    assert "8,192 tokens: dashed line" in fig._supxlabel.get_text()
    assert fig.axes[0].get_title(loc="left").startswith(f"before: {saved[saved.model == 'before'].hits.sum()} of 11")
    assert (tmp_path / "needle_grids.png").stat().st_size > 5000


def test_a_cell_without_any_answer_says_failed_and_the_window_beyond_goes_to_the_caption(grid):
    grid.loc[grid.length == 500, ["score", "hit"]] = None
    fig = draw.needle_grids(grid, window=16_384)
    assert texts(fig.axes[0]).count("failed") == 2 and not fig.axes[0].lines
    assert "16,384 tokens: not crossed" in fig._supxlabel.get_text()


def test_colours_differ_without_red_green_vision():
    """Simulated deuteranopia (Vienot 1999): ends and middle of the scale stay far apart."""
    rgb = np.array([matplotlib.colors.to_rgb(draw.HIT_OR_MISS(v)) for v in (0.0, 0.5, 1.0)]) ** 2.2
    lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    blind = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    seen = np.clip(rgb @ (np.linalg.inv(lms) @ blind @ lms).T, 0, 1) ** (1 / 2.2)
    assert all(np.linalg.norm(seen[i] - seen[j]) > 0.35 for i, j in ((0, 1), (1, 2), (0, 2)))


def test_the_other_figures_keep_their_numbers(tmp_path):
    shares = pd.DataFrame([{"label": "a", "hits": 1, "n": 2, "low": 0.1, "high": 0.9}])
    draw.proportions(shares, tmp_path)
    assert pd.read_csv(tmp_path / "proportions.csv").equals(shares)
    ladder = pd.DataFrame([{"scorer": s, "id": 1, "known": k, "score": None if s == "b" else k, "scale": (1, 10)}
                           for s in "ab" for k in (2, 6, 10)])  # fmt: skip
    fig = draw.ladders(ladder, tmp_path)
    assert "no score given" in texts(fig.axes[1]) and "0 of 3 answers" in fig.axes[1].get_title(loc="left")
    assert list(fig.axes[0].lines[0].get_ydata()) == [2, 6, 10]
    fig = draw.differences(pd.DataFrame({"label": ["x", "y"], "difference": [1.0, -0.5]}), se=0.5, out=tmp_path)
    assert texts(fig.axes[0]) == ["+1.00, 2.0 se", "-0.50, 1.0 se"]
