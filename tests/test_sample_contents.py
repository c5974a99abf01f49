"""What the small data set says is so: its code runs, its sums are right, its answers stand in the documents.

Plain Python, as in test_data_samples.py, whose readers are used. Every finder is first shown to find a planted mistake.
"""

import re
import subprocess
import sys
from collections import Counter

import pytest
from test_data_samples import CJK, SAMPLES, duplicates, read_documents, read_queries, read_rows

NUMERAL = re.compile(r"\d+(?:[.,:]\d+)*")
CHINESE_NUMERAL = re.compile(r"[零〇一二两三四五六七八九十百千万亿点]{3,}")
FILE = re.compile(r"^=== FILE: (\S+) ===\n(.*?)\n=== END OF FILE ===$", flags=re.MULTILINE | re.DOTALL)
TASKS = {"general", "summary", "reasoning", "extraction"}
# Addends and their sum, all of which stand in the document.
SUMS = [
    ("arxiv_hive_scales", "21.40 18.60 14.20 9.80 4.50 2.50", "71.00"),
    ("arxiv_hive_scales", "4,512 2,976 4,271", "11,759"), ("arxiv_hive_scales", "11,759 409,873", "421,632"),
    ("commoncrawl_swim_newsletter", "812 604 517 468 391 458", "3,250"),
    ("commoncrawl_swim_newsletter", "2,628 540 312", "3,480"),
    ("commoncrawl_swim_newsletter", "1,200 684 745 360 288 96", "3,373"),
    ("commoncrawl_swim_newsletter", "107 1,915", "2,022"), ("commoncrawl_swim_newsletter", "3,373 107", "3,480"),
    ("clue_night_bus", "612 548 497 331 208", "2196"), ("clue_night_bus", "2196 615", "2811"),
    ("clue_night_bus", "31 12 9 7 5 19", "83"), ("clue_night_bus", "2811 1322", "4133"),
    ("clue_night_bus", "251 114", "365"), ("clue_night_bus", "49 9", "58"),
    ("wudao_leap_month", "228 7", "235"), ("wudao_leap_month", "354.3672 10.875", "365.2422"),
    ("wudao_leap_month", "6939.6018 0.0892", "6939.691"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bodies():
    return {front["id"]: body for _, front, body in read_documents()}


def missing_numerals(text, *sources):
    """Numerals of a text, as written, that stand in none of the sources."""
    there = {n for source in sources for n in NUMERAL.findall(source)}
    return [n for n in NUMERAL.findall(text) if n not in there]


def shown_commands(readme):
    """[(arguments of `python -m`, the output shown under it)] of a README."""
    found = re.findall(r"^    \$ python -m (.+)\n((?:    .*\n?)+)", readme, flags=re.MULTILINE)
    return [(command.split(), re.sub(r"^    ", "", out, flags=re.MULTILINE).rstrip("\n")) for command, out in found]


def run_python(*arguments, cwd=None):
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{arguments}: {done.stdout[-800:]}{done.stderr[-800:]}"
    return done.stdout


def private_data(text):
    """E-mail addresses outside the domains kept for examples, and what looks like a telephone number."""
    mails = re.findall(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", text)
    phones = re.findall(r"(?<![\w.,-])(?:\+\d{1,3}[ -]?)?(?:\(?0\d{2,4}\)?[ -/]?)\d{3,4}[ -]?\d{3,5}(?![\w-])", text)
    phones += re.findall(r"(?<!\d)1[3-9]\d{9}(?!\d)", text)
    return [m for m in mails if not re.search(r"(?:@|\.)example(?:\.(?:org|com|net))?$", m)] + phones


def test_the_finders_find_what_was_planted():
    assert missing_numerals("1,200 and 4.5 and 12", "1,200 or 14.5", "12") == ["4.5"]
    assert shown_commands("a\n\n    $ python -m x.y f\n    one\n      two\n\nb\n") == [(["x.y", "f"], "one\n  two")]
    assert FILE.findall("=== FILE: a/b.py ===\nx = 1\n\ny\n=== END OF FILE ===\n") == [("a/b.py", "x = 1\n\ny")]
    assert private_data("a@b.co, rota@tarn.example, x@mail.example.org") == ["a@b.co"]
    assert private_data("ring 020 7946 0123 or 13812345678") == ["020 7946 0123", "13812345678"]
    assert private_data("4,147,200 bytes on 2024-03-09T06:10Z at 04:18, 11,759 of 6939.6018") == []


@pytest.mark.parametrize("name", ["github_tidelog", "github_sharepot"])
def test_the_code_of_a_repository_runs_as_its_readme_shows(name, bodies, tmp_path):
    files = dict(FILE.findall(bodies[name]))
    package = name.removeprefix("github_")
    assert {"README.md", "CHANGELOG.md", f"tests/test_{package}.py"} < set(files)
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n", encoding="utf-8")
    (tmp_path / package / "__init__.py").touch()
    said = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=.", cwd=tmp_path)
    assert re.search(r"^\d+ passed", said, flags=re.MULTILINE), said
    commands = shown_commands(files["README.md"])
    assert commands, "the README shows no command"
    for arguments, output in commands:
        assert run_python("-m", *arguments, cwd=tmp_path).rstrip("\n") == output


def test_the_half_lines_are_as_the_thread_says(bodies, tmp_path):
    body = bodies["stackexchange_half_lines"]
    line = re.search(r"^    (2022-\S+Z flow=\S+ temp=\S+ ok)$", body, flags=re.MULTILINE)[1] + "\n"
    assert len(line) == 48
    data = (line * 86_400).encode()
    ends = [k for k in range(4_096, len(data), 4_096) if k % 48]
    assert (len(data), len(ends), {k % 48 for k in ends}) == (4_147_200, 675, {16, 32})
    code = re.search(r"^    import time\n\n(?:    .*\n|\n)*?(?=\n\S)", body, flags=re.MULTILINE)[0]
    code = re.sub(r"^    ", "", code, flags=re.MULTILINE)
    (tmp_path / "weir.log").write_bytes(data[: 100 * 48 + 16])  # the last line is half written
    code += "\nlines = list(follow('weir.log', stop=lambda: True))\nprint(len(lines), set(map(len, lines)))"
    assert run_python("-c", code, cwd=tmp_path) == "100 {47}\n"


@pytest.mark.parametrize(("name", "parts", "total"), SUMS)
def test_sums_of_the_documents(name, parts, total, bodies):
    assert not missing_numerals(f"{parts} {total}", bodies[name])
    value = [round(float(n.replace(",", "")) * 10_000) for n in [*parts.split(), total]]
    assert sum(value[:-1]) == value[-1], f"{name}: {parts} is not {total}"


def test_the_table_of_the_hives_adds_up(bodies):
    table = re.findall(r"^([A-Z][A-Za-z ]+?)((?: +-?\d+\.\d){7})$", bodies["arxiv_hive_scales"], flags=re.MULTILINE)
    rows = {name: [round(10 * float(x)) for x in numbers.split()] for name, numbers in table}
    mean = rows.pop("Mean")
    assert len(rows) == 4 and all(sum(r[:-1]) == r[-1] for r in [*rows.values(), mean])
    assert all(abs(sum(column) / 4 - m) <= 0.5 for column, m in zip(zip(*rows.values(), strict=True), mean, strict=True))


def test_the_python_of_short_instructions_runs():
    blocks = [code for _, row in read_rows(SAMPLES / "instructions" / "short.jsonl") for m in row["messages"]
              if m["role"] == "assistant" for code in re.findall(r"```python\n(.*?)```", m["content"], flags=re.DOTALL)]
    assert len(blocks) >= 15
    shown = [re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.MULTILINE) for code in blocks]
    assert sum(map(len, shown)) >= 8
    for code, lines in zip(blocks, shown, strict=True):
        assert run_python("-c", f"items = [3, 1, 3]\n{code}").splitlines() == lines, code


def test_long_instructions(bodies):
    rows = read_rows(SAMPLES / "instructions" / "long.jsonl")
    assert 95 <= len(rows) <= 120
    for where, row in rows:
        known = {"id", "document_id", "task", "language", "question", "answer"}
        assert known <= set(row) <= known | {"derived"}, f"{where}: keys {sorted(row)}"
        assert row["document_id"] in bodies, f"{where}: no document has the id {row['document_id']!r}"
        assert row["task"] in TASKS, f"{where}: task {row['task']!r}"
        body, answer = bodies[row["document_id"]], row["answer"]
        for text in (row["question"], answer):
            assert text.strip() == text and len(text) > 8, f"{where}: {text!r}"
            assert (CJK.search(text) is not None) is (row["language"] == "zh"), f"{where}: language {row['language']}"
        assert (len(CJK.findall(body)) > 0.5 * len(body)) is (row["language"] == "zh"), f"{where}: not the document's"
        missing = missing_numerals(answer, body, row["question"])
        assert set(missing) == set(row.get("derived", [])), f"{where}: {missing} stand nowhere, see `derived`"
        if row["task"] == "extraction":
            assert not missing_numerals(answer, body), f"{where}: extraction, but {missing_numerals(answer, body)}"
            spoken = CHINESE_NUMERAL.findall(answer)
            assert all(n in body for n in spoken), f"{where}: {[n for n in spoken if n not in body]}"
        assert row["task"] == "extraction" or answer not in body, f"{where}: the answer is copied as it stands"
    for key in ("id", "question", "answer"):
        assert not duplicates(row[key] for _, row in rows), f"{key} stands twice"
    tasks = Counter((row["document_id"], row["task"]) for _, row in rows)
    assert all(tasks[name, task] for name in bodies for task in TASKS), "a document lacks a task type"
    asked = Counter(row["document_id"] for _, row in rows)
    assert set(asked.values()) <= {5, 6}
    assert 0.10 <= sum(row["language"] == "zh" for _, row in rows) / len(rows) <= 0.20


def test_references_and_best_answers_hold_to_the_documents(bodies):
    """Every numeral of part 4 stands in the document or is listed here: computed, or written in words there."""
    known = {"lbc-swim-safety": {"33"}, "lbc-ladder-theory": {"353", "1,412", "63"}}
    looked = 0
    for where, row in read_queries():
        if not where.startswith("part4"):
            continue
        for text in (row["reference"], row["answers"][0]["text"]):
            missing = set(missing_numerals(text, bodies[row["document_id"]], row["question"]))
            assert missing <= known.get(row["id"], set()), f"{where}: {missing}"
            looked += len(NUMERAL.findall(text))
    assert looked > 100


def test_the_readme_counts_what_is_there(bodies, tokenizer):
    readme = (SAMPLES / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| `(\w+)\.txt` \| (en|zh) \| ([\d,]+) (words|characters) \|", readme, flags=re.M)
    assert len(table) == len(bodies)
    for source, name, language, size, unit in table:
        size = int(size.replace(",", ""))
        found = len(bodies[name].split()) if unit == "words" else len(re.findall(r"[\u4e00-\u9fff]", bodies[name]))
        assert found == size and name.startswith(source) and (unit == "words") is (language == "en"), f"{name}: {found}"
    short = [row for _, row in read_rows(SAMPLES / "instructions" / "short.jsonl")]
    long = [row for _, row in read_rows(SAMPLES / "instructions" / "long.jsonl")]
    queries = [row for _, row in read_queries()]
    tasks = Counter(row["task"] for row in long)
    chinese = {name: sum(row["language"] == "zh" for row in rows)
               for name, rows in (("short", short), ("long", long), ("queries", queries))}  # fmt: skip
    several = sum(len(row["messages"]) > 2 for row in short)
    tokens = {language: sorted(len(tokenizer(bodies[name], add_special_tokens=False, verbose=False)["input_ids"])
                               for _, name, its, _, _ in table if its == language) for language in ("en", "zh")}  # fmt: skip
    for sentence in (
        f"{len(bodies)} long texts, two for each source kind", f"{len(short)} short general conversations |",
        f"{len(short)} short general conversations, {chinese['short']} of them in Chinese and {several} with two or",
        f"| {len(long)} questions and answers about", f"{len(long)} questions with answers, five or six a document, "
        f"{chinese['long']} of them in Chinese", ", ".join(f"{tasks[t]} {t}" for t in (
            "summary", "reasoning", "extraction", "general")),
        f"| {len(queries)} open questions", f"{len(queries)} open questions over the documents above, "
        f"{chinese['queries']} of them in Chinese",
        f"{tokens['en'][0]:,} to {tokens['en'][-1]:,} tokens for the English ones and "
        f"{tokens['zh'][0]:,} to {tokens['zh'][-1]:,} for the Chinese ones",
    ):  # fmt: skip
        assert sentence in readme, f"README does not say {sentence!r}"


def test_nothing_private_stands_in_the_samples():
    paths = [p for p in SAMPLES.rglob("*") if p.suffix in {".txt", ".jsonl", ".md"} and "gates" not in p.parts]
    assert len(paths) >= 24
    for path in paths:
        assert not (found := private_data(path.read_text(encoding="utf-8"))), f"{path.name}: {found}"
