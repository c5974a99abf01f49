"""A real OpenAI-compatible server on the loopback address whose faults are scripted; `from llm_faults import ...`.

    with FaultServer() as server:
        server.steps = [FAULTS["429"], FAULTS["dropped"]]      # for the next two requests; then it answers well
        ChatClient(server.url, "m").chat(...)
        server.requests, server.most_at_once                   # what it was asked

A step is a dict; keys: status, headers, type, body (bytes), sleep (seconds before anything is sent), drop (close without a
word), cut (bytes of the body after which the connection is closed). ``reply(body) -> text`` says what a good answer holds.
"""

from __future__ import annotations

import collections
import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROMPT_TOKENS, COMPLETION_TOKENS = 7, 4


def completion(text: str | None = "In the drawer.", finish: str = "stop", **changes) -> bytes:
    """A good chat completion, with top-level fields replaced by ``changes``."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS, "total_tokens": 11}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(body | changes).encode()


LONG = "In the drawer of the writing desk. " * 60_000  # 2 MB
# Faults that pass: a client tries again and succeeds.
FAULTS = {
    "429": {"status": 429, "headers": {"Retry-After": "0.01"}, "body": b'{"error": {"message": "slow down"}}'},
    "429-date": {"status": 429, "headers": {"Retry-After": formatdate(0, usegmt=True)}, "body": b"{}"},
    "429-bare": {"status": 429, "body": b"{}"},
    "408": {"status": 408, "body": b"{}"},
    "409": {"status": 409, "body": b"{}"},
    "500": {"status": 500, "body": b"boom", "type": "text/plain"},
    "503": {"status": 503, "headers": {"Retry-After": "0"}, "body": b"<html>busy</html>", "type": "text/html"},
    "dropped": {"drop": True},
    "dropped-in-the-body": {"cut": 40},
    "cut-json": {"body": b'{"choices": ['},
    "html": {"body": b"<html>proxy error</html>", "type": "text/html"},
    "no-body": {"body": b""},
    "no-choices": {"body": completion(choices=[])},
    "null-choices": {"body": completion(choices=None)},
    "a-list": {"body": b"[1, 2]"},
    "no-message": {"body": b'{"choices": [{"index": 0}]}'},
    "choice-no-object": {"body": b'{"choices": [3]}'},
    "error-with-200": {"body": b'{"error": {"message": "overloaded"}}'},
    "wrong-charset": {"body": completion("Im Fach: \u00e9t\u00e9").replace(b"\\u00e9", b"\xe9"), "type": "application/json; charset=utf-8"},
    "not-utf8": {"body": b"\xff\xfe not utf-8"},
}  # fmt: skip


class FaultServer:
    """Answers with the scripted steps one after the other, then well.

    Args:
        reply: what a good answer says, from the request's body.
        delay: seconds before each answer.

    Attributes:
        requests: (body, Authorization header) in the order of arrival. arrivals: their times (time.monotonic).
        asked: how often each content of a last message was asked. most_at_once: requests in flight at the same time.
    """

    def __init__(self, reply=lambda body: "In the drawer.", delay: float = 0.0) -> None:
        self.reply, self.delay, self.steps = reply, delay, []
        self.requests, self.arrivals, self.asked = [], [], collections.Counter()
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer._lock:
                    outer.requests.append((body, self.headers.get("authorization")))
                    outer.arrivals.append(time.monotonic())
                    outer.asked[body["messages"][-1]["content"]] += 1
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                    step = outer.steps.pop(0) if outer.steps else {}
                try:
                    time.sleep(step.get("sleep", outer.delay))
                    self.send(step, step.get("body") if "body" in step else completion(outer.reply(body)))
                finally:
                    with outer._lock:
                        outer._now -= 1

            def send(self, step, data):
                if not step.get("drop"):
                    self.send_response(step.get("status", 200))
                    self.send_header("content-type", step.get("type", "application/json"))
                    self.send_header("content-length", str(len(data)))
                    for name, value in step.get("headers", {}).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data[: step.get("cut", len(data))])
                    self.wfile.flush()
                if step.get("drop") or "cut" in step:
                    self.close_connection = True
                    self.connection.shutdown(2)

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, request, client_address):  # a dropped connection is meant to be one
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def __enter__(self) -> FaultServer:
        return self

    def __exit__(self, *error) -> None:
        self.close()

