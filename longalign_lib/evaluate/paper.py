"""The paper's numbers, and ours beside them where there are any.

``results/paper.json`` holds every table and figure that the course compares with, each with its number in the paper
and the reason why ours is missing unless it was measured. A notebook that measures something of the same kind calls
`record`; `read_ours` collects what was recorded. Nothing here invents a number: a cell is filled only from a file
that a run wrote.

Invariants: a record names a row and a column that the paper's table has; each carries how it was measured and the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).resolve().parents[2] / "results"
MEASURED = "measured.json"
NOT_MEASURED = "not measured"
WRITTEN = {
    "02_padding_waste": "time_shares.csv",
    "06_training": "summary.json",
    "07_needle": "needle_answers.csv",
    "08_longbench_chat": "summary.json",
}  # what `own_results` reads of each notebook


def load_paper(path: Path | str | None = None) -> dict[str, dict]:
    """The paper's tables by name ("Table 1", "Figure 5", ...).

    Returns:
        Each with title, unit, columns, rows (list of model, row, values), not_measured (the reason), source.

    Raises:
        ValueError: a table that appears twice, or a row whose values do not match the columns.
    """
    path = Path(path) if path is not None else RESULTS / "paper.json"
    document = json.loads(path.read_text(encoding="utf8"))
    tables = {}
    for table in document["tables"]:
        if table["where"] in tables:
            raise ValueError(f"{path.name}: {table['where']} appears twice; merge the two")
        for row in table["rows"]:
            if len(row["values"]) != len(table["columns"]):
                raise ValueError(
                    f"{path.name}: {table['where']}, row {row['row']!r} has {len(row['values'])} values "
                    f"for {len(table['columns'])} columns ({', '.join(table['columns'])})"
                )
        tables[table["where"]] = table | {"source": document["source"]}
    return tables


def record(
    folder: Path | str, where: str, row: str, column: str, value: float, how: str, tables: dict | None = None
) -> Path:
    """Write down a measured number that stands beside one of the paper's; a second record of a cell replaces it.

    Args:
        folder: the notebook's output folder; the file is ``measured.json`` in it.
        where, row, column: the cell of the paper's table, such as "Figure 5", "hours", "packing".
        value: the measured number.
        how: model, data, device and unit in words; shown wherever the number is.

    Raises:
        ValueError: a cell that the paper's table does not have, a value that is no finite number, or no ``how``.
    """
    tables = load_paper() if tables is None else tables
    if where not in tables:
        raise ValueError(f"the paper's facts have no {where!r}: use one of {', '.join(tables)}")
    rows = list(dict.fromkeys(r["row"] for r in tables[where]["rows"]))
    if row not in rows or column not in tables[where]["columns"]:
        raise ValueError(
            f"{where} has no cell ({row!r}, {column!r}): rows are {rows}, columns {tables[where]['columns']}"
        )
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"value={value!r} is no measurement: record a finite number, or nothing at all")
    if not how.strip():
        raise ValueError(f"say how {where} ({row}, {column}) was measured: model, data, device, unit")
    path = Path(folder) / MEASURED
    known = json.loads(path.read_text(encoding="utf8")) if path.is_file() else []
    entry = {"where": where, "row": row, "column": column, "value": float(value), "how": how}
    kept = [k for k in known if (k["where"], k["row"], k["column"]) != (where, row, column)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*kept, entry], indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    return path


def read_ours(*folders: Path | str) -> pd.DataFrame:
    """All records in ``measured.json`` files at or one level below the given folders (missing folders hold none).

    Returns:
        Columns where, row, column, value, how, file (folder and file name only), in the order found.
    """
    found = []
    for folder in map(Path, folders):
        for path in sorted({*folder.glob(MEASURED), *folder.glob(f"*/{MEASURED}")}):
            name = f"{path.parent.name}/{path.name}"
            found += [entry | {"file": name} for entry in json.loads(path.read_text(encoding="utf8"))]
    return pd.DataFrame(found, columns=["where", "row", "column", "value", "how", "file"])


def beside(table: dict, ours: pd.DataFrame) -> pd.DataFrame:
    """The paper's table with a last column "ours".

    Args:
        table: one of `load_paper`'s.
        ours: from `read_ours`.

    Returns:
        A row a (model, row) of the paper, its columns, and "ours": our numbers of that row, or "not measured".
    """
    mine = ours[ours["where"] == table["where"]]
    rows = []
    for row in table["rows"]:
        here = mine[mine["row"] == row["row"]]
        text = ", ".join(f"{r.column} {r.value:g}" for r in here.itertuples()) or NOT_MEASURED
        rows.append(
            {"model": row["model"], "row": row["row"]} | dict(zip(table["columns"], row["values"])) | {"ours": text}
        )
    frame = pd.DataFrame(rows).set_index(["model", "row"])
    return frame if frame.index.get_level_values("model").any() else frame.droplevel("model")


def overview(tables: dict[str, dict], ours: pd.DataFrame) -> pd.DataFrame:
    """One row a table: how many numbers the paper has, how many of ours stand beside them, and how or why not."""
    rows = []
    for where, table in tables.items():
        mine = ours[ours["where"] == where]
        rows.append(
            {
                "where": where,
                "title": table["title"],
                "paper's numbers": sum(len(r["values"]) for r in table["rows"]),
                "ours": len(mine),
                "how, or why not": "; ".join(dict.fromkeys(mine.how)) or table["not_measured"],
            }
        )
    return pd.DataFrame(rows).set_index("where")


def needle_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Cells of a needle grid that are fully right, by model.

    Args:
        rows: records of one `needle.run_grid` a model: model, length, depth, hit (None or NaN where the model failed).

    Returns:
        Columns model, right (cells with every repeat right), cells, asked, failed; failures count as not right.
    """
    out = []
    for model, part in rows.groupby("model", sort=False):
        hit = part.hit.eq(True)
        right = hit.groupby([part.length, part.depth]).all()
        out.append(
            {
                "model": model,
                "right": int(right.sum()),
                "cells": len(right),
                "asked": len(part),
                "failed": int(part.hit.isna().sum()),
            }
        )
    return pd.DataFrame(out, columns=["model", "right", "cells", "asked", "failed"])


def own_results(folder: Path | str) -> pd.DataFrame:
    """What the notebooks of one profile wrote that lies near the paper's numbers without being one of them.

    Read are the files in `WRITTEN`: simulated step times of 02, ``summary.json`` of 06 and 08 (its numbers and words; lists are
    left out), and the answers of 07's own grid before and after training (other draws and harder variants are not in it).

    Args:
        folder: the profile's output folder.

    Returns:
        Columns notebook, what, value, file. A notebook that wrote nothing has one row, "not measured", and what to run.
    """
    rows, missing = [], []
    for name, file in WRITTEN.items():
        path = Path(folder) / name / file
        if not path.is_file():
            missing.append(name)
        elif file == "time_shares.csv":
            for data, table in pd.read_csv(path).groupby("data", sort=False):
                first, *others = table.itertuples()
                rows += [(name, f"speed-up over {first.plan}, {r.plan}, {data} (simulated)", r.speed_up, file) for r in others]
        elif file == "needle_answers.csv":
            for c in needle_cells(pd.read_csv(path)).itertuples():
                rows.append((name, f"cells fully right of {c.cells}, {c.model}", c.right, file))
        else:
            facts = json.loads(path.read_text(encoding="utf8"))
            rows += [(name, what.replace("_", " "), value, file) for what, value in _flat(facts)]
    rows += [(n, NOT_MEASURED, f"run notebook {n[:2]} for this profile first", "") for n in missing]
    return pd.DataFrame(rows, columns=["notebook", "what", "value", "file"]).sort_values(
        "notebook", kind="stable", ignore_index=True
    )


def _flat(facts: dict, before: str = "") -> list[tuple[str, float | int | str]]:
    """Numbers and words of nested dicts as (path, value)."""
    out = []
    for key, value in facts.items():
        if isinstance(value, dict):
            out += _flat(value, f"{before}{key}, ")
        elif isinstance(value, (int, float, str)):
            out.append((before + key, value))
    return out
