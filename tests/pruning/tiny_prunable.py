"""Tiny random models with enough layers and image tokens to drop some, and inputs for them."""

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4vMoeConfig,
    Idefics3Config,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    MllamaConfig,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
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
    return (config, *qwen_images(batch))


def qwen_images(batch):
    # Images of 8 x 8 and 4 x 8 patches by turns, in windows of 2 x 2 merged tokens.
    grids = [(1, 8, 8) if number % 2 == 0 else (1, 4, 8) for number in range(batch)]
    patches = sum(t * h * w for t, h, w in grids)
    inputs = {"pixel_values": torch.randn(patches, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor(grids)}
    return inputs, [t * h * w // 4 for t, h, w in grids]


def qwen2_vl(batch):
    vision = {"depth": 4, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, image_token_id=IMAGE, video_token_id=6
    )
    return (config, *qwen_images(batch))


def qwen3_vl(batch, kind=Qwen3VLConfig, **further):
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [1, 2, 3]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    config = kind(
        vision_config={**vision, "initializer_range": 0.2},
        text_config={**TEXT, "head_dim": 8, "rope_parameters": rope, **further},
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=7,
    )
    return (config, *qwen_images(batch))


def qwen3_vl_moe(batch):
    return qwen3_vl(batch, Qwen3VLMoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def glm4v_moe(batch):
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
    text = {**TEXT, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 8}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}
    config = Glm4vMoeConfig(
        vision_config={**vision, "image_size": 64, "out_hidden_size": 32, "initializer_range": 0.2},
        text_config={**text, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=6,
        image_start_token_id=7,
        image_end_token_id=8,
        video_start_token_id=9,
        video_end_token_id=9,
    )
    return (config, *qwen_images(batch))


def idefics3(batch):
    # 8 x 8 patches, shuffled 2 x 2.
    config = Idefics3Config(
        vision_config={**TOWER, "patch_size": 4},
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return config, {"pixel_values": torch.randn(batch, 1, 3, 32, 32)}, [16] * batch


def internvl(batch):
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**{**TOWER, "image_size": [32, 32], "patch_size": [4, 4]}),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    return config, {"pixel_values": torch.randn(batch, 3, 32, 32)}, [16] * batch


def paligemma(batch):
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return config, {"pixel_values": torch.randn(batch, 3, 32, 32)}, [16] * batch


def gemma3(batch):
    text = {**TEXT, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Gemma3TextConfig(**text, layer_types=["sliding_attention", "full_attention"] * 2),
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=8,
        eoi_token_index=9,
    )
    return config, {"pixel_values": torch.randn(batch, 3, 32, 32)}, [16] * batch


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


FAMILIES = (
    llava,
    llava_onevision,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    qwen3_vl_moe,
    glm4v_moe,
    mllama,
    idefics3,
    internvl,
    paligemma,
)
SHUFFLED = (idefics3, internvl)  # neighbours in the image become one image token


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
    if config.model_type == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)  # a prompt looks at all of itself
    return model, inputs
