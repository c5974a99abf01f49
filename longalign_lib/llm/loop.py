"""One event loop in a thread of its own, for all chat clients of this process.

Scripts, notebooks (whose thread runs a loop already) and async code hand it coroutines and wait in their own manner.
Whatever runs there shares one thread, so that budgets, caches and counts need no locks. Cost: one idle thread.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future

_start = threading.Lock()
_running: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a fork inherits no thread


def submit(coroutine: Coroutine) -> Future:
    """Run a coroutine in the background loop; `Future.result` waits for it from any other thread."""
    with _start:
        loop = _running.get(os.getpid())
        if loop is None:
            _running.clear()
            loop = _running[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(loop,), name="chat clients", daemon=True).start()
            atexit.register(_stop, os.getpid())
    return asyncio.run_coroutine_threadsafe(coroutine, loop)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run until stopped; asyncio lets KeyboardInterrupt and SystemExit of a task through, which must not strand the others."""
    while True:
        try:
            return loop.run_forever()
        except (KeyboardInterrupt, SystemExit):  # whoever waits for that task is given it
            continue


def submit_if_running(make: Callable[[], Coroutine]) -> None:
    """Run ``make()`` in the loop if this process has one; wait for nothing."""
    loop = _running.get(os.getpid())
    if loop is not None and loop.is_running():
        loop.call_soon_threadsafe(lambda: loop.create_task(make()))


def forbid_here() -> None:
    """Raise RuntimeError in the background loop itself, where waiting for it would last for ever."""
    if threading.current_thread().name == "chat clients":
        raise RuntimeError("chat and chat_many wait, and this code runs in the clients' own loop; use achat")


def _stop(pid: int) -> None:
    if pid == os.getpid() and pid in _running:
        loop = _running.pop(pid)
        loop.call_soon_threadsafe(loop.stop)
