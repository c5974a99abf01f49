import itertools
import random

import numpy as np
import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from longalign_lib.evaluate import prefix
from longalign_lib.evaluate.generate import Greedy

FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=1500, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                                  num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=1500, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                                     max_position_embeddings=2048, initializer_range=0.3)),
}  # fmt: skip


def grid(lengths, depths, seed=0, needle=6, tail=5):
    """Prompts as a needle grid makes them: one text, a needle of its own at each depth, a question of its own behind."""
    rng = random.Random(seed)
    text = [rng.randrange(3, 900) for _ in range(max(lengths))]
    return [[*text[: int(n * d / 100)], *(rng.randrange(3, 900) for _ in range(needle)), *text[int(n * d / 100) : n],
             *(rng.randrange(3, 900) for _ in range(tail))] for n in lengths for d in depths]  # fmt: skip


def reference(model, tokenizer, ids, n):
    """transformers' own greedy search, one prompt."""
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=n, pad_token_id=0, eos_token_id=2)
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def made(name, model):
    if name == "llama":
        return model
    torch.manual_seed(1)
    found = FAMILIES[name]().eval()
    found.generation_config.eos_token_id = 2
    return found


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_groups_answer_as_transformers_does_alone(name, model, tokenizer):
    model = made(name, model)
    prompts = grid([60, 150, 240], [0, 40, 100])
    wanted = [reference(model, tokenizer, p, 9) for p in prompts]
    assert len(set(wanted)) >= 5  # the model does tell prompts apart
    for batch in (1, 2, 4, None):
        told = {}
        said, report = prefix.complete(model, tokenizer, prompts, 9, told.__setitem__, batch=batch, progress=False)
        assert [a.text for a in said] == wanted and told == dict(enumerate(said))
        assert report.prompt_tokens == sum(map(len, prompts)) and report.computed_tokens == sum(a.prompt_tokens - a.reused for a in said)
        assert all(a.tokens <= 9 and a.seconds > 0 for a in said)
    plain, report = prefix.complete(model, tokenizer, prompts, 9, reuse_prefix=False, progress=False)
    assert [a.text for a in plain] == wanted and report.saved == 0 and report.no_reuse == "asked not to"


def test_each_line_stops_at_its_own_end(model, tokenizer, monkeypatch):
    prompts = grid([80], [0, 20, 50, 90])
    free, _ = prefix.complete(model, tokenizer, prompts, 12, progress=False)
    greedy = Greedy(model, tokenizer)
    first, _ = greedy.prefill(prompts[2])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [first, 2])
    alone, _ = prefix.complete(model, tokenizer, prompts, 12, batch=1, progress=False)
    said, _ = prefix.complete(model, tokenizer, prompts, 12, progress=False)
    key = [(a.text, a.tokens, a.finish) for a in said]
    assert key == [(a.text, a.tokens, a.finish) for a in alone] and key[2] == ("", 0, "stop")
    assert {a.finish for a in said} == {"stop", "length"} and [a.finish for a in free] == ["length"] * 4


def test_a_group_holds_no_more_than_its_room(model, tokenizer, monkeypatch):
    prompts, groups, plain = grid([100, 200], [0, 50, 100]), [], prefix._together
    monkeypatch.setattr(prefix, "_together", lambda g, held, n: (groups.append([h.tokens for h in held]), plain(g, held, n))[1])
    prefix.complete(model, tokenizer, prompts, 2, progress=False)
    assert sorted(itertools.chain(*groups)) == sorted(map(len, prompts)) and len(groups) == 1
    layer = model.config
    a_token = 2 * layer.num_hidden_layers * layer.num_key_value_heads * (layer.hidden_size // layer.num_attention_heads) * 4
    for room in (1, 2 * 215 * a_token, 10**9):
        groups.clear()
        prefix.complete(model, tokenizer, prompts, 2, room=room, progress=False)
        assert all(len(g) == 1 or len(g) * max(g) * a_token <= room for g in groups) and sum(map(len, groups)) == 6
    groups.clear()
    prefix.complete(model, tokenizer, prompts, 2, batch=4, progress=False)
    assert [len(g) for g in groups] == [4, 2]
    groups.clear()
    prefix.complete(model, tokenizer, prompts, 2, patience=0, progress=False)
    assert [len(g) for g in groups] == [1] * 6


def test_a_group_without_memory_is_asked_one_by_one(model, tokenizer, monkeypatch):
    prompts, failed = grid([60], [0, 50, 100]), {}
    wanted = [a.text for a in prefix.complete(model, tokenizer, prompts, 5, progress=False)[0]]
    monkeypatch.setattr(prefix, "_together", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    said, _ = prefix.complete(model, tokenizer, prompts, 5, progress=False)
    assert [a.text for a in said] == wanted
    plain = Greedy.prefill
    monkeypatch.setattr(Greedy, "prefill", lambda self, ids: plain(self, ids) if len(ids) == len(prompts[0]) and list(ids) != prompts[1] else
                        (_ for _ in ()).throw(RuntimeError("no room")))  # fmt: skip
    said, report = prefix.complete(model, tokenizer, prompts, 5, on_error=failed.__setitem__, progress=False)
    assert [a and a.text for a in said] == [wanted[0], None, wanted[2]] and list(failed) == [1] and "no room" in str(failed[1])
    assert report.prompt_tokens == len(prompts[0]) + len(prompts[2])
    with pytest.raises(RuntimeError, match="no room"):
        prefix.complete(model, tokenizer, prompts, 5, progress=False)


def test_positions_that_depend_on_the_longest_prompt_are_neither_kept_nor_grouped(make_model, tokenizer, monkeypatch):
    model = make_model()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    monkeypatch.setattr(prefix, "_together", lambda *_: pytest.fail("grouped"))
    _, report = prefix.complete(model, tokenizer, grid([40], [0, 50]), 3, progress=False)
    assert report.saved == 0 and "longest prompt" in report.no_reuse


def test_sliding_windows_are_read_once_alone_and_the_report_says_why(tokenizer, monkeypatch):
    torch.manual_seed(2)
    config = MistralConfig(vocab_size=1500, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                           max_position_embeddings=2048, initializer_range=0.3, sliding_window=24, eos_token_id=2)  # fmt: skip
    model, prompts, seen = MistralForCausalLM(config).eval(), grid([60, 90], [0, 50, 100]), []
    model.generation_config.eos_token_id = 2
    wanted = [reference(model, tokenizer, p, 5) for p in prompts]
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda **more: (seen.append(more["input_ids"].numel()), plain(**more))[1])
    monkeypatch.setattr(prefix, "_together", lambda *_: pytest.fail("grouped"))
    said, report = prefix.complete(model, tokenizer, prompts, 5, progress=False)
    assert [a.text for a in said] == wanted and len(set(wanted)) >= 3
    assert sum(n for n in seen if n > 1) == sum(map(len, prompts)) == report.computed_tokens  # no prompt is read twice
    assert report.saved == 0 and "sliding windows" in report.no_reuse


@pytest.mark.parametrize(("config", "kind"), [(MambaConfig, MambaForCausalLM), (RwkvConfig, RwkvForCausalLM)])
def test_a_state_is_neither_kept_nor_grouped_and_the_report_says_why(config, kind, tokenizer):
    torch.manual_seed(3)
    model, prompts = kind(config(vocab_size=1500, hidden_size=32, num_hidden_layers=2)).eval(), grid([30, 45], [0, 50, 100])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.25)
    wanted = [reference(model, tokenizer, p, 5) for p in prompts]
    said, report = prefix.complete(model, tokenizer, prompts, 5, progress=False)
    assert [a.text for a in said] == wanted and len(set(wanted)) >= 3
    assert report.saved == 0 and report.computed_tokens == sum(map(len, prompts)) and "recurrent layers" in report.no_reuse


def trie_nodes(prompts):
    return len({tuple(p[: k + 1]) for p in prompts for k in range(len(p))})


def test_the_bound_is_the_size_of_a_trie():
    rng = random.Random(0)
    for _ in range(50):
        prompts = [[rng.randrange(3) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(1, 9))]
        least, factor = prefix.bound(prompts)
        assert least == trie_nodes(prompts) and factor == pytest.approx(sum(map(len, prompts)) / least)
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            prefix.bound(bad)


@pytest.mark.parametrize(("lengths", "depths"), [([4000], 10), ([4000 * k for k in range(1, 11)], 10), ([3000, 5000], 3)])
def test_the_formula_is_the_bound_of_long_grids(lengths, depths):
    depths = np.linspace(0, 100, depths)
    factor = prefix.bound(grid(lengths, depths, needle=1, tail=1))[1]
    assert prefix.expected_factor(lengths, depths) == pytest.approx(factor, rel=0.003)
    n = len(depths)
    assert prefix.expected_factor(lengths, depths) == pytest.approx(2 / (1 + 2 * max(lengths) / (n * sum(lengths))))


def test_the_formulas_numbers_are_those_of_the_modules_head():
    ten = np.linspace(0, 100, 10)
    assert f"{prefix.expected_factor([4000], ten):.2f}" == "1.67" and f"{prefix.expected_factor(range(1000, 11_000, 1000), ten):.2f}" == "1.93"
    assert "1.67 for ten depths" in prefix.__doc__ and "1.93 for ten depths of ten lengths" in " ".join(prefix.__doc__.split())
    deep = range(10, 101, 10)
    assert f"{prefix.expected_factor([4000], deep):.2f}" == "1.82" and f"{prefix.expected_factor(range(1000, 11_000, 1000), deep):.2f}" == "2.14"
    assert "10, 20 ... 100 it is 1.82 and 2.14" in " ".join(prefix.__doc__.split())
    assert prefix.bound(grid([4000], deep, needle=1, tail=1))[1] == pytest.approx(1.82, abs=0.006)
    for lengths, depths in (([], [0]), ([10], []), ([10], [101])):
        with pytest.raises(ValueError, match="0 to 100"):
            prefix.expected_factor(lengths, depths)


def test_a_ten_by_ten_grid_reaches_what_can_be_saved(model, tokenizer):
    prompts = grid(range(60, 660, 60), np.linspace(0, 100, 10), needle=4, tail=4)
    order = list(range(len(prompts)))
    random.Random(3).shuffle(order)
    _, report = prefix.complete(model, tokenizer, [prompts[i] for i in order], 1, progress=False)
    assert 0.95 <= report.reached <= 1 and report.least == trie_nodes(prompts)
    assert report.prompt_tokens / report.computed_tokens > 1.6


def test_bad_arguments(model, tokenizer):
    for more in ({"batch": 0}, {"room": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            prefix.complete(model, tokenizer, [[3]], 1, **more)
    with pytest.raises(ValueError, match="no tokens"):
        prefix.complete(model, tokenizer, [[3], []], 1, progress=False)
    assert prefix.complete(model, tokenizer, [], 1, progress=False)[0] == []
