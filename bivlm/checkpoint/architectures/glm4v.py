"""GLM-4.1V and its mixture of experts (GLM-4.5V, GLM-4.6V): the patch merger is the adaptor.

The convolution before it belongs to the vision model. Experts lie on disk one by one.
"""

from bivlm.checkpoint.architectures import Family

FAMILY = Family(
    model_types=("glm4v", "glm4v_moe"),
    vision=("model.visual",),
    adaptor=("model.visual.merger",),
    language=("model.language_model", "lm_head"),
)
