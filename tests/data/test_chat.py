"""Chat templates of many kinds: the labelled tokens are the answers and their end tokens, and nothing else."""

from __future__ import annotations

import datetime
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign_lib.data import chat as module
from longalign_lib.data.chat import PLAIN_TEMPLATE, encode_chat, encode_chats, fix_date
from longalign_lib.data.encode import encode_rows

sys.path.insert(0, str(Path(__file__).parent))
from chat_templates import CHATML, CHATML_MARKED, FAMILIES, LLAMA32, QWEN3, QWEN3_MARKED, with_template


def conversation(*turns: str, system: str | None = None) -> list[dict]:
    head = [{"role": "system", "content": system}] if system is not None else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]


def stretches(tokenizer, ids, labels) -> list[str]:
    """The text of each run of labelled tokens."""
    assert ((labels == -100) | (labels == ids)).all()
    groups = itertools.groupby(range(len(ids)), lambda t: labels[t] != -100)
    return [tokenizer.decode(ids[list(run)]) for on, run in groups if on]


@pytest.fixture(scope="module")
def families(tokenizer):
    return {name: with_template(tokenizer, f[0], f[1]) for name, f in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_answers_and_their_ends_are_the_targets(families, name, system):
    own, (_, _, end, becomes, takes_system) = families[name], FAMILIES[name]
    answers = ["Paris, of course.", "About 2.1 million, 你好!"]
    messages = conversation("Capital of France?", answers[0], "How many live there? 你好", answers[1], system=system)
    if system and not takes_system:
        with pytest.raises(ValueError, match=r"the chat template refuses this conversation: (System role|roles must)"):
            encode_chat(own, messages)
        return
    ids, labels = encode_chat(own, messages)
    assert ids.tolist() == own.apply_chat_template(messages)["input_ids"]
    found = stretches(own, ids, labels)
    expected = [becomes(a) + end for a in answers]
    if name == "qwen 3 marked":  # the thoughts of the last answer, none here, are the model's to write
        expected[1] = "<think>\n\n</think>\n\n" + expected[1]
    assert found == expected


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("qwen 3 marked",)])
def test_blank_answers_are_masked_in_every_family(families, name):
    own, (_, _, end, becomes, _) = families[name], FAMILIES[name]
    ids, labels = encode_chat(own, conversation("a", "", "b", " \n", "c", "yes"))
    assert stretches(own, ids, labels) == [becomes("yes") + end]


words = st.text(alphabet=st.sampled_from("ab .\n你é🙂<|>_im"), min_size=1, max_size=10)


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(words, words.map(lambda t: "A" + t)), min_size=1, max_size=3), name=st.sampled_from(["llama 3", "gemma", "mistral", "chatml"]))
def test_any_conversation_in_any_family(families, pairs, name):
    own, (_, _, end, becomes, _) = families[name], FAMILIES[name]
    messages = conversation(*(t for p in pairs for t in p))
    ids, labels = encode_chat(own, messages)
    assert ids.tolist() == own.apply_chat_template(messages)["input_ids"]
    assert stretches(own, ids, labels) == [becomes(answer) + end for _, answer in pairs]


# -------------------------------------------------------------------------------------------- the template's own marks
def test_marks_and_prefix_difference_give_the_same_labels(tokenizer):
    marked, plain = with_template(tokenizer, CHATML_MARKED), with_template(tokenizer, CHATML)
    messages = conversation("q one", "answer one", "q two", "answer two", system="s")
    one, two = encode_chat(marked, messages), encode_chat(plain, messages)
    assert (one[0] == two[0]).all() and (one[1] == two[1]).all()
    theirs = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert (one[1] != -100).tolist() == [bool(m) for m in theirs] and sum(theirs) == 6


def test_marks_without_the_end_token_still_teach_to_stop(tokenizer):
    short = CHATML_MARKED.replace("{{ m['content'] + '<|im_end|>' }}{%- endgeneration -%}{{ '\n' }}",
                                  "{{ m['content'] }}{%- endgeneration -%}{{ '<|im_end|>\n' }}")  # fmt: skip
    assert short != CHATML_MARKED
    own = with_template(tokenizer, short)
    assert stretches(own, *encode_chat(own, conversation("q", "one", "r", "two"))) == ["one<|im_end|>", "two<|im_end|>"]


@pytest.mark.parametrize("wrong", [
    CHATML_MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'user'"),
    CHATML_MARKED.replace("{{ m['content'] + '<|im_end|>' }}", "{{ m['content'][3:] + '<|im_end|>' }}"),
    CHATML_MARKED.replace("{%- generation -%}{{ m['content']", "{{ m['content'][:4] }}{%- generation -%}{{ m['content'][4:]"),
    CHATML_MARKED.replace("{{ m['content'] + '<|im_end|>' }}{%- endgeneration -%}", "{{ m['content'][:2] }}{%- endgeneration -%}{{ m['content'][2:] + '<|im_end|>' }}"),
])  # fmt: skip
def test_marks_around_something_else_are_refused(tokenizer, wrong):
    own = with_template(tokenizer, wrong)
    messages = conversation("question", "answer", "more", "again")
    if "[3:]" in wrong:  # it writes less than the answer, and marks what it writes: the two agree
        assert stretches(own, *encode_chat(own, messages)) == ["wer<|im_end|>", "in<|im_end|>"]
        return
    with pytest.raises(ValueError, match=r"assistant mask and the prefix difference disagree on turn 1"):
        encode_chat(own, messages)


# ------------------------------------------------------------------------------------------------- templates that rewrite
def test_a_template_that_drops_earlier_thoughts_is_refused_and_each_answer_alone_works(tokenizer):
    own = with_template(tokenizer, QWEN3)
    messages = conversation("q", "<think>\nhm\n</think>\n\none", "r", "<think>\nwell\n</think>\n\ntwo")
    with pytest.raises(ValueError, match=r'turn 1 differently once later turns follow.*answers="each"'):
        encode_chat(own, messages)
    rows = list(encode_rows([(7, {"messages": messages, "task": "t"})], own, 999, answers="each"))
    found = [stretches(own, r["input_ids"], np.where(r["mask"], r["input_ids"], -100)) for r in rows]
    assert found == [["<think>\nhm\n</think>\n\none<|im_end|>"], ["<think>\nwell\n</think>\n\ntwo<|im_end|>"]]
    assert [r["meta"] for r in rows] == [{"task": "t", "row": 7, "turn": 1}, {"task": "t", "row": 7, "turn": 3}]
    # what stands before the second answer is what the model is given when it answers
    given_to_model = own.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert rows[1]["input_ids"][: len(given_to_model)].tolist() == given_to_model and "hm" not in own.decode(given_to_model)


def test_a_generation_prompt_that_is_not_in_the_answer_is_named(tokenizer):
    own = with_template(tokenizer, QWEN3)
    _, labels = encode_chat(own, conversation("q", "one"))
    assert own.decode(labels[labels >= 0]) == "<think>\n\n</think>\n\none<|im_end|>"
    _, labels = encode_chat(own, conversation("q", "one"), enable_thinking=False)
    assert own.decode(labels[labels >= 0]) == "one<|im_end|>"
    with pytest.raises(ValueError, match=r"generation prompt ends with '\\n</think>.*enable_thinking=False"):
        encode_chat(own, conversation("q", "<think>\nhm\n</think>\n\none"), enable_thinking=False)


def test_marks_serve_where_the_prefix_cannot(tokenizer):
    own = with_template(tokenizer, QWEN3_MARKED)
    messages = conversation("q", "<think>\nhm\n</think>\n\none", "r", "<think>\nwell\n</think>\n\ntwo")
    assert stretches(own, *encode_chat(own, messages)) == ["one<|im_end|>", "<think>\nwell\n</think>\n\ntwo<|im_end|>"]


def test_a_count_in_front_is_a_rewriting_too(tokenizer):
    own = with_template(tokenizer, "{{ messages|length }}" + CHATML)
    with pytest.raises(ValueError, match="turn 1 differently once later turns follow"):
        encode_chat(own, conversation("a", "b", "c", "d"))


# ------------------------------------------------------------------------------------------------- where answers begin and end
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("template", [
    NO_PROMPT, NO_PROMPT.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}"),
    NO_PROMPT.replace("<|im_start|>", ""), NO_PROMPT.replace("\n{{ m", ": {{ m"),
])  # fmt: skip
def test_a_template_without_a_generation_prompt_does_not_train_on_its_header(tokenizer, template):
    own = with_template(tokenizer, template)
    found = stretches(own, *encode_chat(own, conversation("q", "assistant", "r", "a")))
    assert [f.lstrip() for f in found] == ["assistant<|im_end|>", "a<|im_end|>"]


def test_a_header_in_the_turn_before_is_no_header_of_the_answer_and_one_that_depends_on_it_is_refused(tokenizer):
    early = "{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% if m['role'] == 'user' %}assistant\n{% endif %}{% endfor %}"
    own = with_template(tokenizer, early)
    assert stretches(own, *encode_chat(own, conversation("q", "one", "r", "a"))) == ["one<|im_end|>", "a<|im_end|>"]
    own = with_template(tokenizer, NO_PROMPT.replace("{{ m['role'] }}", "{{ m['content'] | length }}"))
    with pytest.raises(ValueError, match=r"no generation prompt, and what it writes before the answer of turn 1 .*depends on the answer"):
        encode_chat(own, conversation("q", "four"))


def test_the_first_word_behind_a_prompt_that_ends_with_a_space_is_a_target(tokenizer):
    spaced = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    own = with_template(tokenizer, spaced)
    assert stretches(own, *encode_chat(own, conversation("q", "Yes it is", "r", "No"))) == [" Yes it is<|im_end|>", " No<|im_end|>"]


def test_an_end_token_between_turns_is_a_target_and_one_that_opens_a_turn_is_not(tokenizer):
    between = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
               "{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}")  # fmt: skip
    own = with_template(tokenizer, between)
    assert stretches(own, *encode_chat(own, conversation("q", "one", "r", "two"))) == ["one<|im_end|>", "two"]
    own = with_template(tokenizer, CHATML.replace("<|im_end|>", ""))
    assert "<|im_start|>" not in "".join(stretches(own, *encode_chat(own, conversation("q", "one", "r", "two"))))


# ----------------------------------------------------------------------------------------------------------------- date
def test_a_date_in_the_template_can_be_fixed(tokenizer):
    own = with_template(tokenizer, LLAMA32, FAMILIES["llama 3"][1])
    fixed = fix_date(LLAMA32, datetime.date(2024, 2, 3))
    assert "strftime_now" not in fixed and fix_date(CHATML, datetime.date(2024, 2, 3)) == CHATML
    ids, labels = encode_chat(own, conversation("q", "one"), chat_template=fixed)
    assert "Today: 03 Feb 2024<|eot_id|>" in own.decode(ids) and stretches(own, ids, labels) == ["one<|eot_id|>"]
    assert "Today: 1 May<" in own.decode(encode_chat(own, conversation("q", "one"), date_string="1 May")[0])
    with pytest.raises(ValueError, match="computes its date format"):
        fix_date("{{ strftime_now(format) }}", datetime.date(2024, 2, 3))


# ------------------------------------------------------------------------------------------------------ no template, slow
def test_the_plain_template_serves_a_tokenizer_without_one(tokenizer):
    own = with_template(tokenizer, None)
    with pytest.raises(ValueError, match=r"has no chat template: set tokenizer.chat_template \(longalign_lib.data.chat.PLAIN_TEMPLATE"):
        encode_chat(own, conversation("a", "b"))
    own.chat_template = PLAIN_TEMPLATE
    ids, labels = encode_chat(own, conversation("one", "two", "three", "four", system="s"))
    assert stretches(own, ids, labels) == ["two<|im_end|>", "four<|im_end|>"]
    assert own.decode(ids).startswith("### system\ns\n### user\none\n### assistant\ntwo<|im_end|>\n### user\n")


def test_a_tokenizer_without_offsets():
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    assert not slow.is_fast
    slow.chat_template = PLAIN_TEMPLATE
    messages = conversation("eins", "zwei 你", "drei", "vier")
    ids, labels = encode_chat(slow, messages)
    assert ids.tolist() == slow.apply_chat_template(messages)["input_ids"]
    assert stretches(slow, ids, labels) == ["zwei 你</s>", "vier</s>"]


def test_special_tokens_that_only_the_vocabulary_knows_end_a_turn(tokenizer):
    from transformers import AddedToken

    own = with_template(tokenizer, CHATML.replace("im_end", "fin"))
    own.add_tokens([AddedToken("<|fin|>", special=True)], special_tokens=True)
    own.__dict__.get("_special_tokens_map", {}).pop("additional_special_tokens", None)
    assert stretches(own, *encode_chat(own, conversation("a", "b", "c", "d"))) == ["b<|fin|>", "d<|fin|>"]
    assert set(own.all_special_ids) <= set(module.control_ids(own).tolist())


# ------------------------------------------------------------------------------------------------------------- broken
@pytest.mark.parametrize(("messages", "says"), [
    (conversation("a", "b") + conversation("c", "d")[1:], "message 2 is a second assistant turn in a row"),
    (conversation("a") + conversation("b", "c"), "message 1 is a second user turn in a row"),
    ([*conversation("a", "b"), {"role": "system", "content": "s"}], "message 2 is a system turn; it may only stand first"),
    ([{"role": "system", "content": "s"}], "the first turn after the system message must be the user's; there is none"),
    ([{"role": "system", "content": "s"}, {"role": "assistant", "content": "s"}], "first turn after the system message must be"),
    (conversation("a", "b \ud83d"), "message 1 (assistant) holds half of a surrogate pair"),
    ([{"role": "user", "content": ["a"]}], "content of type list; give a string"),
    ([{"role": "tool", "content": "a"}], "role 'tool'; accepted: system, user, assistant"),
    ([{"content": "a"}], "role None; accepted"), ([{"role": "user"}], "content of type NoneType"), ({}, "non-empty list"),
])  # fmt: skip
def test_broken_conversations_are_named_beside_good_ones(tokenizer, messages, says):
    good = conversation("a", "b")
    first, broken, last = encode_chats(tokenizer, [good, messages, good])
    assert isinstance(broken, ValueError) and says in str(broken)
    assert (first[0] == last[0]).all() and (first[0] == encode_chat(tokenizer, good)[0]).all()
    with pytest.raises(ValueError, match="answers is 'some'; accepted: all, last"):
        encode_chat(tokenizer, good, answers="some")


def test_the_last_answer_alone(tokenizer):
    ids, labels = encode_chat(tokenizer, conversation("a", "b", "c", "d", "e"), answers="last")
    assert stretches(tokenizer, ids, labels) == ["d<|im_end|>"]
