"""Figures of notebook 01: how tokenizers cut two languages, what was drawn, how good the gates are.

Every function takes a plain frame, draws in the house style, and writes picture and numbers to ``out`` unless it is None.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from longalign_lib.plots import style


def characters_a_token(frame: pd.DataFrame, out: Path | str | None = None, name: str = "characters_a_token"):
    """Characters that a token holds, a group of bars a tokenizer, a colour a language.

    Args:
        frame: columns tokenizer, language, characters (a token).
    """
    names, languages = (list(dict.fromkeys(frame[c])) for c in ("tokenizer", "language"))
    fig, ax = style.new("wide", height=0.9 + 0.32 * len(names) * len(languages))
    for k, language in enumerate(languages):
        part = frame[frame.language == language].set_index("tokenizer").characters.reindex(names)
        place = np.arange(len(names)) + (k - (len(languages) - 1) / 2) * 0.36
        bars = ax.barh(place, part, height=0.34, color=style.COLOURS[k], label=language)
        ax.bar_label(bars, labels=[f"{v:.2f}" for v in part], padding=3, fontsize=9)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set(xlabel="characters a token", title="One text, several tokenizers")
    ax.legend(loc="lower right", fontsize=8)
    return style.finish(fig, name, frame, out)


def drawn(report: pd.DataFrame, out: Path | str | None = None, name: str = "drawn"):
    """Documents there were, wanted and got, by range of lengths.

    Args:
        report: columns tokens (a range's name, "1000-2999"), available, wanted, got; ranges are summed over other columns. Lines
            without a range (a language of which there was no document) are left out.
    """
    report = report[report.tokens.astype(str) != ""]
    sums = report.groupby("tokens")[["available", "wanted", "got"]].sum()
    sums = sums.loc[sorted(sums.index, key=lambda s: int(str(s).split("-")[0]))]
    fig, ax = style.new("wide", height=3.0)
    place = np.arange(len(sums))
    ax.bar(place, sums.available, width=0.8, color="#D9D9D9", label="available")
    ax.bar(place, sums.got, width=0.5, color=style.COLOURS[0], label="drawn")
    ax.plot(place, sums.wanted, "_", markersize=26, markeredgewidth=2.5, color=style.COLOURS[4], label="wanted by the law of lengths")
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.set(ylim=(0, 1.2 * max(1, sums.to_numpy().max())), ylabel="documents in the range", title="How long the documents are, and the drawn ones",
           xlabel="tokens of a document")  # fmt: skip
    ax.set_xticks(place, ["–".join(f"{int(v):,}" for v in str(s).split("-")) for s in sums.index], rotation=25, ha="right", fontsize=8)
    ax.legend(loc="upper right", fontsize=8, ncols=3)
    return style.finish(fig, name, sums.reset_index(), out)


def gate_scores(frame: pd.DataFrame, out: Path | str | None = None, name: str = "gate_scores"):
    """Recall and precision of each gate with their intervals.

    Args:
        frame: columns reason, bad, recall, recall_low, recall_high, fired, precision, precision_low, precision_high (shares).
    """
    fig, axes = style.new("wide", height=1.0 + 0.3 * len(frame), cols=2, sharey=True)
    place = np.arange(len(frame))
    for ax, what, n, title in ((axes[0], "recall", "bad", "Recall: bad ones caught"), (axes[1], "precision", "fired", "Precision: rejections deserved")):
        ax.hlines(place, 100 * frame[f"{what}_low"], 100 * frame[f"{what}_high"], color=style.COLOURS[0], linewidth=6, alpha=0.35)
        ax.plot(100 * frame[what], place, "o", color=style.COLOURS[0], markersize=6, clip_on=False)
        for y, count in zip(place, frame[n]):
            ax.text(102, y, f"of {count}", va="center", fontsize=8, color=style.GREY)
        ax.set(xlim=(0, 101), xlabel="%", title=title)
    axes[0].set_yticks(place, frame.reason)
    axes[0].invert_yaxis()
    return style.finish(fig, name, frame, out, note="bars: Wilson's 95% interval")
