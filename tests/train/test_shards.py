"""Plans made shard by shard: every row once, kills and reruns, memory of one shard, fill near that of one table."""

import itertools
import json
import weakref

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.train import shards as module
from longalign_lib.train.audit import worst_over_mean
from longalign_lib.train.plan import METHODS, Plan, PlanError, build_plan, pair_work
from longalign_lib.train.shard_audit import audit_shards
from longalign_lib.train.shards import build_shards, iter_shards, manifest, read_shard, visits, whole_steps

CAPACITY = 256


def lengths_of(seed, n, longest=CAPACITY):
    rng = np.random.default_rng(seed)
    return np.minimum(np.exp(rng.normal(3, 1, n)).astype(int) + 2, longest)


def every_row_once(folder, lengths, epochs, capacity=CAPACITY):
    """By brute force over all files: each token of each row is in exactly one place an epoch. Returns the tables joined."""
    tables = [plan.table for plan in iter_shards(folder)]
    table = pd.concat(tables, ignore_index=True)
    for epoch in range(epochs):
        held = [np.zeros(n, dtype=int) for n in lengths]
        for line in table[table.epoch == epoch].itertuples():
            held[line.row][line.start : line.start + line.length] += 1
        assert all((h == 1).all() for h in held)
    assert sorted(table.step.unique()) == list(range(table.step.nunique()))
    assert sorted(table.pack.unique()) == list(range(table.pack.nunique()))
    assert (table.groupby("pack").step.nunique() == 1).all() and (table.groupby("step").epoch.nunique() == 1).all()
    for _, pack in table.groupby("pack"):
        places = np.zeros(capacity, dtype=int)
        for line in pack.itertuples():
            assert line.offset + line.length <= capacity
            places[line.offset : line.offset + line.length] += 1
        assert places.max() == 1, "documents overlap"
    for a, b in itertools.pairwise(tables):
        assert a.step.max() < b.step.min(), "a step is in two files"
    return table


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@given(st.integers(0, 10**6), st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any), st.sampled_from(METHODS),
       st.sampled_from([(1, 1), (4, 2), (8, 8), (8, 2), (6, 3)]), st.integers(1, 2))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_row_once_an_epoch_and_only_the_last_file_has_short_steps(tmp_path_factory, seed, sizes, method, steps, epochs):
    folder = tmp_path_factory.mktemp("plans")
    per_step, ranks = steps
    shards = [lengths_of([seed, k], n) for k, n in enumerate(sizes)]
    paths = build_shards(shards, folder, capacity=CAPACITY, packs_per_step=per_step, max_ranks=ranks, method=method, seed=seed,
                         epochs=epochs)  # fmt: skip
    assert len(paths) == epochs * len(sizes) and all(path.exists() for path in paths)
    table = every_row_once(folder, np.concatenate(shards), epochs)
    packs = table.groupby("step").pack.nunique()
    for k, path in enumerate(paths):
        if (k + 1) % len(sizes):  # not an epoch's last file
            assert (packs[Plan.load(path).table.step.unique()] == per_step).all()
    assert packs.max() <= per_step
    facts = audit_shards(shards, folder)
    assert facts["lines"] == epochs * sum(sizes) and facts["packs"] == table.pack.nunique()
    assert facts["steps"] == table.step.nunique() and facts["tokens"] == epochs * sum(x.sum() for x in shards)


@pytest.mark.parametrize("method, options", [("packed", {}), ("balanced", {"max_ranks": 2}), ("naive", {"rows_per_pack": 1})])
def test_a_killed_run_goes_on_to_the_same_files(tmp_path, monkeypatch, method, options):
    shards = [4 * lengths_of(k, 90) for k in range(4)]
    arguments = dict(capacity=CAPACITY, packs_per_step=4, method=method, seed=3, epochs=2, over_long="split", **options)
    build_shards(shards, tmp_path / "whole", **arguments)
    whole = contents(tmp_path / "whole")
    assert sum(len(pd.read_parquet(p)) for p in (tmp_path / "whole").glob("carry-*")) > 0, "nothing was carried: nothing is tested"
    assert any(name.startswith("fates-") for name in whole) and not any(name.endswith(".part") for name in whole)
    real, writes, called = module.pq.write_table, len(whole) - 1, []

    def die_at(n, torn):
        left = [n]

        def write(arrow, path, *rest):
            if not left[0]:
                if torn:
                    real(arrow, path, *rest)
                    path.write_bytes(path.read_bytes()[:50])  # half a file
                raise KeyboardInterrupt
            left[0] -= 1
            return real(arrow, path, *rest)

        return write

    for n in range(writes):
        folder = tmp_path / f"killed{n}"
        monkeypatch.setattr("pyarrow.parquet.write_table", die_at(n, torn=n % 2 == 0))
        with pytest.raises(KeyboardInterrupt):
            build_shards(shards, folder, **arguments)
        monkeypatch.setattr("pyarrow.parquet.write_table", real)
        planned = [k for k in contents(folder) if k.startswith("plan") and k.endswith("parquet")]
        called.clear()
        build_shards([lambda s=s, k=k: called.append(k) or s for k, s in enumerate(shards)], folder, sizes=[90] * 4, **arguments)
        assert len(called) == 8 - len(planned), "a finished shard was planned again"
        assert contents(folder) == whole


def test_a_lost_file_is_made_again_alone(tmp_path):
    shards = [lengths_of(k, 90) for k in range(4)]
    paths = build_shards(shards, tmp_path, capacity=CAPACITY, packs_per_step=4, seed=1)
    whole = contents(tmp_path)
    paths[2].unlink()
    with pytest.raises(PlanError, match=r"plan-000-000002\.parquet or carry"):
        list(iter_shards(tmp_path))
    build_shards(shards, tmp_path, capacity=CAPACITY, packs_per_step=4, seed=1)
    assert contents(tmp_path) == whole
    (tmp_path / "carry-000-000001.parquet").unlink()
    paths[2].unlink()
    with pytest.raises(PlanError, match=r"carry-000-000001\.parquet is missing: delete plan-000-000001\.parquet too"):
        build_shards(shards, tmp_path, capacity=CAPACITY, packs_per_step=4, seed=1)


def test_shards_may_be_arrays_files_or_functions_and_give_the_same_plans(tmp_path):
    lengths = [lengths_of(k, 80, 500) for k in range(3)]
    targets = [np.random.default_rng(k).integers(0, x // 2 + 1) for k, x in enumerate(lengths)]
    for k in range(3):
        np.save(tmp_path / f"lengths{k}.npy", lengths[k].astype(np.uint16))
        np.save(tmp_path / f"targets{k}.npy", targets[k])
    arguments = dict(capacity=512, packs_per_step=2, seed=5)
    kinds = {
        "arrays": [(x, t) for x, t in zip(lengths, targets)],
        "paths": [(tmp_path / f"lengths{k}.npy", str(tmp_path / f"targets{k}.npy")) for k in range(3)],
        "functions": [lambda k=k: (lengths[k].tolist(), targets[k]) for k in range(3)],
        "counted": [(x, lambda rows, starts, held, t=t: t[rows]) for x, t in zip(lengths, targets)],
    }
    for name, shards in kinds.items():
        build_shards(shards, tmp_path / name, **arguments)
        assert contents(tmp_path / name) == contents(tmp_path / "arrays"), name
        facts = audit_shards(shards, tmp_path / name)
    flat = np.concatenate(targets)
    table = pd.concat([p.table for p in iter_shards(tmp_path / "arrays")])
    assert (table.targets.to_numpy() == flat[table.row]).all() and facts["targets"] == flat.sum()
    fates = pd.concat([pd.read_parquet(p) for p in (tmp_path / "arrays").glob("fates-*")])
    assert sorted(fates.row) == np.flatnonzero(flat == 0).tolist() and set(fates.fate) == {"no target"}
    assert facts["lines"] + len(fates) == 240 and (flat == 0).any()


def test_memory_holds_one_shard_at_a_time(tmp_path):
    alive, most = weakref.WeakSet(), []

    class Watched(np.ndarray):
        __hash__ = object.__hash__

    def source(k):
        def read():
            most.append(len(alive))
            array = lengths_of(k, 200).view(Watched)
            alive.add(array)
            return array

        return read

    shards = [source(k) for k in range(6)]
    build_shards(shards, tmp_path, capacity=CAPACITY, packs_per_step=4, epochs=2)
    audit_shards(shards, tmp_path)
    assert len(most) == 6 + 12 + 12 and max(most) == 0, f"{max(most)} shards were alive when the next was read"
    carried = [len(np.unique(pd.read_parquet(p).row)) for p in tmp_path.glob("carry-*")]
    assert 0 < max(carried) < 200


def test_fill_is_within_the_stated_bound_of_one_table(tmp_path):
    rng = np.random.default_rng(0)
    short = np.clip(rng.lognormal(4, 1, 12_000).astype(int), 2, 511)
    lengths = np.where(rng.random(12_000) < 0.1, rng.integers(512, 4097, 12_000), short)
    shards = np.array_split(lengths, 6)
    facts = {}
    for method in ("packed", "balanced"):
        build_shards(shards, tmp_path / method, capacity=4096, packs_per_step=16, max_ranks=4, method=method)
        facts[method] = audit_shards(shards, tmp_path / method)
        one = build_plan(lengths, method=method, capacity=4096, packs_per_step=16, max_ranks=4)
        packs, least = facts[method]["packs"], lengths.sum() / 4096
        assert packs < least + len(shards), "more than one pack a shard is lost"
        assert one.fill() - facts[method]["fill"] < len(shards) / least
    assert facts["packed"]["fill"] < 1
    balance = [worst_over_mean(plan, 4) for plan in iter_shards(tmp_path / "balanced")]
    random = build_plan(lengths, method="packed", capacity=4096, packs_per_step=16)
    assert max(balance) < 1.1 < worst_over_mean(random, 4, balance=False)


def test_epochs_and_seeds_draw_shards_packs_and_steps_anew(tmp_path):
    orders = [tuple(k for e, _, k in visits(seed, 2, 12) if e == epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(12)) for order in orders)
    rows = set()
    for seed in (0, 1):  # one shard: all that differs is drawn inside it
        build_shards([lengths_of(0, 100)], tmp_path / str(seed), capacity=CAPACITY, packs_per_step=4, seed=seed, epochs=2)
        rows |= {tuple(plan.table.row) for plan in iter_shards(tmp_path / str(seed))}
    assert len(rows) == 4
    build_shards([lengths_of(0, 100)] * 2, tmp_path / "twins", capacity=CAPACITY, packs_per_step=1)
    one, two = (plan.table.row % 100 for plan in iter_shards(tmp_path / "twins"))
    assert one.tolist() != two.tolist(), "two shards of the same lengths were drawn alike"


def test_iteration_starts_at_the_file_that_holds_a_step(tmp_path):
    shards = [lengths_of(k, 100) for k in range(4)] + [np.array([], dtype=int)]
    build_shards(shards, tmp_path, capacity=CAPACITY, packs_per_step=4)
    plans = list(iter_shards(tmp_path))
    last = int(plans[-1].table.step.max())
    assert len(plans) >= 4
    for step in range(last + 1):
        assert step in next(iter_shards(tmp_path, step)).table.step.unique()
    assert not list(iter_shards(tmp_path, last + 1))
    assert {p.rows for p in plans} == {400} and manifest(tmp_path)["sizes"] == [100] * 4 + [0]


def test_whole_steps_top_up_and_keep_groups_of_like_cost_together():
    lengths = np.repeat([8, 4, 2, 1], [14, 28, 56, 8])  # packs of 8 tokens: 14, 14, 14 and 1
    plan = build_plan(lengths, method="balanced", algorithm="best_fit_decreasing", capacity=8, packs_per_step=8, max_ranks=4)
    assert plan.steps().packs.sum() == 43 and (plan.steps().packs < 8).sum() >= 1
    table, left = whole_steps(plan)
    assert table.groupby("step").pack.nunique().tolist() == [8] * 5 and left.pack.nunique() == 3
    assert table.pack.is_monotonic_increasing and table.step.is_monotonic_increasing and table.pack.iloc[-1] == 39
    assert sorted([*table.row, *left.row]) == list(range(len(lengths)))
    work = table.assign(w=table.length**2).groupby(["step", "pack"]).w.sum()
    mixed = sum(len(set(sorted(w)[i : i + 4])) > 1 for _, w in work.groupby("step") for i in (0, 4))
    assert mixed <= 4, "of ten groups four at most straddle two kinds: three borders between kinds and one topped up"
    # a step that misses one pack, one that misses a whole group, and one to be dissolved, whose groups cost 3, 2 and 1
    step, cost = np.repeat([0, 1, 2], [15, 12, 12]), np.concatenate([np.full(27, 9), np.repeat([3, 2, 1], 4)])
    t = pd.DataFrame({"epoch": 0, "step": step, "pack": np.arange(39), "offset": 0, "row": np.arange(39), "start": 0, "length": cost,
                      "targets": cost - 1})  # fmt: skip
    table, left = whole_steps(Plan(t, "balanced", 9, 16, 39, max_ranks=4))
    assert table[table.step == 1].length.tolist() == [9] * 12 + [3] * 4, "a group of like cost was torn"
    assert table[table.step == 0].length.tolist() == [9] * 15 + [2] and left.length.tolist() == [2] * 3 + [1] * 4
    few = build_plan(lengths[:3], method="packed", capacity=8, packs_per_step=8)
    table, left = whole_steps(few)
    assert not len(table) and len(left) == 3


@pytest.mark.parametrize(
    "shards, options, message",
    [([], {}, "0 shards and 0 sizes"), ([[3, 4]], {"sizes": [2, 2]}, "1 shards and 2 sizes"),
     ([[3, 4]], {"sizes": [3]}, "shard 0 has 2 rows, not 3"),
     ([[3, 4], [3, -4]], {}, r"shard 1 \(its rows counted from 0\): row 1 has -4 tokens"),
     ([[3, 4.5]], {}, "shard 0 .*whole numbers"), ([[3, float("nan")]], {}, "shard 0 .*whole numbers"),
     ([[[3], [4]]], {}, "shard 0 .*one-dimensional"), ([[3, 40]], {}, "shard 0 .*row 1 has 40 tokens and the capacity is 30"),
     ([([3, 4], [1])], {}, r"targets has shape \(1,\), lengths has \(2,\)"),
     ([([3, 4], [1, 4])], {}, "4 targets in 4 tokens"),
     ([([3, 40], [1, 4])], {"over_long": "split"}, "row 1 is cut from 40 tokens to 30"),
     ([[3, 4]], {"capacity": 2.5}, r"capacity must be a whole number >= 1, got 2\.5"),
     ([[3, 4]], {"epochs": 0}, "epochs must be a whole number >= 1, got 0"),
     ([[3, 4]], {"packs_per_step": True}, "packs_per_step must be a whole number >= 1, got True"),
     ([[3, 4]], {"method": "best"}, "method 'best' is not one of"), ([[3, 4]], {"over_long": "cut"}, "over_long 'cut'")],
)  # fmt: skip
def test_wrong_input_is_named_and_leaves_no_plan(tmp_path, shards, options, message):
    arguments = {"capacity": 30, "packs_per_step": 2} | options
    with pytest.raises(ValueError, match=message):
        build_shards(shards, tmp_path, **arguments)
    assert not list(tmp_path.glob("plan-000-000001*"))
    for path in tmp_path.glob("plan-*"):
        path.unlink()
    build_shards([[3, 4]], tmp_path, capacity=30, packs_per_step=2)  # what failed does not stand in the way


def test_a_folder_is_not_finished_with_other_arguments(tmp_path):
    arguments = {"capacity": 30, "packs_per_step": 2, "cost": pair_work}
    for _ in "ab":
        build_shards([[3, 4], [5]], tmp_path, **arguments)
    for change in ({"capacity": 31}, {"seed": 1}, {"cost": lengths_of}, {"sizes": [2, 2]}, {"epochs": 2}, {"rows_per_pack": 2}):
        with pytest.raises(ValueError, match=rf"was planned with {next(iter(change))}="):
            build_shards([[3, 4], [5]], tmp_path, **arguments | change)


def test_numbers_over_31_bits_are_kept(tmp_path, monkeypatch):
    shards = [lengths_of(k, 100) for k in range(3)]
    monkeypatch.setattr(module, "LARGEST", 10)
    build_shards(shards, tmp_path, capacity=64, packs_per_step=2, over_long="drop")
    kinds = [plan.table.pack.dtype for plan in iter_shards(tmp_path)]
    assert kinds[-1] == np.int64 and audit_shards(shards, tmp_path)["packs"] > 40


def test_nothing_to_plan_is_no_error_and_rows_are_told(tmp_path):
    shards = [[40, 0], [50], [3], []]
    build_shards(shards, tmp_path, capacity=30, packs_per_step=2, over_long="drop")
    assert [p.table.row.tolist() for p in iter_shards(tmp_path)] == [[3]]
    facts = audit_shards(shards, tmp_path)
    assert (facts["rows"], facts["lines"], facts["tokens_lost"]) == (4, 1, 90)
    fates = pd.concat([pd.read_parquet(p) for p in tmp_path.glob("fates-*")]).sort_values("row")
    assert fates[["row", "fate"]].to_numpy().tolist() == [[0, "dropped"], [1, "empty"], [2, "dropped"]]
    assert json.loads((tmp_path / "shards.json").read_text())["over_long"] == "drop"


def test_read_shard_maps_a_file_without_reading_it(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1, 5))
    lengths, targets = read_shard(tmp_path / "a.npy")
    assert isinstance(lengths.base, np.memmap) and targets is None and lengths.tolist() == [1, 2, 3, 4]
