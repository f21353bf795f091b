"""Names that people read in MLflow and Prefect, made from the user's input."""

from __future__ import annotations

import re

from bivlm.sources.models import ResolvedModel

_SAYS_NOTHING = {"checkpoint", "model", "snapshot", "weights"}  # as a folder's name, without its parent's


def slug(text: str, keep: str = "") -> str:
    """Return `text` with every run of characters but letters, digits, ``_ - .`` and those in `keep` as a dot."""
    return re.sub(rf"[^A-Za-z0-9_.{re.escape(keep)}-]+", ".", text).strip(".")[-100:]


def model_name(model: ResolvedModel) -> str:
    """Return owner and name of a hub model, else the folder's name; without dots, which MLflow's names do not allow."""
    if model.revision is None or model.id.startswith("s3://"):
        folder = model.folder.resolve()
        name = f"{folder.parent.name}-{folder.name}" if folder.name in _SAYS_NOTHING else folder.name
    else:
        name = model.id.replace("/", "-")
    return slug(name).replace(".", "-") or "model"


def run_name(model: ResolvedModel, recipe: str, request: str) -> str:
    """Return the name in the list of runs: model, recipe and the beginning of the request's hash."""
    return f"{model_name(model)} · {recipe} · {request[:8]}"


def registered_name(model: ResolvedModel, recipe: str) -> str:
    """Return the registered model: one per base model and recipe, so that each recipe has its own candidate."""
    return f"{model_name(model)}-{recipe.replace('.', '-')}"
