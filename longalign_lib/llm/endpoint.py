"""Which endpoint and model are asked, with which key, and under what name answers are kept.

The key is read from the environment when the client is made. It goes into the connection and nowhere else: not into
`repr`, errors (`redact`), cache lines or their hash. A model folder that `serve_local` serves is told by its weights
(names, sizes, times of change), since a local server has another port each time.
"""

from __future__ import annotations

import ipaddress
import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from longalign_lib.llm.records import ChatError


@dataclass(frozen=True)
class Endpoint:
    """One model behind one address.

    Attributes:
        base_url, host, local: the address; local is this machine.
        model: the name sent. label: the model's name without folders.
        served_folder: a model folder behind this machine's address, as `serve_local` serves it.
        key_env: where the key came from. identity: what of all this shapes an answer.
    """

    base_url: str
    host: str
    local: bool
    model: str
    label: str
    served_folder: bool
    key_env: str
    identity: Mapping
    key: str = field(repr=False)

    @classmethod
    def of(
        cls, base_url: str, model: str | Path, key_env: str, extra: Mapping | None = None, needs_key: bool = True
    ) -> Endpoint:
        """Look at the arguments of a client.

        Raises:
            ValueError: base_url is no URL, or holds a user name or password.
            ChatError: no key, or one that no request can carry.
        """
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            shown = "(with a user name or password)" if parts.username else repr(base_url)
            raise ValueError(f"base_url {shown} is no URL; write it like http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise ValueError(f"base_url of {parts.hostname} holds a user name or password; put the key into {key_env}")
        local = _is_loopback(parts.hostname)
        key = os.environ.get(key_env, "").strip()
        if not key and not local and needs_key:
            raise ChatError(
                f"no key for {parts.hostname}: set the environment variable {key_env} (never write it in a file; "
                "an endpoint that takes no key: set it to any word)"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ChatError(f"the key in {key_env} holds blanks or characters that no header can carry; set it again")
        folder = Path(model) if Path(model).is_dir() else None
        label = folder.resolve().name if folder else Path(model).name
        name = label if local and folder else str(model)  # serve_local knows it by that name
        identity = {"endpoint": "loopback" if local else base_url}
        identity |= {"model": (_fingerprint(folder, label) if folder else "") or name}
        identity |= {"extra": dict(extra)} if extra else {}
        return cls(base_url, parts.hostname, local, name, label, bool(local and folder), key_env, identity, key)

    def connect(self, timeout: float):
        """An AsyncOpenAI for this endpoint that never tries again by itself."""
        import openai

        http = openai.DefaultAsyncHttpxClient(trust_env=not self.local)  # loopback: never through a proxy
        options = {"timeout": timeout, "max_retries": 0, "http_client": http}
        return openai.AsyncOpenAI(base_url=self.base_url, api_key=self.key or "none", **options)

    def redact(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self.key, "<key>") if self.key else text


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _fingerprint(folder: Path, label: str) -> str:
    """Names no path; changes when the weights do. Empty for a folder without safetensors."""
    stats = [file.stat() for file in sorted(folder.glob("*.safetensors"))]
    return f"{label}:" + ",".join(f"{s.st_size}:{s.st_mtime_ns}" for s in stats) if stats else ""
