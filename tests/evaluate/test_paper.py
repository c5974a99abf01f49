"""The paper's facts hold together, and "ours" holds only what a run recorded."""

import json
import math

import pandas as pd
import pytest

from longalign_lib.evaluate import paper
from longalign_lib.plots import plan as figures

TABLES = paper.load_paper()


def test_tables_are_there_and_speed_ups_follow_from_the_hours():
    assert list(TABLES) == ["Table 1", "Table 2", "Table 3", "Table 4", "Figure 4", "Figure 5"]
    rows = {(r["model"], r["row"]): r["values"] for r in TABLES["Figure 5"]["rows"]}
    models = {m for m, _ in rows}
    assert len(models) == 3
    for model in models:
        hours = rows[model, "hours"]
        assert rows[model, "speed-up"] == pytest.approx([hours[0] / h for h in hours], abs=0.01)


def test_shared_row_of_tables_2_and_3_agrees():
    def row(where, name):
        return next(r["values"] for r in TABLES[where]["rows"] if (r["model"], r["row"]) == ("ChatGLM3-6B-64k", name))

    assert row("Table 2", "10k long") == row("Table 3", "packing + loss weighting")


def test_ours_is_empty_until_something_is_recorded(tmp_path):
    ours = paper.read_ours(tmp_path, tmp_path / "missing")
    assert ours.empty
    for table in TABLES.values():
        frame = paper.beside(table, ours)
        assert len(frame) == len(table["rows"]) and set(frame.ours) == {"not measured"}
    shown = paper.overview(TABLES, ours)
    assert shown["ours"].eq(0).all() and shown["how, or why not"].str.len().gt(20).all()
    assert shown["paper's numbers"].to_dict() == {
        "Table 1": 6,
        "Table 2": 36,
        "Table 3": 72,
        "Table 4": 10,
        "Figure 4": 4,
        "Figure 5": 18,
    }


def test_a_record_shows_up_once_in_its_row_only(tmp_path):
    folder = tmp_path / "02_padding_waste"
    paper.record(folder, "Figure 5", "speed-up", "packing", 9.0, "an older run")
    paper.record(folder, "Figure 5", "speed-up", "sorted", 1.25, "simulated, 8 ranks")
    paper.record(folder, "Figure 5", "speed-up", "packing", 1.5, "simulated, 8 ranks")
    ours = paper.read_ours(tmp_path)
    assert ours[["column", "value"]].values.tolist() == [["sorted", 1.25], ["packing", 1.5]]
    assert set(ours.file) == {"02_padding_waste/measured.json"}
    frame = paper.beside(TABLES["Figure 5"], ours)
    assert set(frame.xs("speed-up", level="row").ours) == {"sorted 1.25, packing 1.5"}
    assert set(frame.xs("hours", level="row").ours) == {"not measured"}
    assert paper.overview(TABLES, ours).loc["Figure 5", "how, or why not"] == "simulated, 8 ranks"
    assert set(paper.beside(TABLES["Table 2"], ours).ours) == {"not measured"}


@pytest.mark.parametrize(
    "args, message",
    [
        (("Table 9", "a", "b", 1.0, "x"), "no 'Table 9'"),
        (("Figure 5", "speedup", "packing", 1.0, "x"), r"no cell \('speedup', 'packing'\)"),
        (("Figure 5", "speed-up", "pack", 1.0, "x"), "columns"),
        (("Figure 5", "speed-up", "packing", math.nan, "x"), "value=nan"),
        (("Figure 5", "speed-up", "packing", True, "x"), "value=True"),
        (("Figure 5", "speed-up", "packing", 1.0, " "), "say how"),
    ],
)
def test_bad_records_are_refused_and_nothing_is_written(tmp_path, args, message):
    with pytest.raises(ValueError, match=message):
        paper.record(tmp_path, *args)
    assert not list(tmp_path.iterdir())


def test_a_broken_facts_file_is_named(tmp_path):
    table = {
        "where": "Table 1",
        "title": "",
        "unit": "",
        "columns": ["a", "b"],
        "rows": [{"model": "", "row": "r", "values": [1]}],
        "not_measured": "",
    }
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"source": "", "tables": [table]}))
    with pytest.raises(ValueError, match=r"facts\.json: Table 1, row 'r' has 1 values for 2 columns"):
        paper.load_paper(path)
    table["rows"][0]["values"] = [1, 2]
    path.write_text(json.dumps({"source": "", "tables": [table, table]}))
    with pytest.raises(ValueError, match="appears twice"):
        paper.load_paper(path)


def test_needle_cells_need_every_repeat_and_count_failures():
    rows = pd.DataFrame(
        [
            ("a", 1000, 0, True),
            ("a", 1000, 0, False),
            ("a", 1000, 50, True),
            ("a", 1000, 50, True),
            ("b", 1000, 0, True),
            ("b", 2000, 0, None),
        ],
        columns=["model", "length", "depth", "hit"],
    )
    assert paper.needle_cells(rows).values.tolist() == [["a", 1, 2, 4, 0], ["b", 1, 2, 2, 1]]


def test_own_results_read_what_is_there_and_name_what_is_not(tmp_path):
    empty = paper.own_results(tmp_path)
    assert empty.what.tolist() == ["not measured"] * 4 and empty.value.str.contains("run notebook 0").all()
    for name in ("02_padding_waste", "06_training", "07_needle"):
        (tmp_path / name).mkdir()
    parts = {"work": 0.5, "fixed": 0.0, "padding": 0.0, "waiting": 0.5, "data": "the mix"}
    figures.time_shares(pd.DataFrame([parts | {"plan": "naive", "speed_up": 1.0}, parts | {"plan": "packed", "speed_up": 2.5}]), tmp_path / "02_padding_waste")
    (tmp_path / "06_training" / "summary.json").write_text(
        json.dumps({"steps": 10, "held_out": {"after": {"loss": 2.5}}, "log": [1, 2]})
    )
    grid = [{"model": "trained", "length": 500, "depth": d, "hit": d > 0} for d in (0, 50, 100)] + [{"model": "failed", "length": 500, "depth": 0, "hit": None}]
    pd.DataFrame(grid).to_csv(tmp_path / "07_needle" / "needle_answers.csv", index=False)
    (tmp_path / "07_needle" / "answers.jsonl").write_text(json.dumps({"model": "trained", "length": 500, "depth": 50, "hit": False, "variant": "keys"}) + "\n")
    shown = paper.own_results(tmp_path)
    assert shown[["notebook", "what", "value"]].values.tolist() == [
        ["02_padding_waste", "speed-up over naive, packed, the mix (simulated)", 2.5],
        ["06_training", "steps", 10],
        ["06_training", "held out, after, loss", 2.5],
        ["07_needle", "cells fully right of 3, trained", 2],
        ["07_needle", "cells fully right of 1, failed", 0],
        ["08_longbench_chat", "not measured", "run notebook 08 for this profile first"],
    ]


def test_the_notebooks_write_what_own_results_reads(root):
    for name, file in paper.WRITTEN.items():
        cells = json.loads((root / "notebooks" / f"{name}.ipynb").read_text(encoding="utf8"))["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        written = ("figures.time_shares(", ", out)") if name[:2] == "02" else (f'out / "{file}"',)
        assert any(all(w in c for w in written) for c in code), f"{name} does not write {file}"
