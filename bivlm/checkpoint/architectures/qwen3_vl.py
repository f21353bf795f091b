"""Qwen3-VL and its mixture of experts: the adaptor is the patch merger and the deep-stack mergers.

These bring the features of inner vision blocks to the first language layers. Experts are 3-D parameters.
"""

from bivlm.checkpoint.architectures import Family

FAMILY = Family(
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    vision=("model.visual",),
    adaptor=("model.visual.merger", "model.visual.deepstack_merger_list"),
    language=("model.language_model", "lm_head"),
)
