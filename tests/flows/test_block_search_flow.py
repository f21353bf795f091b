"""Compressions whose settings are chosen by what blocks give."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from bivlm.calibration.blocks.encoded import SampleTensors, model_inputs
from bivlm.errors import InputError
from bivlm.recipe.loading import parse_recipe
from bivlm.reports.lineage import SEARCH_STAGE as STAGE
from bivlm.reports.lineage import Lineage, read_lineage, verify
from bivlm.workspace.steps import Reference, Workspace

RTN = {"method": "rtn", "bits": 2, "group_size": 32}
INPUTS = ("full_precision", "quantized")
ADAPTOR, LAST = "model.multi_modal_projector", "model.language_model.layers.1"
SEARCH = {"candidates": {"clip": [1.0, 0.7]}, "samples": 2}


def searching(compression, method=RTN, inputs="full_precision", **changes):
    """The compression of all components by one method, with a search."""
    compression.recipe |= {
        "name": "searching",
        "components": dict.fromkeys(("vision", "adaptor", "language"), method),
        "search": SEARCH | changes,
    }
    compression.recipe["calibration"] |= {"inputs": inputs}
    return compression


def findings(compression, lineage=None):
    lineage = lineage or read_lineage(compression.output)
    return {
        each.subject: each.state for each in verify(lineage, compression.output, Workspace.open(compression.workspace))
    }


@pytest.fixture(scope="module")
def searched(new_compression, tmp_path_factory):
    """The tiny model compressed once for each kind of inputs; look, do not touch."""
    found = {inputs: searching(new_compression(tmp_path_factory.mktemp(inputs)), inputs=inputs) for inputs in INPUTS}
    for compression in found.values():
        assert compression.run(evaluate=False)["calibrated"]
    return found


@pytest.mark.parametrize("inputs", INPUTS)
def test_layers_are_packed_as_the_search_chose_and_every_link_holds(searched, inputs):
    compression = searched[inputs]
    assert set(findings(compression).values()) == {"holds"}
    (formed,) = compression.steps("joint blocks")
    steps, chosen = compression.steps(STAGE), {}
    assert sorted(step["figures"]["units"] for step in steps) == sorted(formed["figures"]["groups"])
    for step in steps:
        figures = step["figures"]
        assert figures["samples"] == 2
        assert 0 < figures["error_after"] <= figures["error_before"]
        # What the next group goes on from is kept only where it is needed.
        assert len(step["outputs"]) == (len(figures["units"]) if inputs == "quantized" else 0)
        chosen |= {name: settings["clip"] for name, settings in figures["settings"].items()}
    assert {layer["name"]: layer["clip"] for layer in compression.report()["layers"]} == chosen
    assert set(chosen.values()) == {1.0, 0.7}


def test_a_plan_with_settings_that_no_step_chose_is_found(searched):
    compression = searched["full_precision"]
    record = json.loads((compression.output / "lineage.json").read_text())
    for step in record["steps"].values():
        for settings in step["figures"].get("settings", {}).values():
            settings["clip"] = 0.9
    assert findings(compression, Lineage.model_validate(record))["recipe"] == "broken"


def test_behind_quantized_blocks_a_group_sees_what_they_give(searched):
    """The first group sees the same images, the adaptor what was made of them."""
    errors = {
        inputs: {step["figures"]["units"][0]: step["figures"]["error_before"] for step in compression.steps(STAGE)}
        for inputs, compression in searched.items()
    }
    first = searched["quantized"].steps("joint blocks")[0]["figures"]["groups"][0][0]
    assert errors["quantized"][first] == errors["full_precision"][first]
    assert errors["quantized"][ADAPTOR] != errors["full_precision"][ADAPTOR]


def test_the_outputs_that_were_searched_on_are_those_of_the_packed_model(searched):
    compression = searched["quantized"]
    store = Workspace.open(compression.workspace)

    def tensors(step, file):
        return SampleTensors(store.fetch(Reference(**step["outputs"][file])))

    (encoded,) = compression.steps("model inputs")
    samples = tensors(encoded, "samples.safetensors")
    (last,) = [step for step in compression.steps(STAGE) if LAST in step["figures"]["units"]]
    outputs = tensors(last, f"{LAST}.safetensors")
    model, found = AutoModelForImageTextToText.from_pretrained(compression.output, dtype=torch.float32).eval(), []
    model.get_submodule(LAST).register_forward_hook(lambda _module, _arguments, output: found.append(output))
    for number in range(len(outputs)):
        with torch.no_grad():
            model(**model_inputs(samples[number]), use_cache=False)
        assert torch.equal(found[number], outputs[number]["output"])


@pytest.mark.slow
@pytest.mark.parametrize("inputs", INPUTS)
def test_a_search_goes_on_at_the_group_where_it_was(new_compression, tmp_path, monkeypatch, inputs):
    from tasks import block_search

    compression = searching(new_compression(tmp_path), inputs=inputs, depth=1)
    real, searched = block_search.search_group, []

    def failing(model, units, *arguments):
        searched.append(units[0].name)
        if len(searched) == 2:
            raise RuntimeError("the power is gone")
        return real(model, units, *arguments)

    monkeypatch.setattr(block_search, "search_group", failing)
    with pytest.raises(RuntimeError, match="the power is gone"):
        compression.run(evaluate=False)
    compression.run(evaluate=False)
    groups = list(dict.fromkeys(searched))
    assert len(groups) == 5
    assert searched == [*groups[:2], *groups[1:]]
    compression.run(evaluate=False)
    assert len(searched) == 6


@pytest.mark.slow
def test_larger_salient_shares_than_the_recipe_started_with_can_be_chosen(new_compression, tmp_path):
    method = {"method": "bivlm", "groups": 2, "p_max": 0.01}
    compression = searching(new_compression(tmp_path), method, candidates={"p_max": [0.0, 0.1], "refit": [True]})
    compression.run(evaluate=False)
    assert findings(compression)["recipe"] == "holds"
    assert max(layer["p_sal_nominal"] for layer in compression.report()["layers"]) > 0.05


def test_a_component_without_layers_is_not_searched(new_compression, tmp_path):
    compression = searching(new_compression(tmp_path))
    del compression.recipe["components"]["vision"]
    compression.run(evaluate=False)
    units = [unit for step in compression.steps(STAGE) for unit in step["figures"]["units"]]
    assert units
    assert not [unit for unit in units if "vision" in unit]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 2.5}, r"search: .*a budget chooses settings already; expected one of budget and search"),
        (
            {"components": {"vision": {"method": "bivlm", "groups": 2, "p_max": 0.05}}},
            r"search: .*candidates\.clip: no setting of the method 'bivlm'; expected one of groups, p_max",
        ),
        ({"search": {"candidates": {"method": ["rtn"]}}}, r"candidates\.method: no setting of the method 'rtn'"),
        ({"search": {"candidates": {"clip": [0.9, 1.5]}}}, r"candidates\.clip: .*less than or equal to 1, found 1\.5"),
        ({"search": {"candidates": {"bits": [2, 5]}}}, r"candidates\.bits: .*found 5"),
        ({"search": {"candidates": {"clip": []}}}, r"search\.candidates\.clip: .*at least 1 item"),
        ({"search": {"candidates": {"clip": 0.9}}}, r"search\.candidates: .*expected lists of values by setting"),
        ({"search": {"candidates": {}}}, r"search\.candidates: .*at least 1 item"),
        ({"search": {}}, r"search\.candidates: the key is missing"),
        ({"search": SEARCH | {"depth": 0}}, r"search\.depth: .*greater than or equal to 1, found 0"),
        ({"search": SEARCH | {"objective": "layer_output"}}, r"search\.objective: .*'block_output', found"),
        (
            {
                "components": {"language": {"method": "gptq"}},
                "search": {"candidates": {"group_size": [32, 64]}},
            },
            r"search: .*the method 'gptq' of language looks at inputs, .*expected methods that see weights alone",
        ),
        (
            {
                "components": {"language": {"method": "bivlm", "groups": 2, "p_max": 0.05}},
                "search": {"candidates": {"feedback": [False, True]}},
            },
            r"search: .*the method 'bivlm' of language looks at inputs",
        ),
    ],
)
def test_a_search_that_cannot_be_is_refused_by_its_key_and_by_nothing_else(changes, message):
    recipe = {"name": "mine", "format": 1, "components": {"vision": RTN}, "search": SEARCH}
    with pytest.raises(InputError, match=message) as refused:
        parse_recipe(recipe | changes)
    assert len(str(refused.value).splitlines()) == 2


def test_a_search_is_canonical_with_every_default():
    recipe = parse_recipe({"name": "mine", "format": 1, "components": {"vision": RTN}, "search": SEARCH})
    assert recipe.canonical()["search"] == {
        "objective": "block_output",
        "candidates": {"clip": [1.0, 0.7]},
        "depth": 3,
        "rounds": 1,
        "samples": 2,
    }
    assert parse_recipe(json.loads(json.dumps(recipe.canonical()))) == recipe
