"""Tiny random models of every architecture we name."""

from pathlib import Path

import torch
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


FAMILIES = (llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, mllama)


def make_tiny(build, folder: Path, dtype=torch.bfloat16):
    """Write a model of this family to `folder`; returns inputs for it."""
    torch.manual_seed(0)
    config, inputs, image_tokens = build()
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    # Llama 3.2 Vision begins with its gates shut, through which no image would be seen.
    gates = [parameter for name, parameter in model.named_parameters() if "gate" in name and parameter.numel() == 1]
    for gate in gates:
        gate.data.fill_(0.5)
    model.save_pretrained(folder)
    ids = torch.tensor([[IMAGE] * image_tokens + [10, 11, 12]])
    inputs = {**inputs, "input_ids": ids, "pixel_values": inputs["pixel_values"].to(dtype)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return inputs
