"""Every architecture we name: its linears are found, belong to the right component, and survive packing."""

from dataclasses import replace

import pytest
import torch
from tiny_families import (
    gemma3,
    glm4v_moe,
    idefics3,
    internvl,
    llava_next,
    llava_onevision,
    make_tiny,
    mllama,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    qwen3_vl_moe,
    smolvlm,
)
from torch import nn
from transformers import AutoModelForImageTextToText

from bivlm.checkpoint.architectures import ARCHITECTURES, Architecture, architecture_of
from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError

SHUFFLED = {
    "vision": "model.vision_model.encoder.layers.0.mlp.fc1",
    "adaptor": "model.connector.modality_projection.proj",
    "language": "model.text_model.layers.1.mlp.down_proj",
}
# By component: a linear that has to be in it.
EXPECTED = {
    llava_next: {
        "vision": "model.vision_tower.encoder.layers.0.mlp.fc1",
        "adaptor": "model.multi_modal_projector.linear_2",
        "language": "model.language_model.layers.1.mlp.down_proj",
    },
    llava_onevision: {
        "vision": "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "adaptor": "model.multi_modal_projector.linear_2",
        "language": "model.language_model.layers.1.mlp.down_proj",
    },
    qwen2_vl: {
        "vision": "model.visual.blocks.0.attn.qkv",
        "adaptor": "model.visual.merger.mlp.0",
        "language": "model.language_model.layers.1.mlp.down_proj",
    },
    qwen2_5_vl: {
        "vision": "model.visual.blocks.0.mlp.gate_proj",
        "adaptor": "model.visual.merger.mlp.2",
        "language": "model.language_model.layers.1.mlp.down_proj",
    },
    mllama: {
        "vision": "model.vision_model.global_transformer.layers.0.mlp.fc1",
        "adaptor": "model.multi_modal_projector",
        "language": "model.language_model.layers.1.cross_attn.q_proj",
    },
    qwen3_vl: {
        "vision": "model.visual.blocks.0.attn.qkv",
        "adaptor": "model.visual.deepstack_merger_list.1.linear_fc1",
        "language": "model.language_model.layers.1.mlp.down_proj",
    },
    qwen3_vl_moe: {
        "vision": "model.visual.blocks.0.attn.qkv",
        "adaptor": "model.visual.merger.linear_fc2",
        "language": "model.language_model.layers.1.self_attn.o_proj",
    },
    glm4v_moe: {
        "vision": "model.visual.blocks.1.attn.qkv",
        "adaptor": "model.visual.merger.gate_proj",
        "language": "model.language_model.layers.1.mlp.shared_experts.up_proj",
    },
    idefics3: SHUFFLED,
    smolvlm: SHUFFLED,
    paligemma: {
        "vision": "model.vision_tower.encoder.layers.0.mlp.fc1",
        "adaptor": "model.multi_modal_projector.linear",
        "language": "model.language_model.layers.1.mlp.down_proj",
    },
    gemma3: {  # its adaptor is a bare parameter
        "vision": "model.vision_tower.encoder.layers.0.mlp.fc1",
        "language": "model.language_model.layers.1.mlp.down_proj",
    },
    internvl: {
        "vision": "model.vision_tower.encoder.layer.0.attention.projection_layer",
        "adaptor": "model.multi_modal_projector.linear_2",
        "language": "model.language_model.layers.1.mlp.down_proj",
    },
}


@pytest.fixture(scope="module", params=EXPECTED, ids=lambda build: build.__name__)
def architecture(request, tmp_path_factory):
    """(builder, base folder, inputs) of a tiny random model."""
    folder = tmp_path_factory.mktemp(request.param.__name__) / "base"
    return request.param, folder, make_tiny(request.param, folder)


def test_every_linear_of_the_loaded_model_is_found_on_disk(architecture):
    _, folder, _ = architecture
    model = AutoModelForImageTextToText.from_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    layers = [linear for linear in linears(checkpoint) if linear.stacked_in is None]
    found = {linear.name: checkpoint.read(linear.disk_name) for linear in layers}
    in_model = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert list(found) == list(in_model)
    assert all(torch.equal(found[name], weight) for name, weight in in_model.items())


def test_linears_belong_to_the_component_they_should(architecture):
    build, folder, _ = architecture
    component = {linear.name: linear.component for linear in linears(Checkpoint.open(folder))}
    assert {component[name]: name for name in EXPECTED[build].values()} == EXPECTED[build]
    assert component["lm_head"] == "language"


def test_the_image_matters(architecture):
    _, folder, inputs = architecture
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
        assert not torch.equal(model(**inputs).logits, other)


def test_a_module_belongs_to_the_longest_name_it_lies_within():
    found = Architecture(("t",), vision=("model.visual",), adaptor=("model.visual.merger",), language=("lm_head",))
    assert found.component("model.visual.blocks.0") == "vision"
    assert found.component("model.visual.merger.mlp.0") == "adaptor"
    assert found.component("model.visual.merger_list") == "vision"
    assert found.component("lm_head") == "language"
    assert found.component("lm_head_2") is None


def test_a_new_architecture_is_one_entry(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "fresh", replace(ARCHITECTURES["llava"], model_types=("fresh",)))
    assert architecture_of("fresh").component("model.vision_tower") == "vision"


def test_an_unknown_architecture_is_refused_with_those_that_are_known():
    with pytest.raises(InputError, match=r"model_type 'gpt2'; known are gemma3, .*mllama"):
        architecture_of("gpt2")
