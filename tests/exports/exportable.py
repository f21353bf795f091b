"""Packed checkpoints with rows of 256 columns, tokenizers and processors: what an export to GGUF begins with."""

import json

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from bivlm import compress_model
from bivlm.reference.tokenizer import build_tokenizer

IMAGE = 2  # the image token's number
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TEXT = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
RECIPE = """
name: r
format: 1
components:
  vision: {method: rtn, bits: 4, group_size: 256}
  adaptor: {method: bivlm, groups: 2, p_max: 0, levels: odd}
  language: {method: rtn, bits: 2, group_size: 0}
keep: [lm_head]
tables: {tokens: 4}
"""


def llama_clip():
    """As LLaVA 1.5 is: a CLIP tower whose last block is left out, and a Llama."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def qwen2_siglip():
    """As the reference model is: a SigLIP tower and a Qwen2."""
    return LlavaConfig(
        vision_config=SiglipVisionConfig(**TOWER, hidden_act="gelu_pytorch_tanh", vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def qwen2_5_vl():
    """As the published models are: the neurons of the tower's layers come in no whole blocks."""
    vision = {"depth": 4, "hidden_size": 256, "intermediate_size": 420, "num_heads": 4, "out_hidden_size": 256}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    return Qwen2_5_VLConfig(
        vision_config={**vision, "fullatt_block_indexes": [1, 3]},
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=3,
    )


FAMILIES = (llama_clip, qwen2_siglip, qwen2_5_vl)


def make(build, folder, recipe=RECIPE, **changes):
    """Write a random model of this family, and pack it; returns the packed folder. `changes` are of its config."""
    torch.manual_seed(0)
    config = build()
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases of zero and norms of one would hide a fault
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.ndim > 2 or parameter.std() < 0.03:
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder / "base")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder / "base")
    (folder / "base" / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    (folder / "base" / "LICENSE").write_text("theirs")
    (folder / "r.yaml").write_text(recipe)
    compress_model(folder / "base", folder / "r.yaml", folder / "packed")
    (folder / "packed" / "lineage.json").write_text('{"of": "packed"}')
    return folder / "packed"
