"""Recipes are read strictly: what is wrong is named, what is accepted means what was written."""

import copy
import math

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bivlm.errors import InputError
from bivlm.recipe.loading import default_recipe, load_recipe, parse_recipe, shipped_recipes

VALID = {
    "name": "mine",
    "format": 1,
    "components": {
        "vision": {
            "method": "bivlm",
            "groups": 2,
            "p_max": 0.05,
            "salient_bits": 2,
            "alpha": 1.4,
            "iterations": 10,
            "refit": True,
            "objective": "error",
        },
        "language": {"method": "bivlm", "groups": 5, "p_max": 0.01},
    },
    "keep": ["lm_head"],
    "calibration": {
        "source": "hf:maker/images",
        "samples": 64,
        "held_out": 64,
        "seed": 0,
        "revision": "0123abc",
        "split": "test",
        "image_column": "image",
        "text_column": "caption",
        "instruction": "What is it?",
        "text_share": 0.25,
        "text_source": "hf:maker/text",
        "text_split": "train",
        "tokens": {"weights": "modality", "image": 0.1},
        "inputs": "quantized",
    },
    "evaluation": ["reference:open"],
}
PLACES = [
    ("name",),
    ("format",),
    ("components",),
    ("components", "vision"),
    *((("components", "vision", key)) for key in VALID["components"]["vision"]),
    ("keep",),
    ("calibration",),
    *(("calibration", key) for key in VALID["calibration"]),
    ("evaluation",),
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([10**30, -(10**30)])
    | st.floats()
    | st.sampled_from([0.05, 0.5, 0.5000001, 1e-300, 5e-324])
    | st.text(max_size=8)
    | st.sampled_from(["bivlm", "error", "rate", "vision", "reference:open", "re:(", "on", "1e3", "a" * 101]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=5,
)


def changed(place, operation, value, key):
    """A valid recipe with one thing replaced, left out, or added beside it."""
    recipe = copy.deepcopy(VALID)
    *path, last = place
    target = recipe
    for step in path:
        target = target[step]
    if operation == "replace":
        target[last] = value
        return recipe, last
    if operation == "remove":
        del target[last]
        return recipe, last
    target[key] = value
    return recipe, key


def contains(canonical, given):
    """Whether every value that was given stands in the canonical recipe, equal and of the same kind."""
    if isinstance(given, dict):
        return isinstance(canonical, dict) and all(contains(canonical.get(key), given[key]) for key in given)
    if isinstance(given, list):
        return len(canonical) == len(given) and all(map(contains, canonical, given))
    return canonical == given and isinstance(canonical, str) == isinstance(given, str)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    place=st.sampled_from(PLACES),
    operation=st.sampled_from(["replace", "remove", "add"]),
    value=VALUES,
    key=st.text(max_size=6) | st.integers(0, 3) | st.sampled_from(["Groups", "p_sal", "language", "audio"]),
)
def test_a_thousand_wrong_recipes_are_refused_by_name_or_mean_what_they_say(place, operation, value, key):
    recipe, where = changed(place, operation, value, key)
    try:
        accepted = parse_recipe(recipe, "recipe mine.yaml")
    except InputError as error:
        message = str(error)
        assert message.startswith("recipe mine.yaml is not valid:")
        # The key itself, or the component whose settings it belongs to.
        assert str(where) in message or ".".join(map(str, place[:-1])) in message
    else:
        canonical = accepted.canonical()
        assert contains(canonical, recipe)
        assert parse_recipe(canonical) == accepted
        vision = canonical["components"].get("vision")
        assert vision is None or (1 <= vision["groups"] <= 16 and 0 <= vision["p_max"] <= 0.5)
        assert vision is None or math.isfinite(vision["alpha"])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | VALUES.map(lambda value: yaml.safe_dump(value).encode()))
def test_any_file_is_a_recipe_or_refused_by_its_name(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"recipe .*any\.yaml"):
        load_recipe(path)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_bears_its_name_and_is_canonical(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(recipe.canonical()) == recipe


@pytest.mark.parametrize("source", ["reference", "/data/mine", "hf:maker/images"])
def test_samples_are_taken_from_elsewhere_as_many_as_before(source):
    drawn = {"source": "hf:maker/others", "split": "train", "samples": 7, "seed": 3, "inputs": "quantized"}
    other = parse_recipe(VALID | {"calibration": drawn}).calibrated_on(source)
    kept = {"samples": 7, "seed": 3, "inputs": "quantized"}
    assert other == parse_recipe(VALID | {"calibration": kept | {"source": source}})


def test_samples_from_nowhere_are_refused():
    with pytest.raises(InputError, match=r"(?s)recipe bivlm .*calibration\.source: .*expected hf:OWNER/NAME"):
        load_recipe("bivlm").calibrated_on("hf:")


def test_the_default_looks_at_samples_if_there_are_any():
    with_samples, without = (load_recipe(default_recipe(source)) for source in ("/data/mine", None))
    assert {each.feedback for each in with_samples.components.values()} == {"both"}
    assert {each.feedback for each in without.components.values()} == {"none"}


def test_a_name_that_is_neither_shipped_nor_a_file_is_refused_with_those_that_are():
    with pytest.raises(InputError, match=r"'bivlm2': no such file, and not one of .*bivlm, bivlm-1bit"):
        load_recipe("bivlm2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 17}, r"components\.vision\.groups: .* less than or equal to 16, found 17"),
        ({"group": 2}, r"components\.vision\.group: not a key that is known here, found 2"),
        ({"method": "gptq3"}, r"components\.vision: .*gptq3"),
        ({"objective": "speed"}, r"components\.vision\.objective: .*'error' or 'rate', found 'speed'"),
    ],
)
def test_the_message_gives_path_value_and_valid_form(change, message):
    recipe = copy.deepcopy(VALID)
    recipe["components"]["vision"].update(change)
    with pytest.raises(InputError, match=message):
        parse_recipe(recipe)


FOLDER = {"source": "/data/mine"}
HUB = {"source": "hf:maker/images"}


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (FOLDER | {"text_column": "caption"}, r"text_column: .*only with a source of the form hf:.*found 'caption'"),
        (FOLDER | {"split": "train"}, r"split: .*source is '/data/mine', found 'train'"),
        (FOLDER | {"revision": "abc"}, r"revision: .*only with a source of the form hf:"),
        (FOLDER | {"instruction": "Look."}, r"instruction: .*only with a source of the form hf:"),
        ({"images": "/data/images"}, r"images: .*'reference' draws its images.* found '/data/images'"),
        (HUB | {"text_column": "a", "conversation_column": "b"}, r"conversation_column: .*expected one of the two"),
        (HUB | {"conversation_column": "b", "instruction": "Look."}, r"instruction: .*a user's turn of its own"),
        ({"source": "hf:"}, r"source: .*expected hf:OWNER/NAME or hf:FOLDER, found 'hf:'"),
        ({"text_share": 0.25}, r"text_source: .*text_share is 0.25: expected reference, .*found None"),
        ({"text_source": "reference"}, r"text_source: .*text_share is 0: expected a share above 0"),
        ({"text_share": 1.0, "text_source": "reference"}, r"text_share: .*less than 1, found 1.0"),
        ({"text_share": 0.5, "text_source": "/data/texts"}, r"text_source: .*expected reference, a \.jsonl or \.json"),
        ({"text_share": 0.5, "text_source": "reference", "text_split": "a"}, r"text_split: .*only with a text_source"),
        ({"samples": 0}, r"samples: .*greater than or equal to 1, found 0"),
        ({"held_out": 0}, r"held_out: .*greater than or equal to 1, found 0"),
        ({"tokens": {"weights": "attention"}}, r"tokens\.weights: .*found 'attention'"),
        ({"tokens": {"image": 0.0}}, r"tokens\.image: .*greater than 0, found 0.0"),
        ({"tokens": {"shrink": 1.5}}, r"tokens\.shrink: .*less than or equal to 1, found 1.5"),
        ({"inputs": "both"}, r"inputs: .*'full_precision' or 'quantized', found 'both'"),
    ],
)
def test_calibration_that_cannot_be_is_refused_by_its_key_and_by_nothing_else(calibration, message):
    with pytest.raises(InputError, match=rf"calibration\.{message}") as refused:
        parse_recipe(VALID | {"calibration": calibration})
    assert len(str(refused.value).splitlines()) == 2


def test_the_samples_are_determined_by_their_source_alone():
    recipe = parse_recipe(VALID)
    weighed = parse_recipe(VALID | {"calibration": VALID["calibration"] | {"tokens": {}, "inputs": "full_precision"}})
    other = parse_recipe(VALID | {"calibration": VALID["calibration"] | {"held_out": 65}})
    assert recipe.calibration != weighed.calibration
    assert recipe.calibration.selection() == weighed.calibration.selection() != other.calibration.selection()


@pytest.mark.parametrize("key", ["keep", "evaluation"])
def test_a_name_alone_is_no_list(key):
    with pytest.raises(InputError, match=f"{key}: .*expected a list of names, found 'lm_head'"):
        parse_recipe(VALID | {key: "lm_head"})


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    (tmp_path / "twice.yaml").write_text("name: twice\nformat: 1\nformat: 1\n")
    with pytest.raises(InputError, match="the key 'format' is given twice"):
        load_recipe(tmp_path / "twice.yaml")


def test_more_combinations_than_could_be_tried_are_refused():
    values = [1.0] * 100
    search = {"candidates": {"clip": values, "p_max": values, "groups": values, "alpha": values}}
    recipe = {"name": "r", "format": 1, "components": {"vision": {"method": "bivlm"}}, "search": search}
    with pytest.raises(InputError, match=r"search.candidates: .*at most 10,000 combinations of values, found 1000"):
        parse_recipe(recipe)


def test_of_many_mistakes_the_first_twenty_are_listed():
    recipe = {"name": "r", "format": 1, "components": {"vision": {"method": "bivlm"}}, "evaluation": [1] * 1000}
    with pytest.raises(InputError, match=r"evaluation\.1\d: .*\n  and 98\d more$"):
        parse_recipe(recipe)
