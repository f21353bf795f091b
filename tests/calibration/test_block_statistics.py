"""Input statistics and token gradients of blocks against the whole model with ordinary hooks and autograd."""

import pytest
import torch
from PIL import Image
from tiny_llava import make_tiny_llava
from transformers import AutoModelForImageTextToText

from bivlm.calibration.blocks import gradients
from bivlm.calibration.blocks.encoded import (
    SampleTensors,
    is_image,
    model_inputs,
    reply_range,
    stack,
    with_reply,
    write_samples,
)
from bivlm.calibration.blocks.gradients import curvature_draw, gradient_weights, token_gradients
from bivlm.calibration.blocks.model import BlockwiseModel
from bivlm.calibration.blocks.run import image_tokens, run_unit
from bivlm.calibration.blocks.sites import by_modality, uniform
from bivlm.checkpoint.reading import Checkpoint
from bivlm.evaluation.generation import load_processor
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.sources.replies import read_reply
from bivlm.sources.samples import CalibrationSample

SAMPLES = [
    CalibrationSample(Image.effect_noise((32, 32), 60).convert("RGB"), "What is it?", "a cat"),
    CalibrationSample(Image.effect_noise((40, 20), 30).convert("RGB"), "Is it a dog, or is it not?", "no"),
    CalibrationSample(Image.new("RGB", (32, 32), "red"), "Say.", "nothing"),
    CalibrationSample(None, "Without an image?", "yes"),
]
IMAGES = 3


class Walk:
    """All units of a float32 model run on the samples, and the same model whole."""

    def __init__(self, folder, place):
        self.folder = make_tiny_llava(folder, dtype=torch.float32)
        self.model = BlockwiseModel(Checkpoint.open(self.folder))
        processor = load_processor(self.folder)
        write_samples((with_reply(read_reply(self.model, processor, c)) for c in SAMPLES), place / "samples")
        self.samples = SampleTensors(place / "samples")
        self.outputs = {}
        for unit in self.model.units:
            run = self.run(unit, None)
            write_samples(stack(run.outputs), place / unit.name)
            self.outputs[unit.name] = SampleTensors(place / unit.name)

    def run(self, unit, weigh):
        given = {other.name: self.outputs[other.name] for other in self.model.predecessors(unit)}
        return run_unit(self.model, unit, self.samples, given, weigh=weigh)

    def whole(self):
        return AutoModelForImageTextToText.from_pretrained(self.folder).eval()


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return Walk(tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("walk"))


def inputs_of(walk, names):
    """What every linear takes in, in the whole model: a list of (T, N) by name, one a sample."""
    model, taken = walk.whole(), {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: taken[name].append(arguments[0].reshape(-1, arguments[0].shape[-1]))
        )
    with torch.no_grad():
        for number in range(len(walk.samples)):
            model(**model_inputs(walk.samples[number]))
    return taken


def test_statistics_are_those_of_the_whole_model(walk):
    for unit in walk.model.units:
        run, taken = walk.run(unit, lambda _: uniform), inputs_of(walk, unit.linears)
        for name in unit.linears:
            x = torch.cat(taken[name]).double()
            site = run.sites[run.site_of[name]]
            assert torch.allclose(
                site.second_moment_NN.double(), x.T @ x / len(x), atol=1e-4 * float(x.square().mean())
            )
            assert torch.allclose(site.mean_N.double(), x.mean(0), atol=1e-5)
            assert torch.allclose(site.magnitude_N.double(), x.abs().mean(0), atol=1e-5)
            assert site.total_tokens == len(x)


def test_layers_that_read_the_same_tensor_share_a_site(walk):
    unit = walk.model.unit("model.language_model.layers.0")
    site_of = walk.run(unit, lambda _: uniform).site_of
    shared = {}
    for name, site in site_of.items():
        shared.setdefault(site.removeprefix(f"{unit.name}."), []).append(name.rpartition(".")[2])
    assert shared == {
        "self_attn.q_proj": ["q_proj", "k_proj", "v_proj"],
        "self_attn.o_proj": ["o_proj"],
        "mlp.gate_proj": ["gate_proj", "up_proj"],
        "mlp.down_proj": ["down_proj"],
    }


def test_tokens_are_counted_and_weighted_by_modality(walk):
    unit = walk.model.unit("model.language_model.layers.1")
    name = f"{unit.name}.mlp.down_proj"
    x = torch.cat(inputs_of(walk, [name])[name]).double()
    image = torch.cat([is_image(walk.samples[n]["input_ids"], walk.model.config) for n in range(len(walk.samples))])
    site = walk.run(unit, lambda _: by_modality(0.25)).sites[name]
    assert site.tokens == {"image": int(image.sum()), "text": int((~image).sum())}
    assert site.tokens["image"] == 16 * IMAGES
    g2 = torch.where(image, 0.25, 1.0).double()
    expected = (x * g2[:, None]).T @ x / g2.sum()
    assert torch.allclose(site.second_moment_NN.double(), expected, atol=1e-6)


def test_vision_sees_images_alone(walk):
    sites = walk.run(walk.model.units[0], lambda _: uniform).sites
    assert all(site.tokens == {"image": 16 * IMAGES, "text": 0} for site in sites.values())


def test_statistics_do_not_depend_on_the_dtype_they_are_added_up_in(walk, tmp_path):
    """A bfloat16 model: the sums are float32, so that 10,000 tokens count."""
    model = BlockwiseModel(Checkpoint.open(make_tiny_llava(tmp_path)), dtype=torch.bfloat16)
    unit = model.units[0]
    assert model.dtype == torch.bfloat16
    site = next(iter(run_unit(model, unit, walk.samples, {}, weigh=lambda _: uniform).sites.values()))
    assert site.second_moment_NN.dtype == torch.float32


def test_a_site_is_read_back_as_it_was_written(walk, tmp_path):
    site = next(iter(walk.run(walk.model.units[0], lambda _: uniform).sites.values()))
    site.save(tmp_path / "site")
    again = SiteStatistics.load(tmp_path / "site")
    assert torch.equal(again.second_moment_NN, site.second_moment_NN)
    assert torch.equal(again.magnitude_N, site.magnitude_N)
    assert again.tokens == site.tokens


def test_a_layer_that_no_token_reaches_has_empty_statistics(walk, monkeypatch):
    unit = walk.model.units[0]
    silent = unit.linears[-1]
    parent = walk.model._model.get_submodule(silent.rpartition(".")[0])
    monkeypatch.setattr(parent, "forward", lambda x: torch.zeros_like(x))  # an expert that is never chosen
    site = walk.run(unit, lambda _: uniform).sites[silent]
    assert site.total_tokens == 0
    assert not site.second_moment_NN.any()


def test_curvature_draws_have_the_covariance_of_the_divergences_curvature():
    logits = torch.tensor([[2.0, 0.5, -1.0, 0.0]])
    draws = torch.stack([curvature_draw(logits, seed)[0] for seed in range(20_000)]).double()
    p = torch.softmax(logits[0].double(), -1)
    assert torch.allclose(draws.T @ draws / len(draws), p.diag() - torch.outer(p, p), atol=5e-3)


def test_gradients_are_those_of_the_whole_model(walk):
    blocks = {unit.name: walk.outputs[unit.name] for unit in walk.model.units if unit.name != "lm_head"}
    asked = {"squares": True, "moments": True, "seed": 7}
    found = {each.unit: each for each in token_gradients(walk.model, walk.samples, blocks, **asked)}
    assert list(found) == list(reversed(blocks))
    model, taken, made = walk.whole(), {}, {}
    names = [name for unit in walk.model.units if unit.name in blocks for name in unit.linears]
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, arguments, output, name=name: (
                output.retain_grad(),
                taken.__setitem__(name, arguments[0].detach()),
                made.__setitem__(name, output),
            )[0]
        )
    squares, moments = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for number in range(len(walk.samples)):
        sample = walk.samples[number]
        taken.clear(), made.clear()
        logits = model(**model_inputs(sample), use_cache=False).logits[0]
        predicting = logits[[place - 1 for place in reply_range(sample)]]
        draw = curvature_draw(predicting.detach(), 7 + number) / len(predicting) ** 0.5
        (predicting * draw).sum().backward()
        slopes = {name: output.grad.reshape(-1, output.shape[-1]).double() for name, output in made.items()}
        rows = {name: slope.square().float() for name, slope in slopes.items()}
        for name, square in rows.items():
            moments[name] = moments[name] + slopes[name].T @ slopes[name]
            squares[name] = squares[name] + square.T @ taken[name].reshape(-1, taken[name].shape[-1]).square()
        for unit in walk.model.units[:-1]:
            if number == len(SAMPLES) - 1 and unit.component != "language":
                assert found[unit.name].norms[number] == {}  # there is no image
            for site, g_T in found[unit.name].norms[number].items():
                prefix, _, last = site.rpartition(".")
                together = {"q_proj": ["q_proj", "k_proj", "v_proj"], "gate_proj": ["gate_proj", "up_proj"]}
                expected = sum(rows[f"{prefix}.{member}"].sum(-1) for member in together.get(last, [last])).sqrt()
                assert torch.allclose(g_T, expected, rtol=1e-3, atol=1e-7), site
    for unit in walk.model.units[:-1]:
        for name in unit.linears:
            assert torch.allclose(found[unit.name].squares[name], squares[name], rtol=1e-3, atol=1e-9), name
            moment, trace = found[unit.name].moments[name], float(moments[name].trace())
            assert moment.dtype == torch.float32 and torch.equal(moment, moment.T)
            assert torch.allclose(moment.double(), moments[name], rtol=1e-3, atol=1e-4 * trace / len(moment)), name
            assert found[unit.name].traces[name] == pytest.approx(trace, rel=1e-4), name


def test_sums_of_gradients_that_are_not_asked_for_are_not_made(walk):
    blocks = {unit.name: walk.outputs[unit.name] for unit in walk.model.units if unit.name != "lm_head"}
    found = list(token_gradients(walk.model, walk.samples, blocks, moments=True))
    assert not any(each.squares for each in found) and all(each.moments and each.traces for each in found)
    plain = list(token_gradients(walk.model, walk.samples, blocks))
    assert not any(each.squares or each.moments for each in plain)
    assert [each.traces for each in plain] == [each.traces for each in found]


def test_balanced_samples_with_and_without_an_image_count_by_their_number(walk):
    blocks = {unit.name: walk.outputs[unit.name] for unit in walk.model.units if unit.name != "lm_head"}
    plain, balanced = (
        next(iter(token_gradients(walk.model, walk.samples, blocks, balanced=balanced))).norms
        for balanced in (False, True)
    )
    # The gradient at the last linear layer's output is that at the model's last block.
    site = next(site for site in plain[0] if site.endswith("down_proj"))
    before, after = ([float(sample[site].double().square().sum()) for sample in each] for each in (plain, balanced))
    *with_image, without = range(len(SAMPLES))
    assert sum(after) == pytest.approx(sum(before))
    assert sum(after[number] for number in with_image) / len(with_image) == pytest.approx(after[without])
    factors = [after[number] / before[number] for number in with_image]
    assert factors == pytest.approx([factors[0]] * len(with_image)) and factors[0] != pytest.approx(1)


def test_layers_that_no_answer_depends_on_have_no_sums(walk, monkeypatch):
    """An expert that is never chosen."""
    blocks = {unit.name: walk.outputs[unit.name] for unit in walk.model.units if unit.name != "lm_head"}
    unit = walk.model.units[0]
    silent = unit.linears[-1]
    parent = walk.model._model.get_submodule(silent.rpartition(".")[0])
    monkeypatch.setattr(parent, "forward", lambda x: torch.zeros_like(x))
    asked = {"squares": True, "moments": True}
    found = {each.unit: each for each in token_gradients(walk.model, walk.samples, blocks, **asked)}[unit.name]
    assert silent not in found.squares and silent not in found.moments and silent not in found.traces


def test_statistics_that_overflow_fail_by_name(walk):
    unit = walk.model.unit("model.language_model.layers.1")
    with pytest.raises(ArithmeticError, match=rf"^model {walk.folder}: the squared inputs of .*layers\.1.*infinity"):
        walk.run(unit, lambda _: lambda _site, image: torch.full((len(image),), 3e38))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("sums", ["squares", "moments"])
def test_gradients_that_are_not_finite_fail_by_name(walk, monkeypatch, value, sums):
    """The largest is finite itself and overflows when it is squared."""
    monkeypatch.setattr(gradients, "curvature_draw", lambda logits, _: torch.full_like(logits, value).cumsum(-1))
    blocks = {unit.name: walk.outputs[unit.name] for unit in walk.model.units if unit.name != "lm_head"}
    with pytest.raises(ArithmeticError, match=rf"^model {walk.folder}: the (squared )?gradients "):
        list(token_gradients(walk.model, walk.samples, blocks, **{sums: True}))


def test_gradient_weights_are_drawn_to_the_mean_of_their_modality(tmp_path):
    image = [torch.tensor([True, True, False]), torch.tensor([True, False, False])]
    write_samples([{"s": torch.tensor([1.0, 3.0, 8.0])}, {"s": torch.tensor([2.0, 4.0, 6.0])}], tmp_path / "g")
    weights = gradient_weights(SampleTensors(tmp_path / "g"), image, shrink=0.5)
    assert weights[0]("s", image[0]).tolist() == [1.5**2, 2.5**2, 7.0**2]  # means: 2 of images, 6 of text
    assert weights[1]("s", image[1]).tolist() == [2.0**2, 5.0**2, 6.0**2]
    assert weights[1]("a site without gradients", image[1]).tolist() == [1.0, 1.0, 1.0]


def test_first_tokens_of_images_are_told_from_text(walk):
    unit = walk.model.unit("model.language_model.layers.0")
    assert image_tokens(walk.model, unit, walk.samples[0]).sum() == 16
    assert len(image_tokens(walk.model, walk.model.units[0], walk.samples[0])) == 0
