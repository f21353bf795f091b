"""Is another metric of saliency than the magnitude worth its price? On the reference model, by its own samples.

``python -m benchmarks.saliency [--output docs/salient_overlap.svg]``. The paper says that a Hessian metric is
"expensive with limited benefit" (3.2.1). Here are: how far the metrics of `bivlm.numerics.saliency` choose the same
weights, and how much these lie together; what each costs, to calibrate and to score; and what Bi-VLM with two groups
loses when its salient weights are chosen by each, without error feedback and with it: in the weights, in the outputs
over the calibration samples, and in the divergence by the diagonal of its curvature, ``sum_ij G_ij E_ij^2`` with G the
squared gradients and E the weight error (of ``sum_ij G_ij W_ij^2``). Each is the objective of one of the metrics.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.saliency_overlap import compare
from bivlm.calibration.blocks.encoded import SampleTensors, stack, with_reply, write_samples
from bivlm.calibration.blocks.gradients import token_gradients
from bivlm.calibration.blocks.model import BlockwiseModel
from bivlm.calibration.blocks.run import run_unit
from bivlm.calibration.blocks.sites import uniform
from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.compression.layer import pack_layer
from bivlm.evaluation.generation import load_processor
from bivlm.methods import method
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.saliency import METRICS, most_salient, scores
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack
from bivlm.reference import CHECKPOINT
from bivlm.reference.question_sets import calibration_samples
from bivlm.reports.figures.saliency import salient_overlap
from bivlm.reports.figures.style import svg
from bivlm.sources.replies import read_reply

SHARES = {"vision": 0.05, "adaptor": 0.05, "language": 0.01}  # salient weights at most, as in the paper
GROUPS = 2
SEED = 0


@dataclass(frozen=True)
class Layer:
    """A linear layer: its weight (M, N), and its inputs with the squared gradients of its weights."""

    name: str
    component: str
    weight_MN: torch.Tensor
    inputs: SiteStatistics


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and write the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saliency", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/salient_overlap.svg"))
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args(arguments)
    seconds: dict[str, float] = {}
    layers = _calibrated(options.samples, seconds)
    records = [_overlap(layer, seconds) for layer in layers]
    options.output.write_text(svg(salient_overlap(records)), encoding="utf-8")
    _print_costs(seconds, options.samples, len(layers))
    _print_overlap(records)
    _print_errors(layers)
    return 0


def _calibrated(samples: int, seconds: dict[str, float]) -> list[Layer]:
    """Every layer but the head with its inputs, from `samples` of the reference model's conversations."""
    checkpoint = Checkpoint.open(CHECKPOINT)
    model, processor = BlockwiseModel(checkpoint), load_processor(CHECKPOINT)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        replies = (read_reply(model, processor, each) for each in calibration_samples(samples, SEED))
        write_samples((with_reply(reply) for reply in replies), place / "samples")
        encoded, outputs = SampleTensors(place / "samples"), {}
        inputs: dict[str, SiteStatistics] = {}
        with _timed(seconds, "inputs"):
            for unit in (each for each in model.units if each.name != model.head_name):
                given = {other.name: outputs[other.name] for other in model.predecessors(unit)}
                run = run_unit(model, unit, encoded, given, weigh=lambda _: uniform)
                write_samples(stack(run.outputs), place / unit.name)
                outputs[unit.name] = SampleTensors(place / unit.name)
                inputs |= {name: run.sites[site] for name, site in run.site_of.items()}
        with _timed(seconds, "gradients"):
            for unit in token_gradients(model, encoded, outputs, squares=True, seed=SEED):
                for name, square_MN in unit.squares.items():
                    inputs[name] = replace(inputs[name], gradient_square_MN=square_MN)
    found = {linear.name: linear for linear in linears(checkpoint)}
    return [
        Layer(name, found[name].component, checkpoint.read(found[name].disk_name), seen)
        for name, seen in inputs.items()
    ]


def _overlap(layer: Layer, seconds: dict[str, float]) -> dict[str, Any]:
    """The layer's record for `salient_overlap`; all metrics choose as many weights."""
    count = round(SHARES[layer.component] * layer.weight_MN.numel())
    masks = {}
    for metric in METRICS:
        with _timed(seconds, metric):
            positions_S = most_salient(scores(metric, layer.weight_MN, layer.inputs), count)
        mask_MN = torch.zeros(layer.weight_MN.shape, dtype=torch.bool)
        mask_MN.view(-1)[torch.from_numpy(positions_S)] = True
        masks[metric] = mask_MN.numpy()
    return {"name": layer.name, "component": layer.component, **compare(masks)}


def _print_costs(seconds: dict[str, float], samples: int, layers: int) -> None:
    print(
        f"{samples} samples, {layers} layers, {torch.get_num_threads()} threads. Calibration: inputs "
        f"{seconds['inputs']:.1f} s, gradients {seconds['gradients']:.1f} s more"
    )
    print("scores and choice: " + ", ".join(f"{metric} {seconds[metric]:.2f} s" for metric in METRICS))


def _print_overlap(records: list[dict[str, Any]]) -> None:
    print(
        "\nmean over layers, all metrics choosing as many: overlap of two; share in the 1 % of columns, rows with most"
    )
    for component, share in SHARES.items():
        members = [record for record in records if record["component"] == component]
        print(f"{component}, {len(members)} layers, {share:.0%} of weights (by chance {share / (2 - share):.3f})")
        for pair in members[0]["overlap"]:
            print(f"  {pair.replace('|', ' and '):<26} {fmean(member['overlap'][pair] for member in members):.3f}")
        for metric in METRICS:
            columns, rows = (fmean(member[lines][metric] for member in members) for lines in ("columns", "rows"))
            print(f"  {metric:<26} {columns:.1%} in columns, {rows:.1%} in rows")


def _print_errors(layers: list[Layer]) -> None:
    """Errors of the layers as they are stored, mean over a component's layers."""
    print(f"\nBi-VLM, {GROUPS} groups: error of weights / of outputs / of the divergence, mean over layers")
    for component, p_max in SHARES.items():
        members = [layer for layer in layers if layer.component == component]
        for feedback in (False, True):
            print(f"{component}, p_max {p_max:.0%}, {'with' if feedback else 'without'} feedback")
            for metric in METRICS:
                settings = {"groups": GROUPS, "p_max": p_max, "saliency": metric, "feedback": feedback}
                errors = zip(*(_errors(layer, settings) for layer in members), strict=True)
                print(f"  {metric:<12} " + " / ".join(f"{fmean(values):.4f}" for values in errors))


def _errors(layer: Layer, settings: dict[str, Any]) -> tuple[float, float, float]:
    chosen = method("bivlm").Settings.model_validate({"method": "bivlm", **settings})
    plan = method("bivlm").plan(LayerStatistics.measure(layer.weight_MN, chosen.p_max), chosen)
    packed, record = pack_layer(layer.weight_MN, plan, layer.name, layer.inputs)
    weight_MN, square_MN = layer.weight_MN.double(), layer.inputs.gradient_square_MN.double()
    lost = square_MN * (unpack(packed).double() - weight_MN).square()
    return record.error, record.output_error, float(lost.sum() / (square_MN * weight_MN.square()).sum())


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to those called `name`."""
    begin = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
