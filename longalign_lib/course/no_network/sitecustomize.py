"""Loaded by every Python process of an offline course run: no connection may leave this machine.

The course promises to need no network once it is installed. The runner puts this folder first on PYTHONPATH, so kernels,
torchrun's processes and the local model server all get the hook. A forbidden attempt raises, and is appended to the file
that LONGALIGN_NETWORK_LOG names, so that a library that swallows the error is still found out. The hook sees Python's own
sockets; connections made inside C++ libraries (gloo's, between local processes) pass unseen.
"""

import os
import sys

_LOCAL_NAMES = {"localhost", "localhost.localdomain", "ip6-localhost", "", None}


def _is_local(host):
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host in _LOCAL_NAMES or host in ("0.0.0.0", "::", "::1"):
        return True
    if isinstance(host, str) and (host.startswith("127.") or host.startswith("::ffff:127.")):
        return True
    return host == os.uname().nodename if hasattr(os, "uname") else False


def _forbid(event, host):
    line = f"{event} {host!r} by {' '.join(sys.argv[:3])[:120]}\n"
    log = os.environ.get("LONGALIGN_NETWORK_LOG")
    if log:
        with open(log, "a", encoding="utf8") as file:
            file.write(line)
    raise PermissionError(f"the course runs offline, but something asked for the network: {line.strip()}")


def _hook(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        if isinstance(address, tuple) and not _is_local(address[0]):
            _forbid(event, address[0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname") and not _is_local(args[0]):
        _forbid(event, args[0])


if os.environ.get("LONGALIGN_NETWORK_LOG"):
    sys.addaudithook(_hook)
