"""Money from counted tokens."""

from __future__ import annotations

import pandas as pd
import pytest

from longalign_lib.data.price import cost_of, price_table, self_instruct_calls


def test_every_form_of_counts_costs_the_same():
    pairs = [(30_000, 400), (10_000, 100)]
    dicts = [{"prompt_tokens": a, "completion_tokens": b, "text": "x"} for a, b in pairs]
    expected = {"prompt_tokens": 40_000, "completion_tokens": 500, "cost": 40_000 * 8 / 1e6 + 500 * 24 / 1e6}
    for counts in (pairs, iter(pairs), dicts, pd.DataFrame(dicts), {"prompt_tokens": 40_000, "completion_tokens": 500, "calls": 2}):
        assert cost_of(counts, 8, 24) == pytest.approx(expected)
    assert cost_of([], 8, 24)["cost"] == 0 == cost_of(pairs, 0, 0)["cost"]


def test_two_readings_and_five_questions():
    calls = self_instruct_calls([1000, 30_000], [50, 400], asking=100, question=20)
    # first call: document (length - answer - question) + asking; second: document + question
    assert calls.prompt_tokens.tolist() == [(950 - 20) + 100 + 950, (29_600 - 20) + 100 + 29_600]
    assert calls.completion_tokens.tolist() == [50 + 100, 400 + 100]


def test_a_table_for_any_number_of_samples():
    calls = [(100, 10), (300, 30)]
    table = price_table(calls, {"own": (0, 0), "small": (0.5, 2)}, samples=1000, accepted=0.5)
    assert table.prompt_tokens.tolist() == [400_000] * 2 and table.completion_tokens.tolist() == [40_000] * 2
    assert table.cost.tolist() == [0, pytest.approx(0.28)] and table.cost_per_sample[1] == pytest.approx(0.00028)


def test_wrong_counts_and_prices_are_named():
    with pytest.raises(ValueError, match="prices are -1 and 2"):
        cost_of([(1, 1)], -1, 2)
    with pytest.raises(ValueError, match=r"counts lack completion_tokens; they have \['prompt_tokens'\]"):
        cost_of([{"prompt_tokens": 1}], 1, 2)
    with pytest.raises(ValueError, match="0 or more"):
        cost_of([(-1, 1)], 1, 2)
    with pytest.raises(ValueError, match="between 0 and the lengths"):
        self_instruct_calls([5], [6])
    with pytest.raises(ValueError, match="0 calls and accepted"):
        price_table([], {})
