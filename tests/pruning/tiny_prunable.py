"""Tiny random models with enough layers and image tokens to drop some, and inputs for them."""

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    MllamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE = 5
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,
}


def llava(batch):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return config, {"pixel_values": torch.randn(batch, 3, 32, 32)}, [16] * batch


def llava_onevision(batch):
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 32]],
    )
    inputs = {
        "pixel_values": torch.randn(batch, 2, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32]] * batch),
        "batch_num_images": torch.ones(batch, dtype=torch.long),
    }
    return config, inputs, [16 + 4 * 5] * batch


def qwen2_5_vl(batch):
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        vision_config={**vision, "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1, 3]},
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=6,
    )
    # Images of 8 x 8 and 4 x 8 patches by turns, in windows of 2 x 2 merged tokens.
    grids = [(1, 8, 8) if number % 2 == 0 else (1, 4, 8) for number in range(batch)]
    patches = sum(t * h * w for t, h, w in grids)
    inputs = {"pixel_values": torch.randn(patches, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor(grids)}
    return config, inputs, [t * h * w // 4 for t, h, w in grids]


def mllama(batch):
    tower = {key: value for key, value in TOWER.items() if key != "num_attention_heads"}
    vision = {**tower, "attention_heads": 2, "num_global_layers": 2, "max_num_tiles": 2}
    vision |= {"vision_output_dim": 64, "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1], [1, 2]]}
    text = {**TEXT, "num_hidden_layers": 6, "cross_attention_layers": [1, 3, 4], "bos_token_id": 1}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    wide = [number % 2 == 0 for number in range(batch)]  # the others have one tile and one that is padding
    inputs = {
        "pixel_values": torch.randn(batch, 1, 2, 3, 32, 32),
        "aspect_ratio_ids": torch.tensor([[2 if each else 1] for each in wide]),
        "aspect_ratio_mask": torch.tensor([[[1, int(each)]] for each in wide]),
    }
    return config, inputs, [1] * batch


FAMILIES = (llava, llava_onevision, qwen2_5_vl, mllama)


def make(build, batch=1):
    """A model, and inputs of so many prompts of different lengths, padded on the left."""
    torch.manual_seed(0)
    config, inputs, image_tokens = build(batch)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.5)  # Llama 3.2 Vision begins with its gates shut
    prompts = []
    for number, count in enumerate(image_tokens):
        text = torch.randint(10, 64, (6 + 2 * number,)).tolist()
        prompts.append(text[:2] + [IMAGE] * count + text[2:])
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    inputs = {**inputs, "input_ids": ids, "attention_mask": mask}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if "aspect_ratio_mask" in inputs:
        inputs["cross_attention_mask"] = mask[:, :, None, None] * inputs["aspect_ratio_mask"][:, None]
    return model, inputs
