"""Find where every tensor on disk goes in the loaded model, and what transformers does to it on the way.

Of parameters that are merged, split or transposed while loading, only experts can be packed that are stored as one
matrix each and stacked in one 3-D parameter: every matrix is a linear weight with its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bivlm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


@dataclass(frozen=True)
class LoadedName:
    """Where a tensor on disk goes: `names` in the loaded model, and what becomes of it on the way.

    Attributes:
        names: in the loaded model; several where it is split.
        rule: the source pattern of the converter that changes more than its name; None without one.
    """

    names: tuple[str, ...]
    rule: str | None

    @property
    def converted(self) -> bool:
        """Whether more than its name changes."""
        return self.rule is not None


def loaded_names(model: PreTrainedModel, disk_names: Iterable[str]) -> dict[str, LoadedName]:
    """Return where `from_pretrained` puts every tensor on disk, by name on disk.

    Follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`: all renamings, then at most one
    converter, then the base model's prefix; the order of the names matters to some renamings.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    targets = {source: rule.target_patterns for rule in converters for source in rule.source_patterns}
    state = model.state_dict()
    loaded = {}
    for disk_name in sorted(disk_names, key=dot_natural_key):
        name, source = rename_source_key(disk_name, renamings, converters, model.base_model_prefix, state)
        if name not in state and disk_name in state:
            name, source = rename_source_key(disk_name, [], [], model.base_model_prefix, state)
        names = (name,) if source is None else tuple(name.replace(targets[source][0], to) for to in targets[source])
        loaded[disk_name] = LoadedName(names, source)
    return loaded


def stacks_experts(rule: Any) -> bool:
    """Return whether a conversion rule stacks matrices, and at most joins those of several projections."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    if not isinstance(rule, WeightConverter):
        return False
    first, *others = rule.operations
    return isinstance(first, MergeModulelist) and all(isinstance(operation, Concatenate) for operation in others)


def expert_names(model: PreTrainedModel, loaded: Mapping[str, LoadedName]) -> dict[str, str]:
    """Return the name of every expert's matrix by name on disk: the module that stacks them, then the rest of its name.

    For example "model.language_model.layers.1.mlp.experts.3.gate_proj". `loaded` is as in `convert`.
    """
    patterns = {pattern for rule in _converters(model) if stacks_experts(rule) for pattern in rule.source_patterns}
    names = {}
    for disk_name, goal in loaded.items():
        if goal.rule not in patterns:
            continue
        owner = goal.names[0].rpartition(".")[0]
        _, found, rest = disk_name.rpartition(f".{owner.rpartition('.')[2]}.")
        if found and rest.endswith(".weight"):
            names[disk_name] = f"{owner}.{rest.removesuffix('.weight')}"
    return names


def convert(
    model: PreTrainedModel, name: str, loaded: Mapping[str, LoadedName], read: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """Return the parameter `name` of `model` from its tensors on disk, by the model's own conversion rules.

    `loaded` is `loaded_names` of the checkpoint, whose order is that in which transformers
    collects tensors (expert by expert); ``read(disk_name)`` gives a tensor. Raises `InputError` if the tensors do not
    make the parameter in the shape that the model has.
    """
    by_pattern = {pattern: rule for rule in _converters(model) for pattern in rule.source_patterns}
    sources = {disk_name: goal.rule for disk_name, goal in loaded.items() if goal.rule and name in goal.names}
    if not sources:
        raise InputError(f"{name}: no tensor on disk is loaded as it")
    disk_name, pattern = next(iter(sources.items()))
    target, rule = loaded[disk_name].names[0], deepcopy(by_pattern[pattern])
    for disk_name, pattern in sources.items():
        rule.add_tensor(target, disk_name, pattern, read(disk_name))  # type: ignore[arg-type]  # a tensor will do
    made = rule.convert(target, model=model, config=model.config)[name]
    tensor = made[0] if isinstance(made, list) else made
    expected = model.get_parameter(name).shape
    if tensor.shape != expected:
        raise InputError(f"{name}: {tuple(tensor.shape)} made of {', '.join(sources)}, {tuple(expected)} by the config")
    return tensor


def _converters(model: PreTrainedModel) -> list[WeightConverter]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]
