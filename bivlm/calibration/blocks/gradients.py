"""Measure how much each token matters to the model's answer: the weights g of ``H = sum_t g_t^2 x_t x_t^T``.

The divergence KL(full precision || model) and its gradient vanish at full precision; what distinguishes tokens there
is its curvature, ``J^T (diag(p) - p p^T) J`` with p the probabilities and J the Jacobian of the logits. It is the mean
of ``s s^T`` over

    s = J^T v,   v = sqrt(p) * e - p <sqrt(p), e>,   e normal,

one backward pass per draw. (Answers drawn from p, as in Fisher's definition, have the same mean but vary far more where
the model is sure of itself.) One draw for every token of a reply gives ``g_t = ||s_t||``, the norm over all outputs of
a site's linear layers for token t. A weight error E then raises the divergence by about
``sum_t g_t^2 ||E x_t||^2 / 2`` per output channel if errors and gradients are independent, as in K-FAC.

The gradients run back unit by unit, each unit computed again from the stored outputs of those before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from bivlm.calibration.blocks.encoded import SampleTensors, has_image, model_inputs, outputs_at, reply_range
from bivlm.calibration.blocks.model import BlockwiseModel, Step
from bivlm.calibration.blocks.sites import Weigh
from bivlm.calibration.blocks.units import Unit

Outputs = Mapping[str, SampleTensors]


@dataclass(frozen=True)
class UnitGradients:
    """The answer's gradients in a unit.

    Attributes:
        unit: its name.
        norms: for every sample g, float32 (T,), by site.
        squares: by linear layer ``sum_t s_ti^2 x_tj^2``, float32 (M, N), over all samples: the diagonal of the
            divergence's curvature in the layer's weights; empty if not requested.
        moments: by linear layer ``sum_t s_t s_t^T``, float32 (M, M), over all samples; empty if not requested.
        traces: by linear layer ``sum_t ||s_t||^2``, that moment's trace.
    """

    unit: str
    norms: list[dict[str, torch.Tensor]]
    squares: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    traces: dict[str, float]


def token_gradients(
    model: BlockwiseModel,
    samples: SampleTensors,
    outputs: Outputs,
    *,
    squares: bool = False,
    moments: bool = False,
    balanced: bool = False,
    seed: int = 0,
) -> Iterator[UnitGradients]:
    """Yield gradients unit by unit, from the last to the first.

    With `balanced` samples with and without an image count by their number: where the model is less sure of texts, a
    text's gradients may be hundreds of times an image's, and the vision model would count for nothing.

    `outputs` holds the outputs of all units up to the last block of the language model. In memory are, for every
    sample, the gradient of one unit's output and those of adaptors that wait for their turn. Raises ArithmeticError
    naming the model where a gradient is NaN or infinite.
    """
    units = [unit for unit in model.units if unit.name in outputs]
    slopes: dict[str, list[torch.Tensor | None]] = {unit.name: [None] * len(samples) for unit in units}
    last = units[-1]
    adaptors = [unit.name for unit in units if unit.component == "adaptor"]
    with_image = []
    with model.at_end() as step:
        for number in range(len(samples)):
            sample = samples[number]
            with_image.append(has_image(sample))
            given = outputs_at({name: outputs[name] for name in [*adaptors, last.name]}, number)
            slopes[last.name][number] = _answer_slope(step, sample, given, last.name, seed + number)
    if balanced:
        _balance([slope for slope in slopes[last.name] if slope is not None], with_image)
    for unit in reversed(units):
        found = _backward(model, unit, samples, outputs, slopes, _Wanted(squares, moments))
        _check_finite(model, found)
        yield found


def gradient_weights(gradients: SampleTensors, image_T: list[torch.Tensor], shrink: float) -> list[Weigh]:
    """Return g^2 by site for every sample, with g shrunk to its modality's mean: ``(1 - shrink) g + shrink mean(g)``.

    One draw of the answer says little about one token; the mean of a modality is well known. `image_T` is as in
    `bivlm.calibration.blocks.sites.SiteObserver.add`. A site without gradients (it does not reach the answer) has
    weight 1.
    """
    totals: dict[tuple[str, bool], list[float]] = {}
    for number in range(len(gradients)):
        for site, g_T in gradients[number].items():
            image = _mask(image_T[number], len(g_T))
            for modality in (True, False):
                part = g_T[image == modality]
                total = totals.setdefault((site, modality), [0.0, 0.0])
                total[0] += float(part.sum(dtype=torch.float64))
                total[1] += len(part)
    means = {key: total / count if count else 0.0 for key, (total, count) in totals.items()}

    def of(number: int) -> Weigh:
        sample = gradients[number]

        def weigh(site: str, image: torch.Tensor) -> torch.Tensor:
            if means.get((site, True), 0.0) == means.get((site, False), 0.0) == 0.0:
                return torch.ones(len(image))
            g_T = sample.get(site, torch.zeros(len(image)))
            mean_T = torch.where(image.cpu(), means[site, True], means[site, False])
            return ((1 - shrink) * g_T + shrink * mean_T).square().to(torch.float32)

        return weigh

    return [of(number) for number in range(len(gradients))]


def _answer_slope(
    step: Step, sample: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], last: str, seed: int
) -> torch.Tensor:
    """Return the draw ``s`` in the last block's output, from all positions that predict the reply together.

    It is the draw of the mean divergence over the reply's tokens: a caption counts as much as a one-word answer.
    """
    leaf = given[last].detach().requires_grad_()
    # Logits of a whole prompt would be larger than a block's weights.
    places = {"logits_to_keep": torch.tensor([place - 1 for place in reply_range(sample)])}
    predicting = step({**model_inputs(sample), **places}, {**given, last: leaf})[0].to(torch.float32)
    draw = curvature_draw(predicting.detach(), seed) / math.sqrt(len(predicting))
    return torch.autograd.grad(predicting, leaf, draw)[0].cpu()


def _balance(slopes: list[torch.Tensor], with_image: list[bool]) -> None:
    """Scale samples with and without an image in place, so that the squares of either kind have the mean of all."""
    squares = [float(slope.to(torch.float64).square().sum()) for slope in slopes]
    mean = fmean(squares)
    for kind in set(with_image):
        own = [number for number, image in enumerate(with_image) if image == kind]
        if before := fmean(squares[number] for number in own):
            for number in own:
                slopes[number].mul_(math.sqrt(mean / before))


def curvature_draw(logits_TV: torch.Tensor, seed: int) -> torch.Tensor:
    """Return v of the module's docstring for every row of float32 logits, drawn by `seed` on the CPU."""
    p = torch.softmax(logits_TV, dim=-1)
    e = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.device)
    return p.sqrt() * e - p * (p.sqrt() * e).sum(-1, keepdim=True)


def _backward(
    model: BlockwiseModel,
    unit: Unit,
    samples: SampleTensors,
    outputs: Outputs,
    slopes: dict[str, list[torch.Tensor | None]],
    wanted: _Wanted,
) -> UnitGradients:
    """Return one unit's gradients; turn its slopes into those of its predecessors, sample by sample."""
    before = [other.name for other in model.predecessors(unit)]
    found: list[dict[str, torch.Tensor]] = []
    reached: set[str] = set()
    with model.at(unit) as step:
        sums = _Sums.of({name: model.linear(name).weight for name in unit.linears}, wanted)
        for number in range(len(samples)):
            slope, slopes[unit.name][number] = slopes[unit.name][number], None
            if slope is None:  # nothing of it reaches the answer
                found.append({})
                continue
            given = outputs_at({name: outputs[name] for name in before}, number)
            earlier, made = _differentiate(model, unit, step, model_inputs(samples[number]), given, slope)
            for name, gradient in earlier.items():
                known = slopes[name][number]
                slopes[name][number] = gradient if known is None else known + gradient
            reached |= {each.name for each in made}
            found.append(sums.add(made))
    squares, moments = (
        {name: total.cpu() for name, total in totals.items() if name in reached}
        for totals in (sums.squares, sums.moments)
    )
    return UnitGradients(unit.name, found, squares, moments, sums.traces)


def _check_finite(model: BlockwiseModel, found: UnitGradients) -> None:
    for number, norms in enumerate(found.norms):
        for site, g_T in norms.items():
            if not bool(g_T.isfinite().all()):
                raise ArithmeticError(f"{model.name}: the gradients at {site} are not finite on sample {number}")
    for name, total in [*found.squares.items(), *found.moments.items()]:
        if not all(bool(extreme.isfinite()) for extreme in total.aminmax()):
            raise ArithmeticError(f"{model.name}: the squared gradients of {name} add up to NaN or infinity")


@dataclass(frozen=True)
class _Wanted:
    squares: bool
    moments: bool


@dataclass(frozen=True)
class _Sums:
    """What is added up over the samples of a unit, by linear layer, see `UnitGradients`."""

    squares: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    traces: dict[str, float]

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], wanted: _Wanted) -> _Sums:
        return cls(
            _zeros({name: weight.shape for name, weight in weights.items() if wanted.squares}, weights),
            _zeros({name: (weight.shape[0],) * 2 for name, weight in weights.items() if wanted.moments}, weights),
            {},
        )

    def add(self, made: list[_Made]) -> dict[str, torch.Tensor]:
        """Add the gradients in `made`, which is emptied, and return their norms g by site."""
        sums: dict[str, torch.Tensor] = {}
        while made:
            each = made.pop(0)
            slope_TM = each.output.reshape(-1, each.output.shape[-1]).to(torch.float32, copy=True)
            if each.name in self.moments:
                self.moments[each.name].addmm_(slope_TM.T, slope_TM)
            square_TM = slope_TM.square_()
            norm_T = square_TM.sum(-1).cpu()
            sums[each.site] = sums.get(each.site, 0) + norm_T
            self.traces[each.name] = self.traces.get(each.name, 0.0) + float(norm_T.sum(dtype=torch.float64))
            if each.name in self.squares:
                x_TN = each.x.detach().reshape(-1, each.x.shape[-1]).to(torch.float32, copy=True).square_()
                self.squares[each.name].addmm_(square_TM.T, x_TN)
        return {site: total.sqrt() for site, total in sums.items()}


def _zeros(shapes: Mapping[str, Sequence[int]], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return float32 zeros of these shapes where the weights are, views of one tensor: separate ones would fragment
    memory."""
    device = next((weight.device for weight in weights.values()), None)
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = torch.zeros(sum(sizes), device=device).split(sizes)
    return {name: part.view(*shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _differentiate(
    model: BlockwiseModel,
    unit: Unit,
    step: Step,
    inputs: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor],
    slope: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], list[_Made]]:
    """Return a sample's gradients at what the unit was given, by name, and at its linear layers' outputs.

    This is a function of its own so that a sample's graph is freed before the next sample's is built.
    """
    leaves = {name: output.detach().requires_grad_() for name, output in given.items()}
    with _recording(model, unit) as made, torch.enable_grad():
        result = step(inputs, leaves)
    targets = [*leaves.values(), *(each.output for each in made)]
    gradients = torch.autograd.grad(result, targets, slope.to(result.device), allow_unused=True)
    earlier = {name: found.cpu() for name, found in zip(leaves, gradients, strict=False) if found is not None}
    pairs = zip(made, gradients[len(leaves) :], strict=True)
    return earlier, [replace(each, output=gradient) for each, gradient in pairs if gradient is not None]


@dataclass(frozen=True)
class _Made:
    """The input and output of a linear layer, or its input and the output's gradient."""

    name: str
    site: str
    x: torch.Tensor
    output: torch.Tensor


@contextmanager
def _recording(model: BlockwiseModel, unit: Unit) -> Iterator[list[_Made]]:
    """Yield a list that collects the inputs and outputs of the unit's linear layers while a sample runs through it."""
    made: list[_Made] = []

    def record(name: str, x: torch.Tensor, output: torch.Tensor) -> None:
        site = next((each.site for each in made if each.x is x), name)
        if not output.requires_grad:  # in the first unit nothing before it has a gradient
            output.requires_grad_()
        made.append(_Made(name, site, x, output))

    with ExitStack() as hooks:
        for name in unit.linears:
            hook = model.linear(name).register_forward_hook(
                lambda _, arguments, output, name=name: record(name, arguments[0], output)
            )
            hooks.callback(hook.remove)
        yield made


def _mask(image_T: torch.Tensor, tokens: int) -> torch.Tensor:
    return image_T if len(image_T) == tokens else torch.ones(tokens, dtype=torch.bool)
