"""Figures about data: how long documents are, what samples were built, what was rejected and why.

Each function takes a plain frame with one row a document or sample, and returns the figure; with `out` it also writes
the picture and the plotted numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from longalign_lib.plots import style


def _need(frame: pd.DataFrame, *columns: str) -> None:
    missing = [c for c in columns if c not in frame.columns]
    if missing or frame.empty:
        what = f"lacks columns {missing}" if missing else "has no rows"
        raise ValueError(f"the frame {what}; needed: one row a document or sample with {', '.join(columns)}")


def document_lengths(
    documents: pd.DataFrame, out: Path | str | None = None, name: str = "document_lengths", window: int | None = None
):
    """One dot a document on a log scale of tokens, a line a source.

    Args:
        documents: columns source, tokens.
        out, name: where to write; None does not.
        window: tokens of a model's window, drawn as a line.
    """
    _need(documents, "source", "tokens")
    sources = documents.groupby("source")["tokens"].median().sort_values().index.tolist()
    fig, ax = style.new("wide", height=0.9 + 0.31 * len(sources))
    rng = np.random.default_rng(0)
    for row, source in enumerate(sources):
        tokens = documents.loc[documents["source"] == source, "tokens"].to_numpy()
        spread = rng.uniform(-0.22, 0.22, len(tokens)) if len(tokens) > 1 else np.zeros(1)
        ax.scatter(tokens, row + spread, s=16, alpha=0.65, color=style.COLOURS[0], linewidths=0)
        ax.text(1.01, row, f"{len(tokens)}", transform=ax.get_yaxis_transform(), va="center", fontsize=9)
    ax.text(1.01, len(sources) - 0.35, "documents", transform=ax.get_yaxis_transform(), fontsize=8, color=style.GREY)
    ax.set_xscale("log")
    ax.set_yticks(range(len(sources)), sources)
    ax.set_ylim(-0.6, len(sources) - 0.2)
    if window is not None:
        ax.axvline(window, color=style.COLOURS[4], lw=1)
        ax.annotate(
            f"window {window:,}", (window, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2),
            textcoords="offset points", ha="center", color=style.COLOURS[4], fontsize=8,
        )  # fmt: skip
    ax.set_xlabel("tokens (log scale)")
    ax.set_title("How long the documents are")
    return style.finish(fig, name, documents[["source", "tokens"]], out)


def samples_overview(samples: pd.DataFrame, out: Path | str | None = None, name: str = "samples"):
    """Samples by task (bars) and their lengths (one dot a sample), coloured by language.

    Args:
        samples: columns task, language, length (tokens).
        out, name: where to write; None does not.
    """
    _need(samples, "task", "language", "length")
    tasks = samples["task"].value_counts(ascending=True).index.tolist()
    languages = sorted(samples["language"].unique())
    colour = dict(zip(languages, style.COLOURS))
    fig, (left, right) = style.new("wide", height=1.1 + 0.36 * len(tasks), cols=2, sharey=True)
    counts = samples.groupby(["task", "language"]).size().unstack(fill_value=0).reindex(tasks)
    start = np.zeros(len(tasks))
    rng = np.random.default_rng(0)
    for language in languages:
        values = counts[language].to_numpy()
        left.barh(range(len(tasks)), values, left=start, color=colour[language], height=0.6, label=language)
        start += values
        rows = samples[samples["language"] == language]
        places = np.array([tasks.index(t) for t in rows["task"]]) + rng.uniform(-0.2, 0.2, len(rows))
        right.scatter(rows["length"], places, s=14, alpha=0.7, color=colour[language], linewidths=0)
    for row, total in enumerate(start):
        left.text(total, row, f" {total:.0f}", va="center", fontsize=9)
    left.set_yticks(range(len(tasks)), tasks)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel="samples", title="By task")
    left.margins(x=0.1)
    left.legend(loc="lower right", title="language", fontsize=8, title_fontsize=8)
    right.set(xlabel="tokens of the whole chat", title="By length")
    return style.finish(fig, name, samples[["task", "language", "length"]], out)


def outcomes(results: pd.DataFrame, out: Path | str | None = None, name: str = "outcomes"):
    """What became of each document: accepted, or the gate that rejected it, as bars.

    Args:
        results: columns outcome ("accepted" or "rejected") and reason ("gate: detail"; "" when accepted).
        out, name: where to write; None does not.
    """
    _need(results, "outcome", "reason")
    gate = results["reason"].str.split(":").str[0].where(results["outcome"] == "rejected", "accepted")
    counts = gate.value_counts()
    order = [g for g in counts.index if g != "accepted"][::-1] + ["accepted"] * ("accepted" in counts.index)
    fig, ax = style.new("half", height=1.2 + 0.34 * len(order))
    colours = [style.COLOURS[2] if g == "accepted" else style.COLOURS[1] for g in order]
    ax.barh(range(len(order)), [counts[g] for g in order], color=colours, height=0.6)
    for row, g in enumerate(order):
        ax.text(counts[g], row, f" {counts[g]}", va="center", fontsize=9)
    ax.set_yticks(range(len(order)), [g if g == "accepted" else f"rejected: {g}" for g in order])
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.margins(x=0.1)
    ax.set(xlabel="documents", title="What the gates let through")
    return style.finish(fig, name, counts.rename_axis("gate").reset_index(name="documents"), out)
