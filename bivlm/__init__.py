"""Bi-VLM: the linear layers of vision-language models at one to four bits per weight, counted as bytes on disk.

Importing this package lets ``AutoModelForImageTextToText.from_pretrained`` load packed checkpoints. It imports neither
torch nor transformers: once transformers' quantizers are imported, before or after, ``bivlm`` is registered with them.

What a notebook or a served model needs is here: `load_recipe`, `pack_layer`, `compress_model`, `measure_bits`,
`load_model` and `answer`. Each is imported on first use.

Shapes are written as suffix letters, here and everywhere below:

====== ==========================================
letter meaning
====== ==========================================
``M``  out_features of a linear layer (rows)
``N``  in_features of a linear layer (columns)
``K``  groups of unsalient weights (``N_uns`` in the paper)
``S``  salient weights of a layer
``V``  distinct magnitudes in a layer
``T``  tokens
``B``  batch
``D``  hidden size
====== ==========================================
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:
    from bivlm.compression.model import compress_model, pack_layer
    from bivlm.evaluation.generation import answer, load_model
    from bivlm.recipe.loading import load_recipe
    from bivlm.reports.bits import bits_of as measure_bits

__all__ = ["answer", "compress_model", "load_model", "load_recipe", "measure_bits", "pack_layer"]

_PLACES = {
    "answer": ("bivlm.evaluation.generation", "answer"),
    "compress_model": ("bivlm.compression.model", "compress_model"),
    "load_model": ("bivlm.evaluation.generation", "load_model"),
    "load_recipe": ("bivlm.recipe.loading", "load_recipe"),
    "measure_bits": ("bivlm.reports.bits", "bits_of"),
    "pack_layer": ("bivlm.compression.model", "pack_layer"),
}


def __getattr__(name: str) -> Any:
    """Import a function of `__all__` on first use."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


@when_imported("transformers.quantizers.auto")
def _register(_: ModuleType) -> None:
    import bivlm.checkpoint.transformers_plugin  # noqa: F401
