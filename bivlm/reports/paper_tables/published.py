"""The results that the paper reports."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from bivlm.errors import InputError

TABLES = ("comparison", "components")


@dataclass(frozen=True)
class Published:
    """The figures of one of the paper's models.

    Attributes:
        name: as ``bivlm reproduce`` calls it.
        id: of the model on the hub.
        columns: of each table, in the paper's order: "full-precision" and METHOD-COMPONENTS.
        figures: by table, score (``TASK/METRIC``) and column.
    """

    name: str
    id: str
    columns: dict[str, list[str]]
    figures: dict[str, dict[str, dict[str, float]]]


@cache
def _read() -> dict[str, Any]:
    text = (resources.files("bivlm.reports.paper_tables") / "published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def published_models() -> list[str]:
    """Return the names of the paper's models."""
    return sorted(_read()["models"])


def published(name: str) -> Published:
    """Return the figures of a model; raise `InputError` for one that the paper does not have."""
    if name not in published_models():
        raise InputError(f"model {name!r}: not one of the paper's; expected {', '.join(published_models())}")
    columns, model = _read()["columns"], _read()["models"][name]
    figures = {
        table: {score: dict(zip(columns[table], row, strict=True)) for score, row in model[table].items()}
        for table in TABLES
    }
    return Published(name, model["id"], columns, figures)
