"""Llama 3.2 Vision: image features enter through cross-attention layers, which belong to the language model."""

from bivlm.checkpoint.architectures import Family

FAMILY = Family(
    model_types=("mllama",),
    vision=("model.vision_model",),
    adaptor=("model.multi_modal_projector",),
    language=("model.language_model", "lm_head"),
)
