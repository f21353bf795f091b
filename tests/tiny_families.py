"""Tiny random models of every architecture we name."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
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
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MllamaConfig,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
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


def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return config, {"pixel_values": torch.randn(1, 3, 16, 16)}, 4


def qwen2_5_vl_tied():
    """As the 3B model is: the head is the embedding, and the file holds it once."""
    config, inputs, image_tokens = qwen2_5_vl()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    return config, inputs, image_tokens


def qwen3_vl():
    config = Qwen3VLConfig(
        vision_config=QWEN3_TOWER,
        text_config={**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=7,
    )
    return config, qwen_inputs(), 4


def qwen3_vl_moe():
    text = {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen3VLMoeConfig(
        vision_config=QWEN3_TOWER,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=7,
    )
    return config, qwen_inputs(), 4


QWEN3_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.1,
}


def glm4v_moe():
    """A dense layer, then two of experts, which lie on disk one by one."""
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
    text = {**TEXT, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1}
    text |= {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
    config = Glm4vMoeConfig(
        vision_config={**vision, "image_size": 32, "out_hidden_size": 32, "initializer_range": 0.1},
        text_config={**text, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=6,
        image_start_token_id=7,
        image_end_token_id=8,
        video_start_token_id=9,
        video_end_token_id=9,
    )
    return config, qwen_inputs(), 4


def idefics3(kind=Idefics3Config):
    # 4 x 4 patches, shuffled 2 x 2 to four tokens; the second of two images is cut off by its mask.
    config = kind(
        vision_config={**TOWER, "patch_size": 4}, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    config.text_config.pad_token_id = config.pad_token_id = 0
    mask = torch.ones(1, 2, 16, 16, dtype=torch.bool)
    mask[:, 1, 8:] = False
    return config, {"pixel_values": torch.randn(1, 2, 3, 16, 16), "pixel_attention_mask": mask}, 8


def smolvlm():
    return idefics3(SmolVLMConfig)


def paligemma():
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=GemmaConfig(**{**TEXT, "pad_token_id": 0}, head_dim=16),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return config, {"pixel_values": torch.randn(1, 3, 16, 16)}, 4


def gemma3():
    # 4 x 4 patches averaged to 2 x 2 tokens; the first language layer sees a window of six tokens.
    text = {**TEXT, "pad_token_id": 0, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**{**TOWER, "patch_size": 4}, vision_use_head=False),
        text_config=Gemma3TextConfig(**text, layer_types=["sliding_attention", "full_attention"]),
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=8,
        eoi_token_index=9,
    )
    return config, {"pixel_values": torch.randn(1, 3, 16, 16)}, 4


def internvl():
    vision = {**TOWER, "image_size": [16, 16], "patch_size": [4, 4], "attention_bias": True}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return config, {"pixel_values": torch.randn(1, 3, 16, 16)}, 4


FAMILIES = (
    llava,
    llava_next,
    llava_onevision,
    qwen2_vl,
    qwen2_5_vl,
    qwen2_5_vl_tied,
    qwen3_vl,
    qwen3_vl_moe,
    glm4v_moe,
    mllama,
    idefics3,
    smolvlm,
    paligemma,
    gemma3,
    internvl,
)

# From names in the loaded model to those in the published files, by builder; the others' are the same.
_LLAVA = {
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.vision_tower\.": "vision_tower.vision_model.",
    r"^model\.": "",
}
_QWEN2 = {r"^model\.language_model\.": "model.", r"^model\.visual\.": "visual."}
_PLAIN = {**_LLAVA, r"^model\.vision_tower\.": "vision_tower."}  # a tower whose modules are not one deeper on disk
PUBLISHED = {
    **dict.fromkeys((llava, llava_next, llava_onevision, paligemma, gemma3), _LLAVA),
    **dict.fromkeys((qwen2_vl, qwen2_5_vl, qwen2_5_vl_tied), _QWEN2),
    **dict.fromkeys((mllama, internvl), _PLAIN),
}


def make_tiny(build, folder: Path, dtype=torch.bfloat16):
    """Write a model of this family to `folder`; returns inputs for it."""
    model, inputs = tiny_model(build, dtype)
    model.save_pretrained(folder)
    return inputs


def make_published(build, folder: Path, dtype=torch.bfloat16):
    """The same with the names of the published files, in shards with an index."""
    model, inputs = tiny_model(build, dtype)
    model.config.save_pretrained(folder)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        for pattern, to in PUBLISHED.get(build, {}).items():
            name, done = re.subn(pattern, to, name)
            if done:
                break
        if build is glm4v_moe and ".mlp.experts." in name:
            tensors |= one_by_one(name, tensor)
        else:  # Qwen3-VL's experts lie on disk the other way round
            tensors[name] = tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor.contiguous()
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        shard = {name: tensors[name] for name in names[number::3]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return inputs


def one_by_one(name, tensor):
    """The matrices of the experts in a 3-D parameter, by name on disk."""
    place, _, projection = name.rpartition(".")
    tensors = {}
    for number, matrix in enumerate(tensor):
        parts = matrix.chunk(2) if projection == "gate_up_proj" else (matrix,)
        kinds = ("gate_proj", "up_proj") if len(parts) == 2 else ("down_proj",)
        tensors |= {f"{place}.{number}.{kind}.weight": each.clone() for kind, each in zip(kinds, parts, strict=True)}
    return tensors


def tiny_model(build, dtype=torch.bfloat16):
    """A model of this family, and inputs for it."""
    torch.manual_seed(0)
    config, inputs, image_tokens = build()
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    # Llama 3.2 Vision begins with its gates shut, through which no image would be seen; InternVL's are open a little;
    # what transformers leaves at zero would hide a fault: biases, Gemma 3's projector.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.5)
            elif not parameter.any():
                parameter.normal_(0, 0.1)
    ids = torch.tensor([[IMAGE] * image_tokens + [10, 11, 12]])
    inputs = {**inputs, "input_ids": ids, "pixel_values": inputs["pixel_values"].to(dtype)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if config.model_type == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)  # a prompt looks at all of itself
    if config.model_type == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()  # an image looks at all of itself
    return model, inputs
