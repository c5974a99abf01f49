"""One chat client for any OpenAI-compatible endpoint (the local one to point it at is in `serve`).

`ChatClient.chat` asks one question. Answers are kept in an append-only JSONL file under a hash of everything that
shapes the answer (endpoint, model, messages, settings), so that a rerun repeats no answered call. Time-outs, dropped
connections, 429, 5xx and malformed answers are tried again a bounded number of times, waiting as Retry-After asks or
exponentially with jitter; what still fails raises `ChatError` and is never cached. The key is read from the
environment, sent to the endpoint and written nowhere.

Invariants: calls + cached == answered questions; a cached answer makes no request. Cost: reading the cache once, one
line written (and flushed to disk) per answer.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import json
import os
import random
import time
import urllib.parse
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from longalign_lib.serve import ServerError, serve_local

__all__ = ["ChatClient", "ChatError", "Reply", "ServerError", "serve_local"]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
REPLY_FIELDS = ("text", "prompt_tokens", "completion_tokens", "finish_reason")


class ChatError(RuntimeError):
    """A question that got no usable answer."""


@dataclass(frozen=True)
class Reply:
    """One answer: its text, what it cost in tokens, and whether it came from the cache."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool
    finish_reason: str


class ChatClient:
    """Ask one model behind one endpoint.

    Args:
        base_url: up to and including /v1, such as "http://127.0.0.1:8000/v1".
        model: the model's name at that endpoint, or the folder that `serve_local` serves.
        cache: JSONL file to keep answers in; None keeps none.
        api_key_env: name of the environment variable with the key; loopback endpoints need none.
        max_calls: real requests allowed (tries again count), then ChatError; None is no limit.
        timeout: seconds for one request.
        max_retries: tries after the first one.
        max_wait: the longest single wait before another try, seconds; a longer Retry-After ends the tries.

    Raises:
        ChatError: no key in the environment for an endpoint that is not on this machine.

    Attributes:
        usage: counts so far: calls (requests answered), cached, retries, failed, prompt_tokens, completion_tokens.
        label: the model's name without folders, fit to be written into data.
    """

    def __init__(
        self,
        base_url: str,
        model: str | Path,
        cache: str | Path | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_calls: int | None = None,
        timeout: float = 120,
        max_retries: int = 4,
        max_wait: float = 60,
    ) -> None:
        import openai

        host = urllib.parse.urlsplit(base_url).hostname
        if not host:
            raise ValueError(f"base_url {base_url!r} is no URL; write it like http://127.0.0.1:8000/v1")
        local = host in LOOPBACK
        self._key = os.environ.get(api_key_env, "")
        if not self._key and not local:
            raise ChatError(f"no key for {host}: set the environment variable {api_key_env} (never write it in a file)")
        self.label = Path(model).name
        self.model = self.label if local and Path(model).is_dir() else str(model)  # serve_local knows it by that name
        weights = Path(model) / "model.safetensors"
        fingerprint = f"{self.label}:{weights.stat().st_size}:{weights.stat().st_mtime_ns}" if weights.is_file() else ""
        # A local server has another port each time; what it serves is told by the folder's fingerprint.
        self._identity = {"endpoint": "loopback" if local else base_url, "model": fingerprint or self.model}
        self._openai = openai
        options = {"api_key": self._key or "none", "timeout": timeout, "max_retries": 0}
        options["http_client"] = openai.DefaultHttpxClient(trust_env=not local)  # loopback: never through a proxy
        self._client = openai.OpenAI(base_url=base_url, **options)
        weakref.finalize(self, self._client.close)
        self._host, self._timeout, self._max_retries, self._max_wait = host, timeout, max_retries, max_wait
        self._max_calls, self._requests = max_calls, 0
        self.usage = dict.fromkeys(("calls", "cached", "retries", "failed", "prompt_tokens", "completion_tokens"), 0)
        self._cache_path = Path(cache) if cache is not None else None
        self._cache = _read_cache(self._cache_path) if self._cache_path is not None else {}

    def chat(
        self, messages: Sequence[dict], max_tokens: int = 256, temperature: float = 0.0, seed: int | None = None
    ) -> Reply:
        """Ask; answer from the cache when the very same question was answered before.

        Args:
            messages: turns {"role", "content"}.
            max_tokens: the longest answer.
            temperature: 0 for the most likely answer.
            seed: passed on to the endpoint, and part of the cache's key.

        Raises:
            ChatError: no usable answer after all tries, a refused request (4xx), or the budget is used up.
        """
        settings = {"messages": list(messages), "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        content = json.dumps(self._identity | settings, sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        if key in self._cache:
            self.usage["cached"] += 1
            return Reply(**self._cache[key], cached=True)
        reply = self._ask(settings, random.Random(key))
        self.usage["calls"] += 1
        self.usage["prompt_tokens"] += reply.prompt_tokens
        self.usage["completion_tokens"] += reply.completion_tokens
        self._cache[key] = record = {k: v for k, v in asdict(reply).items() if k != "cached"}
        if self._cache_path is not None:
            _append(self._cache_path, {"key": key, "model": self.label, **record})
        return reply

    def _ask(self, settings: dict, jitter: random.Random) -> Reply:
        request = {k: v for k, v in settings.items() if v is not None} | {"model": self.model}
        for attempt in range(self._max_retries + 1):
            if self._max_calls is not None and self._requests >= self._max_calls:
                raise ChatError(f"the budget of {self._max_calls} requests is used up; raise max_calls to go on")
            self._requests += 1
            try:
                return _to_reply(self._client.chat.completions.create(**request))
            except self._openai.APITimeoutError:
                reason, again, wait = f"no answer within {self._timeout:g} s", True, None
            except self._openai.APIStatusError as error:
                again = error.status_code in (408, 409, 429) or error.status_code >= 500
                reason, wait = f"HTTP {error.status_code}: {error.response.text}", _retry_after(error.response.headers)
            except self._openai.APIConnectionError as error:
                reason, again, wait = f"connection failed ({error.__cause__ or error})", True, None
            except (self._openai.APIError, ValueError, TypeError) as error:
                reason, again, wait = f"unusable answer ({error})", True, None
            wait = min(self._max_wait, 0.5 * 2**attempt * (0.5 + jitter.random())) if wait is None else wait
            if not again or attempt == self._max_retries or wait > self._max_wait:
                break
            self.usage["retries"] += 1
            time.sleep(wait)
        self.usage["failed"] += 1
        if self._key:
            reason = reason.replace(self._key, "<key>")
        more = "" if wait <= self._max_wait else f"; it asks to wait {wait:g} s, more than max_wait {self._max_wait:g}"
        raise ChatError(f"{self._host} ({self.label}) gave no answer in {attempt + 1} tries: {reason[:500]}{more}")


def _to_reply(completion) -> Reply:
    """The endpoint's answer as a Reply. Raises ValueError when it is not a chat completion."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise ValueError("it holds no choices" if choices == [] else f"not a chat completion: {str(completion)[:80]!r}")
    message, usage = getattr(choices[0], "message", None), getattr(completion, "usage", None)
    if message is None:
        raise ValueError("its first choice holds no message")
    tokens = [int(getattr(usage, name, None) or 0) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(message.content or "", *tokens, cached=False, finish_reason=str(choices[0].finish_reason or ""))


def _retry_after(headers) -> float | None:
    """Seconds that a Retry-After header asks to wait (a number or a date), or None."""
    value = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _read_cache(path: Path) -> dict[str, dict]:
    """Answers by key. A line torn by a kill is passed over: its question will simply be asked again."""
    cache: dict[str, dict] = {}
    if path.is_file():
        for raw in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(raw)
                cache[record["key"]] = {name: record[name] for name in REPLY_FIELDS}
    return cache


def _append(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record) + "\n").encode("utf-8")
    with path.open("ab+") as handle:
        if handle.tell() > 0:
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":  # a torn line: do not glue this record to it
                line = b"\n" + line
        handle.write(line)
        handle.flush()
        os.fsync(handle.fileno())
