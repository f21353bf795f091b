"""The few functions of the package itself: what their docstrings show is so, and type checkers see them."""

import ast
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bivlm
from bivlm.checkpoint.reading import Checkpoint
from bivlm.compression.model import compress_model, pack_layer
from bivlm.errors import InputError
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.packing import unpack
from bivlm.recipe.loading import load_recipe, parse_recipe
from bivlm.reference import CHECKPOINT

NAME = "language_model.model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("name", bivlm.__all__)
def test_a_docstring_example_is_so(name):
    function = getattr(bivlm, name)
    module = sys.modules[function.__module__]
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, module, vars(module).copy())
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_all_that_is_there_is_seen_by_type_checkers():
    (block,) = [node for node in ast.parse(inspect.getsource(bivlm)).body if isinstance(node, ast.If)]
    imported = {alias.asname or alias.name for node in block.body for alias in node.names}
    assert imported == set(bivlm.__all__) <= set(dir(bivlm))
    with pytest.raises(AttributeError, match="nothing_of_it"):
        bivlm.nothing_of_it  # noqa: B018


@pytest.mark.parametrize(
    "order",
    [
        "import bivlm, transformers.quantizers.auto",
        pytest.param("import transformers.quantizers.auto, bivlm", marks=pytest.mark.slow),
        "from transformers.core_model_loading import ConversionOps; import bivlm; import transformers.quantizers",
    ],
)
def test_the_format_is_registered_whatever_is_imported_first(order):
    asked = "from transformers.quantizers import auto; print('bivlm' in auto.AUTO_QUANTIZER_MAPPING)"
    done = subprocess.run([sys.executable, "-c", f"{order}; {asked}"], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_importing_the_package_imports_neither_torch_nor_transformers():
    asked = "import sys, bivlm; print({'torch', 'transformers', 'numpy', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_layer_is_packed_as_its_settings_say():
    weight = Checkpoint.open(CHECKPOINT).read(NAME)
    packed, record = pack_layer(weight, load_recipe("bivlm").components["language"], NAME)
    rebuilt = unpack(packed).float()
    assert record.bits.stored == 8 * packed.numel() / weight.numel()
    assert record.error == pytest.approx(float(((weight.float() - rebuilt) ** 2).sum() / (weight.float() ** 2).sum()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "w: settings: expected the name of a method at 'method'"),
        ({"method": "nonesuch"}, "method 'nonesuch' is not known"),
        ({"method": "rtn", "bits": 5, "group_size": 4}, "w: settings of rtn: bits: "),
        ({"method": "gptq", "bits": 2, "group_size": 4}, "w: the method gptq looks at a layer's inputs"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        pack_layer(torch.randn(8, 8), settings, "w")


def test_a_method_that_looks_at_inputs_takes_their_statistics():
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    statistics = SiteStatistics(inputs.T @ inputs / 64, inputs.mean(0), inputs.abs().mean(0), {"text": 64})
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    _, record = pack_layer(weight, {"method": "gptq", "bits": 2, "group_size": 8}, inputs=statistics)
    assert 0 < record.output_error < 1


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"finish": "kl"}, "recipe small: finish: needs calibration samples; run `bivlm compress`"),
        ({"budget": 2.0}, "recipe small: budget.importance: curvature needs calibration samples"),
        (
            {"components": {"language": {"method": "gptq", "bits": 2, "group_size": 64}}},
            "recipe small: components.language: gptq looks at a layer's inputs",
        ),
    ],
)
def test_a_recipe_that_needs_calibration_is_refused(further, message, tmp_path):
    method = {"method": "bivlm", "groups": 2, "p_max": 0.05}
    recipe = parse_recipe({"name": "small", "format": 1, "components": {"language": method}} | further)
    with pytest.raises(InputError, match=message):
        compress_model(CHECKPOINT, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_budget_is_kept(tiny_llava: Path, tmp_path):
    method = {"method": "bivlm", "groups": 2, "p_max": 0.05}
    components = {component: dict(method) for component in ("vision", "adaptor", "language")}
    budget = {"bits": 2.6, "importance": "energy"}
    recipe = parse_recipe({"name": "b", "format": 1, "components": components, "budget": budget})
    records = compress_model(tiny_llava, recipe, tmp_path / "out")
    bits = bivlm.measure_bits(tmp_path / "out")["linears"]
    assert 2.3 < 8 * sum(record.nbytes for record in records.values()) / bits["weights"] <= 2.6


def test_what_was_published_by_earlier_names_is_found():
    """As the code of models registered by version 0.1.0, and the cards of pushed models, import it."""
    from bivlm.checkpoint import transformers_plugin
    from bivlm.evaluation import generation, load_model
    from bivlm.pictures import decode_picture
    from bivlm.samples import VqaSample
    from bivlm.sources import images, samples
    from bivlm.transformers_plugin import BiVLMConfig

    assert load_model is generation.load_model and decode_picture is images.decode_image
    assert VqaSample is samples.VqaSample and BiVLMConfig is transformers_plugin.BiVLMConfig
