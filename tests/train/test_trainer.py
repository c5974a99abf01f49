"""The trainer against a loop written out here, and the same gradients however a step is dealt."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import arguments, make_store, saving, sizes

from longalign_lib.train.heldout import held_out_loss, means
from longalign_lib.train.loss import IGNORE
from longalign_lib.train.plan import build_plan, micro_steps
from longalign_lib.train.trainer import LongAlignTrainer, RankPacks, step_facts
from longalign_lib.train.weights import plan_weights


def reference_steps(model, store, plan, lr):
    """Plain SGD on Eq. 2, one document at a time, with transformers' own logits."""
    losses = []
    for _, step in plan.table.groupby("step"):
        model.zero_grad()
        total = 0.0
        rows = [r for r in step.row if (store[r][1][1:] != IGNORE).any()]
        for r in rows:
            ids, labels = (torch.tensor(x)[None] for x in store[r])
            logits = model(input_ids=ids).logits[0, :-1].float()
            loss = F.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE) / len(rows)
            loss.backward()
            total += loss.item()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
        losses.append(total)
    return losses


@pytest.mark.parametrize("method", ["naive", "sorted", "packed", "balanced"])
def test_training_equals_plain_sgd_on_equation_2(method, tiny_model, tmp_path, capsys):
    import copy

    store = make_store()
    lengths, targets = sizes(store)
    plan = build_plan(lengths, targets, method=method, capacity=80, packs_per_step=4, seed=1,
                      rows_per_pack=2 if method in ("naive", "sorted") else 1)  # fmt: skip
    other = copy.deepcopy(tiny_model)
    expected = reference_steps(other, store, plan, 1e-2)
    trainer = LongAlignTrainer(tiny_model, arguments(tmp_path, 4), store=store, plan=plan)
    trainer.train()
    logged = [x for x in trainer.state.log_history if "loss" in x]
    assert [x["loss"] for x in logged] == pytest.approx(expected, rel=1e-5) and len(logged) == len(plan.steps()) >= 2
    assert [x["loss_sequence_mean"] for x in logged] == pytest.approx(expected, rel=1e-5)
    assert [x["sequences"] for x in logged] == plan.steps().sequences.tolist()
    for mine, theirs in zip(tiny_model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-8)
    capsys.readouterr()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_see_the_step_once_and_weigh_it_alike(world):
    store = make_store()
    lengths, targets = sizes(store)
    plan = build_plan(lengths, targets, method="balanced", capacity=80, packs_per_step=4, max_ranks=4, seed=1)
    ranks = [RankPacks(plan, store, r, world) for r in range(world)]
    assert {len(r) for r in ranks} == {len(plan.steps()) * micro_steps(plan, world)}
    weight = 0.0
    tokens = 0
    for rank in ranks:
        for i in range(len(rank)):
            batch = rank[i]
            weight += batch["loss_weights"].double().sum().item()
            tokens += int((batch["labels"] != IGNORE).sum())
    assert tokens == targets.sum()
    assert weight == pytest.approx(len(plan.steps()), rel=1e-5)  # every step's weights sum to one


def test_every_weight_mode_reaches_the_plan():
    store = make_store()
    lengths, targets = sizes(store)
    plan = build_plan(lengths, targets, method="packed", capacity=80, packs_per_step=4)
    modes = [plan_weights(plan, p) for p in (0, 0.5, 1, None)] + [plan_weights(plan, 1, "epoch")]
    assert all(not np.allclose(a, b) for i, a in enumerate(modes) for b in modes[:i])


def test_wrong_accumulation_is_refused_with_the_right_number(tiny_model, tmp_path):
    store = make_store()
    lengths, targets = sizes(store)
    plan = build_plan(lengths, targets, method="packed", capacity=80, packs_per_step=4)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4"):
        LongAlignTrainer(tiny_model, arguments(tmp_path, 2), store=store, plan=plan)
    with pytest.raises(ValueError, match="num_train_epochs=1"):
        args = arguments(tmp_path, 4)
        args.num_train_epochs = 3
        LongAlignTrainer(tiny_model, args, store=store, plan=plan)


@pytest.mark.parametrize("more, said", [
    ({"max_steps": 5}, "max_steps=5 would go through the 4 steps of this plan more than once"),
    ({"ignore_data_skip": True}, "ignore_data_skip=True would begin a resumed run at the plan's first step"),
    ({"label_smoothing_factor": 0.3}, "label_smoothing_factor=0.3 has no part in"),
])  # fmt: skip
def test_arguments_against_the_plan_or_its_loss_are_refused(more, said, tiny_model, tmp_path):
    store = make_store()
    plan = build_plan(*sizes(store), method="packed", capacity=80, packs_per_step=2)
    assert len(plan.steps()) == 4
    with pytest.raises(ValueError, match=said):
        LongAlignTrainer(tiny_model, arguments(tmp_path, 2, **more), store=store, plan=plan)


def test_fewer_steps_than_the_plan_has_may_be_asked_for(tiny_model, tmp_path, capsys):
    args, data = saving(tmp_path, max_steps=2)
    trainer = LongAlignTrainer(tiny_model, args, **data)
    trainer.train()
    logged = [x for x in trainer.state.log_history if "loss" in x]
    assert [x["sequences"] for x in logged] == data["plan"].steps().sequences.tolist()[:2]


def test_losses_that_would_be_left_out_are_refused(tiny_model, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    store = make_store()
    plan = build_plan(*sizes(store), method="packed", capacity=80, packs_per_step=4)
    config = MixtralConfig(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1, num_local_experts=2, output_router_logits=True, router_aux_loss_coef=0.5)  # fmt: skip
    mixtral, data = MixtralForCausalLM(config), {"store": store, "plan": plan}
    with pytest.raises(ValueError, match=r"MixtralConfig has output_router_logits=True.*router_aux_loss_coef 0\.5.*set output_router_logits to False"):
        LongAlignTrainer(mixtral, arguments(tmp_path, 4), **data)
    for off in ({"router_aux_loss_coef": 0.0}, {"output_router_logits": False, "router_aux_loss_coef": 0.5}):
        for name, value in off.items():
            setattr(mixtral.config, name, value)
        LongAlignTrainer(mixtral, arguments(tmp_path, 4), **data)  # nothing is left out: the share is 0, or the loss is off
    with pytest.raises(ValueError, match="compute_loss_func would not be called"):
        LongAlignTrainer(tiny_model, arguments(tmp_path, 4), compute_loss_func=lambda *x, **y: 0.0, **data)


@pytest.mark.parametrize("pad", [-1, 97, None])
def test_a_padding_token_without_an_embedding_fills_nothing(pad, tiny_model, tmp_path, capsys):
    """Padded rows, and the empty pack of a short last step, take token 0 then; no digit of the losses depends on it."""
    store, losses = make_store(7), {}
    for method, accumulation, more in (("naive", 1, {"rows_per_pack": 3, "capacity": 120}), ("packed", 2, {"capacity": 60})):
        plan = build_plan(*sizes(store), method=method, packs_per_step=accumulation, **more)
        for token in (5, pad):
            tiny_model.config.pad_token_id = token
            trainer = LongAlignTrainer(tiny_model, arguments(tmp_path, accumulation), store=store, plan=plan)
            trainer.args.learning_rate = 0.0
            assert trainer.rank_packs.pad_id == (token if token == 5 else 0)
            trainer.train()
            losses[method, token] = [x["loss"] for x in trainer.state.log_history if "loss" in x]
        assert method == "naive" or -1 in [trainer.rank_packs[k]["pack"] for k in range(len(trainer.rank_packs))]
        assert losses[method, pad] == pytest.approx(losses[method, 5], rel=1e-12)


def test_the_files_of_a_plan_by_shards_train_as_the_whole_does(tiny_model, tmp_path, capsys):
    """A later file's steps count from its first: no empty step, in which AdamW's decay would move the weights."""
    import copy
    from dataclasses import replace

    import pandas as pd

    from longalign_lib.train.shards import build_shards, iter_shards

    store = make_store()
    lengths, targets = sizes(store)
    build_shards([(lengths[k : k + 8], targets[k : k + 8]) for k in (0, 8, 16)], tmp_path / "shards", capacity=80, packs_per_step=2, seed=0)
    plans = list(iter_shards(tmp_path / "shards"))
    assert len(plans) == 3 and plans[-1].table.step.min() >= 2
    whole = replace(plans[0], table=pd.concat([p.table for p in plans], ignore_index=True))
    runs = []
    for parts in ([whole], plans):
        model, handed, logged = copy.deepcopy(tiny_model), (None, None), []
        for plan in parts:
            args = arguments(tmp_path / "run", 2, weight_decay=0.1)
            args.optim = "adamw_torch"
            trainer = LongAlignTrainer(model, args, store=store, plan=plan, optimizers=handed)
            trainer.train()
            handed = trainer.optimizer, trainer.lr_scheduler
            logged += [(x["sequences"], x["fill"], x["loss"]) for x in trainer.state.log_history if "loss" in x]
            assert [x for x, _, _ in logged[-len(plan.steps()) :]] == plan.steps().sequences.tolist()
        runs.append((np.array(logged), torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert np.allclose(runs[0][0], runs[1][0], rtol=1e-12) and torch.allclose(runs[0][1], runs[1][1], rtol=0, atol=1e-12)
    facts = [step_facts(p, 2, tiny_model.config) for p in plans]
    for name, value in step_facts(whole, 2, tiny_model.config).items():
        assert np.concatenate([f[name] for f in facts]) == pytest.approx(value)


def test_held_out_loss_against_transformers(tiny_model):
    store = [*make_store(5), (np.array([5, 6]), np.array([IGNORE, IGNORE]))]
    table = held_out_loss(tiny_model, store)
    assert table.row.tolist() == [0, 1, 2, 3, 4], "the row without a target has no loss"
    for row, loss in zip(table.row, table.loss, strict=True):
        ids, labels = (torch.tensor(x)[None] for x in store[row])
        assert loss == pytest.approx(tiny_model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)
    m = means(table)
    assert m["sequence_mean"] == pytest.approx(table.loss.mean()) and m["sequences"] == 5
    with pytest.raises(ValueError, match="no held-out row"):
        means(table.iloc[:0])


def test_models_that_mix_documents_elsewhere_are_refused(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    store = make_store()
    lengths, targets = sizes(store)
    plan = build_plan(lengths, targets, method="packed", capacity=80, packs_per_step=4)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="Bloom"):
        LongAlignTrainer(bloom, arguments(tmp_path, 4), store=store, plan=plan)


def test_deepspeed_does_not_round_the_weights(tiny_model, tmp_path, monkeypatch):
    """Trainer casts floating inputs to DeepSpeed's type; 1 / 3 in bfloat16 is off by a thousandth."""
    store = make_store()
    lengths, targets = sizes(store)
    plan = build_plan(lengths, targets, method="packed", capacity=80, packs_per_step=4)
    trainer = LongAlignTrainer(tiny_model, arguments(tmp_path, 4), store=store, plan=plan)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    batch = trainer._prepare_inputs(dict(trainer.rank_packs[0]))
    assert batch["loss_weights"].dtype == torch.float64 == batch["inverse_targets"].dtype


def test_facts_of_a_step_against_a_loop(tiny_model):
    """Tokens without padding, room, FLOPs by the formula 6 W tokens + attention, and the waiting of two ranks."""
    store = make_store()
    lengths, targets = sizes(store)
    c = tiny_model.config
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 97
    for method in ("naive", "packed"):
        plan = build_plan(lengths, targets, method=method, capacity=80, packs_per_step=4, rows_per_pack=2, seed=1)
        facts = step_facts(plan, 2, c, balance=False)
        assert facts["tokens"].sum() == lengths.sum()
        for step, lines in plan.table.groupby("step"):
            flops, room = [], 0
            for _, pack in lines.groupby("pack", sort=True):
                widths = [pack.length.max()] * len(pack) if plan.padded else pack.length
                room += sum(widths) if plan.padded else 80
                flops.append(sum(6 * weights * n + 6 * 2 * 32 * n * n for n in widths))
            worst = sum(max(flops[k : k + 2]) for k in range(0, len(flops), 2))
            assert facts["room"][step] == room and facts["tokens"][step] == lines.length.sum()
            assert facts["flops"][step] == pytest.approx(sum(flops)) and facts["worst_flops"][step] == pytest.approx(2 * worst)


def test_logs_say_how_full_and_how_fast(tiny_model, tmp_path):
    store = make_store()
    lengths, targets = sizes(store)
    plan = build_plan(lengths, targets, method="packed", capacity=80, packs_per_step=4, seed=1)
    trainer = LongAlignTrainer(tiny_model, arguments(tmp_path, 4), store=store, plan=plan)
    trainer.train()
    logged = [x for x in trainer.state.log_history if "loss" in x]
    fills = plan.packs().groupby("step").tokens.agg(["sum", "size"]).eval("sum / (size * 80)")
    assert [x["fill"] for x in logged] == pytest.approx(fills.tolist()) and len(logged) >= 2
    assert all(x["idle_estimated"] == 0 and x["tflops_per_device"] >= 0 and "mfu" not in x for x in logged)


def test_gradient_checkpointing_and_bfloat16_change_rounding_alone(tiny_model, tmp_path, capsys):
    import copy

    store, runs = make_store(), {}
    plan = build_plan(*sizes(store), method="balanced", capacity=80, packs_per_step=4, seed=1)
    for name, dtype, more in (("plain", torch.float64, {}), ("recomputed", torch.float64, {"gradient_checkpointing": True}),
                              ("bf16", torch.float32, {"bf16": True, "gradient_checkpointing": True})):  # fmt: skip
        model, passes = copy.deepcopy(tiny_model).to(dtype), []
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, i, o, passes=passes: passes.append(o.dtype))
        trainer = LongAlignTrainer(model, arguments(tmp_path, 4, **more), store=store, plan=plan)
        trainer.train()
        weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        runs[name] = len(passes), set(passes), [x["loss"] for x in trainer.state.log_history if "loss" in x], weights
    assert runs["recomputed"][0] == runs["bf16"][0] == 2 * runs["plain"][0] > 0, "every layer runs once more in the backward pass"
    assert runs["recomputed"][2] == pytest.approx(runs["plain"][2], rel=1e-12)
    assert torch.allclose(runs["recomputed"][3], runs["plain"][3], rtol=0, atol=1e-12)
    assert runs["bf16"][1] == {torch.bfloat16} and runs["bf16"][2] != runs["plain"][2]
    assert runs["bf16"][2] == pytest.approx(runs["plain"][2], rel=0.01)


def test_a_document_beyond_the_window_is_refused_and_a_longer_pack_is_not(tiny_model, tmp_path):
    args = arguments(tmp_path, 1)
    for lengths, fits in (([513, 20], False), ([512, 300, 200], True)):
        store = [(np.full(n, 5), np.full(n, 5)) for n in lengths]
        plan = build_plan(lengths, method="packed", capacity=1024, packs_per_step=1)
        assert plan.packs().tokens.max() > 512
        if fits:
            LongAlignTrainer(tiny_model, args, store=store, plan=plan)
        else:
            with pytest.raises(ValueError, match="a row has 513 tokens and the window of this LlamaForCausalLM is 512"):
                LongAlignTrainer(tiny_model, args, store=store, plan=plan)


@pytest.mark.parametrize("method", ["packed", "naive"])
def test_a_loss_that_is_not_finite_stops_before_the_optimiser_and_names_the_rows(method, tiny_model, tmp_path):
    store = make_store()
    lengths, targets = sizes(store)
    poison = 96  # a token that occurs in two rows only
    store = [(np.where(x == poison, 3, x), y) for x, y in store]
    for row in (5, 11):
        store[row][0][1] = poison
        store[row][1][2:] = store[row][0][2:]
    store = [(x, np.where(y == IGNORE, IGNORE, x)) for x, y in store]
    lengths, targets = sizes(store)
    plan = build_plan(lengths, targets, method=method, capacity=80, packs_per_step=32, rows_per_pack=2 if method == "naive" else 1)
    assert len(plan.steps()) == 1
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight[poison] = float("nan")
        tiny_model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 32, dtype=torch.float64))  # untied: logits stay finite
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    trainer = LongAlignTrainer(tiny_model, arguments(tmp_path, 32), store=store, plan=plan)
    with pytest.raises(FloatingPointError, match=r"step 0: the loss of 2 row\(s\) is not finite: 5, 11\. Nothing of this step"):
        trainer.train()
    after = tiny_model.state_dict()
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)


def test_one_process_that_sees_two_gpus_takes_one_and_says_how_to_use_both(tmp_path, tiny_model):
    store = make_store(8)
    plan = build_plan(*sizes(store), capacity=64, packs_per_step=2, method="packed", seed=0)
    args = arguments(tmp_path, micro_steps(plan, 1))
    assert args.n_gpu <= 1  # devices are looked for once, here
    args._n_gpu = 2
    with pytest.warns(UserWarning, match="--nproc_per_node 2"):
        trainer = LongAlignTrainer(tiny_model, args, store=store, plan=plan)
    assert trainer.args.n_gpu == 1 and np.isfinite(trainer.train().training_loss)
