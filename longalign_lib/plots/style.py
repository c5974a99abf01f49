"""One look for all figures: sizes, colours, a caption line, and the plotted numbers saved beside each picture.

`new` opens a figure, `finish` closes it: it writes ``name.png`` (``name.svg`` too if asked) and ``name.csv`` (a frame) or
``name.json`` (a dict), and a caption line that says what run the picture comes from. `set_caption` is called once a notebook.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

# Okabe and Ito's eight colours: told apart with every common kind of colour blindness.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000"]
GREY = "#8A8A8A"
# Low to high in one hue-safe sweep; both are readable in grey and by colour-blind readers.
SEQUENTIAL = "cividis"
DIVERGING = "RdYlBu"
WIDTHS = {"wide": 9.0, "half": 5.2, "square": 4.6}

_caption: dict[str, str] = {}

RC = {
    "figure.dpi": 110, "savefig.dpi": 110, "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.grid": False, "legend.frameon": False, "figure.constrained_layout.use": True, "image.cmap": SEQUENTIAL,
    "font.sans-serif": ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei"], "axes.unicode_minus": False,
    "svg.hashsalt": "longalign",
}  # fmt: skip


@functools.cache
def commit() -> str:
    """Short hash of the checked-out commit, with + when files differ from it; "no git" outside a checkout.

    ``LONGALIGN_COMMIT`` overrides it, for copies of a checkout that do not carry its history.
    """
    if os.environ.get("LONGALIGN_COMMIT"):
        return os.environ["LONGALIGN_COMMIT"]
    try:
        git = functools.partial(subprocess.run, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        head = git(["git", "rev-parse", "--short=7", "HEAD"]).stdout.strip()
        return head + ("+" if git(["git", "status", "--porcelain", "-uno"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "no git"


def device_name() -> str:
    """The device in words, for captions."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def set_caption(**facts: str) -> None:
    """Facts for every later caption line, such as ``profile="ci", seed="0"``; device and commit are added."""
    _caption.clear()
    _caption.update({k: str(v) for k, v in facts.items()}, device=device_name(), commit=commit())


@contextlib.contextmanager
def recorded(provenance: dict):
    """Within this block captions name the run that a result file came from, not the run at hand."""
    before = dict(_caption)
    _caption.clear()
    _caption.update({k: str(provenance[k]) for k in ("profile", "seed", "device", "commit", "date") if k in provenance})
    try:
        yield
    finally:
        _caption.clear()
        _caption.update(before)


def new(width: str = "wide", height: float | None = None, rows: int = 1, cols: int = 1, **subplots):
    """Open a figure in the house style.

    Args:
        width: "wide" (9 in), "half" (5.2 in) or "square" (4.6 in).
        height: inches; by default 0.42 of the width a row of axes, all of it for "square".
        rows, cols: the grid of axes; ``subplots`` goes to ``plt.subplots``.

    Returns:
        ``(figure, axes)``: one Axes, or an array of them when there are several.
    """
    if width not in WIDTHS:
        raise ValueError(f"width {width!r} is not one of {sorted(WIDTHS)}")
    across = WIDTHS[width]
    height = height or (across if width == "square" else 0.42 * across * rows)
    plt.rcParams.update(RC)
    return plt.subplots(rows, cols, figsize=(across, height), **subplots)


def finish(fig, name: str, data: pd.DataFrame | dict, out: Path | str | None = None, note: str = "", svg: bool = False):
    """Add the caption line; write ``out/name.png`` and the plotted numbers beside it unless ``out`` is None.

    Args:
        svg: write ``out/name.svg`` too, the same bytes for the same figure.

    Returns the figure, closed for pyplot, so that a notebook cell shows it exactly once.
    """
    line = " · ".join([note] * bool(note) + [f"{k} {v}" for k, v in _caption.items()])
    if line:
        fig.supxlabel(line, fontsize=7, color=GREY, x=0.01, ha="left")
    if out is not None:
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        fig.savefig(out / f"{name}.png")
        if svg:
            fig.savefig(out / f"{name}.svg", metadata={"Date": None})
        if isinstance(data, pd.DataFrame):
            data.to_csv(out / f"{name}.csv", index=False)
        else:
            text = json.dumps(data, indent=1, ensure_ascii=False, default=_plain)
            (out / f"{name}.json").write_text(text + "\n", encoding="utf8")
    plt.close(fig)
    return fig


def can_draw(text: str) -> bool:
    """Whether the fonts of this machine have every character; Chinese needs one that matplotlib does not bring."""
    from matplotlib import font_manager

    installed = {f.name: f.fname for f in font_manager.fontManager.ttflist}
    fonts = [font_manager.get_font(installed[name]) for name in RC["font.sans-serif"] if name in installed]
    return all(any(f.get_char_index(ord(c)) for f in fonts) for c in text)


def plain_log(*axes) -> None:
    """Put plain numbers (100, 200, 500, 1,000) on logarithmic axes, such as ``ax.xaxis``, in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in axes:
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())


def _plain(value):
    """JSON for NumPy values."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} to JSON; give plain numbers, strings, lists or arrays")
