"""The stream packer against a ten-line reimplementation of its rule, and its resume at every place."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.train.audit import audit
from longalign_lib.train.collate import collate
from longalign_lib.train.plan import assign
from longalign_lib.train.rows import fit_rows
from longalign_lib.train.stream import Line, StreamPacker, fill_by_buffer, plan_of_packs, stream_packs
from longalign_lib.train.trainer import RankPacks


def by_hand(pieces, capacity, buffer_rows, buffer_tokens=math.inf):
    """The rule, written as it is spoken: lists of row numbers. ``pieces``: for each row of the stream a list of (name, length)."""
    waiting, packs = [], []

    def close():
        pack = [waiting.pop(0)]
        while fitting := [p for p in waiting if sum(x[1] for x in pack) + p[1] <= capacity]:
            best = max(fitting, key=lambda p: p[1])  # max gives the first, hence the oldest, of the largest
            waiting.remove(best)
            pack.append(best)
        packs.append(pack)

    for row in pieces:
        waiting += row
        while len(waiting) >= buffer_rows or sum(p[1] for p in waiting) >= buffer_tokens:
            close()
    while waiting:
        close()
    return packs


streams = st.lists(st.integers(1, 30), min_size=1, max_size=60)


@given(streams, st.integers(1, 12), st.none() | st.integers(30, 90))
@settings(max_examples=200, deadline=None)
def test_packs_are_those_of_the_rule(lengths, buffer_rows, buffer_tokens):
    packs = list(stream_packs(enumerate(lengths), 30, buffer_rows, buffer_tokens=buffer_tokens))
    wanted = by_hand([[(i, x)] for i, x in enumerate(lengths)], 30, buffer_rows, buffer_tokens or math.inf)
    assert [[(line.row, line.length) for line in pack] for pack in packs] == wanted
    for pack in packs:
        assert [line.offset for line in pack] == [0, *np.cumsum([line.length for line in pack])[:-1]]
        assert pack[-1].offset + pack[-1].length <= 30
    assert sorted(line.row for pack in packs for line in pack) == list(range(len(lengths)))


def test_the_drawn_example_and_an_exactly_full_pack():
    rows = [[line.length for line in pack] for pack in stream_packs(enumerate([6, 5, 4, 3, 2, 7]), 10, 4)]
    assert rows == [[6, 4], [5, 3, 2], [7]]
    assert [len(p) for p in stream_packs(enumerate([65_536, 65_535, 1]), 65_536, 8)] == [1, 2]
    assert [len(p) for p in stream_packs(enumerate([2**4, 1, 2**4]), 2**4 + 1, 8)] == [2, 1]


def test_of_equal_rows_the_oldest_goes_first():
    packs = list(stream_packs(enumerate([6, 4, 4, 4]), 10, 4))
    assert [[line.row for line in pack] for pack in packs] == [[0, 1], [2, 3]]


@given(streams, st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_nothing_starves(lengths, buffer_rows):
    packer, due = StreamPacker(30, buffer_rows), {}

    def arrivals():
        for row, length in enumerate(lengths):
            assert len(packer) < buffer_rows, "a full buffer was asked for more"
            due[row] = packer.packs_out + len(packer) + 1  # r older rows wait: the (r + 1)-th pack from now, at the latest
            assert due[row] - packer.packs_out <= buffer_rows
            yield row, length

    for pack in packer.run(arrivals()):
        late = [line.row for line in pack if due.pop(line.row) < packer.packs_out]
        assert not late, f"rows {late} waited too long"
    assert not due, "a row never left"


def test_the_bound_on_waiting_is_reached_and_greed_alone_would_starve():
    # rows of 6 in packs of 10: each pack holds one, so the last of five leaves with the fifth pack
    packer = StreamPacker(10, 5)
    packs = [pack for row in range(20) for pack in packer.add(row, 6)]
    assert [pack[0].row for pack in packs] == list(range(16)) and packer.packs_out == 16 and len(packer) == 4
    # a short row among rows that leave no room for it would wait for ever if packs began with the largest
    packs = list(stream_packs([(0, 2), *((i, 9) for i in range(1, 50))], 10, 5))
    assert packs[0] == [Line(0, 0, 0, 2, 1)]


@given(st.lists(st.integers(1, 70), min_size=1, max_size=25), st.integers(1, 6), st.none() | st.integers(30, 60),
       st.sampled_from(["truncate", "split", "drop"]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_resumed_after_every_pack_and_every_row_it_goes_on_as_if_nothing_had_happened(lengths, rows, tokens, over_long):
    def new():
        return StreamPacker(30, rows, over_long, tokens)

    stream = list(enumerate(lengths))
    first = new()
    whole = list(first.run(stream))
    packer, done = new(), []
    for pack in packer.run(stream):  # killed after each pack, the last ones of a flush too
        done.append(pack)
        saved = json.loads(json.dumps(packer.state()))
        again = StreamPacker.from_state(saved)
        assert again.state() == saved
        assert done + list(again.run(stream[again.rows_in :])) == whole
        assert again.state() == first.state()
    for stop in range(len(stream) + 1):  # killed after each row
        packer, done = new(), []
        for row in stream[:stop]:
            done += packer.add(*row)
        again = StreamPacker.from_state(packer.state())
        for row in stream[again.rows_in :]:
            done += again.add(*row)
        assert done + again.flush() == whole and again.state() == first.state()


def test_saved_state_survives_a_kill_in_mid_write(tmp_path, monkeypatch):
    packer = StreamPacker(30, 8, "drop")
    for row, length in enumerate([7, 31, 9, 7]):
        packer.add(row, length)
    path = packer.save(tmp_path / "stream.json")
    packer.add(4, 5)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        packer.save(path)
    again = StreamPacker.load(path)
    assert (len(again), again.rows_in, again.pending_tokens) == (3, 4, 23)
    assert again.fates == [{"row": 1, "length": 31, "fate": "dropped", "tokens_lost": 31}]
    again.fates.clear()
    assert packer.fates, "the state shares its lists with the packer"


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.sampled_from(["truncate", "split", "drop"]))
@settings(max_examples=60, deadline=None)
def test_over_long_rows_meet_the_fate_that_tables_give_them(lengths, over_long):
    packer = StreamPacker(30, 10, over_long)
    packs = list(packer.run(enumerate(lengths)))
    pieces, fates = fit_rows(lengths, 30, over_long)
    lines = sorted((line.row, line.start, line.length, line.targets) for pack in packs for line in pack)
    assert lines == [tuple(p) for p in pieces.to_numpy().tolist()]
    assert packer.fates == fates.to_dict("records")
    lost = np.zeros(len(lengths), dtype=int)
    for fate in packer.fates:
        lost[fate["row"]] += fate["tokens_lost"]
    held = np.bincount([x[0] for x in lines], weights=[x[2] for x in lines], minlength=len(lengths)) if lines else 0
    assert (held + lost == lengths).all(), "tokens vanished"


def test_targets_are_counted_by_the_piece_and_pieces_without_any_are_recorded():
    labels = np.zeros(25, dtype=bool)
    labels[[3, 10, 11]] = True  # targets at 3, at 10 (first of its piece: never one) and at 11; none in 20..24
    packer = StreamPacker(10, 8, "split")
    packs = packer.add(7, 25, lambda start, length: int(labels[start + 1 : start + length].sum())) + packer.add(8, 4, 0)
    packs += packer.add(9, 4, 2) + packer.flush()
    assert sorted(line for pack in packs for line in pack) == [Line(7, 0, 0, 10, 1), Line(7, 10, 0, 10, 1), Line(9, 0, 0, 4, 2)]
    fates = [(f["row"], f["fate"], f["tokens_lost"]) for f in packer.fates]
    assert fates == [(7, "split", 0), (7, "no target", 5), (8, "no target", 4)]
    with pytest.raises(ValueError, match=r"row 7 is cut from 25 tokens to 10, and 5 targets do not say which remain"):
        packer.add(7, 25, 5)


def test_one_row_may_wait_twice():
    packs = list(stream_packs([(0, 4), (1, 5), (0, 4), (1, 5)], 10, 3))
    assert sorted(line.row for pack in packs for line in pack) == [0, 0, 1, 1]


@pytest.mark.parametrize("length", [0, -3, 4.0, 4.5, float("nan"), True, np.True_, "4", None, np.float64(4), 31])
def test_a_bad_length_is_named_and_changes_nothing(length):
    packer = StreamPacker(30, 3)
    packer.add(0, 7)
    before = packer.state()
    with pytest.raises(ValueError, match=r"length of row 5 must be a whole number >= 1|row 5 has 31 tokens and the capacity is 30"):
        packer.add(5, length)
    assert packer.state() == before
    packer.add(5, np.int32(4), np.int64(3))
    assert json.loads(json.dumps(packer.state()))["pending"] == [[0, 0, 7, 6], [5, 0, 4, 3]]


@pytest.mark.parametrize(
    "wrong, message",
    [(lambda: StreamPacker(0, 4), "capacity must be a whole number >= 1, got 0"),
     (lambda: StreamPacker(2.5, 4), r"capacity must be a whole number >= 1, got 2\.5"),
     (lambda: StreamPacker(10, True), "buffer_rows must be a whole number >= 1, got True"),
     (lambda: StreamPacker(10, 4, buffer_tokens=9), "buffer_tokens must be a whole number >= 10, got 9"),
     (lambda: StreamPacker(10, 4, "cut"), "over_long 'cut' is not one of truncate, split, drop, error"),
     (lambda: StreamPacker(10, 4).add(-1, 4), "row must be a whole number >= 0, got -1"),
     (lambda: StreamPacker(10, 4).add(1, 4, 4), "row 1: 4 targets in 4 tokens"),
     (lambda: StreamPacker(10, 4).add(1, 4, -1), "targets of row 1 must be a whole number >= 0, got -1"),
     (lambda: StreamPacker(10, 4).add(1, 4, float("nan")), "targets of row 1 must be a whole number >= 0, got nan"),
     (lambda: StreamPacker(10, 4).add(1, 11), "over_long='truncate', 'split' or 'drop'"),
     (lambda: StreamPacker.from_state([]), "no StreamPacker state of format 1"),
     (lambda: StreamPacker.from_state({k: v for k, v in StreamPacker(9, 2).state().items() if k != "pending"}), "'pending'"),
     (lambda: StreamPacker.from_state(StreamPacker(9, 2).state() | {"pending": [[0, 0, 10, 9]]}), "over the capacity 9"),
     (lambda: StreamPacker.from_state(StreamPacker(9, 2).state() | {"rows_in": -1}), "rows_in must be a whole number >= 0"),
     (lambda: plan_of_packs([], capacity=9, packs_per_step=2), "there is nothing to plan"),
     (lambda: plan_of_packs([[]], capacity=9, packs_per_step=2), "a pack without a line"),
     (lambda: plan_of_packs([[Line(0, 0, 0, 10, 9)]], capacity=9, packs_per_step=2), "pack 0 holds more than the capacity 9"),
     (lambda: plan_of_packs([[Line(0, 0, 0, 9, 8)]], capacity=9, packs_per_step=0), "packs_per_step must be a whole number >= 1"),
     (lambda: plan_of_packs([[Line(0, 0, 0, 9, 8)]], capacity=9, packs_per_step=1, first_pack=2**31), "begin again at 0")],
)  # fmt: skip
def test_wrong_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
    with pytest.raises(IndexError, match="no row waits"):
        StreamPacker(10, 4).close()


def test_a_file_that_holds_no_state_is_named(tmp_path):
    for text in ("{", "[]", '{"longalign_stream": 1}', json.dumps(StreamPacker(9, 2).state() | {"pending": 3})):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json: "):
            StreamPacker.load(tmp_path / "other.json")


def test_packs_of_a_stream_are_a_plan_that_audit_collate_and_ranks_take():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 90, 300)
    store = [(rng.integers(5, 90, n), np.where(rng.random(n) < 0.5, 7, -100)) for n in lengths]

    def targets_of(row):
        return lambda start, length: int((store[row][1][start + 1 : start + length] != -100).sum())

    packer = StreamPacker(64, 32, "split")
    packs = list(packer.run((row, n, targets_of(row)) for row, n in enumerate(lengths.tolist())))
    plan = plan_of_packs(packs, capacity=64, packs_per_step=4, rows=len(lengths))
    facts = audit(plan, lengths, pd.DataFrame(packer.fates))
    assert facts["packs"] == len(packs) and facts["steps"] == -(-len(packs) // 4) and facts["fill"] > 0.97
    assert (plan.table.start > 0).sum() > 20, "no row was split: nothing is tested"
    assert plan.steps().packs.tolist()[:-1] == [4] * (facts["steps"] - 1)
    assert sorted(assign(plan, 2).pack) == list(range(len(packs)))
    for number, pack in enumerate(packs):
        batch = collate(plan.table[plan.table.pack == number], store)
        tokens = [store[line.row][0][line.start : line.start + line.length] for line in pack]
        assert batch["input_ids"][0].tolist() == np.concatenate(tokens).tolist()
    ranks = [RankPacks(plan, store, rank, 2) for rank in (0, 1)]
    for step in range(facts["steps"]):  # two micro-steps of two ranks: the weights of a step sum to one
        weights = [float(rank[2 * step + micro]["loss_weights"].sum()) for rank in ranks for micro in (0, 1)]
        assert sum(weights) == pytest.approx(1, abs=1e-5)
    later = plan_of_packs(packs, capacity=64, packs_per_step=4, epoch=1, first_step=facts["steps"], first_pack=len(packs))
    assert (later.table.step - plan.table.step == facts["steps"]).all() and later.table.pack.min() == len(packs)
    assert later.table.dtypes.equals(plan.table.dtypes)


def test_a_larger_buffer_fills_better_up_to_the_least_number_of_packs():
    rng = np.random.default_rng(1)
    lengths = np.where(rng.random(4000) < 0.1, rng.integers(200, 1001, 4000), rng.integers(5, 200, 4000))
    table = fill_by_buffer(lengths, 1000, (1, 8, 64, 512))
    assert table.fill.is_monotonic_increasing and table.fill.iloc[0] < 0.2 and table.fill.iloc[-1] > 0.998
    assert table.packs.iloc[0] == 4000 and table.longest_wait.iloc[0] == 0, "a buffer of one row closes a pack a row"
    assert table.packs.iloc[-1] <= -(-lengths.sum() // 1000) + 1
    assert (np.diff(table.mean_wait) > 0).all() and (table.fill * table.packs * 1000 - lengths.sum()).abs().max() < 1e-6
