"""Architectures: which modules of a loaded model are vision, adaptor and language.

One small file an architecture holds ``FAMILY = Family(...)``; it registers by being here. Of an architecture without a
file a recipe says it, with ``modules``: names of modules by component.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from bivlm.errors import InputError
from bivlm.untrusted import short

COMPONENTS = ("vision", "adaptor", "language")
MODULES_KEY = "modules"  # in a recipe, and in the quantization config of a packed checkpoint

Modules = dict[str, list[str]]


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
            for component in COMPONENTS
            for prefix in getattr(self, component)
            if module == prefix or module.startswith(f"{prefix}.")
        ]
        return max(found)[1] if found else None

    @classmethod
    def of_modules(cls, modules: Modules) -> Family:
        """The one that `modules` describe, as `parse_modules` gives them."""
        return cls((), *(tuple(modules.get(component, ())) for component in COMPONENTS))


def parse_modules(value: Any, source: str = MODULES_KEY) -> Modules:
    """Names of modules in the loaded model by component, from what stands in a recipe; components without are left out.

    Raises `InputError` naming `source` for anything but lists of names under vision, adaptor and language, for a name
    that is there twice, and for a map without a language or vision module.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{source}: expected names of modules by {', '.join(COMPONENTS)}, found {short(value)}")
    modules: Modules = {}
    for component, names in value.items():
        if component not in COMPONENTS:
            raise InputError(f"{source}: {short(component)}: expected one of {', '.join(COMPONENTS)}")
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
            raise InputError(f"{source}.{component}: expected a list of module names, found {short(names)}")
        modules[component] = list(names)
    every = [name for names in modules.values() for name in names]
    if twice := next((name for name, count in Counter(every).items() if count > 1), None):
        raise InputError(f"{source}: {twice} is named twice")
    if missing := next((component for component in ("vision", "language") if not modules.get(component)), None):
        raise InputError(f"{source}.{missing}: expected at least one module")
    return {component: modules[component] for component in COMPONENTS if modules.get(component)}


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
            f"unknown architecture: model_type {short(model_type)}; known are {', '.join(sorted(families()))}. "
            f"A recipe may say with '{MODULES_KEY}' which of its modules are {', '.join(COMPONENTS)}"
        ) from None
