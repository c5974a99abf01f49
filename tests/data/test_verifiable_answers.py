"""Replies are marked by what they say, not by how they write it, and shotgun replies are wrong."""

from __future__ import annotations

import pytest

from longalign_lib.data.verifiable_answers import is_right


def sample(kind, expected, wrong=(), pairs=()):
    return {"task": f"verifiable:{kind}", "expected": list(expected), "wrong": list(wrong), "pairs": [list(p) for p in pairs]}


RIGHT = [
    (("retrieve", ["48213"]), ["48213", "The code is **48,213**.", "４８２１３", "密码是48213。", "it is `48213`!", "48213."]),
    (("retrieve", ["07:05"]), ["At 07:05.", "7:05", "7.05 am", "It leaves at 7:05 a.m.", "7点05分"]),
    (("retrieve", ["19:30"]), ["19:30", "7:30 pm", "7.30 p.m.", "晚上7点30分", "晚7点30分", "今晚7点30分", "7:30 in the evening",
        "Tonight at 7:30.", "This evening at 7:30", "at 7:30 at night", "7:30 (pm)", "19:30 in the evening"]),
    (("retrieve", ["12:05"]), ["12:05", "12:05 pm", "12:05 in the afternoon", "中午12点05分", "下午12点05分"]),
    (("retrieve", ["6点15分"]), ["6点15分出发。", "6:15", "06:15"]),
    (("retrieve", ["1712"]), ["in 1712", "1712年", "(1712)"]),
    (("retrieve", ["Ines Quist"]), ["it is INES QUIST!", "Ines  Quist", "Ines\nQuist", "**Ines Quist**", "“Ines Quist”"]),
    (("retrieve", ["欧阳若溪"]), ["管理员是欧阳若溪。", "欧阳若溪"]),
    (("retrieve", ["amber otter"]), ["“Amber Otter”", "the password is 'amber otter'"]),
    (("count", ["3"], ["2"]), ["3", "There are 3.", "Three of them", "Of the 4, three have one.", "三个", "3个", "其中有3个", "一共三个。"]),
    (("count", ["2"], ["3"]), ["两个", "two", "2", "有二个", "the answer—two"]),
    (("code", ["utf-8"]), ["'utf-8'", '"utf-8"', "`utf-8`", "utf-8", "It is UTF-8"]),
    (("code", ["utf-8"]), ["utf-8—the usual one", "编码是utf-8。", "(utf-8)", "encoding=utf-8,"]),
    (("code", ["-5"]), ["`-5`", "−5", "n=-5."]),
    (("code", ["os.path"]), ["It is os.path.", "`os.path`, not os"]),
    (("code", ["0.5"]), ["0.5", "the default is `0.5`."]),
    (("code", ["host", "port", "headers"]), ["`host`, `port`, `headers`", "host, port=80 and headers", "1. host\n2. port\n3. headers"]),
    (("order", ["Tolna", "Mirel", "Darrow"]), ["Tolna, Mirel, Darrow", "First Tolna, then Mirel and at last Darrow.",
        "Of Darrow, Tolna and Mirel the order is: Tolna, Mirel, Darrow.", "Tolna → Mirel → Darrow"]),
    (("order", ["the old mill", "the vault"]), ["The old mill, the vault", "1. Old mill\n2. Vault"]),
    (("list", ["12345", "54321"], (), [("the vault", "54321"), ("the old mill", "12345")]),
        ["The vault: 54321; the old mill: 12345", "54321, 12345", "- the old mill 12345\n- the vault 54321",
         "12345 (the old mill), 54321 (the vault)"]),
]  # fmt: skip
WRONG = [
    (("retrieve", ["48213"], ["55555"]), ["", "4821", "148213", "482130", "48213 or 55555", "4 8 2 1 3", "48213.5"]),
    (("retrieve", ["07:05"]), ["17:05", "7:50", "7:05 pm", "晚上7点05分", "7:05 in the evening", "tonight at 7:05"]),
    (("retrieve", ["19:30"]), ["7:30", "9:30", "7:30 am", "7:30 in the morning", "凌晨7点30分"]),
    (("retrieve", ["12:05"]), ["12:05 am", "12:05 a.m.", "凌晨12点05分", "12:05 in the morning", "晚上12点05分"]),
    (("retrieve", ["Ines Quist"]), ["Ines", "Quist", "Ines Quistova", "Quist, Ines Maria"]),
    (("retrieve", ["1712"]), ["1,7121", "01712a", "1713"]),
    (("count", ["3"], ["2"]), ["13 or 30", "2 or 3", "two, no, three", "第三个", "thirteen", "三十个", "33"]),
    (("count", ["2"], ["3"]), ["the second", "十二个", "22", "twenty-two", "two-three"]),
    (("code", ["5"]), ["0.5", "5.2", "55", "x5", "-5", "`-5`", "−5", "5_000"]),
    (("code", ["utf-8"]), ["utf-8-sig", "'utf-8-sig'", "cp-utf-8"]),
    (("code", ["rb"]), ["rb+", "`rb+`"]),
    (("code", ["os.path"]), ["os.path.join", "posix/os.path"]),
    (("code", ["n"]), ["n_items", "_n", "/n", "n/a"]),
    (("code", ["707"], ["556"]), ["707 or 556", "556"]),
    (("code", ["host", "port", "headers"]), ["port, host, headers", "host, port"]),
    (("order", ["Tolna", "Mirel", "Darrow"]), ["Mirel, Tolna, Darrow", "Tolna, Darrow", "Tolna, Darrow, Mirel, Darrow",
        "Tolna, Mirel, Darrow, no: Darrow, Mirel, Tolna"]),
    (("list", ["12345", "54321"], (), [("the vault", "54321"), ("the old mill", "12345")]),
        ["The vault: 12345; the old mill: 54321", "12345, 54321", "54321", "the vault, the old mill"]),
]  # fmt: skip


LISTS = (
    "{k}: {v}; {l}: {w}.",
    "- {k}: {v}\n- {l}: {w}",
    "Keepers for {a} and {b}:\n- {k}: {v}\n- {l}: {w}",
    "Keepers for {a} and {b}:\n1. {v} ({k})\n2. {w} ({l})",
    "Keepers for {a} and {b}: {v} – {k}, {w} – {l}.",
    "Regarding {a} and {b}: {v} for {k} and {w} for {l}",
    "For {a} and {b}, the text gives: {k}, {v}, {l}, {w}",
    "The keepers of {k} and {l} are {v} and {w}.",
    "{v} and {w} are the keepers of {k} and {l}, respectively.",
    "The keeper of {k} is {v}, and {w} is the keeper of {l}.",
    "{v} keeps {k}, while the keeper of {l} is {w}.",
    "### {k}\n\n{v}\n\n### {l}\n\n{w}",
    "| {k} | {v} |\n| {l} | {w} |",
    "| {k} | {l} |\n|---|---|\n| {v} | {w} |",
    "Of {k} the text says, in a note that comes late, that {v} keeps it; of {l}, that {w} does. That was {a} and {b}.",
)


@pytest.mark.parametrize("form", LISTS)
def test_a_list_is_right_when_each_value_stands_with_its_own_key(form):
    keys, values = ("the mill of Tolna", "the mill of Mirel"), ("Ines Quist", "Emil Okafor")
    made = sample("list", values, pairs=tuple(zip(keys, values)))
    for a, b in (keys, keys[::-1]):
        for k, l in (keys, keys[::-1]):  # noqa: E741
            for v, w in (values, values[::-1]):
                reply = form.format(a=a, b=b, k=k, l=l, v=v, w=w)
                right = dict(zip(keys, values)) == {k: v, l: w}
                assert is_right(made, reply) == is_right(made, reply.replace("the mill", "Mill")) == right, reply


def test_a_list_of_four_and_one_that_leaves_keys_out():
    keys, values = ["the vault", "the old mill", "the pier", "the barn"], ["11111", "22222", "33333", "44444"]
    made = sample("list", values, pairs=tuple(zip(keys, values)))
    assert is_right(made, "The vault, the old mill, the pier and the barn have 11111, 22222, 33333 and 44444.")
    assert not is_right(made, "The vault, the old mill, the pier and the barn have 11111, 33333, 22222 and 44444.")
    assert is_right(made, "Barn 44444\nPier 33333\nVault 11111\nOld mill 22222")
    assert not is_right(made, "Barn 44444\nPier 33333\nVault 22222\nOld mill 11111")
    assert not is_right(made, "\n".join(f"{k}: {v}" for k in keys for v in values))  # every value to every key
    assert is_right(made, ", ".join(values)) and not is_right(made, ", ".join(reversed(values)))


@pytest.mark.parametrize(("made", "replies"), RIGHT)
def test_right_in_any_form(made, replies):
    for reply in replies:
        assert is_right(sample(*made), reply), reply


@pytest.mark.parametrize(("made", "replies"), WRONG)
def test_wrong_ones_are_wrong(made, replies):
    for reply in replies:
        assert not is_right(sample(*made), reply), reply


def test_samples_without_the_newer_keys_are_marked_too():
    assert is_right({"task": "verifiable:list", "expected": ["1", "2"]}, "2 and 1")
    assert not is_right({"task": "verifiable:list", "expected": ["1", "2"]}, "2")
    assert not is_right({"task": "verifiable:retrieve", "expected": []}, "anything")  # nothing expected is no free pass
