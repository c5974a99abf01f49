"""Outputs back into the notebooks that git holds, stripped of what changes from run to run.

Cell ids and sources stay the notebook's own; the cell that papermill injects, execution counts, times and papermill's
metadata do not come along. So a diff shows a changed result and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import nbformat


def write_back(executed: Path, notebook: Path) -> None:
    """Copy the outputs of ``executed`` into ``notebook``.

    Raises:
        ValueError: the two do not have the same code cells, so outputs could land in the wrong place.
    """
    source, ran = nbformat.read(notebook, as_version=4), nbformat.read(executed, as_version=4)
    cells = [c for c in ran.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    if [c.source for c in cells] != [c.source for c in source.cells]:
        raise ValueError(f"{notebook.name} has changed since it was executed; run it again")
    for mine, theirs in zip(source.cells, cells, strict=True):
        if mine.cell_type == "code":
            mine.outputs = [_clean(output) for output in theirs.outputs]
            mine.execution_count = None
    nbformat.write(source, notebook)


def _clean(output):
    if "execution_count" in output:
        output["execution_count"] = None
    output.pop("transient", None)
    return output
