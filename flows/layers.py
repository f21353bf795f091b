"""All layers of a model, from their weights to packed shards, with calibration block by block where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prefect import Task

from bivlm.calibration.blocks.units import Unit
from bivlm.recipe.finish import FinishSettings
from bivlm.recipe.loading import Recipe
from bivlm.recipe.search import SearchSettings
from flows.runners import Workers
from tasks import binarization, block_inputs, block_search, budget, finishing, grouping, saliency
from tasks.block_inputs import Calibration
from tasks.checkpoint import Base
from tasks.layers import Layer, in_chunks, with_steps
from tasks.runtime.device import Device
from tasks.runtime.policy import halves, is_out_of_memory
from tasks.runtime.progress import advance, expect
from tasks.runtime.steps import StepResult, check_that_workers_share, open_workspace


@dataclass(frozen=True)
class PackedLayers:
    """The layers with the steps that were done of them, and the shard of each by name.

    `between` are steps that others refer to: calibration, and the shards before finishing. `tuned` is the step of
    finishing, if there was one.
    """

    layers: list[Layer]
    shards: dict[str, StepResult]
    between: list[StepResult]
    tuned: StepResult | None = None


def pack_all(
    layers: Sequence[Layer],
    workspace: str,
    publish: Callable[[], None],
    workers: Workers,
    calibration: Calibration | None = None,
    recipe: Recipe | None = None,
) -> PackedLayers:
    """Run every stage of every layer. `calibration` is needed if `needs_calibration`."""
    run = partial(side_by_side, workspace=workspace, publish=publish, workers=workers)
    bits, search = (recipe.budget, recipe.search) if recipe else (None, None)
    measured = run(saliency.measure_layers, block_search.with_widest_tail(layers, search) if search else layers)
    layers, between = with_steps(layers, statistics=measured), []
    try:
        walk = Walk(calibration, _gradient_sums(layers, recipe), run, publish) if calibration is not None else None
        if bits is not None:
            choices = run(budget.measure_choices, layers)
            curvature = walk.curvature(layers) if _by_curvature(recipe) else None
            layers, allocated = budget.allocate_bits(layers, choices, bits, curvature, workspace)
            between = [*choices.values(), allocated]
        if search is not None:
            layers = walk.search(layers, search)
        layers = with_steps(layers, plan=run(grouping.plan_layers, layers))
        if walk is None or not _needs_inputs(layers):
            shards = run(binarization.pack_layers, layers)
        else:
            layers, shards = walk.pack(layers)
        return PackedLayers(layers, shards, between + (walk.steps if walk else []))
    finally:
        block_inputs.forget_blocks()


def needs_calibration(layers: Sequence[Layer], recipe: Recipe) -> bool:
    """Return whether any decision about these layers depends on what the model does."""
    return _by_curvature(recipe) or recipe.search is not None or _needs_inputs(layers)


def _by_curvature(recipe: Recipe | None) -> bool:
    return recipe is not None and recipe.budget is not None and recipe.budget.importance == "curvature"


def _gradient_sums(layers: Sequence[Layer], recipe: Recipe | None) -> dict[str, bool]:
    """Return which sums of gradients the layers' methods and the budget read."""
    by_squares = _by_curvature(recipe) and not all(layer.feeds_back for layer in layers)
    return {
        "squares": by_squares or any("gradients" in layer.needs for layer in layers),
        "moments": any("moments" in layer.needs for layer in layers),
        "traces": _by_curvature(recipe) and any(layer.feeds_back for layer in layers),
    }


def _needs_inputs(layers: Sequence[Layer]) -> bool:
    return any("inputs" in layer.needs for layer in layers)


def finish_all(
    packed: PackedLayers,
    base: Base,
    samples: StepResult,
    settings: FinishSettings,
    device: Device,
    workspace: str,
    leftovers: Mapping[str, str],
) -> PackedLayers:
    """Return the same layers with shards that were tuned together, and with `leftovers` if the settings say so."""
    arguments = (base, packed.layers, packed.shards, samples, settings, device, workspace, leftovers)
    shards, tuning = finishing.finish_layers(*arguments)
    return PackedLayers(packed.layers, shards, [*packed.between, *packed.shards.values(), *tuning], tuning[-1])


class Walk:
    """The calibration samples on their way through the blocks.

    `steps` are all that were done on the way; `sums` says what of the gradients is added up, see `measure_gradients`.
    `run` is `side_by_side` for the workers at hand.
    """

    def __init__(
        self,
        calibration: Calibration,
        sums: dict[str, bool],
        run: Callable[[Task[..., dict[str, StepResult]], Sequence[Layer]], dict[str, StepResult]],
        publish: Callable[[], None],
    ) -> None:
        self.steps = [calibration.samples]
        self._calibration, self._sums, self._run_stage, self._publish = calibration, sums, run, publish
        self._blocks, self._head = block_inputs.blocks_of(calibration)
        self._layers: dict[str, Layer] = {}
        self._gradients: StepResult | None = None
        self._observed = 0

    def curvature(self, layers: Sequence[Layer]) -> dict[str, float]:
        """Return by linear layer how much the divergence rises with the squared error of its weights."""
        gradients = self._measure_gradients()
        sums: dict[str, float] = gradients.record.figures["curvature"]
        fed = [layer for layer in layers if layer.feeds_back]
        if not fed:
            return sums
        whole: dict[str, StepResult] = {}
        units = self._up_to({layer.name for layer in fed})
        self._expect_observed(units)
        for unit in units:
            whole[unit.name] = self._run(unit, whole, observe=True, gradients=gradients)
            self._publish()
        block = {name: done for done in whole.values() for name in done.record.figures["site_of"]}
        seen = [replace(layer, block=block[layer.name], gradients=gradients) for layer in fed]
        measured = self._run_stage(budget.measure_sensitivities, seen)
        self.steps += measured.values()
        return sums | {name: done.record.figures["sensitivity"] for name, done in measured.items()}

    def search(self, layers: Sequence[Layer], settings: SearchSettings) -> list[Layer]:
        """Return the layers with the settings that suit their blocks' outputs, see `bivlm.compression.block_search`."""
        names = {layer.name for layer in layers}
        units = self._up_to(names)
        expect(block_inputs.STAGE, len(units))
        whole: dict[str, StepResult] = {}
        for unit in units:
            whole[unit.name] = self._run(unit, whole)
            advance(block_inputs.STAGE)
            self._publish()
        groups, formed = block_search.form_groups(self._calibration, units, whole, settings)
        self.steps.append(formed)
        in_turn = self._calibration.settings.inputs == "quantized"
        if not in_turn:  # nothing continues from a group that has nothing to choose
            groups = [group for group in groups if any(names & set(unit.linears) for unit in group)]
        expect(block_search.STAGE, len(groups))
        before = {} if in_turn else whole
        chosen: dict[str, dict[str, Any]] = {}
        for group in groups:
            linears = {name for unit in group for name in unit.linears}
            inside = [layer for layer in layers if layer.name in linears]
            done = block_search.search_blocks(self._calibration, group, inside, before, settings)
            self.steps.append(done)
            self._publish()
            chosen |= done.record.figures["settings"]
            if in_turn:
                before |= dict.fromkeys((unit.name for unit in group), done)
        return [replace(layer, settings=chosen[layer.name]) for layer in layers]

    def pack(self, layers: Sequence[Layer]) -> tuple[list[Layer], dict[str, StepResult]]:
        """Observe the blocks and pack their layers; returns the layers with their inputs, and their shards."""
        self._layers = {layer.name: layer for layer in layers}
        observed = {layer.name for layer in layers if "inputs" in layer.needs}
        units = self._up_to(observed)
        self._expect_observed(units)
        settings = self._calibration.settings
        if settings.tokens.weights == "gradient" or any(layer.needs & {"gradients", "moments"} for layer in layers):
            self._measure_gradients()
        shards = self._in_turn(units) if settings.inputs == "quantized" else self._beforehand(units)
        return list(self._layers.values()), shards

    def _expect_observed(self, units: list[Unit]) -> None:
        """Say to the progress bar that these units will be observed, beside those that were."""
        self._observed += len(units)
        expect(block_inputs.STAGE, self._observed)

    def _up_to(self, linears: set[str]) -> list[Unit]:
        return block_inputs.up_to([*self._blocks, *([self._head] if self._head else [])], linears)

    def _beforehand(self, units: list[Unit]) -> dict[str, StepResult]:
        """Run every block on the outputs of the full-precision blocks before it; then pack all layers side by side."""
        done: dict[str, StepResult] = {}
        for unit in units:
            done[unit.name] = self._observe(unit, done)
        return self._pack(list(self._layers.values()))

    def _in_turn(self, units: list[Unit]) -> dict[str, StepResult]:
        """Observe every block on the outputs of the packed blocks before it, pack it, and run it as it is stored."""
        done: dict[str, StepResult] = {}
        shards: dict[str, StepResult] = {}
        for unit in units:
            self._observe(unit, done)
            packed = self._pack([self._layers[name] for name in unit.linears if name in self._layers])
            shards |= packed
            done[unit.name] = self._run(unit, done, packed=packed)
        return shards | self._pack([layer for name, layer in self._layers.items() if name not in shards])

    def _observe(self, unit: Unit, before: dict[str, StepResult]) -> StepResult:
        """Measure the statistics of a unit's sites, and note them in its layers."""
        done = self._run(unit, before, observe=True, gradients=self._gradients)
        self._publish()
        for name in unit.linears:
            needs = self._layers[name].needs if name in self._layers else ()
            if "inputs" in needs:
                gradients = self._gradients if needs & {"gradients", "moments"} else None
                self._layers[name] = replace(self._layers[name], block=done, gradients=gradients)
        return done

    def _measure_gradients(self) -> StepResult:
        """Measure gradients, once; they run back from the answer, so all blocks have to be done first."""
        if self._gradients is None:
            done: dict[str, StepResult] = {}
            for unit in self._blocks:
                done[unit.name] = self._run(unit, done)
            self._gradients = block_inputs.measure_gradients(self._calibration, done, **self._sums)
            self.steps.append(self._gradients)
        return self._gradients

    def _run(self, unit: Unit, before: dict[str, StepResult], **further: Any) -> StepResult:
        done = block_inputs.run_block(self._calibration, unit, before, **further)
        self.steps.append(done)
        return done

    def _pack(self, layers: list[Layer]) -> dict[str, StepResult]:
        return self._run_stage(binarization.pack_layers, layers) if layers else {}


def side_by_side(
    stage: Task[..., dict[str, StepResult]],
    layers: Sequence[Layer],
    workspace: str,
    publish: Callable[[], None],
    workers: Workers,
) -> dict[str, StepResult]:
    """Run a stage over all layers, chunks side by side; returns steps by layer name.

    A chunk that ran out of memory, or whose worker was killed, is run again in halves, one at a time, down to single
    layers.
    """
    done: dict[str, StepResult] = {}
    waiting = in_chunks(layers, workers.count)
    first = True
    while waiting:
        # All at once, and then what did not fit, one chunk at a time.
        now, waiting = (waiting, []) if first else (waiting[:1], waiting[1:])
        too_large = []
        for chunk, result in workers.carry_out(stage, now, workspace):
            if isinstance(result, BaseException):
                if not is_out_of_memory(result) or (len(chunk) == 1 and not first):
                    raise result
                too_large += [chunk] if first else halves(chunk)
                continue
            done.update(result)
            if workers.elsewhere:
                check_that_workers_share(open_workspace(workspace), result.values())
            if not workers.in_process:
                for step in result.values():
                    advance(step.record.stage)
            publish()
        waiting, first = [*too_large, *waiting], False
    return done
