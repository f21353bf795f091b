"""Idefics3 and SmolVLM: a SigLIP tower, pixel shuffle and one linear layer as connector, a Llama decoder."""

from bivlm.checkpoint.architectures import Family

FAMILY = Family(
    model_types=("idefics3", "smolvlm"),
    vision=("model.vision_model",),
    adaptor=("model.connector",),
    language=("model.text_model", "lm_head"),
)
