"""The three descriptions of the environment agree, and rooms import only what ARCHITECTURE.md allows."""

import ast
import re
import tomllib
from itertools import chain

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FIXED_BY_THE_BRIEF = ["jupyterlab", "torch", "transformers", "deepspeed", "flash-attn", "datasets", "matplotlib", "pandas", "papermill"]


def pins(root):
    lines = [x for x in (root / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    return {canonicalize_name(n): v for n, v in (x.split("==") for x in lines)}


def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def requirements(root, *extras):
    p = project(root)
    return [Requirement(r) for r in chain(p["dependencies"], *(p["optional-dependencies"][e] for e in extras))]


def test_environment_yml_pins_what_constraints_pin(root):
    conda = yaml.safe_load((root / "environment.yml").read_text())
    pip = next(d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    assert "-c constraints.txt" in pip
    listed = {canonicalize_name(Requirement(x).name): str(Requirement(x).specifier).removeprefix("==") for x in pip if "==" in x}
    wanted = {canonicalize_name(r.name) for r in requirements(root, "deepspeed", "retention", "serving", "test")}
    assert set(listed) == wanted, "environment.yml and pyproject.toml name different packages"
    assert listed == {n: pins(root)[n] for n in wanted}


def test_constraints_lie_in_the_ranges(root):
    checked = 0
    for r in requirements(root, "deepspeed", "retention", "serving", "test"):
        pinned = pins(root)[canonicalize_name(r.name)]
        assert Version(pinned) in r.specifier, f"{r} does not admit the tested {pinned}"
        checked += 1
    assert checked > 20


def test_what_runs_now_is_what_is_pinned(root):
    import importlib.metadata as md

    for r in requirements(root, "deepspeed", "retention", "serving", "test"):
        assert Version(md.version(r.name)).public == pins(root)[canonicalize_name(r.name)], r.name


def test_flash_attn_is_in_both_gpu_parts_and_every_fixed_package_is_there(root):
    text = (root / "environment.yml").read_text()
    extra = project(root)["optional-dependencies"]["gpu"]
    assert f"# - {extra[0]}" in text and "flash-attn" not in pins(root)
    for name in FIXED_BY_THE_BRIEF:
        assert re.search(rf"- {name}(\[|==|>=)", text), f"{name} is missing from environment.yml"


ALLOWED = {  # room -> rooms it may import
    "files": set(), "models": {"files"}, "serve": {"models"}, "llm": {"files", "models", "serve"}, "plots": set(),
    "data": {"files", "models", "llm", "plots"},
    "train": {"files", "models", "data"},
    "evaluate": {"files", "models", "llm", "serve", "plots", "data", "train"},
    "course": {"files", "models", "llm", "serve", "plots", "data", "train", "evaluate"},
}  # fmt: skip


def test_imports_run_one_way(root):
    seen = 0
    for file in sorted((root / "longalign_lib").rglob("*.py")):
        room = file.relative_to(root / "longalign_lib").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""] + [f"{node.module}.{a.name}" for a in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "longalign_lib":
                    assert room in ALLOWED, f"{file.name}: a new room {room!r} needs its arrows in ARCHITECTURE.md and here"
                if parts[0] == "longalign_lib" and len(parts) > 1 and parts[1] != room and parts[1] in ALLOWED:
                    assert parts[1] in ALLOWED[room], f"{file.name} in {room} must not import {name}"
                    seen += 1
    assert seen > 10


def test_files_stay_on_a_page_of_thought(root):
    long = {f.name: n for f in (root / "longalign_lib").rglob("*.py") if (n := len(f.read_text().splitlines())) > 400}
    assert not long
