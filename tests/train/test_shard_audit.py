"""The audit of shard plans finds what was broken on purpose; that it passes what is right, test_shards.py shows."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longalign_lib.train.plan import Plan, PlanError
from longalign_lib.train.shard_audit import audit_shards
from longalign_lib.train.shards import PIECE, build_shards

CAPACITY = 256


def lengths_of(seed, n):
    return np.minimum(np.exp(np.random.default_rng(seed).normal(3, 1, n)).astype(int) + 2, CAPACITY)


@pytest.mark.parametrize("column, change, message", [
    ("row", lambda t: t.row.where(t.index != 3, t.row[4]), "the data has"),
    ("length", lambda t: t.length.where(t.index != 3, t.length[3] + 1), "the data has"),
    ("targets", lambda t: t.targets * 0, "the data has"),
    ("start", lambda t: t.start + 1, "the data has"),
    ("step", lambda t: t.step + 1, "out of order"),
    ("step", lambda t: t.step * 0 + t.step.min(), "a step has .* packs, not 4"),
    ("step", lambda t: t.step + (t.pack.duplicated() & ~t.pack.duplicated(keep="last") & (t.step.shift(-1) > t.step)), "in two steps"),
    ("pack", lambda t: t.pack + 1, "out of order"),
    ("pack", lambda t: t.pack * 0, "overlaps|out of order"),
    ("offset", lambda t: t.offset * 0, "overlaps"),
    ("offset", lambda t: t.offset + 300 * (t.offset > 0), "over the capacity"),
    (None, lambda t: t.iloc[1:], "the data has"),
    (None, lambda t: pd.concat([t, t.iloc[-1:]]), "the data has"),
])  # fmt: skip
def test_the_audit_finds_a_broken_file(tmp_path, column, change, message):
    shards = [lengths_of(k, 100) for k in range(3)]
    paths = build_shards(shards, tmp_path, capacity=CAPACITY, packs_per_step=4)
    audit_shards(shards, tmp_path)
    plan = Plan.load(paths[1])
    broken = change(plan.table) if column is None else plan.table.assign(**{column: change(plan.table)})
    Plan(**{**plan.__dict__, "table": broken}).save(paths[1])
    with pytest.raises(PlanError, match=rf"plan-000-000001\.parquet: .*({message})"):
        audit_shards(shards, tmp_path)


def test_the_audit_finds_rows_that_are_hidden_in_carry_files_and_fates_that_are_not_told(tmp_path):
    shards = [4 * lengths_of(k, 100) for k in range(3)]
    paths = build_shards(shards, tmp_path, capacity=CAPACITY, packs_per_step=4, over_long="truncate")
    told = next(tmp_path.glob("fates-*"))
    kept = told.read_bytes()
    pd.read_parquet(told).iloc[1:].to_parquet(told)
    with pytest.raises(PlanError, match="were cut or left out, and it says something else"):
        audit_shards(shards, tmp_path)
    told.unlink()
    with pytest.raises(PlanError, match=rf"{told.name}: .* says something else"):
        audit_shards(shards, tmp_path)
    told.write_bytes(kept)
    audit_shards(shards, tmp_path)
    plan = Plan.load(paths[-1])
    gone = plan.table[plan.table.pack == plan.table.pack.max()]
    Plan(**{**plan.__dict__, "table": plan.table.drop(gone.index)}).save(paths[-1])
    carry = tmp_path / "carry-000-000002.parquet"
    facts = pq.read_schema(carry).metadata
    table = pa.Table.from_pandas(gone[PIECE].astype(np.int64), preserve_index=False)
    pq.write_table(table.replace_schema_metadata(facts), carry)
    with pytest.raises(PlanError, match="is carried out of epoch 0"):
        audit_shards(shards, tmp_path)


@pytest.mark.parametrize("method", ["naive", "sorted"])
def test_padded_rows_count_at_their_padded_width(tmp_path, method):
    shards = [lengths_of(k, 60) for k in range(3)]
    paths = build_shards(shards, tmp_path, capacity=2 * CAPACITY, packs_per_step=4, method=method, rows_per_pack=2)
    facts = audit_shards(shards, tmp_path)
    assert facts["lines"] == 180 and facts["packs"] >= 90
    plan = Plan.load(paths[-1])
    Plan(**{**plan.__dict__, "capacity": int(plan.table.length.max())}).save(paths[-1])  # no row is longer, but padded packs are
    with pytest.raises(PlanError, match="is over the capacity"):
        audit_shards(shards, tmp_path)


def test_other_data_is_not_what_was_planned(tmp_path):
    shards = [lengths_of(k, 60) for k in range(3)]
    build_shards(shards, tmp_path, capacity=CAPACITY, packs_per_step=4)
    with pytest.raises(PlanError, match="the data has"):
        audit_shards([shards[0], shards[2], shards[1]], tmp_path)
    with pytest.raises(ValueError, match="shard 1 has 61 rows, not 60 as said before"):
        audit_shards([shards[0], [*shards[1], 5], shards[2]], tmp_path)
