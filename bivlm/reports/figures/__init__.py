"""Every figure, drawn from records alone; no checkpoint is read.

`layers` are the records of compression_report.json in model order; a value that is None, missing or not finite leaves
its layer out of the figure, and a figure with nothing left says so in a sentence. Components keep their colour in
every figure.
"""

from bivlm.reports.figures.compression import (
    accuracy_against_bits,
    bits_and_error,
    error_by_p_max,
    kl_per_layer,
    weight_histogram,
)
from bivlm.reports.figures.leaderboard import quality_against_bits
from bivlm.reports.figures.pruning import accuracy_by_share, loss_maps
from bivlm.reports.figures.saliency import salient_overlap
from bivlm.reports.figures.style import COMPONENT_COLOURS, INK, PAPER, png, svg

__all__ = [
    "COMPONENT_COLOURS",
    "INK",
    "PAPER",
    "accuracy_against_bits",
    "accuracy_by_share",
    "bits_and_error",
    "error_by_p_max",
    "kl_per_layer",
    "loss_maps",
    "png",
    "quality_against_bits",
    "salient_overlap",
    "svg",
    "weight_histogram",
]
