"""Names that people read in MLflow and Prefect, made of what the user said."""

from __future__ import annotations

import re
from pathlib import PurePosixPath


def slug(text: str, keep: str = "") -> str:
    """`text` with letters, digits, ``_ - .`` and the characters in `keep`; whatever else stands there becomes a dot."""
    return re.sub(rf"[^A-Za-z0-9_.{re.escape(keep)}-]+", ".", text).strip(".")[-100:]


def model_name(model: str) -> str:
    """The last part of a hub id or a folder, without dots, which MLflow's model names do not allow."""
    name = PurePosixPath(model.replace("\\", "/").rstrip("/")).name
    return slug(name).replace(".", "-") or "model"


def run_name(model: str, recipe: str, request: str) -> str:
    """For the list of runs: model, recipe and the beginning of the request's hash."""
    return f"{model_name(model)} · {recipe} · {request[:8]}"


def registered_name(model: str, recipe: str) -> str:
    """One registered model per base model and recipe, so that each recipe has its own candidate."""
    return f"{model_name(model)}-{recipe.replace('.', '-')}"
