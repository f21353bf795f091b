"""The parts of a model that are run one after another: its blocks, its adaptors, and single layers between them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from bivlm.checkpoint.architectures import COMPONENTS, Architecture, Component


@dataclass(frozen=True)
class Unit:
    """A module that runs once for a sample: a transformer block, an adaptor, or a linear layer outside both.

    Attributes:
        name: of the module in the loaded model.
        component: "vision", "adaptor" or "language".
        linears: names of the linear layers within that can be packed, itself if it is one.
    """

    name: str
    component: Component
    linears: tuple[str, ...]


def find_units(model: nn.Module, members: Architecture, linears: Collection[str]) -> list[Unit]:
    """Return the units of `model` in the order in which they run: vision, adaptor, language, each in module order.

    A block is an entry of the outermost `torch.nn.ModuleList` of the vision or language model that holds any linear
    layer; an adaptor may hold none (Gemma 3's is a bare parameter). `linears` are the names of the layers that can be
    packed.
    """
    found: list[Unit] = []

    def visit(name: str, module: nn.Module, parent: nn.Module | None) -> None:
        component = members.component(name)
        if component is not None and not isinstance(module, nn.ModuleList):
            adaptor = component == "adaptor" and any(True for _ in module.parameters())
            block = component != "adaptor" and isinstance(parent, nn.ModuleList) and _has_linears(module)
            if adaptor or block or name in linears:
                inside = (n for n, _ in module.named_modules(prefix=name) if n in linears)
                found.append(Unit(name, component, tuple(inside)))
                return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child, module)

    visit("", model, None)
    return sorted(found, key=lambda unit: COMPONENTS.index(unit.component))  # stable: module order within a component


def predecessors(unit: Unit, units: Sequence[Unit]) -> list[Unit]:
    """Return the units whose outputs, together with the sample, determine what `unit` takes in.

    A block needs the one before it in its component, because it reads the hidden states alone. An adaptor needs all of
    vision, because it may read the outputs of several blocks. The language model also needs all adaptors, because their
    outputs enter at its beginning (LLaVA, Qwen), between its blocks (Qwen3-VL), or in every cross-attention block
    (Llama 3.2 Vision). In a model without adaptors all of vision enters instead.
    """
    before = units[: units.index(unit)]
    if unit.component == "adaptor":
        return [other for other in before if other.component == "vision"]
    same = [other for other in before if other.component == unit.component][-1:]
    if unit.component != "language":
        return same
    vision = [other for other in before if other.component == "vision"]
    return ([other for other in before if other.component == "adaptor"] or vision) + same


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear) for part in module.modules())
