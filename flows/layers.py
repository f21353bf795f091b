"""All layers of a model, from their weights to packed shards, with calibration block by block where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefect import Task

from bivlm.calibration.blocks.units import Unit
from bivlm.recipe.budget import BudgetSettings
from bivlm.recipe.finish import FinishSettings
from bivlm.recipe.search import SearchSettings
from flows.runners import Workers
from tasks import binarization, block_inputs, finishing, grouping, saliency
from tasks import block_search as search
from tasks import budget as allocation
from tasks.block_inputs import Calibration
from tasks.checkpoint import Base
from tasks.layers import Layer, in_chunks
from tasks.runtime.device import Device
from tasks.runtime.policy import halves, is_out_of_memory
from tasks.runtime.progress import advance, expect
from tasks.runtime.steps import StepResult, check_that_workers_share, open_workspace


@dataclass(frozen=True)
class PackedLayers:
    """The layers with the steps that were done of them, the shard of each by name, and what else was done on the way.

    `between` are steps that others refer to: calibration, and the shards before finishing. `tables` are the shards of
    packed tables.
    """

    layers: list[Layer]
    shards: dict[str, StepResult]
    between: list[StepResult]
    tables: dict[str, StepResult] = field(default_factory=dict)


def pack_all(
    layers: Sequence[Layer],
    workspace: str,
    publish: Callable[[], None],
    workers: Workers,
    calibration: Calibration | None = None,
    budget: BudgetSettings | None = None,
    searched: SearchSettings | None = None,
) -> PackedLayers:
    """Every stage of every layer. `calibration` is needed if `needs_calibration`."""
    to_measure = search.with_widest_tail(layers, searched) if searched is not None else layers
    measured = side_by_side(saliency.measure_layers, to_measure, workspace, publish, workers)
    layers = [replace(layer, statistics=measured[layer.name]) for layer in layers]
    try:
        between: list[StepResult] = []
        by_curvature = _by_curvature(budget)
        squares = by_curvature or any("gradients" in layer.needs for layer in layers)
        walk = Walk(calibration, squares, publish, workers) if calibration is not None else None
        if budget is not None:
            choices = side_by_side(allocation.measure_choices, layers, workspace, publish, workers)
            curvature = walk.curvature() if by_curvature else None
            layers, allocated = allocation.allocate_bits(layers, choices, budget, curvature, workspace)
            between = [*choices.values(), allocated]
        if searched is not None:
            layers = walk.search(layers, searched)
        planned = side_by_side(grouping.plan_layers, layers, workspace, publish, workers)
        layers = [replace(layer, plan=planned[layer.name]) for layer in layers]
        if walk is None or not any("inputs" in layer.needs for layer in layers):
            shards = side_by_side(binarization.pack_layers, layers, workspace, publish, workers)
        else:
            layers, shards = walk.pack(layers)
        return PackedLayers(layers, shards, between + (walk.steps if walk else []))
    finally:
        block_inputs.forget_blocks()


def needs_calibration(
    layers: Sequence[Layer], budget: BudgetSettings | None, searched: SearchSettings | None = None
) -> bool:
    """Whether anything of these layers has to be decided by what the model does."""
    return _by_curvature(budget) or searched is not None or any("inputs" in layer.needs for layer in layers)


def _by_curvature(budget: BudgetSettings | None) -> bool:
    return budget is not None and budget.importance == "curvature"


def finish_all(
    done: PackedLayers, base: Base, samples: StepResult, settings: FinishSettings, device: Device, workspace: str
) -> PackedLayers:
    """The same layers with shards that were tuned together."""
    shards, between = finishing.finish_layers(base, done.layers, done.shards, samples, settings, device, workspace)
    return PackedLayers(done.layers, shards, [*done.between, *done.shards.values(), *between])


class Walk:
    """The calibration samples on their way through the blocks.

    `steps` are all that were done on it; `squares` asks for the squared gradients of weights where gradients are
    measured.
    """

    def __init__(self, calibration: Calibration, squares: bool, publish: Callable[[], None], workers: Workers) -> None:
        self.steps = [calibration.samples]
        self._calibration, self._squares, self._publish, self._workers = calibration, squares, publish, workers
        self._blocks, self._head = block_inputs.blocks_of(calibration)
        self._layers: dict[str, Layer] = {}
        self._gradients: StepResult | None = None

    def curvature(self) -> dict[str, float]:
        """By linear layer how much the divergence rises with the squared error of its weights."""
        return self._measure_gradients().record.figures["curvature"]

    def search(self, layers: Sequence[Layer], settings: SearchSettings) -> list[Layer]:
        """The layers with the settings that suit the outputs of their blocks, see `bivlm.compression.block_search`."""
        names = {layer.name for layer in layers}
        units = self._up_to(names)
        expect(block_inputs.STAGE, len(units))
        whole: dict[str, StepResult] = {}
        for unit in units:
            whole[unit.name] = self._run(unit, whole)
            advance(block_inputs.STAGE)
            self._publish()
        groups, formed = search.form_groups(self._calibration, units, whole, settings)
        self.steps.append(formed)
        in_turn = self._calibration.settings.inputs == "quantized"
        if not in_turn:  # nobody goes on from a group that has nothing to choose
            groups = [group for group in groups if any(names & set(unit.linears) for unit in group)]
        expect(search.STAGE, len(groups))
        before = {} if in_turn else whole
        chosen: dict[str, dict[str, Any]] = {}
        for group in groups:
            linears = {name for unit in group for name in unit.linears}
            inside = [layer for layer in layers if layer.name in linears]
            done = search.search_blocks(self._calibration, group, inside, before, settings)
            self.steps.append(done)
            self._publish()
            chosen |= done.record.figures["settings"]
            if in_turn:
                before |= dict.fromkeys((unit.name for unit in group), done)
        return [replace(layer, settings=chosen[layer.name]) for layer in layers]

    def pack(self, layers: Sequence[Layer]) -> tuple[list[Layer], dict[str, StepResult]]:
        """Observe the blocks and pack their layers, as the settings say; the layers with their inputs."""
        self._layers = {layer.name: layer for layer in layers}
        observed = {layer.name for layer in layers if "inputs" in layer.needs}
        units = self._up_to(observed)
        expect(block_inputs.STAGE, len(units))
        settings = self._calibration.settings
        if settings.tokens.weights == "gradient" or any("gradients" in layer.needs for layer in layers):
            self._measure_gradients()
        shards = self._in_turn(units) if settings.inputs == "quantized" else self._beforehand(units)
        return list(self._layers.values()), shards

    def _up_to(self, linears: set[str]) -> list[Unit]:
        return block_inputs.up_to([*self._blocks, *([self._head] if self._head else [])], linears)

    def _beforehand(self, units: list[Unit]) -> dict[str, StepResult]:
        """Every block on what the full-precision blocks before it give; then all layers side by side."""
        done: dict[str, StepResult] = {}
        for unit in units:
            done[unit.name] = self._observe(unit, done)
        return self._pack(list(self._layers.values()))

    def _in_turn(self, units: list[Unit]) -> dict[str, StepResult]:
        """Every block on what the packed blocks before it give: observed, packed, and run once more as it is stored."""
        done: dict[str, StepResult] = {}
        shards: dict[str, StepResult] = {}
        for unit in units:
            self._observe(unit, done)
            packed = self._pack([self._layers[name] for name in unit.linears if name in self._layers])
            shards |= packed
            done[unit.name] = self._run(unit, done, packed=packed)
        return shards | self._pack([layer for name, layer in self._layers.items() if name not in shards])

    def _observe(self, unit: Unit, before: dict[str, StepResult]) -> StepResult:
        """The statistics of a unit's sites; its layers get to know them."""
        done = self._run(unit, before, observe=True, gradients=self._gradients)
        self._publish()
        for name in unit.linears:
            needs = self._layers[name].needs if name in self._layers else ()
            if "inputs" in needs:
                gradients = self._gradients if "gradients" in needs else None
                self._layers[name] = replace(self._layers[name], block=done, gradients=gradients)
        return done

    def _measure_gradients(self) -> StepResult:
        """They run back from the answer, so that all blocks have to be there first."""
        if self._gradients is None:
            done: dict[str, StepResult] = {}
            for unit in self._blocks:
                done[unit.name] = self._run(unit, done)
            self._gradients = block_inputs.measure_gradients(self._calibration, done, self._squares)
            self.steps.append(self._gradients)
        return self._gradients

    def _run(self, unit: Unit, before: dict[str, StepResult], **further: Any) -> StepResult:
        done = block_inputs.run_block(self._calibration, unit, before, **further)
        self.steps.append(done)
        return done

    def _pack(self, layers: list[Layer]) -> dict[str, StepResult]:
        if not layers:
            return {}
        workspace = self._calibration.workspace
        return side_by_side(binarization.pack_layers, layers, workspace, self._publish, self._workers)


def side_by_side(
    stage: Task[..., dict[str, StepResult]],
    layers: Sequence[Layer],
    workspace: str,
    publish: Callable[[], None],
    workers: Workers,
) -> dict[str, StepResult]:
    """Run a stage over all layers, chunks side by side.

    A chunk that ran out of memory, or whose worker was killed, is done again in halves, one at a time, down to single
    layers.
    """
    done: dict[str, StepResult] = {}
    too_large: list[Any] = []

    def take(steps: dict[str, StepResult]) -> None:
        done.update(steps)
        if workers.elsewhere:
            check_that_workers_share(open_workspace(workspace), steps.values())
        if not workers.in_process:
            for step in steps.values():
                advance(step.record.stage)
        publish()

    for chunk, result in workers.carry_out(stage, in_chunks(layers, workers.count), workspace):
        if not isinstance(result, BaseException):
            take(result)
        elif is_out_of_memory(result):
            too_large.append(chunk)
        else:
            raise result
    while too_large:
        chunk = too_large.pop(0)
        ((_, result),) = workers.carry_out(stage, [chunk], workspace)
        if not isinstance(result, BaseException):
            take(result)
        elif is_out_of_memory(result) and len(chunk) > 1:
            too_large = [*halves(chunk), *too_large]
        else:
            raise result
    return done
