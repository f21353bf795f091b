"""A model whose blocks are loaded one at a time, run where they stand in the model's own code.

A step runs the model's forward on a sample with every unit replaced by a gate: the unit in question runs and ends the
step; those whose outputs are known give them; the others let the hidden states pass, since whatever they would add is
replaced at the last gate before the unit. So masks, positions, rotary angles, windows and cross-attention are the
model's own, in whatever architecture.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from bivlm.calibration.blocks.units import Unit, find_units, predecessors
from bivlm.checkpoint.architectures import MODULES_KEY, Architecture
from bivlm.checkpoint.conversion import convert, loaded_names
from bivlm.checkpoint.linears import linears, tied_tensors
from bivlm.checkpoint.members import members_of
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.remote_code import remote_code_allowed
from bivlm.checkpoint.safetensors_file import read_tensor
from bivlm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], torch.Tensor]

_BUILDING = threading.Lock()
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc


class _Reached(Exception):
    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output


class BlockwiseModel:
    """The model of a checkpoint with the weights of at most one unit, and those that belong to none, in memory.

    Attributes:
        units: in the order in which they run.
        dtype: of weights and hidden states: by default the checkpoint's, and float32 on the CPU, where products of
            16-bit numbers take up to seventy times as long.
        head_name: name of the module that gives the logits; no block.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        """Raise `InputError` for a packed checkpoint or an unknown architecture."""
        if checkpoint.packed:
            raise InputError(f"checkpoint {checkpoint.folder}: packed; expected full precision")
        self.device = torch.device(device)
        self._checkpoint = checkpoint
        self._model = _frame(checkpoint, dtype or (torch.float32 if self.device.type == "cpu" else None))
        self.dtype = self._model.dtype
        names = {linear.name for linear in linears(checkpoint) if linear.tied_to is None}
        members = members_of(self._model, checkpoint.modules)
        self.units = find_units(self._model, members, names)
        self._sources = self._disk_names()
        paths = {module: name for name, module in self._model.named_modules()}
        self._embedding: nn.Module = self._model.get_input_embeddings()
        self._head: nn.Module = self._model.get_output_embeddings()
        self._embedding_name, self.head_name = paths[self._embedding], paths[self._head]
        self._refuse_outsiders(members)
        self._load_rest()

    @property
    def name(self) -> str:
        """The model's name in messages: its folder."""
        return f"model {self._checkpoint.folder}"

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self._model.config

    def unit(self, name: str) -> Unit:
        """Return the unit called `name`."""
        return next(unit for unit in self.units if unit.name == name)

    def predecessors(self, unit: Unit) -> list[Unit]:
        """Return the units whose outputs a step at `unit` needs, see `bivlm.calibration.blocks.units.predecessors`."""
        return predecessors(unit, self.units)

    @contextmanager
    def at(self, unit: Unit, weights: Mapping[str, torch.Tensor] | None = None) -> Iterator[Step]:
        """Yield ``step(inputs, given)``, which runs `unit` on a sample; its weights are loaded and then dropped.

        `inputs` are the model's inputs, `given` the outputs of the unit's `predecessors` by name; the step returns
        the unit's output. `weights` replace those of linear layers by name, for example with rebuilt ones.
        """
        module = self._model.get_submodule(unit.name)
        first_of_language = not any(p.component == unit.component for p in self.predecessors(unit))
        embeds = unit.component == "language" and first_of_language
        run: Callable[..., Any] = module.forward
        given_now: dict[str, torch.Tensor] = {}

        def reach(*arguments: Any, **named: Any) -> torch.Tensor:
            output = run(*arguments, **named)
            if not isinstance(output, torch.Tensor):
                raise InputError(f"{unit.name}: returns {type(output).__name__}; expected hidden states alone")
            raise _Reached(output)

        def step(inputs: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> torch.Tensor:
            try:
                self._run(inputs, given, given_now)
            except _Reached as reached:
                return reached.output
            raise InputError(f"{unit.name}: the model never runs it; leave it out of the recipe with 'keep'")

        gates = {other.name: reach if other is unit else _gate(other.name, given_now) for other in self.units}
        loaded = {unit.name: module}
        if not embeds:
            gates[self._embedding_name] = self._no_embedding
        elif type(self._embedding) is nn.Embedding:
            gates[self._embedding_name] = self._embed
        else:  # it does more than look up
            loaded[self._embedding_name] = self._embedding
        with self._prepared(loaded, gates, weights or {}):
            yield step

    @contextmanager
    def at_end(self) -> Iterator[Step]:
        """Yield ``step(inputs, given)``, which returns the logits (1, T, vocabulary).

        `given` holds the outputs of the adaptors and of the last language block.
        """
        given_now: dict[str, torch.Tensor] = {}

        def step(inputs: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return self._run(inputs, given, given_now).logits

        gates = {other.name: _gate(other.name, given_now) for other in self.units if other.name != self.head_name}
        gates[self._embedding_name] = self._no_embedding
        with self._prepared({self.head_name: self._head}, gates, {}):
            yield step

    @contextmanager
    def _prepared(
        self,
        loaded: Mapping[str, nn.Module],
        forwards: Mapping[str, Callable[..., Any]],
        weights: Mapping[str, torch.Tensor],
    ) -> Iterator[None]:
        """Load the weights of `loaded` and replace the forwards of modules within the block."""
        for name, module in loaded.items():
            self._load(module, name, weights)
        try:
            for name, forward in forwards.items():
                self._model.get_submodule(name).forward = forward
            yield
        finally:
            for name in forwards:
                self._model.get_submodule(name).__dict__.pop("forward", None)
            for module in loaded.values():
                self._drop(module)

    def _run(
        self,
        inputs: Mapping[str, torch.Tensor],
        given: Mapping[str, torch.Tensor],
        gates: dict[str, torch.Tensor],
    ) -> Any:
        """Run the model's forward on a sample, with `gates` returning `given`."""
        gates.clear()
        # The C library keeps what the sample before has left, in pieces between tensors that stay, up to the size of a
        # block with its statistics.
        if _trim is not None:
            _trim(0)
        gates.update({name: tensor.to(self.device) for name, tensor in given.items()})
        return self._model(**{name: tensor.to(self.device) for name, tensor in inputs.items()}, use_cache=False)

    def linear(self, name: str) -> nn.Linear:
        """Return the linear layer called `name`, for hooks."""
        layer = self._model.get_submodule(name)
        assert isinstance(layer, nn.Linear), f"{name} is no linear layer"
        return layer

    def _no_embedding(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return zeros in place of the embedding where its output is replaced before it is used."""
        width = cast(int, self._embedding.embedding_dim)
        return torch.zeros(*tokens.shape, width, dtype=self.dtype, device=self.device)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens' embedding, reading only the rows in question: whole it may be larger than a block."""
        path = f"{self._embedding_name}.weight"
        found, places = tokens.cpu().unique(return_inverse=True)
        rows = torch.cat([self._read(path, row) for row in found.tolist()])
        return rows.to(self.dtype)[places].to(self.device)

    def _disk_names(self) -> dict[str, str]:
        """Return the name on disk by name in the loaded model, of tensors that are loaded as they are."""
        self._loaded = loaded_names(self._model, self._checkpoint.entries)
        sources = {goal.names[0]: disk_name for disk_name, goal in self._loaded.items() if not goal.converted}
        # Each tensor on disk is read for its own parameter; where two are tied, they are equal.
        return tied_tensors(self._model, sources, lambda *_: False)[1]

    def _refuse_outsiders(self, members: Architecture) -> None:
        """Make linear layers of no component fail when run: they would compute with what passes through gates.

        A known architecture has none; `modules` of a recipe may have forgotten some.
        """
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Linear) and members.component(name) is None and name != self.head_name:
                module.__dict__["forward"] = _outside(name)

    def _load_rest(self) -> None:
        """Load what lies in no unit: norms, patch and position embeddings; not the tokens' embedding and the head."""
        later = [self._embedding_name, self.head_name, *(unit.name for unit in self.units)]
        for name, module in self._model.named_modules():
            if not any(name == part or name.startswith(f"{part}.") for part in later):
                self._load_own(module, name, {})
        # Buffers were made where the model was built, on the CPU.
        for module in self._model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.device)

    def _load(self, module: nn.Module, name: str, weights: Mapping[str, torch.Tensor]) -> None:
        for path, part in module.named_modules(prefix=name):
            self._load_own(part, path, weights)

    def _load_own(self, module: nn.Module, name: str, weights: Mapping[str, torch.Tensor]) -> None:
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            path = f"{name}.{key}" if name else key
            tensor = weights.get(name) if key == "weight" else None
            if tensor is None:
                tensor = self._read(path)
            module._parameters[key] = nn.Parameter(tensor.to(self.device, parameter.dtype), requires_grad=False)

    def _read(self, path: str, row: int | None = None) -> torch.Tensor:
        """Return a tensor by its name in the loaded model, or one row of it, with a first dimension of 1."""
        source = self._sources.get(path)
        if source is None:
            tensor = convert(self._model, path, self._loaded, self._checkpoint.read)
            return tensor if row is None else tensor[row : row + 1]
        if row is None:
            return self._checkpoint.read(source)
        entry = self._checkpoint.entries[source]
        if not 0 <= row < entry.shape[0]:
            raise IndexError(f"{path}: row {row} of {entry.shape[0]}")
        nbytes = entry.nbytes // entry.shape[0]
        shape = (1, *entry.shape[1:])
        return read_tensor(replace(entry, begin=entry.begin + row * nbytes, nbytes=nbytes, shape=shape))

    @staticmethod
    def _drop(module: nn.Module) -> None:
        for part in module.modules():
            for key, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _gate(name: str, given: Mapping[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    def passes(*arguments: Any, **named: Any) -> torch.Tensor:
        if name in given:
            return given[name]
        return arguments[0] if arguments else named["hidden_states"]

    return passes


def _outside(name: str) -> Callable[..., torch.Tensor]:
    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise InputError(
            f"{name} is outside vision, adaptor and language, and the model runs it: calibration block by block needs "
            f"it in one of them; name it in the recipe's '{MODULES_KEY}'"
        )

    return refuse


def _frame(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the model with its buffers and without its parameters, which are on the meta device.

    Its dtype is the checkpoint's by default.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    code = remote_code_allowed(checkpoint.folder)
    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=code)
    dtype = dtype or config.dtype or torch.float32
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    # Buffers that no file holds (rotary frequencies, positions) are computed while a model is built; on the meta
    # device they would not be. The way parameters are registered belongs to the whole process, hence the lock.
    with _BUILDING:
        nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
        try:
            with no_init_weights():
                return AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=code).eval()
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
