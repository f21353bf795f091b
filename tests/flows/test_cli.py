import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

from bivlm.compression.model import compress_model
from bivlm.recipe import loading
from bivlm.recipe.loading import parse_recipe
from bivlm.reports.bits import bits_of
from flows.cli import main as cli
from tests.flows.running import Running


def test_looking_at_a_checkpoint_loads_no_orchestrator(compressed):
    script = textwrap.dedent("""
        import sys
        from flows.cli.main import main
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


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param(["bits", "PACKED", "--json"], cli.DONE, id="bits"),
        pytest.param(["lineage", "PACKED", "--json"], cli.DONE, id="lineage"),
        pytest.param(["inspect", "--model", "PACKED/none"], cli.BAD_INPUT, id="a model that is not there"),
    ],
)
def test_what_needs_no_tensors_is_said_without_torch(arguments, code, compressed, capsys):
    script = textwrap.dedent("""
        import sys
        from flows.cli.main import main
        code = main(sys.argv[1:])
        loaded = {"torch._C", "transformers", "prefect", "mlflow", "boto3", "scipy"} & sys.modules.keys()
        sys.exit(f"imported {loaded}" if loaded else code)
    """)
    arguments = [argument.replace("PACKED", str(compressed.output)) for argument in arguments]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert cli.main(arguments) == done.returncode == code, done.stderr
    assert (done.stdout, done.stderr) == capsys.readouterr()


def test_without_the_flow_a_model_is_packed_to_the_same_bytes(compressed, tmp_path):
    records = compress_model(compressed.model, parse_recipe(compressed.recipe), tmp_path / "out")
    ours = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert ours == {name: compressed.weights()[name] for name in ours}
    assert {"model.safetensors", "config.json"} < ours.keys()
    assert {layer["name"]: layer["error"] for layer in compressed.report()["layers"]} == {
        name: record.error for name, record in records.items()
    }


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


@pytest.mark.parametrize("calibration", [None, "reference"])
def test_compress_says_which_recipe_it_takes_by_default(calibration, new_compression, tmp_path, capsys, monkeypatch):
    compression = new_compression(tmp_path)
    monkeypatch.setattr(loading, "CALIBRATED", str(compression.recipe_file()))
    arguments = ["--model", str(compression.model), "--output", str(compression.output), "--no-evaluate"]
    arguments += ["--workspace", str(compression.workspace)]
    assert cli.main(["compress", *arguments, *(["--calibration", calibration] if calibration else [])]) == 0
    taken, looked_at = "trellis-2bit-weights", "the weights alone"
    if calibration:
        taken, looked_at = str(compression.recipe_file()), "samples of reference"
    assert f"recipe: {taken}, which looks at {looked_at}\n" in capsys.readouterr().err
    lineage = json.loads((compression.output / "lineage.json").read_text())
    assert lineage["recipe"]["calibration"]["source"] == "reference"


def bad_recipe(change):
    def arguments(compression):
        change(compression.recipe)
        return {"recipe": str(compression.recipe_file())}

    return arguments


def an_output_of_another_kind(compression):
    compression.output.mkdir()
    (compression.output / "thesis.tex").write_text("mine")
    return {}


BAD_INPUT = {
    "no such model": (lambda c: {"model": str(c.place / "nothing")}, "nothing"),
    "a folder without a checkpoint": (lambda c: {"model": c.recipe["calibration"]["source"]}, "config.json"),
    "no such recipe": (lambda c: {"recipe": "nonesuch"}, "nonesuch"),
    "an unknown key": (bad_recipe(lambda r: r["components"]["vision"].update(grups=2)), "grups"),
    "a keep that matches nothing": (bad_recipe(lambda r: r.update(keep=["lm_haed"])), "lm_haed"),
    "an unknown benchmark": (bad_recipe(lambda r: r.update(evaluation=["mme:all"])), "mme:all"),
    "too few calibration samples": (bad_recipe(lambda r: r["calibration"].update(samples=9)), "calibration.samples"),
    "an output that is not empty": (an_output_of_another_kind, "not empty"),
    "an output around the workspace": (lambda c: {"output": str(c.place)}, "overlaps the workspace"),
    "the model as output": (lambda c: {"output": str(c.model)}, "overlaps"),
    "a workspace that is a file": (lambda c: {"workspace": str(c.recipe_file())}, "not a folder"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_in_one_message_without_a_trace(case, new_compression, tmp_path, capsys):
    change, named = BAD_INPUT[case]
    compression = new_compression(tmp_path)
    assert cli.main(["compress", *compression.arguments(**change(compression))]) == 2
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

    monkeypatch.setattr("bivlm.reports.bits.bits_of", broken)
    assert cli.main(["bits", str(compressed.output)]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "bivlm bits: failed: RuntimeError: the disk is gone" in err


def test_the_recipes_that_are_shipped_are_known_by_name(capsys):
    from bivlm.recipe.loading import load_recipe, shipped_recipes

    assert {"bivlm", "bivlm-paper", "bivlm-1bit"} <= set(shipped_recipes())
    assert all(load_recipe(name).name == name for name in shipped_recipes())


def test_deployments_name_flows_that_exist_and_parameters_that_they_take():
    import importlib
    import inspect
    from pathlib import Path

    root = Path(__file__).parents[2]
    for deployment in yaml.safe_load((root / "prefect.yaml").read_text())["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), name)
        assert set(deployment.get("parameters", {})) <= set(inspect.signature(flow.fn).parameters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "s3://bucket/out"}, "output 's3://bucket/out': expected a folder on this machine"),
        ({"output": "/proc/version/out"}, "folder of the output out: /proc/version: not a folder"),
        ({"output": "/proc/out"}, "folder of the output out: /proc: cannot be written to"),
        ({"output": ""}, "output '': expected a folder on this machine"),
        ({"workspace": "http://host/work"}, r"workspace http://host/work: expected a folder or s3://"),
        ({"workspace": "/proc/work"}, "workspace /proc/work: cannot be written to"),
        ({"recipe": "bivlm9"}, "recipe 'bivlm9': no such file, and not one of "),
    ],
)
def test_places_that_cannot_be_are_refused_before_any_work(
    new_compression, tmp_path, capsys, counted, options, message
):
    compression = new_compression(tmp_path)
    assert cli.main(["compress", *compression.arguments(**options)]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
    assert counted == {stage: [] for stage in counted}


def test_a_tracking_address_of_no_known_kind_is_refused(new_compression, tmp_path, capsys, monkeypatch):
    compression = new_compression(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://host")
    arguments = ["--model", str(compression.model), "--recipe", str(compression.recipe_file())]
    arguments += ["--output", str(compression.output), "--workspace", str(compression.workspace)]
    assert cli.main(["compress", *arguments]) == cli.BAD_INPUT
    assert "MLFLOW_TRACKING_URI 'htp://host': expected http://" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tracking_database_that_was_killed_while_it_was_made_is_made_anew(new_compression, tmp_path):
    compression = new_compression(tmp_path)
    (compression.workspace / "mlflow.db").unlink()
    (compression.workspace / ".mlflow.db.partial").write_bytes(b"SQLite format 3\0 and no more")
    assert compression.run(evaluate=False)["mlflow"]["version"] == 1
    assert sorted(path.name for path in compression.workspace.glob("*mlflow*")) == ["mlflow-artifacts", "mlflow.db"]


def test_outcomes_of_two_folders_of_one_name_are_kept_apart(compressed, questions, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "cache"))
    files = []
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "OUT").symlink_to(compressed.output if place == "one" else compressed.model)
        shutil.copytree(tmp_path / place / "OUT", tmp_path / place / "copy" / "OUT")
        arguments = ["evaluate", "--model", str(tmp_path / place / "copy" / "OUT"), "--task", f"vqa:{questions}"]
        assert cli.main([*arguments, "--limit", "1", "--json"]) == cli.DONE
        files.append(json.loads(capsys.readouterr().out)["outcomes"])
    assert files[0] != files[1]


def test_a_damaged_checkpoint_is_named_when_it_is_evaluated(compressed, questions, capsys, tmp_path):
    damaged = shutil.copytree(compressed.output, tmp_path / "damaged")
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:-10])
    assert cli.main(["evaluate", "--model", str(damaged), "--task", f"vqa:{questions}"]) == cli.BAD_INPUT
    assert f"{damaged}/model.safetensors" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_goes_on(new_compression, compressed, tmp_path, sent):
    compression = new_compression(tmp_path)
    run = Running(compression, str(compression.workspace), tmp_path / "log", "--no-evaluate")
    while not list((compression.workspace / "steps").glob("*.json")):
        time.sleep(0.02)
    run.process.send_signal(sent)
    assert run.end() == cli.FAILED
    assert "interrupted; run it again to go on from where it was" in run.errors().splitlines()[-1]
    compression.run(evaluate=False)
    assert compression.weights() == compressed.weights()


@pytest.mark.slow
def test_a_prefect_server_that_is_not_there_is_named(compressed, tmp_path):
    own = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    run = Running(compressed, str(compressed.workspace), tmp_path / "log", **own)
    assert run.end() == cli.FAILED
    assert "PREFECT_API_URL is http://127.0.0.1:9/api, where no Prefect server answers" in run.errors()
    assert "Traceback" not in run.errors()


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(["inspect", "--model"], id="a long table", marks=pytest.mark.slow),
        pytest.param(["bits"], id="a short one"),
    ],
)
def test_a_reader_that_has_seen_enough_is_no_failure(tiny_llava, asked):
    command = [sys.executable, "-m", "flows.cli", *asked, str(tiny_llava)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (cli.DONE, "")


def test_a_library_that_ends_the_process_has_not_done_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr("bivlm.reports.bits.bits_of", lambda folder: sys.exit(1))
    with pytest.raises(SystemExit) as ended:
        cli.main(["bits", str(tmp_path)])
    assert ended.value.code == 1
