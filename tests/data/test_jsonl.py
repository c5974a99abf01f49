"""JSONL in and out: bad lines are named by file and number, writes are whole, appends survive a torn line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.data.jsonl import JsonlError, append_jsonl, iter_jsonl, read_jsonl, write_jsonl

RECORDS = [{"a": 1}, {"text": "中文 \u2028 line\nbreak"}, {}]


def test_round_trip_and_append(tmp_path):
    path = write_jsonl(tmp_path / "new" / "x.jsonl", RECORDS)
    append_jsonl(path, {"b": 2})
    assert read_jsonl(path) == [*RECORDS, {"b": 2}]
    assert list(tmp_path.glob("new/*")) == [path]  # no partial file stays
    assert len(path.read_bytes().splitlines()) == 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=3), max_size=5))
def test_any_records_come_back(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("h") / "x.jsonl"
    try:
        json.dumps(records, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # lone surrogates are no text
        return
    assert read_jsonl(write_jsonl(path, records)) == records


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b"{'a': 1}\n", "not valid JSON"),
        (b"[1, 2]\n", "holds a JSON list"),
        (b"\xff\xfe{}\n", "not UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_its_file_number_and_fix(tmp_path, line, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line)
    with pytest.raises(JsonlError, match="rows.jsonl, line 3 .*" + says + "(?s:.*)one complete JSON object"):
        read_jsonl(path)
    rejected = []
    assert read_jsonl(path, rejected) == [{"a": 1}]
    assert [r["id"] for r in rejected] == ["rows.jsonl:3"] and says in rejected[0]["reason"]


def test_a_cut_off_write_is_recognised_and_not_glued_to_the_next_record(tmp_path):
    path = tmp_path / "x.jsonl"
    append_jsonl(path, {"a": 1})
    with path.open("ab") as handle:
        handle.write(b'{"b": ')
    with pytest.raises(JsonlError, match="cut off here"):
        read_jsonl(path)
    append_jsonl(path, {"c": 3})
    rejected = []
    assert read_jsonl(path, rejected) == [{"a": 1}, {"c": 3}] and len(rejected) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"a": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": object()}])
    assert read_jsonl(path) == [{"a": 1}]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        list(iter_jsonl(tmp_path / "gone.jsonl"))


def test_numbers_and_nesting_without_end_are_bad_lines(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"a": 1}\n{"a": ' + "[" * 200_000 + "}\n" + '{"a": ' + "7" * 5000 + '}\n{"a": 2}\n')
    rejected = []
    assert [r["a"] for r in iter_jsonl(path, rejected)] == [1, 2]
    assert [r["id"] for r in rejected] == ["deep.jsonl:2", "deep.jsonl:3"] and "nested" in rejected[0]["reason"] and "digits" in rejected[1]["reason"]
    with pytest.raises(JsonlError, match="line 2 is nested too deeply"):
        list(iter_jsonl(path))
