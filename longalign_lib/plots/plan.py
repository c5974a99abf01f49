"""Figures about plans: the long tail, padding, where time goes, M a step, who weighs what, balance against bias.

Every function takes plain frames, dicts and arrays, draws in the house style, and writes picture and numbers to ``out`` unless
it is None. Shares are fractions of one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, PercentFormatter

from longalign_lib.plots import style
from longalign_lib.plots.train import METHOD_COLOURS

PLANNER_COLOURS = METHOD_COLOURS | {"balanced, best-fit packs": style.COLOURS[4], "packed, next-fit": style.COLOURS[5]}
LEAST = 1e-6  # shares of zero are drawn here on logarithmic axes


def need(frame: pd.DataFrame, *columns: str) -> None:
    """ValueError unless the frame has rows and these columns."""
    missing = [c for c in columns if c not in frame.columns]
    if missing or frame.empty:
        what = f"lacks columns {missing}" if missing else "has no rows"
        raise ValueError(f"the frame {what}; needed: {', '.join(columns)}")


def groups(frame: pd.DataFrame, column: str) -> list[tuple]:
    """The frame's parts in the order in which they first appear."""
    return [(name, frame[frame[column] == name]) for name in dict.fromkeys(frame[column])]


def percent(value: float) -> str:
    """A share in words that never rounds a small one to nothing: 19%, 0.4%, 0.012%."""
    places = 0 if value >= 0.0995 else 1 if value >= 0.00095 else 3
    return f"{value:.{places}%}"


def thousands(axis) -> None:
    """Tokens as 8k, 16k on an axis."""
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1024:.3g}k" if v >= 1024 else f"{v:g}"))


def long_tail(data: dict[str, np.ndarray], long: int = 8192, width: int = 2048, out: Path | None = None, name: str = "long_tail"):
    """Share of rows in bins of equal width, in the manner of the paper's Figure 3, and their share of the tokens.

    Args:
        data: name -> tokens of every row.
        long: rows over this many tokens are called long.
        width: tokens a bin.
    """
    fig, axes = style.new("wide", height=3.1, cols=len(data), squeeze=False, sharey=True)
    frames = []
    for ax, (label, lengths) in zip(axes[0], data.items(), strict=True):
        lengths = np.asarray(lengths)
        edges = np.arange(0, lengths.max() + width, width)
        rows, _ = np.histogram(lengths - 1, edges)  # a row of exactly 2,048 tokens is in the first bin
        tokens, _ = np.histogram(lengths - 1, edges, weights=lengths)
        rows, tokens = rows / rows.sum(), tokens / tokens.sum()
        ax.bar(edges[:-1], rows, width * 0.9, align="edge", color=style.COLOURS[0], label="share of rows")
        ax.stairs(np.maximum(tokens, LEAST), edges, color=style.COLOURS[1], linewidth=1.8, label="share of tokens")
        ax.axvline(long, color=style.GREY, linewidth=0.8, linestyle="--")
        over = lengths > long
        ax.set_title(f"{label}: {over.mean():.0%} of rows are over {long // 1024}k,\nthey hold {lengths[over].sum() / lengths.sum():.0%} "
                     "of the tokens", fontsize=10)  # fmt: skip
        ax.set(yscale="log", ylim=(2e-4, 1.2), xlabel="tokens a row", xticks=range(0, int(edges[-1]) + 1, 8192 * 2))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.2%}" if v < 0.001 else f"{v:.1%}" if v < 0.01 else f"{v:.0%}"))
        thousands(ax.xaxis)
        frames.append(pd.DataFrame({"data": label, "from": edges[:-1], "to": edges[1:], "rows": rows, "tokens": tokens}))
    axes[0][0].set_ylabel(f"share of all, bins of {width // 1024}k tokens")
    axes[0][-1].legend(loc="upper right")
    return style.finish(fig, name, pd.concat(frames), out)


def padding_by_rows(frame: pd.DataFrame, out: Path | None = None, name: str = "padding_by_rows"):
    """Share of computed tokens that is padding, against the rows that share a batch.

    Args:
        frame: columns data, method, rows_per_pack, padding.
    """
    need(frame, "data", "method", "rows_per_pack", "padding")
    parts = groups(frame, "data")
    fig, axes = style.new("wide", height=2.9, cols=len(parts), squeeze=False, sharey=True)
    for ax, (data, part) in zip(axes[0], parts, strict=True):
        for method, line in groups(part, "method"):
            ax.plot(line.rows_per_pack, line.padding, "o-", color=PLANNER_COLOURS.get(method, style.GREY))
            last = line.iloc[-1]
            ax.annotate(f"{method} {percent(last.padding)}", (last.rows_per_pack, last.padding), xytext=(-4, 7),
                        textcoords="offset points", ha="right", color=PLANNER_COLOURS.get(method, style.GREY))  # fmt: skip
        ax.set(xscale="log", title=data, xlabel="rows that one GPU pads together", ylim=(-0.03, 1))
        ax.set_xticks(sorted(set(part.rows_per_pack)), sorted(set(part.rows_per_pack)))
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    axes[0][0].set_ylabel("padding / tokens computed")
    return style.finish(fig, name, frame, out)


def time_shares(frame: pd.DataFrame, out: Path | None = None, name: str = "time_shares"):
    """Where the GPUs' time goes: real tokens, starting passes, padding, waiting; a bar a plan, with the speed-up beside it.

    Args:
        frame: columns data, plan, work, fixed, padding, waiting (shares of one), speed_up (over the first plan of the data);
            optionally of, one text: what the times are of, for the caption ("simulated: ...").
    """
    need(frame, "data", "plan", "work", "fixed", "padding", "waiting", "speed_up")
    parts = groups(frame, "data")
    fig, axes = style.new("wide", height=1.5 + 0.36 * max(len(p) for _, p in parts), cols=len(parts), squeeze=False, sharey=True)
    kinds = {"work": ("work on real tokens", style.COLOURS[0]), "fixed": ("starting passes", style.COLOURS[5]),
             "padding": ("work on padding", style.COLOURS[1]), "waiting": ("waiting", "#D9D9D9")}  # fmt: skip
    for ax, (data, part) in zip(axes[0], parts, strict=True):
        left = np.zeros(len(part))
        for kind, (label, colour) in kinds.items():
            values = part[kind].to_numpy(dtype=float)
            bars = ax.barh(part.plan, values, left=left, color=colour, label=label)
            ax.bar_label(bars, [f"{v:.0%}" if v >= 0.055 else "" for v in values], label_type="center", fontsize=8,
                         color="white" if kind == "work" else "black")  # fmt: skip
            left = left + values
        for place, speed in enumerate(part.speed_up):
            ax.text(1.02, place, f"{speed:.2f}x", va="center", fontsize=9)
        ax.set(title=data, xlim=(0, 1.16), xticks=[0, 0.25, 0.5, 0.75, 1], xlabel="share of all GPUs' time")
        ax.xaxis.set_major_formatter(PercentFormatter(1))
    axes[0][0].invert_yaxis()
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=9)
    return style.finish(fig, name, frame, out, note=" · ".join(["right of the bars: speed-up over the first plan", *frame.get("of", frame.plan[:0]).unique()]))


def sequences_a_step(frame: pd.DataFrame, out: Path | None = None, name: str = "sequences_a_step"):
    """M, the sequences of a step: line from the smallest to the largest step, a dot at the median.

    Args:
        frame: columns plan, packs_per_step, M_min, M_median, M_max.
    """
    need(frame, "plan", "packs_per_step", "M_min", "M_median", "M_max")
    parts = groups(frame, "packs_per_step")
    fig, axes = style.new("wide", height=1.3 + 0.34 * max(len(p) for _, p in parts), cols=len(parts), squeeze=False, sharey=True)
    for ax, (k, part) in zip(axes[0], parts, strict=True):
        for place, row in enumerate(part.itertuples()):
            colour = PLANNER_COLOURS.get(row.plan, style.GREY)
            ax.plot([row.M_min, row.M_max], [place, place], color=colour, linewidth=4, solid_capstyle="butt", alpha=0.5)
            ax.plot(row.M_median, place, "o", color=colour)
            ax.text(row.M_max * 1.4, place, f"{row.M_min:,.0f} · {row.M_median:,.0f} · {row.M_max:,.0f}", va="center", fontsize=8)
        ax.set(xscale="log", title=f"{k} packs a step", xlabel="sequences M a step", yticks=range(len(part)),
               xlim=(part.M_min.min() * 0.7, part.M_max.max() * 14))  # fmt: skip
        ax.set_yticklabels(part.plan)
        style.plain_log(ax.xaxis)
        ax.set_xticks([10**e for e in range(1, 6) if part.M_min.min() * 0.7 < 10**e < part.M_max.max() * 14])
    axes[0][0].invert_yaxis()
    return style.finish(fig, name, frame, out, note="beside each line: smallest, median, largest step")


def weight_ratios(frame: pd.DataFrame, out: Path | None = None, name: str = "weight_ratios"):
    """Weight of each bucket of lengths in an epoch over its share of the rows: 1 is what the loss wants.

    Args:
        frame: columns plan, packs_per_step, length (bucket, in order), rows (share), ratio.
    """
    need(frame, "plan", "packs_per_step", "length", "rows", "ratio")
    parts = groups(frame, "packs_per_step")
    fig, axes = style.new("wide", height=3.5, cols=len(parts), squeeze=False, sharey=True)
    for ax, (k, part) in zip(axes[0], parts, strict=True):
        buckets = list(dict.fromkeys(part.length))
        for width, (plan, line) in zip((5, 2.5, *[1.6] * 9), groups(part, "plan")):  # equal lines stay visible below each other
            ax.plot([buckets.index(b) for b in line.length], line.ratio, "o-", markersize=max(4, width), linewidth=width,
                    label=plan, color=PLANNER_COLOURS.get(plan, style.GREY))  # fmt: skip
        ax.axhline(1, color=style.GREY, linewidth=0.8, linestyle="--")
        ax.set(yscale="log", title=f"{k} packs a step", xticks=range(len(buckets)))
        ax.set_xticklabels([b.split(" to ")[0].replace("over ", "> ").replace("to ", "≤ ") for b in buckets], rotation=40,
                           ha="right", rotation_mode="anchor", fontsize=8)  # fmt: skip
        style.plain_log(ax.yaxis)
    axes[0][0].set_ylabel("share of weight / share of rows")
    axes[0][len(parts) // 2].set_xlabel("tokens a row")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=8)
    return style.finish(fig, name, frame, out, note="dashed: every sequence weighs the same")


def balance_against_bias(frame: pd.DataFrame, most_waiting: float = 1.02, most_bias: float = 1.3, out: Path | None = None,
                         name: str = "balance_against_bias"):  # fmt: skip
    """What the knob ``pool`` trades: waiting upwards, over-weight of long rows to the right, a line a size of step.

    Args:
        frame: columns filling (how packs were filled), packs_per_step, pool (a number, or NaN/None for the whole epoch),
            worst_over_mean, long_ratio.
        most_waiting, most_bias: the corner to be in, shaded.
    """
    need(frame, "filling", "packs_per_step", "pool", "worst_over_mean", "long_ratio")
    parts = groups(frame, "filling")
    fig, axes = style.new("wide", height=3.9, cols=len(parts), squeeze=False, sharey=True, sharex=True)
    low = min(0.95, float(frame.long_ratio.min()) * 0.97)
    for ax, (filling, part) in zip(axes[0], parts, strict=True):
        ax.fill_between([low, most_bias], 0, most_waiting - 1, color=style.COLOURS[2], alpha=0.13, linewidth=0)
        sizes = groups(part, "packs_per_step")
        for wide, colour, (k, line) in zip(range(len(sizes), 0, -1), style.COLOURS, sizes):  # lines on top of each other stay visible
            waiting = np.maximum(line.worst_over_mean - 1, 1e-4).to_numpy()
            ax.plot(line.long_ratio, waiting, "o-", color=colour, markersize=3.5 + 1.5 * wide, linewidth=1.5 * wide,
                    label=f"{k} packs a step")  # fmt: skip
            ax.plot(line.long_ratio.iloc[-1], waiting[-1], "s", color=colour, markersize=6 + 2 * wide)
        ax.set(xscale="log", yscale="log", title=filling, xlabel="weight of long rows / their share of rows", xlim=(low, None))
        style.plain_log(ax.xaxis)
        ax.set_xticks([1, 1.3, 2, 3, 5], ["1", "1.3", "2", "3", "5"])
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: percent(v)))
    axes[0][0].set_ylabel("slowest rank's work above the mean")
    axes[0][-1].legend(loc="upper right")
    return style.finish(fig, name, frame, out, note=f"along a line: pools from small to large, the square is the last; green: waiting at most {most_waiting - 1:.0%}, "
                        f"bias at most {most_bias:g}")  # fmt: skip
