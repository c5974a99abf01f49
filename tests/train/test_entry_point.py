"""The program that launchers start: one process, two processes with DDP, two with DeepSpeed ZeRO-3 take the same steps."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from longalign_lib.data.tokens import TokenStore
from longalign_lib.train.audit import audit
from longalign_lib.train.plan import Plan


def launch(folder, root, out, processes, *more):
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    words = [*launcher, "longalign_lib.train", "--data", folder / "data", "--model", folder / "model", "--output_dir", folder / out,
             "--capacity", 128, "--packs_per_step", 4, "--epochs", 2, "--learning_rate", 1e-2, "--dtype", "float32", "--seed", 3,
             "--logging_steps", 1, "--save_strategy", "no", "--report_to", "none", "--adam_beta2", 0.95, *more]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(x) for x in (folder / out / "log.jsonl").read_text().splitlines()] if (folder / out).is_dir() else []
    return [x for x in lines if "loss" in x], done.stdout


def test_dry_run_prints_the_audit_and_trains_nothing(run_folder, root):
    log, said = launch(run_folder, root, "dry", 1, "--dry_run")
    facts = json.loads(said.split("plan:", 1)[1].splitlines()[0])
    assert facts["rows"] == 120 and facts["ranks"] == 1 and facts["micro_steps"] == 4 and not log


def dry_run(capsys, *words):
    """`main` in this process, with ``--dry-run``: the plan and the prediction that it prints, read as strict JSON."""
    from longalign_lib.train.__main__ import main

    def strict(name):
        raise AssertionError(f"{name} is no JSON")

    main([str(w) for w in (*words, "--dry-run")])
    return [json.loads(line.partition(": ")[2], parse_constant=strict) for line in capsys.readouterr().out.splitlines()]


def test_dry_run_reads_flags_as_the_run_would(run_folder, root, capsys):
    """An option may stand without its value, last or before another; the estimates then say what they depend on."""
    words = ["--data", run_folder / "data", "--model", run_folder / "model", "--capacity", 128, "--packs_per_step", 4, "--gpus", 2]
    plan, plain = dry_run(capsys, *words)
    assert plan["long_ratio"] is None and plan["ranks"] == 2, "no row is long: a ratio over no rows is null"
    _, recomputed = dry_run(capsys, *words, "--gradient_checkpointing", "--bf16", "--deepspeed", root / "configs" / "zero3_offload.json")
    _, said = dry_run(capsys, *words, "--gradient_checkpointing", "false")
    assert said == plain and recomputed["seconds_a_step"] >= plain["seconds_a_step"]
    from longalign_lib.train.__main__ import training_options

    assert training_options(["--bf16", "--gradient_checkpointing", "--deepspeed", "x"]).gradient_checkpointing is True
    with pytest.raises(ValueError, match="--lerning_rate 3: no such option"):
        dry_run(capsys, *words, "--lerning_rate", 3)


def test_dry_run_of_a_model_whose_sizes_are_not_a_llamas_says_so(run_folder, tmp_path, capsys):
    from transformers import GPT2Config

    GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    plan, predicted = dry_run(capsys, "--data", run_folder / "data", "--model", tmp_path, "--capacity", 128)
    assert plan["rows"] == 120 and predicted["unknown"].startswith("GPT2Config does not tell intermediate_size:")


def test_processes_that_do_not_divide_the_step_are_refused_with_those_that_do(run_folder, monkeypatch, tmp_path):
    from longalign_lib.train.__main__ import main

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"4 packs a step cannot be dealt to 3 ranks; use one of \[1, 2, 4\]"):
        main(["--data", str(run_folder / "data"), "--model", str(run_folder / "model"), "--capacity", "128", "--packs_per_step", "4",
              "--output_dir", str(tmp_path / "none")])  # fmt: skip
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_any_number_of_processes_and_zero3_take_the_same_steps(run_folder, root):
    one, _ = launch(run_folder, root, "one", 1)
    two, _ = launch(run_folder, root, "two", 2)
    zero3, _ = launch(run_folder, root, "zero3", 2, "--deepspeed", "configs/zero3.json")
    assert len(one) >= 4 and one[-1]["loss"] < one[0]["loss"]
    for other in (two, zero3):
        assert [x["loss"] for x in other] == pytest.approx([x["loss"] for x in one], rel=1e-4)
        assert [x["sequences"] for x in other] == [x["sequences"] for x in one]
        assert [x["grad_norm"] for x in other] == pytest.approx([x["grad_norm"] for x in one], rel=1e-3)
    plan = Plan.load(run_folder / "zero3" / "plan.parquet")
    audit(plan, TokenStore.load(run_folder / "data").lengths)
    from transformers import AutoModelForCausalLM

    weights = [AutoModelForCausalLM.from_pretrained(run_folder / name).state_dict() for name in ("one", "zero3")]
    assert all(torch.allclose(weights[0][k].float(), weights[1][k].float(), atol=2e-3) for k in weights[0])


def test_options_that_the_plan_sets_are_refused():
    from longalign_lib.train.__main__ import check_options

    assert check_options(["--seed=3", "--data", "x"]) == ["--seed", "3", "--data", "x"]
    with pytest.raises(ValueError, match="--num_train_epochs cannot be set here: use --epochs"):
        check_options(["--num_train_epochs=3"])
    with pytest.raises(ValueError, match="--ignore_data_skip cannot be set here: a resumed run continues with the samples not yet seen"):
        check_options(["--seed", "3", "--ignore-data-skip", "true"])
    with pytest.raises(ValueError, match="--resume_from_checkpoint cannot be set here: a run goes on by itself"):
        check_options(["--resume_from_checkpoint=OUT/checkpoint-4"])


@pytest.mark.parametrize("words", [["--max_step", "3"], ["--num-train-epoch=3"], ["--capacit", "64"], ["--ignore_data", "true"]])
def test_an_abbreviated_option_is_none(words, run_folder, tmp_path):
    """argparse takes any unique beginning of a name by default, past the check of what the plan sets."""
    from longalign_lib.train.__main__ import main

    with pytest.raises(ValueError, match=f"{words[0].split('=')[0].replace('-', '.')}.*: no such option"):
        main(["--data", str(run_folder / "data"), "--model", str(run_folder / "model"), "--output_dir", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_a_loss_term_that_has_no_part_is_refused_before_anything_is_written(run_folder, tmp_path):
    from longalign_lib.train.__main__ import main

    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.3 has no part"):
        main(["--data", str(run_folder / "data"), "--model", str(run_folder / "model"), "--output_dir", str(tmp_path / "out"),
              "--capacity", "128", "--packs_per_step", "4", "--label_smoothing_factor", "0.3"])  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_row_beyond_the_window_names_both_numbers_and_the_fix(tiny_model):
    from longalign_lib.train.families import check_window
    from longalign_lib.train.plan import build_plan

    plan = build_plan([700, 20], method="packed", capacity=1024, packs_per_step=1)
    with pytest.raises(ValueError, match=r"a row has 700 tokens and the window of this LlamaForCausalLM is 512.*--rope_factor 1.37"):
        check_window(tiny_model, plan)
    check_window(tiny_model, build_plan([512], method="packed", capacity=1024, packs_per_step=1))


def test_checkpoints_of_another_run_are_not_resumed(tmp_path):
    from longalign_lib.train.run import check_same_run

    check_same_run(tmp_path, {"seed": 1})
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "run_settings.json").write_text('{"seed": 1}')
    check_same_run(tmp_path, {"seed": 1})
    with pytest.raises(ValueError, match=r"another run \(seed: 1 there, 2 now\)"):
        check_same_run(tmp_path, {"seed": 2})


def test_rows_that_lose_every_target_are_left_out_with_a_reason():
    from longalign_lib.train.__main__ import RecipeArguments, plan_for

    lengths = [40, 10, 40]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    mask = np.zeros(90, dtype=bool)
    mask[[38, 39, 48, 60]] = True  # row 0: only the last two tokens; row 1: one; row 2: an early one
    store = TokenStore(np.ones(90, np.int32), mask, starts, [{}, {}, {}])
    plan, fates = plan_for(RecipeArguments(data="", capacity=32, packs_per_step=1, epochs=1), store, 0)
    assert dict(zip(plan.table.row, plan.table.length)) == {1: 10, 2: 32}
    assert fates[["row", "fate", "tokens_lost"]].to_numpy().tolist() == [[0, "truncated", 8], [0, "no target", 32], [2, "truncated", 8]]
    assert audit(plan, lengths, fates)["tokens_lost"] == 48
