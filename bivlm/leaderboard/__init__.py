"""Many recipes on one model: what each costs and loses, which of them nothing beats, and the tables that say so.

A board is a record ready for JSON, made of one `Entry` a recipe; tables and pictures are made of the board alone.
Everything that is compared is compared at *stored* bits; the bits that a method claims stand beside them.
"""

from bivlm.leaderboard.entries import (
    LOSSES,
    Accuracy,
    Entry,
    FullPrecision,
    Loss,
    mean_accuracy,
    method_label,
    relative_error,
    shannon_bound,
)
from bivlm.leaderboard.ranking import board, fingerprint, fronts_of, pareto_front
from bivlm.leaderboard.tables import EXPLANATION, as_cells, as_csv, as_markdown, short_names

__all__ = [
    "EXPLANATION",
    "LOSSES",
    "Accuracy",
    "Entry",
    "FullPrecision",
    "Loss",
    "as_cells",
    "as_csv",
    "as_markdown",
    "board",
    "fingerprint",
    "fronts_of",
    "mean_accuracy",
    "method_label",
    "pareto_front",
    "relative_error",
    "shannon_bound",
    "short_names",
]
