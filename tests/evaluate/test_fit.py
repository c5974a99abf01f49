import pytest

from longalign_lib.evaluate.fit import cut_middle, largest


def test_largest_is_the_largest():
    for steps in ([0, 0, 1, 1, 5, 9, 9, 30], list(range(50)), [i * i for i in range(40)], [3, 3, 3]):
        for limit in range(steps[0], steps[-1] + 2):
            brute = max(i for i, s in enumerate(steps) if s <= limit)
            assert largest(steps.__getitem__, limit, 0, len(steps) - 1) == brute
    assert largest([5, 6].__getitem__, 4, 0, 1) == 0  # over the limit already: says so by returning low


@pytest.mark.parametrize("text", ["The tide rose. It fell again! " * 60, "河水涨了三尺，人们都来看。" * 60])
@pytest.mark.parametrize("limit", [20, 61, 200])
def test_cut_middle_keeps_both_ends(any_tokenizer, text, limit):
    count = lambda t: len(any_tokenizer(t, add_special_tokens=False)["input_ids"])  # noqa: E731
    short, lost = cut_middle(any_tokenizer, text, limit)
    head, tail = short.split("\n[...]\n")
    assert (
        text.startswith(head) and text.endswith(tail) and head and tail
    )  # slices of the original, no broken characters
    assert limit - 8 <= count(short) <= limit
    assert lost == count(text) - count(head) - count(tail) > 0
    assert abs(count(head) - count(tail)) <= 4
    assert cut_middle(any_tokenizer, text, 10_000) == (text, 0)


def test_no_room(any_tokenizer):
    with pytest.raises(ValueError, match="limit of 1 tokens"):
        cut_middle(any_tokenizer, "word " * 50, 1)
