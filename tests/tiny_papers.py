"""Tiny random checkpoints of the paper's three architectures, whole: with tokenizer, processor and chat template.

The processors of LLaVA-OneVision and Qwen2.5-VL hold a video processor, which needs torchvision.
"""

from pathlib import Path

import torch
from tiny_families import llava_onevision, mllama, qwen2_5_vl
from tiny_llava import byte_tokenizer
from transformers import AutoModelForImageTextToText, GenerationConfig

TURN = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_paper_model(name: str, folder: Path) -> Path:
    """``llama-3.2-vision-11b``, ``llava-onevision-7b`` or ``qwen2.5-vl-7b``, some thousand times smaller."""
    build = {"llama-3.2-vision-11b": _mllama, "llava-onevision-7b": _onevision, "qwen2.5-vl-7b": _qwen}[name]
    config, processor = build()
    tokenizer = processor.tokenizer
    text = config.text_config
    text.vocab_size, text.eos_token_id, text.pad_token_id = len(tokenizer), tokenizer.eos_token_id, 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for parameter_name, parameter in model.named_parameters():
        if "gate" in parameter_name and parameter.numel() == 1:  # Llama 3.2 Vision begins with its gates shut
            parameter.data.fill_(0.5)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _mllama():
    from transformers import MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    config, _, _ = mllama()
    tokenizer = byte_tokenizer("<|image|>", bos_token="<s>")
    config.image_token_index = tokenizer.convert_tokens_to_ids("<|image|>")
    config.text_config.bos_token_id = tokenizer.bos_token_id
    pictures = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=2)
    processor = MllamaProcessor(pictures, tokenizer, chat_template=TURN.replace("IMAGE", "<|image|>"))
    return config, processor


def _onevision():
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    config, _, _ = llava_onevision()
    tokenizer = byte_tokenizer("<image>", "<video>")
    config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.video_token_index = config.video_token_id = tokenizer.convert_tokens_to_ids("<video>")
    pictures = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16]])
    processor = LlavaOnevisionProcessor(
        pictures,
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": 16, "width": 16}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=TURN.replace("IMAGE", "<image>\n"),
    )
    return config, processor


def _qwen():
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config, _, _ = qwen2_5_vl()
    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = byte_tokenizer(*marks)
    image, video, start, end = tokenizer.convert_tokens_to_ids(marks)
    config.vision_start_token_id, config.vision_end_token_id = start, end
    config.image_token_id, config.video_token_id = image, video
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 1024}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(**sizes),
        tokenizer,
        Qwen2VLVideoProcessor(**sizes),
        chat_template=TURN.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return config, processor
