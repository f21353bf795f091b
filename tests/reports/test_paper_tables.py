"""The paper's tables: its figures as they stand there, the recipes of their columns, and ours beside them."""

import pandas as pd
import pytest

from bivlm.errors import InputError
from bivlm.reports.paper_tables.published import TABLES, published, published_models
from bivlm.reports.paper_tables.recipe_sets import FULL_PRECISION, recipe_set
from bivlm.reports.paper_tables.report import SCORES, as_markdown, as_table, scores_of

TASKS = ["mme:hub", "mmmu:hub"]
NAMES = {"llama-3.2-vision-11b", "llava-onevision-7b", "qwen2.5-vl-7b"}


def test_the_papers_models():
    assert set(published_models()) == NAMES
    with pytest.raises(InputError, match=r"model 'llava': not one of the paper's; expected llama-3\.2-vision-11b, "):
        published("llava")


@pytest.mark.parametrize(
    ("name", "table", "column", "score", "figure"),
    [
        ("qwen2.5-vl-7b", "comparison", "bivlm-all", "mmmu/accuracy", 42.89),
        ("qwen2.5-vl-7b", "components", "billm-adaptor", "mme/perception", 1707.72),
        ("llava-onevision-7b", "comparison", "awq-language", "mmmu/accuracy", 25.33),
        ("llama-3.2-vision-11b", "components", "billm-adaptor-language", "vizwiz/accuracy", 51.11),
    ],
)
def test_figures_stand_where_the_paper_has_them(name, table, column, score, figure):
    assert published(name).figures[table][score][column] == figure


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_component_tables_are_billms(name):
    """Their last column is BiLLM's of the comparison to the digit, which is why they are called so here."""
    paper = published(name)
    for score in SCORES:
        compared, parts = paper.figures["comparison"][score], paper.figures["components"][score]
        assert compared["billm-all"] == parts["billm-all"]
        assert compared[FULL_PRECISION] == parts[FULL_PRECISION]


def test_every_column_has_its_recipe():
    recipes = recipe_set(published("qwen2.5-vl-7b"), TABLES, TASKS, "reference")
    methods = {
        name: {part: each.method for part, each in recipe.components.items()} for name, recipe in recipes.items()
    }
    assert methods["awq-language"] == {"language": "awq"}
    assert methods["billm-vision-adaptor"] == {"vision": "billm", "adaptor": "billm"}
    assert methods["bivlm-all"] == dict.fromkeys(("vision", "adaptor", "language"), "bivlm")
    assert {name for name in recipes if name.startswith("billm")} == {
        f"billm-{parts}"
        for parts in (
            *("vision", "adaptor", "language", "vision-adaptor", "vision-language", "adaptor-language", "all"),
        )
    }
    literal, ours = (
        recipes["bivlm-language"].components["language"],
        recipes["refitted-language"].components["language"],
    )
    assert (literal.groups, literal.refit, ours.groups, ours.refit) == (5, False, 2, True)
    for name, recipe in recipes.items():
        assert (recipe.name, recipe.evaluation, recipe.calibration.samples) == (name, tuple(TASKS), 64)


def test_a_table_alone_has_its_columns_alone():
    recipes = recipe_set(published("qwen2.5-vl-7b"), ["components"], TASKS, "reference")
    assert list(recipes) == published("qwen2.5-vl-7b").columns["components"][1:]


def test_scores_are_those_of_the_papers_metrics():
    found = {
        "mme:/data/MME": {"metrics": {"accuracy": 80.0, "perception": 1500.0, "cognition": 300.0}},
        "vizwiz:hub": {"metrics": {"accuracy": 60.0}},
        "reference:open": {"metrics": {"accuracy": 10.0}},
    }
    assert scores_of(found) == {"mme/perception": 1500.0, "mme/cognition": 300.0, "vizwiz/accuracy": 60.0}


MEASURED = {
    FULL_PRECISION: {"scores": {"mmmu/accuracy": 50.5}, "nominal_bits": 16.0, "stored_bits": 16.0, "model_bits": 16.0}
    | {"kl": 0.0},
    "bivlm-all": {"scores": {"mmmu/accuracy": 43.25}, "nominal_bits": 1.05, "stored_bits": 3.48, "model_bits": 5.0}
    | {"kl": 0.125},
    "awq-language": {"failed": "no such thing"},
}


def test_ours_stands_beside_the_papers():
    table = as_table(published("qwen2.5-vl-7b"), "comparison", MEASURED).set_index("column")
    assert list(table.index)[:2] == [FULL_PRECISION, "awq-language"]
    assert (table.loc["bivlm-all", "MMMU"], table.loc["bivlm-all", "MMMU, published"]) == (43.25, 42.89)
    assert table.loc["bivlm-all", "stored_bits"] == 3.48
    assert pd.isna(table.loc["refitted-all", "MMMU, published"])
    assert pd.isna(table.loc["billm-all", "MMMU"])
    assert table.loc["awq-language", "failed"] == "no such thing"


def test_as_markdown_a_line_a_column_and_the_reasons_of_what_failed():
    lines = as_markdown(published("qwen2.5-vl-7b"), TABLES, MEASURED).splitlines()
    assert "| bivlm-all | 1.050 | 3.480 | 5.000 | 0.125 | – (1458.70) | – (559.64) | – (64.01) | 43.25 (42.89) |" in [
        line.replace(" | – (62.96) |", " |") for line in lines
    ]
    assert "- awq-language: no such thing" in lines
    assert lines.count("## components") == 1
