"""Run the notebooks in order with papermill; write executed copies and HTML pages; report time and memory.

Invariants: every cell of a notebook runs or the run fails; a parameter that a notebook does not declare is an error; the
first failing cell stops the course and its source and traceback are shown; nothing is written into ``notebooks/``.
Cost beside the notebooks' own: about 3 s a notebook for its kernel and its page.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from longalign_lib.course import check_profile

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass
class Result:
    """One notebook's run: seconds, peak memory in GiB of the kernel and all it started, and how it ended."""

    name: str
    seconds: float = 0.0
    peak_gib: float = 0.0
    status: str = "not run"
    error: str = ""


def find_notebooks(folder: Path, only: str = "") -> list[Path]:
    """The notebooks of ``folder`` in order; ``only`` keeps those whose name starts with one of its comma-separated parts.

    Raises:
        ValueError: there is no notebook, or a part of ``only`` matches none.
    """
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise ValueError(f"no notebooks like 00_name.ipynb in {folder}")
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    for part in wanted:
        if not any(n.name.startswith(part) for n in notebooks):
            raise ValueError(f"ONLY={part!r} matches no notebook; there are {', '.join(n.stem for n in notebooks)}")
    return [n for n in notebooks if not wanted or any(n.name.startswith(part) for part in wanted)]


def check_parameters(notebook: Path, parameters: dict) -> None:
    """Raise ValueError when ``notebook``'s parameters cell does not declare one of ``parameters``."""
    import papermill

    declared = set(papermill.inspect_notebook(str(notebook)))
    unknown = sorted(set(parameters) - declared)
    if unknown:
        raise ValueError(
            f"{notebook.name} declares no parameter {', '.join(unknown)}; "
            f"it declares {', '.join(sorted(declared)) or 'none (no cell is tagged `parameters`)'}"
        )


@dataclass
class PeakMemory:
    """Context manager: polls this process's children and keeps the largest sum of their resident memory, in GiB."""

    every: float = 0.3
    gib: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)

    def _poll(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self.every):
            total = 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:
                    pass  # it ended between the listing and the reading
            self.gib = max(self.gib, total / 2**30)

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()


def run_notebook(notebook: Path, parameters: dict, executed: Path) -> Result:
    """Execute one notebook, from its own folder, into ``executed/name.ipynb``; a failing cell gives status "FAILED"."""
    import nbformat
    import papermill

    result = Result(notebook.stem)
    target = executed / notebook.name
    began = time.perf_counter()
    with PeakMemory() as memory:
        try:
            papermill.execute_notebook(
                str(notebook), str(target), parameters=parameters, cwd=str(notebook.parent), kernel_name="python3",
                progress_bar=False, log_output=False, request_save_on_cell_execute=True, start_timeout=120,
                extra_arguments=["--log-level=ERROR"],
            )  # fmt: skip
            result.status = "ok"
        except papermill.PapermillExecutionError as failure:
            result.status = "FAILED"
            trace = ANSI.sub("", "\n".join(failure.traceback))
            result.error = f"cell {failure.cell_index}:\n{failure.source}\n\n{trace}"
        except Exception as failure:  # a kernel that died, a full disk: report it like a failing cell, never swallow it
            result.status = "FAILED"
            result.error = f"{type(failure).__name__}: {failure}"
    result.seconds, result.peak_gib = time.perf_counter() - began, memory.gib
    if result.status == "ok":
        code = [c for c in nbformat.read(target, as_version=4).cells if c.cell_type == "code" and c.source.strip()]
        not_run = sum(c.execution_count is None for c in code)
        if not_run:
            result.status, result.error = "FAILED", f"{not_run} code cells were not executed"
    return result


def run_course(
    notebooks: Path, build: Path, profile: str = "ci", seed: int = 0, only: str = "", offline: bool = True,
    pages: bool = True,
) -> list[Result]:  # fmt: skip
    """Run the course, a progress line for each notebook, and print the closing table.

    Args:
        notebooks: folder of the notebooks.
        build: where executed copies (``executed/``), pages (``html/``) and outputs (``out/``) go.
        profile, seed: parameters handed to every notebook.
        only: comma-separated beginnings of names; "" runs all.
        offline: forbid connections beyond this machine, in every process of the run.
        pages: write the HTML pages too.

    Returns:
        One Result a notebook; after a failure the rest stay "not run".
    """
    from longalign_lib.course.pages import write_page

    check_profile(profile)
    chosen = find_notebooks(notebooks, only)
    out_dir = Path(os.path.relpath(build / "out", notebooks)).as_posix()  # relative: no machine path in any output
    parameters = {"PROFILE": profile, "SEED": seed, "OUT_DIR": out_dir}
    for notebook in chosen:
        check_parameters(notebook, parameters)
    for folder in ("executed", "html", "out"):
        (build / folder).mkdir(parents=True, exist_ok=True)
    log = build / "network.log"
    log.unlink(missing_ok=True)
    if offline:
        guard = Path(__file__).with_name("no_network")
        os.environ["LONGALIGN_NETWORK_LOG"] = str(log.resolve())
        os.environ["PYTHONPATH"] = os.pathsep.join([str(guard), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    results = [Result(n.stem) for n in chosen]
    for k, notebook in enumerate(chosen):
        print(f"[{k + 1:>2}/{len(chosen)}] {notebook.stem:<24} running …", end="\n", flush=True)
        results[k] = run_notebook(notebook, parameters, build / "executed")
        if results[k].status == "ok" and log.exists():
            results[k].status, results[k].error = "FAILED", "it reached for the network:\n" + log.read_text()
        if pages and (build / "executed" / notebook.name).exists():
            write_page(build / "executed" / notebook.name, build / "html" / f"{notebook.stem}.html")
        r = results[k]
        print(f"        {r.status}, {r.seconds:.0f} s, peak {r.peak_gib:.1f} GiB", flush=True)
        if r.status != "ok":
            print(f"\n{notebook.name} failed. {r.error}\n", file=sys.stderr, flush=True)
            break
    print(table(results))
    return results


def table(results: list[Result]) -> str:
    """The closing table: notebook, seconds, peak memory, status; totals last."""
    lines = [f"{'notebook':<26}{'seconds':>9}{'peak GiB':>10}  status", "-" * 56]
    lines += [f"{r.name:<26}{r.seconds:>9.0f}{r.peak_gib:>10.1f}  {r.status}" for r in results]
    total, peak = sum(r.seconds for r in results), max((r.peak_gib for r in results), default=0.0)
    good = sum(r.status == "ok" for r in results)
    lines += ["-" * 56, f"{'all':<26}{total:>9.0f}{peak:>10.1f}  {good} of {len(results)} ok"]
    return "\n".join(lines)
