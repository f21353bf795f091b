"""What a run's page compares it with."""

import pytest
from tiny_llava import make_tiny_llava

from bivlm.recipe.loading import load_recipe
from tasks.checkpoint import resolve_base
from tasks.report import points_for_figures

REPORT = {"bits": {"linears": {"stored": 2.0}}}
EVALUATION = {"kl": 0.1, **{role: {"a": {"metrics": {"accuracy": 50.0}}} for role in ("full_precision", "packed")}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return resolve_base.fn(str(make_tiny_llava(folder / "model")), None, str(folder / "output"))


def other(bits, label=None):
    return {"label": label or f"at {bits}", "stored_bits": bits, "kl": 1.0, "accuracy": {"a": 1.0}}


def labels(base, others, evaluation=EVALUATION):
    return [point["label"] for point in points_for_figures(base, load_recipe("bivlm"), REPORT, evaluation, others)]


def test_others_stand_between_full_precision_and_this_run(base):
    points = points_for_figures(base, load_recipe("bivlm"), REPORT, EVALUATION, [other(3.0)])
    assert [(point["label"], point["stored_bits"]) for point in points] == [
        ("full precision", 16.0),
        ("at 3.0", 3.0),
        ("bivlm", 2.0),
    ]


def test_of_many_others_the_eight_nearest_in_bits_are_shown_in_their_order(base):
    """Around 2.0: 1.6 to 2.5 without 2.0 are nine; of the two that are farthest, 2.5 is dropped."""
    others = [other(bits / 10) for bits in (40, 16, 25, 17, 24, 18, 23, 19, 22, 21, 10)]
    assert labels(base, others)[1:-1] == [f"at {bits / 10}" for bits in (16, 17, 24, 18, 23, 19, 22, 21)]


def test_an_earlier_run_of_the_same_recipe_is_not_shown_beside_this_one(base):
    assert labels(base, [other(2.1, "bivlm"), other(2.2)]) == ["full precision", "at 2.2", "bivlm"]


def test_without_an_evaluation_there_is_nothing_to_compare(base):
    assert labels(base, [other(3.0)], None) == []
