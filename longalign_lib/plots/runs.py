"""Figures of notebook 06 about whole runs: what a GPU holds, speeds of methods, runs that were killed and continued.

Every function takes plain frames, draws in the house style, and writes picture and numbers to ``out`` unless it is None.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from longalign_lib.plots import style

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def memory_bars(frame: pd.DataFrame, room: float, out: Path | None = None, name: str = "memory"):
    """Estimated memory of one GPU, parts stacked: a column of panels a model, a row a number of GPUs, a bar a way.

    Args:
        frame: columns model, gpus, way, weights, gradients, optimizer, activations, logits, total (GiB).
        room: GiB that a GPU has; drawn as a line.
    """
    models, gpus, ways = (list(dict.fromkeys(frame[c])) for c in ("model", "gpus", "way"))
    fig, axes = style.new("wide", height=(0.27 * len(ways) + 0.75) * len(gpus) + 0.6, rows=len(gpus), cols=len(models),
                          sharex="col", sharey=True, squeeze=False)  # fmt: skip
    parts = [p for p in PARTS if frame[p].max() > 0]
    for r, ranks in enumerate(gpus):
        for c, model in enumerate(models):
            ax, mine = axes[r][c], frame[(frame.model == model) & (frame.gpus == ranks)].set_index("way").loc[ways]
            left = np.zeros(len(ways))
            for part in parts:
                ax.barh(ways, mine[part], left=left, color=style.COLOURS[(0, 5, 1, 2, 3)[PARTS.index(part)]], label=part)
                left = left + mine[part].to_numpy()
            top = frame[frame.model == model].total.max()
            for y, total in enumerate(mine.total):
                ax.text(total + top * 0.02, y, f"{total:,.0f}", va="center", fontsize=7,
                        color="black" if total <= room else style.COLOURS[4],
                        zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85})  # fmt: skip
            ax.axvline(room, color="black", linewidth=1, linestyle="--")
            ax.set(xlim=(0, top * 1.16))
            ax.set_title(f"{model} on {ranks} GPU{'s' if ranks > 1 else ''}", fontsize=10)
            ax.tick_params(axis="y", labelsize=8)
    axes[0][0].invert_yaxis()
    for ax in axes[-1]:
        ax.set_xlabel("GiB on each GPU")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(parts), fontsize=8)
    return style.finish(fig, name, frame, out, note=f"estimates; dashed: the {room:g} GiB of an 80 GB GPU")


def same_losses(runs: dict[str, pd.DataFrame], out: Path | None = None, name: str = "same_losses"):
    """Loss curves of runs that should agree, and how far each is from the first, step by step.

    Args:
        runs: label -> frame with columns step, loss; all of the same steps.
    """
    first, reference = next(iter(runs.items()))
    if odd := [label for label, log in runs.items() if log.step.tolist() != reference.step.tolist()]:
        raise ValueError(f"{', '.join(odd)} took other steps than {first!r}; compare runs of the same steps")
    fig, (above, below) = style.new("wide", height=4.2, rows=2, sharex=True, height_ratios=[3, 2])
    rows, widths, floor = [], np.linspace(7, 1.5, len(runs)), 1e-9
    for k, (label, log) in enumerate(runs.items()):
        above.plot(log.step, log.loss, color=style.COLOURS[k], linewidth=widths[k], alpha=0.8, label=label, solid_capstyle="round")
        off = (log.loss.to_numpy() / reference.loss.to_numpy() - 1).__abs__()
        rows += [{"run": label, "step": int(s), "loss": v, "off": o} for s, v, o in zip(log.step, log.loss, off)]
        if label != first:
            below.plot(log.step, np.maximum(off, floor), "o-", markersize=3.5, color=style.COLOURS[k], label=label)
    above.set(ylabel="loss (nats a token)", title="Loss by step")
    above.legend(fontsize=8)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set(yscale="log", ylim=(floor / 3, max(1e-3, max(r["off"] for r in rows) * 3)), xlabel="optimiser step", ylabel=f"off from\n{first}")
    return style.finish(fig, name, pd.DataFrame(rows), out, note="below: relative difference; equal to the last digit is drawn at 1e-9")


def killed_and_resumed(whole: pd.DataFrame, killed: pd.DataFrame, resumed: dict[str, pd.DataFrame], since: int,
                       out: Path | None = None, name: str = "killed"):  # fmt: skip
    """A run that was killed and continued, beside the one that nobody touched; a lane a run, and how far its losses are off.

    Args:
        whole: the uninterrupted run: step, loss.
        killed: the steps that had been logged when the other was killed.
        resumed: label -> the whole log after continuing from the same checkpoint.
        since: the checkpoint's step: later ones were taken again.
    """
    fig, (above, below) = style.new("wide", height=4.8, rows=2, sharex=True, height_ratios=[5, 2 + 0.5 * len(resumed)])
    died = int(killed.step.max())
    above.axvspan(since + 0.5, died + 0.5, color="#EEEEEE", zorder=0)
    above.plot(whole.step, whole.loss, color="#BBBBBB", linewidth=8, solid_capstyle="round", label="never interrupted")
    above.plot(killed.step, killed.loss, "o-", color="black", markersize=6, linewidth=1, label="until it was killed")
    after = {label: log[log.step > since] for label, log in resumed.items()}
    for k, (label, log) in enumerate(after.items()):
        above.plot(log.step, log.loss, ("s-", "^--")[k % 2], color=style.COLOURS[(4, 0)[k % 2]], markersize=4, linewidth=1.2, label=label)
    above.plot([died], killed.loss.iloc[-1:], "X", color=style.COLOURS[4], markersize=13, markeredgecolor="white", zorder=5)
    above.annotate("SIGKILL", (died, 1), (0, -12), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center",
                   color=style.COLOURS[4], fontsize=9)  # fmt: skip
    above.margins(y=0.15)
    above.set(ylabel="loss (nats a token)", title=f"Killed at step {died}, continued from the checkpoint of step {since}")
    above.legend(fontsize=8)
    lanes = {"first start": killed.assign(again=killed.step > since), **{k: v.assign(again=False) for k, v in after.items()}}
    for y, log in enumerate(lanes.values()):
        colour = ("black", style.COLOURS[4], style.COLOURS[0])[y % 3]
        below.scatter(log.step, [y] * len(log), marker="s", s=42, color=[("white" if a else colour) for a in log.again], edgecolors=colour)
    below.axvline(since + 0.5, color=style.GREY, linewidth=0.8, linestyle="--")
    below.set_yticks(range(len(lanes)), list(lanes), fontsize=8)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set(xlabel="optimiser step", ylim=(len(lanes) - 0.5, -0.5))
    table = pd.concat([whole[["step", "loss"]].assign(run="whole"), killed[["step", "loss"]].assign(run="killed"),
                       *(v[["step", "loss"]].assign(run=k) for k, v in after.items())])  # fmt: skip
    return style.finish(fig, name, table, out, note="below: who took which step; hollow: lost with the kill and taken again")


def speeds(frame: pd.DataFrame, out: Path | None = None, name: str = "speeds", share: str = "% of the matrix-product rate",
           cases_are: str = "window (tokens)"):  # fmt: skip
    """Tokens a second, a share of what the device could do and peak memory of ways to train, by pack size.

    Args:
        frame: columns case (pack size, a text), way, tokens_per_second, share (0..1), peak_gib; NaN where memory ran out. A
            way that was not tried at a size has no row.
        share, cases_are: what the second panel and the horizontal axes show.
    """
    cases, ways = (list(dict.fromkeys(frame[c])) for c in ("case", "way"))
    panels = {"tokens_per_second": (1e-3, "thousand tokens / s"), "share": (100, share), "peak_gib": (1, "peak GiB")}
    stacked = len(cases) > 5  # side by side, that many names would run into each other
    fig, axes = style.new("wide", height=6.2, rows=len(panels), sharex=True) if stacked else style.new("wide", height=3.4, cols=len(panels))
    wide = 0.84 / len(ways)
    for ax, (column, (scale, label)) in zip(axes, panels.items()):
        for k, way in enumerate(ways):
            mine = frame[frame.way == way].set_index("case").reindex(cases)
            tried = [c in set(frame[frame.way == way].case) for c in cases]
            x, y = np.arange(len(cases)) + (k - (len(ways) - 1) / 2) * wide, mine[column].to_numpy(float) * scale
            ax.bar(x, np.nan_to_num(y), wide * 0.92, color=style.COLOURS[k % 8], label=way)
            lost = [at for at, value, t in zip(x, y, tried) if t and np.isnan(value)]
            ax.scatter(lost, [0] * len(lost), marker="x", s=22, color=style.COLOURS[k % 8], clip_on=False, zorder=5)
        ax.set_xticks(range(len(cases)), cases, fontsize=8)
        ax.set(xlabel="" if stacked and ax is not axes[-1] else cases_are)
        ax.set_title(label, fontsize=10)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(ways), fontsize=8)
    return style.finish(fig, name, frame, out, note="cross: out of memory; no mark: not tried")


def waiting_beside(frame: pd.DataFrame, out: Path | None = None, name: str = "waiting_measured"):
    """Share of the GPUs' time spent waiting for slower ones: predicted and measured, a line a case.

    Args:
        frame: columns case (a text), plan, waiting, waiting_timed, waiting_flops (of the step that was measured), waiting_timed_all (over
            all steps); all 0..1, NaN where not known.
    """
    cases, plans = (list(dict.fromkeys(frame[c])) for c in ("case", "plan"))
    blue, red, light = (style.COLOURS[k] for k in (0, 4, 5))
    ways = {  # label, marker, size, edge, face, how far below
        "waiting_flops": ("one step: predicted from FLOPs", "o", 42, blue, "white", 0),
        "waiting_timed": ("from packs timed alone", "o", 42, blue, blue, 0),
        "waiting": ("measured", "X", 60, red, red, 0),
        "waiting_timed_all": ("all steps: from packs timed alone", "D", 30, light, light, 0.2),
    }
    fig, axes = style.new("wide", height=0.24 * len(frame) / max(1, len(cases)) * 2 + 1.9, cols=len(cases), sharex=True, sharey=True, squeeze=False)
    for ax, case in zip(axes[0], cases):
        mine = frame[frame.case == case].set_index("plan").reindex(plans)
        y = np.arange(len(plans))
        spread = 100 * mine[list(ways)]
        of_one = spread.drop(columns="waiting_timed_all")
        ax.hlines(y, of_one.min(axis=1), of_one.max(axis=1), color="#CCCCCC", linewidth=3, zorder=1)
        for k, (column, (label, marker, size, edge, face, below)) in enumerate(ways.items()):
            ax.scatter(spread[column], y + below, marker=marker, s=size, edgecolors=edge, facecolors=face, zorder=2 + k, label=label)
        for at, absent in zip(y, mine.waiting.isna()):
            if absent:
                ax.text(0, at, "not run", fontsize=8, va="center", color=style.GREY)
        ax.set_title(case, fontsize=10)
        ax.set(xlabel="% of time waiting")
    axes[0][0].set_yticks(range(len(plans)), plans)
    axes[0][0].set(ylim=(len(plans) - 0.5, -0.5))
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return style.finish(fig, name, frame, out)
