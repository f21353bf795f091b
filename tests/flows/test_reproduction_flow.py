"""`bivlm reproduce` rehearsed: tiny checkpoints, the four benchmarks, every column of the paper's tables."""

import json

import pandas as pd
import pytest
from published_data import SETS, write_set
from tiny_papers import make_paper_model

from bivlm.errors import InputError
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.generation import load_model
from bivlm.evaluation.outcomes import evaluate
from bivlm.reports.bits import bits_of
from bivlm.reports.paper_tables.published import published, published_models
from bivlm.reports.paper_tables.report import SCORES
from flows.cli import main as cli


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Copies of the four benchmarks, a few questions each."""
    place = tmp_path_factory.mktemp("sets")
    return [f"{kind}:{write_set(kind, place / kind)}" for kind in SETS]


@pytest.fixture
def reproduced(tiny_llava, tasks, conversations, tmp_path, monkeypatch):
    """A function that reproduces some tables of one of the paper's models on a checkpoint."""
    from bivlm.reports.paper_tables import recipe_sets
    from flows.reproduction import reproduce_flow

    shipped = recipe_sets.load_recipe

    def with_few_samples(name):
        recipe = shipped(name)
        few = recipe.calibration.model_copy(update={"held_out": 2})
        return recipe.model_copy(update={"calibration": few})

    monkeypatch.setattr(recipe_sets, "load_recipe", with_few_samples)
    monkeypatch.setattr(recipe_sets, "SAMPLES", 3)

    def run(checkpoint=tiny_llava, tables=("comparison",), model="qwen2.5-vl-7b"):
        return reproduce_flow(
            model=model,
            output=str(tmp_path / "out"),
            checkpoint=str(checkpoint),
            tables=list(tables),
            tasks=tasks,
            calibration=str(conversations),
            workspace=str(tmp_path / "workspace"),
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("model", published_models())
def test_every_column_is_measured_on_its_stored_checkpoint(model, reproduced, tasks, tmp_path):
    if model != "llama-3.2-vision-11b":
        pytest.importorskip("torchvision", reason="its processor holds a video processor, which needs torchvision")
    checkpoint = make_paper_model(model, tmp_path / "base")
    found = reproduced(checkpoint, ("comparison", "components"), model)
    columns = published(model).columns
    assert set(found["columns"]) == {
        *columns["comparison"],
        *columns["components"],
        "refitted-language",
        "refitted-all",
    }
    assert not any("failed" in column for column in found["columns"].values())
    for column in ("billm-vision", "bivlm-all"):
        bits = bits_of(tmp_path / "out" / column)
        assert found["columns"][column]["stored_bits"] == bits["linears"]["stored"]
        model, processor = load_model(tmp_path / "out" / column, device="cpu")
        metrics = evaluate(model, processor, load_benchmark(tasks[0])).metrics
        assert found["columns"][column]["scores"]["mme/perception"] == metrics["perception"]
    assert set(found["columns"]["bivlm-all"]["scores"]) == set(SCORES)
    table = pd.read_csv(tmp_path / "out" / "components.csv")
    assert list(table["column"]) == columns["components"]
    assert json.loads((tmp_path / "out" / "reproduction.json").read_text())["columns"] == found["columns"]


@pytest.mark.slow
def test_a_column_that_cannot_be_is_listed_with_the_reason(reproduced, tmp_path, monkeypatch):
    from bivlm.reports.paper_tables import recipe_sets
    from flows import reproduction

    monkeypatch.setitem(recipe_sets.OURS, "comparison", ())
    whole = reproduction.recipe_set

    def two(*arguments):
        recipes = whole(*arguments)
        broken = recipes["awq-language"].model_copy(update={"keep": ("no.such.layer",)})
        return {"awq-language": broken, "bivlm-language": recipes["bivlm-language"]}

    monkeypatch.setattr(reproduction, "recipe_set", two)
    found = reproduced()
    assert "matches no linear layer" in found["columns"]["awq-language"]["failed"]
    assert found["columns"]["bivlm-language"]["stored_bits"] > 1
    assert "- awq-language: recipe: keep: 'no.such.layer' matches no" in (tmp_path / "out/reproduction.md").read_text()


class TestWhatIsRefused:
    def test_a_model_that_is_none_of_the_papers(self, capsys):
        assert cli.main(["reproduce", "--model", "gpt2", "--output", "out"]) == cli.BAD_INPUT
        assert "model 'gpt2': not one of the paper's; expected llama-3.2-vision-11b, " in capsys.readouterr().err

    def test_a_table_that_is_none(self, reproduced):
        with pytest.raises(InputError, match=r"tables: found 'figures', expected some of comparison, components"):
            reproduced(tables=("figures",))
