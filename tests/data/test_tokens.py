"""Chat to tokens: ids as transformers renders them, labels on the assistant alone, nothing lost from the store."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.data import store as files
from longalign_lib.data.tokens import TokenStore, encode_chat


def chat(*turns: str, system: str | None = None) -> list[dict]:
    roles = ("user", "assistant")
    head = [{"role": "system", "content": system}] if system is not None else []
    return head + [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]


def sample(question: str, answer: str, **more) -> dict:
    return {"messages": chat(question, answer), **more}


def targets_text(tokenizer, ids, labels) -> str:
    assert ((labels == -100) | (labels == ids)).all()
    return tokenizer.decode(ids[labels != -100])


def test_one_turn(tokenizer):
    ids, labels = encode_chat(tokenizer, chat("Hi", "Hello!"))
    assert ids.dtype == labels.dtype == np.int32 and ids.shape == labels.shape
    assert ids.tolist() == tokenizer.apply_chat_template(chat("Hi", "Hello!"))["input_ids"]
    assert targets_text(tokenizer, ids, labels) == "Hello!<|im_end|>"
    assert labels[-1] == -100 and tokenizer.decode([ids[-1]]) == "\n"  # the template's line end is no target


text = st.text(alphabet=st.sampled_from("ab .\n\t你好é🙂<|>_im"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(text, text.map(str.lstrip)), min_size=1, max_size=3), st.none() | text)
def test_any_conversation_has_exactly_its_answers_as_targets(tokenizer, pairs, system):
    messages = chat(*(t for pair in pairs for t in pair), system=system)
    ids, labels = encode_chat(tokenizer, messages)
    assert ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    expected = "".join(answer + "<|im_end|>" for _, answer in pairs if answer.strip())
    assert targets_text(tokenizer, ids, labels) == expected


def test_a_token_that_straddles_the_turns_start_is_no_target(tokenizer):
    ids, labels = encode_chat(tokenizer, chat("a", "  <b"))
    assert "\n " in [tokenizer.decode([i]) for i in ids[labels == -100]]  # the prompt's line end and the first space
    assert targets_text(tokenizer, ids, labels) == " <b<|im_end|>"


def test_empty_answers_are_masked_and_others_are_not(tokenizer):
    ids, labels = encode_chat(tokenizer, chat("a", "", "b", "  \n", "c", "yes"))
    assert targets_text(tokenizer, ids, labels) == "yes<|im_end|>"


def test_token_id_0_is_an_ordinary_token(tokenizer):
    zero = tokenizer.decode([0])
    ids, labels = encode_chat(tokenizer, chat(f"what is {zero}?", f"it is {zero} indeed"))
    assert (ids == 0).sum() == 2 and (labels == 0).sum() == 1
    assert targets_text(tokenizer, ids, labels) == f"it is {zero} indeed<|im_end|>"
    store, _ = TokenStore.build([sample(f"{zero} a", zero)], tokenizer, 100)
    assert (store[0][0] == 0).sum() == 2 and (store[0][1] == 0).sum() == 1


def test_right_truncation(tokenizer):
    whole, labels = encode_chat(tokenizer, chat("question", "a long answer"))
    ids, cut = encode_chat(tokenizer, chat("question", "a long answer"), max_length=len(whole) - 4)
    assert ids.tolist() == whole[:-4].tolist() and cut.tolist() == labels[:-4].tolist()


GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_templates_own_assistant_mask_agrees_or_is_refused(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = GENERATION
    messages = chat("q one", "answer one", "q two", "answer two")
    _, labels = encode_chat(own, messages)
    mask = own.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert (labels != -100).tolist() == [bool(m) for m in mask] and sum(mask) > 4
    # the mark set around the wrong role
    own.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'user' %}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(ValueError, match="assistant mask and the prefix difference disagree on"):
        encode_chat(own, messages)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ messages|length }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match="turn 1 differently once later turns follow"):
        encode_chat(own, chat("a", "b", "c", "d"))


def test_a_template_without_an_end_token_keeps_the_whole_turn(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    ids, labels = encode_chat(own, chat("a", "bee"))
    # " bee" is one token with the prompt's space: only white space of it lies outside the answer
    assert tokenizer.decode(ids) == "user: a\nassistant: bee\n"
    assert targets_text(own, ids, labels) == " bee\n"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (None, "non-empty list"),
        ([], "non-empty list"),
        (["hi"], "role None; accepted"),
        ([{"role": "human", "content": "x"}], "role 'human'; accepted: system, user, assistant"),
        ([{"role": "user", "content": None}], "content of type NoneType"),
        (chat("only a question"), "no assistant turn"),
        ([{"role": "assistant", "content": "x"}], "first turn after the system message must be the user's"),
    ],
)
def test_a_broken_conversation_is_named_and_kept_out_of_the_store_with_a_reason(tokenizer, messages, says):
    with pytest.raises(ValueError, match=says):
        encode_chat(tokenizer, messages)
    store, report = TokenStore.build([{"messages": messages}, sample("q", "a")], tokenizer, 99)
    assert len(store) == 1 and store.meta[0]["row"] == 1 and report["left_out"] == 1
    assert says in report["rows"][0]["reason"]


def test_a_tokenizer_without_template_is_named(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template: set tokenizer.chat_template"):
        encode_chat(own, chat("a", "b"))


# -------------------------------------------------------------------------------------------------------------- store
@pytest.fixture(scope="module")
def rows():
    return [
        sample("Hi", "Hello!", task="t0"),
        sample("word " * 50, "short", task="t1"),
        sample("Hi", "many words " * 40, task="t2"),
        sample("Say nothing", "", task="t3"),
    ]


def test_the_store_holds_what_encode_gives_and_reads_back(tokenizer, rows, tmp_path):
    built, report = TokenStore.build(rows, tokenizer, 1000)
    kept = [0, 1, 2]
    assert [m["row"] for m in built.meta] == kept and [m["task"] for m in built.meta] == ["t0", "t1", "t2"]
    assert (report["samples"], report["kept"], report["left_out"], report["empty_answers"]) == (4, 3, 1, 1)
    assert "no target token" in report["rows"][3]["reason"]
    for store in (built, TokenStore.load(built.save(tmp_path / "store"))):
        assert len(store) == 3 and store.input_ids.dtype == np.int32 and store.labels_mask.dtype == bool
        for i, row in enumerate(kept):
            ids, labels = encode_chat(tokenizer, rows[row]["messages"])
            assert (store[i][0] == ids).all() and (store[i][1] == labels).all()
            assert store.lengths[i] == len(ids) and store.targets[i] == (labels[1:] != -100).sum() > 0
        assert store.meta == built.meta and "messages" not in store.meta[0]
        assert (store[-1][0] == store[2][0]).all() and len(list(store)) == 3
        with pytest.raises(IndexError, match="row 3 of a store of 3"):
            store[3]
    (shard,) = (tmp_path / "store").glob("shard-*.arrow")
    assert shard.stat().st_size < 2 * built.lengths.sum() + 4096  # 2 bytes a token, the rest is schema and runs


def test_a_target_at_position_0_is_not_counted():
    store = TokenStore(np.arange(5, dtype=np.int32), np.array([1, 1, 0, 1, 1], bool), np.array([0, 3, 5]), [{}, {}])
    assert store.targets.tolist() == [1, 1]


def test_every_fate_of_an_over_long_row(tokenizer, rows):
    lengths = [len(encode_chat(tokenizer, r["messages"])[0]) for r in rows]
    limit = 60
    assert lengths[0] < limit < min(lengths[1:3])
    store, report = TokenStore.build(rows, tokenizer, limit)
    assert [r["fate"] for r in report["rows"]] == ["kept", "left_out", "truncated", "left_out"]
    assert f"no target token in its first 60 tokens ({lengths[1]} in all)" in report["rows"][1]["reason"]
    assert store.lengths.tolist() == [lengths[0], limit] and report["tokens_cut"] == lengths[2] - limit
    assert report["kept"] + report["truncated"] + report["left_out"] == report["samples"] == 4

    store, report = TokenStore.build(rows, tokenizer, limit, over_long="drop")
    assert [r["fate"] for r in report["rows"]] == ["kept", "left_out", "left_out", "left_out"]
    assert "more than max_length 60" in report["rows"][2]["reason"] and report["tokens_cut"] == 0

    with pytest.raises(ValueError, match=r"sample 1 .*tokens are more than max_length 60; raise max_length"):
        TokenStore.build(rows, tokenizer, limit, over_long="error")
    with pytest.raises(ValueError, match="'split'; accepted: truncate, drop, error"):
        TokenStore.build(rows, tokenizer, limit, over_long="split")


def test_a_row_of_exactly_the_limit_is_kept_whole(tokenizer, rows):
    exact = len(encode_chat(tokenizer, rows[0]["messages"])[0])
    store, report = TokenStore.build(rows[:1], tokenizer, exact)
    assert report["kept"] == 1 and store.lengths.tolist() == [exact]


def test_nothing_usable_is_an_error_and_nothing_given_is_an_empty_store(tokenizer, rows, tmp_path):
    with pytest.raises(ValueError, match="none of 1 samples could be used; the first: no target"):
        TokenStore.build(rows[3:], tokenizer, 100)
    store, report = TokenStore.build([], tokenizer, 100)
    assert len(store) == 0 and report["samples"] == 0 and len(TokenStore.load(store.save(tmp_path))) == 0


def test_a_store_that_is_missing_or_torn_is_named(tokenizer, rows, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no complete token store here \(index.arrow is missing"):
        TokenStore.load(tmp_path)
    built, _ = TokenStore.build(rows, tokenizer, 1000)
    built.save(tmp_path)
    shard = tmp_path / "shard-00000.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"parts disagree \(shard-00000.arrow has \d+ bytes, the index knows .*build the store again"):
        TokenStore.load(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"parts disagree \(shard-00000.arrow is missing"):
        TokenStore.load(tmp_path)
    shard.write_bytes(b"x" * len(whole))
    with pytest.raises(ValueError, match="not an Arrow file of a token store"):
        TokenStore.load(tmp_path)[0]
    (tmp_path / "index.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match="not an Arrow file of a token store"):
        TokenStore.load(tmp_path)


def test_saving_over_an_older_and_larger_store_leaves_nothing_of_it(tokenizer, rows, tmp_path, monkeypatch):
    import longalign_lib.data.tokens as module

    monkeypatch.setattr(module, "ROWS_A_SHARD", 1)
    big, _ = TokenStore.build(rows, tokenizer, 1000)
    big.save(tmp_path)
    assert len(list(tmp_path.glob("shard-*"))) == 3
    for i, (a, b) in enumerate(zip(big, TokenStore.load(tmp_path))):
        assert (a[0] == b[0]).all() and (a[1] == b[1]).all(), i
    small, _ = TokenStore.build(rows[:1], tokenizer, 1000)
    small.save(tmp_path)
    loaded = TokenStore.load(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.arrow", "shard-00000.arrow"] and len(loaded) == 1
    with pytest.raises(ValueError, match="is where this store was loaded from"):
        loaded.save(tmp_path)
    assert len(TokenStore.load(loaded.save(tmp_path / "copy"))) == 1


def test_a_store_of_the_older_form_opens(tmp_path):
    for name, value in {"input_ids": np.array([0, 5, 7], np.int32), "labels_mask": np.array([0, 1, 1], bool), "starts": np.array([0, 2, 3])}.items():
        np.save(tmp_path / f"{name}.npy", value)
    (tmp_path / "meta.json").write_text('[{"row": 0}, {"row": 1}]')
    old = TokenStore.load(tmp_path)
    assert old[0][1].tolist() == [-100, 5] and old.targets.tolist() == [1, 0] and old.meta[1] == {"row": 1}
    new = TokenStore.load(old.save(tmp_path / "new"))
    assert new[0][1].tolist() == [-100, 5] and new[1][1].tolist() == [7] and new.targets.tolist() == [1, 0]
    (tmp_path / "meta.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"parts disagree .*build the store again"):
        TokenStore.load(tmp_path)


def test_ids_beyond_16_bits_and_id_0_survive(tmp_path):
    ids = np.array([0, 65_535, 65_536, 0, 200_000], np.int32)
    store = TokenStore(ids, np.array([1, 1, 0, 1, 1], bool), np.array([0, 3, 5]), [{"a": "é"}, {}])
    again = TokenStore.load(store.save(tmp_path))
    assert again.input_ids.tolist() == ids.tolist() and again.labels_mask.tolist() == [True, True, False, True, True]
    assert repr(again) == repr(store) == "TokenStore(2 rows, 5 tokens, 2 targets)"
    assert again.starts.tolist() == [0, 3, 5] and again.meta[0:2] == [{"a": "é"}, {}] and list(again.meta)[-1] == again.meta[-1] == {}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_targets_of_any_stretch_are_those_counted_one_by_one(tmp_path_factory, data):
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=int(starts[-1]), max_size=int(starts[-1]))), dtype=bool)
    store = TokenStore(np.arange(starts[-1], dtype=np.int32), mask, starts, [{} for _ in lengths])
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8)), dtype=np.int64)
    begin = np.array([data.draw(st.integers(0, lengths[r])) for r in rows], dtype=np.int64)
    held = np.array([data.draw(st.integers(0, lengths[r] - b)) for r, b in zip(rows, begin)], dtype=np.int64)
    oracle = [int(mask[starts[r] :][b : b + n][1:].sum()) for r, b, n in zip(rows, begin, held)]
    whole = [int(mask[a + 1 : b].sum()) for a, b in itertools.pairwise(starts)]
    for one in (store, TokenStore.load(store.save(tmp_path_factory.mktemp("s")))):
        assert one.count_targets(rows, begin, held).tolist() == oracle
        assert one.targets.tolist() == whole and one.lengths.tolist() == lengths
        for i in range(len(lengths)):
            assert (one[i][1] != -100).tolist() == mask[starts[i] : starts[i + 1]].tolist()


def test_an_id_that_does_not_fit_is_an_error_and_no_other_token(tmp_path):
    row = {"input_ids": np.array([1, 70_000]), "mask": np.array([False, True]), "sample": 0, "tokens": 2, "meta": {}}
    with pytest.raises(ValueError, match="token id -200 is negative"):
        files.write_shard(tmp_path / "shard-00000.arrow", [row | {"input_ids": np.array([1, -200])}], files.id_type(50_000), {})
    with pytest.raises(ValueError, match="token id 70000 does not fit into uint16"):
        files.write_shard(tmp_path / "shard-00000.arrow", [row], files.id_type(50_000), {})
    files.write_shard(tmp_path / "shard-00000.arrow", [row], files.id_type(70_001), {})
    assert files.open_shard(tmp_path / "shard-00000.arrow").ids.tolist() == [1, 70_000]
