"""Where full precision is not above chance the set measures nothing, and a sentence says so."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.chance import AtChance, at_chance, set_of
from bivlm.evaluation.metrics import bootstrap_interval, wilson

WAY_OUT = "name its own benchmark in `evaluation`, e.g. vqa:FOLDER"


def evaluation(right, n):
    scores = [1.0] * right + [0.0] * (n - right)
    low, high = bootstrap_interval(scores, [str(number) for number in range(n)])
    return {"n": n, "metrics": {"accuracy": 100 * right / n}, "ci95": [low, high]}


def found(right, n, chance):
    return at_chance({"set": evaluation(right, n)}, {"set": chance})


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0, 100))
@settings(deadline=None, max_examples=300)
def test_a_set_is_above_chance_only_if_both_intervals_are(answered, chance):
    right, n = answered
    exact = binomtest(right, n).proportion_ci(0.95, "wilson").low
    above = min(100 * exact, evaluation(right, n)["ci95"][0]) > chance
    if abs(100 * exact - chance) > 1e-6:
        assert (found(right, n, chance) == []) == above


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None)
def test_wilsons_interval_is_that_of_scipy(answered):
    right, n = answered
    expected = binomtest(right, n).proportion_ci(0.95, "wilson")
    assert wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.slow
def test_a_guessing_model_is_called_above_chance_about_as_seldom_as_the_interval_says():
    random = np.random.default_rng(0)
    right = random.binomial(250, 0.25, size=400)
    assert sum(found(int(k), 250, 25.0) == [] for k in right) / 400 < 0.05


@pytest.mark.parametrize("chance", [None, 0.0, 25.0, 100.0])
def test_nothing_right_is_at_chance_whatever_is_known_of_it(chance):
    (each,) = found(0, 12, chance)
    level = "chance is unknown" if chance is None else f"chance is {chance:.1f} %"
    assert str(each) == (
        f"set: full precision scores 0.0 %, {level}: these questions do not measure this model; {WAY_OUT}"
    )


def test_of_a_folder_of_questions_no_other_folder_is_advised():
    said = str(AtChance(task="vqa:/data", n=20, accuracy=0, chance=5))
    assert said.endswith("do not measure this model; check their answers and the chat template, or ask others")
    assert set_of(said) == "vqa:/data"


def test_few_questions_cannot_tell():
    (each,) = found(3, 5, 50.0)
    assert str(each) == (
        "set: full precision scores 60.0 %, chance is 50.0 %: 5 questions cannot tell them apart; ask more of them, "
        f"or {WAY_OUT}"
    )
    assert found(1200, 2000, 50.0) == []
    assert found(4, 4, None) == []


def test_sets_keep_their_order_and_the_model_its_name():
    sets = {"b": evaluation(0, 9), "good": evaluation(9, 9), "a": evaluation(0, 9)}
    assert [each.task for each in at_chance(sets, {"a": 10.0}, "the other one")] == ["b", "a"]
    assert all("the other one scores" in str(each) for each in at_chance(sets, {}, "the other one"))


@pytest.mark.parametrize("task", ["reference:open", "vqa:/data/full precision scores/q", "vqa:a: b"])
def test_a_warning_is_known_by_its_sentence_and_leads_to_its_set(task):
    for accuracy in (0.0, 60.0):
        assert set_of(str(AtChance(task=task, n=5, accuracy=accuracy, chance=50.0))) == task
    assert set_of("2 layers saw no token and were quantized by their weights alone: a, b") is None


@pytest.mark.parametrize(
    ("lines", "chance"),
    [
        ([{"answers": ["yes"]}, {"answers": ["Yes."]}, {"answers": ["no"]}, {"answers": ["no", "yes"]}], 75.0),
        ([{"answers": ["red", "RED"]}, {"answers": ["blue"]}, {"answers": ["two"]}], 100 / 3),
        ([{"answers": ["A"], "choices": ["x", "y"]}, {"answers": ["B"], "choices": ["x", "y", "z", "w"]}], 37.5),
        ([{"answers": ["A"], "choices": ["x", "y"]}, {"answers": ["red"]}, {"answers": ["red"]}], 100 * 2.5 / 3),
    ],
)
def test_a_folders_chance_is_a_random_letter_or_the_best_constant_answer(tmp_path, lines, chance):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    written = [{"image": "1.png", "question": "What?", **line} for line in lines]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    assert load_benchmark(f"vqa:{tmp_path}").chance() == pytest.approx(chance)
