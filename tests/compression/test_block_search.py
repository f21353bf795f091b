"""The search by block outputs against closed forms, every combination, and the whole model."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import norm
from tiny_llava import make_tiny_llava
from transformers import AutoModelForImageTextToText

from bivlm.calibration.blocks.encoded import model_inputs, stack, with_reply
from bivlm.calibration.blocks.model import BlockwiseModel
from bivlm.calibration.blocks.run import run_unit
from bivlm.calibration.blocks.units import Unit
from bivlm.checkpoint.reading import Checkpoint
from bivlm.compression.block_search import (
    activation_entropy,
    as_stored,
    dependencies,
    joint_groups,
    mean_dependency,
    relative_output_error,
    search_group,
)
from bivlm.evaluation.generation import load_processor
from bivlm.methods import method
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.sources.replies import read_reply
from bivlm.sources.samples import CalibrationSample

SAMPLES = [
    CalibrationSample(Image.effect_noise((32, 32), 60).convert("RGB"), "What is it?", "a cat"),
    CalibrationSample(Image.new("RGB", (32, 32), "red"), "Say.", "nothing"),
    CalibrationSample(None, "Without an image?", "yes"),
]
CLIPS = (1.0, 0.8, 0.6, 0.45)


class TestEntropy:
    def test_of_a_uniform_distribution(self):
        """It spans 256 * 2 sqrt(3) / 8 = 110.85 levels: 55 on either side of the mean, and 0.43 of one more."""
        x = torch.linspace(-3, 5, 1_000_001)
        half = 256 * math.sqrt(3) / 8
        p, rest = 1 / (2 * half), (half - 55) / (2 * half)
        assert activation_entropy([x]) == pytest.approx(-110 * p * math.log(p) - 2 * rest * math.log(rest), abs=1e-4)

    def test_of_a_gaussian(self):
        x = torch.from_numpy(norm.ppf((torch.arange(1_000_000, dtype=torch.float64) + 0.5).numpy() / 1_000_000))
        edges = torch.linspace(-4, 4, 257, dtype=torch.float64)[1:-1].numpy()
        p = torch.from_numpy(norm.cdf(edges)).diff(prepend=torch.zeros(1), append=torch.ones(1))
        expected = -float((p * p.log()).sum())
        assert activation_entropy([x]) == pytest.approx(expected, abs=1e-4)
        # Differential entropy less the logarithm of a level's width, but for the tails beyond four deviations.
        assert expected == pytest.approx(math.log(2 * math.pi * math.e) / 2 - math.log(8 / 256), abs=1e-3)

    def test_of_two_values_is_one_bit(self):
        assert activation_entropy([torch.tensor([-1.0, 1.0]), torch.tensor([[1.0], [-1.0]])]) == pytest.approx(
            math.log(2)
        )

    def test_neither_shift_nor_factor_nor_the_cut_into_samples_counts(self):
        x = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        entropy = activation_entropy([x])
        assert activation_entropy([7 - 3 * x]) == pytest.approx(entropy, abs=1e-2)  # levels are open on one side
        assert activation_entropy(list((2**10 * x).view(8, 5, 100))) == pytest.approx(entropy, abs=1e-9)

    def test_outliers_leave_it_where_it_is(self):
        x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
        entropy = activation_entropy([x])
        x[:2] = 100.0
        assert activation_entropy([x]) == pytest.approx(entropy, abs=0.15)

    @pytest.mark.parametrize("outputs", [[], [torch.zeros(0)], [torch.full((3, 4), 0.7)]])
    def test_nothing_to_tell_apart_has_none(self, outputs):
        assert activation_entropy(outputs) == 0.0


UNITS = st.lists(st.sampled_from(["vision", "adaptor", "language"]), max_size=12).map(
    lambda components: [Unit(f"unit {n}", component, ()) for n, component in enumerate(components)]
)


@given(UNITS, st.data())
def test_neighbours_are_joined_if_and_only_if_they_may_be(units, data):
    entropy = {unit.name: data.draw(st.sampled_from([0.5, 1.0, 2.0, 3.0])) for unit in units}
    threshold, depth = data.draw(st.sampled_from([0.0, 1.0, 2.5])), data.draw(st.integers(1, 4))
    groups = joint_groups(units, dependencies(units, entropy), threshold, depth)
    assert [unit for group in groups for unit in group] == units
    assert all(1 <= len(group) <= depth for group in groups)
    group_of = {unit.name: number for number, group in enumerate(groups) for unit in group}
    for one, other in itertools.pairwise(units):
        joined = group_of[one.name] == group_of[other.name]
        depends = one.component == other.component != "adaptor" and entropy[one.name] > threshold
        assert joined == (depends and (joined or len(groups[group_of[one.name]]) < depth))


def test_the_threshold_is_the_mean_of_the_dependencies_there_are():
    assert mean_dependency([1.0, None, 4.0, 1.0]) == 2.0
    assert mean_dependency([None]) == mean_dependency([]) == 0.0


class Tiny:
    """A float32 model with its samples and what all its units give in full precision."""

    def __init__(self, folder):
        self.folder = make_tiny_llava(folder, dtype=torch.float32)
        self.checkpoint = Checkpoint.open(self.folder)
        self.model = BlockwiseModel(self.checkpoint)
        processor = load_processor(self.folder)
        self.samples = [with_reply(read_reply(self.model, processor, each)) for each in SAMPLES]
        self.outputs = {}
        for unit in self.model.units:
            self.outputs[unit.name] = self.run(unit, self.outputs)

    def run(self, unit, found, weights=None):
        given = {other.name: found[other.name] for other in self.model.predecessors(unit)}
        return stack(run_unit(self.model, unit, self.samples, given, weigh=None, weights=weights).outputs)

    def weight(self, name):
        with self.model.at(next(unit for unit in self.model.units if name in unit.linears)):
            return self.model.linear(name).weight.detach().clone()

    def rebuild(self, name, candidate):
        settings = method("rtn").Settings(method="rtn", group_size=32, clip=CLIPS[candidate])
        return as_stored(self.weight(name), LayerStatistics.measure(self.weight(name), 0), settings, name)

    def search(self, units, candidates, rounds=1, rebuild=None):
        rebuild = rebuild or self.rebuild
        return search_group(self.model, units, self.samples, self.outputs, candidates, rebuild, rounds)

    def error(self, units, chosen):
        """The error of the last unit's output with the chosen candidates."""
        found, weights = dict(self.outputs), {name: self.rebuild(name, which) for name, which in chosen.items()}
        for unit in units:
            found[unit.name] = self.run(unit, found, {name: weights[name] for name in unit.linears if name in weights})
        last = units[-1].name
        return relative_output_error(found[last], self.outputs[last], len(self.samples))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def language(tiny):
    return [unit for unit in tiny.model.units if unit.component == "language" and unit.name != "lm_head"]


@pytest.mark.parametrize("which", [0, 3, 6])
def test_of_one_layer_the_best_of_all_candidates_is_found(tiny, language, which):
    name = language[0].linears[which]
    found = tiny.search(language, {name: len(CLIPS)})
    errors = [tiny.error(language, {name: candidate}) for candidate in range(len(CLIPS))]
    assert found.chosen == {name: errors.index(min(errors))}
    assert found.error_before == errors[0]
    assert found.error_after == min(errors)
    assert found.tried == len(CLIPS)


def test_of_several_layers_no_single_change_is_better_in_the_end(tiny):
    adaptor = next(unit for unit in tiny.model.units if unit.component == "adaptor")
    found = tiny.search([adaptor], dict.fromkeys(adaptor.linears, len(CLIPS)), rounds=len(CLIPS) ** 2)
    errors = {
        combination: tiny.error([adaptor], dict(zip(adaptor.linears, combination, strict=True)))
        for combination in itertools.product(range(len(CLIPS)), repeat=len(adaptor.linears))
    }
    chosen = tuple(found.chosen[name] for name in adaptor.linears)
    assert found.error_after == errors[chosen]
    neighbours = [each for each in errors if sum(a != b for a, b in zip(each, chosen, strict=True)) <= 1]
    assert found.error_after == min(errors[each] for each in neighbours)
    assert found.error_after <= errors[0, 0] == found.error_before


def test_the_error_is_that_of_the_whole_model_with_the_chosen_weights(tiny, language):
    found = tiny.search(language, {name: len(CLIPS) for unit in language for name in unit.linears})
    assert found.error_after < found.error_before
    whole = {}
    for kind in ("full precision", "packed"):
        model = AutoModelForImageTextToText.from_pretrained(tiny.folder).eval()
        given = whole[kind] = []
        if kind == "packed":
            for name, which in found.chosen.items():
                model.get_submodule(name).weight.data = tiny.rebuild(name, which)
        model.get_submodule(language[-1].name).register_forward_hook(
            lambda _module, _arguments, output, given=given: given.append(output.double())
        )
        with torch.no_grad():
            for sample in tiny.samples:
                model(**model_inputs(sample), use_cache=False)
    lost = sum(float((a - b).square().sum()) for a, b in zip(*whole.values(), strict=True))
    total = sum(float(each.square().sum()) for each in whole["full precision"])
    assert found.error_after == pytest.approx(lost / total, rel=1e-4)
    for number, output in enumerate(whole["packed"]):
        assert torch.allclose(found.outputs[language[-1].name][number]["output"].double(), output, atol=1e-4)


def test_of_equal_candidates_the_first_is_chosen(tiny, language):
    names = language[0].linears
    found = tiny.search(language[:1], dict.fromkeys(names, 3), rebuild=lambda name, _: tiny.rebuild(name, 1))
    assert found.chosen == dict.fromkeys(names, 0)
    assert found.error_after == found.error_before


def test_vision_is_judged_by_the_samples_with_an_image(tiny):
    vision = [unit for unit in tiny.model.units if unit.component == "vision"]
    found = tiny.search(vision, dict.fromkeys(vision[0].linears, 2))
    assert 0 < found.error_after <= found.error_before
    assert "output" not in found.outputs[vision[-1].name][2]


def test_a_group_without_candidates_just_runs(tiny, language):
    found = tiny.search(language, {})
    assert (found.chosen, found.error_before, found.error_after) == ({}, 0.0, 0.0)
    assert list(found.outputs) == [unit.name for unit in language]


def test_only_one_unit_is_in_the_model_at_a_time(tiny, language):
    loaded = []

    def rebuild(name, candidate):
        loaded.append([n for u in tiny.model.units for n in u.linears if not tiny.model.linear(n).weight.is_meta])
        return tiny.rebuild(name, candidate)

    tiny.search(language, {language[0].linears[0]: 2}, rebuild=rebuild)
    assert loaded == [[], []]
