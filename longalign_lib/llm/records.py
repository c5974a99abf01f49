"""What goes into a chat client and what comes out: requests, replies, errors, prices; and how tokens are counted.

Token counts before a call are an upper bound where a budget needs one: a byte of UTF-8 is at most one token of the
byte-level tokenizers in use, and a chat template adds a few for each message and for the conversation. With the model's
own tokenizer they are counted. Cost: one pass over the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Tokens that a template may add: round each message, and once (a default system prompt, the answer's opening).
PER_MESSAGE, PER_CHAT = 16, 64
# Tokens beside what the model's own tokenizer counts, for a server whose template is a newer one.
SLACK = 16


class ChatError(RuntimeError):
    """A question that got no usable answer.

    Attributes:
        status: the HTTP status of the last try; None when there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class BudgetError(ChatError):
    """The call was not made, because it could have gone over the budget of calls, tokens or money."""


class EmptyReplyError(ChatError):
    """The endpoint answered without text (twice, or cut by max_tokens or a filter). Never cached, and paid for.

    ``finish`` is its finish_reason ("" where it gave none), or "refusal" where the model refused in a field of its own.
    """

    def __init__(self, message: str, status: int | None = None, finish: str = "") -> None:
        super().__init__(message, status)
        self.finish = finish


@dataclass(frozen=True)
class Reply:
    """One answer: its text, what it cost in tokens, and whether it came from the cache.

    ``finish_reason`` is "length" for an answer that ran into max_tokens (`truncated`); it is cached like any other.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool
    finish_reason: str

    @property
    def truncated(self) -> bool:
        """The answer was cut off at max_tokens."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Request:
    """One question to ask: the arguments of `ChatClient.chat`."""

    messages: Sequence[Mapping]
    max_tokens: int = 256
    temperature: float | None = 0.0
    seed: int | None = None

    @classmethod
    def of(cls, value: Request | Mapping | Sequence[Mapping]) -> Request:
        """A Request from one, from a mapping with its fields, or from bare messages."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - set(cls.__dataclass_fields__))
            if unknown or "messages" not in value:
                wrong = f"does not know {', '.join(unknown)}" if unknown else "needs messages"
                raise ValueError(f"a request {wrong}; its fields are {', '.join(cls.__dataclass_fields__)}")
            return cls(**value)
        return cls(value)

    def settings(self) -> dict:
        """The fields as a dict, checked.

        Raises:
            ValueError: no messages, a message without role or content, a max_tokens below 1, a negative temperature.
            ChatError: text that no request can carry (a lone surrogate): it cannot be written as UTF-8.
        """
        messages = [self.messages] if isinstance(self.messages, (str, Mapping)) else list(self.messages)
        if not messages:
            raise ValueError('messages is empty; give at least [{"role": "user", "content": "..."}]')
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise ValueError(f'{str(message)[:60]!r} is no message; write {{"role": "user", "content": "..."}}')
            try:
                str(message["content"]).encode()
            except UnicodeEncodeError as error:
                raise ChatError(
                    f"the message cannot be sent as UTF-8: lone surrogate at character {error.start}; "
                    "clean the text first"
                ) from None
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be a whole number of at least 1, got {self.max_tokens!r}")
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature!r}")
        fixed = {"messages": [dict(m) for m in messages], "max_tokens": self.max_tokens}
        return fixed | {"temperature": self.temperature, "seed": self.seed}


@dataclass(frozen=True)
class Prices:
    """Money per million tokens, read and written; any currency."""

    prompt: float
    completion: float

    @classmethod
    def of(cls, value: Prices | Sequence[float] | None) -> Prices | None:
        """Prices from a pair (prompt, completion). Raises ValueError for anything else."""
        if value is None or isinstance(value, cls):
            return value
        pair = tuple(value)
        if len(pair) != 2 or not all(p >= 0 for p in pair):
            raise ValueError(f"prices must be (per million prompt tokens, per million completion tokens), got {value!r}")
        return cls(float(pair[0]), float(pair[1]))

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What that many tokens cost."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass(frozen=True)
class Estimate:
    """What a list of requests would take; nothing was asked.

    Attributes:
        requests: in the list. cached: answered in the cache. repeated: the same as an earlier one in the list.
        calls: what is left, to be asked.
        prompt_tokens: of those calls. max_completion_tokens: if every answer is as long as allowed.
        cost: at most, tries again left out; None without prices.
        counted: prompt tokens were counted by a tokenizer, rather than estimated from characters.
    """

    requests: int
    cached: int
    repeated: int
    calls: int
    prompt_tokens: int
    max_completion_tokens: int
    cost: float | None
    counted: bool

    def __str__(self) -> str:
        how = "counted" if self.counted else "estimated"
        money = "" if self.cost is None else f", cost at most {self.cost:,.4f}"
        return (
            f"{self.requests:,} requests: {self.cached:,} in the cache, {self.repeated:,} repeated, {self.calls:,} calls; "
            f"{self.prompt_tokens:,} prompt tokens ({how}), at most {self.max_completion_tokens:,} completion tokens{money}"
        )


def count_prompt(messages: Sequence[Mapping], tokenizer) -> int:
    """Tokens of a conversation with the tokenizer's chat template and the opening of the answer."""
    text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def most_prompt_tokens(messages: Sequence[Mapping], tokenizer=None) -> int:
    """An upper bound of a prompt's tokens: counted when there is a tokenizer, else from its bytes."""
    if tokenizer is not None:
        return count_prompt(messages, tokenizer) + SLACK
    return PER_CHAT + sum(PER_MESSAGE + len(str(m["content"]).encode("utf-8", "replace")) for m in messages)


def guess_prompt_tokens(messages: Sequence[Mapping], chars_per_token: float) -> int:
    """The likely number of a prompt's tokens from its characters."""
    return 4 + sum(4 + round(len(str(m["content"])) / chars_per_token) for m in messages)
