"""Many recipes on one model: what each costs and loses, which of them no other dominates, and the tables that say so.

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
from bivlm.leaderboard.ranking import board, fingerprint, fronts_of, not_above_chance, pareto_front, ranks_of
from bivlm.leaderboard.tables import SHANNON, as_cells, as_csv, as_markdown, explanation, short_names

__all__ = [
    "LOSSES",
    "SHANNON",
    "Accuracy",
    "Entry",
    "FullPrecision",
    "Loss",
    "as_cells",
    "as_csv",
    "as_markdown",
    "board",
    "explanation",
    "fingerprint",
    "fronts_of",
    "mean_accuracy",
    "method_label",
    "not_above_chance",
    "pareto_front",
    "ranks_of",
    "relative_error",
    "shannon_bound",
    "short_names",
]
