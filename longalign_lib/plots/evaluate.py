"""Figures of notebooks 07 and 08: needle grids, shares with intervals, ladders of known quality, standard errors.

Every function takes plain frames, draws in the house style, and writes picture and numbers to ``out`` unless None.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap

from longalign_lib.plots import style

# Red to green as everyone expects, but brick to teal through pale yellow: told apart without red-green vision.
HIT_OR_MISS = LinearSegmentedColormap.from_list("hit_or_miss", ["#C4472B", "#F3DFA2", "#1D8A80"])


def needle_grids(frame: pd.DataFrame, window: int | None = None, out: Path | None = None, name: str = "needle_grids"):
    """A panel a model: prompt length across, depth down, colour for recall, hits of n written in each cell.

    Args:
        frame: a row a prompt: model, length, depth, score (0 to 1; NaN for a failed call), hit.
        window: the model's training window in tokens, marked where it falls.
    """
    models, lengths, depths = (list(dict.fromkeys(frame[c])) for c in ("model", "length", "depth"))
    lengths, depths = sorted(lengths), sorted(depths)
    height = 0.9 + max(2.1, 0.44 * len(depths))
    fig, axes = style.new("wide", height=height, cols=len(models), squeeze=False, sharey=True)
    rows, size = [], 10 if len(lengths) * len(models) <= 10 else 7 if len(lengths) * len(models) <= 26 else 5
    for ax, model in zip(axes[0], models, strict=True):
        mine = frame[frame.model == model]
        table = np.full((len(depths), len(lengths)), np.nan)
        for (y, depth), (x, length) in ((d, c) for d in enumerate(depths) for c in enumerate(lengths)):
            cell = mine[(mine.length == length) & (mine.depth == depth)]
            there = cell[cell.score.notna()]
            hits, n, failed = int(there.hit.astype(bool).sum()), len(there), len(cell) - len(there)
            table[y, x] = there.score.astype(float).mean() if n else np.nan
            dark = n and not 0.25 < table[y, x] < 0.8
            text = f"{hits}/{n}" if n else "failed" if failed else "–"
            ax.text(x, y, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
            rows.append({"model": model, "length": length, "depth": depth, "hits": hits, "n": n, "failed": failed,
                         "recall": table[y, x]})  # fmt: skip
        ax.set_facecolor("#DDDDDD")
        image = ax.imshow(table, cmap=HIT_OR_MISS, vmin=0, vmax=1, aspect="auto")
        ax.set_xticks(
            range(len(lengths)), [f"{v:,}" for v in lengths], fontsize=9,
            **({"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(lengths) > 6 else {}),
        )
        ax.set_yticks(range(len(depths)), [f"{v:g}" for v in depths])
        ax.set_xticks(np.arange(len(lengths) - 1) + 0.5, minor=True)
        ax.set_yticks(np.arange(len(depths) - 1) + 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=1.5)
        ax.tick_params(which="both", length=0)
        ax.spines[:].set_visible(False)
        n, hits = sum(r["n"] for r in rows if r["model"] == model), sum(r["hits"] for r in rows if r["model"] == model)
        apart = "\n" if len(models) > 2 else ": "
        ax.set_title(f"{model}{apart}{hits} of {n} found", fontsize=10 if len(models) > 2 else 11)
        ax.set_xlabel("prompt length (tokens)")
        if window is not None and lengths[0] <= window < lengths[-1]:
            edge = sum(v <= window for v in lengths) - 0.5
            ax.axvline(edge, color="black", linewidth=2, linestyle="--")
    axes[0][0].set_ylabel("needle's depth (% of the text)")
    bar = fig.colorbar(image, ax=axes[0].tolist(), fraction=0.03, pad=0.02, ticks=[0, 0.5, 1])
    bar.set_label("recall")
    bar.outline.set_visible(False)
    note = "in a cell: found of asked"
    if window is not None:
        where = "dashed line" if lengths[0] <= window < lengths[-1] else "not crossed by this grid"
        note += f"; training window {window:,} tokens: {where}"
    return style.finish(fig, name, pd.DataFrame(rows), out, note=note)


def proportions(
    frame: pd.DataFrame, out: Path | None = None, name: str = "proportions", title: str = "Share found, 95% interval"
):
    """Shares with their intervals, one line each.

    Args:
        frame: label, hits, n, low, high (the last two as shares of 1).
    """
    fig, ax = style.new("wide", height=0.9 + 0.36 * len(frame))
    place = np.arange(len(frame))
    share = frame.hits / frame.n
    ax.hlines(place, 100 * frame.low, 100 * frame.high, color=style.COLOURS[0], linewidth=6, alpha=0.35)
    ax.plot(100 * share, place, "o", color=style.COLOURS[0], markersize=7, clip_on=False)
    ax.set_yticks(place, [f"{r.label}  ({r.hits} of {r.n})" for r in frame.itertuples()])
    ax.invert_yaxis()
    ax.set(xlim=(0, 101), ylim=(len(frame) - 0.5, -0.5), xlabel="found (%)", title=title)
    return style.finish(fig, name, frame, out)


def ladders(frame: pd.DataFrame, out: Path | None = None, name: str = "ladders"):
    """A panel a scorer: the score it gives to answers whose order of quality is known; a line a question.

    Args:
        frame: scorer, id (question), known (rating by construction), score (NaN where the scorer gave none), scale
            (low, high).
    """
    scorers, ids = list(dict.fromkeys(frame.scorer)), list(dict.fromkeys(frame.id))
    fig, axes = style.new("wide", height=3.2, cols=len(scorers), squeeze=False)
    for ax, scorer in zip(axes[0], scorers, strict=True):
        mine = frame[frame.scorer == scorer]
        for k, item in enumerate(ids):
            line = mine[mine.id == item].sort_values("known")
            line = line[line.score.notna()]
            shift = 0.6 * (k / max(1, len(ids) - 1) - 0.5)  # questions beside each other, not on top
            colour = style.COLOURS[k % 6]
            ax.plot(line.known + shift, line.score.astype(float), "o-", color=colour, alpha=0.75, markersize=5)
        missing = int(mine.score.isna().sum())
        low, high = mine.scale.iloc[0]
        margin = 0.04 * (high - low)
        ax.set(ylim=(low - margin, high + margin), xlabel="quality by construction", ylabel="score given")
        ax.set_title(f"{scorer}\n{len(mine) - missing} of {len(mine)} answers got a score", fontsize=10)
        ax.set_xticks(sorted(frame.known.unique()))
        if missing == len(mine):
            ax.text(0.5, 0.5, "no score given", transform=ax.transAxes, ha="center", color=style.GREY)
    data = frame.drop(columns="scale")
    return style.finish(
        fig, name, data, out, note="a line joins the answers to one question; a perfect scorer only rises"
    )


def differences(frame: pd.DataFrame, se: float, out: Path | None = None, name: str = "differences", what: str = ""):
    """Differences between methods as bars, over bands of one and two standard errors of such a difference.

    Args:
        frame: label, difference (in points).
        se: standard error of one difference.
        what: how the standard error was obtained; goes into the caption.
    """
    fig, ax = style.new("wide", height=1.1 + 0.36 * len(frame))
    place = np.arange(len(frame))
    for k in (2, 1):
        ax.axvspan(-k * se, k * se, color=style.GREY, alpha=0.18, linewidth=0)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.barh(place, frame.difference, height=0.55, color=style.COLOURS[0])
    reach = max(2.4 * se, 1.5 * frame.difference.abs().max())
    for y, value in zip(place, frame.difference, strict=True):
        side = 1 if value >= 0 else -1
        ax.text(value + 0.02 * reach * side, y, f"{value:+.2f}, {abs(value) / se:.1f} se", va="center", fontsize=9,
                ha="left" if side > 0 else "right")  # fmt: skip
    ax.set_yticks(place, frame.label)
    ax.invert_yaxis()
    ax.set(xlim=(-reach, reach), xlabel="points on LongBench-Chat (1-10)", title="Differences against their noise")
    return style.finish(fig, name, frame, out, note=f"grey: one and two standard errors{', ' + what if what else ''}")
