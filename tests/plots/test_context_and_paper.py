"""Figures draw what they are given, and write the numbers beside the picture."""

import warnings

import numpy as np
import pandas as pd
import pytest

from longalign_lib.plots import context, paper


def curves(last=2000):
    starts = np.arange(0, last, 500)
    return pd.concat(
        [
            pd.DataFrame({"method": m, "start": starts, "end": starts + 500, "mean": 2.0 + k + starts / 1e4, "se": 0.1})
            for k, m in enumerate(("as shipped", "yarn, factor 2", "linear, factor 2"))
        ]
    )


FIGURES = {
    "recipe": lambda out: context.recipe(out),
    "needles_and_window": lambda out: context.needles_and_window(
        pd.DataFrame(
            {"tokens": [2000, 9000], "needle_at": [100, 900], "found": [True, False], "answer": ["yes $5", "x" * 300]}
        ),
        8192,
        out,
    ),
    "rope_frequencies": lambda out: context.frequencies(
        pd.DataFrame(
            {
                "method": ["as shipped"] * 4 + ["base x10"] * 4,
                "pair": [0, 1, 2, 3] * 2,
                "wavelength": [6, 60, 600, 6000, 6, 100, 2000, 40000],
                "slowed": [1, 1, 1, 1, 1, 2, 4, 7],
            }
        ),
        500,
        1000,
        out,
    ),
    "loss_by_position": lambda out: context.loss_curves(curves(), curves().query("method != 'as shipped'"), 1000, out),
    "extra_loss": lambda out: context.extra_loss(
        pd.DataFrame({"method": ["yarn, factor 2", "base x200"], "extra": [-0.01, 1.2], "se": [0.01, 0.1]}), 512, out
    ),
    "paper_training_hours": lambda out: paper.training_hours(
        pd.DataFrame(
            {"model": ["m"] * 2, "method": ["naive", "packing"], "hours": [40.0, 20.0], "speed_up": [1.0, 2.0]}
        ),
        out,
    ),
    "paper_read_with_care": lambda out: paper.read_with_care(
        pd.DataFrame({"label": ["0k"], "share": [82.0], "low": [73.0], "high": [88.0]}),
        pd.DataFrame({"label": ["a"], "gap": [0.4], "low": [-0.5], "high": [1.3]}),
        out,
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_written_with_its_numbers(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = FIGURES[name](tmp_path)
    assert (tmp_path / f"{name}.png").stat().st_size > 2000
    assert len(list(tmp_path.glob(f"{name}.*"))) == 2  # the picture and its numbers
    written = set(tmp_path.iterdir())
    assert figure.axes and FIGURES[name](None).axes and set(tmp_path.iterdir()) == written


def test_drawn_values_are_the_given_ones():
    figure = FIGURES["loss_by_position"](None)
    lines = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == 4]
    given = [part["mean"].to_numpy() for _, part in curves().groupby("method", sort=False)]
    assert len(lines) == 3 and all(np.array_equal(a, b) for a, b in zip(lines, given))
    bars = [p.get_height() for p in FIGURES["paper_training_hours"](None).axes[0].patches]
    assert bars == [40.0, 20.0]


def test_methods_have_colours_of_their_own():
    names = [
        "as shipped",
        "yarn, factor 2",
        "linear, factor 2",
        "base x2.05 (NTK-aware)",
        "base x10",
        "base x200 (the paper)",
    ]
    assert len({context.method_colour(n) for n in names}) == len(names)
    assert context.method_colour("something else") == context.GREY
