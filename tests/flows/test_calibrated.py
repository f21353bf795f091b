"""Compressions that look at what the model does: calibrated methods, a budget of bits, finishing."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from dense_rotation import dense_rotation
from safetensors.torch import load_file

from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.evaluation.generation import load_model
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.trellis import trellis_code
from bivlm.reports.bits import bits_of
from bivlm.reports.lineage import Lineage, read_lineage, verify
from bivlm.workspace.steps import Reference, Workspace

CALIBRATED = {
    "vision": {"method": "bivlm", "groups": 2, "p_max": 0.05, "saliency": "gradient", "feedback": True},
    "adaptor": {"method": "awq", "group_size": 32},
    "language": {"method": "gptq", "group_size": 32},
}


def calibrated(compression, name="calibrated", **changes):
    """The compression with methods that need inputs, and other calibration settings."""
    compression.recipe |= {"name": name, "components": CALIBRATED}
    compression.recipe["calibration"] |= changes
    return compression


def findings(compression):
    return {
        finding.subject: (finding.state, finding.detail)
        for finding in verify(
            read_lineage(compression.output), compression.output, Workspace.open(compression.workspace)
        )
    }


@pytest.mark.parametrize("inputs", [pytest.param("full_precision", marks=pytest.mark.slow), "quantized"])
def test_every_link_from_samples_to_packed_bytes_holds(new_compression, tmp_path, inputs):
    compression = calibrated(new_compression(tmp_path), inputs=inputs, tokens={"weights": "gradient"})
    compression.run(evaluate=False)
    assert {state for state, _ in findings(compression).values()} == {"holds"}
    stages = {record["identity"]["stage"] for record in map(json.loads, _step_files(compression))}
    assert {"model inputs", "block inputs", "token gradients"} <= stages
    for layer in compression.report()["layers"]:
        assert 0 < layer["output_error"] < 1
        assert layer["calibration"]["tokens"] > 0


@pytest.mark.slow
def test_named_modules_give_the_bytes_of_the_known_architecture_and_travel(new_compression, tmp_path):
    known = calibrated(new_compression(tmp_path / "known"), inputs="quantized")
    known.run(evaluate=False)
    named = calibrated(new_compression(tmp_path / "named"), inputs="quantized")
    named.recipe["modules"] = {
        "vision": ["model.vision_tower"],
        "adaptor": ["model.multi_modal_projector"],
        "language": ["model.language_model", "lm_head"],
    }
    named.run(evaluate=False)
    files, expected = named.weights(), known.weights()
    assert files.pop("config.json") != expected.pop("config.json")
    assert files == expected
    config = json.loads((named.output / "config.json").read_text())["quantization_config"]
    assert config["modules"] == named.recipe["modules"]
    assert {state for state, _ in findings(named).values()} == {"holds"}


def _step_files(compression):
    return [path.read_text() for path in (compression.workspace / "steps").glob("*.json")]


@pytest.mark.slow
def test_done_again_it_gives_the_same_bytes_and_does_nothing_twice(new_compression, tmp_path):
    compression = calibrated(new_compression(tmp_path), inputs="quantized")
    compression.run(evaluate=False)
    first, steps = compression.weights(), len(_step_files(compression))
    other = new_compression(tmp_path / "elsewhere")
    calibrated(other, inputs="quantized").run(evaluate=False)
    assert other.weights() == first
    compression.run(evaluate=False)
    assert compression.weights() == first
    assert len(_step_files(compression)) == steps


@pytest.mark.slow
def test_blocks_go_on_where_they_were(new_compression, tmp_path, monkeypatch):
    """The fourth block fails once; the three before it are not run again."""
    from tasks import block_inputs

    compression = new_compression(tmp_path)
    compression.recipe |= {"name": "fed-back", "components": dict.fromkeys(CALIBRATED, CALIBRATED["language"])}
    real, ran = block_inputs.run_unit, []

    def failing(model, unit, *arguments, **options):
        ran.append(unit.name)
        if len(ran) == 4:
            raise RuntimeError("the power is gone")
        return real(model, unit, *arguments, **options)

    monkeypatch.setattr(block_inputs, "run_unit", failing)
    with pytest.raises(RuntimeError, match="the power is gone"):
        compression.run(evaluate=False)
    compression.run(evaluate=False)
    blocks = list(dict.fromkeys(ran))
    assert len(blocks) == 5
    assert ran == [*blocks[:4], *blocks[3:]]


def test_few_samples_are_a_warning_with_the_damping(new_compression, tmp_path):
    """Three samples of some forty tokens are fewer tokens than the 128 channels of the language model's MLP."""
    compression = calibrated(new_compression(tmp_path), samples=2)
    result = compression.run(evaluate=False)
    (warning,) = [each for each in result["warnings"] if "fewer tokens than they have channels" in each]
    assert "damping, of up to 0.01 of the mean diagonal" in warning
    assert compression.report()["warnings"] == result["warnings"]


@pytest.mark.parametrize("importance", [pytest.param("energy", marks=pytest.mark.slow), "curvature"])
def test_a_budget_is_kept_and_spent(new_compression, tmp_path, importance):
    compression = new_compression(tmp_path)
    compression.recipe |= {"name": "budget", "budget": {"bits": 2.6, "importance": importance}}
    compression.run(evaluate=False)
    # The file's headers are not the layers' choice, and in a model this small they weigh.
    layers = compression.report()["layers"]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    packed = sum(layer["bits"]["stored"] * layer["shape"][0] * layer["shape"][1] for layer in layers) / weights
    assert 2.5 < packed <= 2.6
    assert packed <= bits_of(compression.output)["linears"]["stored"]
    assert len({layer["groups"] for layer in layers}) > 1
    assert findings(compression)["recipe"][0] == "holds"
    assert findings(compression)["links"][0] == "holds"


def test_a_budget_that_cannot_be_kept_is_refused(new_compression, tmp_path):
    compression = new_compression(tmp_path)
    compression.recipe |= {"name": "budget", "budget": {"bits": 0.5, "importance": "energy"}}
    with pytest.raises(InputError, match=r"budget\.bits: found 0\.5, expected at least"):
        compression.run(evaluate=False)


@pytest.mark.slow
def test_finishing_changes_numbers_and_nothing_else(new_compression, compressed, tmp_path):
    compression = new_compression(tmp_path)
    compression.recipe |= {"name": "finished", "finish": {"objective": "kl", "steps": 12, "batch": 3}}
    result = compression.run()
    assert result["bits"]["linears"] == compressed.results[0]["bits"]["linears"]
    assert {state for state, _ in findings(compression).values()} == {"holds"}
    plain = {layer["name"]: layer["error"] for layer in compressed.report()["layers"]}
    assert any(layer["error"] != plain[layer["name"]] for layer in compression.report()["layers"])
    (tuned,) = compression.steps("finish")
    assert tuned["figures"]["kl_after"] < tuned["figures"]["kl_before"]


@pytest.fixture(scope="module")
def with_leftovers(new_compression, tmp_path_factory):
    """Norms, biases, embedding and head are tuned with the layers."""
    compression = new_compression(tmp_path_factory.mktemp("leftovers"))
    compression.recipe |= {"name": "leftovers", "finish": {"steps": 12, "batch": 3, "leftovers": True}}
    compression.run(evaluate=False)
    return compression


@pytest.mark.slow
def test_tuned_leftovers_take_no_bits_and_are_what_is_loaded(with_leftovers, compressed):
    compression = with_leftovers
    assert compression.results[0]["bits"] == compressed.results[0]["bits"]
    (tuned,) = compression.steps("finish")
    assert tuned["figures"]["kl_after"] < tuned["figures"]["kl_before"]
    names = tuned["figures"]["leftovers"]
    base, packed = Checkpoint.open(compression.model), Checkpoint.open(compression.output)
    changed = {name for name in names if not torch.equal(base.read(name), packed.read(name))}
    assert {"language_model.model.embed_tokens.weight", "language_model.model.norm.weight"} <= changed
    kept = [name for name, entry in packed.entries.items() if entry.dtype != "U8" and name not in names]
    assert kept and all(torch.equal(base.read(name), packed.read(name)) for name in kept)
    model, _ = load_model(compression.output, "cpu")
    expected = packed.read("language_model.model.embed_tokens.weight").float()
    assert torch.equal(model.get_input_embeddings().weight, expected)
    assert f"{len(names)} tensors that are not packed" in compression.report()["leftovers"]
    assert f"{len(names)} tensors that are not packed" in (compression.output / "report.html").read_text()


@pytest.mark.slow
def test_the_lineage_of_tuned_leftovers_holds_until_a_bit_of_them_changes(with_leftovers, tmp_path):
    found = findings(with_leftovers)
    assert {state for state, _ in found.values()} == {"holds"}
    assert found["leftovers"][1].endswith("tuned tensors are the output of their step")
    copy = tmp_path / "packed"
    shutil.copytree(with_leftovers.output, copy)
    entry = Checkpoint.open(copy).entries["language_model.model.norm.weight"]
    content = bytearray(entry.file.read_bytes())
    content[entry.begin] ^= 1
    entry.file.write_bytes(content)
    # Whoever changes it writes the hashes of all files anew, too.
    changed, record = Checkpoint.open(copy).digests(), json.loads((copy / "lineage.json").read_text())
    record["packed"] = {"sha256": changed.sha256, "files": changed.files}
    record["steps"][record["checkpoint"]]["figures"]["sha256"] = changed.sha256
    (copy / "lineage.json").write_text(json.dumps(record))
    found = {finding.subject: finding for finding in verify(read_lineage(copy), copy)}
    assert {subject for subject, finding in found.items() if finding.state == "broken"} == {"leftovers"}
    assert "tuned tensors are not what their step made" in found["leftovers"].detail


@pytest.mark.slow
def test_leftovers_that_no_step_made_or_that_are_not_there_are_broken_links(with_leftovers):
    text = (with_leftovers.output / "lineage.json").read_text()
    (tuned,) = with_leftovers.steps("finish")
    for change, said in [
        (lambda step: step["figures"].pop("leftovers"), "no step says which tensors are in the leftovers"),
        (lambda step: step["figures"].update(leftovers=["x" * 500]), "xx.* was tuned, and is not in the checkpoint"),
        (lambda step: step["figures"].update(leftovers=[[1]]), "was tuned, and is not in the checkpoint"),
        (lambda step: step["figures"]["leftovers"].pop(), "are not what their step made"),
    ]:
        record = json.loads(text)
        change(next(step for step in record["steps"].values() if step["identity"] == tuned["identity"]))
        lineage = Lineage.model_validate(record)
        found = {finding.subject: finding for finding in verify(lineage, with_leftovers.output)}
        assert found["leftovers"].state == "broken" and re.search(said, found["leftovers"].detail)


def on_a_trellis(compression, **budget):
    """The compression with errors fed to both sides and bits by curvature."""
    components = {component: {"method": "trellis", "feedback": "both"} for component in CALIBRATED}
    compression.recipe |= {"name": "trellis", "components": components}
    compression.recipe["budget"] = {"bits": 2.3, "importance": "curvature", "least": 1.6} | budget
    return compression


def test_bits_on_a_trellis_go_where_the_divergence_is(new_compression, tmp_path):
    compression = on_a_trellis(new_compression(tmp_path))
    compression.run(evaluate=False)
    assert {state for state, _ in findings(compression).values()} == {"holds"}
    layers = compression.report()["layers"]
    size = {layer["name"]: layer["shape"][0] * layer["shape"][1] for layer in layers}
    stored = sum(layer["bits"]["stored"] * size[layer["name"]] for layer in layers) / sum(size.values())
    assert 2.2 < stored <= 2.3
    assert len({layer["rate"] for layer in layers}) > 1
    assert min(layer["bits"]["stored"] for layer in layers) >= 1.6
    found = sensitivities(compression)
    assert found == pytest.approx(directly(compression), rel=2e-3)
    assert set(found) == set(size) and min(found.values()) > 0
    # What is predicted of the weights' errors is less than with as many bits for every layer.
    errors = {rate: trellis_code(12, rate).error for rate in (1.75, 2.0)}
    importance = allocation(compression)["importance"]
    rates = {layer["name"]: layer["rate"] for layer in layers}
    predicted = sum(importance[name] * trellis_code(12, rates[name]).error for name in size)
    assert predicted < errors[2.0] * sum(importance.values())


def allocation(compression):
    (step,) = compression.steps("allocation")
    return step["identity"]["inputs"]


def sensitivities(compression):
    """What the allocation multiplied the weights' mean squares by."""
    checkpoint = Checkpoint.open(compression.model)
    return {
        linear.name: each / float(checkpoint.read(linear.disk_name).double().square().mean())
        for linear in linears(checkpoint)
        if (each := allocation(compression)["importance"].get(linear.name)) is not None
    }


def directly(compression):
    """``sum_i 1 / U_Gii^2`` times ``sum_j 1 / U_Hjj^2``, in float64 with dense rotations, from what was measured."""
    workspace = Workspace.open(compression.workspace)

    def fetch(record, file):
        return workspace.fetch(Reference(**record["outputs"][file]))

    (gradients,) = compression.steps("token gradients")
    found = {}
    for block in compression.steps("block inputs"):
        if block["identity"]["inputs"]["packed"]:
            continue
        for name, site in block["figures"]["site_of"].items():
            inputs = SiteStatistics.load(fetch(block, block["figures"]["sites"][site]["file"])).second_moment_NN
            if name in gradients["figures"]["moments"]:
                file = fetch(gradients, gradients["figures"]["moments"][name])
                outputs = load_file(file)[name]
                assert gradients["figures"]["traces"][name] == pytest.approx(float(outputs.trace()), rel=1e-3)
                found[name] = remains(outputs, 2**32, 0.5) * remains(inputs, 0, 0.01)
    return found


def remains(moment, seed, damping):
    rotation = dense_rotation(len(moment), seed)
    turned = rotation @ moment.double().numpy() @ rotation.T
    damped = turned + damping * turned.trace() / len(turned) * np.eye(len(turned))
    return (1 / np.linalg.cholesky(np.linalg.inv(damped)).diagonal() ** 2).sum()


@pytest.mark.slow
def test_gradients_measured_for_less_are_not_taken_for_a_budget(new_compression, tmp_path):
    """The same calibration, once for token weights alone: that step has no traces."""
    compression = calibrated(new_compression(tmp_path), tokens={"weights": "gradient"})
    compression.recipe["components"] = dict.fromkeys(CALIBRATED, CALIBRATED["language"])
    compression.run(evaluate=False)
    (before,) = compression.steps("token gradients")
    on_a_trellis(compression)
    compression.recipe["components"] = {component: {"method": "trellis"} for component in CALIBRATED}
    compression.run(evaluate=False, output=str(tmp_path / "other"))
    assert not before["figures"]["traces"]
    assert len(compression.steps("token gradients")) == 2
