"""Chunked cross entropy against F.cross_entropy on all logits and against transformers' own logits and loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longalign_lib.train.chunked import IGNORE, _learn, chunk_rows, chunked_cross_entropy, head_losses, why_not
from longalign_lib.train.loss import target_losses

V = 97
SMALL = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip


def plain(hidden, weight, labels, bias=None, softcap=None, logit_scale=1.0):
    logits = F.linear(hidden, weight, bias) * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none", ignore_index=IGNORE)


def problem(n=11, d=5, v=13, seed=0, dtype=torch.float64, size=1.0):
    make = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=make, dtype=torch.float64) * size for shape in ((n, d), (v, d), (v,))]
    labels = torch.where(torch.rand(n, generator=make) < 0.2, IGNORE, torch.randint(v, (n,), generator=make))
    return [x.to(dtype).requires_grad_() for x in tensors], labels, torch.randn(n, generator=make, dtype=torch.float64)


def apart(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


class Watch(TorchDispatchMode):
    """The rows of every tensor as wide as the vocabulary that any operation gives, and the names of all operations."""

    def __init__(self, v):
        super().__init__()
        self.v, self.rows, self.names = v, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        wide = [x for x in tree_leaves(out) if torch.is_tensor(x) and x.shape[-1:] == (self.v,)]
        self.rows += [x.numel() // self.v for x in wide if "aten.t." not in str(func)]  # the weight's transpose is no logits
        return out


@given(st.integers(1, 20), st.integers(1, 25), st.sampled_from([(0, 1), (0,), (1,), (2,), (0, 1, 2), ()]),
       st.sampled_from([None, 0.7, 30.0]), st.sampled_from([1.0, 0.3, -2.0]), st.integers(0, 10**6))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_loss_and_wanted_gradients_equal_those_of_all_logits(n, chunk, wanted, softcap, scale, seed):
    leaves, labels, weights = problem(n, seed=seed)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    options = {"bias": leaves[2] if wanted != (0, 1) else None, "softcap": softcap, "logit_scale": scale}
    mine, whole = chunked_cross_entropy(*leaves[:2], labels, chunk=chunk, **options), plain(*leaves[:2], labels, **options)
    assert mine.dtype == torch.float64 and torch.allclose(mine, whole, rtol=1e-12, atol=1e-12)
    assert (mine[labels == IGNORE] == 0).all() and mine.requires_grad == bool(wanted)
    grads = [torch.autograd.grad((x * weights).sum(), [leaves[i] for i in wanted]) if wanted else () for x in (mine, whole)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12 * (1 + b.abs().max().item()))


def test_backward_may_run_twice_and_second_derivatives_are_refused():
    leaves, labels, weights = problem()
    losses = chunked_cross_entropy(*leaves[:2], labels, chunk=4) * weights.requires_grad_()
    once, again = (torch.autograd.grad(losses.sum(), leaves[1], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again) and once.any()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(losses.sum(), leaves[0], create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_err_no_more_than_the_plain_loss_does(autocast, softcap):
    leaves, labels, weights = problem(300, 64, 500, dtype=torch.bfloat16, size=0.5)
    doubles = [x.detach().double().requires_grad_() for x in leaves[:2]]
    exact = plain(*doubles, labels, softcap=softcap)
    leaves = [leaves[0], leaves[1].detach().float().requires_grad_() if autocast else leaves[1]]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, usual = chunked_cross_entropy(*leaves, labels, softcap=softcap, chunk=77), plain(*leaves, labels, softcap=softcap)
        assert torch.allclose(chunked_cross_entropy(*doubles, labels, softcap=softcap), exact, rtol=1e-12)  # stays float64
    assert mine.dtype == torch.float32 and apart(mine, exact) <= 1.1 * apart(usual, exact) < 0.01
    three = [torch.autograd.grad((x * weights).sum(), y) for x, y in ((mine, leaves), (usual, leaves), (exact, doubles))]
    for a, b, truth in zip(*three, strict=True):
        assert a.dtype == b.dtype and apart(a, truth) <= 1.25 * apart(b, truth) < 0.02


def test_a_target_that_is_nearly_sure_keeps_its_gradient_in_16_bits():
    """p = 0.9995 rounds to 1 in bfloat16: p - 1 taken after rounding would be zero."""
    weight, label = torch.tensor([[8.25, 0], [0, 0], [0, 0]], dtype=torch.bfloat16), torch.tensor([0])
    hidden, exact = (torch.tensor([[1.0, 0.0]], dtype=x, requires_grad=True) for x in (torch.bfloat16, torch.float64))
    (mine,) = torch.autograd.grad(chunked_cross_entropy(hidden, weight, label), hidden)
    (truth,) = torch.autograd.grad(plain(exact, weight.double(), label), exact)
    assert truth[0, 0].abs() > 1e-3 and apart(mine, truth) < 0.01


def test_no_more_than_a_chunk_of_logits_exists_and_nothing_waits_for_the_device():
    leaves, labels, weights = problem(50, 5, 13)
    for way, most in ((lambda: chunked_cross_entropy(*leaves[:2], labels, chunk=8), 8), (lambda: plain(*leaves[:2], labels), 50)):
        kept = []
        with Watch(13) as watch, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # noqa: B023
            losses, seen = way(), len(watch.rows)
            torch.autograd.grad((losses * weights).sum(), leaves[:2])
        assert max(watch.rows) == most and len(watch.rows) > seen >= 1, "logits were watched in both directions"
        assert max(kept) == (50 * 13 if most == 50 else 50 * 5)
        assert not [x for x in watch.names if "_local_scalar_dense" in x or "nonzero" in x]


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_ND": torch.zeros(3, 4)}, r"hidden \(3, 4\) and weight \(7, 5\)"),
    ({"labels_N": torch.zeros(2, dtype=torch.int64)}, r"labels \(2,\) torch.int64 must be int64\[3\]"),
    ({"bias": torch.zeros(5)}, r"bias \(5,\) must be \[7\]"),
    ({"softcap": 0.0}, "softcap 0.0 must be positive"),
    ({"chunk": 0}, "chunk 0 at least 1"),
    ({"weight_VD": torch.zeros(7, 5, dtype=torch.bfloat16)}, "hidden is torch.float32 and weight torch.bfloat16"),
])  # fmt: skip
def test_bad_input_is_named(change, message):
    good = {"hidden_ND": torch.zeros(3, 5), "weight_VD": torch.zeros(7, 5), "labels_N": torch.zeros(3, dtype=torch.int64)}
    assert chunked_cross_entropy(**good).tolist() == pytest.approx([torch.tensor(7.0).log().item()] * 3)
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**{**good, **change})
    assert chunk_rows(49152) * 49152 * 4 <= 2**28 < (chunk_rows(49152) + 1) * 49152 * 4 and chunk_rows(10**9) == 1
    with pytest.raises(ValueError, match="chunk_bytes 0"):
        chunk_rows(10, chunk_bytes=0)
    for odd in (-1, 7):  # as in torch, and never taken for another token
        with pytest.raises(RuntimeError, match="out of bounds"):
            chunked_cross_entropy(**{**good, "labels_N": torch.tensor([1, odd, IGNORE])})


FAMILIES = {
    "Llama": {}, "Qwen2": {"tie_word_embeddings": True}, "Qwen3": {"head_dim": 8}, "Mistral": {}, "Phi": {}, "Phi3": {}, "GPTNeoX": {},
    "Olmo2": {}, "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0}, "Cohere": {"logit_scale": 0.3}, "Starcoder2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "Granite": {"logits_scaling": 3.0}, "Falcon": {}, "Bloom": {},
}  # fmt: skip
MATH = {"Gemma2": {"softcap": 3.0}, "Cohere": {"logit_scale": 0.3}, "Granite": {"logit_scale": 1 / 3}}


def family(name, dtype=torch.float64, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **FAMILIES[name], **more})
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()


def batch_of(rows=2, length=14, seed=1):
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, length), generator=make)
    labels = torch.where(torch.rand(rows, length, generator=make) < 0.6, ids, IGNORE)
    labels[:, 0] = IGNORE
    return {"input_ids": ids, "labels": labels}


def stock(model, batch):
    row, position = torch.nonzero(batch["labels"] != IGNORE, as_tuple=True)
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[row, position - 1]
    return F.cross_entropy(logits, batch["labels"][row, position], reduction="none")


def flat_gradient(model, losses):
    model.zero_grad()
    (losses * torch.linspace(0.5, 2, len(losses))).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_models_give_the_losses_of_their_own_logits(name):
    model, batch = family(name), batch_of()
    head = model.get_output_embeddings()
    torch.nn.init.normal_(torch.zeros(1) if head.bias is None else head.bias)
    assert why_not(model) is None and _learn(model) == pytest.approx(MATH.get(name, {"logit_scale": 1.0}))
    before = {**vars(model)}, {**vars(head)}
    with Watch(V) as watch:
        mine = flat_gradient(model, losses := target_losses(model, batch, chunk_bytes=3 * V * 8, dtype=None)[0])
    assert max(watch.rows) == 3 and before == (vars(model), vars(head)), "chunks of 3 rows, and the model is as it was"
    whole = stock(model, batch)
    assert losses.dtype == torch.float64 and len(losses) == len(whole) > 10 and torch.allclose(losses, whole, rtol=1e-12)
    assert apart(mine, flat_gradient(model, whole)) < 1e-12
    assert losses.mean().item() == pytest.approx(model(**batch, use_cache=False).loss.item(), rel=1e-6)  # transformers' own


def test_a_cap_changed_between_two_calls_is_noticed():
    model, batch = family("Gemma2"), batch_of()
    for cap in (3.0, None, 5.0):
        model.config.final_logit_softcapping = cap
        assert torch.allclose(target_losses(model, batch, dtype=None)[0], stock(model, batch), rtol=1e-12), cap


def test_gradient_checkpointing_autocast_and_compiled_layers():
    batch, model = batch_of(), family("Llama", torch.float32).train()
    whole = flat_gradient(model, stock(model, batch))
    with torch.autocast("cpu", torch.bfloat16):
        losses = target_losses(model, batch, chunk_bytes=4000)[0]
    assert losses.dtype == torch.float32 and apart(flat_gradient(model, losses), whole) < 0.05
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert why_not(model) is None and apart(flat_gradient(model, target_losses(model, batch)[0]), whole) < 1e-6
    model = family("Llama", torch.float32).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # the older name before 5.2x
    assert apart(flat_gradient(model, target_losses(model, batch, chunk_bytes=4000)[0]), whole) < 1e-6


Gain = type("Gain", (torch.nn.Linear,), {"forward": lambda self, x: torch.nn.Linear.forward(self, x) * 2})


def forwarding(change):
    methods = {"forward": lambda self, *a, **k: change(lambda: transformers.LlamaForCausalLM.forward(self, *a, **k))}
    return lambda model: setattr(model, "__class__", type("Odd", (type(model),), methods))


@pytest.mark.parametrize(("break_it", "reason"), [
    (lambda m: setattr(m, "lm_head", Gain(32, V, dtype=torch.float64)), "its head is Gain"),
    (lambda m: setattr(m.lm_head, "forward", lambda x: x @ m.lm_head.weight.t()), "forward of its own"),
    (lambda m: m.compile(backend="eager"), "compiled as a whole"),
    (forwarding(lambda run: type(out := run())(logits=out.logits * out.logits.abs())), "more to its head's output"),
    (forwarding(lambda run: (run(), run())[1]), "calls its head 2 times"),
    (forwarding(lambda run: [run().logits]), "cannot be followed .*AttributeError"),
])  # fmt: skip
def test_other_heads_keep_the_stock_path_and_say_why(tiny_model, break_it, reason):
    break_it(tiny_model)
    with pytest.raises(ValueError, match=reason):
        head_losses(tiny_model, {}, None, None, None)
    if "cannot" not in reason:
        assert torch.allclose(target_losses(tiny_model, batch_of(), dtype=None)[0], stock(tiny_model, batch_of()), rtol=1e-12)


def test_a_failing_forward_leaves_the_model_as_it_was(tiny_model):
    with pytest.raises(IndexError):
        head_losses(tiny_model, {"input_ids": torch.tensor([[5, V + 5]])}, *(torch.zeros(1, dtype=torch.int64) for _ in range(3)))
    assert "forward" not in vars(tiny_model.lm_head) and not tiny_model._forward_hooks and not tiny_model.lm_head._forward_hooks
    tiny_model.lm_head = Gain(32, V)  # another head is learnt anew
    assert "Gain" in why_not(tiny_model)


Z3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
WAYS = {"ddp": {}, "zero2": {"stage": 2}, "zero3": Z3, "zero3 offload": Z3 | {"offload_param": {"device": "cpu"}}}


@pytest.mark.slow
def test_two_processes_under_ddp_and_zero_take_the_steps_of_one(root, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{root}"}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, tmp_path / "seen.json"]
    done = subprocess.run([str(x) for x in words], capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert [(x["tied"], x["way"]) for x in seen] == [(t, w) for t in (True, False) for w in WAYS]
    for case in seen:
        assert case["losses"] == pytest.approx(case["one"], rel=1e-6) and len(case["losses"]) == 3, case
        assert case["furthest"] < 1e-6 < 1e-2 < case["moved"], case
        let_go = case["head_outside"][:1] + case["head_outside"][1::2]  # before the first backward, after each one
        assert let_go == [0] * 4 or "3" not in case["way"], case


def worker(out):
    """One of two processes: every case after the other, held against one process and the stock loss, by plain SGD."""
    import deepspeed
    import torch.distributed as dist

    from longalign_lib.train.__main__ import _deepspeed_without_compiler
    from longalign_lib.train.run import leave

    _deepspeed_without_compiler()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    seen, rank = [], int(os.environ["RANK"])
    for tied, way in [(t, w) for t in (True, False) for w in ("one", *WAYS)]:
        model = family("Llama", torch.float32, tie_word_embeddings=tied).train()
        engine, sgd, losses, sizes = model, torch.optim.SGD(model.parameters(), lr=1.0), [], []
        start = {k: v.clone() for k, v in model.state_dict().items()}
        if way == "ddp":
            engine = torch.nn.parallel.DistributedDataParallel(model)
        elif way != "one":
            config = {"zero_optimization": WAYS[way], "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
            engine, *_ = deepspeed.initialize(model=model, optimizer=sgd, config=config)
        for packs in [[batch_of(1, 40, seed), batch_of(1, 40, seed + 1)] for seed in (0, 2, 4)]:
            mine = stock if way == "one" else lambda *a: 2 * target_losses(*a, chunk_bytes=5 * V * 4)[0]
            loss = sum(mine(engine, pack).sum() for pack in (packs if way == "one" else packs[rank : rank + 1])) / 100
            before = model.lm_head.weight.numel()
            engine.backward(loss) if "zero" in way else loss.backward()
            sizes += [before, model.lm_head.weight.numel()]
            engine.step() if "zero" in way else (sgd.step(), sgd.zero_grad())
            losses.append(loss.detach())
        if way == "one":
            one, alone = losses, model.state_dict()
            continue
        [dist.all_reduce(x) for x in losses]
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled="3" in way):
            off = [max((v - other[k]).abs().max().item() for k, v in model.named_parameters()) for other in (alone, start)]
        seen.append({"tied": tied, "way": way, "losses": [x.item() / 2 for x in losses], "one": [x.item() for x in one],
                     "furthest": off[0], "moved": off[1], "head_outside": sizes})  # fmt: skip
    if rank == 0:
        Path(out).write_text(json.dumps(seen), encoding="utf8")
    leave()


if __name__ == "__main__":
    worker(sys.argv[1])
