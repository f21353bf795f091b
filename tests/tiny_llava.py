"""A random LLaVA checkpoint of a few hundred kilobytes, made as a real one is: the Auto classes load it."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

IMAGE_SIZE, PATCH_SIZE = 32, 8
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tiny_llava(
    folder: str | Path,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    *,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write it to `folder` and return that; `vision`, `text` and `overrides` change the three configs."""
    tokenizer = _tokenizer()
    config = LlavaConfig(
        **{
            "vision_config": _vision_config(vision or {}),
            "text_config": _text_config(tokenizer, text or {}),
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_seq_length": (IMAGE_SIZE // PATCH_SIZE) ** 2,
            "tie_word_embeddings": False,
            **overrides,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).to(dtype)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return Path(folder)


def _vision_config(overrides: dict[str, Any]) -> SiglipVisionConfig:
    defaults = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "vision_use_head": False,
    }
    return SiglipVisionConfig(**{**defaults, **overrides})


def _text_config(tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any]) -> Qwen2Config:
    defaults = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # Large enough that the logits differ by more than bfloat16 rounds away.
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Qwen2Config(**{**defaults, **overrides})


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer("<image>")
    tokenizer.model_max_length = 512
    return tokenizer


def byte_tokenizer(*special: str, bos_token: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte: every string can be encoded. The special tokens come first, padding and the end before them."""
    names = ["image_token", *(f"token_{number}" for number in range(1, len(special)))]
    first = ("<pad>", "</s>", *([bos_token] if bos_token else []), *special)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*first, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token=bos_token,
        extra_special_tokens=dict(zip(names, special, strict=True)),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
