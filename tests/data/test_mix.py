"""Suites: the right numbers, nested, the same for the same seed, each row with its origin."""

from __future__ import annotations

import json

import pytest

from longalign_lib.data.jsonl import read_jsonl, write_jsonl
from longalign_lib.data.mix import FULL, SUITES, Row, choose, mix, mix_samples, rank, report_table

SOURCES = ("arxiv", "books", "c4", "github")


def sample(text: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": f"{text}?"}, {"role": "assistant", "content": f"{text}!"}], **more}


LONG = [sample(f"long {i}", source=SOURCES[i % 4], length=1000 + i) for i in range(40)]
SHORT = [sample(f"short {i}", source="sharegpt") for i in range(25)]


def rows(n: int, part: str = "long") -> list[Row]:
    return [Row(f"{part}{i}", part, SOURCES[i % 4], 1, 1, f"{part}:{i}", i) for i in range(n)]


@pytest.mark.parametrize(("n", "taken"), [(40, (0, 20, 40, 20)), (7, (0, 4, 7, 4)), (FULL, (0, 5000, FULL, 5000)), (FULL + 2000, (0, 5000, FULL, 6000))])
def test_numbers_at_any_scale(n, taken):
    names = ("longalign-0k", "longalign-5k", "longalign-10k", "two-sources")
    for name, expected in zip(names, taken, strict=True):
        chosen, notes = choose(name, rows(n), rows(9, "short"), 1)
        assert sum(r.part == "short" for r in chosen) == 9
        if n == 7 and name == "two-sources":
            expected = 4  # 0, 1, 4, 5
        assert sum(r.part == "long" for r in chosen) == expected, name
        scaled = n < FULL and SUITES[name].wanted
        assert any("long samples instead of 10,000" in x for x in notes) == bool(scaled)
        assert any("fewer than the suite is to have" in x for x in notes) == (name == "two-sources")


def test_suites_are_nested_in_the_same_order_and_seeds_differ():
    five, ten = (mix_samples(f"longalign-{k}", LONG, SHORT, 3)[0] for k in ("5k", "10k"))
    none = mix_samples("longalign-0k", LONG, SHORT, 3)[0]
    assert len(five) == 45 and len(ten) == 65 and len(none) == 25
    in_five = {s["origin"] for s in five}
    assert [s["origin"] for s in ten if s["origin"] in in_five] == [s["origin"] for s in five]
    assert {s["origin"] for s in none} == {s["origin"] for s in five if s["part"] == "short"}
    other = mix_samples("longalign-5k", LONG, SHORT, 4)[0]
    assert {s["origin"] for s in other} != in_five and [s["part"] for s in five] != sorted(s["part"] for s in five)
    assert mix_samples("longalign-5k", LONG, SHORT, 3)[0] == five
    # the order of what is given plays no part, and more rows do not move the others
    back = mix_samples("longalign-5k", LONG[::-1], SHORT[::-1], 3)[0]
    assert [s["messages"] for s in back] == [s["messages"] for s in five]
    ranks = [rank(3, str(i), "draw") for i in range(2000)]
    assert len(set(ranks)) == 2000 and abs(sum(r < "8" for r in ranks) - 1000) < 4 * 500**0.5


def test_two_sources_have_as_many_rows_as_there_are_up_to_the_suites():
    taken, report = mix_samples("two-sources", LONG, SHORT, 0)
    assert {s["source"] for s in taken if s["part"] == "long"} == {"arxiv", "books"} and report["rows"] == 45
    taken, _ = mix_samples("two-sources", LONG, SHORT, 0, sources=("c4", "github"))
    assert {s["source"] for s in taken if s["part"] == "long"} == {"c4", "github"}
    for wrong in (("arxiv",), ("arxiv", "wudao"), ("arxiv", "arxiv")):
        with pytest.raises(ValueError, match=r"give two of those that the long samples have: \{'arxiv': 10, 'books': 10"):
            mix_samples("two-sources", LONG, SHORT, 0, sources=wrong)


def test_files_give_what_memory_gives_with_origins_and_a_table(tmp_path):
    long, short = write_jsonl(tmp_path / "long.jsonl", LONG), write_jsonl(tmp_path / "short.jsonl", SHORT)
    report = mix("longalign-5k", long, short, 3, tmp_path / "m" / "five.jsonl")
    written = read_jsonl(tmp_path / "m" / "five.jsonl")
    memory, same = mix_samples("longalign-5k", LONG, SHORT, 3)
    assert [w["messages"] for w in written] == [m["messages"] for m in memory] and report == same
    for w in written:
        name, line = w["origin"].split(":")
        assert read_jsonl(tmp_path / name)[int(line) - 1]["messages"] == w["messages"] and name.startswith(w["part"])
    table = report_table(report)
    assert table.taken.sum() == 45 and table[table.part == "long"].available.sum() == 40 and table.share.sum() == pytest.approx(1)
    assert table[table.part == "long"].tokens.sum() == sum(m["length"] for m in memory if m["part"] == "long")
    assert json.loads((tmp_path / "m" / "five.report.json").read_text()) == report and "20 taken where the paper has 5,000" in report["notes"][0]
    again = mix("longalign-5k", long, short, 3, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "m" / "five.jsonl").read_bytes() and again == report
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["five.jsonl", "five.rejected.jsonl", "five.report.json"]


def test_published_formats_mix_directly(tmp_path):
    def talk(*turns):
        return {"id": "x", "conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]}

    (tmp_path / "sharegpt.json").write_text(json.dumps([talk("q", "a"), talk("q2", ""), talk("q", "a"), talk("r", "b", "s", "")]))
    papers = [{"instruction": f"Below is a paper. {i}", "output": "x", "file": "f"} for i in range(9)] + [{"instruction": f"short {i}", "output": "y", "file": ""} for i in range(3)]
    (tmp_path / "LongAlpaca-12k.json").write_text(json.dumps(papers))
    out = tmp_path / "out.jsonl"
    report = mix("longalpaca-12k", tmp_path / "LongAlpaca-12k.json", [tmp_path / "sharegpt.json"], 0, out)
    found = {(p["part"], p["source"]): p["taken"] for p in report["parts"]}
    assert found == {("long", "arxiv"): 9, ("long", "general"): 3, ("short", "sharegpt"): 2} and report["rejected"] == 2
    assert read_jsonl(out.with_suffix(".rejected.jsonl")) == [{"id": "sharegpt.json:2", "reason": "nothing is left before an empty answer"},
                                                               {"id": "sharegpt.json:3", "reason": "the same messages as sharegpt.json:1"}]
    assert [w["origin"] for w in read_jsonl(out) if w.get("mended")] == ["sharegpt.json:4"]
    assert "12 long samples instead of 12,000: 12 taken" in report["notes"][0]


def test_wrong_arguments_are_named(tmp_path):
    short = write_jsonl(tmp_path / "short.jsonl", SHORT)
    with pytest.raises(ValueError, match="suite 'longalign-7k' is unknown; accepted: longalign-0k, longalign-5k"):
        mix("longalign-7k", short, short, 0, tmp_path / "o.jsonl")
    with pytest.raises(ValueError, match="wants 5,000 long samples and there is none"):
        mix("longalign-5k", [], short, 0, tmp_path / "o.jsonl")
    with pytest.raises(FileNotFoundError, match=r"gone.jsonl"):
        mix("longalign-5k", tmp_path / "gone.jsonl", short, 0, tmp_path / "o.jsonl")
    assert mix("longalign-0k", [], short, 0, tmp_path / "o.jsonl")["rows"] == 25


def test_facts_that_json_does_not_know_are_written_as_text(tmp_path):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([sample("long", made=datetime.datetime(2024, 1, 2))]), tmp_path / "long.parquet")
    write_jsonl(tmp_path / "short.jsonl", [sample("short")])
    mix("longalign-10k", tmp_path / "long.parquet", tmp_path / "short.jsonl", 0, tmp_path / "s.jsonl", progress=False)
    (row,) = [r for r in read_jsonl(tmp_path / "s.jsonl") if r["part"] == "long"]
    assert row["messages"][0]["content"] == "long?" and row.get("made", "2024-01-02 00:00:00") == "2024-01-02 00:00:00"


def test_what_was_rejected_is_told_where_nothing_is_left(tmp_path):
    write_jsonl(tmp_path / "long.jsonl", [{"id": "x", "text": "no messages"}])
    write_jsonl(tmp_path / "short.jsonl", [sample("short")])
    with pytest.raises(ValueError, match=r"there is none.*1 rows were rejected, first long\.jsonl:1: "):
        mix("longalign-10k", tmp_path / "long.jsonl", tmp_path / "short.jsonl", 0, tmp_path / "s.jsonl", progress=False)
    (tmp_path / "bad.parquet").write_bytes(b"no data")
    with pytest.raises(ValueError, match=r"bad\.parquet: cannot be read as Parquet"):
        mix("longalign-10k", tmp_path / "bad.parquet", tmp_path / "short.jsonl", 0, tmp_path / "s.jsonl", progress=False)
