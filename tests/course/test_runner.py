"""The course runner: strict parameters, failing cells shown, no network, tidy outputs; tried on small notebooks."""

import os
import re
import subprocess
import sys

import nbformat
import pytest

from longalign_lib import course
from longalign_lib.course import runner
from longalign_lib.course.outputs import tidy, write_back
from longalign_lib.course.pages import formulas_to_mathml, write_page


def notebook(folder, name, *cells, parameters="PROFILE = 'ci'\nSEED = 0\nOUT_DIR = '.'"):
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    if parameters:
        nb.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nb.cells += [nbformat.v4.new_code_cell(c) for c in cells]
    nbformat.write(nb, folder / f"{name}.ipynb")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("LONGALIGN_NETWORK_LOG", "PYTHONPATH", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the runner sets them: put them back afterwards
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks", tmp_path / "build"


def test_a_run_hands_over_parameters_and_ends_with_a_table(folders, capsys):
    notebooks, build = folders
    notebook(notebooks, "00_first", "print(PROFILE, SEED, OUT_DIR)", "x = bytearray(200 << 20); import time; time.sleep(1)")
    notebook(notebooks, "01_second", "import os; print(os.path.basename(os.getcwd()))")
    results = runner.run_course(notebooks, build, "laptop", seed=7)
    assert [(r.name, r.status) for r in results] == [("00_first", "ok"), ("01_second", "ok")]
    assert results[0].peak_gib > 0.2 and results[0].seconds > 1
    said = capsys.readouterr().out
    assert "2 of 2 ok" in said and re.search(r"\[ 1/2\] 00_first", said)
    ran = nbformat.read(build / "executed" / "00_first.ipynb", 4)
    assert "laptop 7 ../build/out" in str(ran.cells)
    assert "notebooks" in (build / "html" / "01_second.html").read_text()


def test_the_first_failing_cell_stops_the_course_and_is_shown(folders, capsys):
    notebooks, build = folders
    notebook(notebooks, "00_bad", "a = 1", "print('before')\nraise RuntimeError('the pump is broken')")
    notebook(notebooks, "01_never", "1")
    results = runner.run_course(notebooks, build)
    assert [r.status for r in results] == ["FAILED", "not run"]
    said = capsys.readouterr()
    assert "raise RuntimeError('the pump is broken')" in said.err and "RuntimeError: the pump is broken" in said.err
    assert "0 of 2 ok" in said.out and "print('before')" in said.err


def test_command_line_exit_codes(folders, capsys):
    from longalign_lib.course.__main__ import main

    notebooks, build = folders
    notebook(notebooks, "00_bad", "1 / 0")
    where = ["--notebooks", str(notebooks), "--build", str(build)]
    assert main(where) == 1
    assert main([*where, "--profile", "big"]) == 2
    assert main([*where, "--only", "07"]) == 2
    said = capsys.readouterr().err
    assert "unknown profile 'big': choose one of ci, laptop, gpu, paper" in said
    assert "ONLY='07' matches no notebook; there are 00_bad" in said


def test_a_parameter_that_a_notebook_does_not_declare_is_an_error(folders):
    notebooks, build = folders
    notebook(notebooks, "00_plain", "1", parameters="PROFILE = 'ci'\nSEED = 0")
    with pytest.raises(ValueError, match=r"00_plain\.ipynb declares no parameter OUT_DIR; it declares PROFILE, SEED"):
        runner.run_course(notebooks, build)


def test_reaching_for_the_network_fails_the_notebook(folders, capsys):
    notebooks, build = folders
    swallow = "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 80), timeout=1)\nexcept OSError as e:\n    print(e)"
    notebook(notebooks, "00_phones_home", swallow)
    (result,) = runner.run_course(notebooks, build)
    assert result.status == "FAILED" and "192.0.2.1" in result.error
    capsys.readouterr()


def test_the_guard_lets_loopback_through_and_reaches_child_processes(tmp_path):
    guard = os.path.join(os.path.dirname(runner.__file__), "no_network")
    log = tmp_path / "log"
    code = (
        "import socket, subprocess, sys\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "socket.create_connection(('localhost', s.getsockname()[1])).close()\n"
        "child = 'import socket; socket.getaddrinfo(\"model.invalid\", 443)'\n"
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True).stderr)"
    )
    env = {**os.environ, "PYTHONPATH": guard, "LONGALIGN_NETWORK_LOG": str(log)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PermissionError" in done.stdout and "model.invalid" in log.read_text() and "127.0.0.1" not in log.read_text()


def test_sizes_must_cover_every_profile():
    assert course.pick("gpu", ci=1, laptop=2, gpu=3, paper=4) == 3
    with pytest.raises(ValueError, match="one size for each of ci, laptop, gpu, paper"):
        course.pick("ci", ci=1)
    with pytest.raises(ValueError, match="unknown profile 'cpu'"):
        course.pick("cpu", ci=1, laptop=2, gpu=3, paper=4)


@pytest.mark.parametrize("seed", [-1, "0", 1.5, True])
def test_a_seed_is_a_whole_number(seed, tmp_path):
    with pytest.raises(ValueError, match="SEED must be a whole number"):
        course.start("ci", seed, tmp_path, "x")


def test_outputs_go_back_without_counts_and_progress_bars(folders):
    notebooks, build = folders
    notebook(notebooks, "00_bars", "import sys\nfor i in range(3): print(f'{i}/3', end='\\r', file=sys.stderr)\nprint('done')\n1 + 1")
    runner.run_course(notebooks, build)
    before = nbformat.read(notebooks / "00_bars.ipynb", 4)
    write_back(build / "executed" / "00_bars.ipynb", notebooks / "00_bars.ipynb")
    after = nbformat.read(notebooks / "00_bars.ipynb", 4)
    assert [c["id"] for c in after.cells] == [c["id"] for c in before.cells] and "injected" not in str(after.cells)
    text = str([o.get("text", o.get("data")) for o in after.cells[1].outputs])
    assert "done" in text and "'2'" in text and "0/3" not in text
    assert all(c.execution_count is None for c in after.cells)
    changed = nbformat.read(notebooks / "00_bars.ipynb", 4)
    changed.cells[1].source = "2"
    nbformat.write(changed, notebooks / "00_bars.ipynb")
    with pytest.raises(ValueError, match="has changed since it was executed"):
        write_back(build / "executed" / "00_bars.ipynb", notebooks / "00_bars.ipynb")


def test_tidy_keeps_what_a_terminal_would_show():
    cell = nbformat.v4.new_code_cell("x", outputs=[
        nbformat.v4.new_output("stream", name="stderr", text="a: 10%\r"), nbformat.v4.new_output("stream", name="stderr", text="a: 90%\rdone\n"),
        nbformat.v4.new_output("stream", name="stdout", text="\n  \n")])  # fmt: skip
    nb = nbformat.v4.new_notebook(cells=[cell])
    tidy(nb)
    assert [o.text for o in nb.cells[0].outputs] == ["done\n"]


def test_pages_need_nothing_from_elsewhere_and_escape_model_text(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("Mean $\\frac{1}{M}$ and `cost $5 and $6`, see [next](01_next.ipynb)"),
        nbformat.v4.new_code_cell("print()", outputs=[nbformat.v4.new_output("stream", text="<script>alert(1)</script>")])])  # fmt: skip
    nbformat.write(nb, tmp_path / "a.ipynb")
    html = write_page(tmp_path / "a.ipynb", tmp_path / "a.html").read_text()
    assert "<math" in html and "<mfrac>" in html and "cost $5 and $6" in html and 'href="01_next.html"' in html
    assert "<script>alert(1)" not in html and "&lt;script&gt;alert(1)" in html
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+", html)


def test_formulas_leave_prices_alone():
    assert formulas_to_mathml("costs $5 and $6 a day") == "costs $5 and $6 a day"
    assert "<math" in formulas_to_mathml("so $x_i$.")
