"""A parameter of the loaded model that transformers merges, splits or turns round while loading, made by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

import torch

from bivlm.checkpoint.linears import LoadedName
from bivlm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def convert(
    model: PreTrainedModel, name: str, loaded: Mapping[str, LoadedName], read: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """The parameter `name` of `model` from its tensors on disk, by the model's own conversion rules.

    `loaded` is `bivlm.checkpoint.linears.loaded_names` of the checkpoint, whose order is that in which transformers
    collects tensors (expert by expert); ``read(disk_name)`` gives a tensor. Raises `InputError` if the tensors do not
    make the parameter in the shape that the model has.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in rules for pattern in rule.source_patterns}
    sources = {disk_name: goal for disk_name, goal in loaded.items() if goal.converted and name in goal.names}
    if not sources:
        raise InputError(f"{name}: no tensor on disk is loaded as it")
    first = next(iter(sources.values()))
    rule = deepcopy(by_pattern[first.rule])
    for disk_name, goal in sources.items():
        rule.add_tensor(first.names[0], disk_name, goal.rule, read(disk_name))
    made = rule.convert(first.names[0], model=model, config=model.config)[name]
    tensor = made[0] if isinstance(made, list) else made
    expected = model.get_parameter(name).shape
    if tensor.shape != expected:
        raise InputError(f"{name}: {tuple(tensor.shape)} made of {', '.join(sources)}, {tuple(expected)} by the config")
    return tensor
