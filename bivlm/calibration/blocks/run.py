"""One unit over all calibration samples: its outputs, and the input statistics of its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bivlm.calibration.blocks.encoded import Samples, has_image, is_image, model_inputs, outputs_at
from bivlm.calibration.blocks.model import BlockwiseModel
from bivlm.calibration.blocks.sites import SiteObserver, Weigh
from bivlm.calibration.blocks.units import Unit
from bivlm.numerics.input_statistics import SiteStatistics


@dataclass(frozen=True)
class UnitRun:
    """The result of running a unit on all samples.

    Attributes:
        outputs: the unit's output for every sample, on the CPU, in the model's dtype; None for vision and adaptor
            where a sample has no image.
        sites: input statistics by site; empty if they were not requested.
        site_of: the site of every linear layer that can be packed.
    """

    outputs: list[torch.Tensor | None]
    sites: dict[str, SiteStatistics]
    site_of: dict[str, str]


def image_tokens(model: BlockwiseModel, unit: Unit, sample: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return which tokens that a language unit sees stand for image patches, bool (T,); empty for other units."""
    if unit.component != "language":
        return torch.empty(0, dtype=torch.bool)
    return is_image(sample["input_ids"], model.config)


@torch.inference_mode()
def run_unit(
    model: BlockwiseModel,
    unit: Unit,
    samples: Samples,
    given: Mapping[str, Samples],
    *,
    weigh: Callable[[int], Weigh] | None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> UnitRun:
    """Run `unit` on every sample, given the outputs of its predecessors by unit name.

    ``weigh(sample)`` gives the token weights of a sample's sites; without it no statistics are made. `weights` replace
    those of linear layers by name. One sample's activations are held at a time, beside the outputs.
    Raises ArithmeticError if the unit gives NaN or infinity, or has inputs whose statistics do.
    """
    outputs: list[torch.Tensor | None] = []
    observer = SiteObserver({name: model.linear(name) for name in unit.linears})
    with model.at(unit, weights) as step:
        for number in range(len(samples)):
            sample = samples[number]
            if unit.component != "language" and not has_image(sample):
                outputs.append(None)
                continue
            before = outputs_at(given, number)
            if weigh is None:
                output = step(model_inputs(sample), before)
            else:
                with observer.watching():
                    output = step(model_inputs(sample), before)
                observer.add(image_tokens(model, unit, sample), weigh(number))
            # The extremes of a tensor with NaN are NaN; a mask of the logits of a long prompt would be large.
            if not all(bool(extreme.isfinite()) for extreme in output.aminmax()):
                raise ArithmeticError(f"{model.name}: {unit.name} gives NaN or infinity on calibration sample {number}")
            outputs.append(output.cpu())
        sites = observer.statistics() if weigh is not None else {}
        for site, found in sites.items():
            if not found.is_finite():
                raise ArithmeticError(f"{model.name}: the squared inputs of {site} add up to NaN or infinity")
        return UnitRun(outputs, sites, observer.site_of() if sites else {})
