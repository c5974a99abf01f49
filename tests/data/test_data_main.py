"""The steps of the command line, one after the other, on small files; what can go wrong ends with one line that says the fix."""

import json
import re

import pytest
from llm_faults import PROMPT_TOKENS, FaultServer

from longalign_lib.data.__main__ import main
from longalign_lib.data.jsonl import read_jsonl, write_jsonl
from longalign_lib.data.tokens import TokenStore


def answer(body):
    """Five questions about the lighthouse, or an answer in the document's words."""
    asked = body["messages"][-1]["content"]
    page = re.search(r"Page \d", asked)[0]
    if "five" in asked[-600:]:
        return "\n".join(f"{k}. {q}" for k, q in enumerate(
            ("Who keeps the lighthouse of Skerry?", "How high is the tower of Skerry?", "When was the lamp of Skerry lit?",
             "What does the boat of Skerry bring?", "Why was the horn of Skerry moved?"), start=1))  # fmt: skip
    return f"{page}: Margaret keeps the lighthouse of Skerry, the tower is 31 metres high, and the boat brings oil and bread."


TEXT = ("Margaret keeps the lighthouse of Skerry. The tower is 31 metres high. The lamp was lit in 1874. The boat brings oil and "
        "bread. The horn was moved because of the wind. ") * 12  # fmt: skip


@pytest.fixture
def pages(tmp_path):
    rows = [{"id": f"d{k}", "text": f"Page {k}. {TEXT}", "source": "books", "language": "en"} for k in range(4)]
    return str(write_jsonl(tmp_path / "documents.jsonl", rows))


@pytest.fixture
def server():
    with FaultServer(reply=answer) as running:
        yield running


def run(capsys, *words):
    main([str(w) for w in words])
    return capsys.readouterr().out


def test_documents_are_built_from_a_folder(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for k in range(6):
        (folder / f"{k}.txt").write_text(f"Story {k}: " + " ".join(f"word{k}{j}" for j in range(80 + 40 * k)) + ".")
    (folder / "bad.txt").write_bytes(b"\x00\x01" * 50)
    said = run(capsys, "documents", "--readers", f"mine={folder}", "--n", 4, "--min_tokens", 100, "--max_tokens", 4000, "--chinese", -1,
               "--out", tmp_path / "out")  # fmt: skip
    found = read_jsonl(tmp_path / "out" / "documents.jsonl")
    assert len(found) == 4 and "(4 documents)" in said and {d["source"] for d in found} == {"mine"}
    assert [r["id"] for r in read_jsonl(tmp_path / "out" / "rejected.jsonl")] == ["bad.txt"]


def test_instruct_counts_first_asks_once_and_tells_what_it_used(pages, server, tmp_path, capsys):
    words = ("instruct", "--documents", pages, "--base_url", server.url, "--llm", "m", "--out", tmp_path / "out", "--prices", 1, 2)
    said = run(capsys, *words, "--dry_run")
    assert said.count("4 calls") == 2 and "nothing was asked" in said and not server.requests
    said = run(capsys, *words)
    assert "4 samples, 0 rejected" in said and len(server.requests) == 8
    cost = (8 * PROMPT_TOKENS + 2 * 8 * 4) / 1e6
    assert f"prompt_tokens {8 * PROMPT_TOKENS}" in said and f"cost {round(cost, 4):,}" in said
    first = (tmp_path / "out" / "instructions.jsonl").read_bytes()
    said = run(capsys, *words)
    assert len(server.requests) == 8 and (tmp_path / "out" / "instructions.jsonl").read_bytes() == first


def test_a_dry_run_counts_what_is_left_and_a_budget_holds_over_reruns(pages, server, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("instruct", "--documents", pages, "--base_url", server.url, "--llm", "m", "--out", out, "--concurrency", 1)
    with pytest.raises(SystemExit, match="budget of 3 requests is used up"):
        run(capsys, *words, "--max_calls", 3)
    answered = len(read_jsonl(out / "answers.jsonl"))
    assert answered == len(server.requests) == 3
    with pytest.raises(SystemExit, match=r"budget of 3 requests is used up .*raise max_calls and run again"):
        run(capsys, *words, "--max_calls", 3)  # the same budget again: nothing more is asked
    assert len(server.requests) == 3
    ended = len(read_jsonl(out / "outcomes.jsonl", []) if (out / "outcomes.jsonl").is_file() else read_jsonl(out / "instructions.jsonl"))
    said = run(capsys, *words, "--dry_run")
    left = int(re.search(r"together: .*?(\d+) calls", said)[1])
    assert f"4 documents, {ended} of them need no call" in said and left == 8 - answered and len(server.requests) == 3
    waiting = re.search(r"together: \d+ requests: (\d+) in the cache", said)
    assert int(waiting[1]) == answered - 2 * ended  # answers of documents that are not done yet
    run(capsys, *words, "--max_calls", 8)
    assert len(server.requests) == 8 and len(read_jsonl(out / "instructions.jsonl")) == 4
    said = run(capsys, *words, "--dry_run")
    assert "4 of them need no call" in said and "together: 0 requests" in said


def test_samples_to_suite_store_and_card(pages, tmp_path, capsys):
    made, suite, store = tmp_path / "verifiable.jsonl", tmp_path / "suite.jsonl", tmp_path / "store"
    run(capsys, "verifiable", "--documents", pages, "--n", 6, "--max_tokens", 700, "--out", made)
    assert len(read_jsonl(made)) == 6
    short = tmp_path / "sharegpt.json"
    short.write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}]))
    said = run(capsys, "mix", "--suite", "longalign-5k", "--long", made, "--short", short, "--out", suite)
    rows = read_jsonl(suite)
    assert [r["part"] for r in rows].count("long") == 3 and len(rows) == 4 and "(4 rows)" in said
    said = run(capsys, "tokenize", suite, "--out", store, "--max_length", 1024)
    assert len(TokenStore.load(store)) == 4 and f"tokens: {TokenStore.load(store).lengths.sum():,}" in said
    cache = write_jsonl(tmp_path / "answers.jsonl", [{"key": "k", "model": "m", "text": "t", "prompt_tokens": 10**6, "completion_tokens": 10**6}])
    run(capsys, "card", made, "--cache", cache, "--prices", 1, 2, "--title", "Mine", "--out", tmp_path / "card")
    text = (tmp_path / "card" / "README.md").read_text()
    assert "# Mine" in text and "| m | 1 | 1,000,000 | 1,000,000 | 3 |" in text and "| samples | 6 |" in text


@pytest.mark.parametrize("words, message", [
    (["instruct", "--documents", "none.jsonl", "--out", "OUT"], "instruct: none.jsonl: no such JSONL file"),
    (["tokenize", "none.jsonl", "--out", "OUT"], "tokenize: none.jsonl: no such samples file"),
    (["documents", "--readers", "atlantis", "--out", "OUT"], "documents: .*atlantis"),
    (["documents", "--quota", "wiki", "--out", "OUT"], "--quota 'wiki': write source=weight"),
    (["card", "none.jsonl", "--out", "OUT"], "card: none.jsonl: no such JSONL file"),
])  # fmt: skip
def test_what_goes_wrong_ends_with_one_line(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path / "out") if w == "OUT" else w for w in words])


def test_an_endpoint_without_a_model_or_documents_without_text(pages, tmp_path):
    with pytest.raises(SystemExit, match="--base_url http://h/v1 needs --llm"):
        main(["instruct", "--documents", pages, "--base_url", "http://h/v1", "--out", str(tmp_path / "o")])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"id": "a", "source": "books", "language": "en"}])
    with pytest.raises(SystemExit, match=r"document 1 lacks text: make the file with the step `documents`"):
        main(["instruct", "--documents", str(bad), "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0


def test_the_projects_own_samples_go_through_every_step(tmp_path, capsys):
    said = run(capsys, "samples", "--out", tmp_path)
    long, pages = read_jsonl(tmp_path / "long.jsonl"), {d["id"]: d["text"] for d in read_jsonl(tmp_path / "documents.jsonl")}
    assert len(long) >= 100 and len(pages) == 18 and f"{len(long):4} rows" in said
    assert all(s["messages"][0]["content"].startswith(pages[s["document_id"]]) and s["length"] > 500 for s in long)
    said = run(capsys, "mix", "--long", tmp_path / "long.jsonl", "--short", tmp_path / "short.jsonl", "--out", tmp_path / "suite.jsonl")
    assert f"({len(long) + len(read_jsonl(tmp_path / 'short.jsonl'))} rows)" in said
    assert "README.md" in run(capsys, "card", tmp_path / "long.jsonl", "--out", tmp_path / "card")
    run(capsys, "verifiable", "--documents", tmp_path / "documents.jsonl", "--n", 4, "--out", tmp_path / "v.jsonl")
    assert len(read_jsonl(tmp_path / "v.jsonl")) == 4
