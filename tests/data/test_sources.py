"""The nine sources, streamed from local files in their schemas: no network is needed, every row has one fate."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longalign_lib.data import hub
from longalign_lib.data import sources as S
from longalign_lib.data.documents import SOURCES

EN, ZH = "Plain English words, and some more of them.", "这里有一些中文的句子，还有更多。"


def schema_row(name: str, i: int) -> dict:
    """A row in the columns of the source's dataset, as its card has them."""
    text = f"{ZH if SOURCES[name][1] == 'zh' else EN} {i}"
    return {
        "arxiv": {"id": f"a{i}", "text": text, "source": "arxiv", "created": "2020", "metadata": {"license": "CC BY", "url": "u"}},
        "books": {"short_book_title": f"Book {i}", "publication_date": 1900, "url": f"b{i}", "text": text},
        "c4": {"url": f"c{i}", "text": text, "timestamp": "2019"},
        "clue": {"text": text, "id": f"f{i}", "dump": "d", "url": "u", "language": "cmn", "minhash_cluster_size": 1},
        "commoncrawl": {"text": text, "id": f"w{i}", "dump": "d", "url": "u", "token_count": 3},
        "github": {"repo_name": "r", "path": f"m{i}.py", "content": f"x = {i}  # number", "license": "mit", "hash": f"g{i}"},
        "stackexchange": {"id": f"s{i}", "text": text, "source": "se", "metadata": {"license": "CC BY-SA 4.0", "site": "x"}},
        "wikipedia": {"id": str(i), "url": f"k{i}", "title": f"Title {i}", "text": text},
        "wudao": {"text": text},
    }[name]


def loader_of(folder, rows_per_shard: int = 20, shards: int = 3, kind: str = "parquet"):
    """Stands for `datasets.load_dataset`: writes rows in the source's schema, then streams the files."""
    by_dataset = {(s.dataset, s.config): s for s in S.REGISTRY.values()}
    calls = []

    def load(dataset, config, *, split, streaming):
        source = by_dataset[dataset, config]
        calls.append(source.name)
        assert split == "train" and streaming
        for shard in range(shards):
            rows = [schema_row(source.name, shard * rows_per_shard + i) for i in range(rows_per_shard)]
            path = folder / f"{source.name}-{shard}.{'parquet' if kind == 'parquet' else 'jsonl'}"
            if kind == "parquet":
                pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = sorted(str(p) for p in folder.glob(f"{source.name}-*"))
        return datasets.load_dataset(kind, data_files=files, split="train", streaming=True)

    load.calls = calls
    return load


def test_the_registry_names_what_a_reader_must_know():
    assert set(S.REGISTRY) == set(SOURCES)
    for name, source in S.REGISTRY.items():
        assert source.name == name and source.language == SOURCES[name][1] and source.licence and source.dataset.count("/") == 1
        assert source.verified or source.note, f"{name}: say what was not verified"
        assert "books3" not in source.dataset.lower()
    assert {n for n, s in S.REGISTRY.items() if s.stand_in} == {"books", "clue", "wudao"}
    assert "not to be used" in S.REGISTRY["books"].stand_in
    table = S.table()
    assert list(table["source"]) == list(S.REGISTRY) and {"holds", "dataset", "licence", "verified"} <= set(table)
    with pytest.raises(ValueError, match="source 'books3' is unknown; accepted: arxiv, books"):
        next(S.stream("books3", 0, rejected=[]))


@pytest.mark.parametrize("kind", ["parquet", "json"])
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_source_in_its_own_schema(tmp_path, name, kind):
    rejected: list[dict] = []
    documents = list(S.stream(name, 0, rejected=rejected, loader=loader_of(tmp_path, kind=kind)))
    assert rejected == [] and len(documents) == len({d.id for d in documents}) == 60
    expected = [schema_row(name, i) for i in range(60)]
    assert {d.text for d in documents} == {row.get("text", row.get("content")) for row in expected}
    assert all(d.source == name and d.language == SOURCES[name][1] and d.id.startswith(f"{name}:") for d in documents)
    licences = {"arxiv": "CC BY", "stackexchange": "CC BY-SA 4.0", "github": "mit"}
    assert {d.licence for d in documents} == {licences.get(name, S.REGISTRY[name].licence)}
    titles = {"books": "Book 7", "wikipedia": "Title 7", "github": "m7.py"}
    assert name not in titles or titles[name] in {d.title for d in documents}


def test_rows_that_are_no_documents():
    rejected, cleaned = [], []
    rows = [
        {"content": "x = 1", "license": "mit", "hash": "1"}, {"content": "x = 2", "license": "gpl-3.0", "hash": "2"},
        {"content": None, "license": "mit", "hash": "3"}, {"text": "x"}, {"content": "这是中文注释", "license": "mit", "hash": "5"},
        {"content": "y" * 101, "license": "mit", "hash": "6"}, {"content": " ", "license": "mit", "hash": "7"},
        {"content": "z\u200b = 1", "license": "isc", "hash": None}, {"content": "a\x00", "license": "mit", "hash": "9"}, "no record",
        {"content": "half \ud800", "license": "mit", "hash": "\ud800"},
    ]  # fmt: skip
    kept = list(S.documents_of(S.get("github"), rows, rejected, cleaned, max_bytes=100))
    assert [d.text for d in kept] == ["x = 1", "z = 1"] and kept[0].id == "github:1"
    assert cleaned == [{"id": kept[1].id, "removed": {"U+200B": 1}}]
    words = ("license is 'gpl-3.0'", "no text in column", "no text in column", "language is zh", "101 characters", "empty")
    for note, word in zip(rejected, (*words, "zero byte", "(columns: str)", "surrogate")):
        assert word in note["reason"]
    assert len(rejected) == 9
    json.dumps(rejected, ensure_ascii=False).encode()
    # an id that a row lacks comes from its text, wherever it stands
    again = list(S.documents_of(S.get("github"), rows[::-1], [], None, max_bytes=100))
    assert {d.id for d in again} == {d.id for d in kept}


# ------------------------------------------------------------------------------------------------------------------ order
def shards(tmp_path, sizes):
    for number, size in enumerate(sizes):
        ids = [f"{number}-{i}" for i in range(size)]
        pq.write_table(pa.table({"id": ids}), tmp_path / f"{number}.parquet", row_group_size=3)
    files = sorted(str(p) for p in tmp_path.glob("*.parquet"))
    return lambda *_, **__: datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)


@pytest.mark.parametrize("ways", [1, 2, 8])
def test_every_row_once_and_the_place_is_exact(tmp_path, ways):
    load = shards(tmp_path, [7, 2, 1, 10, 5])
    rows = [row["id"] for row in hub.open_rows("x", seed=3, ways=ways, loader=load)]
    assert len(rows) == len(set(rows)) == 25
    assert rows == [row["id"] for row in hub.open_rows("x", seed=3, ways=ways, loader=load)]
    for taken in range(0, 26, 3):
        stream = hub.open_rows("x", seed=3, ways=ways, loader=load)
        iterator = iter(stream)
        assert [next(iterator)["id"] for _ in range(taken)] == rows[:taken]
        place = json.loads(json.dumps(stream.state_dict()))
        again = hub.open_rows("x", seed=3, ways=ways, loader=load)
        again.load_state_dict(place)
        assert [row["id"] for row in again] == rows[taken:], f"after {taken} rows"
    if ways > 1:
        assert len({row.split("-")[0] for row in rows[:2]}) == 2  # several shards from the start
        with pytest.raises(ValueError, match=r"5 shards read .* ways, this stream has 5 read 1 ways"):
            hub.open_rows("x", seed=3, ways=1, loader=load).load_state_dict(place)


def test_seeds_buffers_and_limits(tmp_path):
    load = loader_of(tmp_path)
    orders = {tuple(d.id for d in S.stream("c4", seed, rejected=[], loader=load, ways=1)) for seed in range(6)}
    assert len(orders) > 1 and len({frozenset(order) for order in orders}) == 1
    plain = [d.id for d in S.stream("c4", 0, rejected=[], loader=load)]
    mixed = [d.id for d in S.stream("c4", 0, rejected=[], loader=load, buffer=10)]
    assert mixed != plain and sorted(mixed) == sorted(plain)
    assert mixed == [d.id for d in S.stream("c4", 0, rejected=[], loader=load, buffer=10)]
    assert [d.id for d in S.stream("c4", 0, rejected=[], loader=load, limit=5)] == plain[:5]
    assert list(hub.buffered([], 4, 0)) == [] and sorted(hub.buffered([1, 2], 4, 0)) == [1, 2]


# ----------------------------------------------------------------------------------------------------------------- faults
def test_without_a_network_the_error_says_what_to_use():
    assert datasets.config.HF_HUB_OFFLINE
    with pytest.raises(hub.SourceError, match=r"allenai/c4 cannot be opened: HF_HUB_OFFLINE is set.*read_samples.*read_folder"):
        next(S.stream("c4", 0, rejected=[]))


def test_opening_is_tried_again_and_gives_up(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    waits: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    good, failures = loader_of(tmp_path), []

    def flaky(*args, **kwargs):
        if len(failures) < 2:
            failures.append(1)
            raise ConnectionError("reset by peer")
        return good(*args, **kwargs)

    assert len(list(S.stream("c4", 0, rejected=[], loader=flaky))) == 60 and waits == [2.0, 4.0]

    def gated(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("gated: accept its terms")

    def broken(*_, **__):
        raise ConnectionError("no route")

    with pytest.raises(hub.SourceError, match="DatasetNotFoundError: gated: accept its terms"):
        next(S.stream("c4", 0, rejected=[], loader=gated))
    waits.clear()
    with pytest.raises(hub.SourceError, match="ConnectionError: no route"):
        next(S.stream("c4", 0, rejected=[], loader=broken))
    assert len(waits) == 2


def test_a_network_that_goes_away_is_an_error_and_a_broken_shard_is_not(tmp_path):
    def rows(error):
        yield {"text": "one"}
        raise error

    with pytest.raises(hub.SourceError, match=r"c4 broke off after 1 rows: timed out\. Run again to go on"):
        list(hub.reading("c4", rows(TimeoutError("timed out"))))

    page = '{"url": "%s", "text": "A page of words."}\n'
    texts = {"a": "".join(page % f"a{i}" for i in range(3)), "b": page % "b0" + '{"url": "b1", "te', "c": page % "c0"}
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(text)

    def load(*_, **__):
        files = sorted(map(str, tmp_path.glob("*.jsonl")))
        return datasets.load_dataset("json", data_files=files, split="train", streaming=True)

    for ways in (1, 3):
        rejected: list[dict] = []
        found = {d.id for d in S.stream("c4", 0, rejected=rejected, loader=load, ways=ways)}
        assert found >= {"c4:a0", "c4:a1", "c4:a2", "c4:c0"} and len(rejected) == 1
        assert rejected[0]["id"] == "shard 1" and "cannot be parsed on" in rejected[0]["reason"]
    with pytest.raises(Exception, match="JSON"):
        list(hub.open_rows("x", loader=load))
