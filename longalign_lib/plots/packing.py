"""Figures about packing: a worked example, the race of algorithms, what packs hold, buffers of a stream.

Every function takes plain frames, dicts and arrays, draws in the house style, and writes picture and numbers to ``out`` unless
it is None. Shares are fractions of one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter

from longalign_lib.plots import style
from longalign_lib.plots.plan import groups, need, percent, thousands

ALGORITHM_COLOURS = {"next_fit": style.COLOURS[4], "first_fit_decreasing": style.COLOURS[1],
                     "best_fit_decreasing": style.COLOURS[0], "cost_balanced": style.COLOURS[2]}  # fmt: skip
LEAST = 1e-6  # shares of zero are drawn here on logarithmic axes


def packing_picture(lengths, packings: dict, capacity: int, cost=None, out: Path | None = None, name: str = "packing_picture"):
    """A worked example: a panel an algorithm, a line a pack, a block a row with its tokens, grey for room left over.

    Args:
        lengths: int[n], a few rows, in the order in which they came.
        packings: algorithm -> pack number of every row.
        cost: lengths -> cost of each row; each pack's sum is written beside it.
    """
    lengths = np.asarray(lengths)
    most, shades = max(int(np.max(p)) + 1 for p in packings.values()), sorted(set(lengths.tolist()))
    fig, axes = style.new("wide", height=0.9 + (0.55 + 0.3 * most) * -(-len(packings) // 2), rows=-(-len(packings) // 2), cols=2,
                          squeeze=False, sharex=True, sharey=True)  # fmt: skip
    for ax in axes.flat[len(packings) :]:
        ax.set_axis_off()
    frames = []
    for ax, (algorithm, packs) in zip(axes.flat, packings.items()):
        packs, costs = np.asarray(packs), np.zeros(len(lengths)) if cost is None else np.asarray(cost(lengths), dtype=float)
        for pack in range(int(packs.max()) + 1):
            at, rows = 0, np.flatnonzero(packs == pack)
            ax.barh(pack, capacity, color="#E6E6E6")
            for row in rows if algorithm == "next_fit" else rows[np.argsort(-lengths[rows], kind="stable")]:
                colour = style.COLOURS[shades.index(lengths[row]) % 7]
                ax.barh(pack, lengths[row], left=at, color=colour, alpha=0.75, edgecolor="white")
                ax.text(at + lengths[row] / 2, pack, str(lengths[row]), ha="center", va="center", fontsize=9)
                at += lengths[row]
            if cost is not None:
                ax.text(capacity * 1.02, pack, f"cost {costs[rows].sum():g}", va="center", fontsize=8)
        ax.set(xlim=(0, capacity * (1.17 if cost is not None else 1)), yticks=range(most), ylim=(most - 0.5, -0.5),
               xticks=range(0, capacity + 1, max(1, capacity // 6)))  # fmt: skip
        ax.set_title(f"{algorithm}: {packs.max() + 1} packs, {lengths.sum() / (capacity * (packs.max() + 1)):.0%} full", fontsize=10)
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.tick_params(length=0)
        frames.append(pd.DataFrame({"algorithm": algorithm, "row": range(len(lengths)), "tokens": lengths, "pack": packs, "cost": costs}))
    for ax in axes[:, 0]:
        ax.set_ylabel("pack")
    return style.finish(fig, name, pd.concat(frames), out, note="a colour is a length, grey is room left over")


def packing_race(frame: pd.DataFrame, out: Path | None = None, name: str = "packing_race"):
    """Seconds against rows, and the room left empty at the most rows that an algorithm packed; a line of panels a data set.

    Args:
        frame: columns data, algorithm, rows, seconds, fill; optionally bound, the fill that no packing can pass.
    """
    need(frame, "data", "algorithm", "rows", "seconds", "fill")
    parts, names = groups(frame, "data"), list(dict.fromkeys(frame.algorithm))
    others = [a for a in names if a not in ALGORITHM_COLOURS]
    spare = [style.COLOURS[3], style.COLOURS[5], style.COLOURS[7], style.GREY]
    look = {a: (c, "o-") for a, c in ALGORITHM_COLOURS.items()}
    look |= {a: (spare[k % len(spare)], ("s--", "^--", "D--")[k // len(spare) % 3]) for k, a in enumerate(others)}
    fig, axes = style.new("wide", height=len(parts) * (1.3 + 0.23 * max(len(names), 6)) + 0.4, rows=len(parts), cols=2, squeeze=False,
                          sharex="col")  # fmt: skip
    most, fullest = frame.rows.max(), max(frame.fill.max(), frame.bound.max() if "bound" in frame else 0)
    for (left, right), (data, part) in zip(axes, parts, strict=True):
        left.set(xscale="log", yscale="log", xlim=(frame.rows.min() / 1.2, most * 1.2), title=data, ylabel="seconds")
        right.set(xscale="log", xlim=(max(LEAST, 1 - fullest) * 0.4, 30), title=f"room left empty, {most:,} rows")
        here = [a for a in names if (part.algorithm == a).any()]
        for place, algorithm in enumerate(here):
            line = part[part.algorithm == algorithm].sort_values("rows")
            colour, mark = look[algorithm]
            left.plot(line.rows, line.seconds, mark, color=colour, markersize=4)
            empty, rows = max(1 - line.fill.iloc[-1], LEAST), line.rows.iloc[-1]
            right.plot(empty, place, mark[0], color=colour)
            right.annotate(percent(empty) + ("" if rows == most else f" ({rows:,} rows)"), (empty, place), xytext=(7, 0),
                           textcoords="offset points", va="center", fontsize=8)  # fmt: skip
        if "bound" in part:
            least = max(1 - float(part[part.rows == most].bound.iloc[0]), LEAST)
            right.axvline(least, color=style.GREY, linewidth=0.8, linestyle="--")
        right.set(yticks=range(len(here)), ylim=(len(here) - 0.4, -0.6))
        right.set_yticklabels(here, fontsize=8)
        for tick, algorithm in zip(right.get_yticklabels(), here):
            tick.set_color(look[algorithm][0])
        shares = [10.0**e for e in range(0, -7, -1) if right.get_xlim()[0] <= 10.0**e]
        shares = shares[:: 2 if len(shares) > 5 else 1]
        right.set_xticks(shares, [f"{100 * v:.6g}%" for v in shares])
        decades = [10**e for e in range(3, 11) if part.rows.min() <= 10**e <= part.rows.max()]
        left.set_xticks(decades, [f"{d // 10**6}M" if d >= 10**6 else f"{d // 1000}k" for d in decades])
        left.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
    fig.align_ylabels(axes[:, 0])
    axes[-1][0].set_xlabel("rows packed (colours: see right)")
    axes[-1][1].set_xlabel("1 - fill")
    return style.finish(fig, name, frame, out, note="dashed: no packing can leave less empty" if "bound" in frame else "")


def pack_contents(frame: pd.DataFrame, capacity: int, shown: int = 20, out: Path | None = None, name: str = "pack_contents"):
    """What is inside packs: rows as blocks shaded by their length, rows a pack, and cost a pack; a line of panels an algorithm.

    Args:
        frame: a line a row: algorithm, pack, length, cost (of the row).
        shown: how many packs are drawn, evenly spaced from the dearest to the cheapest.
    """
    need(frame, "algorithm", "pack", "length", "cost")
    parts = groups(frame, "algorithm")
    fig, axes = style.new("wide", height=2.7 * len(parts) + 0.4, rows=len(parts), cols=3, squeeze=False, sharey="row", sharex="col",
                          width_ratios=[2.1, 1, 1])  # fmt: skip
    norm, shades = LogNorm(max(16, int(frame.length.min())), capacity), style.plt.get_cmap(style.SEQUENTIAL + "_r")
    tables = []
    for (inside, many, dear), (algorithm, part) in zip(axes, parts, strict=True):
        packs = part.groupby("pack").agg(rows=("length", "size"), tokens=("length", "sum"), cost=("cost", "sum"))
        packs["cost"] /= packs.cost.mean()
        packs = packs.sort_values("cost", ascending=False)
        chosen = packs.iloc[np.unique(np.linspace(0, len(packs) - 1, shown).round().astype(int))]
        lines = dict(iter(part[part.pack.isin(chosen.index)].groupby("pack").length))
        for place, pack in enumerate(chosen.index):
            blocks = np.sort(lines[pack].to_numpy())[::-1]
            inside.broken_barh(list(zip(np.cumsum(blocks) - blocks, blocks)), (place - 0.42, 0.84), facecolors=shades(norm(blocks)),
                               edgecolors="white", linewidths=[0.5 if b > capacity / 200 else 0 for b in blocks])  # fmt: skip
        colour = ALGORITHM_COLOURS.get(algorithm, style.GREY)
        many.barh(range(len(chosen)), chosen.rows, color=colour)
        dear.barh(range(len(chosen)), chosen.cost, color=colour)
        dear.axvline(1, color="black", linewidth=0.8)
        inside.set(title=algorithm, xlim=(0, capacity), yticks=[], ylim=(len(chosen) - 0.4, -0.6), ylabel="packs, dearest on top")
        inside.set_xticks(np.arange(0, capacity + 1, max(1, capacity // 4)))
        thousands(inside.xaxis)
        many.set_title(f"{packs.rows.min():,} to {packs.rows.max():,} rows a pack", fontsize=9)
        dear.set_title(f"cost {packs.cost.min():.2f} to {packs.cost.max():.2f}", fontsize=9)
        many.set_xscale("log")
        style.plain_log(many.xaxis)
        tables.append(packs.reset_index().assign(algorithm=algorithm))
    axes[-1][0].set_xlabel("tokens of the pack; dark: part of a long row")
    axes[-1][1].set_xlabel("rows in the pack")
    axes[-1][2].set_xlabel("cost / mean cost")
    return style.finish(fig, name, pd.concat(tables), out, note=f"{shown} of the packs, evenly spaced by cost; ranges are of all")


def fill_against_buffer(frame: pd.DataFrame, best: dict[str, float], out: Path | None = None, name: str = "fill_against_buffer",
                        bound: dict[str, float] | None = None):  # fmt: skip
    """Streaming: room left empty, and how long rows wait, against the rows that the buffer holds.

    Args:
        frame: columns data, buffer_rows, fill, mean_wait, longest_wait.
        best: data -> fill of one packing of the whole table, drawn dashed.
        bound: data -> fill that no packing can pass, drawn dotted.
    """
    need(frame, "data", "buffer_rows", "fill", "mean_wait", "longest_wait")
    for what, fills in [("best", best), *[("bound", bound)] * (bound is not None)]:
        unknown = set(frame.data) - set(fills)
        if unknown:
            raise ValueError(f"{what} lacks {sorted(unknown)}; it has {sorted(fills)}: give the fill of each data set")
    fig, (left, right) = style.new("wide", height=3.3, cols=2)
    for colour, (data, line) in zip(style.COLOURS, groups(frame, "data")):
        left.plot(line.buffer_rows, np.maximum(1 - line.fill, LEAST), "o-", color=colour, label=data)
        left.axhline(max(1 - best[data], LEAST), color=colour, linewidth=0.9, linestyle="--")
        if bound is not None:
            left.axhline(max(1 - bound[data], LEAST), color=colour, linewidth=1.4, linestyle=":")
        right.plot(line.buffer_rows, line.mean_wait, "o-", color=colour, label=f"{data}, mean")
        right.plot(line.buffer_rows, line.longest_wait, "o:", color=colour, alpha=0.7, label=f"{data}, longest")
    left.set(xscale="log", yscale="log", xlabel="rows in the buffer", ylabel="1 - fill", title="Room left empty")
    left.yaxis.set_major_formatter(FuncFormatter(lambda v, _: percent(v)))
    right.set(xscale="log", yscale="log", xlabel="rows in the buffer", ylabel="rows that came in between", title="How long rows wait")
    for ax in (left, right):
        sizes = sorted(set(frame.buffer_rows))
        ax.set_xticks(sizes, [f"{s:,}" for s in sizes], fontsize=8)
        ax.minorticks_off()
        ax.legend(fontsize=8)
    style.plain_log(right.yaxis)
    return style.finish(fig, name, frame, out, note="dashed: best fit over the whole table" + " · dotted: no packing can leave less empty" * (bound is not None))


def planning_cost(plans: pd.DataFrame, out: Path | None = None, name: str = "planning_cost"):
    """Seconds and peak memory of making whole plans, against the number of rows; all axes logarithmic.

    Args:
        plans: columns rows, contender ("plan: packed", ...), seconds, peak_mb.
    """
    need(plans, "rows", "contender", "seconds", "peak_mb")
    fig, axes = style.new("wide", height=3.2, cols=2)
    for k, (contender, part) in enumerate(plans.sort_values("rows").groupby("contender", sort=False)):
        for ax, what in zip(axes, ("seconds", "peak_mb")):
            ax.plot(part.rows, part[what], marker="o", color=style.COLOURS[k], label=contender.removeprefix("plan: "))
    for ax, label in zip(axes, ("seconds", "peak memory, MB")):
        ax.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
        style.plain_log(ax.yaxis)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e6:g}M" if v >= 1e6 else f"{v / 1e3:g}k"))
    axes[0].set_title("Making a plan, one core")
    axes[0].legend(loc="upper left")
    return style.finish(fig, name, plans[["rows", "contender", "seconds", "peak_mb"]], out)
