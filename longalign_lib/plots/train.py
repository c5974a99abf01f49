"""Figures of notebooks 02, 03 and 06: lengths, waste, plans as timelines, packs and masks, training curves.

Every function takes plain frames and arrays, draws in the house style, and writes picture and numbers to ``out`` unless it is
None.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from longalign_lib.plots import style

METHOD_COLOURS = dict(zip(("naive", "sorted", "packed", "balanced"), style.COLOURS, strict=False))


def length_histogram(lengths: dict[str, np.ndarray], out: Path | None = None, name: str = "lengths"):
    """Tokens a row of one or more data sets (name -> lengths), on a logarithmic axis, medians marked."""
    fig, ax = style.new("wide", height=3.0)
    top = max(int(np.max(v)) for v in lengths.values())
    low = max(1, min(int(np.min(v)) for v in lengths.values()))
    bins = np.geomspace(low, top * 1.05, 36)
    rows = []
    for k, (label, values) in enumerate(lengths.items()):
        counts, _ = np.histogram(values, bins)
        ax.stairs(counts, bins, fill=True, alpha=0.45, color=style.COLOURS[k])
        ax.stairs(counts, bins, color=style.COLOURS[k], label=f"{label}: {len(values):,} rows, median {np.median(values):,.0f}")
        rows += [{"data": label, "from": a, "to": b, "rows": int(c)} for a, b, c in zip(bins, bins[1:], counts)]
    ax.set(xscale="log", xlabel="tokens a row", ylabel="rows", title="How long are the rows?")
    style.plain_log(ax.xaxis)
    ax.margins(y=0.25)
    ax.legend(loc="upper left", ncols=3, fontsize=8)
    return style.finish(fig, name, pd.DataFrame(rows), out)


def padded_batches(batches: list[np.ndarray], titles: list[str], out: Path | None = None, name: str = "padding"):
    """Batches of rows as bars: real tokens in colour, padding to the longest row in grey."""
    fig, axes = style.new("wide", height=2.6, cols=len(batches), squeeze=False)
    rows = []
    for ax, lengths, title in zip(axes[0], batches, titles, strict=True):
        width = int(max(lengths))
        place = np.arange(len(lengths))
        ax.barh(place, width, color="#D9D9D9")
        ax.barh(place, lengths, color=style.COLOURS[0])
        waste = 1 - sum(lengths) / (width * len(lengths))
        ax.set(title=f"{title}: {waste:.0%} padding", xlabel="tokens", yticks=place)
        ax.invert_yaxis()
        rows += [{"batch": title, "row": int(i), "tokens": int(n), "padded_to": width} for i, n in enumerate(lengths)]
    axes[0][0].set_ylabel("row of the batch")
    return style.finish(fig, name, pd.DataFrame(rows), out, note="blue: real tokens, grey: padding")


def timelines(runs: dict, steps: int = 4, out: Path | None = None, name: str = "timelines", of: str = ""):
    """Who waits for whom: a panel a plan, a line a rank; work in colour (shaded by micro-step), waiting in grey.

    Args:
        runs: method -> `cost.Simulation`.
        steps: how many global steps to draw.
        of: what was simulated, for the caption ("simulated: ...").
    """
    fig, axes = style.new("wide", height=1.25 * len(runs) + 0.6, rows=len(runs), sharex=True, squeeze=False)
    frames = []
    for ax, (method, run) in zip(axes[:, 0], runs.items(), strict=True):
        t = run.timeline[run.timeline.step < steps]
        ranks = int(run.timeline["rank"].max()) + 1
        colour = METHOD_COLOURS.get(method, style.COLOURS[0])
        for rank in range(ranks):
            mine = t[t["rank"] == rank]
            ax.broken_barh([(0, t.until.max())], (rank - 0.4, 0.8), color="#DDDDDD")
            ax.broken_barh(list(zip(mine.start, mine.end - mine.start)), (rank - 0.4, 0.8), color=colour,
                           edgecolor="white", linewidth=0.25)  # fmt: skip
        for end in t.groupby("step").until.max():
            ax.axvline(end, color="black", linewidth=0.8)
        ax.set(yticks=range(ranks), ylabel="GPU", ylim=(ranks - 0.5, -0.5), xlim=(0, None))
        ax.set_title(f"{method}: idle {run.idle:.{0 if run.idle >= 0.0995 else 1}%} of the time, "
                     f"{run.seconds:,.{0 if run.seconds >= 100 else 1}f} s for all steps", fontsize=10)  # fmt: skip
        frames.append(t.assign(method=method))
    axes[-1, 0].set_xlabel(f"simulated seconds (the first {steps} steps; a black line ends a step)")
    return style.finish(fig, name, pd.concat(frames), out, note=" · ".join(["colour: work, grey: waiting for the slowest", *[of] * bool(of)]))


def pack_layout(plan_table: pd.DataFrame, capacity: int, packs: int = 8, out: Path | None = None, name: str = "packs"):
    """The first packs as lines of documents; the number is the row of the data, grey is room left over."""
    shown = plan_table[plan_table.pack < packs]
    fig, ax = style.new("wide", height=0.34 * min(packs, plan_table.pack.max() + 1) + 1.2)
    for pack, lines in shown.groupby("pack"):
        ax.broken_barh([(0, capacity)], (pack - 0.4, 0.8), color="#E6E6E6")
        for k, line in enumerate(lines.sort_values("offset").itertuples()):
            ax.broken_barh([(line.offset, line.length)], (pack - 0.4, 0.8), edgecolor="white",
                           color=style.COLOURS[k % 6], alpha=0.75)  # fmt: skip
            if line.length > capacity / 28:
                ax.text(line.offset + line.length / 2, pack, str(line.row), ha="center", va="center", fontsize=7)
    ax.set(xlabel="tokens", ylabel="pack", yticks=sorted(shown.pack.unique()), xlim=(0, capacity),
           title="Packs: every block is a row of the data")  # fmt: skip
    ax.invert_yaxis()
    return style.finish(fig, name, shown, out)


def attention_masks(lengths: list[int], out: Path | None = None, name: str = "masks", every: int = 1):
    """What a token may look at: one causal triangle over the whole pack, beside a triangle a document.

    Args:
        lengths: tokens of each document of the pack, in order; pairs are counted over all of them.
        every: draw every n-th token alone, to keep the picture of a long pack small.
    """
    tokens = int(np.sum(lengths))
    pairs = [n * (n + 1) // 2 for n in map(int, (tokens, *lengths))]
    place = np.arange(0, tokens, every)
    document = np.repeat(np.arange(len(lengths)), lengths)[place]
    causal = place[:, None] >= place[None]
    apart = causal & (document[:, None] == document[None])
    fig, axes = style.new("wide", height=4.0, cols=2)
    titles = (f"plain causal: {pairs[0]:,} pairs", f"per document: {sum(pairs[1:]):,} pairs")
    end = place.size * every - 0.5
    sides = (-0.5, end, end, -0.5)
    for ax, mask, title in zip(axes, (causal, apart), titles, strict=True):
        shade = np.where(mask, document[:, None] + 1.0, np.nan)
        ax.imshow(shade, cmap="viridis", vmin=0, vmax=len(lengths) + 1, interpolation="nearest", extent=sides)
        if mask is causal:
            leak = causal & ~apart
            ax.imshow(np.where(leak, 1.0, np.nan), cmap="autumn", vmin=0, vmax=2, interpolation="nearest", extent=sides)
        for border in np.cumsum(lengths)[:-1]:
            ax.axhline(border - 0.5, color="white", linewidth=0.8)
            ax.axvline(border - 0.5, color="white", linewidth=0.8)
        ax.set(title=title, xlabel="key (token of the pack)", ylabel="query (token of the pack)")
    return style.finish(fig, name, {"lengths": list(map(int, lengths)), "causal": pairs[0], "per_document": sum(pairs[1:])}, out,
                        note="orange: looks into another document" + f" · one token in {every} is drawn" * (every > 1))  # fmt: skip


def training_curve(log: pd.DataFrame, out: Path | None = None, name: str = "training_curve"):
    """Loss a step as the objective and as the two comparable means, and tokens a second below."""
    fig, axes = style.new("wide", height=4.4, rows=2, sharex=True, height_ratios=[2, 1])
    for k, (column, label) in enumerate((("loss_sequence_mean", "mean over sequences (the objective)"),
                                         ("loss_token_mean", "mean over tokens"))):  # fmt: skip
        axes[0].plot(log.step, log[column], "o-", markersize=4, color=style.COLOURS[k], label=label)
    axes[0].set(ylabel="loss (nats a token)", title="Training loss by step")
    axes[0].legend()
    axes[1].bar(log.step, log.tokens_per_second, color=style.COLOURS[5])
    axes[1].set(xlabel="optimiser step", ylabel="tokens / s")
    return style.finish(fig, name, log, out)


def held_out_change(before: pd.DataFrame, after: pd.DataFrame, out: Path | None = None, name: str = "held_out"):
    """Held-out loss of every row before against after; points under the diagonal got better. Frames: row, loss, task."""
    both = before.merge(after, on="row", suffixes=("_before", "_after"))
    task = both["task_before"] if "task_before" in both else pd.Series("all", index=both.index)
    fig, ax = style.new("square")
    for k, (label, rows) in enumerate(both.groupby(task)):
        ax.scatter(rows.loss_before, rows.loss_after, s=22, color=style.COLOURS[k % 8], label=f"{label} ({len(rows)})")
    low = float(min(both.loss_before.min(), both.loss_after.min())) * 0.8 + 1e-4
    high = float(max(both.loss_before.max(), both.loss_after.max())) * 1.25
    ax.plot([low, high], [low, high], color=style.GREY, linewidth=0.8, linestyle="--")
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="loss before training",
           ylabel="loss after training", title="Held-out rows")  # fmt: skip
    style.plain_log(ax.xaxis, ax.yaxis)
    ax.legend(fontsize=8)
    return style.finish(fig, name, both, out, note="under the line: better")
