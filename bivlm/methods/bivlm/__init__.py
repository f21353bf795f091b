"""The paper's method: quantile groups of the unsalient weights, and salient weights with more bits."""

from bivlm.methods.bivlm.method import BiVLM as BiVLM  # registers the method
