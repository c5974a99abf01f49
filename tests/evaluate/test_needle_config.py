import math
from pathlib import Path

import pytest

from longalign_lib.evaluate.needle_config import ConfigError, haystack_of, load_config, spaced, spec_of


def test_spacing_against_the_formulas():
    assert spaced(1000, 4000, 4) == pytest.approx([1000, 2000, 3000, 4000])
    got = spaced(0, 100, 11, "sigmoid")
    published = [0 if x == 0 else 100 if x == 100 else round(100 / (1 + math.exp(-0.1 * (x - 50))), 3) for x in range(0, 101, 10)]
    assert got == pytest.approx(published, abs=6e-4)
    assert spaced(7, 7, 1) == [7]


@pytest.mark.parametrize("args", [(0, 100, 1), (5, 1, 3), (3, 3, 2), (0, 1, 0), (0, 1, 3, "log")])
def test_bad_spacing(args):
    with pytest.raises(ConfigError):
        spaced(*args)


def test_the_example_config(root):
    spec = load_config(root / "configs" / "needle.yaml")
    assert spec.lengths == (1000, 1750, 2500, 3250, 4000) and spec.depths == (0, 25, 50, 75, 100)
    assert (spec.repeats, spec.variant, spec.needles, spec.haystack) == (1, "single", None, None)


def test_published_names_are_read():
    spec = spec_of({"context": {"min_len": 1000, "max_len": 60000, "interval": 10, "manually_select_list": None},
                    "document_depth": {"min_percent": 0, "max_percent": 100, "interval": 10, "interval_type": "linear"}})  # fmt: skip
    assert spec.lengths == tuple(round(1000 + 59_000 * i / 9) for i in range(10))
    assert spec.depths == pytest.approx([100 * i / 9 for i in range(10)], abs=1e-3)
    assert spec_of({"context": {"manually_select_list": [5000, 600]}}).lengths == (5000, 600)
    assert spec_of(None).lengths == (1000, 2000, 3000, 4000)


def test_own_needle_and_haystack_folder(tmp_path):
    (tmp_path / "hay").mkdir()
    (tmp_path / "hay" / "b.txt").write_text("Second text.", encoding="utf-8")
    (tmp_path / "hay" / "a.md").write_text("First text.", encoding="utf-8")
    (tmp_path / "n.yaml").write_text(
        "prompt:\n  needle: The ferry leaves from pier nine.\n  retrieval_question: From where?\n  answer: pier nine\n"
        "  haystack_dir: hay\nrepeats: 2\nseed: 7\nmax_new_tokens: 20\n", encoding="utf-8",
    )  # fmt: skip
    spec = load_config(tmp_path / "n.yaml")
    assert spec.haystack == "First text.\n\nSecond text." and (spec.repeats, spec.seed, spec.max_new_tokens) == (2, 7, 20)
    (needle,) = spec.needles
    assert (needle.text, needle.parts, needle.variant) == ("The ferry leaves from pier nine.", ("pier nine",), "single")
    own = {"needle": ["A is 1.", "B is 2."], "retrieval_question": "A?", "answer": [1], "wrong": [2]}
    (needle,) = spec_of({"prompt": own}).needles
    assert (needle.variant, needle.others, needle.parts, needle.wrong) == ("keys", ("B is 2.",), ("1",), ("2",))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"lengths": [1]}, r"unknown key 'lengths'.*accepted: context, document_depth"),
        ({"context": {"min": 3}}, r"unknown key 'min' in context.*lengths, min_len"),
        ({"context": {"lengths": [500, 500, 600]}}, "500 more than once"),
        ({"context": {"lengths": [500], "min_len": 2}}, "lengths and min_len"),
        ({"context": {"lengths": "500"}}, "list of numbers"), ({"context": {"lengths": []}}, "list of numbers"),
        ({"context": {"min_len": "a"}}, "must be numbers"), ({"context": {"min_len": 9000}}, r"context: 4 points from 9000 to 4000"),
        ({"context": {"min_len": 10, "max_len": 12, "intervals": 9}}, "more than once"),
        ({"context": {"lengths": [0]}}, "at least 1"), ({"context": 5}, "mapping"), ([1], "mapping"),
        ({"document_depth": {"percents": [0, 101]}}, "101"), ({"document_depth": {"percents": [True]}}, "numbers"),
        ({"document_depth": {"spacing": "log"}}, r"'log'.*linear, sigmoid"), ({"document_depth": {"intervals": 2.5}}, "2.5"),
        ({"document_depth": {"interval": 3, "intervals": 3}}, "says already"),
        ({"repeats": 0}, "repeats.*1, got 0"), ({"seed": "x"}, "seed"), ({"repeats": True}, "True"),
        ({"prompt": {"variant": "hard"}}, r"'hard'.*single, several"), ({"prompt": {"language": "fr"}}, r"'fr'.*en, zh"),
        ({"prompt": {"needle": "A is 1."}}, "retrieval_question, answer"),
        ({"prompt": {"needle": "A is 1.", "retrieval_question": "A?", "answer": "2"}}, "do not hold"),
        ({"prompt": {"needle": "A is 1.", "retrieval_question": "Is A 1?", "answer": "1"}}, "holds the answer"),
        ({"prompt": {"needle": "A is 1.", "retrieval_question": "A?", "answer": "1", "variant": "chain"}}, "more sentences"),
        ({"prompt": {"needle": ["A is 1.", "B."], "retrieval_question": "A?", "answer": "1", "variant": "single"}}, "one sentence, 2"),
        ({"prompt": {"needle": "A is 1.", "retrieval_question": "A?", "answer": "1", "count": 2}}, "drawn"),
        ({"prompt": {"needle": "A is 1.", "retrieval_question": "A?", "answer": []}}, "answer"),
        ({"prompt": {"count": 0}}, "count"),
    ],
)  # fmt: skip
def test_bad_configs_name_the_key(raw, words):
    with pytest.raises(ConfigError, match=words):
        spec_of(raw)


def test_files_that_are_no_config(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("context: [1, 2", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad.yaml is not YAML"):
        load_config(bad)
    bad.write_text("seed: !!python/object/apply:os.getcwd []", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad.yaml is not YAML"):  # safe_load builds no objects
        load_config(bad)
    bad.write_text("seeds: 1", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad.yaml: unknown key 'seeds'"):
        load_config(bad)
    with pytest.raises(FileNotFoundError, match="no such config"):
        load_config(tmp_path / "none.yaml")


def test_empty_and_missing_haystacks(tmp_path):
    with pytest.raises(ConfigError, match=r"is empty \(it holds no files\)"):
        haystack_of(tmp_path)
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is empty \(a.txt: empty"):
        haystack_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        spec_of({"prompt": {"haystack_dir": "nowhere"}}, Path(tmp_path))
