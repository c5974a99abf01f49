"""A local OpenAI-compatible endpoint for the length of a `with` block: `transformers serve` on the loopback address.

    with serve_local(default_model_dir()) as url:
        ChatClient(url, default_model_dir()).chat([{"role": "user", "content": "Hello"}])

The server is a process group of its own. It runs in a folder of links to the model's files, so that requests name the
model by its folder's name and no path of this machine travels. It answers one request after the other; for thousands of
long documents start vLLM on a machine with GPUs (its own environment: `pip install vllm`) and give its address instead:

    vllm serve MODEL --host 127.0.0.1 --port 8000 --served-model-name NAME --max-model-len 65536 \\
        --tensor-parallel-size 8 --enable-prefix-caching --generation-config vllm

    ChatClient("http://127.0.0.1:8000/v1", "NAME", concurrency=64, timeout=600)

MODEL is a Hub name or folder, NAME what requests call it. `--max-model-len` holds prompt and answer; memory for more than
the model was made for is refused. `--enable-prefix-caching` reads a document once for all questions that begin with it.
`--generation-config vllm` keeps the model's own sampling defaults (top_p, top_k) out of requests that do not name them.
From another machine use an ssh tunnel, or `--host 0.0.0.0` with `--api-key`, the key in the client's environment. These
flags are taken from vLLM's documentation; vLLM was not run here.

Invariants: nothing listens beyond 127.0.0.1; the server that answers is the one that was started; none outlives its
`with` block, or the process that started it. Cost: some seconds to start, the model in memory once.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
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

NEEDS = ("pydantic", "fastapi", "uvicorn", "openai")  # what `transformers serve` imports
IN_USE = "address already in use"
TRIES = 3  # ports tried when each is taken between the look and the start


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
        base_url for ChatClient; pass `model=model_dir` there (the client then asks one question at a time: so does the
        server, and its sampling seeds hold only then).

    Raises:
        FileNotFoundError: no model in that folder. ServerError: a package is missing, the port is taken, the server ended
            (its last lines are in the error) or did not answer.
    """
    from longalign_lib.models import pick_device, pick_dtype

    model_dir = Path(model_dir)
    if not (model_dir / "config.json").is_file():
        raise FileNotFoundError(f"{model_dir}: no model here (config.json is missing); give a save_pretrained folder")
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise ServerError(f"the server needs {', '.join(missing)}: pip install 'transformers[serving]'")
    device = device or str(pick_device())
    dtype = dtype or str(pick_dtype(device)).removeprefix("torch.")
    with tempfile.TemporaryDirectory(prefix="longalign-serve-", ignore_cleanup_errors=True) as scratch:
        log_path = Path(log or Path(scratch) / "server.log").resolve()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        view = _served_view(model_dir, Path(scratch) / "served" / model_dir.resolve().name)
        command = [sys.executable, "-c", _LAUNCH, str(os.getpid()), "serve", view.name]
        command += ["--host", "127.0.0.1", "--device", device, "--dtype", dtype]
        threads = threads or max(1, (os.cpu_count() or 2) // 2)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        for left in reversed(range(TRIES if port is None else 1)):
            chosen, began = _free_port(port), log_path.stat().st_size if log_path.exists() else 0
            with log_path.open("ab") as output:
                streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
                options = {"env": environment, "cwd": view.parent, "start_new_session": True, **streams}
                process = subprocess.Popen([*command, "--port", str(chosen)], **options)
            try:
                try:
                    _wait_until_up(process, chosen, log_path, began, start_timeout)
                except ServerError as error:
                    if left and IN_USE in str(error).lower():  # somebody took that port meanwhile
                        continue
                    raise
                yield f"http://127.0.0.1:{chosen}/v1"
                return
            finally:
                _stop(process)


def _free_port(wanted: int | None) -> int:
    """A port of 127.0.0.1 that nobody listens on. Raises ServerError when the one wanted is taken."""
    with socket.socket() as probe:
        if os.name == "posix":  # as the server does: a port that was closed a moment ago is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise ServerError(f"port {wanted} cannot be used ({why}); give another, or None for a free one") from None
        return probe.getsockname()[1]


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


def _wait_until_up(process: subprocess.Popen, port: int, log: Path, began: int, timeout: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        up = False
        with contextlib.suppress(OSError, http.client.HTTPException):
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=2):
                up = True
        if process.poll() is not None:  # looked at last: an answer may be that of another server on this port
            status, tail = process.returncode, _tail(log, began)
            raise ServerError(f"the local server ended with status {status}. Its last lines:\n{tail}")
        if up and _listens(process, port):
            return
        time.sleep(0.1)
    raise ServerError(f"the local server did not answer within {timeout:g} s. Its last lines:\n{_tail(log, began)}")


def _listens(process: subprocess.Popen, port: int) -> bool:
    """This very process listens there (True when the system does not say)."""
    import psutil

    try:
        sockets = psutil.Process(process.pid).net_connections("tcp")
    except (psutil.Error, OSError):
        return True
    return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)


def _tail(log: Path, began: int = 0, lines: int = 12) -> str:
    """The last lines that were written after byte ``began``."""
    written = log.read_bytes()[began:].decode("utf-8", "replace").splitlines()
    return "\n".join(written[-lines:]) or "(it wrote nothing)"


def _stop(process: subprocess.Popen) -> None:
    """End the server's whole process group: politely, then for good."""
    for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sign)
            process.wait(patience)
            return
