"""Every architecture we name: its linears are found, belong to the right component, and survive packing."""

from pathlib import Path

import pytest
import torch
from raw_codec import pack_raw, top_bytes
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MllamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    SiglipVisionConfig,
)

from bivlm import families
from bivlm.checkpoint import Checkpoint, linears, select, write_packed_checkpoint
from bivlm.errors import InputError
from bivlm.transformers_plugin import BiVLMConfig

IMAGE = 5  # the image token's id
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def llava_next():
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 16]],
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    # Base image and one tile of 2 x 2 patches, a line break after each row of the tile.
    inputs = {"pixel_values": torch.randn(1, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    return config, inputs, 4 + 2 * 3


def llava_onevision():
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 16]],
    )
    inputs = {"pixel_values": torch.randn(1, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    return config, inputs, 4 + 2 * 3


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    config = Qwen2VLConfig(
        vision_config=vision, text_config={**TEXT, "rope_parameters": MROPE}, image_token_id=IMAGE, video_token_id=6
    )
    return config, qwen_inputs(), 4


def qwen2_5_vl():
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
    config = Qwen2_5_VLConfig(
        vision_config={**vision, "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]},
        text_config={**TEXT, "rope_parameters": MROPE},
        image_token_id=IMAGE,
        video_token_id=6,
    )
    return config, qwen_inputs(), 4


def qwen_inputs():
    # 4 x 4 patches, two frames of 8 x 8 pixels each, merged 2 x 2 to four tokens.
    return {"pixel_values": torch.randn(16, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def mllama():
    vision = {**TOWER, "attention_heads": 2, "num_global_layers": 1, "max_num_tiles": 2}
    vision |= {"vision_output_dim": 64, "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1], [1, 2]]}
    text = {**TEXT, "cross_attention_layers": [1], "pad_token_id": 0, "bos_token_id": 1}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    inputs = {
        "pixel_values": torch.randn(1, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1]]]),
        "cross_attention_mask": torch.ones(1, 4, 1, 2, dtype=torch.long),
    }
    return config, inputs, 1


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
}


@pytest.fixture(scope="module", params=EXPECTED, ids=lambda build: build.__name__)
def architecture(request, tmp_path_factory):
    """(builder, base folder, inputs) of a tiny random model."""
    torch.manual_seed(0)
    config, inputs, image_tokens = request.param()
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    # Llama 3.2 Vision begins with its gates shut, through which no image would be seen.
    gates = [parameter for name, parameter in model.named_parameters() if "gate" in name and parameter.numel() == 1]
    for gate in gates:
        gate.data.fill_(0.5)
    folder = tmp_path_factory.mktemp(request.param.__name__) / "base"
    model.save_pretrained(folder)
    ids = torch.tensor([[IMAGE] * image_tokens + [10, 11, 12]])
    inputs = {**inputs, "input_ids": ids, "pixel_values": inputs["pixel_values"].bfloat16()}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return request.param, folder, inputs


@pytest.fixture(scope="module")
def packed(architecture, whole_recipe):
    _, folder, _ = architecture
    base = Checkpoint.open(folder)
    chosen, _ = select(linears(base), whole_recipe)
    parts = {linear.name: (lambda name=linear.disk_name: pack_raw(base.read(name))) for linear in chosen}
    return write_packed_checkpoint(base, parts, chosen, folder.with_name("packed"), {})


def test_every_linear_of_the_loaded_model_is_found_on_disk(architecture):
    _, folder, _ = architecture
    model = AutoModelForImageTextToText.from_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    found = {linear.name: checkpoint.read(linear.disk_name) for linear in linears(checkpoint)}
    in_model = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert list(found) == list(in_model)
    assert all(torch.equal(found[name], weight) for name, weight in in_model.items())


def test_linears_belong_to_the_component_they_should(architecture):
    build, folder, _ = architecture
    component = {linear.name: linear.component for linear in linears(Checkpoint.open(folder))}
    assert {component[name]: name for name in EXPECTED[build].values()} == EXPECTED[build]
    assert component["lm_head"] == "language"


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("dequantize", ["load", "forward"])
def test_a_packed_model_computes_what_its_rebuilt_weights_do(architecture, packed, dequantize):
    _, folder, inputs = architecture
    twin = AutoModelForImageTextToText.from_pretrained(folder)
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = top_bytes(module.weight.data)
    model = AutoModelForImageTextToText.from_pretrained(packed, quantization_config=BiVLMConfig(dequantize=dequantize))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, twin(**inputs).logits)


def test_the_image_matters(architecture):
    _, folder, inputs = architecture
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
        assert not torch.equal(model(**inputs).logits, other)


def test_a_module_belongs_to_the_longest_name_it_lies_within():
    family = families.Family(("t",), vision=("model.visual",), adaptor=("model.visual.merger",), language=("lm_head",))
    assert family.component("model.visual.blocks.0") == "vision"
    assert family.component("model.visual.merger.mlp.0") == "adaptor"
    assert family.component("model.visual.merger_list") == "vision"
    assert family.component("lm_head") == "language"
    assert family.component("lm_head_2") is None


def test_a_new_architecture_is_one_file(tmp_path, monkeypatch):
    source = Path(families.__file__).with_name("llava.py").read_text()
    (tmp_path / "new_architecture.py").write_text(source.replace('"llava"', '"fresh"').replace('"llava_next", ', ""))
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    families.families.cache_clear()
    try:
        assert families.family("fresh").component("model.vision_tower") == "vision"
    finally:
        families.families.cache_clear()


def test_an_unknown_architecture_is_refused_with_those_that_are_known():
    with pytest.raises(InputError, match=r"model_type 'gpt2'; known are llava, llava_next, .*mllama"):
        families.family("gpt2")
