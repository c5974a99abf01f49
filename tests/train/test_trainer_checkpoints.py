"""What the trainer writes while it runs, and what it takes up again: whole checkpoints of this run alone, finite weights."""

import numpy as np
import pytest
import torch
from small_runs import saving, sizes

from longalign_lib.train import checkpoint
from longalign_lib.train.plan import build_plan
from longalign_lib.train.trainer import LongAlignTrainer


def test_weights_ruined_by_an_endless_gradient_are_no_checkpoint(tiny_model, tmp_path):
    args, data = saving(tmp_path)
    trainer = LongAlignTrainer(tiny_model, args, **data)
    ruin = torch.tensor(float("nan"))
    tiny_model.model.norm.weight.register_hook(lambda g: g * ruin if trainer.state.global_step == 2 else g)  # losses stay finite
    with pytest.raises(FloatingPointError, match=r"step 3: weights are not finite .* checkpoint-3 is not written.*--max_grad_norm"):
        trainer.train()
    assert [f.name for f in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert all(checkpoint.read_mark(f)["step"] == k for k, f in enumerate(checkpoint.checkpoints(tmp_path), 1))


def test_a_step_saved_anew_mixes_with_nothing_that_a_kill_left(tiny_model, tmp_path, capsys):
    args, data = saving(tmp_path)
    left = tmp_path / "checkpoint-2" / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"  # of a rank that is no more
    left.parent.mkdir(parents=True)
    left.write_bytes(b"stale")
    args.save_total_limit = None
    LongAlignTrainer(tiny_model, args, **data).train()
    assert not left.parent.exists() and checkpoint.read_mark(tmp_path / "checkpoint-2")["engine"] == "plain"


def test_resuming_takes_the_newest_whole_checkpoint_of_this_run_alone(tiny_model, tmp_path, capsys):
    import copy

    args, data = saving(tmp_path)
    args.save_total_limit = None
    fresh, other_weights = copy.deepcopy(tiny_model), {"exponent": 0.5}
    whole = LongAlignTrainer(tiny_model, args, **data)
    whole.train()
    last = len(data["plan"].steps())
    (tmp_path / f"checkpoint-{last}" / checkpoint.MARKER).unlink()  # as if the run had been killed while writing it
    (tmp_path / f"checkpoint-{last - 1}" / "longalign.json").unlink()

    def resume(which, more=None, **others):
        trainer = LongAlignTrainer(copy.deepcopy(fresh), args, **data | others, **more or {})
        trainer.train(resume_from_checkpoint=which)
        return trainer

    moved = [(np.roll(x, 1), np.roll(y, 1)) for x, y in data["store"]]
    plans = [build_plan(*sizes(data["store"]), method="packed", capacity=80, packs_per_step=2, seed=s) for s in (1, 7)]
    prints = [checkpoint.plan_fingerprint(p) for p in plans]
    for which in (True, str(tmp_path / "checkpoint-1"), tmp_path / f"checkpoint-{last - 2}"):
        with pytest.raises(ValueError, match=f"belongs to another run: its plan is '{prints[0]}', now it is '{prints[1]}'. Give"):
            resume(which, plan=plans[1])
        with pytest.raises(ValueError, match=r"its loss is 'exponent 1\.0 over the step', now it is 'exponent 0\.5 over the step'"):
            resume(which, other_weights)
        with pytest.raises(ValueError, match="its data is"):
            resume(which, store=moved)
    with pytest.raises(ValueError, match=f"checkpoint-{last} has no longalign.json: its run was stopped .* load them into the model"):
        resume(str(tmp_path / f"checkpoint-{last}"))
    capsys.readouterr()
    resumed = resume(True)
    assert f"checkpoint-{last - 1} is incomplete" in capsys.readouterr().out
    assert [x["loss"] for x in resumed.state.log_history if "loss" in x] == [x["loss"] for x in whole.state.log_history if "loss" in x]
    for folder in checkpoint.checkpoints(tmp_path):
        checkpoint.clear(folder)
    with pytest.raises(ValueError, match="holds no whole checkpoint: leave out resume_from_checkpoint"):
        resume(True)


def test_standard_callbacks_and_checkpoints(tiny_model, tmp_path, capsys):
    """Events come as from Trainer, a checkpoint is what transformers reads, and a progress bar runs over the plan's steps."""
    from transformers import AutoModelForCausalLM, TrainerCallback

    args, data = saving(tmp_path)
    args.disable_tqdm = False
    seen = []

    class Events(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)
            control.should_training_stop = state.global_step == 3  # as early stopping does

        def on_save(self, args, state, control, **kwargs):
            seen.append(f"saved {state.global_step}")

    trainer = LongAlignTrainer(tiny_model, args, callbacks=[Events()], **data)
    trainer.train()
    assert seen == [1, "saved 1", 2, "saved 2", 3, "saved 3"] and trainer.state.max_steps == len(data["plan"].steps())
    assert f"3/{trainer.state.max_steps}" in capsys.readouterr().err
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", dtype=torch.float64)
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file() and not list((tmp_path / "checkpoint-3").glob("*model*.bin"))
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), tiny_model.parameters(), strict=True))
