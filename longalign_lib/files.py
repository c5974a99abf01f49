"""Files that are whole or not there: written beside their place, then moved onto it.

Invariant: a reader, another process or a run after a kill never sees half a file, as long as one process at a time writes it.
Cost: one rename.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path | str) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it takes the place of ``path`` when the block ends without an error.

    Folders above are made. What an error or a kill leaves behind is called ``<name>.part`` and is written over by the next try.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    yield part
    os.replace(part, path)
