"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

import pooch


def cache_folder() -> Path:
    """Return the folder of prepared data and compiled code: $FEWSTEP_CACHE, or the user's cache."""
    return Path(os.environ.get("FEWSTEP_CACHE") or pooch.os_cache("fewstep"))
