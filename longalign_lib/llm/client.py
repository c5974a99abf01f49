"""One model behind one endpoint, as the rest of the library sees it: `chat`, `achat`, `chat_many`, `estimate`.

`endpoint` says who is asked, `asker` how. Everything runs in a background loop, so `chat` works where a loop runs already
(Jupyter) and `achat` in any loop.

Invariants: calls + cached == answered questions; an answer is on disk before it is returned; failures are never cached; at
most ``concurrency`` requests are in flight, and no more than their answers is lost by a kill; budgets hold for requests in
flight too. Cost: about a millisecond of processor time a call; the cache file is read once.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from longalign_lib.llm import batch, loop
from longalign_lib.llm.asker import Asker, Limits
from longalign_lib.llm.budget import Budget
from longalign_lib.llm.cache import AnswerCache, request_hash
from longalign_lib.llm.endpoint import Endpoint
from longalign_lib.llm.records import ChatError, Estimate, Prices, Reply, Request, count_prompt, guess_prompt_tokens


class ChatClient:
    """Ask one model behind one endpoint.

    Args:
        base_url: up to and including /v1, such as "http://127.0.0.1:8000/v1".
        model: the model's name at that endpoint, or the folder that `serve_local` serves.
        cache: JSONL file to keep answers in; None keeps them in memory. All endpoints on this machine count as one: keep
            a file for each model if you serve several under one name.
        api_key_env: name of the environment variable with the key; loopback endpoints need none.
        max_calls: requests allowed to this client (tries again count); None is no limit.
        timeout: seconds for one request. max_retries: tries after the first one.
        max_wait: the longest single wait before another try, seconds; a longer Retry-After ends the tries.
        concurrency: requests in flight at once; None is 8, and 1 for a folder that `serve_local` serves, since its sampling
            seeds hold only for one at a time. deadline: seconds for one call, all tries and waits together;
            None is 900, or three times ``timeout`` if that is more.
        max_total_tokens: prompt and completion tokens allowed. max_cost: money allowed, in the unit of ``prices``.
        prices: per million tokens, (prompt, completion).
        tokenizer: the model's own, for close bounds under a budget; None takes a token a byte, which is about four times
            too many in English, so that the last part of a budget may stay unused.
        extra: more fields for every request, such as {"top_p": 0.9}; part of the cache's key.
        tokens_field: what this endpoint calls max_tokens ("max_completion_tokens" for some).
        dry_run: ask nothing and need no key; for `estimate`, and for answers that are cached.
        carry: count what the cache file holds against the budgets too, answers and empty ones, so that a limit holds over
            kills and reruns (earlier processes' tries that were refused or had no end are on no record). False gives each
            client its own.

    Raises:
        ChatError: no key in the environment for an endpoint that is not on this machine. ValueError: a wrong argument.

    Attributes:
        usage: counts so far: calls (questions answered by the endpoint), cached, retries, failures (questions without an
            answer), requests, prompt_tokens, completion_tokens, cost (as reported; 0 without prices).
        budget: limits, and what is used, set aside and of unknown fate; see `budget.Budget`.
        label: the model's name without folders, fit to be written into data. model: the name sent.
    """

    def __init__(
        self, base_url: str, model: str | Path, cache: str | Path | None = None, api_key_env: str = "OPENAI_API_KEY",
        max_calls: int | None = None, timeout: float = 120, max_retries: int = 4, max_wait: float = 60, *,
        concurrency: int | None = None, deadline: float | None = None, max_total_tokens: int | None = None, max_cost: float | None = None,
        prices: Prices | Sequence[float] | None = None, tokenizer=None, extra: Mapping | None = None,
        tokens_field: str = "max_tokens", dry_run: bool = False, carry: bool = False,
    ) -> None:  # fmt: skip
        self._endpoint = Endpoint.of(base_url, model, api_key_env, extra, needs_key=not dry_run)
        if concurrency is None:
            concurrency = 1 if self._endpoint.served_folder else 8
        for name, value, least in (("concurrency", concurrency, 1), ("max_retries", max_retries, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        deadline = max(900, 3 * timeout) if deadline is None else deadline
        for name, value in (("timeout", timeout), ("deadline", deadline)):
            if not value > 0:
                raise ValueError(f"{name} must be more than 0 seconds, got {value!r}")
        self.label, self.model, self.concurrency = self._endpoint.label, self._endpoint.model, concurrency
        self.budget, self._cache = Budget(max_calls, max_total_tokens, max_cost, Prices.of(prices)), AnswerCache(cache)
        if carry:
            self.budget.book(*self._cache.tokens())
        self._tokenizer = tokenizer
        connection = None if dry_run else self._endpoint.connect(timeout)
        limits = Limits(timeout, max_retries, max_wait, concurrency, deadline)
        self._asker = Asker(
            self._endpoint, connection, limits, self.budget, self._cache, extra or {}, tokens_field, tokenizer
        )
        self.usage = self._asker.usage
        if connection is not None:
            weakref.finalize(self, loop.submit_if_running, connection.close).atexit = False

    def __repr__(self) -> str:
        return f"ChatClient(host={self._endpoint.host!r}, model={self.label!r}, concurrency={self.concurrency})"

    def chat(
        self, messages: Sequence[Mapping], max_tokens: int = 256, temperature: float | None = 0.0, seed: int | None = None
    ) -> Reply:
        """Ask and wait; answer from the cache when the very same question was answered before. Works in Jupyter too.

        Args:
            messages: turns {"role", "content"}.
            max_tokens: the longest answer.
            temperature: 0 for the most likely answer; None leaves it to the endpoint.
            seed: passed on to the endpoint, and part of the cache's key.

        Raises:
            ChatError: no usable answer after all tries, or a refused request (4xx). EmptyReplyError: one without text.
            BudgetError: the call might go over a budget; it was not made.
            OSError: the answer came and the cache file could not be written.
        """
        loop.forbid_here()
        future = loop.submit(self._asker.answer(Request(messages, max_tokens, temperature, seed)))
        try:
            return future.result()
        except BaseException:  # Ctrl-C: the request is dropped
            future.cancel()
            raise

    async def achat(
        self, messages: Sequence[Mapping], max_tokens: int = 256, temperature: float | None = 0.0, seed: int | None = None
    ) -> Reply:
        """`chat` for async code (in a notebook: ``reply = await client.achat(messages)``); any number may run at once."""
        future = loop.submit(self._asker.answer(Request(messages, max_tokens, temperature, seed)))
        return await asyncio.wrap_future(future)

    def chat_many(
        self, requests: Sequence[Request | Mapping], progress: bool = True, desc: str = "asking"
    ) -> list[Reply | ChatError]:
        """Ask many questions, ``concurrency`` at a time; one failure does not end the others. See `batch.chat_many`."""
        return batch.chat_many(self._asker, requests, progress, desc)

    def hash(
        self, messages: Sequence[Mapping], max_tokens: int = 256, temperature: float | None = 0.0, seed: int | None = None
    ) -> str:
        """The cache key of a question: SHA-256 of endpoint, model, messages and settings."""
        return request_hash(self._endpoint.identity, Request(messages, max_tokens, temperature, seed).settings())

    def cached(self, request: Request | Mapping) -> Reply | None:
        """The answer if it is in the cache; asks nothing and counts nothing."""
        return self._cache.get(request_hash(self._endpoint.identity, Request.of(request).settings()))

    @property
    def cache_problems(self) -> list[dict]:
        """Lines of the cache file that hold no answer (torn by a kill, foreign): {"id": "file:line", "reason"}."""
        return list(self._cache.bad)

    def estimate(self, requests: Sequence[Request | Mapping], tokenizer=None, chars_per_token: float = 4.0) -> Estimate:
        """What these requests would take, without asking anything.

        Args:
            tokenizer: counts the prompts with its chat template; None takes the client's, or guesses from characters.
            chars_per_token: about 4 for English, 1.5 for Chinese; measure it for your model's tokenizer.
        """
        if not chars_per_token > 0:
            raise ValueError(f"chars_per_token must be more than 0, got {chars_per_token!r}")
        tokenizer, seen = tokenizer or self._tokenizer, set()
        requests = [Request.of(r) for r in requests]
        cached = repeated = prompt = completion = 0
        for request in requests:
            with contextlib.suppress(ChatError):  # text that cannot be sent costs nothing
                key = self.hash(request.messages, request.max_tokens, request.temperature, request.seed)
                if key in seen:
                    repeated += 1
                elif self._cache.get(key) is not None:
                    cached += 1
                else:
                    counted = tokenizer is not None and count_prompt(request.messages, tokenizer)
                    prompt += counted or guess_prompt_tokens(request.messages, chars_per_token)
                    completion += request.max_tokens
                seen.add(key)
        calls = len(requests) - cached - repeated
        cost = self.budget.cost(prompt, completion) if self.budget.prices else None
        return Estimate(len(requests), cached, repeated, calls, prompt, completion, cost, tokenizer is not None)
