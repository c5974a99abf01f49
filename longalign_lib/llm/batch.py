"""Many questions at once, from sync code and notebooks: answers in the order of the questions, failures in their places.

As many workers as the client has slots take the questions one after the other. Each answer is in the cache before it is
counted here, so neither Ctrl-C nor a kill loses one. At Ctrl-C no new question is asked and those in flight, which are
paid for, get ten seconds to finish (a second Ctrl-C drops them).

Once an endpoint refuses the key or does not know the model (401, 404), the rest is not asked: their places hold an error
that says so, or the cached answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from longalign_lib.llm import loop
from longalign_lib.llm.asker import Asker
from longalign_lib.llm.cache import request_hash
from longalign_lib.llm.records import ChatError, Reply, Request

GRACE = 10.0  # seconds for requests in flight at Ctrl-C
HOPELESS = (401, 404)  # what every other question would get too


@dataclass
class _Run:
    """What workers share: the questions left, where answers go, and why to stop."""

    left: object
    answers: queue.SimpleQueue
    stopping: bool = False
    refused: ChatError | None = None


def chat_many(
    asker: Asker, requests: Sequence[Request | Mapping], progress: bool = True, desc: str = "asking"
) -> list[Reply | ChatError]:
    """Ask all, and return a Reply or the ChatError for each, in order.

    Args:
        requests: `Request`s, mappings with their fields, or bare lists of messages.
        progress: show a bar with the cost so far (tokens without prices), cached and failed.
        desc: its name.

    Raises:
        ValueError: a request that is none (before anything is asked). OSError: the cache file cannot be written.
    """
    loop.forbid_here()
    requests = [Request.of(r) for r in requests]
    for request in requests:
        with contextlib.suppress(ChatError):  # that one fails in its place
            request.settings()
    run = _Run(iter(enumerate(requests)), queue.SimpleQueue())
    outcomes: list[Reply | ChatError] = [None] * len(requests)
    failed = 0
    with tqdm(total=len(requests), desc=desc, leave=False, delay=1, disable=not progress) as bar:
        future = loop.submit(_work(asker, run))
        try:
            while (answer := run.answers.get()) is not None:
                outcomes[answer[0]] = answer[1]
                failed += isinstance(answer[1], ChatError)
                bar.set_postfix_str(_so_far(asker, failed), refresh=False)
                bar.update()
            future.result()
        except KeyboardInterrupt:
            run.stopping = True
            if progress:
                told = f"stopping: requests in flight get {GRACE:g} s to finish; interrupt again to drop them"
                bar.write(told, file=sys.stderr)
            with contextlib.suppress(Exception, KeyboardInterrupt):
                future.result(timeout=GRACE)
            raise
        finally:
            future.cancel()
    return outcomes


async def _work(asker: Asker, run: _Run) -> None:
    workers = [asyncio.create_task(_worker(asker, run)) for _ in range(asker.limits.concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        run.answers.put(None)


async def _worker(asker: Asker, run: _Run) -> None:
    for index, request in run.left:
        if run.stopping:
            return
        try:
            if run.refused is not None and not _is_cached(asker, request):
                raise ChatError(f"not asked, since another question got: {run.refused}", run.refused.status)
            outcome = await asker.answer(request)
        except ChatError as error:
            outcome = error
            if error.status in HOPELESS:
                run.refused = run.refused or error
        run.answers.put((index, outcome))


def _is_cached(asker: Asker, request: Request) -> bool:
    return asker.cache.get(request_hash(asker.endpoint.identity, request.settings())) is not None


def _so_far(asker: Asker, failed: int) -> str:
    usage = asker.usage
    tokens = usage["prompt_tokens"] + usage["completion_tokens"]
    spent = f"cost {usage['cost']:.4f}" if asker.budget.prices else f"{tokens:,} tokens"
    return f"{spent}, {usage['cached']} cached, {failed} failed"
