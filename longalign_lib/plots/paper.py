"""Figures of the paper's own numbers, with the uncertainty that belongs to them, and ours where there are any.

Every function takes plain frames, draws with `style` and returns the figure; ``out=None`` writes nothing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from longalign_lib.plots import style
from longalign_lib.plots.style import COLOURS, GREY

METHOD_COLOURS = {"naive": GREY, "packing": COLOURS[0], "sorted": COLOURS[1]}


def training_hours(frame: pd.DataFrame, out=None):
    """Hours by model and batch method as bars, with the speed-up over naive above each.

    Args:
        frame: columns model, method, hours, speed_up.
    """
    fig, ax = style.new("wide", height=3.8)
    models, methods = list(dict.fromkeys(frame.model)), list(dict.fromkeys(frame.method))
    width = 0.8 / len(methods)
    for k, method in enumerate(methods):
        part = frame[frame.method == method].set_index("model").loc[models]
        x = np.arange(len(models)) + (k - (len(methods) - 1) / 2) * width
        ax.bar(x, part.hours, width * 0.94, color=METHOD_COLOURS.get(method, COLOURS[3]), label=method)
        for at, row in zip(x, part.itertuples()):
            text = f"{row.hours:g} h" + (f"\n{row.speed_up:.2f}x" if method != methods[0] else "")
            ax.text(at, row.hours + 1, text, ha="center", va="bottom", fontsize=8)
    ax.set_xticks(np.arange(len(models)), models)
    ax.set(
        ylabel="hours on 8 GPUs of 80 GB",
        ylim=(0, frame.hours.max() * 1.15),
        title="Training time as published (Figure 5)",
    )
    ax.legend(loc="upper left", ncols=len(methods))
    return style.finish(fig, "paper_training_hours", frame, out, note="the paper's numbers")


def read_with_care(needles: pd.DataFrame, gaps: pd.DataFrame, out=None):
    """Left: needle cells found, with intervals. Right: score differences on LongBench-Chat, with intervals.

    Args:
        needles: columns label, share, low, high (percent).
        gaps: columns label, gap, low, high (points of the 1-10 rating).
    """
    fig, (left, right) = style.new("wide", height=1.7 + 0.34 * max(len(needles), len(gaps)), cols=2)
    for ax, frame, middle in ((left, needles, "share"), (right, gaps, "gap")):
        y = np.arange(len(frame))[::-1]
        value = frame[middle].to_numpy()
        ax.errorbar(value, y, xerr=[value - frame.low, frame.high - value], fmt="o", color=COLOURS[0], capsize=3)
        ax.set_yticks(y, frame.label)
        ax.set_ylim(-0.6, len(frame) - 0.4)
    left.set(xlabel="cells fully right, % (95% Wilson interval)", title="Needle grids (Figure 4)")
    right.axvline(0, color=GREY, linewidth=1)
    right.set(xlabel="rating points (95% interval, unpaired)", title="LongBench-Chat differences")
    both = pd.concat(
        {"needle": needles.rename(columns={"share": "value"}), "gap": gaps.rename(columns={"gap": "value"})},
        names=["panel"],
    ).reset_index(level=0)
    return style.finish(fig, "paper_read_with_care", both, out, note="the paper's numbers, our intervals")


def predicted_hours(frame: pd.DataFrame, out=None):
    """Figure 5's hours as bars, and the range of our prediction as a black line with its two ends.

    Args:
        frame: columns model, method, paper (NaN where the paper has no bar), uniform, log_uniform (hours), as
            `train.paper_scale.beside_paper` returns it.
    """
    models, methods = list(dict.fromkeys(frame.model)), list(dict.fromkeys(frame.method))
    fig, axes = style.new("wide", height=3.6, cols=len(models), sharey=True, squeeze=False)
    for ax, model in zip(axes[0], models):
        part = frame[frame.model == model].set_index("method").loc[methods]
        x = np.arange(len(methods))
        ax.bar(x, part.paper.fillna(0), 0.62, color=[METHOD_COLOURS.get(m, COLOURS[2]) for m in methods], alpha=0.75)
        low, high = part[["uniform", "log_uniform"]].min(axis=1), part[["uniform", "log_uniform"]].max(axis=1)
        ax.vlines(x, low, high, color="black", linewidth=1.5)
        for ends in (low, high):
            ax.hlines(ends, x - 0.14, x + 0.14, color="black", linewidth=1.5)
        for k, (published, top) in enumerate(zip(part.paper, high)):
            if published == published:
                ax.text(k, 1.5, f"{published:g}", ha="center", va="bottom", fontsize=7)
            ax.text(k, top + 3, f"{low.iloc[k]:.0f} to {top:.0f}", ha="center", va="bottom", fontsize=7)
        ax.set_xticks(x, methods, fontsize=8)
        ax.set_xlim(-0.75, len(methods) - 0.4)
        ax.set_title(model, fontsize=10)
    axes[0][0].set(ylabel="hours on 8 GPUs of 80 GB", ylim=(0, frame[["paper", "uniform", "log_uniform"]].max().max() * 1.1))
    return style.finish(fig, "paper_predicted_hours", frame, out, note="bars: published; lines: predicted, for two spreads of the long rows")
