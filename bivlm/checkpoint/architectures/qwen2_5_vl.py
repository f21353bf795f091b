"""Qwen2-VL and Qwen2.5-VL: the patch merger at the end of the vision model is the adaptor."""

from bivlm.checkpoint.architectures import Family

FAMILY = Family(
    model_types=("qwen2_vl", "qwen2_5_vl"),
    vision=("model.visual",),
    adaptor=("model.visual.merger",),
    language=("model.language_model", "lm_head"),
)
