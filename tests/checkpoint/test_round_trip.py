"""Every architecture, laid out as it is published: packed by real methods, loaded, saved again and calibrated."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import FAMILIES, IMAGE, make_published
from torch import nn
from transformers import AutoModelForImageTextToText

from bivlm.calibration.blocks.model import BlockwiseModel
from bivlm.calibration.blocks.run import run_unit
from bivlm.calibration.blocks.sites import uniform
from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.transformers_plugin import BiVLMConfig
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.compression.layer import pack_layer
from bivlm.methods import method
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack
from bivlm.recipe.loading import parse_recipe
from bivlm.recipe.selection import select
from bivlm.reports.inspection import inspect

METHODS = {
    "bivlm": {"method": "bivlm", "groups": 2, "p_max": 0.05},
    "rtn": {"method": "rtn", "bits": 3, "group_size": 16},
}
# One of each kind of layout; the others, which differ in names, are slow.
QUICK = ("llava", "qwen2_5_vl_tied", "qwen3_vl_moe", "mllama", "gemma3")
BUILDERS = [pytest.param(each, marks=() if each.__name__ in QUICK else pytest.mark.slow) for each in FAMILIES]
GPTQ = {"method": "gptq", "bits": 3, "group_size": 16}


def recipe_for(settings, layers):
    """Packs every linear of every component that has any, but the head."""
    components = dict.fromkeys(sorted({layer.component for layer in layers}), settings)
    return parse_recipe({"name": "whole", "format": 1, "components": components})


def packed_layer(weight, settings, name, inputs=None):
    chosen = method(settings.method)
    statistics = LayerStatistics.measure(weight, chosen.tail_share(settings), name)
    return pack_layer(weight, chosen.plan(statistics, settings), name, inputs)[0]


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda build: build.__name__)
def architecture(request, tmp_path_factory):
    """(folder of the base in the names of the published files, inputs)."""
    folder = tmp_path_factory.mktemp(request.param.__name__) / "base"
    folder.mkdir()
    return folder, make_published(request.param, folder)


@pytest.fixture(scope="module", params=["bivlm", pytest.param("rtn", marks=pytest.mark.slow)])
def packed(request, architecture):
    folder, _ = architecture
    base = Checkpoint.open(folder)
    layers = linears(base)
    recipe = recipe_for(METHODS[request.param], layers)
    chosen, _ = select(layers, recipe)
    shards = {
        layer.name: (
            lambda layer=layer: packed_layer(base.read(layer.disk_name), recipe.components[layer.component], layer.name)
        )
        for layer in chosen
    }
    return write_packed_checkpoint(base, shards, chosen, folder.with_name(request.param), {}, max_shard_bytes=10_000)


def load(folder, **further):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **further)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture(scope="module")
def twin(architecture, packed):
    """The ordinary model with the weights that the packed bytes rebuild, read one by one."""
    model, checkpoint = load(architecture[0]), Checkpoint.open(packed)
    layers = {layer.name: layer for layer in linears(checkpoint)}
    for name in checkpoint.packed:
        weight = weight_in(model, layers[name])
        rebuilt = unpack(checkpoint.read(layers[name].disk_name), name)
        assert not torch.equal(rebuilt, weight)
        weight.copy_(rebuilt)
    return model


def weight_in(model, layer):
    """Where a linear's weight stands in the ordinary model."""
    if layer.stacked_in is None:
        return model.get_submodule(layer.name).weight.data
    expert, _, projection = layer.name.removeprefix(layer.stacked_in.rpartition(".")[0] + ".").partition(".")
    matrix = model.get_parameter(layer.stacked_in).data[int(expert)]
    return {"gate_proj": matrix[:24], "up_proj": matrix[24:], "down_proj": matrix}[projection]


def answer(model, inputs):
    bad = [IMAGE, 6, 7, 8, 9]  # as text they would be images without pixels
    return model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=bad)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_packed_model_is_its_dequantized_twin(architecture, packed, twin, tmp_path):
    """In either way of rebuilding, its answers included; and it is saved as it should be."""
    _, inputs = architecture
    with torch.no_grad():
        expected, said = twin(**inputs).logits, answer(twin, inputs)
    assert said.shape[1] == inputs["input_ids"].shape[1] + 3
    before = Checkpoint.open(packed)
    experts = any(".experts." in name for name in before.packed)  # rebuilt while loading, see test_experts.py
    for way in ("load",) if experts or packed.name == "rtn" else ("load", "forward"):
        model = load(packed, quantization_config=BiVLMConfig(dequantize=way))
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)
            assert not torch.equal(expected, model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits)
        assert torch.equal(answer(model, inputs), said)

        model.save_pretrained(tmp_path / way)
        after = Checkpoint.open(tmp_path / way)
        if way == "forward":
            assert after.packed == before.packed and len(after.entries) == len(before.entries)
            saved = {layer.name: after.read(layer.disk_name) for layer in linears(after)}
            for layer in linears(before):
                assert torch.equal(before.read(layer.disk_name), saved[layer.name])
        else:
            assert after.quantization is None
        with torch.no_grad():
            assert torch.equal(load(tmp_path / way)(**inputs).logits, expected)


def test_the_packed_checkpoint_has_the_keys_of_its_base_in_shards(architecture, packed):
    base, found = Checkpoint.open(architecture[0]), Checkpoint.open(packed)
    assert list(found.entries) == list(base.entries)
    assert len(found.weight_files) > 1
    tensors = [name for file in found.weight_files for name in load_file(file)]
    assert sorted(tensors) == sorted(base.entries)
    packed_names = {layer.disk_name for layer in linears(found) if layer.name in found.packed}
    for name, entry in base.entries.items():
        if name not in packed_names:
            assert torch.equal(found.read(name), base.read(name)), entry


def test_every_parameter_is_packed_or_left_alone(architecture):
    """Counted on the model that transformers loads: no parameter of it is without a place."""
    folder, _ = architecture
    model = load(folder)
    found = inspect(folder, statistics=False)
    tied = model.all_tied_weights_keys
    assert found["parameters"] == sum(t.numel() for name, t in model.state_dict().items() if name not in tied)
    in_model = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    experts = {linear["name"] for linear in found["linears"] if ".experts." in linear["name"]}
    assert {linear["name"] for linear in found["linears"]} - experts == in_model
    assert all(tensor["component"] or "image_newline" in tensor["name"] for tensor in found["left_alone"]["tensors"])


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_gptq_gets_the_inputs_that_every_layer_has_in_the_whole_model(build, tmp_path):
    inputs = make_published(build, tmp_path, torch.float32)
    base = Checkpoint.open(tmp_path)
    layers = {layer.name: layer for layer in linears(base) if layer.tied_to is None and layer.stacked_in is None}
    settings = recipe_for(GPTQ, linears(base)).components["language"]
    taken = inputs_in_the_whole_model(load(tmp_path), layers, inputs)
    model, outputs, packed = BlockwiseModel(base), {}, {}
    for unit in model.units:
        given = {other.name: outputs[other.name] for other in model.predecessors(unit)}
        outcome = run_unit(model, unit, [inputs], given, weigh=lambda _: uniform)
        outputs[unit.name] = [{"output": outcome.outputs[0]}]
        for name in unit.linears:
            statistics = outcome.sites[outcome.site_of[name]]
            assert sum(statistics.tokens.values()) == len(taken[name])
            moment_NN = taken[name].T @ taken[name] / len(taken[name])
            assert torch.allclose(statistics.second_moment_NN, moment_NN, rtol=1e-3, atol=1e-4 * moment_NN.max())
            packed[name] = packed_layer(base.read(layers[name].disk_name), settings, name, statistics)
    assert packed.keys() == layers.keys()


def inputs_in_the_whole_model(model, names, inputs):
    """What every linear takes in: (T, N) by name."""
    taken = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: taken.__setitem__(name, arguments[0].reshape(-1, arguments[0].shape[-1]))
        )
    with torch.no_grad():
        model(**inputs)
    return taken
