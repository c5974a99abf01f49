import itertools
import re

import pytest

from longalign_lib.evaluate import ladder
from longalign_lib.evaluate.lexical import word_f1
from longalign_lib.evaluate.longbench_chat import read_items

ITEMS = read_items()


@pytest.mark.parametrize("item", ITEMS, ids=lambda i: i.id)
def test_each_level_has_the_defects_of_the_one_above_and_one_more(item):
    rungs = ladder.rungs(item.reference, "Something else.", seed=3)
    by = {r.level: r for r in rungs}
    assert [r.level for r in rungs] == sorted(by, reverse=True) and {4, 3, 2, 0} <= set(by)
    assert by[4].text == item.reference.strip() and by[0].text == "Something else."
    assert set(by[4].kept) > set(by[3].kept) > set(by[2].kept) > set()
    whole = ladder.sentences(item.reference)
    for level in (3, 2):
        assert [s for s in whole if s in by[level].text] == [whole[i] for i in by[level].kept]  # whole sentences, in order
        assert "  " not in by[level].text
    assert len({r.text for r in rungs}) == len(rungs)
    if 1 in by:
        assert by[1].kept == by[2].kept and len(by[1].text) == len(by[2].text)
        assert re.sub(r"[\d〇一二三四五六七八九]", "#", by[1].text) == re.sub(r"[\d〇一二三四五六七八九]", "#", by[2].text)
    overlap = [word_f1(r.text, item.reference) for r in rungs]
    assert all(a >= b for a, b in itertools.pairwise(overlap))  # another measure sees no rung out of order


def test_most_references_have_all_five_levels_in_both_languages():
    five = [i.language for i in ITEMS if len(ladder.rungs(i.reference, "x.")) == 5]
    assert len(five) >= len(ITEMS) - 2 and {"en", "zh"} == set(five)


@pytest.mark.parametrize("text", ["In 1876 it was 6.4 cm, 17,080 in all.", "二〇二〇年有三百人，深六十二厘米。", "It was 10% of 1000."])
def test_every_number_becomes_another_of_as_many_digits(text):
    for seed in range(30):
        changed = ladder.change_numbers(text, seed)
        pattern = r"\d+|[〇一二三四五六七八九]+"
        before, after = re.findall(pattern, text), re.findall(pattern, changed)
        assert re.sub(pattern, "#", text) == re.sub(pattern, "#", changed)
        assert all(a != b and len(a) == len(b) for a, b in zip(before, after, strict=True))
    assert ladder.change_numbers("No figures here. 一个人也没有说话", 1)[:16] == "No figures here."
    assert ladder.change_numbers("none") == "none"


def test_bad_references():
    with pytest.raises(ValueError, match="at least 3 sentences, this one has 2"):
        ladder.rungs("One. Two.", "Other.")
    with pytest.raises(ValueError, match="same text"):
        ladder.rungs("One is here. Two is there. Three.", " One is here. Two is there. Three. ")
    assert [r.level for r in ladder.rungs("It is red. It is blue. It is green.", "No.")] == [4, 3, 2, 0]  # no number to change
