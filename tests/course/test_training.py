"""The course's own run: what it trains on, what it must not see, and when an old model is used again; nothing is trained."""

import json
import re
import shutil

import pytest

from longalign_lib import course
from longalign_lib.course import training
from longalign_lib.data.documents import read_samples
from longalign_lib.data.jsonl import read_jsonl
from longalign_lib.data.tokens import TokenStore


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The stores at ci, with two rows of a model mixed in: one about a held-out document, one about another."""
    folder = tmp_path_factory.mktemp("run")
    text = lambda q: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Yes."}], "model": "m"}  # noqa: E731
    made = [text("Is bread alive?") | {"document_id": "stackexchange_sourdough"}, text("Is it lit?") | {"document_id": "books_lighthouse"},
            text("Made without a model?") | {"model": "none"}]  # fmt: skip
    (folder / "made.jsonl").write_text("".join(json.dumps(x) + "\n" for x in made))
    return folder, training.training_data("ci", 0, folder, folder / "made.jsonl")


def texts(folder, part, tokenizer):
    store = TokenStore.load(folder / part)
    return [tokenizer.decode(store[i][0]) for i in range(len(store))]


def squeezed(text):
    return re.sub(r"\W+", " ", text)


def test_no_row_of_training_holds_a_line_of_a_held_out_document(built, tokenizer):
    documents = {d.id: d.text for d in read_samples()[0]}
    lines = [squeezed(x) for name in training.HELD_OUT for x in documents[name].split(". ") if len(squeezed(x)) > 50]
    others = squeezed(" ".join(t for name, t in documents.items() if name not in training.HELD_OUT))
    lines = [x.strip()[:60] for x in lines if x.strip()[:60] not in others]
    assert len(lines) > 20
    seen, held = (squeezed("\n".join(texts(built[0], part, tokenizer))) for part in ("train", "held_out"))
    assert not [x for x in lines if x in seen]
    assert sum(x in held for x in lines) > 10  # the search would find them


def test_rows_of_a_model_join_unless_they_are_about_held_out_documents(built, tokenizer):
    seen = "\n".join(texts(built[0], "train", tokenizer))
    assert "Is it lit?" in seen and "Is bread alive?" not in seen and "Made without a model?" not in seen
    assert json.loads((built[0] / "train_report.json").read_text())["left_out_about_held_out_documents"] == 1


def test_short_rows_are_held_out_by_sixths_and_the_run_has_its_size(built):
    rows = built[1]
    count = rows.groupby(["part", "task"]).size()
    assert count["train", "short"] == 51 and count["held_out", "short"] == 11 and count["train", "verifiable:retrieve"] == 84
    train = rows[rows.part == "train"]
    assert train.tokens.sum() == pytest.approx(42_000, rel=0.05)  # `make course` and the notebook's time stand on it
    assert (train.targets > 0).all() and train.tokens.max() <= 700 < training.settings("ci", 0)["capacity"]


def test_short_rows_of_training_and_held_out_differ(built, tokenizer):
    seen, held = (set(texts(built[0], part, tokenizer)) for part in ("train", "held_out"))
    assert not seen & held and len(held) == 27


def test_another_seed_gives_other_rows_and_the_same_seed_the_same(tmp_path, tokenizer, monkeypatch):
    small = training.settings
    monkeypatch.setattr(training, "settings", lambda p, s: {**small(p, s), "long_samples": 4, "held_out": 2, "short_samples": 6})
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        training.training_data("ci", seed, tmp_path / name)
    a, b, c = (texts(tmp_path / n, "train", tokenizer) for n in "abc")
    assert a == b != c


def test_a_held_out_document_that_is_gone_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "HELD_OUT", frozenset({"wikipedia_bridges", "wikipedia_tunnels"}))
    with pytest.raises(ValueError, match="wikipedia_tunnels not in data_samples/documents"):
        training.training_data("ci", 0, tmp_path)


@pytest.mark.parametrize("profile", course.PROFILES)
def test_settings_fit_each_other(profile):
    s = training.settings(profile, 3)
    assert s["seed"] == 3 and s["packs_per_step"] % s["processes"] == 0 and s["long_tokens"] <= s["capacity"]
    assert re.fullmatch("[0-9a-f]{12}", s["data"]) and json.loads(json.dumps(s)) == s  # compared after a way through JSON


def test_settings_change_with_the_samples(tmp_path, monkeypatch):
    before = training.settings("ci", 0)
    shutil.copytree(training.SAMPLES, tmp_path / "samples")
    monkeypatch.setattr(training, "SAMPLES", tmp_path / "samples")
    monkeypatch.setattr(training, "SHORT", tmp_path / "samples" / "instructions" / "short.jsonl")
    assert training.settings("ci", 0) == before
    with open(training.SHORT, "a") as file:
        file.write(json.dumps(read_jsonl(training.SHORT)[0]) + "\n")
    changed = training.settings("ci", 0)
    assert {k for k in before if before[k] != changed[k]} == {"data"}
    document = tmp_path / "samples" / "documents" / "wikipedia_paper.txt"
    document.rename(document.with_name("wikipedia_pulp.txt"))  # names count: a document's id is its name
    assert training.settings("ci", 0)["data"] not in (before["data"], changed["data"])


def test_a_model_is_trained_once_and_again_only_for_other_settings(tmp_path, monkeypatch, capsys):
    trained = []

    def run(command, out, progress=True):
        out.mkdir(parents=True, exist_ok=True)
        trained.append(command[command.index("--seed") + 1])
        return 1.0

    monkeypatch.setattr(training, "run_training", run)
    monkeypatch.setattr(training, "training_data", lambda *a: None)
    monkeypatch.delenv("LONGALIGN_MODEL", raising=False)
    folder = course.trained_model("ci", 0, tmp_path)
    assert folder == tmp_path / "ci" / "06_training" / "model" and "training its model now" in capsys.readouterr().out
    assert course.trained_model("ci", 0, tmp_path) == folder and trained == ["0"] and not capsys.readouterr().out
    course.trained_model("ci", 1, tmp_path)
    course.trained_model("ci", 1, tmp_path)
    assert trained == ["0", "1"]
    monkeypatch.setattr(training, "_data_hash", lambda: "0" * 12)  # the samples have changed
    course.trained_model("ci", 1, tmp_path)
    monkeypatch.setenv("LONGALIGN_MODEL", "/models/other/")
    course.trained_model("ci", 1, tmp_path)
    assert trained == ["0", "1", "1", "1"]
    assert "/models" not in (folder / "run.json").read_text()


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launch_commands_name_no_place_of_this_machine(launcher, tmp_path, monkeypatch):
    monkeypatch.chdir(training.ROOT)
    command = training.launch_command("paper", 5, training.Path("DATA"), training.Path("OUT"), launcher)
    said = " ".join(command)
    assert command[0] == launcher and "longalign_lib.train --data DATA --output_dir OUT" in said and " 8 " in said
    assert "--seed 5" in said and "--rope base --rope_factor 8.0" in said and " /" not in said


def test_a_run_that_fails_says_why_and_leaves_no_marks(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"(?s)code 3: .*the pump is broken"):
        training.run_training([training.sys.executable, "-c", "print('the pump is broken'); raise SystemExit(3)"], tmp_path, progress=False)
    assert not (tmp_path / "run.json").exists() and not (tmp_path / "peak.json").exists()


def test_a_run_records_the_memory_of_its_largest_process(tmp_path):
    code = "import time; x = bytearray(300 << 20); time.sleep(1.5)"
    command = [training.sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"]
    assert 1 < training.run_training(command, tmp_path, progress=False) < 20
    assert 0.29 < json.loads((tmp_path / "peak.json").read_text())["process_gib"] < 0.5
