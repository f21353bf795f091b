"""Image-token pruning: tokens that matter little are dropped while a model reads its prompt.

They are dropped physically: layers compute on the tokens that are left, with their own positions, and the caches hold
no more than these. The logits are those of a model that is told by its attention masks not to look at the others.
"""

# What needs the model zoo is not imported here: recipes hold settings, and are read without it.
from bivlm.pruning.settings import (
    PLACES,
    PRUNING_KEY,
    SCORES,
    SCORES_AT,
    Place,
    PruningSettings,
    RecipePruning,
    Score,
    SweepSettings,
)

__all__ = [
    "PLACES",
    "PRUNING_KEY",
    "SCORES",
    "SCORES_AT",
    "Place",
    "PruningSettings",
    "RecipePruning",
    "Score",
    "SweepSettings",
]
