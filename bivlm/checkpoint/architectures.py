"""Architectures: which modules of a loaded model are vision, adaptor and language.

A new one is an entry of `ARCHITECTURES`. For an architecture that is not there, the recipe's ``modules`` list the names
of modules by component.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bivlm.errors import InputError
from bivlm.untrusted import short

Component = Literal["vision", "adaptor", "language"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
MODULES_KEY = "modules"  # in a recipe, and in the quantization config of a packed checkpoint

Modules = dict[str, list[str]]


@dataclass(frozen=True)
class Architecture:
    """An architecture.

    Attributes:
        model_types: the values of ``model_type`` in config.json that it serves.
        vision: names of the vision modules in the loaded model, for example "model.vision_tower".
        adaptor: names of the modules between them; they may lie within a vision module.
        language: names of the language modules, the head included.
    """

    model_types: tuple[str, ...]
    vision: tuple[str, ...]
    adaptor: tuple[str, ...]
    language: tuple[str, ...]

    def component(self, module: str) -> Component | None:
        """Return the component that `module` is part of, by the longest name that it lies within; None outside all."""
        found = [
            (len(prefix), component)
            for component in COMPONENTS
            for prefix in getattr(self, component)
            if module == prefix or module.startswith(f"{prefix}.")
        ]
        return max(found)[1] if found else None

    @classmethod
    def of_modules(cls, modules: Modules) -> Architecture:
        """Return the architecture that `modules` describe, as `parse_modules` gives them."""
        return cls((), *(tuple(modules.get(component, ())) for component in COMPONENTS))


def parse_modules(value: Any, source: str = MODULES_KEY) -> Modules:
    """Return names of modules in the loaded model by component, from what a recipe says; empty components are left out.

    Raises `InputError` naming `source` for anything but lists of names under vision, adaptor and language, for a name
    that is there twice, and for a map without a language or vision module.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{source}: expected names of modules by {', '.join(COMPONENTS)}, found {short(value)}")
    modules: Modules = {}
    for component, names in value.items():
        if component not in COMPONENTS:
            raise InputError(f"{source}: {short(component)}: expected one of {', '.join(COMPONENTS)}")
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
            raise InputError(f"{source}.{component}: expected a list of module names, found {short(names)}")
        modules[component] = list(names)
    every = [name for names in modules.values() for name in names]
    if twice := next((name for name, count in Counter(every).items() if count > 1), None):
        raise InputError(f"{source}: {twice} is named twice")
    if missing := next((component for component in ("vision", "language") if not modules.get(component)), None):
        raise InputError(f"{source}.{missing}: expected at least one module")
    return {component: modules[component] for component in COMPONENTS if modules.get(component)}


_KNOWN = (
    # LLaVA 1.5 and 1.6, LLaVA-OneVision: a CLIP or SigLIP tower, a two-layer projector, a decoder.
    Architecture(
        model_types=("llava", "llava_next", "llava_onevision"),
        vision=("model.vision_tower",),
        adaptor=("model.multi_modal_projector",),
        language=("model.language_model", "lm_head"),
    ),
    # InternVL in transformers' own format (OpenGVLab/...-hf): an InternViT tower, pixel shuffle, a two-layer
    # projector.
    Architecture(
        model_types=("internvl",),
        vision=("model.vision_tower",),
        adaptor=("model.multi_modal_projector",),
        language=("model.language_model", "lm_head"),
    ),
    # Idefics3 and SmolVLM: a SigLIP tower, pixel shuffle and one linear layer as connector, a Llama decoder.
    Architecture(
        model_types=("idefics3", "smolvlm"),
        vision=("model.vision_model",),
        adaptor=("model.connector",),
        language=("model.text_model", "lm_head"),
    ),
    # PaliGemma 1 and 2: a SigLIP tower, one linear layer, a Gemma decoder whose head is the embedding.
    Architecture(
        model_types=("paligemma",),
        vision=("model.vision_tower",),
        adaptor=("model.multi_modal_projector",),
        language=("model.language_model", "lm_head"),
    ),
    # Gemma 3: a SigLIP tower, a projector that is a bare parameter (left alone), a decoder whose head is the
    # embedding.
    Architecture(
        model_types=("gemma3",),
        vision=("model.vision_tower",),
        adaptor=("model.multi_modal_projector",),
        language=("model.language_model", "lm_head"),
    ),
    # Qwen2-VL and Qwen2.5-VL: the patch merger at the end of the vision model is the adaptor.
    Architecture(
        model_types=("qwen2_vl", "qwen2_5_vl"),
        vision=("model.visual",),
        adaptor=("model.visual.merger",),
        language=("model.language_model", "lm_head"),
    ),
    # Qwen3-VL and its mixture of experts: the adaptor is the patch merger and the deep-stack mergers.
    # These bring the features of inner vision blocks to the first language layers. Experts are 3-D
    # parameters.
    Architecture(
        model_types=("qwen3_vl", "qwen3_vl_moe"),
        vision=("model.visual",),
        adaptor=("model.visual.merger", "model.visual.deepstack_merger_list"),
        language=("model.language_model", "lm_head"),
    ),
    # GLM-4.1V and its mixture of experts (GLM-4.5V, GLM-4.6V): the patch merger is the adaptor.
    # The convolution before it belongs to the vision model. Experts lie on disk one by one.
    Architecture(
        model_types=("glm4v", "glm4v_moe"),
        vision=("model.visual",),
        adaptor=("model.visual.merger",),
        language=("model.language_model", "lm_head"),
    ),
    # Llama 3.2 Vision: image features enter through cross-attention layers, which belong to the language
    # model.
    Architecture(
        model_types=("mllama",),
        vision=("model.vision_model",),
        adaptor=("model.multi_modal_projector",),
        language=("model.language_model", "lm_head"),
    ),
)
ARCHITECTURES = {model_type: each for each in _KNOWN for model_type in each.model_types}


def architecture_of(model_type: str) -> Architecture:
    """Return the architecture of `model_type`; raises `InputError` with the types that are known."""
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise InputError(
            f"unknown architecture: model_type {short(model_type)}; known are {', '.join(sorted(ARCHITECTURES))}. "
            f"A recipe may say with '{MODULES_KEY}' which of its modules are {', '.join(COMPONENTS)}"
        ) from None
