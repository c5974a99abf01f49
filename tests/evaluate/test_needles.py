import random

import pytest

from longalign_lib.evaluate import needles
from longalign_lib.evaluate.needles import CLASSIC, Needle, needle_family, normalise, parts_found, recall


@pytest.mark.parametrize("language", ["en", "zh"])
def test_family_is_seeded_distinct_and_answerable(language):
    family = needle_family(60, seed=3, language=language)
    assert family == needle_family(60, seed=3, language=language) != needle_family(60, seed=4, language=language)
    assert len({n.text for n in family}) == 60
    assert len({n.question[:12] for n in family}) > 2  # several templates, not one
    for n in family:
        assert recall(n.text, n.parts) == 1  # the needle answers its question
        assert not any(parts_found(n.question, n.parts))  # and the question does not
    assert not {n.text for n in needle_family(60, 5, language)} <= {n.text for n in family}


def test_family_leaves_global_random_state_alone():
    random.seed(1)
    before = random.getstate()
    needle_family(5)
    assert random.getstate() == before


def test_recall_needs_whole_words_and_all_parts():
    n = Needle("The code is 7421.", "What is the code?", ("7421",))
    assert recall("It's **7,421**!", n.parts) == 1
    assert recall("It is 17421.", n.parts) == 0
    assert recall("A SANDWICH, then nothing.", CLASSIC.parts) == 0.5
    assert recall("Eat a sandwich in Dolores\nPark.", CLASSIC.parts) == 1
    assert recall("放在钟楼里。", ("钟楼",)) == 1
    assert recall("", CLASSIC.parts) == 0
    for said in ("0.7421%", "3.7421", "７．７４２１", "7421.50"):  # another number
        assert recall(f"It is {said}", n.parts) == 0
    assert recall("17.421", ("421",)) == 0 and recall("It is 3.5.", ("3.5",)) == 1 and recall("3 or 5", ("3.5",)) == 0
    for said in ("It is 7421.", "It is -7421", "12:7421...", "密码是7421。", "No.7421"):
        assert recall(said, n.parts) == 1
    assert normalise("3.5 of 7,421") == "3 5 of 7421"  # word overlap reads as before
    assert normalise("Ｄolores—Park") == "dolores park"


@pytest.mark.parametrize("parts", [(), ("...",)])
def test_parts_without_letters_are_refused(parts):
    with pytest.raises(ValueError, match=r"letters or digits"):
        recall("anything", parts)


def test_too_many_or_unknown_language(monkeypatch):
    with pytest.raises(ValueError, match=r"xx.*en, zh"):
        needle_family(1, language="xx")
    monkeypatch.setitem(needles._FAMILIES, "xx", lambda rng: Needle(f"It is {rng.randrange(3)}.", "What?", ("it",)))
    assert len(needle_family(3, language="xx")) == 3
    with pytest.raises(ValueError, match=r"asked for 4 different needles, the 'xx' family gave 3: ask for fewer"):
        needle_family(4, language="xx")
