"""Find which tensors of a checkpoint are linear weights, of which component, and under what name each is loaded.

The module tree comes from the config alone, on the meta device. Names on disk are mapped to names in the loaded model
by transformers' own conversion rules, the ones `from_pretrained` applies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bivlm.checkpoint.architectures import ARCHITECTURES, Architecture, Component, architecture_of
from bivlm.checkpoint.conversion import LoadedName, expert_names, loaded_names
from bivlm.checkpoint.members import members_of
from bivlm.checkpoint.reading import CONFIG, QUANT_METHOD, Checkpoint
from bivlm.checkpoint.remote_code import remote_code_allowed
from bivlm.checkpoint.safetensors_file import TensorEntry, same_values, torch_dtype
from bivlm.errors import InputError
from bivlm.packing.container import read_header
from bivlm.untrusted import in_a_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from transformers import PreTrainedModel


_COUNT = re.compile(r"(layers?|depths?|blocks|(experts))$")  # what a config calls the number of some modules
_FEW_LAYERS = 256  # made in a second or two, whatever the weights are
_FEW_EXPERTS = 4096  # most are rows of one parameter and take no time


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight is one tensor on disk.

    Attributes:
        name: of the module in the loaded model, for example "model.language_model.layers.0.self_attn.q_proj".
        disk_name: of its weight on disk.
        component: "vision", "adaptor" or "language".
        shape: (M, N) of the weight.
        dtype: of the weight; of the rebuilt weight where the tensor is packed.
        tied_to: the loaded parameter that it shares its tensor with (a head tied to the embedding), else None.
        stacked_in: the loaded 3-D parameter that it is a part of, if it is an expert's matrix, else None. Its name is
            then that of no module, see `bivlm.checkpoint.conversion.expert_names`.
        copies: names on disk of further tensors with the same numbers, which loading ties to this one. A packed
            checkpoint leaves them out.
    """

    name: str
    disk_name: str
    component: Component
    shape: tuple[int, int]
    dtype: torch.dtype
    tied_to: str | None = None
    stacked_in: str | None = None
    copies: tuple[str, ...] = ()

    @property
    def holder(self) -> str:
        """Name of the module whose weight it uses: its own, or that of the embedding which it is tied to."""
        return self.tied_to.removesuffix(".weight") if self.tied_to else self.name

    @property
    def size(self) -> int:
        """Number of weights, M * N."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class LeftAlone:
    """A tensor on disk that is no `Linear`'s weight, and what it is: `kind` is for people to read.

    `component` is None for a tensor outside vision, adaptor and language. `name` is the floating-point parameter of the
    loaded model that has its numbers as they are, None if there is none.
    """

    disk_name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    component: Component | None = None
    name: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """Every tensor of a checkpoint, once: linear layers in module order, then the rest by name.

    A tied head stands among the linears although the tensor counts as the embedding's.

    Attributes:
        linears: the linear layers.
        left_alone: the rest, the embedding of tokens among it unless that is packed.
        tokens: the embedding of tokens, described as a linear layer with a weight (V, D); None if it is not one tensor
            on disk.
        head: name of the linear layer that gives the logits; None if there is none.
    """

    linears: list[Linear]
    left_alone: list[LeftAlone]
    tokens: Linear | None
    head: str | None

    @property
    def packable(self) -> dict[str, Linear]:
        """Everything that can be packed, by its name in the loaded model."""
        both = self.linears if self.tokens is None else [*self.linears, self.tokens]
        return {linear.name: linear for linear in both}

    def leftovers(self, packed: Iterable[Linear]) -> dict[str, str]:
        """Return norms, biases, embedding of tokens and head: parameters of the loaded model by their names on disk.

        Copies are among them; what is `packed` is not, nor a parameter that is made from several tensors on disk.
        """
        tables = [linear for linear in self.linears if linear.name == self.head]
        tables += [] if self.tokens is None else [self.tokens]
        found = {each.disk_name: each.name for each in self.left_alone if each.name and len(each.shape) < 2}
        found |= {name: f"{table.holder}.weight" for table in tables for name in (table.disk_name, *table.copies)}
        gone = {name for linear in packed for name in (linear.disk_name, *linear.copies)}
        return {disk_name: name for disk_name, name in sorted(found.items()) if disk_name not in gone}


def linears(checkpoint: Checkpoint) -> list[Linear]:
    """Return the linear layers that can be packed, in module order, `lm_head` included; see `anatomy`."""
    return anatomy(checkpoint).linears


def anatomy(checkpoint: Checkpoint) -> Anatomy:
    """Return the linear layers and what is left alone, from the config and the headers of files and packed weights.

    Experts that lie on disk one by one are linears too. Left alone is what no plain `torch.nn.Linear` uses as it is:
    embeddings, norms, biases, convolutions, weights that a subclass of Linear reads itself, and weights that
    transformers splits, permutes or merges in another way. Two tensors that the config ties are read and compared if
    both are on disk, see `tied_tensors`. Raises `InputError` for an unknown architecture, a checkpoint quantized by
    another method, and a Linear whose weight is missing on disk, there twice, or not of the config's shape.
    """
    _check_full_precision(checkpoint)
    model = skeleton(checkpoint)
    members = members_of(model, checkpoint.modules)
    loaded = loaded_names(model, checkpoint.entries)
    sources = _sources(loaded, checkpoint)
    converted = {name for goal in loaded.values() if goal.converted for name in goal.names}
    tied, held = tied_tensors(
        model, sources, lambda one, other: same_values(checkpoint.entries[one], checkpoint.entries[other])
    )
    copies = {sources[name]: held[name] for name in tied if name in sources and sources[name] != held[name]}
    copies_of = _by_original(copies)
    experts = _experts_by_module(model, loaded)
    found = []
    for name, module in model.named_modules():
        weight, component = f"{name}.weight", members.component(name)
        if component is None:
            continue
        found += [_expert(*expert, component, model, checkpoint) for expert in experts.get(name, ())]
        if type(module) is not nn.Linear or weight in converted:
            continue
        disk_name = held.get(weight)
        if disk_name is None:
            untied = module is model.get_output_embeddings() and weight not in tied
            why = ", and by the config it is tied to no other (tie_word_embeddings)" if untied else ""
            raise InputError(f"checkpoint {checkpoint.folder}: the tensor of {weight} is missing{why}")
        shape = (module.out_features, module.in_features)
        holder = tied.get(weight, weight).removesuffix(".weight")
        dtype = _dtype(holder, shape, disk_name, checkpoint)
        copied = copies_of.get(disk_name, ()) if weight not in tied else ()
        found.append(Linear(name, disk_name, component, shape, dtype, tied.get(weight), copies=copied))
    names = {module: name for name, module in model.named_modules()}
    tokens = _tokens(names, model, held, checkpoint)
    if tokens is not None:
        tokens = replace(tokens, copies=copies_of.get(tokens.disk_name, ()))
    packable = {linear.disk_name for linear in found if linear.tied_to is None}
    if tokens is not None and tokens.name in checkpoint.packed:
        packable.add(tokens.disk_name)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    left = []
    for disk_name, entry in checkpoint.entries.items():
        if disk_name in packable:
            continue
        goal = loaded[disk_name]
        kind = _kind(model, members, goal)
        if tokens is not None and disk_name == tokens.disk_name:  # also where it lies under the name of a tied head
            kind = type(model.get_submodule(tokens.name)).__name__
        tunable = not goal.converted and goal.names[0] in parameters and entry.is_floating and entry.numel
        name = goal.names[0] if tunable else None
        left.append(_left_alone(entry, kind, members.component(goal.names[0]), copies, name))
    head = names.get(model.get_output_embeddings())
    return Anatomy(found, left, tokens, head if head in {linear.name for linear in found} else None)


def _check_full_precision(checkpoint: Checkpoint) -> None:
    quantized_by = (checkpoint.quantization or {}).get("quant_method", QUANT_METHOD)
    if quantized_by != QUANT_METHOD:
        raise InputError(f"checkpoint {checkpoint.folder}: quantized by {quantized_by}; expected full precision")


def skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the model without its weights, on the meta device.

    Raises `InputError` for a config that makes no model, and for an unknown architecture that is none for images.
    """
    # Imported here because they import transformers' models, which takes seconds.
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    code = remote_code_allowed(checkpoint.folder)
    described = {key: part for key, part in checkpoint.config.items() if key != "quantization_config"}
    _check_counts(described, max(len(checkpoint.entries), _FEW_LAYERS), str(checkpoint.folder / CONFIG))
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"), no_init_weights():
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=code)
    except InputError:
        raise
    # A config that its class cannot use fails somewhere in the model's own code, in whatever way; a tower may need a
    # package. Nothing of ours runs here, and nothing but the config decides.
    except Exception as error:
        model_type = checkpoint.config.get("model_type") or ""
        if model_type not in ARCHITECTURES:
            architecture_of(model_type)  # says which there are
        said = in_a_line(error)
        raise InputError(f"checkpoint {checkpoint.folder}: its config makes no image-text model: {said}") from error


def tied_tensors(
    model: PreTrainedModel, sources: Mapping[str, str], same: Callable[[str, str], bool]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return which parameters share the tensor of another, and the tensor on disk that each parameter is loaded from.

    The config names pairs; the files decide, as in `PreTrainedModel.tie_weights`: two tensors that are both on disk
    and differ stay two, and a pair with one tensor on disk shares it, under whichever of its names that is.

    Args:
        model: on the meta device, as its config makes it.
        sources: name on disk by name in the loaded model.
        same: whether two tensors, by their names on disk, hold the same numbers.

    Returns:
        (tied, held): the other parameter's name by that of each one that is tied to it; `sources` with the tensors
        that tied parameters share.
    """
    tied, held = {}, dict(sources)
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in held and other in held and not same(held[name], held[other]):
            continue
        tied[name] = other
        if name in held:
            held.setdefault(other, held[name])
    held |= {name: held[other] for name, other in tied.items() if other in held}
    return tied, held


def _sources(loaded: dict[str, LoadedName], checkpoint: Checkpoint) -> dict[str, str]:
    """Return the name on disk by name in the loaded model, of tensors that are loaded as they are."""
    sources: dict[str, str] = {}
    for disk_name, goal in loaded.items():
        if goal.converted:
            continue
        other = sources.setdefault(goal.names[0], disk_name)
        if other != disk_name:
            raise InputError(
                f"checkpoint {checkpoint.folder}: {other} and {disk_name} are both loaded as {goal.names[0]}"
            )
    return sources


def _by_original(copies: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for copy, original in sorted(copies.items()):
        found[original] = (*found.get(original, ()), copy)
    return found


def _experts_by_module(model: PreTrainedModel, loaded: dict[str, LoadedName]) -> dict[str, list[tuple[str, str, str]]]:
    """Return (name, name on disk, parameter) of every expert's matrix, by the module that stacks them."""
    experts: dict[str, list[tuple[str, str, str]]] = {}
    for disk_name, expert in expert_names(model, loaded).items():
        parameter = loaded[disk_name].names[0]
        experts.setdefault(parameter.rpartition(".")[0], []).append((expert, disk_name, parameter))
    return experts


def _tokens(
    names: dict[nn.Module, str], model: PreTrainedModel, sources: dict[str, str], checkpoint: Checkpoint
) -> Linear | None:
    """Return the embedding of tokens; None if the class names none, or it is no table, or merged while loading."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    name = names.get(embedding, "")
    disk_name = sources.get(f"{name}.weight")
    if not isinstance(embedding, nn.Embedding) or disk_name is None:
        return None
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    return Linear(name, disk_name, "language", shape, _dtype(name, shape, disk_name, checkpoint))


def _dtype(name: str, shape: tuple[int, int], disk_name: str, checkpoint: Checkpoint) -> torch.dtype:
    """Return the weight's dtype after a check of its shape on disk."""
    entry = checkpoint.entries[disk_name]
    header = read_header(checkpoint.read(disk_name), disk_name) if name in checkpoint.packed else None
    found = entry.shape if header is None else header.shape
    if found != shape:
        raise InputError(f"{disk_name}: shape {found} on disk, {shape} by the config")
    if 0 in shape:
        raise InputError(f"{disk_name}: shape {shape}, expected at least one row and one column")
    return torch_dtype(entry) if header is None else header.dtype


def _expert(
    name: str, disk_name: str, parameter: str, component: Component, model: PreTrainedModel, checkpoint: Checkpoint
) -> Linear:
    """Return an expert's matrix after a check of its columns; transformers checks the rows of all together."""
    header = read_header(checkpoint.read(disk_name), disk_name) if name in checkpoint.packed else None
    shape = checkpoint.entries[disk_name].shape if header is None else header.shape
    columns = model.get_parameter(parameter).shape[-1]
    if len(shape) != 2 or shape[1] != columns:
        raise InputError(f"{disk_name}: shape {shape} on disk, expected {columns} columns by the config")
    dtype = _dtype(name, shape, disk_name, checkpoint)
    return Linear(name, disk_name, component, shape, dtype, stacked_in=parameter)


def _left_alone(
    entry: TensorEntry, kind: str, component: Component | None, copies: Mapping[str, str], name: str | None
) -> LeftAlone:
    parameters = entry.numel if entry.is_floating and entry.name not in copies else 0
    if entry.name in copies:
        kind = f"{kind}, a copy of {copies[entry.name]}"
    return LeftAlone(entry.name, kind, entry.shape, entry.dtype, parameters, component, name)


def _kind(model: PreTrainedModel, members: Architecture, goal: LoadedName) -> str:
    """Return what a tensor is, in words."""
    module_name, _, tensor_name = goal.names[0].rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        return "not used by the model"
    kind = type(module).__name__
    if goal.converted:
        what = f"{kind}.{tensor_name}" if tensor_name != "weight" else kind
        return f"{what}, merged, split or turned while loading"
    if not hasattr(module, tensor_name):
        return "not used by the model"
    if isinstance(module, nn.Linear) and tensor_name == "weight" and members.component(module_name) is None:
        return f"{kind}, outside vision, adaptor and language"
    return kind if tensor_name == "weight" else f"{kind}.{tensor_name}"


def _check_counts(value: Any, most: int, place: str) -> None:
    """Raise `InputError` for a config with more layers than the weights can be of: making them would never end."""
    if isinstance(value, dict):
        for key, part in value.items():
            count = _COUNT.search(key)
            if type(part) is int and count and part > (most if count[2] is None else max(most, _FEW_EXPERTS)):
                raise InputError(f"{place}.{key}: found {part}, the weights are of {most} tensors or fewer")
            _check_counts(part, most, f"{place}.{key}")
    elif isinstance(value, list):
        for part in value:
            _check_counts(part, most, place)
