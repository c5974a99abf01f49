"""Needs lm-evaluation-harness (the extra ``retention``)."""

import json
import random

import numpy as np
import pytest
import torch

from longalign_lib.evaluate import retention as R


def loglikelihood(model, tokenizer, context: str, choice: str) -> float:
    """Sum of log p(choice tokens | context), from one forward pass without padding."""
    whole, before = tokenizer(context + choice)["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.inference_mode():
        logp = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(float(logp[i - 1, whole[i]]) for i in range(before, len(whole)))


def test_scores_are_those_of_an_independent_computation(model, tokenizer, tmp_path, root):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    scores, items = R.evaluate(model, tokenizer, limit=12, out=tmp_path / "r.json")
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    lines = (root / "data_samples" / "retention" / "general_knowledge.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    right = right_norm = 0
    for row, item in zip(map(json.loads, lines), items.itertuples()):
        context = f"Question: {row['question']}\nAnswer:"
        wanted = [loglikelihood(model, tokenizer, context, f" {c}") for c in row["choices"]]
        assert item.loglikelihoods == pytest.approx(wanted, rel=1e-4) and item.target == row["answer"]
        right += int(np.argmax(wanted)) == row["answer"]
        right_norm += int(np.argmax([w / len(c) for w, c in zip(wanted, row["choices"])])) == row["answer"]
    values = scores.set_index("metric").value
    assert len(items) == 12 and values["acc"] == pytest.approx(right / 12) and values["acc_norm"] == pytest.approx(right_norm / 12)
    assert (scores.stderr > 0).any() and str(root) not in (tmp_path / "r.json").read_text()
