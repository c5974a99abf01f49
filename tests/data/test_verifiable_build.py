"""Files of verifiable samples: shares, kills, growth, and no continuing with other settings."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from longalign_lib.data import verifiable_build
from longalign_lib.data.documents import Document, python_source, python_topics, read_samples
from longalign_lib.data.jsonl import read_jsonl
from longalign_lib.data.tokens import encode_chat
from longalign_lib.data.verifiable_build import build_verifiable, faults
from longalign_lib.data.verifiable_items import ALL_KINDS


@pytest.fixture(scope="module")
def documents():
    return read_samples()[0][:12] + python_topics()[:12] + python_source()[:2]


@pytest.fixture(scope="module")
def built(documents, tokenizer, tmp_path_factory):
    return build_verifiable(documents, tokenizer, tmp_path_factory.mktemp("v") / "v.jsonl", 150, seed=1, high=1200)


def test_every_sample_is_sound_and_all_kinds_and_languages_are_there(built, tokenizer):
    samples = read_jsonl(built)
    assert len(samples) == 150 == len({s["prompt_hash"] for s in samples})
    assert {s["task"] for s in samples} == {f"verifiable:{k}" for k in ALL_KINDS}
    languages = Counter(s["language"] for s in samples)
    assert set(languages) == {"en", "zh"} and 4 <= languages["zh"] <= 28  # one in ten, as in the paper
    for s in samples:
        assert not faults(s) and 256 <= s["length"] <= 1200
        assert s["length"] == len(encode_chat(tokenizer, s["messages"])[0])
    code = [s for s in samples if s["task"].endswith(":code")]
    real = [s for s in code if "```python\ndef" not in s["messages"][0]["content"]]
    assert 0 < len(real) < len(code)
    assert sorted(p.name for p in built.parent.iterdir()) == ["v.jsonl", "v.settings.json"]


def test_faults_are_found(built):
    s = read_jsonl(built)[0] | {"task": "verifiable:retrieve", "expected": ["48213"], "wrong": [], "pairs": []}

    def chat(user, answer):
        return s | {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}

    assert faults(chat("The code is 48213.\n\nWhich code?", "48213")) == ""
    assert "marked wrong" in faults(chat("The code is 48213.\n\nWhich code?", "48214"))
    assert "holds the answer" in faults(chat("The code is 48213.\n\nIs it 48213?", "48213"))
    assert "does not stand" in faults(chat("The code is lost.\n\nWhich code?", "48213"))
    assert "more than once" in faults(chat("It is 48213. 48213 it is.\n\nWhich code?", "48213"))


def test_a_file_grows_to_what_one_run_would_have_written(built, documents, tokenizer, tmp_path):
    path = tmp_path / "v.jsonl"
    for n in (20, 150, 150):
        build_verifiable(documents, tokenizer, path, n, seed=1, high=1200)
        assert path.read_bytes() == b"".join(built.read_bytes().splitlines(keepends=True)[:n])
    other = build_verifiable(documents, tokenizer, tmp_path / "other.jsonl", 20, seed=2, high=1200)
    assert other.read_bytes() != b"".join(built.read_bytes().splitlines(keepends=True)[:20])


def test_a_torn_line_is_made_again(built, documents, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "v.jsonl"
    (tmp_path / "v.settings.json").write_bytes(built.with_suffix(".settings.json").read_bytes())
    lines = built.read_bytes().splitlines(keepends=True)
    (tmp_path / "v.jsonl.part").write_bytes(b"".join(lines[:145]) + lines[145][:77])
    drawn = []
    one = verifiable_build.draw_sample
    monkeypatch.setattr(verifiable_build, "draw_sample", lambda *a: drawn.append(1) or one(*a))
    build_verifiable(documents, tokenizer, path, 150, seed=1, high=1200)
    assert path.read_bytes() == built.read_bytes() and 5 <= len(drawn) < 10


KILLED = """
import sys
from longalign_lib.data.documents import python_topics, read_samples
from longalign_lib.data.verifiable_build import build_verifiable
from longalign_lib.models import load_tokenizer
build_verifiable(read_samples()[0][:12] + python_topics()[:8], load_tokenizer(), sys.argv[1], 900, seed=3, high=1200, progress=False)
"""


def test_killed_and_run_again_it_writes_the_same_file(root, tokenizer, tmp_path):
    (tmp_path / "run.py").write_text(KILLED)
    part = tmp_path / "killed.jsonl.part"
    process = subprocess.Popen([sys.executable, tmp_path / "run.py", tmp_path / "killed.jsonl"], cwd=root)
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.read_bytes().count(b"\n") >= 30):
        assert process.poll() is None and time.monotonic() < deadline, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL and not (tmp_path / "killed.jsonl").exists()
    stood = part.read_bytes().count(b"\n")
    documents, n = read_samples()[0][:12] + python_topics()[:8], max(120, stood)
    options = {"seed": 3, "high": 1200}
    again = build_verifiable(documents, tokenizer, tmp_path / "killed.jsonl", n, **options)
    whole = build_verifiable(documents, tokenizer, tmp_path / "whole.jsonl", n, **options)
    assert again.read_bytes() == whole.read_bytes() and stood >= 30


def test_languages_are_a_choice(documents, tokenizer, tmp_path):
    def count(name, languages, found=documents):
        path = build_verifiable(found, tokenizer, tmp_path / name, 30, high=600, languages=languages, kinds=("retrieve",))
        return Counter(s["language"] for s in read_jsonl(path))

    assert count("zh", ["zh"]) == {"zh": 30} and count("en", {"en": 2.0, "zh": 0.0}) == {"en": 30}
    assert 8 <= count("both", ["en", "zh"])["zh"] <= 22
    assert count("only", None, [d for d in documents if d.language == "en"]) == {"en": 30}


def test_what_cannot_be_built_is_said(built, documents, tokenizer, tmp_path):
    english = [d for d in documents if d.language == "en"]

    def build(found=documents, n=5, path=tmp_path / "x.jsonl", **more):
        return build_verifiable(found, tokenizer, path, n, **more)

    for change, says in (
        ({"kinds": ("riddle",)}, r"\['riddle'\] unknown; accepted: retrieve"),
        ({"found": []}, "no documents given"),
        ({"n": 0}, "n is 0; give at least 1"),
        ({"low": 900, "high": 300}, "min_tokens 900 and max_tokens 300"),
        ({"languages": ["fr"]}, "language 'fr' is unknown; accepted: en, zh"),
        ({"languages": {"en": -1.0, "zh": 2.0}}, "are no shares"),
        ({"found": english, "languages": ["zh"]}, "no document is in 'zh'; add some, or ask for en alone"),
        ({"path": built, "n": 100, "seed": 1, "high": 1200}, "holds 150 samples already, 100 are wanted"),
        ({"path": built, "n": 200, "seed": 2, "high": 1200}, r"begun with another value of seed \(1, now 2\)"),
        ({"path": built, "n": 200, "seed": 1, "high": 1200, "found": documents[:-1]}, "begun with another value of documents"),
    ):
        with pytest.raises(ValueError, match=says):
            build(**change)
    one = [Document("d", "One short sentence stands here. " * 12, "local", "en")]
    with pytest.raises(ValueError, match="could be built"):
        build(one, low=2000, high=3000)
    (tmp_path / "begun.jsonl.part").write_text("{}\n")
    with pytest.raises(ValueError, match=r"begun.settings.json is missing"):
        build(path=tmp_path / "begun.jsonl")
    settings = json.loads(built.with_suffix(".settings.json").read_text())
    assert "/" not in json.dumps(settings).replace("\\/", "")  # no path of this machine
