"""Figures of judges: ladders of known quality, audits, differences of scores against their noise.

Every function takes plain frames, draws in the house style, and writes picture and numbers to ``out`` unless None.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from longalign_lib.plots import style

PANELS = (  # probe, measure, title, what a sound judge shows
    ("ladder", "spearman", "Spearman on the ladder", "1"),
    ("repeats", "standard deviation (points)", "Same prompt again: SD", "0"),
    ("order", "standard deviation added (points)", "Examples reordered: SD added", "0"),
    ("length", "rise (points)", "Empty length added: rise", "0 or less"),
    ("injection", "rise (points)", "Rating or order injected: rise", "0 or less"),
    ("swap", "first place wins", "First place wins", "0.5"),
)


def audits(table: pd.DataFrame, out: Path | None = None, name: str = "audit"):
    """A panel a probe, a line a judge: the measure with its 95% interval, and where a sound judge stands.

    Args:
        table: of `evaluate.audit.audit`, or several concatenated: judge, probe, measure, value, low, high, ideal, finding.

    Raises:
        ValueError: columns that are missing.
    """
    if missing := [c for c in ("judge", "probe", "measure", "value", "low", "high", "ideal", "finding") if c not in table]:
        raise ValueError(f"the table lacks {', '.join(missing)}: make it with evaluate.audit.audit")
    judges = list(dict.fromkeys(table.judge))
    shown = [p for p in PANELS if ((table.probe == p[0]) & (table.measure == p[1])).any()]
    cols = min(3, len(shown))
    rows = -(-len(shown) // cols)
    fig, axes = style.new("wide", height=rows * (0.95 + 0.27 * len(judges)) + 0.3, rows=rows, cols=cols, squeeze=False, sharey=True)
    for k, ax in enumerate(axes.ravel()):
        if k >= len(shown):
            ax.set_visible(False)
            continue
        probe, measure, title, ideal = shown[k]
        mine = table[(table.probe == probe) & (table.measure == measure)].set_index("judge")
        ax.axvline(float(mine.ideal.iloc[0]), color="black", linewidth=1)
        for y, judge in enumerate(judges):
            if judge not in mine.index or pd.isna(mine.loc[judge].value):
                wrong = judge in mine.index and bool(mine.loc[judge].finding)
                ax.text(0.02, y, "no value", transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=style.COLOURS[4] if wrong else style.GREY)
                continue
            row = mine.loc[judge]
            colour, marker = (style.COLOURS[4], "D") if row.finding else (style.COLOURS[0], "o")
            if not pd.isna(row.low):
                ax.hlines(y, row.low, row.high, color=colour, linewidth=4, alpha=0.35)
            ax.plot(row.value, y, marker, color=colour, markersize=6, clip_on=False)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(f"sound: {ideal}", fontsize=9)
        ax.margins(x=0.08)
        ax.tick_params(labelsize=9)
    axes[0][0].set_yticks(range(len(judges)), [textwrap.fill(j, 32) for j in judges])
    axes[0][0].set_ylim(len(judges) - 0.5, -0.5)
    return style.finish(fig, name, table, out, note="bars: 95% intervals; diamonds: a finding; black line: where a sound judge stands", svg=True)


def ladders(frame: pd.DataFrame, out: Path | None = None, name: str = "ladders"):
    """A panel a scorer: the score it gives to answers whose order of quality is known; a line a question.

    Points stand up to 0.3 beside their level, so that questions do not hide each other; a level that only some questions have is named.

    Args:
        frame: scorer, id (question), known (level by construction), score (NaN where the scorer gave none), scale
            (low, high).
    """
    scorers, ids = list(dict.fromkeys(frame.scorer)), list(dict.fromkeys(frame.id))
    fig, axes = style.new("wide", height=3.4, cols=len(scorers), squeeze=False)
    for ax, scorer in zip(axes[0], scorers, strict=True):
        mine = frame[frame.scorer == scorer]
        asked = list(dict.fromkeys(mine.id))
        for k, item in enumerate(asked):
            line = mine[mine.id == item].sort_values("known")
            line = line[line.score.notna()]
            shift = 0.6 * (k / (len(asked) - 1) - 0.5) if len(asked) > 1 else 0.0  # questions beside each other, not on top
            colour = style.COLOURS[ids.index(item) % 6]
            ax.plot(line.known + shift, line.score.astype(float), "o-", color=colour, alpha=0.75, markersize=5)
        missing = int(mine.score.isna().sum())
        per_level = mine.groupby("known").id.nunique()
        lacking = [f"level {level:g} made for {n} of {len(asked)} questions" for level, n in per_level.items() if n < len(asked)]
        low, high = mine.scale.iloc[0]
        margin = 0.04 * (high - low)
        ax.set(ylim=(low - margin, high + margin), xlabel="quality by construction", ylabel="score given")
        ax.set_title("\n".join([scorer, f"{len(mine) - missing} of {len(mine)} answers got a score", *lacking]), fontsize=10)
        levels = sorted(frame.known.unique())
        ax.set_xticks(levels)
        ax.set_xlim(levels[0] - 0.5, levels[-1] + 0.5)
        if missing == len(mine):
            ax.text(0.5, 0.5, "no score given", transform=ax.transAxes, ha="center", color=style.GREY)
    data = frame.drop(columns="scale")
    return style.finish(
        fig, name, data, out, note="a line a question, set up to 0.3 beside the levels; a perfect scorer only rises", svg=True
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
