"""A batch from plan lines: layout, weights of the right rows, no target across documents, data of another plan refused."""

import pytest
import torch

from longalign_lib.train.collate import collate, empty_pack
from longalign_lib.train.loss import IGNORE


def test_collate_lays_out_what_the_docstring_says(pack_of):
    store, lines = pack_of([3, 2])
    batch = collate(lines, store, [0.5, 0.25])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5] and batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == 3
    first = batch["labels"][0, [0, 3]].tolist()
    assert first == [IGNORE, IGNORE], "a document's first token must never be a target"
    target = batch["labels"][0] != IGNORE
    assert target.tolist() == [False, True, True, False, True]
    assert batch["loss_weights"][0].tolist() == [0, 0.5, 0.5, 0, 0.25]
    assert batch["inverse_targets"][0].tolist() == [0, 0.5, 0.5, 0, 1]
    padded = collate(lines.assign(offset=[0, 3]), store, [0.5, 0.25], padded=True, pad_id=9)
    assert padded["input_ids"].shape == (2, 3) and padded["input_ids"][1, 2] == 9 and padded["labels"][1, 2] == IGNORE
    assert "cu_seq_lens_q" not in padded


def test_collate_weighs_the_right_rows_in_any_order(pack_of):
    store, lines = pack_of([5, 5])
    weights = [0.9, 0.1]
    straight = collate(lines, store, weights)
    turned = collate(lines.iloc[::-1], store, weights[::-1])
    assert torch.equal(straight["loss_weights"], turned["loss_weights"]) and straight["loss_weights"].max() > 0.8


def test_collate_refuses_a_plan_of_other_data(pack_of):
    store, lines = pack_of([3, 2])
    with pytest.raises(ValueError, match="row 1 has 2 tokens, the plan says 5"):
        collate(lines.assign(length=[3, 5]), store)
    with pytest.raises(ValueError, match=r"row 0 has 1 targets, the plan says 2: .*store\.targets"):
        collate(lines.assign(targets=[2, 1]), {0: ([5, 6, 7], [IGNORE, IGNORE, 7]), 1: ([5, 6], [IGNORE, 6])})
    assert collate(lines.assign(targets=[1, 1]), {0: ([5, 6, 7], [IGNORE, IGNORE, 7]), 1: ([5, 6], [5, 6])})["loss_weights"].sum() == 2


@pytest.mark.parametrize(("row", "message"), [
    (([5, 6, 7], [IGNORE, -1, 7]), "token 1 of the pack has id 6 and label -1: .*-100"), (([5, -2, 7], [IGNORE, IGNORE, 7]), "id -2"),
    (([5, 6, 7], [7]), "row 0 has 3 ids and 1 labels"), (([5, 6, 7], [5, 6, 7, 8]), "row 0 has 3 ids and 4 labels"),
])  # fmt: skip
def test_ids_and_labels_that_mean_something_else_are_refused(pack_of, row, message):
    lines = pack_of([3])[1]
    with pytest.raises(ValueError, match=message):
        collate(lines, {0: row})


def test_an_empty_pack_weighs_nothing():
    batch = empty_pack()
    assert batch["loss_weights"].sum() == 0 and (batch["labels"] == IGNORE).all()
