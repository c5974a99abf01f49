"""A local OpenAI-compatible endpoint for the length of a `with` block: `transformers serve` on the loopback address.

    with serve_local(default_model_dir()) as url:
        ChatClient(url, default_model_dir()).chat([{"role": "user", "content": "Hello"}])

The server is a process group of its own. It runs in a folder of links to the model's files, so that requests name the
model by its folder's name and no path of this machine travels. For many documents, start vLLM on a GPU instead
(`vllm serve MODEL`) and give its address to ChatClient.

Invariants: nothing listens beyond 127.0.0.1; no server outlives its `with` block, or the process that started it.
Cost: some seconds to start, the model in memory once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from longalign_lib.models import pick_device, pick_dtype


class ServerError(RuntimeError):
    """The local server did not start."""


# The server's own process: ends by itself when the process that started it is gone, however that one ended.
_LAUNCH = """
import os, sys, threading, time
def watch(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
threading.Thread(target=watch, args=(int(sys.argv.pop(1)),), daemon=True).start()
from transformers.cli.transformers import app
app()
"""


@contextlib.contextmanager
def serve_local(
    model_dir: str | Path,
    port: int | None = None,
    log: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    start_timeout: float = 120,
) -> Iterator[str]:
    """Serve a model folder by `transformers serve` on 127.0.0.1 while the `with` block runs.

    Args:
        model_dir: folder written by save_pretrained, with its tokenizer.
        port: None takes a free one.
        log: file for the server's output; None uses a temporary one, shown in the error when the start fails.
        device, dtype: as in `transformers serve --help`; None picks them as `longalign_lib.models` does.
        threads: of the server on a CPU; None is half the cores, at least one: writing token by token hardly gains from
            more, and threads that wait for a busy core make it ten times slower.
        start_timeout: seconds to wait until it answers.

    Yields:
        base_url for ChatClient; pass `model=model_dir` there, or the folder's name.

    Raises:
        FileNotFoundError: no model in that folder. ServerError: the server ended or did not answer.
    """
    model_dir = Path(model_dir)
    if not (model_dir / "config.json").is_file():
        raise FileNotFoundError(f"{model_dir}: no model here (config.json is missing); give a save_pretrained folder")
    device = device or str(pick_device())
    dtype = dtype or str(pick_dtype(device)).removeprefix("torch.")
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="longalign-serve-") as scratch:
        log_path = Path(log or Path(scratch) / "server.log").resolve()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        view = _served_view(model_dir, Path(scratch) / "served" / model_dir.resolve().name)
        command = [sys.executable, "-c", _LAUNCH, str(os.getpid()), "serve", view.name]
        command += ["--host", "127.0.0.1", "--port", str(port), "--device", device, "--dtype", dtype]
        threads = threads or max(1, (os.cpu_count() or 2) // 2)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        with log_path.open("ab") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, env=environment, cwd=view.parent, start_new_session=True, **streams)
        try:
            _wait_until_up(process, port, log_path, start_timeout)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(process)


def _served_view(model_dir: Path, view: Path) -> Path:
    """The model's files by links, with sampling switched on: the server heeds a request's temperature only then."""
    view.mkdir(parents=True)
    for file in model_dir.resolve().iterdir():
        (view / file.name).symlink_to(file)
    config = view / "generation_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    config.unlink(missing_ok=True)
    config.write_text(json.dumps(settings | {"do_sample": True}), encoding="utf-8")
    return view


def _wait_until_up(process: subprocess.Popen, port: int, log: Path, timeout: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"the local server ended with status {process.returncode}. Its last lines:\n{_tail(log)}")
        with contextlib.suppress(OSError), opener.open(f"http://127.0.0.1:{port}/health", timeout=2):
            return
        time.sleep(0.1)
    raise ServerError(f"the local server did not answer within {timeout:g} s. Its last lines:\n{_tail(log)}")


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen) -> None:
    """End the server's whole process group: politely, then for good."""
    for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sign)
            process.wait(patience)
            return
