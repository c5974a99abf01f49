"""What the notebooks share: profiles, output folders, the checkpoint of notebook 06; and the runner (``python -m``).

A profile changes sizes and never which cells run:
``ci`` two CPU cores, the whole course in minutes; ``laptop`` under an hour; ``gpu`` one 80 GB GPU; ``paper`` the paper's own
settings for eight of them. Nothing else in the library imports this package.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

# Plain text progress bars are wanted: they survive in executed notebooks and pages, widgets do not.
warnings.filterwarnings("ignore", message="IProgress not found")

PROFILES = ("ci", "laptop", "gpu", "paper")


def check_profile(profile: str) -> str:
    """Return ``profile`` if there is such a one.

    Raises:
        ValueError: names the profile, the four that exist and how to set it.
    """
    if profile not in PROFILES:
        raise ValueError(
            f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)} "
            "(`make course PROFILE=ci`, or the notebook's parameters cell)"
        )
    return profile


def pick(profile: str, **sizes):
    """The size for this profile: ``pick(PROFILE, ci=4, laptop=8, gpu=64, paper=512)``.

    Every profile must be given, so that none can be forgotten.
    """
    check_profile(profile)
    if set(sizes) != set(PROFILES):
        raise ValueError(f"give one size for each of {', '.join(PROFILES)}; got {', '.join(sizes) or 'none'}")
    return sizes[profile]


def start(profile: str, seed: int, out_dir: str | Path, name: str) -> Path:
    """Begin a notebook: check the profile, seed torch, set the captions, make and return its folder in ``out_dir``."""
    import torch
    import transformers

    from longalign_lib.plots import style

    check_profile(profile)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"SEED must be a whole number >= 0, got {seed!r}")
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    style.set_caption(profile=profile, seed=str(seed))
    folder = Path(out_dir) / profile / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def trained_model(profile: str, seed: int, out_dir: str | Path) -> Path:
    """Folder of the checkpoint that notebook 06 trains; see `course.training.trained_model`."""
    from longalign_lib.course import training

    return training.trained_model(profile, seed, out_dir)
