"""Finishing: the same bytes but for the numbers among them, and a smaller divergence on what it never saw."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import make_tiny_llava

from bivlm.checkpoint.linears import anatomy, linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.compression import finishing
from bivlm.compression.finishing import Leftover, finish
from bivlm.errors import InputError
from bivlm.evaluation.divergence import (
    StoredLogProbabilities,
    kl_by_token,
    kl_divergence,
    reference_logits,
    reply_log_probabilities,
    reply_logits,
)
from bivlm.evaluation.generation import load_model
from bivlm.methods import method
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import open_packed, unpack
from bivlm.recipe.finish import FinishSettings
from bivlm.recipe.loading import parse_recipe
from bivlm.reference.question_sets import calibration_samples
from bivlm.sources.replies import read_reply
from bivlm.sources.samples import CalibrationSample

SETTINGS = FinishSettings(steps=30, batch=4, learning_rate=0.02)
METHODS = [
    {"method": "bivlm", "groups": 2, "p_max": 0.05},
    {"method": "rtn", "bits": 2, "group_size": 32},
    {"method": "awq", "bits": 2, "group_size": 32},
    {"method": "pb_llm"},
    {"method": "billm", "block": 32},
    {"method": "arb_rc", "block": 32},
    {"method": "hbllm", "block": 32},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_tiny_llava(tmp_path_factory.mktemp("finish") / "model")
    model, processor = load_model(folder, "cpu")
    samples = calibration_samples(8, 0)
    return folder, samples, reference_logits(model, processor, samples, folder.with_name("logits"))


def packed_layers(folder, settings):
    """Every linear but the head, packed without knowing more than that inputs are uncorrelated."""
    checkpoint, chosen = Checkpoint.open(folder), method(settings["method"])
    parsed = chosen.Settings.model_validate(settings)
    packed = {}
    for linear in linears(checkpoint):
        if linear.name != "lm_head":
            weight = checkpoint.read(linear.disk_name)
            n = weight.shape[1]
            inputs = SiteStatistics(torch.eye(n), torch.zeros(n), torch.ones(n), {"image": 0, "text": 4 * n})
            plan = chosen.plan(LayerStatistics.measure(weight, chosen.tail_share(parsed)), parsed)
            packed[linear.name] = chosen.quantize(weight, plan, inputs).packed
    return packed


def run(place, packed, settings=SETTINGS, leftovers=None):
    folder, samples, logits = place
    model, processor = load_model(folder, "cpu")
    with StoredLogProbabilities(logits, len(samples)) as full_precision:
        return finish(model, processor, packed, samples, full_precision, settings, leftovers=leftovers)


def leftovers_of(folder, packed):
    """What stays in floating point beside `packed`, as it is stored."""
    checkpoint = Checkpoint.open(folder)
    parts = anatomy(checkpoint)
    names = parts.leftovers([parts.packable[name] for name in packed])
    return {disk_name: Leftover(name, checkpoint.read(disk_name)) for disk_name, name in names.items()}


def damaged(folder, packed, tuned=None):
    """The model with its packed weights, and with `tuned` numbers by name in it."""
    model, _ = load_model(folder, "cpu")
    for name, tensor in packed.items():
        model.get_submodule(name).weight.data = unpack(tensor).float()
    for name, tensor in (tuned or {}).items():
        model.get_parameter(name).data = tensor.float()
    return model


def divergences(folder, packed, samples, tuned=None):
    """KL(full || packed) of each conversation, a mean over its reply's tokens, both models loaded anew."""
    full, processor = load_model(folder, "cpu")
    other = damaged(folder, packed, tuned)
    found = []
    for sample in samples:
        reply = read_reply(full, processor, sample)
        one, two = reply_log_probabilities(full, reply), reply_log_probabilities(other, reply)
        found.append(float(kl_by_token(one, two).mean()))
    return found


def mean_divergence(folder, packed, samples):
    return sum(divergences(folder, packed, samples)) / len(samples)


@pytest.mark.parametrize(
    "settings",
    [pytest.param(each, marks=() if each["method"] == "bivlm" else pytest.mark.slow) for each in METHODS],
    ids=[each["method"] for each in METHODS],
)
def test_it_lowers_the_divergence_on_other_samples_with_the_same_bytes(place, settings):
    folder, _, _ = place
    before = packed_layers(folder, settings)
    finished = run(place, before)
    other = calibration_samples(8, 99)
    assert mean_divergence(folder, finished.packed, other) < 0.9 * mean_divergence(folder, before, other)
    assert finished.kl_after < finished.kl_before
    for name, tensor in before.items():
        assert finished.packed[name].shape == tensor.shape
        codec, header = open_packed(finished.packed[name], name)  # its checksum holds
        tuned, first = codec.tunable(finished.packed[name], header), codec.tunable(tensor, header)
        # What is no number stays: with the old numbers the new bytes rebuild the old weight.
        assert torch.equal(tuned.rebuild(first.parameters), first.rebuild(first.parameters))


@pytest.mark.slow
def test_some_conversations_judge_and_in_the_end_all_are_tuned_on(place, tmp_path):
    """Which ones judge is told from outside: by another reply of one of them the divergence before changes."""
    folder, samples, _ = place
    packed, settings = packed_layers(folder, METHODS[0]), FinishSettings(steps=3, batch=8, judging_share=0.25)
    first = run(place, packed, settings)
    assert first.steps > 0
    judging = []
    for number, sample in enumerate(samples):
        changed = [*samples]
        changed[number] = CalibrationSample(sample.image, sample.user, "nothing of the kind")
        model, processor = load_model(folder, "cpu")
        other = run(
            (folder, changed, reference_logits(model, processor, changed, tmp_path / "logits")), packed, settings
        )
        if other.kl_before != first.kl_before:
            judging.append(sample)
        assert any(not torch.equal(first.packed[name], tensor) for name, tensor in other.packed.items())
    assert len(judging) == 2
    assert first.kl_before == pytest.approx(mean_divergence(folder, packed, judging), rel=1e-3)


def test_too_high_a_rate_is_lowered(place):
    packed = packed_layers(place[0], METHODS[0])
    finished = run(place, packed, FinishSettings(steps=10, batch=2, learning_rate=0.3))
    assert 0 < finished.learning_rate < 0.2
    assert finished.kl_after < finished.kl_before


def test_weights_that_no_step_makes_better_stay_byte_for_byte(place):
    packed = packed_layers(place[0], METHODS[0])
    finished = run(place, packed, FinishSettings(steps=2, batch=2, learning_rate=1.0))
    assert finished.steps == 0
    assert finished.kl_after == finished.kl_before
    assert all(torch.equal(finished.packed[name], tensor) for name, tensor in packed.items())


class TestLeftovers:
    def test_they_lower_the_divergence_further_and_keep_dtype_and_shape(self, place):
        folder = place[0]
        packed = packed_layers(folder, METHODS[0])
        leftovers = leftovers_of(folder, packed)
        with_them, without = run(place, packed, leftovers=leftovers), run(place, packed)
        assert with_them.kl_after < with_them.kl_before
        assert with_them.leftovers.keys() == leftovers.keys()
        for disk_name, tensor in with_them.leftovers.items():
            assert (tensor.dtype, tensor.shape) == (torch.bfloat16, leftovers[disk_name].stored.shape)
        tuned = {leftovers[disk_name].name: tensor for disk_name, tensor in with_them.leftovers.items()}
        both = [
            sum(divergences(folder, finished.packed, calibration_samples(8, 99), numbers))
            for finished, numbers in ((with_them, tuned), (without, None))
        ]
        assert both[0] < 0.9 * both[1]

    def test_they_are_judged_by_token_as_the_report_is(self, place, tmp_path):
        folder, samples, _ = place
        packed = packed_layers(folder, METHODS[0])
        finished = run(place, packed, FinishSettings(steps=1, judging_share=0.9), leftovers_of(folder, packed))
        judging = []  # all but one
        for left_out in range(len(samples)):
            model, (full, processor) = damaged(folder, packed), load_model(folder, "cpu")
            judging = [each for number, each in enumerate(samples) if number != left_out]
            file = reference_logits(full, processor, judging, tmp_path / "logits")
            if kl_divergence(model, processor, judging, file).kl == pytest.approx(finished.kl_before, rel=1e-4):
                return
        pytest.fail(f"{finished.kl_before} is the divergence of no {len(judging)} samples")

    def test_the_first_step_goes_against_the_gradient_by_the_rate(self, place):
        """Adam's first step is the rate in the gradient's direction, here as autograd finds it in another model."""
        folder, samples, logits = place
        packed = packed_layers(folder, METHODS[0])
        leftovers = leftovers_of(folder, packed)
        settings = FinishSettings(steps=1, batch=len(samples), learning_rate=0.02)
        finished = run(place, packed, settings, leftovers)
        assert (finished.steps, finished.learning_rate) == (1, 0.02)
        model, (_, processor) = damaged(folder, packed), load_model(folder, "cpu")
        with StoredLogProbabilities(logits, len(samples)) as full:
            for number, conversation in enumerate(samples):
                reply = read_reply(model, processor, conversation)
                other = torch.log_softmax(reply_logits(model, reply), dim=-1)
                kl_by_token(full.of(number, reply), other).mean().backward()
        compared = 0
        for disk_name, leftover in leftovers.items():
            gradient, before = model.get_parameter(leftover.name).grad, leftover.stored.float()
            moved = finished.leftovers[disk_name].float() - before
            if gradient is None:  # a norm after the layer that is read
                gradient = torch.zeros_like(before)
            assert not moved[gradient == 0].any()
            unit = before.square().mean().sqrt() * (0.1 if before.dim() > 1 else 1)  # less for embedding and head
            large = unit * gradient.abs() / len(samples) > 1e-6  # far above what Adam adds to it
            if not large.any():  # zeros have no unit, and a bias of the keys has no effect
                continue
            compared += int(large.sum())
            step = 0.02 * unit
            expected = (before - step * gradient.sign()).bfloat16().float() - before
            apart = (moved - expected)[large].abs()
            # But for the few that are rounded to the other side.
            assert float((apart < 0.01 * step).float().mean()) > 0.99
            assert bool((apart <= 0.011 * step + 2**-7 * (before[large].abs() + step)).all())
        assert compared > 10_000

    def test_they_stay_where_no_step_helps(self, place):
        packed = packed_layers(place[0], METHODS[0])
        settings = FinishSettings(steps=2, batch=2, learning_rate=1.0)
        finished = run(place, packed, settings, leftovers_of(place[0], packed))
        assert (finished.steps, finished.leftovers) == (0, {})
        assert all(torch.equal(finished.packed[name], tensor) for name, tensor in packed.items())

    @pytest.mark.parametrize("by_sample", [1.0, 1.01], ids=["not above", "above"])
    def test_they_stay_where_tokens_gain_and_short_replies_lose(self, place, monkeypatch, by_sample):
        judged = iter([(1.0, 1.0), *((0.5, by_sample) for _ in range(100))])
        monkeypatch.setattr(finishing._Answers, "two_means", lambda answers, numbers: next(judged))
        packed = packed_layers(place[0], METHODS[0])
        finished = run(place, packed, FinishSettings(steps=1, batch=2), leftovers_of(place[0], packed))
        assert (finished.steps, finished.kl_after) == ((1, 0.5) if by_sample == 1.0 else (0, 1.0))

    def test_a_tied_pair_moves_as_one_under_both_names(self, tmp_path):
        folder = make_tiny_llava(tmp_path / "tied", text={"tie_word_embeddings": True}, tie_word_embeddings=True)
        weights = folder / "model.safetensors"
        tensors = load_file(weights)
        embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
        save_file({**tensors, head: tensors[embedding].clone()}, weights, metadata={"format": "pt"})
        model, processor = load_model(folder, "cpu")
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        samples = calibration_samples(4, 0)
        place = folder, samples, reference_logits(model, processor, samples, tmp_path / "logits")
        packed = packed_layers(folder, METHODS[0])
        finished = run(place, packed, FinishSettings(steps=3, batch=4), leftovers_of(folder, packed))
        assert finished.steps > 0
        assert torch.equal(finished.leftovers[embedding], finished.leftovers[head])
        assert not torch.equal(finished.leftovers[embedding], tensors[embedding])

    def test_one_that_is_not_there_is_named(self, place):
        packed = packed_layers(place[0], METHODS[0])
        with pytest.raises(InputError, match=r"no parameter called model\.nothing"):
            run(place, packed, leftovers={"nothing": Leftover("model.nothing", torch.ones(3))})


def test_a_single_conversation_cannot_judge_itself(place, tmp_path):
    folder, samples, _ = place
    model, processor = load_model(folder, "cpu")
    logits = reference_logits(model, processor, samples[:1], tmp_path / "logits")
    with pytest.raises(InputError, match="got one sample, expected at least two"):
        run((folder, samples[:1], logits), packed_layers(folder, METHODS[0]))


def test_layers_that_give_nan_fail_by_name(place):
    folder, samples, logits = place
    packed = packed_layers(folder, METHODS[0])
    model, processor = load_model(folder, "cpu")
    model.get_submodule("lm_head").weight.data[5] = float("nan")
    with (
        StoredLogProbabilities(logits, len(samples)) as full_precision,
        pytest.raises(ArithmeticError, match=rf"^model {folder}: gives NaN or infinity: the divergence .* is nan"),
    ):
        finish(model, processor, packed, samples, full_precision, SETTINGS)


def test_the_same_request_gives_the_same_bytes(place):
    packed = packed_layers(place[0], METHODS[0])
    one, other = (run(place, packed, FinishSettings(steps=4, batch=2)) for _ in range(2))
    assert all(torch.equal(one.packed[name], other.packed[name]) for name in packed)


def test_conversations_together_are_tuned_on_as_one_by_one(place):
    """Of different lengths, some without an image; the two differ by float32's rounding alone."""
    folder, samples, _ = place
    mixed = [
        *samples[:5],
        *(CalibrationSample(None, "How many sides has a cube?", text) for text in ("six", "6 of them")),
    ]
    model, processor = load_model(folder, "cpu")
    logits = reference_logits(model, processor, mixed, folder.with_name("mixed"))
    packed, settings = packed_layers(folder, METHODS[0]), FinishSettings(steps=3, batch=7)
    found = []
    for together in (1, 7):
        with StoredLogProbabilities(logits, len(mixed)) as full_precision:
            model, processor = load_model(folder, "cpu")
            found.append(finish(model, processor, packed, mixed, full_precision, settings, together=together))
    assert found[0].kl_before == pytest.approx(found[1].kl_before, rel=1e-4)
    assert found[0].steps == found[1].steps > 0
    for name, tensor in found[0].packed.items():
        one, other = unpack(tensor, name).float(), unpack(found[1].packed[name], name).float()
        assert (one - other).norm() < 0.01 * one.norm()


def test_a_layer_that_is_not_there_is_named(place):
    packed = packed_layers(place[0], METHODS[0])
    with pytest.raises(InputError, match=r"no layer called model\.nowhere"):
        run(place, {"model.nowhere": next(iter(packed.values()))})


def test_a_recipe_asks_for_it_in_a_word_or_in_full():
    recipe = {"name": "r", "format": 1, "components": {"language": METHODS[0]}}
    assert parse_recipe(recipe).finish is None
    assert parse_recipe({**recipe, "finish": "kl"}).finish == FinishSettings()
    assert parse_recipe({**recipe, "finish": {"objective": "kl", "steps": 5}}).finish.steps == 5
    assert parse_recipe({**recipe, "finish": {"leftovers": True}}).finish.leftovers
    for wrong, said in [("mse", "finish.objective"), ({"step": 1}, "finish.step"), ({"steps": 0}, "finish.steps")]:
        with pytest.raises(InputError, match=said):
            parse_recipe({**recipe, "finish": wrong})


def test_without_leftovers_a_recipe_is_written_as_before_there_were_any():
    recipe = {"name": "r", "format": 1, "components": {"language": METHODS[0]}}
    before = {"objective": "kl", "steps": 100, "batch": 8, "learning_rate": 0.01, "judging_share": 0.25, "seed": 0}
    assert parse_recipe({**recipe, "finish": "kl"}).canonical()["finish"] == before
    assert parse_recipe({**recipe, "finish": {"leftovers": False}}).canonical()["finish"] == before
    tuned = parse_recipe({**recipe, "finish": {"leftovers": True}})
    assert tuned.canonical()["finish"] == {**before, "leftovers": True}
    assert parse_recipe(tuned.canonical()) == tuned
