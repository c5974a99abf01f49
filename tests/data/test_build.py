"""A build accounts for everything it read, does not depend on order, and survives being killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from longalign_lib.data import collect as C
from longalign_lib.data import hub
from longalign_lib.data.build import build_documents
from longalign_lib.data.jsonl import read_jsonl
from longalign_lib.data.sampling import key_of, law

FILES = ("documents.jsonl", "rejected.jsonl", "cleaned.jsonl", "report.json")


class Words:
    """A tokenizer whose tokens are words."""

    name_or_path = "words"

    def __call__(self, text, **_):
        return {"input_ids": text.split()}

    def __len__(self):
        return 1000


def pages(n: int, seed: int, chinese: bool = False) -> list[dict]:
    """n pages of 5 to 120 words, each text its own."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        words = [draw.choice("零一二三四五六七八九") * 2 if chinese else f"w{draw.randrange(5000)}x" for _ in range(draw.randint(5, 120))]
        rows.append({"url": f"u{seed}-{i}", "id": f"u{seed}-{i}", "title": f"T{i}", "text": " ".join(words)})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loader_of(folder: Path, after: int | None = None):
    """Streams folder/<dataset's owner>/*.jsonl; with `after`, the connection breaks once that many rows were read."""
    state = {"rows": 0, "opened": 0}

    def check(row):
        state["rows"] += 1
        if after is not None and state["rows"] > after:
            raise ConnectionError("the network went away")
        return row

    def load(dataset, config, *, split, streaming):
        state["opened"] += 1
        files = sorted(map(str, (folder / dataset.split("/")[0]).glob("*.jsonl")))
        return datasets.load_dataset("json", data_files=files, split="train", streaming=True).map(check)

    load.state = state
    return load


@pytest.fixture
def web(tmp_path):
    """Three shards of C4 and two of SkyPile, with faults."""
    folder = tmp_path / "web"
    rows = pages(400, 1)
    rows[7]["text"], rows[8]["text"], rows[9]["text"] = "", rows[10]["text"] + "\u200b", "这是中文。" * 30
    for shard in range(3):
        write(folder / "allenai" / f"{shard}.jsonl", rows[shard::3])
    for shard in range(2):
        write(folder / "Skywork" / f"{shard}.jsonl", pages(60, 2, chinese=True)[shard::2])
    return folder


def build(out, readers, **more):
    given = {"n": 60, "min_tokens": 20, "max_tokens": 100, "tokenizer": Words(), "progress": False} | more
    return build_documents(out, readers, **given)


def contents(out: Path) -> dict[str, str]:
    return {name: (out / name).read_text() for name in FILES}


# -------------------------------------------------------------------------------------------------------------- the whole
def test_everything_read_is_accounted_for(web, tmp_path):
    mine = tmp_path / "mine"
    twin = " ".join(f"t{i}" for i in range(60))
    twins = [{"id": "twin", "text": twin + "\u200b"}, {"id": "twin2", "text": twin.upper() + "."}]
    write(mine / "a.jsonl", [*pages(30, 3), pages(30, 3)[4], {"text": "\ud800 bad " * 30}, *twins])
    (mine / "long.txt").write_text("word " * 500)
    (mine / "image.png").write_bytes(b"\x89PNG")
    path, rejected, report = build(tmp_path / "out", ["c4", "wudao", f"notes={mine}"], loader=loader_of(web))
    documents = read_jsonl(path)
    assert len(documents) == len({d["id"] for d in documents}) == 60 and report["got"].sum() == report["wanted"].sum() == 60
    assert set(documents[0]) == {"id", "text", "source", "language", "title", "licence", "tokens"}
    assert all(20 <= d["tokens"] == len(d["text"].split()) <= 100 for d in documents)
    assert sum(d["language"] == "zh" for d in documents) == 6 == report[report["language"] == "zh"]["got"].sum()
    assert {d["source"] for d in documents} == {"c4", "wudao", "notes"}
    readers = {row["reader"].split("-")[0]: row for row in report.attrs["readers"]}
    notes = read_jsonl(rejected)
    duplicates = [note for note in notes if "duplicate_of" in note]
    for row in readers.values():
        assert row["read"] == row["short"] + row["long"] + row["not_drawn"] + row["candidates"] + row["repeated"]
        mine_ = [note for note in notes if note.get("reader") == row["reader"]]
        assert row["rejected"] == len(mine_)
    assert readers["c4"]["rows"] == 400 == readers["c4"]["read"] + 2 and readers["wudao"]["rows"] == 60
    assert sum(row["got"] for row in readers.values()) == 60
    reasons = " ".join(note["reason"] for note in notes)
    for word in ("empty document", "language is zh", "duplicate id", "lone surrogate", "suffix '.png'", "near-duplicate of twin (Jaccard 1.000)"):
        assert word in reasons, word
    long = 1 + sum(len(page["text"].split()) > 100 for page in pages(30, 3))
    assert [note["id"] for note in duplicates] == ["twin2"] and readers["notes"]["long"] == long
    cleaned = read_jsonl(tmp_path / "out" / "cleaned.jsonl")
    assert {(note["id"], tuple(note["removed"].items())) for note in cleaned} == {
        ("c4:u1-8", (("U+200B", 1),)), ("twin", (("U+200B", 1),)),
    }  # fmt: skip
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["near_duplicates"] == len(duplicates) and sum(row["got"] for row in told["strata"]) == 60


def test_lengths_are_spread_as_wanted_and_the_best_keys_are_taken(tmp_path):
    rows = pages(3000, 5)
    write(tmp_path / "in" / "a.jsonl", rows)
    path, _, report = build(tmp_path / "out", [str(tmp_path / "in")], n=210, chinese=None, max_tokens=119, threshold=None)
    assert report["got"].tolist() == report["wanted"].tolist() == [30] * 7
    lengths = law(20, 119)
    expected = set()
    for bucket in range(7):  # oracle: all keys at once
        inside = [row["id"] for row in rows if lengths.bucket(len(row["text"].split())) == bucket]
        expected |= set(sorted(inside, key=lambda id: -key_of(0, id))[:30])
    assert {d["id"] for d in read_jsonl(path)} == expected
    power = build(tmp_path / "power", [str(tmp_path / "in")], n=300, spread="power", power=3.0, chinese=None)[0]
    flat = build(tmp_path / "flat", [str(tmp_path / "in")], n=300, spread="power", power=0.0, chinese=None)[0]
    means = [sum(d["tokens"] for d in read_jsonl(p)) / 300 for p in (power, flat)]
    assert means[0] > means[1] + 10


def test_the_order_of_files_and_rows_does_not_matter(tmp_path):
    rows = pages(500, 6)
    write(tmp_path / "a" / "x.jsonl", rows)
    random.Random(0).shuffle(rows)
    for i in range(4):
        write(tmp_path / "b" / f"{i}.jsonl", rows[i::4])
    first, second = (read_jsonl(build(tmp_path / f"out{f}", [str(tmp_path / f)])[0]) for f in "ab")
    assert first == second and len(first) == 60
    other = read_jsonl(build(tmp_path / "outc", [str(tmp_path / "b")], seed=1)[0])
    assert {d["id"] for d in other} != {d["id"] for d in first}


def test_two_readers_whose_files_have_the_same_names_lose_none(tmp_path):
    rng = random.Random(0)
    texts = {(folder, i): " ".join(f"{folder}{rng.randrange(10**6)}" for _ in range(40)) for folder in "ab" for i in range(10)}
    for (folder, i), text in texts.items():
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{i}.txt").write_text(text)
    path, rejected, report = build(tmp_path / "out", [f"one={tmp_path / 'a'}", f"two={tmp_path / 'b'}"], n=20, chinese=None)
    documents = read_jsonl(path)
    assert {d["text"] for d in documents} == set(texts.values()) and len({d["id"] for d in documents}) == 20
    assert not read_jsonl(rejected) and [row["got"] for row in report.attrs["readers"]] == [10, 10]


# ------------------------------------------------------------------------------------------------------- killed and rerun
def test_a_rerun_reads_nothing_again_and_a_changed_wish_does(web, tmp_path):
    load, out = loader_of(web), tmp_path / "out"
    build(out, ["c4", "wudao"], loader=load)
    first, rows = contents(out), load.state["rows"]
    assert build(out, ["c4", "wudao"], loader=load)[2].attrs["readers"][0]["got"] > 0
    assert contents(out) == first and load.state["rows"] == rows == 460
    assert sorted(p.name for p in (out / "parts").iterdir()) == sorted(
        f"{name}.{kind}" for name in ("c4", "wudao") for kind in ("json", "jsonl", "rejected.jsonl", "cleaned.jsonl")
    )
    build(out, ["c4", "wudao"], loader=load, max_tokens=90)
    assert load.state["rows"] == 2 * rows and contents(out) != first
    mine = tmp_path / "mine"
    write(mine / "a.jsonl", pages(50, 8))
    one = read_jsonl(build(tmp_path / "m", [str(mine)], n=5)[0])
    write(mine / "b.jsonl", pages(50, 9))
    assert read_jsonl(build(tmp_path / "m", [str(mine)], n=5)[0]) != one  # the folder has changed


@pytest.mark.parametrize("after", [1, 95, 250, 399])
def test_a_stream_goes_on_where_the_network_went_away(web, tmp_path, monkeypatch, after):
    monkeypatch.setattr(C, "NOTE_EVERY", 30)
    monkeypatch.setattr(C, "BATCH", 10)
    whole = tmp_path / "whole"
    build(whole, ["wudao", "c4"], loader=loader_of(web), n=20)
    broken, out = loader_of(web, after=60 + after), tmp_path / "out"
    with pytest.raises(hub.SourceError, match=r"1 of 2 readers failed; the others' parts are kept.*c4 broke off after"):
        build(out, ["wudao", "c4"], loader=broken, n=20)
    assert (out / "parts" / "wudao.json").is_file() and not (out / "documents.jsonl").exists()
    again = loader_of(web)
    build(out, ["wudao", "c4"], loader=again, n=20)
    assert contents(out) == contents(whole)
    noted = after // 30 * 30 if after >= 50 else 0
    assert again.state["rows"] <= 400 - noted + 60  # rows read ahead within a batch of the file come again


def test_a_spool_that_was_lost_is_made_again(web, tmp_path, monkeypatch):
    monkeypatch.setattr(C, "NOTE_EVERY", 30)
    monkeypatch.setattr(C, "BATCH", 10)
    build(tmp_path / "whole", ["c4"], loader=loader_of(web))
    with pytest.raises(hub.SourceError):
        build(tmp_path / "out", ["c4"], loader=loader_of(web, after=200))
    (tmp_path / "out" / "parts" / "c4.spool").unlink()
    build(tmp_path / "out", ["c4"], loader=loader_of(web))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_for_real(web, tmp_path):
    """SIGKILL in the middle of a stream, twice; the third run ends with the files of an undisturbed one."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_build as T\nfrom longalign_lib.data import collect as C\n"
        "C.NOTE_EVERY, C.BATCH = 40, 10\ntake = C.Pool.take\n"
        "def slow(self, batch):\n    take(self, batch)\n    print('took', flush=True)\n    time.sleep(0.03)\n"
        "C.Pool.take = slow\n"
        "T.build(Path(sys.argv[1]), ['c4', 'wudao'], loader=T.loader_of(Path(sys.argv[2])))\n"
    )
    out = tmp_path / "out"
    for batches in (9, 12):
        process = subprocess.Popen([sys.executable, program, out, web], stdout=subprocess.PIPE, text=True)
        for _ in range(batches):
            assert process.stdout.readline() == "took\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        assert (out / "parts" / "c4.place").is_file() and not (out / "documents.jsonl").exists()
    subprocess.run([sys.executable, program, out, web], check=True, capture_output=True)
    build(tmp_path / "whole", ["c4", "wudao"], loader=loader_of(web))
    assert contents(out) == contents(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------------- the pieces
def test_what_is_at_hand(tmp_path, tokenizer):
    given = {"n": 30, "min_tokens": 1000, "max_tokens": 8000, "tokenizer": tokenizer}
    documents = read_jsonl(build(tmp_path, ["samples", "python"], **given)[0])
    assert len(documents) == 30 and sum(d["language"] == "zh" for d in documents) == 3
    assert all(d["licence"] and 1000 <= d["tokens"] <= 8000 for d in documents)


def test_names_of_readers(tmp_path):
    assert C.kind_of("c4") == ("hub", "c4", "") and C.kind_of("python") == ("hand", "python", "")
    assert C.kind_of(str(tmp_path)) == ("folder", "local", str(tmp_path))
    assert C.kind_of(f"my-notes={tmp_path}") == ("folder", "my-notes", str(tmp_path))
    with pytest.raises(ValueError, match="'books3' is neither a source nor a folder; accepted: arxiv, books"):
        C.kind_of("books3")


def test_what_cannot_be(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("far too short")
    mine = [str(tmp_path / "in")]
    for readers, more, message in (
        (mine, {"n": 0}, "n is 0"), (mine, {"seed": -1}, "seed is -1"), ([], {}, "at least one"), (mine * 2, {}, "each once"),
        (mine, {"threshold": 0}, "threshold is 0"), (mine, {"over_long": "wrap"}, "'wrap'; accepted: drop, cut"),
        (["nowhere"], {}, "'nowhere' is neither"), (mine, {"min_tokens": 9, "max_tokens": 3}, "min_tokens 9"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            build(tmp_path / "out", readers, **more)
    with pytest.raises(ValueError, match=r"no document of 20 to 100 tokens was found; widen") as error:
        build(tmp_path / "out", mine)
    assert "short" in str(error.value)
    with pytest.raises(hub.SourceError, match=r"1 of 2 readers failed.*HF_HUB_OFFLINE is set"):
        build(tmp_path / "out", ["c4", *mine])
