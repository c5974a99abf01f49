"""Figures about loss weights: what a token weighs, what a sequence counts, what lengths hold of an epoch, which gradients are off.

Every function takes plain frames, draws in the house style, and writes picture and numbers to ``out`` unless it is None.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from longalign_lib.plots import style


def shaded_packs(table: pd.DataFrame, ways: list[str], out: Path | None = None, name: str = "shaded_packs"):
    """Packs as lines of blocks: prompt tokens in grey, target tokens as dark as they weigh; a panel a weighting.

    Args:
        table: a row a sequence: row, pack, offset, length, targets (the last tokens of the row), and a column of the weight of one
            target token for each of ``ways``.
    """
    import matplotlib as mpl

    most, end = float(table[ways].max().max()), int((table.offset + table.length).max())
    shade = mpl.colormaps["Blues"]
    fig, axes = style.new("wide", height=0.7 + 1.1 * len(ways), rows=len(ways), sharex=True, squeeze=False)
    for ax, way in zip(axes[:, 0], ways, strict=True):
        for r in table.itertuples():
            weight, prompt = table.loc[r.Index, way], r.length - r.targets
            ax.barh(r.pack, prompt, left=r.offset, color="#E6E6E6", edgecolor="white")
            dark = weight / most
            ax.barh(r.pack, r.targets, left=r.offset + prompt, color=shade(0.1 + 0.85 * dark), edgecolor="white")
            ax.text(r.offset + prompt + r.targets / 2, r.pack, f"{r.targets} x {weight:.3f}\n= {r.targets * weight:.2f}", ha="center", va="center",
                    fontsize=8, color="white" if dark > 0.55 else "black")  # fmt: skip
        ax.set(title=way, yticks=sorted(table.pack.unique()), ylabel="pack", xlim=(0, end))
        ax.invert_yaxis()
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.tick_params(length=0)
    axes[-1, 0].set_xlabel("tokens")
    return style.finish(fig, name, table, out, note="grey: prompt; blue: target tokens, number x weight of each = the sequence's share")


def weight_shares(table: pd.DataFrame, out: Path | None = None, name: str = "weights"):
    """Share of one step's loss that each sequence holds, under several weightings.

    Args:
        table: a row a sequence: targets, and one column of shares for each weighting (each sums to 1).
    """
    ways = [c for c in table.columns if c not in ("row", "pack", "targets", "length")]
    fig, ax = style.new("wide", height=3.3)
    order = table.sort_values("targets")
    for k, way in enumerate(ways):
        line = "o" if "plain" in way else "o-"  # plain packing's share depends on the pack, not only on the length
        ax.plot(order.targets, order[way], line, color=style.COLOURS[k], markersize=5, label=way, alpha=0.85)
    ax.axhline(1 / len(table), color=style.GREY, linewidth=0.8, linestyle="--")
    ax.set(xscale="log", yscale="log", xlabel="target tokens of the sequence", ylabel="share of the step's loss weight",
           title="How much does a sequence count?")  # fmt: skip
    style.plain_log(ax.xaxis, ax.yaxis)
    ax.legend()
    return style.finish(fig, name, table, out, note="dashed: the same for every sequence")


def bias_by_length(frame: pd.DataFrame, out: Path | None = None, name: str = "bias_by_length"):
    """What rows of a length hold of the epoch's loss weight, over their share of rows; a panel a plan, a line a weighting.

    Args:
        frame: columns plan, way, length (a bucket's name, in order), ratio (1 = every row alike).
    """
    plans, ways = (list(dict.fromkeys(frame[c])) for c in ("plan", "way"))
    buckets = list(dict.fromkeys(frame.length))
    fig, axes = style.new("wide", height=2.9 * -(-len(plans) // 2) + 0.3, rows=-(-len(plans) // 2), cols=2, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(plans) :]:
        ax.set_axis_off()
    for ax, plan in zip(axes.flat, plans):
        for k, way in enumerate(ways):
            line = frame[(frame.plan == plan) & (frame.way == way)].set_index("length").ratio.reindex(buckets)
            ax.plot(range(len(buckets)), line, "os^Dv"[k % 5] + "-", color=style.COLOURS[k], markersize=4.5, label=way, alpha=0.9)
        ax.axhline(1, color=style.GREY, linewidth=0.8, linestyle="--")
        ax.set(yscale="log", title=plan)
        style.plain_log(ax.yaxis)
        short = [b.removeprefix("over ").split(" to ")[-1].replace("to ", "") for b in buckets]
        ax.set_xticks(range(len(buckets)), ["≤ " + s if not b.startswith("over") or " to " in b else "> " + s for s, b in zip(short, buckets)],
                      rotation=40, ha="right", fontsize=8)  # fmt: skip
    for ax in axes[:, 0]:
        ax.set_ylabel("weight over share of rows")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    return style.finish(fig, name, frame, out, note="tokens a row; dashed: every row counts the same")


def naive_errors(frame: pd.DataFrame, out: Path | None = None, name: str = "naive_errors", least: float = 1e-17):
    """Relative errors of gradients, from the luckiest to the worst way to cut a batch; a line a normalisation.

    Args:
        frame: columns way, smallest_error, error (the largest).
    """
    fig, ax = style.new("wide", height=0.37 * len(frame) + 1.1)
    place = np.arange(len(frame))
    low, high = (np.maximum(frame[c].to_numpy(dtype=float), least) for c in ("smallest_error", "error"))
    colours = [style.COLOURS[2] if e < 1e-9 else style.COLOURS[4] for e in high]
    ax.hlines(place, low, high, color=colours, linewidth=4, alpha=0.4)
    ax.scatter(low, place, s=24, color=colours, facecolors="white", zorder=3)
    ax.scatter(high, place, s=30, color=colours, zorder=3)
    for y, at, value in zip(place, high, frame.error):
        ax.text(at * 3, y, f"{value:.1g}" if value < 1e-3 else f"{value:.2f}", va="center", fontsize=8)
    ax.set_yticks(place, frame.way, fontsize=8)
    ax.set(xscale="log", xlim=(least / 3, 1e3), xlabel="relative error of the gradient", title="Does the cutting change the gradient?")
    ax.invert_yaxis()
    return style.finish(fig, name, frame, out, note="open: the luckiest cutting, full: the worst")
