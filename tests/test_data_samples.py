"""The small data set that travels with the course, checked with plain Python.

Nothing of the library is imported: these checks say what the files must be, and the library's readers are
tested against the same files elsewhere. The finders used here (words, repeated sentences, bad roles) are
first shown to find a planted mistake, so that a green run means that something was looked at.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "data_samples"
SOURCES = {"arxiv", "books", "c4", "clue", "commoncrawl", "github", "stackexchange", "wikipedia", "wudao"}
FRONT_MATTER = {"id", "title", "source", "language", "licence"}
MIN_WORDS, MAX_WORDS = 1_500, 3_500
# Chinese writes no spaces. One word is counted for every 1.5 characters, a common rule of thumb
# (most words have one or two characters), so 1,500 words are 2,250 characters.
CJK_PER_WORD = 1.5
CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
FIRST_SHORT_SHA256 = "ac2ae2132da864a47a97eb2d247d6494dfca20a9e3040da6cad31afbfeb8feb1"
APACHE_2_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def read_document(path):
    """One sample file -> (front matter, body)."""
    text = path.read_text(encoding="utf-8")
    parts = re.split(r"^---[ ]*$\n?", text, maxsplit=2, flags=re.MULTILINE)
    assert len(parts) == 3 and not parts[0], f"{path.name}: must open with a front matter block between '---' lines"
    front = {}
    for line in parts[1].strip().splitlines():
        key, colon, value = line.partition(":")
        assert colon, f"{path.name}: front matter line {line!r} is not 'key: value'"
        front[key.strip()] = value.strip().strip("\"'")
    return front, parts[2].strip()


def read_documents():
    paths = sorted(p for p in (SAMPLES / "documents").iterdir() if p.is_file() and p.name != "README.md")
    assert paths, f"no document in {SAMPLES / 'documents'}"
    return [(path.name, *read_document(path)) for path in paths]


def read_rows(path):
    """A JSONL file -> [(where, object)]; the message names file and line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            pytest.fail(f"{where}: not JSON ({error})")
        assert isinstance(row, dict), f"{where}: a line must hold one object, found {type(row).__name__}"
        rows.append((where, row))
    return rows


def read_queries():
    return [row for path in sorted((SAMPLES / "longbench_chat").glob("*.jsonl")) for row in read_rows(path)]


def count_words(body, language):
    return len(CJK.findall(body)) / CJK_PER_WORD if language == "zh" else len(body.split())


def sentences(body):
    """Sentences of every paragraph, whatever its line breaks."""
    found = []
    for paragraph in re.split(r"\n\s*\n", body):
        flat = " ".join(paragraph.split())
        found += [s.strip() for s in re.split(r"(?<=[.!?])\s+|(?<=[。！？])", flat)]
    return found


def repeated(body, length=40, times=2):
    """Sentences of at least `length` characters that stand more than `times` times."""
    counts = Counter(s for s in sentences(body) if len(s) >= length)
    return {s: n for s, n in counts.items() if n > times}


def role_problem(messages):
    """Why a conversation is not system?, user, assistant, user, assistant, ...; "" when it is."""
    if not isinstance(messages, list):
        return "messages is not a list"
    if not all(isinstance(m, dict) for m in messages):
        return "a message is not an object"
    if not all(isinstance(m.get("content"), str) and m["content"].strip() for m in messages):
        return "a message has no text"
    roles = [m.get("role") for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        return f"roles {roles}: user and assistant must alternate, from user to assistant"
    return ""


def rating_problem(answers):
    """Why the rated answers of a query are not three texts with whole scores 1..10; "" when they are."""
    if not isinstance(answers, list) or len(answers) != 3:
        return "three rated answers are needed"
    for answer in answers:
        score = answer.get("score")
        if type(score) is not int or not 1 <= score <= 10:
            return f"score {score!r} is not a whole number from 1 to 10"
        if not isinstance(answer.get("text"), str) or not answer["text"].strip():
            return "an answer has no text"
    if len({answer["text"] for answer in answers}) != 3:
        return "the same answer stands twice"
    return ""


def duplicates(values):
    return [value for value, n in Counter(values).items() if n > 1]


def test_words_of_chinese_and_english():
    assert count_words("one two  three\nfour", "en") == 4
    assert count_words("河水，很慢。 abc 茶山", "zh") == 6 / 1.5


def test_the_repetition_finder_finds_a_planted_repeat():
    english = "This sentence is certainly longer than forty characters."
    chinese = "这一句话特意写得很长，" * 4 + "好让它超过四十个字。"
    for line, gap in ((english, " "), (english, "\n\n"), (chinese, "")):
        assert repeated(gap.join([line] * 2)) == {}
        assert repeated(gap.join([line] * 3)) == {line: 3}
    wrapped = english.replace("certainly ", "certainly\n")
    assert repeated(f"{english} {wrapped} {english}") == {english: 3}


@pytest.mark.parametrize(("roles", "fine"), [
    (["user", "assistant"], True), (["system", "user", "assistant"], True), (["user", "assistant"] * 3, True),
    ([], False), (["system"], False), (["user"], False), (["assistant", "user"], False),
    (["user", "assistant", "user"], False), (["user", "user", "assistant", "assistant"], False),
    (["user", "system", "assistant"], False), (["user", "model"], False),
])
def test_the_role_check_tells_good_from_bad(roles, fine):
    assert (role_problem([{"role": role, "content": "text"} for role in roles]) == "") is fine


def test_the_role_check_refuses_what_is_no_conversation():
    assert role_problem("hello") and role_problem(None) and role_problem(["hello", "there"])
    assert role_problem([{"role": "user", "content": "text"}, {"role": "assistant", "content": " "}])


@pytest.mark.parametrize("score", [0, 11, -1, 7.5, 7.0, True, "7", None])
def test_the_rating_check_refuses_a_bad_score(score):
    good = [{"text": text, "score": 10} for text in "abc"]
    assert rating_problem(good) == ""
    assert repr(score) in rating_problem([*good[:2], {"text": "c", "score": score}])
    assert rating_problem(good[:2]) and rating_problem([good[0]] * 3)


@pytest.mark.parametrize("text", ["no front matter", "---\nid: a\nno end of the block", "---\nid a\n---\nbody"])
def test_a_document_without_front_matter_is_refused(tmp_path, text):
    path = tmp_path / "bad.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=r"bad\.txt"):
        read_document(path)


def test_every_document_has_its_front_matter_and_licence():
    documents = read_documents()
    for name, front, body in documents:
        missing = sorted(key for key in FRONT_MATTER if not front.get(key))
        assert not missing, f"{name}: front matter lacks {missing}"
        assert front["source"] in SOURCES, f"{name}: source {front['source']!r} is none of {sorted(SOURCES)}"
        assert front["language"] in {"en", "zh"}, f"{name}: language {front['language']!r} is neither en nor zh"
        assert front["licence"] == "CC0-1.0", f"{name}: licence {front['licence']!r}, expected CC0-1.0"
        assert body, f"{name}: the document is empty"
        share = len(CJK.findall(body)) / len(body)
        assert (share > 0.5) is (front["language"] == "zh"), f"{name}: {share:.0%} Chinese, said {front['language']}"
    assert not duplicates(front["id"] for _, front, _ in documents), "a document id stands twice"


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_each_source_kind_has_two_long_documents(source):
    words = {name: count_words(body, front["language"])
             for name, front, body in read_documents() if front.get("source") == source}
    assert len(words) == 2, f"{source}: two documents are wanted, found {sorted(words)}"
    assert all(MIN_WORDS <= n <= MAX_WORDS for n in words.values()), f"{source}: {words}"
    languages = {front["language"] for _, front, _ in read_documents() if front.get("source") == source}
    assert languages == {"zh" if source in {"clue", "wudao"} else "en"}, f"{source}: {languages}"


def test_the_id_of_a_document_is_its_file_name():
    for name, front, _ in read_documents():
        assert name == f"{front['id']}.txt" and front["id"].startswith(front["source"] + "_"), name


def test_no_document_is_padded_with_repeats():
    checked = 0
    for name, _, body in read_documents():
        checked += sum(len(s) >= 40 for s in sentences(body))
        assert not (found := repeated(body)), f"{name}: a sentence stands more than twice: {found}"
    assert checked > 100, f"only {checked} sentences of 40 or more characters were looked at"


def test_short_instructions():
    rows = read_rows(SAMPLES / "instructions" / "short.jsonl")
    assert len(rows) >= 200, f"{len(rows)} short instructions, 200 are needed"
    for where, row in rows:
        assert not (problem := role_problem(row.get("messages"))), f"{where}: {problem}"
        asked = row["messages"][0]["content"]  # an answer may be a translation, so the first message decides
        share = len(CJK.findall(asked)) / len(asked)
        assert (share > 0.2) is (row["language"] == "zh"), f"{where}: {share:.0%} Chinese, said {row['language']}"
    asked = [row["messages"][0]["content"] for _, row in rows]
    assert not duplicates(asked), f"a conversation begins twice in the same way: {duplicates(asked)}"
    chinese = sum(row["language"] == "zh" for _, row in rows)
    assert 0.10 <= chinese / len(rows) <= 0.15, f"{chinese} of {len(rows)} are Chinese"
    turns = Counter(len(row["messages"]) // 2 for _, row in rows)
    assert sum(n for t, n in turns.items() if t >= 2) >= 25 and max(turns) <= 4, f"turns: {dict(turns)}"
    words = sorted(len(m["content"].split()) for _, row in rows if row["language"] == "en"
                   for m in row["messages"] if m["role"] == "assistant")
    assert words[0] == 1 and words[len(words) // 2] < 60 and words[-1] > 300, "lengths of the answers vary too little"


def test_the_first_short_instructions_stay_as_they_are():
    lines = (SAMPLES / "instructions" / "short.jsonl").read_text(encoding="utf-8").split("\n")[:62]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == FIRST_SHORT_SHA256, "notebooks speak of these 62"


def test_long_queries():
    queries = read_queries()
    documents = {front["id"]: body for _, front, body in read_documents()}
    assert len(queries) >= 16, f"{len(queries)} long queries, 16 are needed"
    for where, row in queries:
        for key in ("id", "document_id", "language", "question", "reference"):
            assert isinstance(row.get(key), str) and row[key].strip(), f"{where}: {key} is missing or empty"
        assert row["document_id"] in documents, f"{where}: no document has the id {row['document_id']!r}"
        assert not (problem := rating_problem(row.get("answers"))), f"{where}: {problem}"
        assert (bool(CJK.search(row["question"]))) is (row["language"] == "zh"), f"{where}: language {row['language']}"
    ids = [row["id"] for _, row in queries]
    assert not duplicates(ids), f"query ids stand twice: {duplicates(ids)}"
    chinese = [row["id"] for _, row in queries if row["language"] == "zh"]
    assert len(chinese) >= 2, f"Chinese queries: {chinese}"
    assert not duplicates(row["question"] for _, row in queries), "a question stands twice"


def test_the_project_licence_is_the_standard_apache_text():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    ours = "Copyright 2026 The LongAlign course authors"
    assert text.count(ours) == 1, "the copyright line is not filled in"
    standard = text.replace(ours, "Copyright [yyyy] [name of copyright owner]")
    assert hashlib.sha256(standard.encode("utf-8")).hexdigest() == APACHE_2_SHA256, "LICENSE was altered"
