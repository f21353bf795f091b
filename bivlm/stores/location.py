"""Where a workspace is when nobody says: once, so that every part of the product agrees."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "BIVLM_CACHE"
WORKSPACE_VARIABLE = "BIVLM_WORKSPACE"


def cache_folder() -> Path:
    """The folder for files that can be made again: ``BIVLM_CACHE``, else ``~/.cache/bivlm``."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/bivlm").expanduser()


def default_workspace() -> str:
    """A folder or ``s3://bucket/prefix``: ``BIVLM_WORKSPACE``, else the folder ``workspace`` in the cache folder.

    All compressions share it, so that a second recipe for the same model finds the statistics of the first.
    """
    return os.environ.get(WORKSPACE_VARIABLE) or str(cache_folder() / "workspace")
