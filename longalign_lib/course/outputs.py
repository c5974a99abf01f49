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
    tidy(ran)
    for mine, theirs in zip(source.cells, cells, strict=True):
        if mine.cell_type == "code":
            mine.outputs = [_clean(output) for output in theirs.outputs]
            mine.execution_count = None
    nbformat.write(source, notebook)


def tidy(notebook) -> None:
    """Make text outputs what a terminal would show in the end: no overwritten progress lines, no empty or split streams."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream" and kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += output.text
            else:
                kept.append(output)
        for output in kept:
            if output.output_type == "stream":
                output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in output.text.split("\n"))
        cell.outputs = [o for o in kept if o.output_type != "stream" or o.text.strip()]


def _clean(output):
    if "execution_count" in output:
        output["execution_count"] = None
    output.pop("transient", None)
    return output
