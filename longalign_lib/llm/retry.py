"""What went wrong with a try, whether another one may help, and how long to wait before it.

    again      408, 409, 425, 429, 5xx; time-outs; dropped connections; answers that are no chat completion
    once more  a completion without text (it was paid for; a second empty one is taken at its word)
    never      other 4xx (the message names the fix); 429 for a quota that is used up; an empty answer cut by max_tokens

The wait is what Retry-After asks for (seconds, milliseconds or an HTTP date), a little spread; otherwise it doubles from
half a second and is spread over 50% to 150%. Invariant: nothing here keeps or prints a key; the caller takes it out.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import random
import time
from dataclasses import dataclass

from longalign_lib.llm.records import Reply

RETRIED = (408, 409, 425, 429)


class EmptyAnswer(ValueError):
    """A chat completion without text. ``again``: another try may help; ``finish``: see `records.EmptyReplyError`."""

    def __init__(self, message: str, again: bool, tokens: tuple[int, int] | None, finish: str) -> None:
        super().__init__(message)
        self.again, self.tokens, self.finish = again, tokens, finish


@dataclass(frozen=True)
class Fault:
    """A try that failed.

    Attributes:
        reason: in words. status: HTTP status or None. wait: seconds that the endpoint asked for, or None.
        again: "yes", "once" or "no".
        billed: tokens that the endpoint reported for it, or None; unknown: it may have been billed all the same.
        empty: an answer came, without text; finish: why, see `records.EmptyReplyError`.
    """

    reason: str
    again: str
    status: int | None = None
    wait: float | None = None
    billed: tuple[int, int] | None = None
    unknown: bool = False
    empty: bool = False
    finish: str = ""


def parse_reply(content: bytes) -> tuple[Reply, bool]:
    """The body of an endpoint's answer as a Reply, and whether it reported its tokens.

    Raises:
        ValueError: not a chat completion in JSON (UTF-8, 16 or 32). EmptyAnswer: one without text.
    """
    try:
        body = json.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON: {content[:80]!r}") from None
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list):
        raise ValueError(f"not a chat completion: {content[:80]!r}")
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    known = all(isinstance(n, int) and n >= 0 for n in counts)
    tokens = tuple(int(n) for n in counts) if known else (0, 0)
    if not body["choices"]:
        raise ValueError("it holds no choices")
    choice = body["choices"][0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise ValueError("its first choice holds no message")
    text, finish = message.get("content"), str(choice.get("finish_reason") or "")
    if isinstance(text, list):  # some endpoints answer in parts
        text = "".join(str(p.get("text", "")) for p in text if isinstance(p, dict))
    if not isinstance(text, str) or not text.strip():
        about = f"the text is empty, finish_reason {finish or 'missing'!r}"
        if message.get("refusal"):
            about += f", refusal: {str(message['refusal'])[:200]}"
        if finish == "length":
            about += "; all of max_tokens went elsewhere (reasoning, blanks): raise max_tokens"
        why = "refusal" if message.get("refusal") else finish
        raise EmptyAnswer(about, finish not in ("length", "content_filter"), tokens if known else None, why)
    return Reply(text, *tokens, cached=False, finish_reason=finish), known


def http_fault(status: int, headers, body: str, model: str, host: str, key_env: str) -> Fault:
    """The fault of an answer with an error status."""
    again = status in RETRIED or status >= 500
    fix = {
        401: f"the key was refused; set {key_env} to a key that is valid at {host}",
        403: f"the key in {key_env} may not use this model or endpoint; check both",
        404: f"no such model or address; {model!r} must be a name that GET /v1/models lists, and base_url ends in /v1",
        413: "the request is too long; shorten the prompt",
        400: "the request was refused as it stands; a prompt and max_tokens beyond the model's window are the usual cause",
        422: "the request was refused as it stands; check the settings that this endpoint knows",
    }.get(status, "")
    if status == 429 and "insufficient_quota" in body:
        again, fix = False, "the account's own quota is used up; top it up at the provider, waiting does not help"
    reason = f"HTTP {status}{f' ({fix})' if fix else ''}: {body.strip()}"
    return Fault(reason, "yes" if again else "no", status, retry_after(headers))


def retry_after(headers) -> float | None:
    """Seconds that the headers ask to wait, or None."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(headers.get("retry-after-ms", "")) / 1000)
    value = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return max(0.0, seconds) if seconds == seconds else None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def back_off(attempt: int, asked: float | None, most: float, jitter: random.Random) -> float:
    """Seconds to wait after try number ``attempt`` (from 0).

    Args:
        asked: what Retry-After says; waited for in full and up to a tenth longer.
        most: the longest wait of our own choice.
    """
    if asked is not None:
        return asked * (1 + 0.1 * jitter.random())
    return min(most, 0.5 * 2 ** min(attempt, 30) * (0.5 + jitter.random()))
