"""The step-cost model against times it made and products counted by hand; the simulator against a loop."""

import numpy as np
import pytest

from longalign_lib.train.cost import StepCost, fit, from_config, simulate
from longalign_lib.train.plan import build_plan


def test_balanced_micro_steps_wait_less_than_packed_ones():
    lengths = np.random.default_rng(0).choice([20, 30, 60, 900], 4000, p=[0.5, 0.3, 0.15, 0.05])
    cost = StepCost(0, 0, 1)
    idle = {m: simulate(build_plan(lengths, method=m, capacity=1024, packs_per_step=32, max_ranks=8, seed=0), 8, cost,
                        balance=m == "balanced").idle for m in ("packed", "balanced")}  # fmt: skip
    assert idle["balanced"] < 0.1 < idle["packed"]


def test_simulation_against_a_loop():
    lengths = np.minimum(np.exp(np.random.default_rng(2).normal(3, 1, 200)).astype(int) + 2, 256)
    plan = build_plan(lengths, method="naive", capacity=256, packs_per_step=8, seed=0)
    cost = StepCost(0.5, 1e-2, 1e-4)
    seconds = worked = 0.0
    for _, step in plan.table.groupby("step"):
        times = [0.5 + 1e-2 * x + 1e-4 * x * x for x in step.length]
        for k in range(0, len(times), 4):
            seconds += max(times[k : k + 4])
            worked += sum(times[k : k + 4])
    run = simulate(plan, 4, cost, balance=False)
    assert run.seconds == pytest.approx(seconds) and run.idle == pytest.approx(1 - worked / (4 * seconds))


def test_cost_is_recovered_from_times_it_made():
    true = StepCost(0.1, 2e-5, 3e-10)
    slots = np.array([512, 2048, 8192, 32768, 65536, 65536])
    squares = np.array([512, 2048, 8192, 32768, 65536, 8192], float) ** 2
    found = fit(slots, squares, true(slots, squares))
    assert found(slots, squares) == pytest.approx(true(slots, squares), rel=1e-6)
    with pytest.raises(ValueError, match="three positive times"):
        fit([1, 2], [1, 4], [0.1, 0.2])


def test_flops_of_a_config_against_counting_matrix_products():
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2)  # fmt: skip
    flops = lambda m, k, n: 2 * m * k * n  # noqa: E731
    tokens = 64
    linear = 2 * (flops(tokens, 32, 32) * 2 + flops(tokens, 32, 16) * 2 + flops(tokens, 32, 48) * 3) + flops(tokens, 32, 97)
    pairs = tokens * tokens / 2
    attention = 2 * 2 * (2 * pairs * 32)
    cost = from_config(config, flops_per_second=1.0)
    assert cost(tokens, tokens**2) == pytest.approx(3 * (linear + attention))  # backward costs twice the forward
