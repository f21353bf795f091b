"""Load packed checkpoints with `from_pretrained`.

Importing this module registers ``quant_method: bivlm`` with transformers. Nothing has to be passed: the checkpoint's
config selects it. Three ways to use the packed weights:

- ``dequantize: load`` (as written): rebuild them once, layer by layer, into ordinary linear layers. The result is an
  ordinary model; saving it writes the rebuilt weights and no quantization config.
- ``dequantize: forward``: keep the packed bytes and rebuild a weight each time its layer is called. Saving it writes
  the packed bytes again.
- ``dequantize: packed``: the same, and multiply up to 256 tokens straight from the bytes where this machine can, in
  float32: on a CPU with AVX2, weights of one to eight groups, of grouped integers, and on a trellis of 2^12 states.
  With ``activations: int8`` inputs are rounded to eight bits, with a scale for every 4 to 32 columns, by weights of 1,
  2, 4 and 8 groups and of integers: faster, and less exact.

The checkpoint's way is overridden with ``from_pretrained(folder, quantization_config=BiVLMConfig(dequantize=...))``.

transformers only warns where tensors are missing, and fills them with random numbers. Here the files' headers are
compared with the model before anything is read, and every packed weight's checksum afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bivlm.checkpoint.conversion import LoadedName, expert_names, loaded_names, stacks_experts
from bivlm.checkpoint.linears import tied_tensors
from bivlm.checkpoint.packed_modules import PackedEmbedding, PackedLinear
from bivlm.checkpoint.reading import FORMAT, QUANT_METHOD, Checkpoint, check_quantization
from bivlm.checkpoint.safetensors_file import TensorEntry, read_entries
from bivlm.errors import InputError
from bivlm.packing import Activations, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dequantize = Literal["load", "forward", "packed"]


@register_quantization_config(QUANT_METHOD)
class BiVLMConfig(QuantizationConfigMixin):
    """The quantization config of a packed checkpoint.

    `when` is "load", "forward" or "packed", written ``dequantize`` in config.json; `packed` holds the byte length of
    every packed weight by the linear's name in the loaded model; `activations` are "float32", or "int8" with
    "packed". Keys it does not know are kept. Raises `InputError` for other values.
    """

    def __init__(
        self,
        quant_method: str = QUANT_METHOD,
        format: int = FORMAT,
        dequantize: Dequantize = "load",
        packed: dict[str, int] | None = None,
        activations: Activations = "float32",
        **further: Any,
    ):
        for name, value, known in (
            ("dequantize", dequantize, get_args(Dequantize)),
            ("activations", activations, get_args(Activations)),
        ):
            if value not in known:
                expected = ", ".join(map(repr, known))
                raise InputError(f"quantization_config: {name} {value!r}, expected one of {expected}")
        if activations == "int8" and dequantize != "packed":
            raise InputError(
                f"quantization_config: activations 'int8': expected dequantize 'packed', not {dequantize!r}"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # theirs lists only the built-in ones
        self.format = format
        self.when = dequantize
        self.activations = activations
        self.packed = check_quantization(format, packed or {}, "checkpoint")
        self.further = further

    @property
    def dequantize(self) -> bool:
        """transformers' question whether the loaded model is an ordinary one again."""
        return self.when == "load"

    def get_loading_attributes(self) -> dict[str, str]:
        """Return what a config passed to `from_pretrained` overrides."""
        return {"when": self.when, "activations": self.activations}

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as in config.json."""
        return {
            "quant_method": self.quant_method,
            "format": self.format,
            "dequantize": self.when,
            "packed": dict(self.packed),
            **({} if self.activations == "float32" else {"activations": self.activations}),
            **self.further,
        }

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


# transformers lets a passed config override the stored one only for the classes of this tuple.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (BiVLMConfig,)  # type: ignore[assignment]  # its length is part of its type


@register_quantizer(QUANT_METHOD)
class BiVLMQuantizer(HfQuantizer):
    """Swaps packed layers in before the weights are read, checks them, and rebuilds them if the config says so."""

    requires_calibration = True  # a model is compressed by the pipeline, never on the fly
    quantization_config: BiVLMConfig

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Raise `InputError` for a packed weight that is to be offloaded to disk."""
        for name in self.quantization_config.packed if isinstance(device_map, dict) else ():
            places = [place for place in device_map if not place or f"{name}.".startswith(f"{place}.")]
            if places and device_map[max(places, key=len)] == "disk":
                raise InputError(f"{name}.weight: {_ON_DISK}")

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes that an element takes once loaded: transformers plans device memory with it."""
        module = model.get_submodule(param_name.rpartition(".")[0])
        if self.quantization_config.dequantize and isinstance(module, _PACKED) and param is module.weight:
            return module.size * module.dtype.itemsize / param.numel()
        return super().param_element_size(model, param_name, param)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        experts = self._experts(model)
        if experts and not self.quantization_config.dequantize:
            raise InputError(
                f"quantization_config: dequantize {self.quantization_config.when!r}: expected 'load', since experts "
                f"({experts[0]} and {len(experts) - 1} more) are rebuilt before transformers stacks them"
            )
        packed = {}
        for name, nbytes in self.quantization_config.packed.items():
            if name in experts or _beside(model, name):
                continue
            path, module = _find_layer(model, name)
            packed[f"{path}.weight"] = nbytes
            _swap(model, path, module, nbytes)
        files = _Files.read(model, checkpoint_files or ())
        for weight, source in files.tied.items():  # a head that shares its tensor with a packed embedding
            if source in packed:
                path = weight.removesuffix(".weight")
                _swap(model, *_find_layer(model, path), packed[source])
        if checkpoint_files:
            _check_files(model, files, {name: self.quantization_config.packed[name] for name in experts})
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Return the model's rules, of which those that stack experts rebuild packed ones first."""
        if not self._experts(model):
            return weight_conversions
        return [
            rule.copy(
                rule._original_source_patterns,
                rule._original_target_patterns,
                operations=[RebuildExperts(), *rule.operations],
            )
            if stacks_experts(rule)
            else rule
            for rule in weight_conversions
        ]

    def _experts(self, model: PreTrainedModel) -> list[str]:
        """Return the packed weights that are experts' matrices: they lie within a module that holds 3-D parameters."""
        prefix = f"{model.base_model_prefix}."
        owners = {
            name
            for name, module in model.named_modules()
            if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        }
        owners |= {f"{prefix}{name}" for name in owners}
        return [name for name in self.quantization_config.packed if name.rsplit(".", 2)[0] in owners]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name in _packed_layers(model):
            module = _packed_layer(model, name)
            if module.weight.is_meta:
                raise InputError(f"{name}.weight: {_ON_DISK}")
            if f"{name}.weight" not in _tied(model):
                module.verify()
            if isinstance(module, PackedLinear):
                module.trim_bias()
                if self.quantization_config.when == "packed":
                    module.go_straight(self.quantization_config.activations)
        if self.quantization_config.dequantize:
            return self._dequantize(model)
        if any(isinstance(table, _PACKED) for table in _tables(model)):
            model.__dict__["resize_token_embeddings"] = _refuse_to_resize
        return model

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Return `model` with ordinary layers: each in its own dtype, or the whole model in `dtype`.

        transformers would fill in the dtype that the model was loaded in, which a cast has made wrong.
        """
        self._dequantize(model, dtype)
        if dtype is not None:
            for tensor in model.state_dict(keep_vars=True).values():
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
        model.__dict__.pop("resize_token_embeddings", None)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        tied = _tied(model)
        names = _packed_layers(model)
        for name in sorted(names, key=lambda name: f"{name}.weight" in tied):  # what they share comes first
            module = _packed_layer(model, name)
            if (source := tied.get(f"{name}.weight")) is None:
                model.set_submodule(name, module.dequantized(dtype))
            else:
                model.set_submodule(name, module.with_weight(model.get_parameter(source)))
        return model


class RebuildExperts(ConversionOps):
    """Packed experts of a parameter, expert by expert, as the matrices that they were."""

    def convert(  # type: ignore[override]  # transformers names the layer and the model in every call
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        **_: Any,
    ) -> dict[str, list[torch.Tensor]]:
        dtype = model.get_parameter(full_layer_name).dtype
        rebuilt: dict[str, list[torch.Tensor]] = {}
        for pattern in list(input_dict):
            tensors = input_dict.pop(pattern)
            rebuilt[pattern] = [
                unpack(tensor, f"an expert of {full_layer_name}").to(dtype) if tensor.dtype == torch.uint8 else tensor
                for tensor in tensors
            ]
        return rebuilt

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving writes what was rebuilt."""
        return _AsItIs()


class _AsItIs(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return _AsItIs()


_PACKED = (PackedLinear, PackedEmbedding)
_ON_DISK = "offloaded to disk; packed weights have to be on a CPU or an accelerator, for example device_map 'cpu'"


def _packed_layers(model: nn.Module) -> list[str]:
    """Return names, not modules: a list of modules would keep every packed weight until the last one is rebuilt."""
    return [name for name, module in model.named_modules() if isinstance(module, _PACKED)]


def _packed_layer(model: nn.Module, name: str) -> PackedLinear | PackedEmbedding:
    module = model.get_submodule(name)
    assert isinstance(module, _PACKED)
    return module


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Return parameters that share the tensor of another, by name; once weights are loaded, those that really do."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def _tables(model: PreTrainedModel) -> list[nn.Module | None]:
    """Return the embedding of tokens and the head, as far as the model's class names them."""
    try:
        return [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:
        return []


def _refuse_to_resize(*_: Any, **__: Any) -> NoReturn:
    raise InputError(
        "resize_token_embeddings: the embedding of tokens or the head is packed; call model.dequantize() first, or "
        "load the checkpoint with dequantize 'load'"
    )


def _swap(model: PreTrainedModel, path: str, module: nn.Linear | nn.Embedding, nbytes: int) -> None:
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            model.set_submodule(path, PackedEmbedding(module, nbytes, path))
        else:
            model.set_submodule(path, PackedLinear.replacing(module, nbytes, path))


def _beside(model: PreTrainedModel, name: str) -> bool:
    """Return whether `model` is a base model alone, and the layer called `name` lies outside it, as a head does."""
    prefix = model.base_model_prefix
    return bool(prefix) and model.base_model is model and not name.startswith(f"{prefix}.") and not _has(model, name)


def _has(model: PreTrainedModel, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _find_layer(model: PreTrainedModel, name: str) -> tuple[str, nn.Linear | nn.Embedding]:
    """Return the layer called `name`, also where `model` is the base model of the one that was packed."""
    for path in (name, name.removeprefix(f"{model.base_model_prefix}.")):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(module, nn.Linear | nn.Embedding):
            return path, module
    raise InputError(f"quantization_config: packed: {type(model).__name__} has no linear layer or embedding {name}")


@dataclass(frozen=True)
class _Files:
    """What the headers of a checkpoint's files hold for a model.

    Attributes:
        names: of the files.
        entries: by name on disk.
        goals: where each goes in the model, by name on disk.
        tied, held: see `tied_tensors`; where both tensors of a pair are on disk, each has its own, and transformers
            compares them once they are loaded. A pair whose embedding is packed never has two that are equal.
    """

    names: list[str]
    entries: dict[str, TensorEntry]
    goals: dict[str, LoadedName]
    tied: dict[str, str]
    held: dict[str, str]

    @classmethod
    def read(cls, model: PreTrainedModel, files: Iterable[str]) -> _Files:
        """Read the headers; raises `InputError` as `read_entries`."""
        entries = {entry.name: entry for file in files for entry in read_entries(Path(file))}
        goals = loaded_names(model, entries)
        sources = {name: disk_name for disk_name, goal in goals.items() for name in goal.names}
        return cls([Path(file).name for file in files], entries, goals, *tied_tensors(model, sources, lambda *_: False))


def check_headers(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raise `InputError` naming a tensor of `model` that is missing in the checkpoint, or there in another shape.

    These are the checks of `from_pretrained` for a packed checkpoint. `model` is the one to be loaded, on the meta
    device; packed layers are swapped into it. No weight is read.
    """
    quantizer = BiVLMQuantizer(BiVLMConfig(**(checkpoint.quantization or {})))
    quantizer._process_model_before_weight_loading(model, list(map(str, checkpoint.weight_files)))


def _check_files(model: PreTrainedModel, files: _Files, experts: dict[str, int]) -> None:
    """Raise `InputError` naming a tensor of `model` that is in none of the `files`, or there in another shape.

    `experts` are the lengths of packed experts by name.
    """
    entries, goals = files.entries, files.goals
    _check_experts({name: entries[disk_name] for disk_name, name in expert_names(model, goals).items()}, experts, model)
    for name, tensor in model.state_dict().items():
        entry = entries.get(files.held.get(name, ""))
        if entry is None:
            raise InputError(f"tensor {name} is missing in {', '.join(files.names)}")
        if goals[entry.name].converted:
            continue
        packed = tensor.dtype == torch.uint8
        if entry.shape != tuple(tensor.shape) or (packed and entry.dtype != "U8"):
            expected = "a packed weight, U8 of shape" if packed else "shape"
            raise InputError(
                f"tensor {name} ({entry.name} in {entry.file}): {entry.dtype} of shape {entry.shape}, "
                f"expected {expected} {tuple(tensor.shape)} by the config"
            )


def _check_experts(found: dict[str, TensorEntry], experts: dict[str, int], model: PreTrainedModel) -> None:
    """Raise `InputError` naming a packed expert that is missing or of another length, or one that was not announced."""
    prefix = f"{model.base_model_prefix}."
    announced = {name if name in found else name.removeprefix(prefix): nbytes for name, nbytes in experts.items()}
    for name in announced.keys() - found.keys():
        raise InputError(f"tensor {name}.weight is missing in the checkpoint's files")
    for name, entry in found.items():
        nbytes = announced.get(name)
        if (nbytes is not None or entry.dtype == "U8") and (entry.dtype, entry.shape) != ("U8", (nbytes,)):
            expected = "a weight that is not packed" if nbytes is None else f"a packed weight, U8 of shape ({nbytes},)"
            raise InputError(
                f"tensor {name}.weight ({entry.name} in {entry.file}): {entry.dtype} of shape {entry.shape}, "
                f"expected {expected}"
            )
