"""What a file of samples was begun with, beside it, so that nobody continues it with other settings.

Invariant: samples of two settings never share a file. Cost: one small file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from longalign_lib.data.jsonl import write_jsonl


def same_settings(path: Path, settings: Mapping, begun: bool) -> None:
    """Compare with the settings on record if the work has begun, else write them down.

    Args:
        path: the record. settings: names and values that JSON can hold. begun: whether there are samples already.

    Raises:
        ValueError: another value than on record, with its name, both values and what to do; or no record.
    """
    if not begun:
        write_jsonl(path, [dict(settings)])
        return
    if not path.is_file():
        raise ValueError(f"{path.name} is missing, so nobody knows what the samples were begun with; delete them, or give another path")
    old = json.loads(path.read_text(encoding="utf-8"))
    if differ := [k for k in settings if old.get(k) != json.loads(json.dumps(settings[k]))]:
        k = differ[0]
        raise ValueError(
            f"{path.name} says that the samples were begun with another value of {k} ({old.get(k)!r}, now {settings[k]!r}); "
            "give another path, or delete the samples and their settings"
        )
