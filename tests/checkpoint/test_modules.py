"""An architecture that bivlm has no file for: refused with what it has, or named by a recipe."""

import json

import pytest
import torch
from raw_codec import pack_linears, top_bytes
from tiny_families import IMAGE, TEXT, TOWER
from torch import nn
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, VipLlavaConfig

from bivlm.calibration.blocks.model import BlockwiseModel
from bivlm.checkpoint.architectures import Architecture, parse_modules
from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.transformers_plugin import BiVLMConfig
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.errors import InputError
from bivlm.pruning.dropping import pruned
from bivlm.recipe.loading import parse_recipe
from bivlm.recipe.pruning import PruningSettings
from bivlm.recipe.selection import select
from bivlm.reports.inspection import inspect
from flows.cli import main as cli

MODULES = {
    "vision": ["model.vision_tower"],
    "adaptor": ["model.multi_modal_projector"],
    "language": ["model.language_model", "lm_head"],
}
METHOD = {"method": "rtn", "bits": 2}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A tiny VipLlava, of which there is no file in bivlm/families/, and inputs for it."""
    torch.manual_seed(0)
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**{**TEXT, "num_hidden_layers": 3}),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2],
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    folder = tmp_path_factory.mktemp("stranger") / "base"
    model.save_pretrained(folder)
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)
    return folder, {"pixel_values": pixels, "input_ids": torch.tensor([[IMAGE] * 4 + [10, 11, 12]])}


@pytest.fixture(scope="module")
def packed_stranger(stranger):
    folder, _ = stranger
    base = Checkpoint.open(folder, MODULES)
    recipe = parse_recipe(
        {"name": "map", "format": 1, "components": dict.fromkeys(MODULES, METHOD), "modules": MODULES}
    )
    chosen, _ = select(linears(base), recipe)
    packed = pack_linears(base, chosen)
    return write_packed_checkpoint(base, packed, chosen, folder.with_name("packed"), {})


def test_an_unknown_architecture_is_refused_with_its_linears_grouped(stranger):
    with pytest.raises(InputError) as refused:
        linears(Checkpoint.open(stranger[0]))
    said = str(refused.value)
    assert "model_type 'vipllava'; known are gemma3, " in said
    assert "   3 x model.language_model.layers.#.mlp.down_proj 32 x 48" in said
    assert "   2 x model.vision_tower.encoder.layers.#.self_attn.q_proj 32 x 32" in said
    assert "   2 x model.vision_tower.encoder.layers.#.mlp.fc1 48 x 32" in said
    assert "   1 x lm_head 64 x 32" in said
    assert "vision: [model.vision_tower]" in said


def test_with_the_map_every_linear_has_its_component(stranger):
    folder, _ = stranger
    model = AutoModelForImageTextToText.from_pretrained(folder)
    found = {linear.name: linear.component for linear in linears(Checkpoint.open(folder, MODULES))}
    assert list(found) == [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert set(found.values()) == {"vision", "adaptor", "language"}
    assert found["model.multi_modal_projector.linear_1"] == "adaptor"


def test_what_the_map_leaves_out_is_listed_as_left_alone(stranger):
    without = {"vision": MODULES["vision"], "language": ["model.language_model"]}
    parts = inspect(stranger[0], statistics=False, modules=without)["parts"]
    outside = {part["kind"]: part["tensors"] for part in parts if part["component"] == "outside"}
    assert outside == {"Linear, outside vision, adaptor and language": 3, "biases": 3, "norms": 1}
    assert sum(part["share"] for part in parts) == pytest.approx(1)


def test_the_map_travels_with_the_packed_checkpoint(stranger, packed_stranger, capsys):
    quantization = json.loads((packed_stranger / "config.json").read_text())["quantization_config"]
    assert quantization["modules"] == MODULES
    found = inspect(packed_stranger, statistics=False)
    assert found["components"]["adaptor"]["packed"] == 2
    assert cli.main(["inspect", "--model", str(packed_stranger)]) == 0
    assert "100.00 %" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("dequantize", ["load", "forward"])
def test_the_packed_stranger_computes_what_its_rebuilt_weights_do(stranger, packed_stranger, dequantize, tmp_path):
    folder, inputs = stranger
    twin = AutoModelForImageTextToText.from_pretrained(folder)
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = top_bytes(module.weight.data)
    config = BiVLMConfig(dequantize=dequantize)
    model = AutoModelForImageTextToText.from_pretrained(packed_stranger, quantization_config=config)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, twin(**inputs).logits)
    model.save_pretrained(tmp_path)
    carried = Checkpoint.open(tmp_path).modules
    assert carried == (MODULES if dequantize == "forward" else None)


def test_the_stranger_is_calibrated_block_by_block(stranger):
    folder, inputs = stranger
    model = BlockwiseModel(Checkpoint.open(folder, MODULES))
    assert [unit.name for unit in model.units if unit.component == "adaptor"] == ["model.multi_modal_projector"]
    outputs = {}
    with torch.no_grad():
        for unit in model.units[:-1]:
            given = {other.name: outputs[other.name] for other in model.predecessors(unit)}
            with model.at(unit) as step:
                outputs[unit.name] = step(inputs, given)
        last = {unit.name: outputs[unit.name] for unit in model.units[:-1] if unit.component != "vision"}
        with model.at_end() as step:
            logits = step(inputs, last)
        whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        assert torch.allclose(logits, whole(**inputs).logits, atol=0.02)


def test_calibration_is_refused_where_the_map_forgets_what_the_model_runs(stranger):
    folder, inputs = stranger
    model = BlockwiseModel(
        Checkpoint.open(folder, {"vision": MODULES["vision"], "language": ["model.language_model", "lm_head"]})
    )
    first = next(unit for unit in model.units if unit.component == "language")
    given = {
        unit.name: torch.zeros(1, 5, 32, dtype=torch.bfloat16) for unit in model.units if unit.component == "vision"
    }
    refusal = r"multi_modal_projector\.linear_1 is outside vision, adaptor and language, and the model runs it"
    with torch.no_grad(), model.at(first) as step, pytest.raises(InputError, match=refusal):
        step(inputs, given)


def test_pruning_knows_the_map(stranger):
    folder, inputs = stranger
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    settings = PruningSettings(place="language", layer=1, share=0.5)
    with pytest.raises(InputError, match="unknown architecture"), pruned(model, settings):
        pass
    with torch.no_grad(), pruned(model, settings, MODULES) as pruning:
        model(**inputs)
    assert pruning.kept_shares() == {"image": 0.5}
    in_vision = PruningSettings(place="vision", layer=1, share=0.5)
    with pytest.raises(InputError, match="vision encoder of vipllava"), pruned(model, in_vision, MODULES):
        pass


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({**MODULES, "audio": ["x"]}, "'audio': expected one of vision, adaptor, language"),
        ({**MODULES, "vision": "model.vision_tower"}, r"modules.vision: expected a list of module names"),
        ({**MODULES, "vision": []}, r"modules.vision: expected at least one module"),
        ({**MODULES, "adaptor": ["lm_head"]}, "lm_head is named twice"),
        (["model"], "expected names of modules by vision, adaptor, language"),
    ],
)
def test_a_map_that_says_nothing_sensible_is_refused(modules, said):
    with pytest.raises(InputError, match=said):
        parse_modules(modules)
    recipe = {"name": "map", "format": 1, "components": {"vision": METHOD}, "modules": modules}
    with pytest.raises(InputError, match=said):
        parse_recipe(recipe)


def test_a_name_that_matches_nothing_is_refused_with_those_that_come_near(stranger):
    wrong = {**MODULES, "adaptor": ["model.multimodal_projector"]}
    said = r"modules.adaptor: 'model.multimodal_projector' matches no module .* model.multi_modal_projector"
    with pytest.raises(InputError, match=said):
        linears(Checkpoint.open(stranger[0], wrong))


def test_a_map_goes_before_what_a_family_says():
    family = Architecture.of_modules(parse_modules({**MODULES, "adaptor": ["model.vision_tower.last"]}))
    assert family.component("model.vision_tower.last.linear") == "adaptor"
    assert family.component("model.multi_modal_projector") is None


def test_inspect_takes_the_map_from_a_file_or_a_recipe(stranger, tmp_path, capsys):
    (tmp_path / "modules.yaml").write_text(json.dumps(MODULES))
    recipe = {"name": "map", "format": 1, "components": dict.fromkeys(MODULES, METHOD), "modules": MODULES}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for said in (["--modules", "modules.yaml"], ["--recipe", "recipe.yaml"]):
        option, file = said
        assert cli.main(["inspect", "--model", str(stranger[0]), option, str(tmp_path / file), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {name: part["linears"] for name, part in found["components"].items()} == {
            "vision": 12,
            "adaptor": 2,
            "language": 22,
        }
    assert cli.main(["inspect", "--model", str(stranger[0])]) != 0
    assert "model.language_model.layers.#.mlp.down_proj" in capsys.readouterr().err
