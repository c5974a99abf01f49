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


def test_the_packing_table_is_the_recorded_run(root):
    record = json.loads((root / "results" / "packing.json").read_text())
    text = (root / "README.md").read_text()
    lines = {r["contender"].removeprefix("ours: "): r for r in record["packing"] if r["rows"] == 1_000_000}
    shown = 0
    for name, seconds, gap in re.findall(r"^\| `?([^|`]+?)`? \| ([\d.]+) \| ([\d.]+)%", text, re.M):
        assert f"{lines[name]['median']:.2f}" == seconds and f"{lines[name]['gap']:.3f}" == gap, name
        shown += 1
    assert shown >= 7
    assert all(t["verdict"] == "met" for t in record["targets"])
    small = {r["contender"]: r["median"] for r in record["packing"] if r["rows"] == 10_000 and r["status"] == "ok"}
    assert f"({1000 * small['axolotl multipack']:.1f} ms against {1000 * small['ours: best_fit_decreasing']:.1f} ms)" in text
    ten_million = next(r["median"] for r in record["packing"] if r["rows"] == 10**7 and r["contender"] == "ours: best_fit_decreasing")
    assert f"rows it takes {ten_million:.1f} s" in text


def test_the_bias_table_is_what_the_planner_gives(root):
    from longalign_lib.train.audit import report
    from longalign_lib.train.paper_scale import mix
    from longalign_lib.train.plan import build_plan

    lengths, text = mix(100_000), (root / "README.md").read_text()
    made = {"next-fit, dealt at random (as published)": dict(method="packed", algorithm="next_fit"),
            "best-fit, dealt at random": dict(method="packed"),
            "best-fit, sorted by cost": dict(method="balanced", algorithm="best_fit_decreasing"), "**balanced**": dict(method="balanced")}  # fmt: skip
    rows = re.findall(r"^\| ([^|]+?) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert len(rows) == 6
    for name, packs, worst, ratio in rows:
        plan = build_plan(lengths, capacity=65_536, packs_per_step=int(packs), max_ranks=8, **made[name])
        facts = report(plan, 8, balance=plan.method == "balanced")
        assert (f"{facts['worst_over_mean']:.2f}", f"{facts['long_ratio']:.2f}") == (worst, ratio), (name, packs)


def test_the_attention_times_are_the_recorded_ones(root):
    text = (root / "README.md").read_text()
    rows = json.loads((root / "results" / "attention_cpu.json").read_text())["attention"]
    for way in ("document loop", "sdpa, block mask"):
        (row,) = [r for r in rows if (r["tokens"], r["pack"], r["way"]) == (8192, "64 documents", way)]
        assert f"{row['both_s']:.1f} s and {row['peak_mib']:.0f} MiB" in text and row["difference"] < 1e-6


def test_the_attention_times_of_the_gpu_are_the_recorded_ones(root):
    text = " ".join((root / "README.md").read_text().split())
    record = json.loads((root / "results" / "attention_cuda.json").read_text())
    for way in ("torch varlen", "flex attention", "document loop", "sdpa, block mask"):
        (row,) = [r for r in record["attention"] if (r["tokens"], r["pack"], r["way"]) == (65_536, "64 documents", way)]
        assert f"{1e3 * row['both_s']:.1f} ms and {round(row['peak_mib']):,} MiB" in text and row["difference"] < 0.01
    assert "H100" in record["provenance"]["device"]


def test_the_needle_times_are_the_recorded_ones(root):
    text = " ".join((root / "README.md").read_text().split())
    for name in ("cpu", "cuda"):
        record = json.loads((root / "results" / f"needle_speed_{name}.json").read_text())
        rows = {(r["dtype"], r["way"]): r for r in record["rows"]}
        ours, plain = rows["bfloat16", "and groups"], rows["bfloat16", "plain loop"]
        assert f"takes {ours['seconds']:.1f} s where" in text and f"takes {plain['seconds']:.1f}" in text
        assert all(rows["float32", w]["same_answers"] == record["prompts"] and r["reached"] > 0.95
                   for (_, w), r in rows.items() if w != "plain loop")  # fmt: skip


def test_what_two_gpus_did_is_the_recorded_run(root):
    text, record = " ".join((root / "README.md").read_text().split()), json.loads((root / "results" / "multi_gpu.json").read_text())
    on_two = {r["method"]: r for r in record["steps"] if (r["world"], r["backend"], r["window"]) == (2, "ddp", 16_384)}
    for method, said in (("balanced", "{} tokens/s by balanced"), ("packed", "{} packed"), ("sorted", "{} sorted"), ("naive", "{} naive")):
        assert said.format(f"{round(on_two[method]['tokens_per_second'], -3):,.0f}") in text
    assert f"{on_two['balanced']['gpu_waiting']:.1%} of the time by the balanced plan, {on_two['packed']['gpu_waiting']:.1%} by" in text
    off = {r["type"]: r["error_to_one_rank"] for r in record["gradients"] if r["world"] == 2}
    assert f"difference {off['float32']:.1e}".replace("e-0", "e-") + f" in float32, {off['bfloat16']:.1%} in bfloat16" in text
    resumed = {r["to"]: r["largest_difference"] for r in record["resume"] if r["backend"] == "zero3"}
    assert resumed[2] == 0 and f"losses {resumed[1]:.1e} off on one".replace("e-0", "e-") in text
    assert record["gpus"] == 2 and "H100" in record["provenance"]["device"]


def test_every_evaluation_command_is_there(root):
    from longalign_lib.evaluate.__main__ import COMMANDS

    said = re.findall(r"^python -m longalign_lib\.evaluate (\S+)", (root / "README.md").read_text(), re.M)
    assert said == list(COMMANDS)


def test_the_token_store_beside_padding_is_the_recorded_run(root):
    text, record = (root / "README.md").read_text(), json.loads((root / "results" / "tokens.json").read_text())
    ways = {w["way"]: w for w in record["ways"]}
    padded, ours = ways["published"], ways["ours, one thread"]
    assert padded["tokens"] == ours["tokens"] == record["tokens"] and padded["targets"] == ours["targets"] > 0 and record["rows"] == 1000
    assert f"take {ours['bytes_per_token']:.1f} bytes a token" in text and f"{record['tokens'] / 1e6:.1f} million\n  tokens" in text
    assert f"take {ours['bytes'] / 1e6:.0f} MB where padding to 65,536 twice takes {padded['bytes'] / 1e6:,.0f}" in text
    assert f"{ours['seconds']:.0f} s on one core where that takes {padded['seconds']:.0f}" in text
    assert padded["bytes"] > 20 * ours["bytes"] and padded["seconds"] > ours["seconds"]
