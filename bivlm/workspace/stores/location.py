"""The default places of the workspace and the cache, defined once, so that every part of the product agrees."""

from __future__ import annotations

import os
import re
from pathlib import Path

CACHE_VARIABLE = "BIVLM_CACHE"
WORKSPACE_VARIABLE = "BIVLM_WORKSPACE"
_S3_MODEL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?:/[^/\\]+)*")


def cache_folder() -> Path:
    """Return the folder for files that can be made again: ``BIVLM_CACHE``, else ``~/.cache/bivlm``."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/bivlm").expanduser()


def default_workspace() -> str:
    """Return ``BIVLM_WORKSPACE`` (a folder or ``s3://bucket/prefix``), else ``workspace`` in the cache folder.

    All compressions share it, so that a second recipe for the same model finds the statistics of the first.
    """
    return os.environ.get(WORKSPACE_VARIABLE) or str(cache_folder() / "workspace")


def is_s3_model(url: str) -> bool:
    """Return whether `url` is ``s3://bucket/prefix`` of a form that leads nowhere else when it is made a path."""
    return bool(_S3_MODEL.fullmatch(url)) and url.isprintable() and not {".", ".."} & set(url.split("/"))
