"""Figures on the context window: the recipe in one picture, needles in and out of the window, RoPE, loss by position.

Every function takes plain frames, draws with `style` and returns the figure; ``out=None`` writes nothing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from longalign_lib.plots import style
from longalign_lib.plots.style import COLOURS, GREY

BLUE, ORANGE, GREEN, PINK, RED, SKY = COLOURS[:6]
METHOD_COLOURS = {
    "as shipped": COLOURS[7], "yarn": BLUE, "linear": ORANGE, "base x200": RED, "base x10": PINK, "base": GREEN,
}  # fmt: skip
STEPS = [
    ("data", "long documents become\nlong instructions", "notebook 01"),
    ("plan", "who sits in which pack;\nwhat each token weighs", "notebooks 02, 03, 04"),
    ("train", "a longer window,\nseveral processes", "notebooks 05, 06"),
    ("evaluate", "find a needle,\nfollow an instruction", "notebooks 07, 08, 09"),
]


def method_colour(name: str) -> str:
    """Colour of a method by how its label begins, so that it is the same in every figure."""
    return next((c for key, c in METHOD_COLOURS.items() if name.startswith(key)), GREY)


def recipe(out=None):
    """The recipe in one picture: data, plan, train, evaluate, with a sketch of each (sketches, not measurements)."""
    fig, ax = style.new("wide", height=3.0)
    ax.set(xlim=(0, 16), ylim=(0, 5.2))
    ax.axis("off")
    sketches = (_sketch_data, _sketch_plan, _sketch_train, _sketch_evaluate)
    for i, ((title, text, where), sketch) in enumerate(zip(STEPS, sketches)):
        x = 4 * i + 0.15
        ax.add_patch(
            FancyBboxPatch(
                (x, 2.05),
                3.1,
                2.3,
                boxstyle="round,pad=0.02,rounding_size=0.15",
                facecolor="#F6F6F6",
                edgecolor=GREY,
                linewidth=0.8,
            )
        )
        sketch(ax, x + 0.3, 2.3)
        ax.text(x + 1.55, 4.6, title, ha="center", va="bottom", fontsize=12, fontweight="bold")
        ax.text(x + 1.55, 1.8, text, ha="center", va="top", fontsize=9)
        ax.text(x + 1.55, 0.45, where, ha="center", va="top", fontsize=8, color=GREY)
        if i:
            ax.add_patch(
                FancyArrowPatch((x - 0.8, 3.2), (x - 0.08, 3.2), arrowstyle="-|>", mutation_scale=14, color=GREY)
            )
    return style.finish(fig, "recipe", {"steps": STEPS}, out, note="sketch, not a measurement")


def _sketch_data(ax, x, y):
    for k, width in enumerate((2.5, 2.3, 2.5, 2.1, 2.4)):
        ax.add_patch(Rectangle((x, y + 1.6 - 0.28 * k), width, 0.14, color="#C8C8C8"))
    ax.add_patch(Rectangle((x, y + 0.12), 1.5, 0.16, color=BLUE))
    ax.add_patch(Rectangle((x + 1.6, y + 0.12), 0.7, 0.16, color=ORANGE))


def _sketch_plan(ax, x, y):
    packs = [(1.4, 0.6, 0.5), (2.0, 0.5), (0.7, 0.7, 0.6, 0.5), (2.5,)]
    shades = (BLUE, SKY, GREEN, PINK)
    for row, pack in enumerate(packs):
        left = x
        for k, width in enumerate(pack):
            ax.add_patch(Rectangle((left, y + 1.45 - 0.46 * row), width - 0.04, 0.32, color=shades[k]))
            left += width


def _sketch_train(ax, x, y):
    t = np.linspace(0, 1, 60)
    ax.plot(x + 0.1 + 2.3 * t, y + 0.2 + 1.4 * np.exp(-4 * t), color=BLUE, linewidth=2)
    ax.plot([x, x, x + 2.5], [y + 1.75, y, y], color=GREY, linewidth=0.8)
    ax.text(x + 1.0, y + 1.25, "loss", color=BLUE, fontsize=9)


def _sketch_evaluate(ax, x, y):
    found = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    for row, cells in enumerate(found):
        for col, hit in enumerate(cells):
            ax.add_patch(Rectangle((x + 0.5 * col, y + 0.44 * row), 0.45, 0.39, color=GREEN if hit else ORANGE))


def needles_and_window(frame: pd.DataFrame, window: int, out=None):
    """Prompts as bars, the window as a line, the needle as a mark, the answer in words.

    Args:
        frame: columns tokens, needle_at (token position), found (bool), answer (str); a row a prompt.
        window: tokens the model was trained to read.
    """
    fig, ax = style.new("wide", height=1.3 + 0.75 * len(frame))
    longest = max(frame.tokens.max(), window)
    for y, row in enumerate(frame.itertuples()):
        colour = GREEN if row.found else RED
        ax.barh(y, row.tokens, height=0.34, color="#DADADA")
        ax.plot(row.needle_at, y, marker="D", color=colour, markersize=8)
        said = " ".join(str(row.answer).split()).replace("$", r"\$")
        said = said if len(said) <= 105 else said[:104] + "…"
        ax.text(0, y - 0.24, f"{'found' if row.found else 'missed'}: “{said}”", color=colour, fontsize=9, va="bottom")
        ax.text(row.tokens + longest * 0.01, y, f"{row.tokens:,}", va="center", fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    ax.axvline(window, color=COLOURS[7], linestyle="--", linewidth=1)
    ax.text(window, len(frame) - 0.42, f" trained window {window:,} ", ha="right", va="center", fontsize=9)
    ax.set(
        xlim=(0, longest * 1.1),
        ylim=(len(frame) - 0.2, -0.75),
        yticks=[],
        xlabel="prompt, tokens (diamond: the needle)",
    )
    ax.spines["left"].set_visible(False)
    return style.finish(fig, "needles_and_window", frame, out)


def frequencies(frame: pd.DataFrame, window: int, longer: int, out=None):
    """Wavelength of every pair of dimensions, and how much each method slows it.

    Args:
        frame: columns method (label), pair (index i), wavelength (tokens), slowed (as-shipped frequency over this one).
        window, longer: tokens of the trained and of the wanted window, drawn as lines.
    """
    fig, (left, right) = style.new("wide", height=3.9, cols=2)
    order = list(dict.fromkeys(frame.method))
    for name in order:
        part = frame[frame.method == name]
        dashed = {"linestyle": "--"} if name.startswith("as shipped") else {}
        for ax, column in ((left, "wavelength"), (right, "slowed")):
            ax.plot(part.pair, part[column], color=method_colour(name), linewidth=1.8, label=name, **dashed)
    for tokens, text in ((window, f"trained window {window:,}"), (longer, f"wanted window {longer:,}")):
        left.axhline(tokens, color=GREY, linewidth=0.8)
        left.text(0, tokens, text, fontsize=8, color=GREY, va="bottom" if tokens == longer else "top")
    left.set(
        yscale="log", xlabel="pair of dimensions i (fast to slow)", ylabel="wavelength, tokens", title="One full turn"
    )
    right.set(
        yscale="log",
        xlabel="pair of dimensions i (fast to slow)",
        ylabel="times slower than as shipped",
        title="What each method slows",
    )
    ticks = [t for t in (1, 2, 4, 10, 20, 50, 100, 200) if t <= frame.slowed.max() * 1.3]
    right.set_yticks(ticks, [f"{t}x" for t in ticks])
    right.minorticks_off()
    right.legend(fontsize=9, loc="upper left")
    return style.finish(fig, "rope_frequencies", frame, out)


def loss_curves(frame: pd.DataFrame, paired: pd.DataFrame, window: int, out=None):
    """Loss by position, a line a method; below it the same as differences to the model as shipped.

    The text decides how hard a stretch is, for all methods alike, so only the differences have small errors.

    Args:
        frame: columns method, start, end, mean (`train.position_loss.by_position` with a method column).
        paired: columns method, start, end, mean, se of the per-token differences to the first method.
        window: tokens of the trained window, drawn as a line.
    """
    fig, (upper, lower) = style.new("wide", height=5.6, rows=2, sharex=True)
    top = frame.end.max()
    for ax, table in ((upper, frame), (lower, paired)):
        ends = []
        for name, part in table.groupby("method", sort=False):
            x, y = (part.start + part.end).to_numpy() / 2, part["mean"].to_numpy()
            ax.plot(x, y, color=method_colour(name), marker="o", markersize=3, linewidth=1.6)
            if table is paired:
                error = 2 * part["se"].to_numpy()
                ax.fill_between(x, y - error, y + error, color=method_colour(name), alpha=0.2, linewidth=0)
            ends.append((y[-1], x[-1], name))
        _label_ends(ax, ends)
        if top > window:
            ax.axvline(window, color=GREY, linewidth=1, linestyle="--")
    if top > window:
        upper.text(window, upper.get_ylim()[1], "trained window ends ", ha="right", va="top", fontsize=9, color=GREY)
    lower.axhline(0, color=METHOD_COLOURS["as shipped"], linewidth=1)
    upper.set(ylabel="loss, nats a token")
    lower.set(
        xlim=(0, top * 1.22),
        xlabel="position in the text, tokens",
        ylabel="minus as shipped, nats\n(band: 2 standard errors)",
    )
    return style.finish(
        fig,
        "loss_by_position",
        pd.concat({"loss": frame, "difference": paired}, names=["what"]).reset_index(level=0),
        out,
    )


def _label_ends(ax, ends: list[tuple[float, float, str]]) -> None:
    """Write each line's name at its end, pushed up where two names would meet."""
    low, high = ax.get_ylim()
    gap, height = 0.085 * (high - low), -np.inf
    for y, x, name in sorted(ends):
        height = max(y, height + gap)
        ax.annotate(
            name,
            (x, y),
            xytext=(x + 0.01 * x, height),
            textcoords="data",
            va="center",
            fontsize=9,
            color=method_colour(name),
        )
    if ends and height + gap / 2 > high:
        ax.set_ylim(low, height + gap / 2)


def extra_loss(frame: pd.DataFrame, positions: int, out=None):
    """What a method costs inside the trained window before any training: paired differences to the model as shipped.

    Args:
        frame: columns method, extra (nats a token), se; a row a method.
        positions: how many tokens of text the means are over.
    """
    fig, ax = style.new("wide", height=1.3 + 0.36 * len(frame))
    y = np.arange(len(frame))[::-1]
    for at, row in zip(y, frame.itertuples()):
        ax.errorbar(row.extra, at, xerr=2 * row.se, fmt="o", color=method_colour(row.method), capsize=3)
        ax.text(row.extra + 2 * row.se, at, f"  {row.extra:+.2f}", va="center", fontsize=9)
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set_yticks(y, frame.method)
    ax.set(
        xlabel=f"extra loss over the first {positions:,} tokens, nats a token (bar: two standard errors)",
        ylim=(-0.6, len(frame) - 0.4),
        xlim=(min(0, frame.extra.min()) - 0.05, frame.extra.max() * 1.15 + 0.05),
    )
    return style.finish(fig, "extra_loss", frame, out)
