"""A data card: its numbers are those of the samples, hostile text stays text, and what cannot be described is refused."""

import re
from html.parser import HTMLParser

import pytest
import yaml

from longalign_lib.data.card import question_of, write_card


def sample(k, question, answer="Because.", **more):
    document = f"Document {k}. " * 80
    return {"messages": [{"role": "user", "content": f"{document}\n\n{question}"}, {"role": "assistant", "content": answer}],
            "length": 100 + k, "source": "books", "task": "general", "language": "en", "document_id": f"d{k}", "model": "m"} | more  # fmt: skip


HOSTILE = '<script>alert("1")</script>\n```\n# Heading\n![x](http://example.com/x.png) | a | b |\n````\n<img src=x onerror=alert(2)>'


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.sources, self.inside, self.blocks = [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href") or k.startswith("on")]
        if tag == "pre":
            self.inside, self.blocks = 1, [*self.blocks, ""]

    def handle_endtag(self, tag):
        self.inside -= tag == "pre"

    def handle_data(self, data):
        if self.inside:
            self.blocks[-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("card")
    samples = [sample(k, f"What is {k}?") for k in range(6)]
    samples += [sample(7, "为什么？", language="zh", task="summary"), sample(8, HOSTILE, HOSTILE, source="<b>x|y</b>", task="odd | *task*")]
    rejected = [{"document_id": "d9", "reason": "empty: nothing", "question": "Q", "answer": HOSTILE}]
    return write_card(samples, out, title="A & B", licence="cc0-1.0", rejected=rejected, facts={"tokenizer": "its_name"}, read=9)


def test_numbers_and_front_matter(page):
    text = (page.parent / "README.md").read_text(encoding="utf8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"pretty_name": "A & B", "language": ["en", "zh"], "task_categories": ["text-generation"],
                     "size_categories": ["n<1K"], "license": "cc0-1.0"}  # fmt: skip
    assert "| samples | 8 |" in text and f"| tokens | {sum(100 + k for k in (0, 1, 2, 3, 4, 5, 7, 8))} |" in text
    assert "| rejected | 1 |" in text and "| tokenizer | its\\_name |" in text and "en 88%, zh 12%" in text
    assert "What is 3?" in text and re.search(r"\[\d{3} characters\] …", text)
    for picture in re.findall(r"\]\((\w+\.png)\)", text):
        assert (page.parent / picture).stat().st_size > 5_000
    assert {f.suffix for f in page.parent.iterdir()} == {".md", ".html", ".png", ".csv"}


def test_the_page_is_one_file_and_hostile_text_stays_text(page):
    tags = Tags(page.read_text(encoding="utf8"))
    assert set(tags.found) <= set("html head meta title style body h1 h2 h3 p img table thead tbody tr th td pre code".split())
    assert tags.found.count("img") == 4 and all(s.startswith("data:image/png;base64,") for s in tags.sources)
    whole = [b for b in tags.blocks if "<script>" in b]
    assert len(whole) == 2 and all(HOSTILE in b for b in whole), "shown, to the letter, inside a block"


def test_the_last_question_is_found():
    chat = [{"role": "user", "content": "doc\n\nfirst"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "second"}]
    assert question_of({"messages": chat}) == "second" and question_of({"messages": chat[:2]}) == "first"
    assert question_of({"messages": []}) == ""


def test_a_rejection_without_a_question_shows_what_the_model_wrote(tmp_path):
    bare = {"document_id": "d1", "reason": "unparsed: no list", "question": "", "answer": "", "raw": "It is a fine text."}
    whole = {"document_id": "d2", "reason": "echo: again", "question": "Who?", "answer": "Who.", "raw": "1. Who?\n2. When?"}
    sample = {"messages": [{"role": "user", "content": "T\n\nWhat?"}, {"role": "assistant", "content": "That."}], "length": 9}
    write_card([sample], tmp_path, rejected=[bare, whole])
    text = (tmp_path / "README.md").read_text(encoding="utf8")
    assert "raw: It is a fine text." in text and "answer: Who." in text and "2. When?" not in text


def test_nothing_rejected_and_many_questions(tmp_path):
    page = write_card([sample(k, f"What is {k % 3}?") for k in range(12)], tmp_path, most_questions=5)
    text = (tmp_path / "README.md").read_text(encoding="utf8")
    assert "None on record." in text and "5 of 12 questions." in text and "No cost was recorded." in text and page.name == "index.html"


@pytest.mark.parametrize("bad, message", [([], "a card needs samples"), ([{"length": 3}], "sample 0 has no messages"),
                                          ([sample(0, "?"), sample(1, "?") | {"length": None}], "sample 1 has no messages or no length")])  # fmt: skip
def test_bad_samples_are_named(bad, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_card(bad, tmp_path)


def test_samples_that_cannot_be_shown_are_counted_and_the_others_shown(tmp_path):
    good = [sample(k, f"What is {k}?") for k in range(3)]
    null, half = sample(3, "Null?", answer=None), sample(4, "Half \ud83d?")
    write_card([*good, null, half], tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf8")
    assert "not shown on this card" in text and "What is" in text and re.search(r"rejected\s*\|\s*2\b", text)
    assert re.search(r"samples\s*\|\s*3\b", text)
