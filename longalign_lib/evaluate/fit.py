"""Cut text to a number of tokens without leaving text: search for a position in characters, count in tokens.

Cutting token ids and decoding them would break characters that span tokens and depend on how a tokenizer decodes.
Here a cut is a slice of the original text. Counts grow with the slice but for a token at the seam. Cost: about ten
tokenisations.
"""

from __future__ import annotations

from collections.abc import Callable

from longalign_lib.data.text import token_ids


def largest(count: Callable[[int], int], limit: int, low: int, high: int) -> int:
    """The largest position in [low, high] whose count is <= limit, for counts that grow with the position.

    Alternates interpolation with halving. Returns ``low`` when even that is over the limit.
    """
    below, above, halve = count(low), count(high), False
    if above <= limit:
        return high
    while high - low > 1:
        guess = (
            low + (high - low) // 2 if halve else low + round((high - low) * (limit - below) / max(1, above - below))
        )
        guess, halve = min(max(guess, low + 1), high - 1), not halve
        if (n := count(guess)) <= limit:
            low, below = guess, n
        else:
            high, above = guess, n
    return low


def cut_middle(tokenizer, text: str, limit: int, mark: str = "\n[...]\n") -> tuple[str, int]:
    """Keep the beginning and the end of a text, half of the tokens each, and leave out its middle.

    Args:
        limit: tokens of the result, mark included.
        mark: what stands where the middle was.

    Returns:
        (text, tokens left out): the text unchanged and 0 if it fits.

    Raises:
        ValueError: a limit that has no room for the mark and a token on each side.
    """
    total = len(token_ids(tokenizer, text))
    if total <= limit:
        return text, 0
    room = limit - len(token_ids(tokenizer, mark))
    if room < 2:
        raise ValueError(f"a limit of {limit} tokens leaves no room around the mark {mark!r}; allow more")
    while True:
        head = largest(lambda n: len(token_ids(tokenizer, text[:n])), room - room // 2, 0, len(text))
        tail = largest(lambda n: len(token_ids(tokenizer, text[len(text) - n :])), room // 2, 0, len(text) - head)
        ends = text[:head], text[len(text) - tail :]
        result = ends[0] + mark + ends[1]
        if len(token_ids(tokenizer, result)) <= limit or room < 3:
            return result, total - sum(len(token_ids(tokenizer, end)) for end in ends)
        room -= 1  # the seams with the mark cost a token more than the pieces alone
