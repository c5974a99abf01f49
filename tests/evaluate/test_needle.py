import re

import pytest
from conftest import TEMPLATE, toy_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longalign_lib.evaluate import needle as N
from longalign_lib.evaluate import prefix
from longalign_lib.evaluate.generate import Answer
from longalign_lib.evaluate.needle_ask import read_results
from longalign_lib.evaluate.needle_variants import draw
from longalign_lib.evaluate.needles import CLASSIC, Needle, needle_family

DEPTHS = (0, 25, 50, 75, 100)


def tokens(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("length", [260, 700, 2000])
@pytest.mark.parametrize("depth", DEPTHS)
def test_placement_is_as_asked_for_any_tokenizer(any_tokenizer, hay, length, depth):
    tok, family = any_tokenizer, needle_family(20, seed=length)
    for needle in family[:2]:
        p = N.build_prompt(tok, needle, hay, length, depth)
        # the prompt is what the chat template makes of one user message, and its length is measured on that
        context = p.text.split("<text>\n")[1].split("\n</text>")[0]
        message = N.SCAFFOLDS["en"].format(context=context, question=needle.question)
        messages = [{"role": "user", "content": message}]
        assert p.text == tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert list(tok.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]) == p.input_ids
        assert length - N.TOLERANCE <= p.tokens <= length
        # the needle is there once, whole, between two sentences of the hay, which is otherwise untouched
        before, after = context.split(needle.text)
        assert before == "" or re.search(r"([.!?][\"')\]”’]*\s+|\n\s*\n\s*)$", before), before[-40:]
        assert (before + after[after[:1] == " " :]) == hay.lstrip()[: len(before + after) - (after[:1] == " ")]
        # depth, measured here again: hay tokens before the needle over all hay tokens
        mine = 100 * tokens(tok, before) / tokens(tok, before + after)
        assert abs(mine - p.depth_achieved) < 2 and abs(tokens(tok, before + after) - p.hay_tokens) <= 3
        sentence = 100 * 160 / p.hay_tokens  # no sentence boundary further than this, in percent
        assert abs(p.depth_achieved - depth) <= max(sentence, 3)
        assert sum(i in tok.all_special_ids for i in p.input_ids) == 2  # <s> and </s> of the template alone


def test_many_lengths_and_haystacks_fit(any_tokenizer):
    """Every length of a range, each with its own text and needle: the seams around the needle never break the fit."""
    family = needle_family(60, seed=1)
    for i, length in enumerate(range(240, 540, 5)):
        p = N.build_prompt(any_tokenizer, family[i], N.default_haystack(i), length, (i * 37) % 101)
        assert length - N.TOLERANCE <= p.tokens <= length


def test_a_listing_without_full_stops_is_parted_between_paragraphs(tokenizer):
    prose = "The tide came in. The tide went out.\n\n" * 20
    listing = "\n\n".join(f"    row {i} of the listing" for i in range(200))
    for depth in (20, 50, 80):
        p = N.build_prompt(tokenizer, CLASSIC, prose + "Rows:\n\n" + listing + "\n\n" + prose * 9, 3000, depth)
        before, after = p.text.split("<text>\n")[1].split(CLASSIC.text)
        assert abs(p.depth_achieved - depth) < 1 and re.search(r"(\. |\n\n)$", before)
        assert not before.endswith("listing\n\n") or after.startswith("     row ")  # its indent stays with the row
    assert any(N.build_prompt(tokenizer, CLASSIC, prose + "Rows:\n\n" + listing, 1200, d).text.count(f"listing\n\n{CLASSIC.text}") for d in (60, 80))


def test_depths_are_ordered_and_spread(tokenizer, hay):
    got = [N.build_prompt(tokenizer, CLASSIC, hay, 2000, d).depth_achieved for d in DEPTHS]
    assert got == sorted(got) and got[0] == 0 and got[-1] > 90 and len(set(got)) == 5


def test_chinese(tokenizer):
    hay = "".join(f"第{i}天，河水涨了{i * 7}厘米，村里的人都来看。" for i in range(200))
    (needle,) = needle_family(1, language="zh")
    p = N.build_prompt(tokenizer, needle, hay, 900, 50)
    before = p.text.split("<text>\n")[1].split(needle.text)[0]
    assert before.endswith("。") and 35 < p.depth_achieved < 65 and 898 <= p.tokens <= 900


def test_hash_follows_the_prompt(tokenizer, hay):
    a = N.build_prompt(tokenizer, CLASSIC, hay, 400, 50)
    assert a.prompt_hash == N.build_prompt(tokenizer, CLASSIC, hay, 400, 50).prompt_hash
    assert a.prompt_hash != N.build_prompt(tokenizer, CLASSIC, hay, 400, 0).prompt_hash


def test_bad_input_names_the_offender(tokenizer, hay):
    scaffold = N.scaffold_tokens(tokenizer, CLASSIC)
    with pytest.raises(ValueError, match=rf"length 50 is shorter than the scaffold.*{scaffold} tokens"):
        N.build_prompt(tokenizer, CLASSIC, hay, 50, 50)
    N.build_prompt(tokenizer, CLASSIC, hay, scaffold + N.MIN_HAY, 50)  # what the message asks for works
    with pytest.raises(ValueError, match="depth 101"):
        N.build_prompt(tokenizer, CLASSIC, hay, 500, 101)
    with pytest.raises(ValueError, match="empty"):
        N.build_prompt(tokenizer, CLASSIC, " \n", 500, 50)
    with pytest.raises(ValueError, match=r"too short.*2000 were asked"):
        N.build_prompt(tokenizer, CLASSIC, hay[:800], 2000, 50)
    with pytest.raises(ValueError, match="already holds the answer"):
        N.build_prompt(tokenizer, CLASSIC, hay[:200] + " Dolores Park sells a sandwich. " + hay[200:], 500, 50)
    with pytest.raises(ValueError, match=r"special token.*</s>"):
        N.build_prompt(tokenizer, CLASSIC, hay[:200] + " </s> " + hay[200:], 500, 50)


def test_a_special_token_that_has_no_role_is_found_too(hay):
    tok = toy_tokenizer("bytes", hay)
    tok.add_tokens([AddedToken("<|call|>", special=True)])
    assert tok.convert_tokens_to_ids("<|call|>") not in tok.all_special_ids  # as <|start_header_id|> in a well-known family
    with pytest.raises(ValueError, match=r"1 special token.*<\|call\|>"):
        N.build_prompt(tok, CLASSIC, hay[:200] + " <|call|> " + hay[200:], 500, 50)


def test_tokenizers_that_put_blanks_between_chinese_characters_or_change_their_width():
    zh = N.default_haystack(0, "zh")
    needles = [n for v in ("single", "values", "chain") for n in draw(v, 2, 0, "zh")]
    text = zh + "".join("".join(n.texts) + n.question for n in draw("chain", 200, 0, "zh")) + "".join("".join(n.texts) for n in needles)
    for kind, trainer in ((models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer), (models.Unigram(), trainers.UnigramTrainer)):
        core = Tokenizer(kind)
        core.normalizer = normalizers.NFKC()
        core.pre_tokenizer, core.decoder = (
            (pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()) if trainer is trainers.WordPieceTrainer
            else (pre_tokenizers.Metaspace(), decoders.Metaspace()))  # fmt: skip
        more = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
        core.train_from_iterator([text], trainer(vocab_size=6000, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, **more))
        tok = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE)
        for needle in needles:
            p = N.build_prompt(tok, needle, zh, 700, 50)
            assert 698 <= p.tokens <= 700 and all(p.text.count(t) == 1 for t in needle.texts)
        odd = Needle("The word is \u2603\ua66e.", "Which word?", ("word",))
        with pytest.raises(ValueError, match=r"did not survive tokenisation: .* becomes .*<unk>.*choose another needle"):
            N.build_prompt(tok, odd, zh, 700, 50)


def test_a_text_of_characters_of_four_tokens_fits_or_says_which_length_does(tokenizer):
    hay, missed = "The owl said: " + "\U0001f989" * 400, 0
    assert tokens(tokenizer, hay) > 1500
    for length in range(400, 412):
        try:
            assert length - 2 <= N.build_prompt(tokenizer, CLASSIC, hay, length, 0).tokens <= length
        except ValueError as error:
            nearest = int(re.search(rf"could not cut the hay to {length} tokens.*ask for (\d+)", str(error))[1])
            assert N.build_prompt(tokenizer, CLASSIC, hay, nearest, 0).tokens == nearest == length - 3
            missed += 1
    assert missed == 3  # one length of four


def test_no_chat_template(tokenizer, hay, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        N.build_prompt(tokenizer, CLASSIC, hay, 500, 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [0, 0]}, "depths must be different"), ({"lengths": []}, "lengths must be different"),
        ({"repeats": 0}, "repeats"), ({"needles": []}, "no needles"), ({"lengths": [300, 60]}, "length 60 is shorter"),
    ],
)  # fmt: skip
def test_bad_grids_stop_before_the_model(model, tokenizer, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        N.run_grid(model, tokenizer, **({"lengths": [300], "depths": [0]} | change), out=tmp_path / "n.jsonl")
    assert not (tmp_path / "n.jsonl").exists()


def test_beyond_the_window(make_model, tokenizer):
    small = make_model(window=512)
    with pytest.raises(ValueError, match=r"length 600 \+ 4 .*604 .*window of 512"):
        N.run_grid(small, tokenizer, [300, 600], [0], max_new_tokens=4)
    frame = N.run_grid(small, tokenizer, [300, 600], [0], max_new_tokens=4, allow_beyond_window=True, progress=False)
    assert frame.beyond_window.tolist() == [False, True]


GRID = {"lengths": [300, 400], "depths": [0, 50, 100], "repeats": 2, "max_new_tokens": 6, "progress": False}


def watch(monkeypatch, change=None):
    """Lengths of the prompts that a model in this process is asked; ``change(ids, answer)`` may alter the answers."""
    asked, plain = [], prefix.complete

    def complete(model, tokenizer, prompts, most, on_answer, **more):
        asked.extend(len(p) for p in prompts)
        if change is None:
            return plain(model, tokenizer, prompts, most, on_answer, **more)
        return plain(model, tokenizer, prompts, most, lambda i, said: on_answer(i, change(i, said)), **more)

    monkeypatch.setattr(prefix, "complete", complete)
    return asked


def test_grid_resumes_after_a_torn_write_and_models_never_share(make_model, tokenizer, model, tmp_path, monkeypatch):
    out = tmp_path / "needle.jsonl"
    first = N.run_grid(model, tokenizer, **GRID, out=out, name="a")
    assert len(first) == 12 and first.key.nunique() == 12 and (first.status == "ok").all()
    assert first.needle.nunique() > 6  # no single sentence is the test
    assert (first.groupby(["length", "depth"]).needle.nunique() == 2).all()  # nor is one of a cell
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:7]) + "\n" + lines[7][:50])  # killed in the middle of a line
    asked = watch(monkeypatch)
    again = N.run_grid(model, tokenizer, **GRID, out=out, name="a")
    assert len(asked) == 5
    columns = ["key", "length", "depth", "repeat", "answer", "score", "prompt_hash", "tokens"]
    assert again[columns].equals(first[columns])
    named = N.run_grid(model, tokenizer, **GRID, out=out, name="b")  # another name, the same weights: answers are copied
    assert len(asked) == 5 and (named.model == "b").all() and named.answer.tolist() == first.answer.tolist()
    other = N.run_grid(make_model(seed=1), tokenizer, **GRID, out=out, name="a")  # the same name, other weights
    assert len(asked) == 5 + 12 and set(other.prompt_hash) == set(first.prompt_hash)
    assert not set(other.key) & set(first.key) and (other.answer != first.answer).any()
    N.run_grid(model, tokenizer, **(GRID | {"repeats": 1, "depths": [50]}), out=out, name="a")
    assert len(asked) == 17  # a smaller grid draws the same needles: nothing is asked again
    N.run_grid(model, tokenizer, **(GRID | {"repeats": 1, "depths": [50], "max_new_tokens": 7}), out=out, name="a")
    assert len(asked) == 19  # another setting is another question
    kept = read_results(out)
    assert kept.groupby(["model", "fingerprint"]).size().tolist() == [14, 12, 12]
    mine = kept[(kept.model == "a") & kept.key.isin(first.key)].set_index("key").loc[first.key]
    assert mine.answer.tolist() == first.answer.tolist() and mine.prompt_hash.tolist() == first.prompt_hash.tolist()


def test_reuse_of_the_prefix_changes_no_answer(tokenizer, model):
    warm = N.run_grid(model, tokenizer, **GRID)
    cold = N.run_grid(model, tokenizer, **GRID, reuse_prefix=False)
    assert warm.answer.tolist() == cold.answer.tolist() and warm.answer.nunique() > 3
    assert warm.reused.sum() > 600 and cold.reused.sum() == 0


def test_scores_come_from_the_answer(tokenizer, model, monkeypatch):
    said = ["the code is 12", "the code is 12 and 34", "no idea, or 12, 34 and 56"]
    watch(monkeypatch, lambda i, answer: Answer(said[i], 1, answer.prompt_tokens, 0, 0.1, "stop"))
    two = Needle("The codes are 12 and 34.", "Which codes?", ("12", "34"))
    frame = N.run_grid(model, tokenizer, [300], [0, 50, 100], needles=[two], progress=False)
    assert frame.score.tolist() == [0.5, 1.0, 1.0] and frame.hit.tolist() == [False, True, True]
    rival = Needle("The codes are 12 and 34.", "Which codes?", ("12", "34"), variant="keys", others=("Not 56.",), wrong=("56",))
    frame = N.run_grid(model, tokenizer, [300], [0, 50, 100], needles=[rival], progress=False)
    assert frame.hit.tolist() == [False, True, False] and frame.wrong.tolist() == [0, 0, 1]  # a distractor's word is no hit


def test_a_failing_cell_is_marked_kept_and_asked_again(tokenizer, model, tmp_path, monkeypatch):
    out, fail = tmp_path / "n.jsonl", [True]

    def forward(self, *args, **more):
        if fail[0] and more["past_key_values"].get_seq_length() + more["input_ids"].shape[1] > 350:
            raise RuntimeError("CUDA out of memory")
        return whole(*args, **more)

    whole = model.forward
    monkeypatch.setattr(model, "forward", forward.__get__(model))
    frame = N.run_grid(model, tokenizer, **GRID, out=out)
    bad = frame[frame.status != "ok"]
    assert len(bad) == 6 and bad.score.isna().all() and bad.status.str.contains("out of memory").all()
    assert set(bad.length) == {400} and (read_results(out).status != "ok").sum() == 6
    fail[0] = False
    asked = watch(monkeypatch)
    assert (N.run_grid(model, tokenizer, **GRID, out=out).status == "ok").all() and len(asked) == 6
    assert len(read_results(out)) == 12 and (read_results(out).status == "ok").all()


def test_prompts_are_saved_once_and_say_what_was_asked(tokenizer, model, tmp_path):
    frame = N.run_grid(model, tokenizer, **GRID, prompts_dir=tmp_path / "p")
    files = {f.stem: f.read_text(encoding="utf-8") for f in (tmp_path / "p").iterdir()}
    assert set(files) == set(frame.prompt_hash) and len(files) == 12
    for row in frame.itertuples():
        assert files[row.prompt_hash].count(row.needle) == 1
        assert tokens(tokenizer, files[row.prompt_hash]) == row.tokens
        assert tokens(tokenizer, files[row.prompt_hash].split(row.needle)[0]) == pytest.approx(row.position, abs=1)


def test_a_tokenizer_without_pad_token_and_a_pool_that_the_hay_spoils(tokenizer, model, hay):
    assert tokenizer.pad_token is None
    pool = [Needle("The tide is at nine.", "When is the tide?", ("nine",)), Needle("The tide is at noon o'clock.", "When?", ("noon o'clock",))]
    spoiled = "It happened at nine. " + hay
    frame = N.run_grid(model, tokenizer, [300], [0, 50, 100], 4, needles=pool, haystack=spoiled, progress=False, max_new_tokens=2)
    assert set(frame.needle) == {pool[1].text} and len(frame) == 12  # drawn again until the hay does not answer
    with pytest.raises(ValueError, match=r"already holds the answer.*'nine'"):
        N.build_grid(tokenizer, [300], [0], needles=pool[:1], haystack=spoiled)
    with pytest.raises(ValueError, match="1 haystacks for 2 repeats"):
        N.build_grid(tokenizer, [300], [0], 2, haystack=[hay])
