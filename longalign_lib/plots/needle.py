"""Figures of needle tests: grids of length and depth with their intervals, shares of areas, prefill computed and saved.

Everyone expects these grids green and red. Here green leans to teal and red to brick, with pale yellow between, so that the
ends and the middle stay apart for readers without red, green or blue cones (a test simulates all three); the number is in the
cell besides. A cell shows hits of answered prompts and, small, the 95% interval of the share. Where a grid has more than
`MOST` rows or columns numbers would be unreadable: a second panel shows the width of each interval instead.

Every function takes plain frames, draws in the house style, and writes picture and numbers to ``out`` unless None.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from longalign_lib.plots import style

HIT_OR_MISS = LinearSegmentedColormap.from_list("hit_or_miss", ["#C4472B", "#F3DFA2", "#1D8A80"])
MOST = 10  # rows or columns up to which a cell holds text
CELL = 0.37  # inches a cell must be wide for its text; models stand side by side as far as that allows
ACROSS = 7.8  # inches for all cells of a row
NEEDS = ("model", "length", "depth", "n", "failed", "hits", "low", "high", "recall")


def needle_grids(cells: pd.DataFrame, window: int | None = None, out: Path | None = None, name: str = "needle_grids"):
    """A panel a model: prompt length across, depth down, colour for recall, hits of n and their interval in each cell.

    Args:
        cells: a row a model, length and depth, with n (answered), failed, hits, low, high (interval of the share of hits),
            recall (mean share of parts found; NaN when nothing was answered).
        window: the model's training window in tokens, marked where it falls.

    Raises:
        ValueError: columns that are missing, or a cell given twice.
    """
    if missing := [c for c in NEEDS if c not in cells]:
        raise ValueError(f"cells lack {', '.join(missing)}: make them with evaluate.needle_score.cells")
    if cells.duplicated(["model", "length", "depth"]).any():
        raise ValueError("a cell is given twice: give one row for each model, length and depth")
    models = list(dict.fromkeys(cells.model))
    lengths, depths = sorted(set(cells.length)), sorted(set(cells.depth))
    large = max(len(lengths), len(depths)) > MOST
    cols = max(1, min(len(models), 2 if large else int(ACROSS / (CELL * len(lengths)))))
    bands = -(-len(models) // cols)
    rows = bands * (2 if large else 1)
    height = rows * (0.75 + max(1.9, 0.46 * len(depths) if not large else 0.13 * len(depths))) + 0.35
    fig, axes = style.new("wide", height=height, rows=rows, cols=cols, squeeze=False, sharey=True)
    images: list = [None, None]
    for i in range(bands * cols):
        at = [axes[(i // cols) * (2 if large else 1) + k][i % cols] for k in range(2 if large else 1)]
        if i >= len(models):
            for ax in at:
                ax.set_visible(False)
            continue
        mine = cells[cells.model == models[i]].set_index(["depth", "length"])
        images[0] = _panel(at[0], mine, lengths, depths, "recall", not large, ACROSS / (cols * len(lengths)))
        at[0].set_title(f"{models[i]}: {int(mine.hits.sum())} of {int(mine.n.sum())} found", fontsize=10)
        if large:
            images[1] = _panel(at[1], mine.assign(width=mine.high - mine.low), lengths, depths, "width", False, 1)
            at[1].set_title("how wide the 95% interval is", fontsize=10)
        for ax in at:
            _axes(ax, lengths, depths, window)
    for row in axes:
        row[0].set_ylabel("needle's depth (% of text)")
    for image, label, first in zip(images, ("recall", "width of interval"), (0, 1), strict=True):
        if image is not None:
            bar = fig.colorbar(image, ax=axes[first :: 2 if large else 1].ravel().tolist(), fraction=0.03, pad=0.02, ticks=[0, 0.5, 1])
            bar.set_label(label)
            bar.outline.set_visible(False)
    return style.finish(fig, name, cells, out, note=_note(lengths, window, large, bool(cells.failed.sum())), svg=True)


def _panel(ax, mine: pd.DataFrame, lengths, depths, what: str, text: bool, width: float):
    table = np.full((len(depths), len(lengths)), np.nan)
    size = min(11.0, 3.5 + 11 * width)
    for y, depth in enumerate(depths):
        for x, length in enumerate(lengths):
            if (depth, length) not in mine.index:
                if text:
                    ax.text(x, y, "–", ha="center", va="center", fontsize=size, color=style.GREY)
                continue
            cell = mine.loc[(depth, length)]
            table[y, x] = cell[what] if cell.n else np.nan
            if cell.failed:
                edge = "#555555" if not cell.n else "white"
                ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor=edge, linewidth=0, alpha=0.35 if cell.n else 0.6))
            if text:
                _numbers(ax, x, y, cell, size)
    ax.set_facecolor("#DDDDDD")
    return ax.imshow(table, cmap=HIT_OR_MISS if what == "recall" else style.SEQUENTIAL, vmin=0, vmax=1, aspect="auto")


def _numbers(ax, x: int, y: int, cell, size: float) -> None:
    colour = "white" if cell.n and not 0.25 < cell.recall < 0.8 else "black"
    box = {"boxstyle": "square,pad=0.15", "facecolor": "#DDDDDD", "edgecolor": "none"} if not cell.n else None
    large = f"{int(cell.hits)}/{int(cell.n)}" if cell.n else "failed" if cell.failed else "–"
    ax.text(x, y - 0.12, large, ha="center", va="center", fontsize=size, color=colour, bbox=box)
    small = f"{100 * cell.low:.0f}–{100 * cell.high:.0f}" if cell.n else ""
    small += f"\n{int(cell.failed)} failed" if cell.n and cell.failed else ""
    if small:
        ax.text(x, y + 0.1, small, ha="center", va="top", fontsize=max(5, 0.66 * size), color=colour, linespacing=0.95)


def _axes(ax, lengths, depths, window) -> None:
    step = max(1, -(-len(lengths) // 12))
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(lengths) > 5 else {}
    ax.set_xticks(range(0, len(lengths), step), [f"{v:,}" for v in lengths[::step]], fontsize=9, **slanted)
    step = max(1, -(-len(depths) // 12))
    ax.set_yticks(range(0, len(depths), step), [f"{v:g}" for v in depths[::step]])
    ax.tick_params(labelleft=True)
    ax.set_xticks(np.arange(len(lengths) - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(len(depths) - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5 if max(len(lengths), len(depths)) <= 2 * MOST else 0.3)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("prompt length (tokens)")
    if window is not None and lengths[0] <= window < lengths[-1]:
        ax.axvline(sum(v <= window for v in lengths) - 0.5, color="black", linewidth=2, linestyle="--")


def _note(lengths, window, large: bool, failed: bool) -> str:
    parts = ["colour: recall" if large else "in a cell: found/answered, below the 95% interval in %"]
    parts += ["hatched: calls that failed"] * failed
    if window is not None:
        crossed = lengths[0] <= window < lengths[-1]
        parts.append(f"training window {window:,} tokens: {'dashed line' if crossed else 'not crossed by this grid'}")
    return "; ".join(parts)


def proportions(
    frame: pd.DataFrame, out: Path | None = None, name: str = "proportions", title: str = "Share found, 95% interval"
):
    """Shares with their intervals, one line each.

    Args:
        frame: label, hits, n, low, high (the last two as shares of 1).
    """
    fig, ax = style.new("wide", height=0.9 + 0.36 * len(frame))
    place = np.arange(len(frame))
    share = frame.hits / frame.n.where(frame.n > 0)
    ax.hlines(place, 100 * frame.low, 100 * frame.high, color=style.COLOURS[0], linewidth=6, alpha=0.35)
    ax.plot(100 * share, place, "o", color=style.COLOURS[0], markersize=7, clip_on=False)
    ax.set_yticks(place, [f"{r.label}  ({r.hits} of {r.n})" for r in frame.itertuples()])
    ax.invert_yaxis()
    ax.set(xlim=(0, 101), ylim=(len(frame) - 0.5, -0.5), xlabel="found (%)", title=title)
    return style.finish(fig, name, frame, out, svg=True)
