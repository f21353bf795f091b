"""How much each token's features matter to the model's answer: the weights g of ``H = sum_t g_t^2 x_t x_t^T``.

The divergence KL(full precision || model) and its gradient vanish at full precision; what tells the tokens apart there
is its curvature, ``J^T (diag(p) - p p^T) J`` with p the probabilities and J the Jacobian of the logits. It is the mean
of ``s s^T`` over

    s = J^T v,   v = sqrt(p) * e - p <sqrt(p), e>,   e normal,

one backward pass a draw. (Answers drawn from p, as in Fisher's definition, have the same mean but vary far more where
the model is sure of itself.) One draw for every token of a reply gives ``g_t = ||s_t||``, the norm over all outputs of
a site's linear layers for token t. A weight error E then raises the divergence by about
``sum_t g_t^2 ||E x_t||^2 / 2`` per output channel if errors and gradients are independent, as in K-FAC.

The gradients run back unit by unit, each unit computed again from the stored outputs of those before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from bivlm.blocks.encoded import SampleTensors, model_inputs, outputs_at, reply_range
from bivlm.blocks.model import BlockwiseModel, Step
from bivlm.blocks.sites import Weigh
from bivlm.blocks.units import Unit

Outputs = Mapping[str, SampleTensors]


@dataclass(frozen=True)
class UnitGradients:
    """What the answer's gradients say of a unit.

    Attributes:
        unit: its name.
        norms: for every sample g, float32 (T,), by site.
        squares: by linear layer ``sum_t s_ti^2 x_tj^2``, float32 (M, N), over all samples: the diagonal of the
            divergence's curvature in the layer's weights; empty if not asked for.
    """

    unit: str
    norms: list[dict[str, torch.Tensor]]
    squares: dict[str, torch.Tensor]


def token_gradients(
    model: BlockwiseModel, samples: SampleTensors, outputs: Outputs, *, squares: bool = False, seed: int = 0
) -> Iterator[UnitGradients]:
    """Unit by unit, from the last to the first.

    `outputs` holds what all units gave, up to the last block of the language model. The gradients of one unit's outputs
    are held for all samples, beside those of adaptors that wait for theirs.
    """
    units = [unit for unit in model.units if unit.name in outputs]
    slopes: dict[str, list[torch.Tensor | None]] = {unit.name: [None] * len(samples) for unit in units}
    last = units[-1]
    adaptors = [unit.name for unit in units if unit.component == "adaptor"]
    with model.at_end() as step:
        for number in range(len(samples)):
            given = outputs_at({name: outputs[name] for name in [*adaptors, last.name]}, number)
            slopes[last.name][number] = _answer_slope(step, samples[number], given, last.name, seed + number)
    for unit in reversed(units):
        yield _backward(model, unit, samples, outputs, slopes, squares)
        del slopes[unit.name]


def gradient_weights(gradients: SampleTensors, image_T: list[torch.Tensor], shrink: float) -> list[Weigh]:
    """For every sample g^2 by site, each g drawn to the mean of its modality: ``(1 - shrink) g + shrink mean(g)``.

    A single draw of the answer says little of a single token; the mean of a modality is well known. `image_T` is as in
    `bivlm.blocks.sites.SiteObserver.add`. A site without gradients (nothing of it reaches the answer) is weighted 1.
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
    """The draw ``s`` in the last block's output, from all places that predict the reply together."""
    leaf = given[last].clone().requires_grad_()
    logits = step(model_inputs(sample), {**given, last: leaf})[0]
    predicting = logits[[place - 1 for place in reply_range(sample)]].to(torch.float32)
    return torch.autograd.grad(predicting, leaf, curvature_draw(predicting.detach(), seed))[0].cpu()


def curvature_draw(logits_TV: torch.Tensor, seed: int) -> torch.Tensor:
    """v of the module's docstring for every row of float32 logits, drawn by `seed` on the CPU."""
    p = torch.softmax(logits_TV, dim=-1)
    e = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.device)
    return p.sqrt() * e - p * (p.sqrt() * e).sum(-1, keepdim=True)


def _backward(
    model: BlockwiseModel,
    unit: Unit,
    samples: SampleTensors,
    outputs: Outputs,
    slopes: dict[str, list[torch.Tensor | None]],
    with_squares: bool,
) -> UnitGradients:
    """Norms g and squares of one unit; adds to the slopes of its predecessors."""
    before = [other.name for other in model.predecessors(unit)]
    found: list[dict[str, torch.Tensor]] = []
    totals: dict[str, torch.Tensor] = {}
    with model.at(unit) as step:
        for number in range(len(samples)):
            slope = slopes[unit.name][number]
            if slope is None:  # nothing of it reaches the answer
                found.append({})
                continue
            found_before = outputs_at({name: outputs[name] for name in before}, number)
            leaves = {name: output.clone().requires_grad_() for name, output in found_before.items()}
            with _recording(model, unit) as made, torch.enable_grad():
                result = step(model_inputs(samples[number]), leaves)
            targets = [*leaves.values(), *(each.output for each in made)]
            gradients = torch.autograd.grad(result, targets, slope.to(result.device), allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=False):
                if gradient is not None:
                    earlier = slopes[name][number]
                    slopes[name][number] = gradient.cpu() if earlier is None else earlier + gradient.cpu()
            sums: dict[str, torch.Tensor] = {}
            for each, gradient in zip(made, gradients[len(leaves) :], strict=True):
                if gradient is None:
                    continue
                square_TM = gradient.reshape(-1, gradient.shape[-1]).to(torch.float32).square()
                sums[each.site] = sums.get(each.site, 0) + square_TM.sum(-1).cpu()
                if with_squares:
                    x_TN = each.x.detach().reshape(-1, each.x.shape[-1]).to(torch.float32)
                    total = totals.setdefault(each.name, x_TN.new_zeros(square_TM.shape[1], x_TN.shape[1]))
                    total.addmm_(square_TM.T, x_TN.square())
            found.append({site: total.sqrt() for site, total in sums.items()})
    return UnitGradients(unit.name, found, {name: total.cpu() for name, total in totals.items()})


@dataclass(frozen=True)
class _Made:
    """What a linear layer took in and gave."""

    name: str
    site: str
    x: torch.Tensor
    output: torch.Tensor


@contextmanager
def _recording(model: BlockwiseModel, unit: Unit) -> Iterator[list[_Made]]:
    """What the unit's linear layers take in and give while a sample runs through it."""
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
