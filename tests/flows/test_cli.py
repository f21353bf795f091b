import json
import subprocess
import sys
import textwrap

import pytest
import yaml

from bivlm.bits import bits_of
from flows import cli


def test_looking_at_a_checkpoint_loads_no_orchestrator(compressed):
    script = textwrap.dedent("""
        import sys
        from flows.cli import main
        assert main(["bits", sys.argv[1]]) == main(["inspect", "--model", sys.argv[1]]) == 0
        loaded = {"prefect", "mlflow", "boto3", "tasks"} & set(sys.modules)
        assert not loaded, loaded
    """)
    done = subprocess.run([sys.executable, "-c", script, compressed.output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bits_prints_what_the_files_cost(compressed, capsys):
    assert cli.main(["bits", str(compressed.output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == bits_of(compressed.output)


def test_bits_prints_a_table_for_people(compressed, capsys):
    assert cli.main(["bits", str(compressed.output)]) == 0
    stored = bits_of(compressed.output)["linears"]["stored"]
    assert f"{stored:.3f}" in capsys.readouterr().out


def test_bits_of_a_checkpoint_that_is_not_packed(compressed, capsys):
    assert cli.main(["bits", str(compressed.model)]) == 0
    assert "whole model" in capsys.readouterr().out


def test_inspect_names_every_linear_and_what_is_left_alone(compressed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.main(["inspect", "--model", str(compressed.model)]) == 0
    out = capsys.readouterr().out
    assert "model.language_model.layers.0.self_attn.q_proj" in out
    assert "embed_tokens" in out


def test_evaluate_prints_what_the_contract_says(compressed, questions, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path))
    task = f"vqa:{questions}"
    assert cli.main(["evaluate", "--model", str(compressed.output), "--task", task, "--limit", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record) == ["model", "task", "n", "metrics", "ci95", "outcomes"]
    assert (record["model"], record["task"], record["n"]) == (str(compressed.output), task, 2)
    assert next(iter(record["metrics"])) == "accuracy"
    assert record["outcomes"].endswith(".parquet")


def test_compress_needs_no_more_than_model_recipe_and_output(new_compression, tmp_path, capsys, monkeypatch):
    compression = new_compression(tmp_path)
    monkeypatch.setenv("BIVLM_WORKSPACE", str(compression.workspace))
    monkeypatch.setenv("COLUMNS", "200")
    compression.recipe["evaluation"] = []
    arguments = ["--model", str(compression.model), "--recipe", str(compression.recipe_file())]
    assert cli.main(["compress", *arguments, "--output", str(compression.output), "--no-evaluate"]) == 0
    out = capsys.readouterr().out
    assert f"{compression.report()['bits']['linears']['stored']:.3f}" in out
    assert "mlflow ui --backend-store-uri sqlite:///" in out


def bad_recipe(change):
    def arguments(compression):
        change(compression.recipe)
        return {"recipe": str(compression.recipe_file())}

    return arguments


BAD_INPUT = {
    "no such model": (lambda c: {"model": str(c.place / "nothing")}, "nothing"),
    "a folder without a checkpoint": (lambda c: {"model": str(c.workspace)}, "config.json"),
    "no such recipe": (lambda c: {"recipe": "nonesuch"}, "nonesuch"),
    "an unknown key": (bad_recipe(lambda r: r["components"]["vision"].update(grups=2)), "grups"),
    "a keep that matches nothing": (bad_recipe(lambda r: r.update(keep=["lm_haed"])), "lm_haed"),
    "an unknown benchmark": (bad_recipe(lambda r: r.update(evaluation=["mme:all"])), "mme:all"),
    "too few calibration samples": (bad_recipe(lambda r: r["calibration"].update(samples=9)), "calibration.samples"),
    "an output that is not empty": (lambda c: {"output": str(c.place)}, "not empty"),
    "the model as output": (lambda c: {"output": str(c.model)}, "overlaps"),
    "a workspace that is a file": (lambda c: {"workspace": str(c.recipe_file())}, "not a folder"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_in_one_message_without_a_trace(case, new_compression, tmp_path, capsys):
    change, named = BAD_INPUT[case]
    compression = new_compression(tmp_path)
    values = {
        "model": str(compression.model),
        "recipe": str(compression.recipe_file()),
        "output": str(compression.output),
        "workspace": str(compression.workspace),
    }
    values |= change(compression)
    arguments = [part for key, value in values.items() for part in (f"--{key}", value)]
    assert cli.main(["compress", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("bivlm compress:") == 1
    assert named in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["compress"], ["squeeze"], ["bits"], ["evaluate", "--model", "x"]])
def test_bad_usage_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2


def test_a_run_that_fails_ends_with_code_1_and_its_trace(monkeypatch, capsys, compressed):
    def broken(folder):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr("bivlm.bits.bits_of", broken)
    assert cli.main(["bits", str(compressed.output)]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "bivlm bits: failed: the disk is gone" in err


def test_the_recipes_that_are_shipped_are_known_by_name(capsys):
    from bivlm.recipe import load_recipe, shipped_recipes

    assert {"bivlm", "bivlm-paper", "bivlm-1bit"} <= set(shipped_recipes())
    assert all(load_recipe(name).name == name for name in shipped_recipes())


def test_deployments_name_flows_that_exist_and_parameters_that_they_take():
    import importlib
    import inspect
    from pathlib import Path

    root = Path(__file__).parents[2]
    for deployment in yaml.safe_load((root / "prefect.yaml").read_text())["deployments"]:
        file, _, name = deployment["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
        assert set(deployment["parameters"]) <= set(inspect.signature(flow.fn).parameters)
