"""Bi-VLM that looks at inputs, by other metrics and with error feedback, against a second, literal writing of it."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bivlm.compression.layer import pack_layer
from bivlm.methods import method
from bivlm.methods.base import GRADIENTS, INPUTS, WEIGHTS
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.saliency import METRICS
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack
from tests import literal

METHOD = method("bivlm")
SHAPE = (12, 20)
ALPHA, ITERATIONS, SALIENT_BITS, DAMPING = 1.4, 10, 2, 0.01
STORED = 2**-10  # what two 16-bit factors, a scale and a centre, may be off by


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(x, gradient=None):
    return SiteStatistics(x.T @ x / max(len(x), 1), x.mean(0), x.abs().mean(0), {"text": len(x)}, gradient)


def calibrated(seed, rows, columns, tokens=100):
    """Channels of unequal size that depend on each other, and squared gradients."""
    x = gaussian(seed, tokens, columns) @ gaussian(seed + 1, columns, columns) / math.sqrt(columns)
    x = x * torch.exp(0.5 * gaussian(seed + 2, columns))
    return site(x, (gaussian(seed + 3, tokens, rows) ** 2).T @ x**2)


def plan_for(weight, **changes):
    settings = METHOD.Settings.model_validate({"method": "bivlm", "groups": 2, "p_max": 0.1} | changes)
    return METHOD.plan(LayerStatistics.measure(weight, settings.p_max), settings)


# The literal method: lists of float64, one weight at a time.


def literal_scores(metric, weight, inputs):
    """Score of every weight; the Hessian's with an inverse of what is left at every column."""
    rows, columns = weight.shape
    scores = np.abs(weight)
    left = damped(inputs)
    for column in range(columns):
        for row in range(rows):
            if metric == "activation":
                scores[row, column] *= float(inputs.magnitude_N[column])
            if metric == "hessian":
                scores[row, column] = weight[row, column] ** 2 / np.linalg.inv(left[column:, column:])[0, 0]
            if metric == "gradient":
                scores[row, column] = weight[row, column] ** 2 * float(inputs.gradient_square_MN[row, column])
    return scores


def damped(inputs):
    moment = inputs.second_moment_NN.double().numpy()
    return moment + DAMPING * moment.diagonal().mean() * np.eye(len(moment))


def algorithm_1(weight, salient, refit):
    """Code of every salient weight, the centres that codes are of, and a scale by row."""
    rows = {row: [at for at in salient if at[0] == row] for row, _ in salient}
    codes = {at: math.copysign(1, weight[at]) for at in salient}

    def least_squares(row):
        squares = sum(codes[at] ** 2 for at in rows[row])
        return sum(weight[at] * codes[at] for at in rows[row]) / squares if squares else 0.0

    for _ in range(ITERATIONS):
        scales = {row: least_squares(row) for row in rows}
        codes = {at: max(-1.0, min(1.0, weight[at] / scales[at[0]])) for at in salient}
    mean, std = np.mean(list(codes.values())), np.std(list(codes.values()))
    steps = np.linspace(-1, 1, 2**SALIENT_BITS + 1)
    levels = [mean + std * np.sign(d) * (ALPHA * math.exp(abs(d)) - 1) for d in steps]
    centres = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
    codes = {at: nearest(code, centres) for at, code in codes.items()}
    return codes, centres, {row: least_squares(row) for row in rows} if refit else scales


class Literal:
    """Where the salient weights are, and what every weight may become."""

    def __init__(self, weight, inputs, plan, refit=True):
        groups = len(plan.parameters["boundaries"])
        unsalient, above = literal.masks(weight.double(), plan.parameters["p_sal"], groups)
        # What the plan takes for salient and the metric does not is in the top group.
        self.groups = [{tuple(at) for at in mask.nonzero().tolist()} for mask in unsalient]
        self.groups[-1] |= {tuple(at) for at in above.nonzero().tolist()}
        self.weight = weight.double().numpy()
        scores = literal_scores(plan.parameters["saliency"], self.weight, inputs)
        ranked = sorted(set().union(*self.groups), key=lambda at: (-scores[at], at))
        self.salient = sorted(ranked[: int(above.sum())])
        self.groups = [sorted(group - set(self.salient)) for group in self.groups]
        self.scales = [sum(abs(self.weight[at]) for at in group) / len(group) for group in self.groups]
        self.codes, self.centres, self.row_scales = algorithm_1(self.weight, self.salient, refit)

    def by_magnitude(self):
        """Without feedback: the mean of the group, the code that algorithm 1 gave."""
        result = np.empty_like(self.weight)
        for scale, group in zip(self.scales, self.groups, strict=True):
            for at in group:
                result[at] = math.copysign(scale, self.weight[at])
        for at in self.salient:
            result[at] = self.row_scales[at[0]] * self.codes[at]
        return result

    def nearest(self, at, value):
        """The nearest to `value` of what the weight at this place may become."""
        if at in self.salient:
            return nearest(value, [self.row_scales[at[0]] * centre for centre in self.centres])
        return nearest(value, [sign * scale for scale in self.scales for sign in (1, -1)])

    def fed_back(self, inputs):
        """Optimal brain quantization: column by column, with the inverse of the Hessian of what is left."""
        running, moment = self.weight.copy(), damped(inputs)
        for column in range(running.shape[1]):
            inverse = np.linalg.inv(moment[column:, column:])
            for row in range(running.shape[0]):
                quantized = self.nearest((row, column), running[row, column])
                error = running[row, column] - quantized
                running[row, column:] -= error / inverse[0, 0] * inverse[0]
                running[row, column] = quantized
        return running


def nearest(value, levels):
    return min(levels, key=lambda level: abs(level - value))


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_it_is_the_literal_method(metric, groups, feedback, refit):
    weight, inputs = gaussian(7 + groups, *SHAPE), calibrated(groups, *SHAPE)
    plan = plan_for(weight, groups=groups, saliency=metric, feedback=feedback, refit=refit, damping=DAMPING)
    assert plan.parameters["salient"] > 2
    by_hand = Literal(weight, inputs, plan, refit)
    expected = by_hand.fed_back(inputs) if feedback else by_hand.by_magnitude()
    found = unpack(METHOD.quantize(weight, plan, inputs).packed).double()
    assert torch.allclose(found, torch.from_numpy(expected), rtol=STORED, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_feedback_with_independent_channels_is_the_nearest_level(metric):
    weight, inputs = gaussian(1, *SHAPE), calibrated(1, *SHAPE)
    independent = replace(inputs, second_moment_NN=torch.eye(SHAPE[1]))
    plan = plan_for(weight, saliency=metric, feedback=True)
    by_hand = Literal(weight, independent, plan)
    expected = torch.empty(SHAPE)
    for at in np.ndindex(*SHAPE):
        expected[at] = by_hand.nearest(at, float(weight[at]))
    assert torch.allclose(unpack(METHOD.quantize(weight, plan, independent).packed), expected, rtol=STORED)


@pytest.mark.parametrize("metric", METRICS)
def test_feedback_lowers_the_output_error(metric):
    weight, inputs = gaussian(2, 32, 48), calibrated(2, 32, 48)
    plain, fed = (
        pack_layer(weight, plan_for(weight, saliency=metric, feedback=feedback), "layer", inputs)[1].output_error
        for feedback in (False, True)
    )
    assert fed < 0.7 * plain


@pytest.mark.parametrize("metric", METRICS)
def test_feedback_leaves_the_stored_bits_as_they_are(metric):
    weight, inputs = gaussian(3, *SHAPE), calibrated(3, *SHAPE)
    plain, fed = (
        pack_layer(weight, plan_for(weight, saliency=metric, feedback=feedback), "layer", inputs)[1]
        for feedback in (False, True)
    )
    assert (fed.nbytes, fed.bits.stored) == (plain.nbytes, plain.bits.stored)


def test_another_metric_chooses_as_many_weights_as_the_plan_asks_for():
    """Where it finds them: in the one channel that is not silent."""
    weight = gaussian(4, *SHAPE)
    x = torch.zeros(50, SHAPE[1])
    x[:, 6] = 1.0
    plan = plan_for(weight, p_max=0.04, saliency="activation")
    by_hand = Literal(weight, site(x), plan)
    assert len(by_hand.salient) == plan.parameters["salient"] <= SHAPE[0]
    found = unpack(METHOD.quantize(weight, plan, site(x)).packed)
    unsalient = [at for at in np.ndindex(*SHAPE) if at not in by_hand.salient]
    assert {at[1] for at in by_hand.salient} == {6}
    assert len({abs(float(found[at])) for at in unsalient}) == 2  # the groups' scales


def test_a_row_scale_that_came_out_negative_is_one_that_weights_are_near_to():
    """All salient weights but a row's are positive, and so are all centres: the row's scale has to turn the sign."""
    weight = 0.1 * gaussian(5, 64, 40)
    weight[:, 2] = torch.linspace(1.0, 1.2, 64)
    weight[4, 2:6] = torch.tensor([-1.1, -1.1, -1.1, -6.0])
    inputs = replace(calibrated(5, 64, 40), second_moment_NN=torch.eye(40))
    plan = plan_for(weight, p_max=0.05, feedback=True)
    by_hand = Literal(weight, inputs, plan)
    assert by_hand.row_scales[4] < 0
    found = unpack(METHOD.quantize(weight, plan, inputs).packed)
    expected = [by_hand.nearest((4, column), float(weight[4, column])) for column in range(2, 6)]
    assert expected[0] != expected[3]
    assert found[4, 2:6].tolist() == pytest.approx(expected, rel=STORED)


def test_groups_are_counted_a_few_rows_at_a_time(monkeypatch):
    weight, inputs = gaussian(7, *SHAPE), calibrated(7, *SHAPE)
    plan = plan_for(weight, saliency="hessian")
    whole = METHOD.quantize(weight, plan, inputs).packed
    monkeypatch.setattr("bivlm.methods.bivlm.method.CHUNK_WEIGHTS", 2 * SHAPE[1])
    assert torch.equal(METHOD.quantize(weight, plan, inputs).packed, whole)


@pytest.mark.parametrize("feedback", [False, True])
def test_zeros_of_either_sign_are_one_level(feedback):
    weight, inputs = gaussian(6, *SHAPE), calibrated(6, *SHAPE)
    weight[:, 0] = -0.0
    plan = plan_for(weight, feedback=feedback)
    found = unpack(METHOD.quantize(weight, plan, inputs).packed)
    assert (found[:, 0] < 0).all()
    if feedback:  # what is fed on is the error of what is stored
        shifted = weight.clone()
        shifted[:, 0] = -1e-30
        assert torch.equal(found, unpack(METHOD.quantize(shifted, plan, inputs).packed))


def degenerate():
    rows, columns = SHAPE
    weight, inputs = gaussian(8, rows, columns), calibrated(8, rows, columns)
    holed = weight.clone()
    holed[[2, 5]] = 0
    x = gaussian(9, 60, columns)
    x[:, [0, 7, 8]] = 0
    nothing = SiteStatistics(torch.zeros(columns, columns), torch.zeros(columns), torch.zeros(columns), {"text": 0})
    yield "zero rows", holed, inputs
    yield "all zero", torch.zeros(rows, columns), inputs
    yield "dead channels", weight, site(x, gaussian(9, rows, 60) ** 2 @ x**2)
    yield "no gradient", weight, site(x, torch.zeros(rows, columns))
    yield "no tokens", weight, nothing
    yield "one token", weight, site(x[:1], torch.ones(rows, columns))
    yield "one column", weight[:, :1].contiguous(), calibrated(1, rows, 1)
    yield "one row", weight[:1], calibrated(1, 1, columns)
    yield "one weight", weight[:1, :1], calibrated(1, 1, 1)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("weight", "inputs"), [pytest.param(*case, id=name) for name, *case in degenerate()])
def test_degenerate_layers_have_a_finite_result(weight, inputs, metric, feedback):
    for groups in (1, 2, 5):
        plan = plan_for(weight, groups=groups, saliency=metric, feedback=feedback)
        packed, record = pack_layer(weight.to(torch.bfloat16), plan, "layer", inputs)
        assert unpack(packed).isfinite().all()
        assert math.isfinite(record.error) and math.isfinite(record.output_error)


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, WEIGHTS),
        ({"feedback": True}, INPUTS),
        ({"saliency": "activation"}, INPUTS),
        ({"saliency": "hessian"}, INPUTS),
        ({"saliency": "gradient"}, GRADIENTS),
        ({"saliency": "gradient", "feedback": True}, GRADIENTS),
    ],
)
def test_it_needs_what_its_settings_look_at(changes, needs):
    settings = METHOD.Settings.model_validate({"method": "bivlm", "groups": 2, "p_max": 0.01} | changes)
    assert METHOD.needs(settings) == needs
