"""Reference results: a JSON file with the numbers and where they come from."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from longalign_lib.files import whole
from longalign_lib.models import environment_report
from longalign_lib.plots.style import commit, device_name


def provenance(profile: str, seed: int) -> dict:
    """What a number needs beside it to be believed: device, versions, commit, profile, seed, day (UTC)."""
    versions = environment_report().set_index("item").value.to_dict()
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"profile": profile, "seed": seed, "device": device_name(), "commit": commit(), "date": day, "versions": versions}


def write_result(path: Path | str, profile: str, seed: int, **numbers) -> Path:
    """Write ``numbers`` with their provenance as JSON; returns the path."""
    text = json.dumps({"provenance": provenance(profile, seed), **numbers}, indent=1, ensure_ascii=False)
    with whole(path) as half:
        half.write_text(text + "\n", encoding="utf8")
    return Path(path)
