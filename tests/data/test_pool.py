"""What a pass keeps: long texts are cut within the range, and very long ones are not counted to their end."""

from __future__ import annotations

from longalign_lib.data.documents import Document
from longalign_lib.data.folders import read_folder
from longalign_lib.data.jsonl import read_jsonl
from longalign_lib.data.pool import Pool, Wish
from longalign_lib.data.sampling import law
from longalign_lib.data.text import token_ids


class Words:
    """A tokenizer whose tokens are words."""

    name_or_path = "words"

    def __call__(self, text, **_):
        return {"input_ids": text.split()}

    def __len__(self):
        return 1000


def test_long_ones_are_cut_to_lengths_over_the_whole_range(tmp_path, tokenizer):
    sentence = "The harbour master wrote the height of the tide into the book. "
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"Book {i}. " + sentence * (120 + i))
    wish = Wish(law(100, 800), 100, seed=0, over_long="cut")
    with Pool(tmp_path / "part", wish, tokenizer) as pool:
        documents = read_folder(tmp_path)[0]
        pool.take([d for d in documents if d.id.endswith(".txt")])
        index = pool.finish()
    by_id = {d.id: d.text for d in documents}
    records = read_jsonl(tmp_path / "part.jsonl")
    assert pool.counts["cut"] == len(index) == 60 and pool.counts["long"] == 0
    for record in records:
        assert by_id[record["id"]].startswith(record["text"]) and record["tokens"] == len(token_ids(tokenizer, record["text"]))
    assert min(r["tokens"] for r in records) < 250 and max(r["tokens"] for r in records) > 650
    # texts of which 16 characters are not a token, and of which a token holds less than a character
    odd = [Document("spaced", ("word." + " " * 60) * 3000, "local", "en"), Document("birds", "\U00013000" * 400, "local", "en")]
    with Pool(tmp_path / "odd", Wish(law(1, 2), 9, seed=0, over_long="cut"), tokenizer) as pool:
        pool.take(odd)
        assert {row[0] for row in pool.finish()} == {"spaced"} and pool.counts["short"] == 1
    with Pool(tmp_path / "odd", Wish(law(100, 800), 9, seed=0, over_long="cut"), tokenizer) as pool:
        pool.take(odd)
        assert {row[0] for row in pool.finish()} == {"spaced", "birds"}


def test_a_very_long_text_is_not_counted_to_its_end(tmp_path):
    counted = []

    class Noting(Words):
        def __call__(self, text, **more):
            counted.append(len(text))
            return super().__call__(text, **more)

    texts = {"many": "w " * 5000, "few": ("x" * 200 + " ") * 50, "fits": "w " * 60}
    with Pool(tmp_path / "part", Wish(law(20, 100), 9, seed=0), Noting()) as pool:
        pool.take([Document(id, text, "local", "en") for id, text in texts.items()])
        assert [row[:4] for row in pool.finish()] == [["few", "local", "en", 50], ["fits", "local", "en", 60]]
    assert pool.counts["long"] == 1 and max(counted) == len(texts["few"]) > 1212 == counted[0]
