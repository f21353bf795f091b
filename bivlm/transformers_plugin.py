"""The earlier name of `bivlm.checkpoint.transformers_plugin`: cards of models on the hub say to import from it."""

from bivlm.checkpoint.transformers_plugin import BiVLMConfig

__all__ = ["BiVLMConfig"]
