import base64
import io
import json
import os
import shutil
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from changed_files import change_tensors
from PIL import Image
from safetensors import safe_open

import bivlm  # noqa: F401
from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.generation import load_model
from bivlm.evaluation.outcomes import evaluate
from bivlm.methods.bivlm.method import BiVLM
from bivlm.reports.bits import bits_of
from tasks.runtime.steps import open_workspace


def packed_tensors(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).view(torch.uint8).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def test_every_layer_of_the_recipe_is_packed_and_reported(compressed):
    expected = {linear.name for linear in linears(Checkpoint.open(compressed.model))} - {"lm_head"}
    assert set(Checkpoint.open(compressed.output).packed) == expected
    assert {layer["name"] for layer in compressed.report()["layers"]} == expected


def test_the_report_says_what_the_contract_says(compressed):
    report = compressed.report()
    assert list(report) == [
        "format",
        "base_model",
        "licence",
        "recipe",
        "recipe_sha256",
        "code_version",
        "bits",
        "relative_error",
        "layers",
        "tables",
        "warnings",
        "seconds",
        "peak_memory_bytes",
        "runner",
    ]
    assert set(report["base_model"]) == {"id", "revision", "sha256"}
    assert report["base_model"]["sha256"] == Checkpoint.open(compressed.model).digest()
    for layer in report["layers"]:
        keys = "name component shape method groups p_sal_nominal p_sal_actual error kl_gaussian bits seconds"
        assert set(keys.split()) <= set(layer)
        assert 0 < layer["error"] < 1
    assert report["peak_memory_bytes"] > 50e6


def test_the_bits_of_the_report_are_those_of_the_files(compressed):
    assert compressed.report()["bits"] == bits_of(compressed.output)


def test_accuracy_was_measured_on_the_stored_checkpoint(compressed):
    (task,) = compressed.recipe["evaluation"]
    model, processor = load_model(compressed.output, device="cpu")
    expected = evaluate(model, processor, load_benchmark(task)).metrics
    assert compressed.results[0]["evaluation"]["packed"][task]["metrics"] == expected


def test_divergence_from_full_precision_is_there(compressed):
    assert compressed.results[0]["evaluation"]["kl"] > 0


def test_both_models_are_paired_on_the_same_questions(compressed):
    found = compressed.results[0]["evaluation"]
    (task,) = compressed.recipe["evaluation"]
    loss = found["loss"][task]
    before, after = (found[role][task] for role in ("full_precision", "packed"))
    assert loss["n"] == before["n"] == after["n"]
    assert loss["loss"] == pytest.approx(before["metrics"]["accuracy"] - after["metrics"]["accuracy"])
    assert loss["low"] <= loss["loss"] <= loss["high"]


def test_one_parent_run_with_a_child_for_each_evaluation(compressed):
    (parent,) = compressed.runs("compression")
    children = compressed.runs("full precision") + compressed.runs("packed")
    assert parent.info.status == "FINISHED"
    assert [child.info.status for child in children] == ["FINISHED", "FINISHED"]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}


def test_the_parent_run_says_where_the_model_comes_from(compressed):
    (parent,) = compressed.runs("compression")
    report, tags = compressed.report(), parent.data.tags
    assert tags["bivlm.base.id"] == str(compressed.model)
    assert tags["bivlm.base.sha256"] == report["base_model"]["sha256"]
    assert tags["bivlm.recipe.sha256"] == report["recipe_sha256"]
    assert tags["bivlm.code_version"] == report["code_version"]
    assert parent.data.params["vision.groups"] == "2"
    assert parent.info.run_name.startswith("llava · small · ")


def test_the_parent_run_holds_the_report_and_a_table_of_layers(compressed):
    (parent,) = compressed.runs("compression")
    artifacts = {artifact.path for artifact in compressed.client.list_artifacts(parent.info.run_id)}
    assert {"compression_report.json", "recipe.json", "layers.json"} <= artifacts
    table = json.loads(Path(compressed.client.download_artifacts(parent.info.run_id, "layers.json")).read_text())
    assert len(table["data"]) == len(compressed.report()["layers"])


def test_the_calibration_set_is_a_data_set_of_the_parent_run(compressed):
    (parent,) = compressed.runs("compression")
    (used,) = parent.inputs.dataset_inputs
    (frozen,) = compressed.steps("calibration")
    assert [tag.value for tag in used.tags] == ["calibration"]
    assert used.dataset.digest == frozen["figures"]["sha256"][:32]


def test_metrics_belong_to_the_model_and_to_the_data_they_were_measured_on(compressed):
    logged = compressed.client.get_logged_model(compressed.results[0]["mlflow"]["model_id"])
    linked = {metric.key: metric for metric in logged.metrics}
    (benchmark,) = compressed.runs("packed")[0].inputs.dataset_inputs
    assert linked["accuracy"].dataset_digest == benchmark.dataset.digest
    assert linked["kl"].dataset_name.startswith("calibration.")
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "llava-small", "version": 1}]
    assert linked["bits/linears/stored"].value == compressed.report()["bits"]["linears"]["stored"]


def test_the_outcome_of_every_question_is_an_artifact_of_its_run(compressed):
    (run,) = compressed.runs("packed")
    outcomes = pd.read_parquet(compressed.client.download_artifacts(run.info.run_id, "outcomes.parquet"))
    assert len(outcomes) == 4


def test_the_registered_candidate_answers_as_the_packed_checkpoint_does(compressed, monkeypatch):
    tracked = compressed.results[0]["mlflow"]
    assert compressed.client.get_model_version_by_alias(tracked["registered_model"], "candidate").version == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracked["tracking_uri"])
    served = mlflow.pyfunc.load_model(f"models:/{tracked['registered_model']}@candidate")
    (task,) = compressed.recipe["evaluation"]
    benchmark = load_benchmark(task)
    samples = list(benchmark)
    table = pd.DataFrame(
        {"image": [png(sample.image) for sample in samples], "question": [s.question for s in samples]}
    )
    model, processor = load_model(compressed.output, device="cpu")
    expected = evaluate(model, processor, benchmark).outcomes["prediction"]
    assert served.predict(table, params={"max_new_tokens": benchmark.max_new_tokens}) == list(expected)


def png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_an_identical_request_does_nothing_again(compressed_copy, counted):
    report, files = compressed_copy.report(), {p: p.stat().st_mtime_ns for p in compressed_copy.output.iterdir()}
    again = compressed_copy.run()
    assert counted == {stage: [] for stage in counted}
    assert compressed_copy.report() == report
    assert {p: p.stat().st_mtime_ns for p in compressed_copy.output.iterdir()} == files
    assert again["mlflow"]["version"] == 1
    assert [len(compressed_copy.runs(role)) for role in ("compression", "full precision", "packed")] == [1, 1, 1]
    (parent,) = compressed_copy.runs("compression")
    history = compressed_copy.client.get_metric_history(parent.info.run_id, "bits/linears/stored")
    assert (parent.info.status, len(history)) == ("FINISHED", 1)


def test_a_changed_component_is_the_only_one_that_is_computed_again(compressed_copy, counted):
    before = packed_tensors(compressed_copy.output)
    compressed_copy.recipe["components"]["adaptor"]["groups"] = 1
    compressed_copy.run(output=str(compressed_copy.place / "other"))
    adaptor = {linear for linear in linears(Checkpoint.open(compressed_copy.model)) if linear.component == "adaptor"}
    assert counted["statistics"] == []  # p_max did not change
    assert set(counted["pack"]) == {linear.name for linear in adaptor}
    assert len(counted["evaluation"]) == 1  # full precision is known
    after = packed_tensors(compressed_copy.place / "other")
    assert {name for name in before if before[name] != after[name]} == {linear.disk_name for linear in adaptor}


@pytest.mark.slow
def test_a_new_version_of_the_method_runs_its_own_steps_again(compressed_copy, counted, monkeypatch):
    monkeypatch.setattr(BiVLM, "version", BiVLM.version + 1)
    compressed_copy.run(output=str(compressed_copy.place / "other"))
    layers = len(compressed_copy.report()["layers"])
    assert (counted["statistics"], len(counted["plan"]), len(counted["pack"])) == ([], layers, layers)
    assert counted["evaluation"] == []  # the bytes, and so the checkpoint, are the same


def test_a_revised_base_model_is_computed_again_where_its_weights_are_new(compressed_copy, counted, tmp_path):
    revised = tmp_path / "llava"
    shutil.copytree(compressed_copy.model, revised)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    change_tensors(revised, lambda tensors: tensors[name].add_(0.25))
    before = packed_tensors(compressed_copy.output)
    compressed_copy.run(model=str(revised), output=str(compressed_copy.place / "other"))
    (layer,) = counted["statistics"]
    assert layer.endswith("layers.1.mlp.up_proj")
    assert (counted["pack"], len(counted["plan"]), len(counted["evaluation"])) == ([layer], 1, 2)
    after = packed_tensors(compressed_copy.place / "other")
    assert {changed for changed in before if before[changed] != after[changed]} == {name}


def damage_shard(compression, damage):
    shard = compression.steps("pack")[0]["outputs"]["weight.packed"]["sha256"]
    path = compression.workspace / "objects" / shard[:2] / shard
    content = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


def damage_record(compression, damage):
    path = next(p for p in (compression.workspace / "steps").iterdir() if b'"stage":"pack"' in p.read_bytes())
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content.replace(b'"error":0.', b'"error":1.'))


@pytest.mark.parametrize(
    "damage",
    [pytest.param("deleted", marks=pytest.mark.slow), pytest.param("truncated", marks=pytest.mark.slow), "changed"],
)
@pytest.mark.parametrize("what", [damage_shard, damage_record])
def test_what_is_damaged_in_the_workspace_is_made_again(compressed_copy, counted, what, damage):
    what(compressed_copy, damage)
    expected = compressed_copy.weights()
    compressed_copy.run(output=str(compressed_copy.place / "other"), evaluate=False)
    assert len(counted["pack"]) == 1
    compressed_copy.output = compressed_copy.place / "other"
    assert compressed_copy.weights() == expected


@pytest.mark.slow
def test_an_output_that_was_tampered_with_is_written_again(compressed_copy, counted):
    expected = compressed_copy.weights()
    weights = compressed_copy.output / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    compressed_copy.run(evaluate=False)
    assert compressed_copy.weights() == expected
    assert counted["pack"] == []


def test_without_evaluation_nothing_is_asked(new_compression, tmp_path, counted):
    compression = new_compression(tmp_path)
    result = compression.run(evaluate=False)
    assert counted["evaluation"] == counted["divergence"] == []
    assert result["evaluation"] is None
    assert compression.runs("packed") == []
    assert result["mlflow"]["version"] == 1


def test_weights_that_are_not_finite_end_the_run_and_are_not_tried_again(new_compression, tmp_path, counted):
    compression = new_compression(tmp_path / "place")
    broken = tmp_path / "llava"
    broken.mkdir()
    for path in compression.model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    change_tensors(broken, lambda tensors: tensors[name][0, 0].fill_(torch.nan))
    compression.model = broken
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj.*NaN"):
        compression.run()
    assert [run.info.status for run in compression.runs("compression")] == ["FAILED"]
    module = next(layer for layer in counted["statistics"] if layer.endswith("layers.1.self_attn.q_proj"))
    assert counted["statistics"].count(module) == 1


@pytest.mark.slow
def test_another_machine_goes_on_from_a_workspace_in_s3(
    new_compression, compressed, s3_location, tmp_path, monkeypatch, counted
):
    compression = new_compression(tmp_path / "place")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{compression.workspace / 'mlflow.db'}")
    compression.run(workspace=s3_location, evaluate=False)
    layers = len(counted["pack"])
    assert compression.weights() == compressed.weights()

    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "another machine"))
    open_workspace.cache_clear()
    compression.output = compression.place / "other"
    compression.run(workspace=s3_location, evaluate=False)
    assert len(counted["pack"]) == layers
    assert compression.weights() == compressed.weights()


@pytest.mark.slow
def test_two_places_do_not_share_a_tracking_store(new_compression, tmp_path):
    compressions = [new_compression(tmp_path / name) for name in ("one", "other")]
    for compression in compressions:
        compression.run(evaluate=False)
    assert [len(compression.runs("compression")) for compression in compressions] == [1, 1]
    assert "MLFLOW_TRACKING_URI" not in os.environ
