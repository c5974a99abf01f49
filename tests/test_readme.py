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


def test_second_code_block_gives_the_mean_over_sequences(root, tiny_model, tmp_path, monkeypatch):
    import torch

    from longalign_lib.data.tokens import TokenStore

    make, lengths = np.random.default_rng(0), [30, 7, 50]  # one pack
    samples = [make.integers(3, tiny_model.config.vocab_size, n) for n in lengths]
    mask = np.concatenate([np.arange(n) >= 3 for n in lengths])
    TokenStore(np.concatenate(samples).astype(np.int32), mask, np.cumsum([0, *lengths]), [{}] * 3).save(tmp_path / "TOKENS")
    tiny_model.save_pretrained(tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(blocks((root / "README.md").read_text(), "python")[1], "README", "exec"), names)
    with torch.no_grad():
        labels = [torch.tensor(np.where(np.arange(len(x)) < 3, -100, x)) for x in samples]
        alone = [tiny_model(input_ids=torch.tensor(x)[None], labels=y[None]).loss.item() for x, y in zip(samples, labels)]
    assert len(names["losses"]) == 87 - 3 * 3 and np.isclose(names["loss"].item(), np.mean(alone), rtol=1e-5)


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
    for way in ("torch varlen", "flash-attn-4", "flex attention", "document loop", "sdpa, block mask"):
        (row,) = [r for r in record["attention"] if (r["tokens"], r["pack"], r["way"]) == (65_536, "64 documents", way)]
        assert f"{1e3 * row['both_s']:.1f} ms and {round(row['peak_mib']):,} MiB" in text and row["difference"] < 0.01
    alone = {r["way"]: r["both_s"] for r in record["attention"] if (r["tokens"], r["pack"]) == (65_536, "1 document")}
    assert f"in one document flash-attn-4 {1e3 * alone['flash-attn-4']:.1f} ms, varlen {1e3 * alone['torch varlen']:.1f} ms" in text
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


def test_the_speeds_of_one_gpu_are_the_recorded_ones(root):
    text, record = " ".join((root / "README.md").read_text().split()), json.loads((root / "results" / "throughput.json").read_text())
    rows = {(r["case"], r["way"]): round(r["tokens_per_second"], -3) for r in record["rows"] if r["table"] == "methods" and "failed" not in r}
    ours, fourth = ({size: rows[size, way] for size in ("8,192", "16,384", "32,768", "65,536")} for way in ("packed", "flash-attn-4, packed"))
    assert f"{ours['32,768']:,.0f} at 32k and {ours['65,536']:,.0f} at 64k by torch's kernel" in text
    assert f"{fourth['32,768']:,.0f} and {fourth['65,536']:,.0f} by flash-attn-4's" in text
    assert f"({ours['16,384']:,.0f} and {fourth['16,384']:,.0f})" in text and f"({ours['8,192']:,.0f} and {fourth['8,192']:,.0f})" in text


def test_the_times_of_the_loss_are_the_recorded_ones(root):
    text, unit = " ".join((root / "README.md").read_text().split()), {"cuda": (1e3, "ms"), "cpu": (1, "s")}
    for device, dtype, head, ways in (("cuda", "bfloat16", "135M", ("chunked", "all logits", "Liger")),
                                      ("cuda", "bfloat16", "7B", ("chunked", "all logits", "Liger")),
                                      ("cpu", "float32", "135M", ("chunked", "all logits", "torch"))):  # fmt: skip
        record = json.loads((root / "results" / f"losses_{device}.json").read_text())
        rows = {r["way"]: r for r in record["losses"] if (r["head"], r["dtype"]) == (head, dtype)}
        for way in ways:
            times, short = unit[device]
            assert f"{times * rows[way]['seconds']:.0f} {short} and {round(rows[way]['peak_mib']):,} MiB" in text, (device, head, way)
            assert max(rows[way]["error_hidden"], rows[way]["error_weight"]) < (1e-2 if dtype == "bfloat16" else 1e-4)


def test_what_two_gpus_did_is_the_recorded_run(root):
    text, record = " ".join((root / "README.md").read_text().split()), json.loads((root / "results" / "multi_gpu.json").read_text())
    on_two = {(r["backend"], r["model"], r["window"] // 1024, r["method"]): r for r in record["steps"] if r["world"] == 2}
    order = ("balanced", "packed", "sorted", "naive")
    speed = lambda row: f"{round(row['tokens_all'] / sum(row['step_seconds']), -3):,.0f}"  # noqa: E731
    small, large = ([speed(on_two[b, "135M", w, m]) for m in order] for b, w in (("ddp", 16), ("zero3", 64)))
    assert "{} tokens/s by balanced plans, {} packed, {} sorted, {} naive".format(*small) in text
    assert "At 64k under ZeRO-3, as the paper trained: {}, {}, {} and {}.".format(*large) in text
    watched = {(window, m): f"{on_two['ddp', '135M', window, m]['gpu_waiting']:.1%}" for window in (32, 64) for m in order}
    assert f"{watched[64, 'balanced']} of the time by the balanced plan, {watched[64, 'packed']} by the packed one" in text
    foretold = [r["idle_last_a_step_measured"] for r in record["waiting"] if (r["world"], r["ranks"], r["backend"], r["model"], r["window"], r["method"])
                == (2, 2, "ddp", "135M", 32_768, "packed")]  # fmt: skip
    assert f"{watched[32, 'packed']} by the packed one, where packs timed alone predict {foretold[0]:.1%}" in text
    alone = {r["backend"]: r["tokens_per_second"] for r in record["steps"] if (r["world"], r["model"], r["window"]) == (1, "135M", 16_384)}
    assert round(alone["ddp"] / alone["zero3"]) == 3 and "a third as fast on one GPU at 16k" in text
    gain = {key[:3]: f"{r['efficiency']:.0%}" for key, r in on_two.items() if key[3] == "balanced" and "efficiency" in r}
    small = f"{gain['ddp', '135M', 16]} of twice the speed of one, {gain['ddp', '135M', 64]} at 64k; under ZeRO-3 (a third as fast on one GPU at 16k) {gain['zero3', '135M', 16]}"
    assert f"{small} and {gain['zero3', '135M', 64]}; a 1B model at 16k {gain['ddp', '1B', 16]} (DDP) and {gain['zero3', '1B', 16]} (ZeRO-3)" in text
    off = {(r["backend"], r["type"]): r["error_to_one_rank"] for r in record["gradients"] if r["world"] == 2}
    power = lambda x: f"{x:.1e}".replace("e-0", "e-")  # noqa: E731
    assert f"difference {power(off['ddp', 'float32'])} in float32, {off['ddp', 'bfloat16']:.1%} in bfloat16; ZeRO-3 {off['zero3', 'bfloat16']:.1%}" in text
    resumed = {(r["backend"], r["to"]): r["largest_difference"] for r in record["resume"]}
    assert len(resumed) == 4 and resumed["ddp", 2] == resumed["zero3", 2] == 0
    assert f"at most {power(max(resumed.values()))} off on one, by DDP and by ZeRO-3" in text
    assert record["gpus"] == 2 and "H100" in record["provenance"]["device"]


def test_every_evaluation_command_is_there(root):
    from longalign_lib.evaluate.__main__ import COMMANDS

    said = re.findall(r"^python -m longalign_lib\.evaluate (\S+)", (root / "README.md").read_text(), re.M)
    assert said == list(COMMANDS)


def test_the_token_store_beside_padding_is_the_recorded_run(root):
    text, record = " ".join((root / "README.md").read_text().split()), json.loads((root / "results" / "tokens.json").read_text())
    ways = {w["way"]: w for w in record["ways"]}
    padded, ours, two = ways["published"], ways["ours, one thread"], ways["ours, two processes"]
    assert padded["tokens"] == ours["tokens"] == record["tokens"] and padded["targets"] == ours["targets"] > 0 and record["rows"] == 1000
    assert f"take {ours['bytes_per_token']:.1f} bytes a token" in text and f"{record['tokens'] / 1e6:.1f} million tokens" in text
    assert f"take {ours['bytes'] / 1e6:.0f} MB on disk where padding to 65,536 twice takes {padded['bytes'] / 1e6:,.0f}" in text
    assert f"{ours['working_mb']:.0f} MB of memory beside the libraries where that takes {padded['working_mb']:,.0f}" in text
    assert f"Two processes need {two['seconds']:.0f} s (and each its libraries), one {ours['seconds']:.0f}, padding {padded['seconds']:.0f}" in text
    assert padded["bytes"] > 20 * ours["bytes"] and padded["working_mb"] > 20 * ours["working_mb"] and padded["seconds"] > two["seconds"]
