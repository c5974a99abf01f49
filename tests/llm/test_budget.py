"""Budgets of requests, tokens and money: never exceeded, whatever is in flight, and used as far as they go."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_faults import FAULTS, FaultServer, completion

from longalign_lib.llm import BudgetError, ChatClient, ChatError, Prices, Reply, Request
from longalign_lib.llm.budget import Budget
from longalign_lib.llm.records import count_prompt, most_prompt_tokens

ASK = [{"role": "user", "content": "Where is the key?"}]


def client(server, **options):
    return ChatClient(server.url, "m", **({"timeout": 5, "max_wait": 0.05} | options))


def asks(number, **settings):
    return [Request(ASK, seed=n, **settings) for n in range(number)]


def test_the_budget_counts_every_request_and_says_how_to_go_on(server, tmp_path):
    server.steps = [FAULTS["500"]]
    chat = client(server, max_calls=2, cache=tmp_path / "c.jsonl")
    chat.chat(ASK)
    with pytest.raises(BudgetError, match=r"budget of 2 requests is used up \(used: 2 requests, 11 tokens\)\. .*raise max_calls"):
        chat.chat(ASK, seed=1)
    assert len(server.requests) == 2 and isinstance(BudgetError("x"), ChatError)
    assert chat.chat(ASK).cached and client(server, max_calls=1, cache=tmp_path / "c.jsonl").chat(ASK).cached
    server.steps = [FAULTS["500"]]
    with pytest.raises(BudgetError, match="The last try: HTTP 500: boom"):
        client(server, max_calls=1).chat(ASK, seed=5)


@pytest.mark.parametrize("limit", ["max_calls", "max_total_tokens", "max_cost"])
def test_no_budget_is_exceeded_by_calls_in_flight_and_nearly_all_of_it_is_used(limit, tokenizer):
    prompt, answer, prices = count_prompt(ASK, tokenizer), 20, Prices(3.0, 9.0)
    usage = {"prompt_tokens": prompt, "completion_tokens": answer}
    one = {"max_calls": 1, "max_total_tokens": prompt + answer, "max_cost": prices.cost(prompt, answer)}[limit]
    with FaultServer(delay=0.01) as server:
        server.steps = [{"body": completion(usage=usage), "sleep": 0.01} for _ in range(100)]
        chat = client(server, concurrency=16, prices=prices, tokenizer=tokenizer, **{limit: one * 10})
        got = chat.chat_many(asks(40, max_tokens=100), progress=False)
    answered = [reply for reply in got if isinstance(reply, Reply)]
    assert all(isinstance(other, BudgetError) for other in got if other not in answered)
    # A call's bound is 100 tokens of answer and a few of prompt; what is left at the end is less than one bound.
    bound = {"max_calls": 1, "max_total_tokens": prompt + 16 + 100, "max_cost": prices.cost(prompt + 16, 100)}[limit]
    used = {
        "max_calls": chat.usage["requests"], "max_cost": chat.usage["cost"],
        "max_total_tokens": chat.usage["prompt_tokens"] + chat.usage["completion_tokens"],
    }[limit]  # fmt: skip
    assert len(answered) == len(server.requests) == chat.usage["calls"]
    assert 10 * one - bound < used <= 10 * one * (1 + 1e-9)
    assert not any(chat.budget.held.values()) or max(chat.budget.held.values()) < 1e-12


def test_a_call_larger_than_what_is_left_is_not_made_and_a_smaller_one_is(server):
    chat = client(server, max_total_tokens=400)
    with pytest.raises(BudgetError, match=r"has 400 left, and this call may take 1,0\d\d \(its upper bound\).*raise max_total_tokens"):
        chat.chat(ASK, max_tokens=1000)
    assert not server.requests and chat.chat(ASK, max_tokens=100).text


def test_tries_without_a_usable_answer_may_have_been_billed_and_stay_booked(server):
    server.steps = [FAULTS["dropped-in-the-body"], FAULTS["cut-json"], {"body": completion(usage=None)}]
    chat = client(server, max_total_tokens=2000)
    chat.chat(ASK, max_tokens=100)
    bound = most_prompt_tokens(ASK) + 100
    assert chat.budget.unknown["tokens"] == 3 * bound and chat.budget.used["tokens"] == 0
    server.steps = [FAULTS["429-bare"], FAULTS["500"]]  # refused: not billed
    chat.chat(ASK, max_tokens=100, seed=1)
    assert chat.budget.unknown["tokens"] == 3 * bound and chat.budget.used["tokens"] == 11
    with pytest.raises(BudgetError, match="for tries without a usable answer"):
        chat.chat(ASK, max_tokens=1900)
    unreachable = ChatClient("http://127.0.0.1:9/v1", "m", max_total_tokens=1000, max_retries=1, max_wait=0.01)
    with pytest.raises(ChatError, match="connection failed"):
        unreachable.chat(ASK, max_tokens=10)
    assert unreachable.budget.unknown["tokens"] == 0  # it never arrived


def test_a_dropped_caller_stays_booked(server):
    import asyncio

    server.delay = 0.3
    chat = client(server, max_total_tokens=2000)

    async def drop():
        task = asyncio.create_task(chat.achat(ASK))
        await asyncio.sleep(0.15)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.1)

    asyncio.run(drop())
    assert chat.budget.unknown["tokens"] == most_prompt_tokens(ASK) + 256 and chat.budget.held["tokens"] == 0


@pytest.mark.parametrize("text", ["", "Where is it?", "\u94a5\u5319\u5728\u54ea\u91cc", "\U0001f600" * 9, "a\u0300" * 20, " \n\t" * 30, "0" * 50])
def test_the_bound_without_a_tokenizer_is_one(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    assert count_prompt(messages, tokenizer) <= most_prompt_tokens(messages)
    conversation = [{"role": "system", "content": "Be brief."}] + messages * 5
    assert count_prompt(conversation, tokenizer) <= most_prompt_tokens(conversation)


calls = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30), st.floats(0, 1), st.sampled_from("snx")), max_size=40)


@given(calls, st.integers(1, 200), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_used_unknown_and_held_together_never_exceed_a_limit(calls, limit, concurrency):
    """Calls start and end in any order; each uses any part of its bound, or ends with an unknown fate."""
    prices = Prices(1e6, 2e6)
    budget, flying, spent = Budget(max_calls=25, max_tokens=limit, max_cost=1.5 * limit, prices=prices), [], 0

    def land():
        held, prompt, answer, share, fate = flying.pop(0)
        budget.settle(held, int(prompt * share), int(answer * share), unknown=fate == "x")

    for prompt, answer, share, fate in calls:
        while True:
            try:
                held = budget.reserve(prompt, answer)
            except BudgetError:
                break
            if held is not None:
                spent += 1
                flying.append((held, prompt, answer, share, fate))
                if len(flying) >= concurrency:
                    land()
                break
            assert flying, "told to wait, with nothing in flight"
            land()
        for name, most in (("requests", 25), ("tokens", limit), ("cost", 1.5 * limit)):
            assert budget.used[name] + budget.unknown[name] + budget.held[name] <= most * (1 + 1e-9)
    while flying:
        land()
    assert budget.used["requests"] == spent and all(abs(v) < 1e-6 for v in budget.held.values())


def test_a_budget_that_is_carried_counts_the_answers_of_earlier_clients(server, tmp_path):
    prices, cache = (2e6, 3e6), tmp_path / "c.jsonl"  # 2 a token read, 3 a token written
    first = client(server, cache=cache, prices=prices, concurrency=1)
    first.chat_many(asks(3), progress=False)
    tokens = first.usage["prompt_tokens"] + first.usage["completion_tokens"]
    again = client(server, cache=cache, prices=prices, max_calls=4, carry=True)
    assert again.budget.used == {"requests": 3, "tokens": tokens, "cost": pytest.approx(first.usage["cost"])} and tokens > 0
    assert again.usage["cost"] == 0 and again.chat(ASK, seed=1).cached  # what is known stays free
    again.chat(ASK, seed=7)
    with pytest.raises(BudgetError, match="budget of 4 requests is used up"):
        again.chat(ASK, seed=8)
    with pytest.raises(BudgetError, match=r"budget of .* of money"):
        client(server, cache=cache, prices=prices, max_cost=first.usage["cost"], carry=True).chat(ASK, seed=9)
    assert client(server, cache=cache, max_calls=1).chat(ASK, seed=9).text and len(server.requests) == 5


@pytest.mark.parametrize("limit", [{"max_calls": 12}, {"max_cost": 150e-6}, {"max_total_tokens": 150}])
def test_empty_answers_are_paid_for_once_over_reruns(limit, tokenizer, tmp_path):
    with FaultServer(reply=lambda body: "") as server:
        for _ in range(3):
            chat = client(server, cache=tmp_path / "c.jsonl", prices=(1, 1), concurrency=1, tokenizer=tokenizer, carry=True, **limit)
            got = chat.chat_many(asks(12, max_tokens=1), progress=False)
            assert all(isinstance(error, ChatError) for error in got) and isinstance(got[-1], BudgetError)
            made = len(server.requests)
            assert 0 < made <= 12 and chat.budget.used == {"requests": made, "tokens": 11 * made, "cost": pytest.approx(11e-6 * made)}
    assert chat.usage["requests"] == 0 and chat.cache_problems == [] and chat.cached(asks(1, max_tokens=1)[0]) is None


def test_an_empty_answer_without_usage_is_carried_with_its_bound(server, tmp_path):
    server.steps = [{"body": completion("", "length", usage=None)}, FAULTS["500"]]
    first = client(server, cache=tmp_path / "c.jsonl", max_total_tokens=9999)
    with pytest.raises(ChatError, match="empty answer"):
        first.chat(ASK, max_tokens=100)
    first.chat(ASK, max_tokens=100)  # refused once, then answered
    again = client(server, cache=tmp_path / "c.jsonl", max_total_tokens=9999, carry=True)
    assert again.budget.used["requests"] == 2 and again.budget.used["tokens"] == most_prompt_tokens(ASK) + 100 + 11
