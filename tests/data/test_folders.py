"""Every file and record of a folder has one fate, whatever is in it; long lines are never held in memory."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.data.folders import bounded_lines, iter_folder, read_folder


def test_a_folder_of_ones_own(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "code.py").write_text("x = 1\n")
    (tmp_path / "notes.md").write_text("这是中文。")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "rows.jsonl").write_text('{"text": "one", "id": "r1"}\n{"txt": "two"}\n{broken\n\n{"text": "four"}\n')
    documents, rejected = read_folder(tmp_path, source="wiki", language="auto")
    assert {d.id: (d.text, d.language) for d in documents} == {
        "notes.md": ("这是中文。", "zh"), "sub/code.py": ("x = 1", "en"), "r1": ("one", "en"),
        "rows.jsonl#3": ("four", "en"),
    }  # fmt: skip
    assert {d.source for d in documents} == {"wiki"}
    reasons = {r["id"]: r["reason"] for r in rejected}
    assert reasons["empty.txt"] == "empty document" and ".png" in reasons["picture.png"]
    assert "valid JSON" in reasons["rows.jsonl:3"] and 'no "text"' in reasons["rows.jsonl#1"]
    assert len(documents) + len(rejected) == 8  # 4 + 4 rows and files seen
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_folder(tmp_path / "gone")
    with pytest.raises(ValueError, match="'de' is unknown; accepted: en, zh, auto"):
        read_folder(tmp_path, language="de")


def test_files_that_each_number_their_rows_from_0_lose_none(tmp_path):
    for part in range(3):
        rows = [{"id": i, "text": f"text {part} {i}"} for i in range(4)] + [{"id": 9, "text": "the same everywhere"}]
        (tmp_path / f"part-{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    documents, rejected = read_folder(tmp_path)
    assert {d.text for d in documents} == {f"text {part} {i}" for part in range(3) for i in range(4)} | {"the same everywhere"}
    assert len({d.id for d in documents}) == len(documents) == 13 and {"0", "part-1.jsonl#0", "part-2.jsonl#3"} <= {d.id for d in documents}
    assert [(r["id"], r["reason"].split(";")[0]) for r in rejected] == [("9", "duplicate id")] * 2


def test_parquet_gzip_and_their_faults(tmp_path):
    pq.write_table(pa.table({"text": ["p0", None, "p2"], "id": [7, 8, 9], "license": ["MIT", "MIT", None]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no parquet at all")
    raw = pa.array([b"fine", b"\xff\xfe bad", b"fine too"])
    pq.write_table(pa.Table.from_arrays([raw.view(pa.string())], ["text"]), tmp_path / "d.parquet")
    lines = b"".join(json.dumps({"text": f"g{i}"}).encode() + b"\n" for i in range(2000))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "only"}\n' * 5000)[:-9])
    documents, rejected = read_folder(tmp_path)
    by_id = {d.id: d for d in documents}
    assert by_id["7"].text == "p0" and by_id["7"].licence == "MIT" and by_id["9"].licence == ""
    assert by_id["d.parquet#0"].text == "fine" and by_id["d.parquet#2"].text == "fine too"
    assert sum(d.id.startswith("e.jsonl.gz") for d in documents) == 2000
    reasons = {r["id"]: r["reason"] for r in rejected}
    assert 'no "text"' in reasons["a.parquet#1"] and 'no column "text"' in reasons["b.parquet"]
    assert "not a readable Parquet" in reasons["c.parquet"] and "not UTF-8" in reasons["d.parquet#1"]
    assert "cannot be read on after" in reasons["f.jsonl.gz"] and len(rejected) == 5


def test_lines_that_break_parsers_are_rejected_one_by_one(tmp_path):
    bad = [
        b'{"text": "cut', b"[1]", b'"text"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}",
        b'{"text": "\\ud800"}', b'{"text": 5}', b'{"text": ""}', b'{"id": "no text"}', b'{"text": "NUL \\u0000"}',
    ]  # fmt: skip
    good = b'{"text": "good", "id": "g", "title": "t\\ud800", "licence": null}'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join([good, *bad, good, b'{"text": "after"}', b'{"text": "torn']))
    documents, rejected = read_folder(tmp_path)
    assert [(d.id, d.title, d.licence) for d in documents] == [("g", "t?", ""), ("a.jsonl#14", "", "")]
    assert len(rejected) == len(bad) + 2 and any("duplicate" in r["reason"] for r in rejected)
    json.dumps(rejected, ensure_ascii=False).encode()  # can be written down


def test_a_line_of_a_hundred_megabytes_is_skipped_in_bounded_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as handle:
        handle.write(b'{"text": "before"}\n{"text": "')
        for _ in range(100):
            handle.write(b"x" * 2**20)
        handle.write(b'"}\n{"text": "after"}\n')
    rejected: list[dict] = []
    tracemalloc.start()
    documents = list(iter_folder(tmp_path, rejected, max_bytes=2**20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [d.text for d in documents] == ["before", "after"] and peak < 12 * 2**20
    assert [r["id"] for r in rejected] == ["a.jsonl:2"] and "104,857,613 bytes, the limit is 1,048,576" in rejected[0]["reason"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), max_size=8), st.integers(1, 8))
def test_bounded_lines_against_split(lines, limit):
    raw = b"\n".join(lines)
    expected = [line for line in raw.split(b"\n")]
    if expected[-1] == b"":
        expected.pop()
    got = list(bounded_lines(io.BytesIO(raw), limit))
    assert [number for number, _, _ in got] == list(range(1, len(expected) + 1))
    assert [line for _, line, _ in got] == [line if len(line) <= limit else None for line in expected]


def test_files_that_cannot_be_opened_do_not_stop_the_folder(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "folder.txt").mkdir()
    name = b"odd-\xff.txt"
    import os

    with open(os.path.join(os.fsencode(tmp_path), name), "w") as handle:
        handle.write("odd name")
    documents, rejected = read_folder(tmp_path)
    assert [d.text for d in documents] == ["fine", "odd name"] and [r["reason"] for r in rejected] == ["a link to nothing"]
    documents[1].id.encode()


def test_links_out_of_the_folder_and_to_nothing_are_rejections(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "secret.txt"
    inside.mkdir()
    outside.write_text("Not to be read by anybody.")
    (inside / "real.txt").write_text("A text of its own.")
    (inside / "out.txt").symlink_to(outside)
    (inside / "gone.txt").symlink_to(inside / "nothing.txt")
    (inside / "same.txt").symlink_to(inside / "real.txt")
    documents, rejected = read_folder(inside)
    assert "real.txt" in {d.id for d in documents} and not any("anybody" in d.text for d in documents)
    reasons = {r["id"]: r["reason"] for r in rejected}
    assert "out of the folder" in reasons["out.txt"] and "to nothing" in reasons["gone.txt"]


@pytest.mark.parametrize("text", ["\u200b\u200d\ufeff" * 50, "\u200d \n\u2060"])
def test_a_file_of_invisible_characters_is_no_document(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    documents, rejected = read_folder(tmp_path)
    assert not documents and rejected[0]["reason"].startswith("empty document")
