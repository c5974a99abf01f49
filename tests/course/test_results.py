"""Recorded results as frames: a made-up record by hand, and the recorded one itself."""

import json

import pytest

from longalign_lib.course.results import several_gpus


def case(backend="ddp", world=2, method="packed", **more):
    return {"world": world, "backend": backend, "model": "135M", "window": 64, "method": method} | more


def made(**more):
    step = {"tokens_per_second": 300.0, "tokens_all": 600, "step_seconds": [3.0, 2.0, 1.0], "gpu_busy": [0.9, 0.5], "gpu_waiting": 0.2, "peak_gib": 3.0}
    guess = {"idle_measured": 0.4, "idle_a_step_measured": 0.3, "idle_last_from_flops": 0.6, "idle_last_a_step_from_flops": 0.5}
    kept = {"zero3": {"idle_last_measured": 0.45, "idle_last_a_step_measured": 0.35}, "ddp": {}}
    waiting = [case(b, ranks=n, timed_on=2, **guess, **kept[b]) for b in ("ddp", "zero3") for n in (2, 4)]
    steps = [case("zero3", **step), case(**step, efficiency=0.8), case(world=1, **step), case(method="naive", failed="no memory")]
    return {"steps": steps, "waiting": waiting} | more


def test_a_case_has_the_prediction_of_its_own_kind_of_waiting():
    table = several_gpus(made())
    assert table.backend.tolist() == ["DDP", "ZeRO-3"] and table.plan.tolist() == ["packed", "packed"]
    assert table.waiting_timed_all.tolist() == [0.3, 0.4] and table.waiting_flops.tolist() == [0.5, 0.6]
    assert table.waiting_timed.isna().tolist() == [True, False] and table.waiting_timed[1] == 0.45
    assert table.computing.tolist() == [0.7, 0.7] and table.waiting.tolist() == [0.2, 0.2]
    assert table.tokens_per_second.tolist() == [100, 100]  # of all steps: plans put other rows in the timed ones
    assert table.efficiency[0] == 0.8 and table.efficiency.isna().tolist() == [False, True]


def test_one_rank_alone_is_refused():
    with pytest.raises(ValueError, match="two ranks or more"):
        several_gpus(made(steps=[case(world=1), case(failed="no memory")]))


def test_the_recorded_run_is_read_whole(root):
    record = json.loads((root / "results" / "multi_gpu.json").read_text())
    table = several_gpus(record)
    assert len(table) == sum(r["world"] == 2 for r in record["steps"]) > 20 and (table.ranks == 2).all()
    assert table.drop(columns=["efficiency", "waiting_timed"]).notna().all(axis=None) and table.groupby(["model", "backend"], observed=True).ngroups == 4
    same = table[table.waiting_timed.notna() & (table.plan == "packed")]
    assert len(same) >= 2 and (same.waiting - same.waiting_timed).abs().max() < 0.02  # packed plans only: others are farther off
    assert table.computing.between(0, 1).all() and (table.tokens_per_second > 1000).all()
