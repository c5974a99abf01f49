"""The bench of packing: the published rule, what it counts, and that a contender may fail without ending the race."""

from __future__ import annotations

import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def bench(root):
    """benchmarks/packing.py, as a module under another name than the library's packing."""
    import importlib.util

    sys.path.insert(0, str(root / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("packing_bench", root / "benchmarks" / "packing.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(root / "benchmarks"))


@pytest.fixture(scope="module")
def contenders(bench):
    """benchmarks/packing_contenders.py."""
    return sys.modules["packing_contenders"]


def read_rule(lengths, capacity):
    """The rule read literally: files of rows; the last one is still open when the data ends."""
    written, open_pack = [], []
    for row, length in enumerate(lengths):
        if open_pack and sum(lengths[r] for r in open_pack) + length >= capacity:
            written.append(open_pack)
            open_pack = []
        open_pack = [*open_pack, row]
    return written, open_pack


@pytest.mark.parametrize("seed", range(8))
def test_the_published_rule_is_what_a_literal_reading_gives(contenders, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 11, 60)
    packs = contenders.published_rule(lengths, 10, seed)
    order = np.random.default_rng(seed).permutation(60)
    written, lost = read_rule(lengths[order].tolist(), 10)
    assert [sorted(order[pack]) for pack in written] == [np.flatnonzero(packs == p).tolist() for p in range(packs.max() + 1)]
    assert np.flatnonzero(packs < 0).tolist() == sorted(order[lost]) and lost
    several = [lengths[packs == p].sum() for p in range(packs.max() + 1) if (packs == p).sum() > 1]
    assert several and max(several) < 10  # never exactly full, unless by one row alone


def test_rows_in_the_open_pack_are_counted_as_lost(contenders):
    lengths = np.array([4, 6, 4, 6])  # best fit: two packs, full; here 4 + 6 never meet, and the last row is not written
    call, read = contenders.PEERS["published next-fit"](lengths, 10)
    facts = contenders.outcome(*read(call()), lengths, 10)
    packs = call()
    assert facts["lost"] == int((packs < 0).sum()) >= 1
    written = np.bincount(packs[packs >= 0], weights=lengths[packs >= 0])
    assert facts["packs"] == written.size and facts["fill"] == pytest.approx(written.mean() / 10) and facts["fill"] < 1
    everything, none = contenders.published_rule([3, 3], 10), contenders.published_rule([], 10)
    assert everything.tolist() == [-1, -1] and none.size == 0


def test_the_mix_has_the_stated_shares(bench):
    lengths = bench.mix(100_000, 0)
    assert lengths.min() >= 16 and lengths.max() <= 65_536 and np.array_equal(lengths, bench.mix(100_000, 0))
    long = lengths[lengths > 8192]
    assert abs(long.size / 100_000 - 0.1) < 0.004  # four standard errors
    assert abs(long.mean() - (8192 + 65_536) / 2) < 4 * 57_344 / np.sqrt(12 * long.size)
    short = np.log(lengths[(lengths > 16) & (lengths < 8192)])
    assert abs(np.median(short) - 6.6) < 0.03 and 0.9 < short.std() < 1.0  # clipped a little
    first, second = np.split(lengths > 8192, 2)
    assert abs(first.mean() - second.mean()) < 0.01  # long rows lie among the others


def test_outcome_against_counting_by_hand(contenders):
    lengths = np.array([5, 5, 7, 3, 2])
    facts = contenders.outcome([4, 4, 9, 9], [5, 5, 7, 3], lengths, 10)
    assert facts == {"packs": 2, "lost": 1, "fill": 1.0, "waste": 0.0, "gap": 0.0}
    facts = contenders.outcome([0, 1, 2, 3, 3], lengths, lengths, 10)  # 22 tokens: 3 packs would do
    assert facts["packs"] == 4 and facts["fill"] == 22 / 40 and facts["gap"] == pytest.approx(100 / 3)
    padded = contenders.outcome([0, 0, 1, 1, 1], lengths, lengths, 10, padded=True)  # 2 x 5 and 3 x 7 slots
    assert padded["waste"] == pytest.approx(100 * 9 / 31) and padded["gap"] is None


@pytest.mark.parametrize("pack, length, message", [([0, 0, 0], [5, 5, 2], "12 tokens, over the capacity of 10"),
                                                   ([0, 1, 2], [5, 5, 5], "more rows of 5 tokens"),
                                                   ([0, 1], [5, 8], "more rows of 8 tokens")])  # fmt: skip
def test_an_answer_that_cannot_be_right_is_refused(contenders, pack, length, message):
    with pytest.raises(ValueError, match=message):
        contenders.outcome(pack, length, np.array([5, 5, 2]), 10)


def test_all_of_ours_and_the_length_groups_place_every_row(bench, contenders):
    lengths = bench.mix(500, 1)
    for name, prepare in (contenders.PACKERS | contenders.PLANS).items():
        call, read = prepare(lengths, bench.CAPACITY)
        facts = contenders.outcome(*read(call()), lengths, bench.CAPACITY)
        assert facts["lost"] == 0 and facts["gap"] >= 0, name
    assert {name.removeprefix("ours: ") for name in contenders.PACKERS} >= {"next_fit", "best_fit_decreasing", "cost_balanced"}
    call, read = contenders.PEERS["transformers length groups"](lengths, bench.CAPACITY)
    facts = contenders.outcome(*read(call()), lengths, bench.CAPACITY, padded=True)
    assert facts["lost"] == 0 and facts["packs"] == 63 and 0 < facts["waste"] < 100


@pytest.fixture
def saved(tmp_path):
    """Save lengths where the bench's child reads them."""

    def save(lengths):
        np.save(tmp_path / "lengths.npy", np.asarray(lengths))
        return tmp_path / "lengths.npy"

    return save


def test_a_contender_is_measured_in_its_own_process(bench, saved):
    line = bench.measure("ours: best_fit_decreasing", saved(bench.mix(300)), bench.CAPACITY, 60, repeats=2)
    assert line["status"] == "ok" and line["runs"] == 2 and line["lost"] == 0
    assert 0 < line["seconds"] <= line["median"] and line["peak_mb"] >= 0


def test_a_crash_is_a_line(bench, contenders, saved, monkeypatch):
    line = bench.measure("ours: next_fit", saved([5, 0, 5]), 10, 60)
    assert line["status"] == "error" and "row 1 has 0 tokens" in line["why"]
    line = bench.measure("nobody", saved([5]), 10, 60)
    assert line["contender"] == "nobody" and line["status"] == "error" and "nobody" in line["why"]
    killed = ["/bin/sh", "-c", "echo it fell over >&2; kill -9 $$"]
    real = bench.subprocess.run
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **more: real(killed, **more))
    line = bench.measure("ours: next_fit", saved([5]), 10, 60)
    assert line["status"] == "error" and line["why"] == "exit status -9: it fell over"


def test_a_contender_out_of_time_or_memory_or_missing_says_so(bench, saved, monkeypatch):
    path = saved(bench.mix(100_000))
    assert bench.measure("ours: next_fit", path, bench.CAPACITY, 0.001)["status"] == "> 0.001 s"
    line = bench.measure("ours: next_fit", saved(np.ones(3_000_000, dtype=np.int64)), 10, 60, memory=0.05)
    assert line["status"] == "> 0.05 GB"
    monkeypatch.setenv("PYTHONPATH", str(path.parent), prepend=":")
    (path.parent / "seqpacker.py").write_text("raise ModuleNotFoundError(\"No module named 'seqpacker._core'\")")
    line = bench.measure("seqpacker obfd", path, bench.CAPACITY, 60)
    assert line["status"] == "not installed" and "seqpacker" in line["why"]


def test_the_race_goes_on_without_those_who_do_not_finish(bench, monkeypatch):
    slow = {"b": 20}
    asked = []

    def measured(name, path, capacity, limit, repeats):
        rows = len(np.load(path))
        asked.append((name, rows, limit))
        return {"contender": name, "status": "ok" if rows <= slow.get(name, 99) else f"> {limit} s"}

    monkeypatch.setattr(bench, "measure", measured)
    lines = bench.race({"a": 9, "b": 5}, (10, 30, 50), seed=0)
    assert asked == [("a", 10, 9), ("b", 10, 5), ("a", 30, 9), ("b", 30, 5), ("a", 50, 9)]
    assert [x["status"] for x in lines] == ["ok", "ok", "ok", "> 5 s", "ok"]
    text = bench.show(lines, {"seconds": ".3f"})
    assert "> 5 s" in text and "nan" not in text.lower() and len(text.splitlines()) == 6


def test_targets_are_met_not_met_or_not_measured(bench):
    line = {"contender": "ours: best_fit_decreasing", "status": "ok", "rows": 1_000_000, "median": 0.31, "gap": 0.01, "peak_mb": 149}
    other = {**line, "contender": "ours: next_fit", "median": 9, "gap": 25.0}
    assert [x["verdict"] for x in bench.targets([other, line])] == ["not met", "met", "met", "not measured"]
    assert [x["verdict"] for x in bench.targets([{**line, "status": "> 900 s"}])] == ["not measured"] * 4
