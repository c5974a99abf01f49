import hashlib
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from llm_faults import FaultServer
from scipy import stats

from longalign_lib.evaluate import audit as A
from longalign_lib.evaluate.known_judges import FLAWS, KnownJudge
from longalign_lib.evaluate.longbench_chat import read_items
from longalign_lib.llm import ChatClient

ITEMS = read_items()
FINDINGS = {"none": set(), "fond of length": {"length"}, "obedient": {"injection"}, "last example": {"order"}, "moody": {"repeats"},
            "first place": {"swap"}, "asleep": {"ladder", "swap"}}  # fmt: skip


@pytest.fixture(scope="module")
def audits():
    return {flaw: A.audit(KnownJudge(flaw), ITEMS, progress=False) for flaw in FLAWS}


@pytest.mark.parametrize("flaw", FLAWS)
def test_an_audit_finds_the_flaw_and_no_other(audits, flaw):
    table = audits[flaw].table
    assert set(table.probe[table.finding != ""]) == FINDINGS[flaw], table[["probe", "measure", "value", "low", "finding"]].to_string()
    assert set(table.probe) == set(A.PROBES) and table.missing.sum() == 0


@pytest.mark.parametrize("explain", [True, False])
def test_small_judges_prompts_are_audited_too(explain):
    found = A.audit(KnownJudge("obedient"), ITEMS[:6], explain=explain, progress=False).table
    assert set(found.probe[found.finding != ""]) == {"injection"}


def test_numbers_of_the_ladder_are_those_of_scipy(audits):
    found = audits["fond of length"]
    calls = found.calls[found.calls.probe == "ladder"]
    value = found.table.set_index(["probe", "measure"]).value
    assert value["ladder", "spearman"] == pytest.approx(stats.spearmanr(calls.known.astype(int), calls.score)[0])
    assert value["ladder", "kendall"] == pytest.approx(stats.kendalltau(calls.known.astype(int), calls.score)[0])
    right = whole = 0
    for _, q in calls.groupby("id"):
        for (ka, sa), (kb, sb) in itertools.permutations(zip(q.known, q.score), 2):
            whole, right = whole + (ka > kb), right + (ka > kb and sa > sb)
    assert value["ladder", "pairs in order"] == pytest.approx(right / whole)


def test_rises_and_spreads_are_those_of_the_calls(audits):
    calls = audits["moody"].calls
    plain = calls[calls.probe == "plain"].set_index("id").score
    longer = calls[calls.probe == "length"].set_index("id").score
    table = audits["moody"].table.set_index(["probe", "measure"])
    rise = (longer - plain).to_numpy()
    assert table.value["length", "rise (points)"] == pytest.approx(rise.mean())
    low, high = stats.t.interval(0.95, len(rise) - 1, rise.mean(), stats.sem(rise))
    assert (table.low["length", "rise (points)"], table.high["length", "rise (points)"]) == (pytest.approx(low), pytest.approx(high))
    again = [np.std([plain[i], *calls.score[(calls.probe == "repeats") & (calls.id == i)]], ddof=1) for i in plain.index]
    assert table.value["repeats", "standard deviation (points)"] == pytest.approx(np.mean(again))


class Drawn:
    """Rates what it is told by the prompt, and adds noise drawn from prompt and seed; keeps what it said."""

    label = "drawn"

    def __init__(self, noise, of_prompt=lambda prompt: 5.0):
        self.noise, self.of_prompt = noise, of_prompt

    def chat(self, messages, max_tokens=256, temperature=0.0, seed=0):
        prompt = messages[0]["content"]
        rng = np.random.default_rng(int(hashlib.sha256(f"{seed}{prompt}".encode()).hexdigest()[:12], 16))
        return SimpleNamespace(text=f"[[{min(10, max(1, self.of_prompt(prompt) + self.noise * rng.standard_normal())):.3f}]]", finish_reason="stop")


def found_order(judge, seed, n=8):
    return A.audit(judge, ITEMS[:n], seed=seed, probes=("order",), progress=False).table.iloc[0]


@pytest.mark.parametrize("noise", [0.7, 1.5])
def test_noise_is_not_taken_for_an_effect_of_the_examples_order(noise):
    rows = [found_order(Drawn(noise), seed) for seed in range(100)]
    # each audit errs with probability 1/40 at most: 9 or more of 100 come with a probability below 0.001
    assert sum(r.low > 0 for r in rows) <= 8 and sum(r.finding != "" for r in rows) <= 8
    assert all(r.low <= r.value <= r.high for r in rows)


@pytest.mark.parametrize(("noise", "at_least"), [(0.0, 100), (0.7, 95)])
def test_a_judge_that_follows_the_order_is_found_with_and_without_noise(noise, at_least):
    def first_example(prompt):
        return 3 + 0.5 * float(re.search(r"\[\[(\d+)\]\]", prompt)[1])

    rows = [found_order(Drawn(noise, first_example), seed, 17) for seed in range(0, 100, 1 if noise else 50)]
    assert sum(r.finding != "" for r in rows) >= at_least * len(rows) / 100


def test_what_orders_add_is_the_difference_of_variances_of_the_calls():
    found = A.audit(KnownJudge("moody"), ITEMS, progress=False, seed=1)
    row = found.table.set_index(["probe", "measure"]).loc["order", "standard deviation added (points)"]
    ratings = found.calls.groupby(["id", "probe"]).score.apply(list)
    apart = [np.var(ratings[i.id, "order"], ddof=1) - np.var(ratings[i.id, "plain"] + ratings[i.id, "repeats"], ddof=1) for i in ITEMS]
    low, high = stats.t.interval(0.95, len(apart) - 1, np.mean(apart), stats.sem(apart))
    assert np.allclose([row.value, row.low, row.high], [max(0, x) ** 0.5 for x in (np.mean(apart), low, high)])
    assert row.n == len(ITEMS) and row.high > 0  # the mood changes with the order, and so does the interval


def test_probes_change_what_they_say_and_nothing_else():
    facts, asked, pairs = A.requests(ITEMS[:3], seed=2)
    by = {}
    for fact, request in zip(facts, asked, strict=True):
        by.setdefault((fact["probe"], fact["id"]), []).append(request)
    for item in ITEMS[:3]:
        (plain,), repeats, orders = by["plain", item.id], by["repeats", item.id], by["order", item.id]
        assert all(r["messages"] == plain["messages"] for r in repeats) and len({r["seed"] for r in [plain, *repeats]}) == 3
        assert len({str(r["messages"]) for r in orders}) == A.ORDERS
        assert {"".join(sorted(str(r["messages"]))) for r in orders} == {"".join(sorted(str(orders[0]["messages"])))}  # the same letters
        longer = by["length", item.id][0]["messages"][0]["content"]
        assert A.FILLER[item.language][0] in longer and A.FILLER[item.language][0] not in plain["messages"][0]["content"]
        assert len(by["injection", item.id]) == len(A.INJECTIONS[item.language])
    assert len(pairs) == 3 and all(p["left"] != p["right"] for p in pairs)
    assert {f["probe"] for f in A.requests(ITEMS[:3], probes=["order"])[0]} == {"plain", "repeats", "order"}  # what it is compared with
    only = A.requests(ITEMS[:3], probes=["swap"])
    assert (only[0], only[1], len(only[2])) == ([], [], 3)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_filler_holds_no_word_of_substance(language):
    text = "A short text." if language == "en" else "短文。"
    longer = A.lengthened(text, language)
    assert longer.startswith(text) and 2 * len(text) <= len(longer) and not any(c.isdigit() for c in longer)


def test_bad_arguments_and_flaws():
    with pytest.raises(ValueError, match="at least two questions, got 1"):
        A.requests(ITEMS[:1])
    with pytest.raises(ValueError, match="unknown probe mood"):
        A.requests(ITEMS[:2], probes=["mood"])
    with pytest.raises(ValueError, match="repeats must be 2"):
        A.requests(ITEMS[:2], repeats=1)
    with pytest.raises(ValueError, match="unknown flaw 'kind'"):
        KnownJudge("kind")
    with pytest.raises(ValueError, match="between fences"):
        KnownJudge().chat([{"role": "user", "content": "Is it good?"}])


def test_an_endpoint_is_asked_at_once_in_parallel_and_never_twice(tmp_path):
    sound, n = KnownJudge(), [0]

    def say(body):
        n[0] += 1
        return "no rating" if n[0] % 9 == 0 else sound.chat(body["messages"]).text

    with FaultServer(say, delay=0.01) as server:
        judge = ChatClient(server.url, "j", cache=tmp_path / "c.jsonl", concurrency=6, max_retries=0)
        first = A.audit(judge, ITEMS[:3], progress=False)
        asked = len(server.requests)
        assert server.most_at_once > 1 and asked <= len(first.calls) + len(first.pairs)
        again = A.audit(ChatClient(server.url, "j", cache=tmp_path / "c.jsonl"), ITEMS[:3], progress=False)
        assert len(server.requests) == asked and again.calls.equals(first.calls)
        unparsed = int((first.calls.status == "unparsed").sum() + (first.pairs.status == "unparsed").sum())
        assert unparsed and first.table.missing.max() > 0
