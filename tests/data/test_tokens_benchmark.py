"""The benchmark of tokenization: both ways encode the same tokens and labels, and what it reports adds up."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longalign_lib.data.chat import encode_chat
from longalign_lib.data.jsonl import read_jsonl


@pytest.fixture(scope="module")
def bench(load_bench):
    return load_bench("tokens")


@pytest.fixture(scope="module")
def rows(bench, tmp_path_factory):
    return bench.make_rows(tmp_path_factory.mktemp("rows"), 40, 8192, 0)


def test_the_rows_are_a_mix_made_once(bench, rows):
    samples = read_jsonl(rows)
    assert len(samples) == 40 and {s["part"] for s in samples} == {"long", "short"}
    assert max(s.get("length", 0) for s in samples) > 7000
    before = rows.stat().st_mtime_ns
    assert bench.make_rows(rows.parent, 40, 8192, 0) == rows and rows.stat().st_mtime_ns == before


def test_the_published_way_holds_the_same_tokens_and_labels(bench, rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PAD", 8300)
    theirs = bench.published(rows, tokenizer, tmp_path)
    mine = bench.ours(rows, tokenizer, tmp_path / "ours", 1)
    assert theirs == mine
    inputs, labels = np.load(tmp_path / "inputs.npy"), np.load(tmp_path / "labels.npy")
    assert inputs.dtype == labels.dtype == np.int64 and inputs.shape == labels.shape == (40, 8300)
    for row, sample in enumerate(read_jsonl(rows)):
        ids, wanted = encode_chat(tokenizer, sample["messages"])
        n = len(ids)
        assert tokenizer.decode(inputs[row, :n]) == tokenizer.decode(ids) and (labels[row, n:] == -100).all()
        assert tokenizer.decode(labels[row][labels[row] != -100]) == tokenizer.decode(wanted[wanted != -100])


def test_the_quick_run(bench, rows, tmp_path):
    numbers = bench.main(["--quick", "--work", str(rows.parent), "--out", str(tmp_path / "t.json"), "--ways", "published", "ours"])
    assert json.loads((tmp_path / "t.json").read_text())["ways"] == numbers["ways"]
    theirs, mine = numbers["ways"]
    assert (theirs["tokens"], theirs["targets"]) == (mine["tokens"], mine["targets"]) and numbers["rows"] == 40
    assert theirs["bytes"] == 2 * (40 * 65_536 * 8 + 128) and mine["times_smaller"] == theirs["bytes"] / mine["bytes"] > 20
    assert 2 <= mine["bytes_per_token"] < 4 and theirs["working_mb"] > 40 * 65_536 * 16 / 1e6 * 0.9
    assert all(w["seconds"] > 0 and w["peak_mb"] > w["base_mb"] for w in numbers["ways"])
    assert numbers["opening"]["rows"] == 800 and numbers["opening"]["tokens"] == 20 * mine["tokens"]
    free, *paid = numbers["cost"]
    assert free["cost"] == 0 and all(x["cost"] == pytest.approx((x["prompt_tokens"] * x["price_in"] + x["completion_tokens"] * x["price_out"]) / 1e6) for x in paid)


@pytest.mark.slow
def test_every_way_runs_and_finds_the_same(bench, rows, tmp_path):
    numbers = bench.main(["--quick", "--work", str(rows.parent), "--out", str(tmp_path / "t.json")])
    assert [w["way"] for w in numbers["ways"]] == list(bench.WAYS)
    assert len({(w["tokens"], w["targets"]) for w in numbers["ways"]}) == 1
    with pytest.raises(RuntimeError, match="published failed with exit status"):
        bench.measure("published", tmp_path, 1)
