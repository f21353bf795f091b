"""Find which modules of a model are vision, adaptor and language: by its architecture, or as the caller says."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from bivlm.checkpoint.architectures import ARCHITECTURES, MODULES_KEY, Architecture, Modules, architecture_of
from bivlm.errors import InputError
from bivlm.untrusted import short

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXAMPLE = f"""{MODULES_KEY}:
    vision: [model.vision_tower]
    adaptor: [model.multi_modal_projector]
    language: [model.language_model, lm_head]"""


def members_of(model: PreTrainedModel, modules: Modules | None = None) -> Architecture:
    """Return the modules of `model` as `modules` say, else by its architecture.

    Raises `InputError` for a name in `modules` that is no module of the model (with those that come near), and for an
    unknown architecture (with its linear layers, from which `modules` can be written).
    """
    if modules:
        _check_names(model, modules)
        return Architecture.of_modules(modules)
    if model.config.model_type not in ARCHITECTURES:
        raise InputError(unknown(model))
    return architecture_of(model.config.model_type)


def unknown(model: PreTrainedModel) -> str:
    """Return the message for an unknown architecture: its linear layers, numbers as #, and how to name its modules."""
    linears = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name), (module.out_features, module.in_features))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    lines = [f"  {count:>4} x {name} {shape[0]} x {shape[1]}" for (name, shape), count in linears.items()]
    return "\n".join(
        [
            f"unknown architecture: model_type {short(model.config.model_type)}; "
            f"known are {', '.join(sorted(ARCHITECTURES))}.",
            "Name its modules in the recipe, for example",
            f"  {_EXAMPLE}",
            f"{type(model).__name__} has these linear layers (# stands for a number, shapes are outputs x inputs):",
            *lines,
        ]
    )


def _check_names(model: PreTrainedModel, modules: Modules) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for component, wanted in modules.items():
        for name in wanted:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=3, cutoff=0)
                raise InputError(
                    f"{MODULES_KEY}.{component}: {name!r} matches no module of {type(model).__name__}; names are as in "
                    f"the loaded model, for example {', '.join(near)}"
                )
