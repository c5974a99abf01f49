"""Figures of a data card: how long samples are, where they come from, how varied their questions are.

Every function takes plain frames and arrays, draws in the house style, and writes picture and numbers to ``out`` unless it is
None.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd

from longalign_lib.plots import style


def sample_lengths(samples: pd.DataFrame, out: Path | str | None = None, name: str = "sample_lengths"):
    """Tokens a sample, on a logarithmic axis, stacked by language; and the share of all tokens in samples up to a length.

    Args:
        samples: columns length (tokens), language.
    """
    fig, (left, right) = style.new("wide", height=3.0, cols=2)
    length = samples.length.to_numpy()
    bins = np.geomspace(max(1, length.min()) * 0.98, length.max() * 1.02, 31)
    bottom, rows = np.zeros(30), []
    for k, (language, group) in enumerate(samples.groupby("language")):
        counts, _ = np.histogram(group.length, bins)
        left.bar(bins[:-1], counts, np.diff(bins), bottom=bottom, align="edge", color=style.COLOURS[k], edgecolor="white", linewidth=0.3,
                 label=f"{language}: {len(group):,}")  # fmt: skip
        bottom += counts
        rows += [{"language": language, "from": a, "to": b, "samples": int(c)} for a, b, c in zip(bins, bins[1:], counts)]
    left.set(xscale="log", xlabel="tokens a sample", ylabel="samples", title="How long are the samples?")
    left.margins(y=0.2)
    left.legend(loc="upper left", ncols=3, fontsize=8)
    ordered = np.sort(length)
    right.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), color=style.COLOURS[0], label="of samples")
    right.plot(ordered, np.cumsum(ordered) / ordered.sum(), color=style.COLOURS[1], label="of tokens")
    right.set(xscale="log", xlabel="samples of up to so many tokens", ylabel="share", ylim=(0, 1.03), title="Who holds the tokens?")
    right.legend(loc="upper left", fontsize=8)
    for ax in (left, right):
        style.plain_log(ax.xaxis)
        ax.tick_params(axis="x", labelrotation=30)
    return style.finish(fig, name, pd.DataFrame(rows), out)


def origins(samples: pd.DataFrame, out: Path | str | None = None, name: str = "origins"):
    """Samples of each source, stacked by task.

    Args:
        samples: columns source, task.
    """
    counts = samples.groupby(["source", "task"]).size().unstack(fill_value=0)
    counts = counts.loc[counts.sum(axis=1).sort_values().index, counts.sum().sort_values(ascending=False).index]
    fig, ax = style.new("wide", height=1.3 + 0.3 * len(counts))
    start = np.zeros(len(counts))
    for k, task in enumerate(counts.columns):
        hatch = None if k < len(style.COLOURS) else "//"
        ax.barh(range(len(counts)), counts[task], left=start, height=0.65, label=task, hatch=hatch,
                color=style.COLOURS[k % len(style.COLOURS)])  # fmt: skip
        start += counts[task].to_numpy()
    for row, total in enumerate(start):
        ax.text(total, row, f" {total:,.0f}", va="center", fontsize=9)
    ax.set_yticks(range(len(counts)), [s if len(s) <= 34 else s[:33] + "…" for s in counts.index.astype(str)])
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.margins(x=0.08)
    ax.set(xlabel="samples", title="Sources and tasks")
    ax.legend(loc="upper left", bbox_to_anchor=(1.03, 1.0), fontsize=8)
    return style.finish(fig, name, counts.reset_index(), out)


def variety(openings: pd.DataFrame, nearest: np.ndarray, out: Path | str | None = None, name: str = "variety", top: int = 12):
    """How questions begin, most frequent first; and how near each one's nearest neighbour is.

    Args:
        openings: columns opening, questions, share, ordered (`data.diversity.openings`).
        nearest: float[n], 0 to 1 (`data.diversity.nearest`).
    """
    fig, (left, right) = style.new("wide", height=3.4, cols=2)
    shown = openings[:top][::-1]
    left.barh(range(len(shown)), shown.share, color=style.COLOURS[0], height=0.65)
    drawn = [style.can_draw(x) for x in shown.opening]
    names = [x if ok else f"{script(x)}, no. {len(shown) - k}" for k, (x, ok) in enumerate(zip(shown.opening, drawn))]
    left.set_yticks(range(len(shown)), [x if len(x) <= 28 else x[:27] + "…" for x in names])
    left.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    rest = len(openings) - len(shown)
    left.set(xlabel="share of questions", title="How questions begin" + (f" ({rest:,} more beginnings)" if rest else ""))
    counts, bins = np.histogram(nearest, np.linspace(0, 1, 21))
    right.bar(bins[:-1], counts, 0.05, align="edge", color=style.COLOURS[2], edgecolor="white", linewidth=0.3)
    right.set(xlabel="Jaccard index of word pairs with the nearest question", ylabel="questions", xlim=(0, 1),
              title=f"How alike they are (median {np.median(nearest):.2f})")  # fmt: skip
    right.yaxis.get_major_locator().set_params(integer=True)
    table = pd.concat([openings, pd.DataFrame({"nearest_from": bins[:-1], "nearest_to": bins[1:], "nearest_questions": counts})], axis=1)
    return style.finish(fig, name, table, out, note="" if all(drawn) else f"numbered: no font here draws it, see line of {name}.csv")


def script(text: str) -> str:
    """What to call a text that cannot be drawn: the language or the script of its letters, "text" where there are none."""
    scripts = {unicodedata.name(c, "text").split()[0] for c in text if c.isalpha() and not c.isascii()}
    for found, language in (("HIRAGANA", "Japanese"), ("KATAKANA", "Japanese"), ("HANGUL", "Korean"), ("CJK", "Chinese")):
        if found in scripts:
            return language
    return min(scripts).capitalize() if scripts else "text"
