"""Where things are kept that can be made again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder named by ``ADEMAMIX_CACHE``, else ``ademamix`` in the user's cache folder."""
    if ours := os.environ.get("ADEMAMIX_CACHE"):
        return Path(ours)
    users = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return Path(users or Path.home() / ".cache") / "ademamix"
