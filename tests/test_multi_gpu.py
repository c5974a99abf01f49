"""The bench on several GPUs: what kernels say about waiting, against time counted tick by tick."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import LlamaConfig

from longalign_lib.train.plan import assign, build_plan


@pytest.fixture(scope="module")
def kernels(load_bench):
    """benchmarks/multi_gpu_kernels.py."""
    return load_bench("multi_gpu_kernels")


@pytest.fixture
def worker(load_bench, monkeypatch, root):
    """benchmarks/multi_gpu_worker.py, which imports files beside it."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return load_bench("multi_gpu_worker")


def drawn(rng, n, ticks=60):
    """Intervals of whole ticks in order of start."""
    start = np.sort(rng.integers(0, ticks - 10, n)).astype(float)
    return start, start + rng.integers(0, 10, n)


def ticks_in(start, end, ticks=60):
    """bool[ticks]: whether a tick lies in any interval."""
    middle = np.arange(ticks) + 0.5
    return ((start[:, None] <= middle) & (middle < end[:, None])).any(axis=0) if len(start) else np.zeros(ticks, bool)


@pytest.mark.parametrize("seed", range(20))
def test_time_outside_of_work_is_what_ticks_say(kernels, seed):
    rng = np.random.default_rng(seed)
    work, moved = drawn(rng, rng.integers(0, 12)), drawn(rng, rng.integers(1, 8))
    pieces = kernels.union(*work)
    assert np.sum(pieces[1] - pieces[0]) == ticks_in(*work).sum()
    assert (pieces[0][1:] > pieces[1][:-1]).all()
    covered = ticks_in(*work)
    wanted = [(ticks_in(moved[0][[k]], moved[1][[k]]) & ~covered).sum() for k in range(len(moved[0]))]
    assert kernels.uncovered(*moved, pieces).tolist() == pytest.approx(wanted)


def rank(work, collectives, wall):
    """What a profile gives, from pairs of start and end."""
    found = sorted([(*x, False) for x in work] + [(*x, True) for x in collectives])
    return {"wall": wall, "start": np.array([x[0] for x in found], float), "end": np.array([x[1] for x in found], float),
            "collective": np.array([x[2] for x in found])}  # fmt: skip


def test_a_rank_that_is_done_early_waits_in_its_collective(kernels):
    # both meet at 8; the transfer takes 1. One is done at 4 and spins for 4 of its 10 seconds
    early, late = rank([(0, 4), (9, 10)], [(4, 9)], 10), rank([(0, 8), (9, 10)], [(8, 9)], 10)
    found = kernels.shares([early, late])
    assert found["gpu_busy"] == pytest.approx([0.5, 0.9]) and found["gpu_collectives"] == pytest.approx([0.5, 0.1])
    assert found["gpu_nothing"] == pytest.approx([0, 0]) and found["gpu_waiting"] == pytest.approx(4 / 20)


def test_a_transfer_behind_work_is_no_waiting_and_gaps_are_counted(kernels):
    hidden = rank([(0, 8)], [(2, 6)], 10)
    found = kernels.shares([hidden, hidden])
    assert (found["gpu_waiting"], found["gpu_collectives"]) == (0, [0, 0]) and found["gpu_nothing"] == pytest.approx([0.2, 0.2])


def test_what_cannot_be_said_is_not_said(kernels):
    one = rank([(0, 1)], [(1, 2)], 2)
    assert kernels.shares([None, one]) == {} and kernels.shares([one])["gpu_waiting"] is None
    assert kernels.shares([one, rank([(0, 1)], [], 2)])["gpu_waiting"] is None  # other numbers of collectives
    seen = kernels.Profile()
    seen.start()
    seen.stop()
    assert seen.kernels() is None or len(seen.kernels()["start"]) == 0  # without CUDA, nothing is watched


@pytest.mark.parametrize("method", ["packed", "balanced"])
@pytest.mark.parametrize("seed", range(5))
def test_predicted_waiting_is_what_a_clock_on_every_rank_says(worker, seed, method):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 120, 60)
    plan = build_plan(lengths, method=method, capacity=128, packs_per_step=8, seed=seed)
    seconds = plan.packs().set_index("pack").slots * 0.01 + rng.random(len(plan.packs()))
    found = worker.waiting(plan, method, 4, seconds, [], LlamaConfig(**worker.MODELS["tiny"]), False)
    met, waits = {}, {}  # a rank's packs by step and micro-step, each step's (micro-step's) waiting and time
    for row in assign(plan, 4, method == "balanced").itertuples():
        met.setdefault(row.step, {}).setdefault(row.micro, [0.0] * 4)[row.rank] += seconds[row.pack]
    for step, micros in met.items():
        for name, groups in (("", micros.values()), ("a_step_", [np.sum(list(micros.values()), axis=0)])):
            lost, spent = (sum(f(g) for g in groups) for f in (lambda g: sum(max(g) - x for x in g), lambda g: 4 * max(g)))
            waits[step, name] = np.array([lost, spent])
    last = max(met)
    assert len(met) > 1
    for name in ("", "a_step_"):
        lost, spent = sum(waits[step, name] for step in met)
        assert found[f"idle_{name}measured"] == pytest.approx(lost / spent)
        assert found[f"idle_last_{name}measured"] == pytest.approx(waits[last, name][0] / waits[last, name][1])


def test_the_record_counts_the_tokens_of_its_plans_and_their_flops(worker, root):
    record = json.loads((root / "results" / "multi_gpu.json").read_text())
    steps = {r["window"]: 4 if r["window"] == 16_384 else 3 for r in record["steps"]}
    assert sorted(steps) == [16_384, 32_768, 65_536]
    plans = {window: worker.plans_of(window, n, record["provenance"]["seed"])[1] for window, n in steps.items()}
    for row in record["steps"]:
        tokens = plans[row["window"]][row["method"]].table.groupby("step").length.sum()
        assert (row["tokens"], row["tokens_all"], len(row["step_seconds"])) == (tokens.iloc[1:-1].sum(), tokens.sum(), len(tokens)), row
    for four in plans.values():  # plans compare over all steps since each holds the same rows
        rows = [np.sort(plan.table.length).tolist() for plan in four.values()]
        assert len(rows) == 4 and rows.count(rows[0]) == 4
    for row in record["waiting"]:
        plan, size = plans[row["window"]][row["method"]], worker.MODELS[row["model"]]
        seconds = plan.packs().set_index("pack").slots * 1.0  # of no matter: FLOPs are looked at
        found = worker.waiting(plan, row["method"], row["ranks"], seconds, [], LlamaConfig(**size), row["model"] != "135M")
        told = [k for k in row if k.endswith("from_flops")]
        assert len(told) == 4 and [found[k] for k in told] == pytest.approx([row[k] for k in told], abs=1e-9), row
