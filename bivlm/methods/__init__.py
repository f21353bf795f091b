"""One file per method; a method registers itself by being here."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from bivlm.errors import InputError
from bivlm.methods.base import CurvePoint, LayerPlan, Method, MethodSettings, Quantized
from bivlm.untrusted import short

__all__ = ["CurvePoint", "LayerPlan", "Method", "MethodSettings", "Quantized", "method", "methods"]


@cache
def methods() -> dict[str, Method[Any]]:
    """Return every method by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {cls.name: cls() for cls in Method.__subclasses__()}


def method(name: str) -> Method[Any]:
    """Return the method called `name`; raise `InputError` with the known names for any other."""
    try:
        return methods()[name]
    except KeyError:
        raise InputError(f"method {short(name)} is not known; valid methods: {', '.join(sorted(methods()))}") from None
