"""The recipes behind the columns of the paper's tables."""

from __future__ import annotations

from collections.abc import Sequence

from bivlm.recipe.loading import COMPONENTS, Recipe, load_recipe, parse_recipe
from bivlm.reports.paper_tables.published import TABLES, Published

FULL_PRECISION = "full-precision"
# The shipped recipe behind each method's name. AWQ has no grid of fewer than two bits; `bivlm` is the paper's method to
# the letter, `refitted` the same with row scales that are solved once more, which the paper does not have.
SHIPPED = {"awq": "awq-w2g128", "billm": "billm", "bivlm": "bivlm-paper", "refitted": "bivlm"}
SAMPLES = 64  # the paper's
OURS = {"comparison": ("refitted-language", "refitted-all"), "components": ()}


def recipe_set(paper: Published, tables: Sequence[str], tasks: Sequence[str], source: str) -> dict[str, Recipe]:
    """Return a recipe for every column of `tables` but full precision, by the column's name, each once.

    All evaluate `tasks` and draw `SAMPLES` calibration samples from `source`.
    """
    columns = [column for table in TABLES if table in tables for column in (*paper.columns[table], *OURS[table])]
    return {column: _recipe(column, tasks, source) for column in dict.fromkeys(columns) if column != FULL_PRECISION}


def _recipe(column: str, tasks: Sequence[str], source: str) -> Recipe:
    method, _, parts = column.partition("-")
    chosen = COMPONENTS if parts == "all" else parts.split("-")
    shipped = load_recipe(SHIPPED[method]).canonical()
    components = {name: settings for name, settings in shipped["components"].items() if name in chosen}
    calibration = shipped["calibration"] | {"source": source, "samples": SAMPLES}
    changed = {"name": column, "components": components, "calibration": calibration, "evaluation": list(tasks)}
    return parse_recipe(shipped | changed, f"column {column}")
