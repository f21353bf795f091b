"""Architectures: which modules of a loaded model are vision, adaptor and language.

One small file an architecture holds ``FAMILY = Family(...)``; it registers by being here.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache

from bivlm.errors import InputError


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        model_types: the values of ``model_type`` in config.json that it serves.
        vision: names of the vision modules in the loaded model, for example "model.vision_tower".
        adaptor: names of the modules between them; they may lie within a vision module.
        language: names of the language modules, the head included.
    """

    model_types: tuple[str, ...]
    vision: tuple[str, ...]
    adaptor: tuple[str, ...]
    language: tuple[str, ...]

    def component(self, module: str) -> str | None:
        """The component that `module` is part of, by the longest name that it lies within; None outside all."""
        found = [
            (len(prefix), component)
            for component in ("vision", "adaptor", "language")
            for prefix in getattr(self, component)
            if module == prefix or module.startswith(f"{prefix}.")
        ]
        return max(found)[1] if found else None


@cache
def families() -> dict[str, Family]:
    """Every family by the model types it serves."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {model_type: module.FAMILY for module in modules for model_type in module.FAMILY.model_types}


def family(model_type: str) -> Family:
    """The family of `model_type`; raises `InputError` with the types that are known."""
    try:
        return families()[model_type]
    except KeyError:
        raise InputError(
            f"unknown architecture: model_type {model_type!r}; known are {', '.join(sorted(families()))}. "
            "A new one is one file in bivlm/families/"
        ) from None
