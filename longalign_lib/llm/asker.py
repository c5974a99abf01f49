"""The way of one question: cache, the same question in flight, a slot, the budget, the request, the cache file.

All of it runs in the background loop (`loop`), one thread, so counts and budgets need no locks. A pause that an endpoint
asks for (Retry-After with 429 or 503) holds back every call. Answers that arrive together are written with one flush.

Invariants: a question in flight is asked once, however many wait for it; an answer is on disk before anyone gets it; a
request that was cancelled or timed out stays booked in the budget, since it may have been billed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from longalign_lib.llm.budget import Budget
from longalign_lib.llm.cache import AnswerCache, request_hash
from longalign_lib.llm.endpoint import Endpoint
from longalign_lib.llm.records import BudgetError, ChatError, EmptyReplyError, Reply, Request, most_prompt_tokens
from longalign_lib.llm.retry import EmptyAnswer, Fault, back_off, http_fault, parse_reply

COUNTS = ("calls", "cached", "retries", "failures", "requests", "prompt_tokens", "completion_tokens")
NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "LocalProtocolError", "UnsupportedProtocol")


@dataclass(frozen=True)
class Limits:
    """Seconds and numbers that bound a call; see `ChatClient`."""

    timeout: float
    max_retries: int
    max_wait: float
    concurrency: int
    deadline: float


class Asker:
    """Asks an endpoint; `answer` is to be awaited in the background loop only.

    Args:
        connection: an AsyncOpenAI, or None to answer from the cache alone.
        extra, tokens_field, tokenizer: see `ChatClient`.
    """

    def __init__(
        self, endpoint: Endpoint, connection, limits: Limits, budget: Budget, cache: AnswerCache,
        extra: Mapping, tokens_field: str, tokenizer,
    ) -> None:  # fmt: skip
        self.endpoint, self.limits, self.budget, self.cache = endpoint, limits, budget, cache
        self.usage = dict.fromkeys(COUNTS, 0) | {"cost": 0.0}
        self._connection, self._tokenizer = connection, tokenizer
        self._extra, self._tokens_field = dict(extra), tokens_field
        self._asking: dict[str, list] = {}  # by key: [task, how many wait for it]
        self._unsaved: list[tuple] = []
        self._writer: asyncio.Task | None = None
        self._slots, self._settled = asyncio.Semaphore(limits.concurrency), asyncio.Event()
        self._not_before, self._pid = 0.0, os.getpid()

    async def answer(self, request: Request) -> Reply:
        """The answer to one question; see `ChatClient.chat` for the errors."""
        settings = request.settings()
        key = request_hash(self.endpoint.identity, settings)
        entry = self._asking.get(key)
        if entry is None:
            if (found := self.cache.get(key)) is not None:
                self.usage["cached"] += 1
                return found
            if os.getpid() != self._pid:
                raise ChatError("this client was made before a fork; make one in each process (the cache may be shared)")
            entry = self._asking[key] = [asyncio.create_task(self._ask(key, settings)), 0]
            entry[0].add_done_callback(lambda task: self._forget(key, task))
        task, first = entry[0], entry[1] == 0
        entry[1] += 1
        try:
            reply = await asyncio.shield(task)
        except asyncio.CancelledError:
            entry[1] -= 1
            if entry[1] == 0 and not task.done():  # nobody waits any more
                self._forget(key, task)
                task.cancel()
            raise
        if not first:
            self.usage["cached"] += 1
        return reply if first else replace(reply, cached=True)

    def _forget(self, key: str, task: asyncio.Task) -> None:
        """The question is no longer in flight; its error, if nobody else looked at it, is looked at here."""
        if key in self._asking and self._asking[key][0] is task:
            del self._asking[key]
        if task.done() and not task.cancelled():
            task.exception()

    async def _ask(self, key: str, settings: dict) -> Reply:
        async with self._slots:
            found = self.cache.get(key)  # another process may have asked it while this call waited for its slot
            if found is not None:
                self.usage["cached"] += 1
                return found
            try:
                reply = await self._until_answered(settings, random.Random(key))
            except ChatError:
                self.usage["failures"] += 1
                raise
            await self._save(key, reply, settings)
        self.usage["calls"] += 1
        return reply

    async def _until_answered(self, settings: dict, jitter: random.Random) -> Reply:
        if self._connection is None:
            raise ChatError("nothing was asked: this client was made with dry_run=True, and the answer is not cached")
        limits, clock = self.limits, asyncio.get_running_loop().time
        body = {k: v for k, v in settings.items() if v is not None and k != "max_tokens"}
        body |= {"model": self.endpoint.model, self._tokens_field: settings["max_tokens"]}
        end, empty, said, attempt = None, False, "", 0
        while True:
            while (pause := self._not_before - clock()) > 0:  # the endpoint asked everyone to wait
                await asyncio.sleep(pause)
            held = await self._reserve(settings, said)
            end = end or clock() + limits.deadline  # waiting for its turn is not counted
            outcome = await self._request(body, held, min(limits.timeout, max(0.001, end - clock())))
            if isinstance(outcome, Reply):
                return outcome
            said = self.endpoint.redact(outcome.reason)[:600]
            again = outcome.again == "yes" or (outcome.again == "once" and not empty)
            empty |= outcome.again == "once"
            wait, more = back_off(attempt, outcome.wait, limits.max_wait, jitter), ""
            if outcome.wait is not None and outcome.wait > limits.max_wait:
                again, more = False, f"; it asks to wait {outcome.wait:g} s, more than max_wait {limits.max_wait:g}"
            elif again and attempt < limits.max_retries and clock() + wait >= end:
                again, more = False, f"; the deadline of {limits.deadline:g} s leaves no time for another try"
            attempt += 1
            if not again or attempt > limits.max_retries:
                message = f"{self.endpoint.host} ({self.endpoint.label}) gave no answer in {attempt} tries: {said}{more}"
                raise EmptyReplyError(message, outcome.status, outcome.finish) if outcome.empty else ChatError(message, outcome.status)
            self.usage["retries"] += 1
            if outcome.wait is not None and outcome.status in (429, 503):
                self._not_before = max(self._not_before, clock() + outcome.wait)
            await asyncio.sleep(wait)

    async def _reserve(self, settings: dict, said: str) -> dict:
        counted = self.budget.counts_tokens
        bound = most_prompt_tokens(settings["messages"], self._tokenizer) if counted else 0
        while True:
            try:
                held = self.budget.reserve(bound, settings["max_tokens"])
            except BudgetError as error:
                raise BudgetError(f"{error}{f'. The last try: {said}' if said else ''}") from None
            if held is not None:
                self.usage["requests"] += 1
                return held
            await self._settled.wait()  # requests in flight may give something back

    async def _request(self, body: dict, held: dict, seconds: float) -> Reply | Fault:
        """One try, booked in the budget whatever becomes of it; what an empty answer took (its bound, if unknown) is put on record too."""
        prompt, completion, unknown = 0, 0, True
        try:
            outcome = await self._try(body, seconds)
            if isinstance(outcome, Fault):
                prompt, completion = outcome.billed or (0, 0)
                unknown = outcome.unknown
                if outcome.empty or outcome.billed:
                    most = body[self._tokens_field]
                    await asyncio.to_thread(self.cache.spend, *(outcome.billed or (max(0, held["tokens"] - most), most)))
                return outcome
            reply, known = outcome
            prompt, completion, unknown = reply.prompt_tokens, reply.completion_tokens, not known
            return reply
        finally:  # a cancelled request may have been billed: it stays unknown
            self.budget.settle(held, prompt, completion, unknown)
            self.usage["prompt_tokens"] += prompt
            self.usage["completion_tokens"] += completion
            self.usage["cost"] += self.budget.cost(prompt, completion)
            settled, self._settled = self._settled, asyncio.Event()
            settled.set()

    async def _try(self, body: dict, seconds: float) -> tuple[Reply, bool] | Fault:
        import openai

        create = self._connection.chat.completions.with_raw_response.create
        try:
            async with asyncio.timeout(seconds):
                raw = await create(**body, extra_body=self._extra or None)
            return parse_reply(raw.content)
        except EmptyAnswer as error:
            again = "once" if error.again else "no"
            return Fault(f"empty answer ({error})", again, 200, None, error.tokens, not error.tokens, empty=True, finish=error.finish)
        except (TimeoutError, openai.APITimeoutError) as error:
            sent = type(error.__cause__).__name__ not in NOT_SENT
            return Fault(f"no answer within {round(seconds, 2):g} s", "yes", unknown=sent)
        except openai.APIStatusError as error:
            answer, endpoint = error.response, self.endpoint
            text = answer.text[:2000]
            return http_fault(error.status_code, answer.headers, text, endpoint.model, endpoint.host, endpoint.key_env)
        except openai.APIConnectionError as error:
            sent = type(error.__cause__).__name__ not in NOT_SENT
            return Fault(f"connection failed ({error.__cause__ or error})", "yes", unknown=sent)
        except (openai.APIError, ValueError, TypeError) as error:
            return Fault(f"unusable answer ({error})", "yes", unknown=True)

    async def _save(self, key: str, reply: Reply, settings: dict) -> None:
        """Returns when the answer is on disk; answers that came meanwhile go in one write."""
        done = asyncio.get_running_loop().create_future()
        shaped = {k: v for k, v in settings.items() if k != "messages"}
        self._unsaved.append((done, (key, reply, {"model": self.endpoint.label, "settings": shaped})))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await asyncio.shield(done)

    async def _write(self) -> None:
        while self._unsaved:
            batch, self._unsaved = self._unsaved, []
            problem = None
            try:
                await asyncio.to_thread(self.cache.append, [line for _, line in batch])
            except Exception as error:  # whoever waits for these answers gets it
                problem = error
            for done, _ in batch:
                with contextlib.suppress(asyncio.InvalidStateError):
                    done.set_exception(problem) if problem else done.set_result(None)
        self._writer = None
