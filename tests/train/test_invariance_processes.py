"""The real trainer's gradient on 1, 2 and 4 processes, DDP and DeepSpeed: one launch a world size runs all cases."""

import json
import os
import subprocess
import sys

import invariance_worker as worker
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from longalign_lib.train.cutting import n_targets
from longalign_lib.train.invariance import reference_gradient, tiny_llama
from longalign_lib.train.wrong_ways import wanted_weights


def flat(tensors):
    return torch.cat([tensors[n].double().flatten() for n in sorted(tensors)])


def launch(folder, root, processes, *kinds):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
             str(root / "tests/train/invariance_worker.py"), str(folder), *kinds]  # fmt: skip
    path = os.pathsep.join(x for x in (str(root), os.environ.get("PYTHONPATH")) if x)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=root, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads((folder / "cases.json").read_text())
    parts = {"gradient": {}, "weights": {}, "seen": {}}
    for case, facts in cases.items():
        for name, tensor in load_file(folder / facts["file"]).items():
            part, _, name = name.partition("/")
            parts[part].setdefault(case, {})[name] = tensor
    return cases, parts


def check(cases, parts, select, dtype, tolerance):
    """Gradients, updated weights, norms and loss weights of the selected cases against plain torch on one document at a time."""
    model, sequences = tiny_llama(dtype=dtype), worker.batch()
    before = {n: p.detach() for n, p in model.named_parameters()}
    reference = reference_gradient(tiny_llama(), sequences)
    size = float(flat(reference).norm())
    wanted = np.unique([0.0, *wanted_weights([n_targets(s) for s in sequences])])
    chosen = [c for c in cases if select(c)]
    for case in chosen:
        facts, short = cases[case], case.endswith("bf16")
        allowed = 0.05 if short else tolerance
        assert facts["norm"] == pytest.approx(size, rel=allowed), case
        seen = parts["seen"][case][""].numpy()  # of this rank's packs
        assert len(seen) > 1 and np.abs(seen[:, None] - wanted).min(1).max() < 1e-12, f"{case}: loss weights were rounded"
        if short:
            continue
        due = flat(reference) * min(1, facts["clip"] / size if facts["clip"] else 1)
        step = flat(before) - flat(parts["weights"][case])
        assert float((step - due).norm() / due.norm()) <= tolerance, f"{case}: the update"
        if not facts["clip"]:
            assert float((flat(parts["gradient"][case]) - flat(reference)).norm()) <= tolerance * size, f"{case}: the gradient"
    return chosen


def check_helper(folder, processes):
    said = json.loads((folder / "helper.json").read_text())
    assert max(said["right"]["error"]) <= 1e-12 and set(said["right"]["ranks"]) == {processes} and len(said["right"]["error"]) >= 2
    if processes > 1:
        assert min(said["wrong"]["error"]) == pytest.approx(1 - 1 / processes)
        assert said["wrong"]["causes"][0].endswith("divided by the number of ranks (averaged over them twice)")


def test_two_processes_under_ddp(tmp_path, root):
    cases, parts = launch(tmp_path, root, 2, "ddp_short")
    assert len(check(cases, parts, lambda c: c != "clip", torch.float64, 1e-12)) == 3
    # clipping divides by norm + 1e-6, which moves the update by a millionth
    assert check(cases, parts, lambda c: c == "clip", torch.float64, 2e-6)
    check_helper(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kind"), [(1, "deepspeed_short"), (2, "deepspeed"), (4, "deepspeed_short")])
def test_one_two_and_four_processes_under_ddp_and_deepspeed(processes, kind, tmp_path, root):
    cases, parts = launch(tmp_path, root, processes, "ddp", kind)
    zero = [c for c in cases if c.startswith("zero")]
    assert len(zero) == len(worker.ZERO) * (4 if kind == "deepspeed" else 1) + 1
    check(cases, parts, lambda c: c in zero, torch.float32, 1e-5)
    assert len(check(cases, parts, lambda c: c not in zero and c != "clip", torch.float64, 1e-12)) >= 10
    check(cases, parts, lambda c: c == "clip", torch.float64, 2e-6)
    check_helper(tmp_path, processes)
