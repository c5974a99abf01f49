"""What the README says can be typed is typed here; what it links to exists; what it claims stands in the result files."""

import json
import re

import numpy as np


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_first_code_block_gives_what_its_comments_say(root):
    code = blocks((root / "README.md").read_text(), "python")[0]
    names: dict = {}
    exec(compile(code, "README", "exec"), names)
    said = np.array(json.loads(re.search(r"array\((\[.*?\])\)", code)[1]))
    assert (names["packs"] == said).all()
    assert np.isclose((names["weights"] * [20, 10, 400, 35, 5]).sum(), 1)


def test_links_and_make_targets_exist(root):
    text = (root / "README.md").read_text()
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", text) if not x.startswith("http")]
    assert len(links) > 10
    assert not [x for x in links if not (root / x).exists()]
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M))
    assert len(named) >= 4 and named <= targets


def test_numbers_of_the_picture_stand_in_its_file(root):
    record = json.loads((root / "results" / "one_gpu.json").read_text())
    hits: dict = {}
    for cell in record["needles"]:
        hits.setdefault(cell["model"], []).append(cell["hit"])
    assert [sum(h) for h in hits.values()] == [13, 15, 39] and {len(h) for h in hits.values()} == {54}
    assert round(record["training_seconds"]) == 109
    text = (root / "README.md").read_text()
    assert "13, 15 and 39 of 54 needles" in text and "109 seconds" in text
    paths = json.loads((root / "results" / "step_times.json").read_text())["attention"]
    varlen = next(p for p in paths if "varlen" in p["path"])
    assert f"{varlen['relative']:.1%}" == "0.8%" and f"{varlen['relative_without_borders']:.0%}" == "13%"
