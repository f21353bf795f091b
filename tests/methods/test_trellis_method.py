"""The method on a trellis: real bits, errors near what theory says, and the same bytes wherever it runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bivlm import kernels
from bivlm.compression.layer import pack_layer
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.methods.base import INPUTS, MOMENTS, WEIGHTS
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.trellis import RATES, trellis_code
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack
from bivlm.recipe.loading import parse_recipe

METHOD = method("trellis")
ERROR = trellis_code(12, 2.0).error


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def activations(tokens, channels, seed=1):
    """Inputs that mostly lie in a few directions, in channels of unequal size."""
    few = max(1, channels // 8)
    x = gaussian(tokens, few, seed=seed) @ gaussian(few, channels, seed=seed + 1) / few**0.5
    return (x + 0.3 * gaussian(tokens, channels, seed=seed + 2)) * torch.exp(0.5 * gaussian(channels, seed=seed + 3))


def site(x, gradients=None):
    moment = None if gradients is None else gradients.T @ gradients
    return SiteStatistics(
        x.T @ x / max(len(x), 1), x.mean(0), x.abs().mean(0), {"text": len(x)}, gradient_moment_MM=moment
    )


def nothing_seen(channels):
    return SiteStatistics(torch.zeros(channels, channels), torch.zeros(channels), torch.zeros(channels), {"text": 0})


def settings_of(**changes):
    return METHOD.Settings.model_validate({"method": "trellis"} | changes)


def pack(weight, inputs=None, **changes):
    statistics = LayerStatistics.measure(weight, 0.0)
    return pack_layer(weight, METHOD.plan(statistics, settings_of(**changes)), "layer", inputs)


def relative(weight, packed):
    weight = weight.double()
    return float((unpack(packed).double() - weight).norm() ** 2 / weight.norm() ** 2)


class TestWidths:
    @pytest.mark.parametrize("shape", [(6, 3420), (5, 4304), (4, 1152), (2, 18944), (300, 127), (900, 1), (1, 900)])
    def test_any_width_errs_as_a_gaussian_at_its_rate(self, shape):
        weight = gaussian(*shape, seed=3, dtype=torch.bfloat16)
        packed, record = pack(weight, feedback="none")
        assert relative(weight, packed) == pytest.approx(ERROR, rel=0.15)
        assert record.bits.stored == 8 * packed.numel() / weight.numel()
        assert 2 <= record.bits.stored < 2 + 8 * 100 / weight.numel()

    @pytest.mark.parametrize("shape", [(130, 1152), (3, 300), (70, 127), (80, 1), (1, 80), (1, 1)])
    @pytest.mark.parametrize("feedback", ["inputs", "both"])
    def test_any_width_is_fed_back(self, shape, feedback):
        weight, inputs = gaussian(*shape, seed=4), site(activations(400, shape[1]), gaussian(200, shape[0]))
        packed, record = pack(weight, inputs, feedback=feedback)
        plain, unfed = pack(weight, feedback="none")
        if shape[1] > 100:
            error, other = (output_error(weight, each, inputs) for each in (packed, plain))
            assert error < 0.6 * other
        assert packed.numel() == unfed.nbytes or feedback == "both"
        assert unpack(packed).isfinite().all() and record.error < 1

    @pytest.mark.slow
    @pytest.mark.parametrize("width", [3420, 4304])
    def test_wide_layers_are_fed_back(self, width):
        weight, inputs = gaussian(64, width, seed=5), site(activations(2000, width))
        packed, _ = pack(weight, inputs)
        plain, _ = pack(weight, feedback="none")
        assert output_error(weight, packed, inputs) < 0.4 * output_error(weight, plain, inputs)


def output_error(weight, packed, inputs):
    error = unpack(packed).double() - weight.double()
    return float(((error @ inputs.second_moment_NN.double()) * error).sum())


class TestFeedback:
    def test_it_leaves_a_fraction_of_the_outputs_error(self):
        weight, inputs = gaussian(256, 256, seed=6), site(activations(1500, 256))
        plain, _ = pack(weight, feedback="none")
        packed, record = pack(weight, inputs)
        assert output_error(weight, packed, inputs) < 0.35 * output_error(weight, plain, inputs)
        assert relative(weight, plain) < relative(weight, packed)
        assert record.figures.items() >= {"tokens": 1500, "damping": 0.01, "dead_channels": 0}.items()

    def test_both_sides_leave_less_of_what_outputs_count(self):
        weight, slopes = gaussian(192, 160, seed=7), activations(1000, 192, seed=30)
        inputs = site(activations(1500, 160), slopes)

        def error(packed):
            each, g = unpack(packed).double() - weight.double(), inputs.gradient_moment_MM.double()
            return float(((g @ each @ inputs.second_moment_NN.double()) * each).sum())

        one, _ = pack(weight, inputs)
        two, record = pack(weight, inputs, feedback="both")
        assert error(two) < 0.8 * error(one)
        assert record.figures["output_damping"] == settings_of().output_damping

    @pytest.mark.parametrize("rotate", ["none", "inputs", "outputs", "both"])
    def test_every_rotation_feeds_what_it_rotated(self, rotate):
        """With a moment turned another way than the weight, feedback would make outputs worse."""
        weight, slopes = gaussian(128, 128, seed=8), activations(1000, 128, seed=30)
        inputs = site(activations(1000, 128), slopes)
        plain, _ = pack(weight, feedback="none", rotate=rotate)
        packed, _ = pack(weight, inputs, feedback="both", rotate=rotate, output_damping=0.01)
        g, h = inputs.gradient_moment_MM.double(), inputs.second_moment_NN.double()
        errors = [unpack(each).double() - weight.double() for each in (packed, plain)]
        fed, unfed = (float(((g @ error @ h) * error).sum()) for error in errors)
        assert fed < 0.35 * unfed

    def test_a_layer_of_which_nothing_reaches_the_answer_is_fed_back_by_inputs(self):
        weight, inputs = gaussian(96, 128, seed=9), site(activations(600, 128))
        assert inputs.gradient_moment_MM is None
        packed, record = pack(weight, inputs, feedback="both")
        plain, _ = pack(weight, feedback="none")
        assert output_error(weight, packed, inputs) < 0.5 * output_error(weight, plain, inputs)
        assert record.figures["output_damping"] == settings_of().output_damping

    @pytest.mark.parametrize("feedback", ["inputs", "both"])
    @pytest.mark.parametrize("slopes", [False, True])
    def test_a_layer_that_saw_no_token_is_packed_as_without_feedback(self, feedback, slopes):
        weight, inputs = gaussian(70, 96, seed=10), nothing_seen(96)
        inputs = replace(inputs, gradient_moment_MM=torch.zeros(70, 70) if slopes else None)
        packed, record = pack(weight, inputs, feedback=feedback)
        assert relative(weight, packed) == pytest.approx(ERROR, rel=0.15)
        assert record.figures["tokens"] == 0

    def test_fewer_samples_than_channels_are_damped(self):
        weight, x = gaussian(96, 128, seed=11), activations(20, 128)
        _, record = pack(weight, site(x), damping=0.0, rotate="none")
        assert 0 < record.figures["damping"] <= 1 and record.figures["tokens"] == 20
        packed, record = pack(weight, site(x, gaussian(5, 96)), feedback="both")
        assert relative(weight, packed) < 1 and record.figures["damping"] == 0.01

    def test_inputs_are_asked_for(self):
        with pytest.raises(InputError, match="method 'trellis' needs the second moment of the layer's inputs"):
            pack(gaussian(8, 8))


class TestWeights:
    @pytest.mark.parametrize("feedback", ["none", "inputs", "both"])
    def test_zeros_stay_zeros(self, feedback):
        weight = torch.zeros(70, 90)
        packed, record = pack(weight, site(activations(300, 90), gaussian(100, 70)), feedback=feedback)
        assert torch.equal(unpack(packed), weight) and record.error == 0

    @pytest.mark.parametrize("shape", [(128, 128), (70, 90), (96, 200)])
    @pytest.mark.parametrize("value", [0.25, -3e-30, 1e30])
    def test_constants_are_spread_by_their_rotations(self, shape, value):
        """One direction of each side: their product is no Gaussian, and comes near enough."""
        weight = torch.full(shape, value)
        packed, _ = pack(weight, feedback="none")
        assert relative(weight, packed) < 5 * ERROR

    @pytest.mark.parametrize("shape", [(256, 256), (200, 200), (96, 96)])
    def test_an_identity_is_spread_by_its_rotations(self, shape):
        """The same rotation on both sides would leave it as it is: sixteen times its deviation, and zeros."""
        weight = torch.eye(*shape) + 1e-3 * gaussian(*shape)
        packed, _ = pack(weight, feedback="none")
        assert relative(weight, packed) < 1.6 * ERROR

    def test_heavy_tails_cost_little_with_a_rotation_and_much_without(self):
        weight = gaussian(128, 300, seed=12)
        weight = weight.sign() * weight.abs() ** 4
        errors = {
            rotate: relative(weight, pack(weight, feedback="none", rotate=rotate)[0]) for rotate in ("both", "none")
        }
        assert errors["both"] < 1.25 * ERROR
        assert errors["none"] > 5 * ERROR

    def test_columns_that_stand_out_cost_little(self):
        weight = gaussian(96, 3420, seed=13)
        weight[:, [5, 700, 3400]] *= 40
        assert relative(weight, pack(weight, feedback="none")[0]) < 1.3 * ERROR

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_a_weight_keeps_its_dtype(self, dtype):
        weight = gaussian(30, 40, dtype=dtype)
        before = weight.clone()
        packed, _ = pack(weight, feedback="none")
        assert unpack(packed).dtype == dtype and torch.equal(weight, before)


@pytest.mark.parametrize("rate", RATES)
def test_a_rate_is_what_is_stored_and_errs_as_its_code(rate):
    weight = gaussian(256, 300, seed=14)
    packed, record = pack(weight, feedback="none", rate=rate)
    assert rate <= record.bits.stored < rate + 0.02
    assert record.bits.nominal == rate
    assert relative(weight, packed) == pytest.approx(trellis_code(12, rate).error, rel=0.05)


@pytest.mark.parametrize("state_bits", [14, 16])
def test_more_states_err_less_in_the_same_bytes(state_bits):
    weight = gaussian(256, 128, seed=15)
    packed, record = pack(weight, feedback="none", state_bits=state_bits)
    few, _ = pack(weight, feedback="none")
    assert record.error < 0.99 * relative(weight, few)
    assert packed.numel() == few.numel()


class TestBytes:
    @pytest.mark.parametrize("changes", [{"feedback": "none"}, {}, {"feedback": "both"}], ids=str)
    def test_threads_change_nothing(self, changes):
        weight, inputs = gaussian(600, 130, seed=16), site(activations(500, 130), gaussian(300, 600))
        before = torch.get_num_threads()
        try:
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(pack(weight, inputs, **changes)[0])
                assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*found)

    @pytest.mark.skipif(kernels.native() is None, reason="the native code was not built")
    @pytest.mark.parametrize("changes", [{"feedback": "none"}, {"rate": 1.25}, {"feedback": "both"}], ids=str)
    def test_without_native_code_they_are_the_same(self, changes, monkeypatch):
        weight, inputs = gaussian(33, 40, seed=17), site(activations(200, 40), gaussian(100, 33))
        native, _ = pack(weight, inputs, **changes)
        monkeypatch.setattr(kernels, "native", lambda: None)
        assert torch.equal(pack(weight, inputs, **changes)[0], native)
        assert torch.equal(unpack(native), unpack(native.clone()))

    def test_seeds_rotate_otherwise(self):
        weight = gaussian(64, 70, seed=18)
        one, other = (pack(weight, feedback="none", seed=seed)[0] for seed in (0, 1))
        assert not torch.equal(unpack(one), unpack(other))
        assert torch.equal(one, pack(weight, feedback="none")[0])


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"rate": 2.1},
                r"rate.*expected one of 0\.5, 0\.75, 1, 1\.25, 1\.5, 1\.75, 2, 2\.25, 2\.5, 2\.75, 3, found 2\.1",
            ),
            ({"rate": 0.25}, "rate.*expected one of 0.5"),
            ({"state_bits": 13}, "state_bits.*should be 12, 14 or 16, found 13"),
            ({"feedback": "outputs"}, "feedback.*should be 'none', 'inputs' or 'both', found 'outputs'"),
            ({"rotate": "yes"}, "rotate.*should be 'none', 'inputs', 'outputs' or 'both', found 'yes'"),
            ({"damping": -0.1}, "damping.*greater than or equal to 0"),
            ({"damping": float("nan")}, "damping.*finite"),
            ({"output_damping": 1.5}, "output_damping.*less than or equal to 1"),
            ({"seed": 2**32}, "seed.*less than 4294967296"),
            ({"seed": -1}, "seed.*greater than or equal to 0"),
            ({"groups": 2}, "groups"),
        ],
    )
    def test_others_are_refused_by_name(self, changes, message):
        recipe = {"name": "r", "format": 1, "components": {"language": {"method": "trellis"} | changes}}
        with pytest.raises(InputError, match=f"(?s)language.*{message}"):
            parse_recipe(recipe)

    def test_a_whole_number_is_a_rate(self):
        assert settings_of(rate=2) == settings_of() and settings_of(rate=2).rate == 2.0

    @pytest.mark.parametrize(("feedback", "needs"), [("none", WEIGHTS), ("inputs", INPUTS), ("both", MOMENTS)])
    def test_needs_follow_from_the_feedback(self, feedback, needs):
        chosen = settings_of(feedback=feedback)
        assert METHOD.needs(chosen) == needs
        assert METHOD.feeds_back(chosen) == (feedback != "none")

    @pytest.mark.parametrize("feedback", ["none", "both"])
    def test_the_curve_has_what_every_rate_stores(self, feedback):
        weight, inputs = gaussian(70, 90, seed=19), site(activations(100, 90))
        points = METHOD.curve(LayerStatistics.measure(weight, 0.0), settings_of(feedback=feedback, seed=3))
        assert [point.settings["rate"] for point in points] == list(RATES)
        for point in points[::5]:
            packed, record = pack(weight, inputs, **{k: v for k, v in point.settings.items() if k != "method"})
            assert record.bits.stored == point.stored_bits == 8 * packed.numel() / weight.numel()
            assert point.settings["seed"] == 3 and point.error == trellis_code(12, point.settings["rate"]).error

    def test_a_record_describes_it(self):
        plan = METHOD.plan(LayerStatistics.measure(gaussian(8, 8), 0.0), settings_of(rate=1.5))
        assert METHOD.describe(plan) == {"rate": 1.5, "state_bits": 12, "feedback": "inputs"}


class TestSensitivity:
    """``tr(G E H E^T)`` of an error that quantization leaves, as a share of its mean square."""

    @pytest.mark.parametrize("rotate", ["none", "both"])
    @pytest.mark.parametrize("feedback", ["inputs", "both"])
    def test_it_predicts_the_divergence_of_a_packed_layer(self, feedback, rotate):
        weight, slopes = gaussian(150, 160, seed=20), activations(800, 150, seed=30)
        inputs = site(activations(1500, 160), slopes)
        chosen = settings_of(feedback=feedback, rotate=rotate)
        trace = float(slopes.square().sum())
        packed, _ = pack(weight, inputs, feedback=feedback, rotate=rotate)
        error, g, h = (
            unpack(packed).double() - weight,
            inputs.gradient_moment_MM.double(),
            inputs.second_moment_NN.double(),
        )
        h += 0.01 * h.diagonal().mean() * torch.eye(160)
        if feedback == "both":
            g += chosen.output_damping * g.diagonal().mean() * torch.eye(150)
            divergence = float(((g @ error @ h) * error).sum())
        else:
            divergence = trace / 150 * float(((error @ h) * error).sum())
        predicted = METHOD.sensitivity(inputs, trace, chosen) * ERROR * float(weight.double().square().mean())
        # Within a tile of unlike importances the search errs less than that where it counts.
        assert 0.6 < divergence / predicted < 1.3

    def test_it_is_the_sum_of_what_remains(self):
        inputs = site(activations(500, 40), activations(300, 30, seed=30))

        def remains(moment, damping):
            damped = moment.double().numpy() + damping * float(moment.diagonal().mean()) * np.eye(len(moment))
            return (1 / np.linalg.cholesky(np.linalg.inv(damped)).diagonal() ** 2).sum()

        h, g = remains(inputs.second_moment_NN, 0.01), remains(inputs.gradient_moment_MM, 0.5)
        chosen = {"rotate": "none", "output_damping": 0.5}
        assert METHOD.sensitivity(inputs, 7.0, settings_of(**chosen)) == pytest.approx(7 * h, rel=1e-4)
        both = METHOD.sensitivity(inputs, 7.0, settings_of(feedback="both", **chosen))
        assert both == pytest.approx(h * g, rel=1e-4)

    def test_what_does_not_reach_the_answer_is_not_sensitive(self):
        inputs = site(activations(500, 40))
        assert METHOD.sensitivity(inputs, 0.0, settings_of(feedback="both")) == 0
        assert METHOD.sensitivity(nothing_seen(40), 0.0, settings_of()) == 0
