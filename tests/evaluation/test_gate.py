"""A gate's decision: every bound with the figure found, and nothing passed that was not measured."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bivlm.errors import InputError
from bivlm.evaluation.chance import AtChance
from bivlm.evaluation.gate import Figures, decide
from bivlm.evaluation.paired import LargestLoss
from bivlm.recipe.gate import GateSettings
from bivlm.recipe.loading import load_recipe, parse_recipe, shipped_recipes
from bivlm.workspace.hashing import digest

METHOD = {"method": "bivlm", "groups": 2, "p_max": 0.05}
RECIPE = {"name": "gated", "format": 1, "components": {"language": METHOD}, "evaluation": ["vqa:/q", "reference:open"]}


def loss(loss=1.0, largest=1.5, n=1000, confidence=0.95, fell=20.0, rose=10.0):
    return LargestLoss(n, loss, largest, confidence, fell, rose)


def figures(linears=2.0, whole_model=4.0, **losses):
    return Figures(linears, whole_model, losses or None)


def gate(**sections):
    return GateSettings.model_validate(sections)


def test_what_is_within_every_bound_passes_and_every_bound_is_named():
    bounds = gate(accuracy={"largest_loss": 2.0}, bits={"linears": 2.25, "whole_model": 4.0})
    decision = decide(bounds, figures(2.164, 4.0, open=loss(1.0, 1.5)))
    assert decision.passed and decision.refused_by == ()
    assert decision.reasons == (
        "accuracy on open: 1.00 points lost on 1,000 questions, with 95 % confidence at most 1.50: within the 2 that "
        "may be lost",
        "stored bits in the linears: 2.164: within the bound of 2.25",
        "stored bits in the whole model: 4.000: within the bound of 4",
    )


@pytest.mark.parametrize(
    ("bounds", "found", "said"),
    [
        (
            {"bits": {"linears": 2.25}},
            figures(2.8111),
            "stored bits in the linears: 2.811: more than the bound of 2.25",
        ),
        ({"bits": {"linears": 2.25}}, figures(2.2500004), "stored bits in the linears: 2.2500004: more than the"),
        ({"bits": {"whole_model": 3.0}}, figures(2, 3.5), "stored bits in the whole model: 3.500: more than the bound"),
        (
            {"accuracy": {"largest_loss": 2.0}},
            figures(open=loss(3.0, 4.25)),
            "accuracy on open: 3.00 points lost on 1,000 questions, with 95 % confidence at most 4.25: more than the 2 "
            "that may be lost",
        ),
        ({"accuracy": {"largest_loss": 2.0}}, figures(), "accuracy: nothing was evaluated; at most 2 points may be"),
        (
            {"accuracy": {"largest_loss": 2.0, "benchmarks": ["choice"]}},
            figures(open=loss()),
            "accuracy on choice: not measured; at most 2 points may be lost",
        ),
        (
            {"accuracy": {"largest_loss": 2.0, "confidence": 0.99}},
            figures(open=loss()),
            "accuracy on open: not measured with 99 % confidence; at most 2",
        ),
    ],
)
def test_what_is_beyond_a_bound_or_was_not_measured_is_refused_by_name(bounds, found, said):
    decision = decide(gate(**bounds), found)
    assert not decision.passed
    (reason,) = decision.refused_by
    assert reason.startswith(said)


def test_too_few_questions_do_not_pass_and_the_reason_says_how_many_would_do():
    """Rule of three: without one change it takes about 3 / 0.02 questions to exclude a loss of 2 points."""
    few = loss(0.0, 100 * (1 - 0.05 ** (1 / 4)), n=4, fell=0.0, rose=0.0)
    decision = decide(gate(accuracy={"largest_loss": 2.0}), figures(open=few))
    assert not decision.passed
    (reason,) = decision.refused_by
    assert reason.endswith("52.71: more than the 2 that may be lost; too few questions to tell: answered alike, about "
                           "150 would do")  # fmt: skip


def test_a_set_on_which_full_precision_is_at_chance_is_refused_if_the_gate_rests_on_it():
    """Nothing was lost on it, and nothing could be."""
    nothing = AtChance(task="open", n=1000, accuracy=0.0, chance=26.1)
    found = replace(figures(open=loss(0.0, 0.5, fell=0.0), choice=loss()), at_chance=[nothing])
    decision = decide(gate(accuracy={"largest_loss": 2.0}), found)
    assert decision.refused_by == (f"accuracy on {nothing}",)
    assert "full precision scores 0.0 %, chance is 26.1 %: these questions do not measure" in decision.refused_by[0]
    assert decide(gate(accuracy={"largest_loss": 2.0, "benchmarks": ["choice"]}), found).passed
    assert decide(gate(bits={"linears": 3.0}), found).passed


def test_only_the_benchmarks_that_are_named_count():
    bounds = gate(accuracy={"largest_loss": 2.0, "benchmarks": ["open"]})
    assert decide(bounds, figures(open=loss(), choice=loss(30, 40))).passed
    assert not decide(gate(accuracy={"largest_loss": 2.0}), figures(open=loss(), choice=loss(30, 40))).passed


numbers = st.floats(0, 20, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), numbers, st.tuples(numbers, numbers))
def test_a_gate_passes_exactly_when_every_bound_is_kept(losses, bound, bits):
    measured = {f"set{place}": loss(low, low + more) for place, (low, more) in enumerate(losses)}
    bounds = gate(accuracy={"largest_loss": bound}, bits={"linears": bits[0] + 0.001})
    decision = decide(bounds, figures(bits[1], 3.0, **measured))
    kept = [found.largest <= bound for found in measured.values()] + [bits[1] <= bits[0] + 0.001]
    assert decision.passed == all(kept)
    assert len(decision.reasons) == len(kept)
    assert len(decision.refused_by) == kept.count(False)


@pytest.mark.parametrize(
    ("given_gate", "message"),
    [
        ({}, "gate: Value error, expected accuracy, bits, or both"),
        ({"bits": {}}, "gate.bits: Value error, expected linears, whole_model, or both"),
        ({"bits": {"linears": 0}}, "gate.bits.linears: Input should be greater than 0, found 0"),
        ({"bits": {"linears": "2"}}, "gate.bits.linears: Input should be a valid number, found '2'"),
        ({"bits": {"all": 2}}, "gate.bits.all: not a key that is known here"),
        ({"accuracy": {}}, "gate.accuracy.largest_loss: the key is missing"),
        ({"accuracy": {"largest_loss": -1}}, "gate.accuracy.largest_loss: Input should be greater than or equal to 0"),
        ({"accuracy": {"largest_loss": 1, "confidence": 95}}, "gate.accuracy.confidence: Input should be less than"),
        ({"accuracy": {"largest_loss": 1, "benchmarks": []}}, "gate.accuracy.benchmarks: Tuple should have at least 1"),
        (
            {"accuracy": {"largest_loss": 1, "benchmarks": ["vqa:/x"]}},
            "gate: Value error, accuracy.benchmarks: vqa:/x: not in the recipe's evaluation; expected some of vqa:/q, "
            "reference:open",
        ),
    ],
)
def test_a_gate_that_cannot_be_is_refused_by_the_path_of_its_key(given_gate, message):
    with pytest.raises(InputError) as refused:
        parse_recipe(RECIPE | {"gate": given_gate})
    assert message in str(refused.value)


def test_an_accuracy_bound_takes_an_evaluation():
    with pytest.raises(InputError, match=r"gate: .*expected benchmarks in the recipe's evaluation"):
        parse_recipe(RECIPE | {"evaluation": [], "gate": {"accuracy": {"largest_loss": 1}}})
    assert parse_recipe(RECIPE | {"evaluation": [], "gate": {"bits": {"linears": 2.25}}}).gate.bits.linears == 2.25


def test_a_gate_is_part_of_the_recipe_and_a_recipe_without_one_is_what_it_was():
    """The digest of a recipe of before there were gates, as it was then: recorded runs are found again by it."""
    without = parse_recipe(RECIPE)
    assert "gate" not in without.canonical()
    of_then = {
        "bivlm": "e8cbb867ed4d8c3d038bab9ead568bcde68e740a40e096337dd2231ee62000b1",
        "gptq-w2g64": "99f964436ec87dc0419285ec28c2892ee330becdf3d76c4d686aa7335ad80b59",
    }
    assert {name: digest(load_recipe(name).canonical()) for name in of_then} == of_then
    gated = parse_recipe(RECIPE | {"gate": {"bits": {"linears": 2}}})
    assert gated.canonical()["gate"] == {"accuracy": None, "bits": {"linears": 2.0, "whole_model": None}}
    assert parse_recipe(gated.canonical()) == gated
    assert digest(gated.canonical()) != digest(without.canonical())


def test_no_shipped_recipe_promotes_by_itself():
    assert all(load_recipe(name).gate is None for name in shipped_recipes())
