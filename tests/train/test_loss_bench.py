"""benchmarks/losses.py: its float64 gradients against autograd's, and that an error of a way would show in its rows."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module")
def bench(load_bench):
    return load_bench("losses")


def test_its_truth_is_autograds(bench):
    hidden, weight, labels, weights = bench.problem(70, 6, 11, torch.float64, torch.device("cpu"))
    loss = (F.cross_entropy(hidden @ weight.T, labels, reduction="none") * weights).sum()
    for mine, theirs in zip(bench.truth(hidden, weight, labels, weights, rows=32), torch.autograd.grad(loss, [hidden, weight]), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-15)


def test_a_way_that_forgets_the_weights_has_an_error_of_order_one(bench, monkeypatch):
    def forgetful(hidden, weight, labels):
        return F.cross_entropy(hidden @ weight.T, labels).expand(len(labels))  # the mean, for every position

    monkeypatch.setitem(bench.WAYS, "forgetful", forgetful)
    right, wrong = (bench.measure(way, 64, 16, 50, torch.float32, torch.device("cpu"), 1) for way in ("chunked", "forgetful"))
    assert max(right["error_hidden"], right["error_weight"]) < 1e-5 and min(wrong["error_hidden"], wrong["error_weight"]) > 0.3
    assert bench.measure("no such way", 4, 4, 4, torch.float32, torch.device("cpu"), 1)["status"].startswith("KeyError")


def test_peaks_are_the_logits_that_a_way_holds(bench, monkeypatch):
    monkeypatch.setitem(bench.WAYS, "chunked", lambda *tensors: bench.chunked_cross_entropy(*tensors, chunk=32))
    whole, chunk = (bench.measure(way, 512, 16, 8192, torch.float32, torch.device("cpu"), 1) for way in ("all logits", "chunked"))
    assert whole["peak_mib"] == pytest.approx(3 * 16, rel=0.05)  # 512 x 8,192: logits, their logarithms, their gradient
    assert chunk["peak_mib"] == pytest.approx(2 * 1 + 0.5, rel=0.05)  # two chunks of 32 rows, the gradient of the weights
    assert all(x["seconds"] > 0 and max(x["error_hidden"], x["error_weight"]) < 1e-5 for x in (whole, chunk))


def test_it_writes_a_row_a_way(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["losses.py", "--quick", "--repeats", "1", "--out", str(tmp_path / "losses.json")])
    bench.main()
    rows = json.loads((tmp_path / "losses.json").read_text())["losses"]
    ran = [r for r in rows if r["status"] == "ran"]
    assert {r["way"] for r in rows} == set(bench.WAYS) and {"all logits", "chunked"} <= {r["way"] for r in ran}
    assert all(r["error_weight"] < (1e-5 if r["dtype"] == "float32" else 0.02) for r in ran)
