"""The lineage record of a compression, and what its verification finds."""

import json
import re
import shutil

import pytest
from changed_files import change_json

from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.reports.lineage import Lineage, find_workspace, read_lineage, verify
from flows.cli.commands import BAD_INPUT, DONE, NOT_PASSED
from flows.cli.console import print_lineage
from flows.cli.main import main

LINKS = ["packed files", "packed weights", "recipe", "step keys", "links", "base model", "workspace"]


def states(compression, **options):
    """What `verify` finds of each link."""
    lineage = read_lineage(compression.output)
    workspace = options.get("workspace", find_workspace(str(compression.workspace)))
    return {finding.subject: finding for finding in verify(lineage, compression.output, workspace)}


def broken(compression, **options):
    return {subject for subject, finding in states(compression, **options).items() if finding.state == "broken"}


def rewrite(compression, change):
    """Change the record as somebody with an editor would."""
    change_json(compression.output / "lineage.json", change)


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_every_link_of_a_fresh_compression_holds(compressed):
    found = states(compressed)
    assert list(found) == LINKS
    assert {finding.state for finding in found.values()} == {"holds"}


def test_the_record_names_every_step_of_every_layer(compressed):
    lineage = read_lineage(compressed.output)
    assert set(lineage.layers) == set(Checkpoint.open(compressed.output).packed)
    recorded = {key for steps in lineage.layers.values() for key in steps.values()}
    on_disk = {path.stem for path in (compressed.workspace / "steps").glob("*.json")}
    assert recorded <= on_disk
    assert {lineage.calibration, lineage.checkpoint, *lineage.evaluations.values()} <= on_disk
    assert lineage.code["version"] and lineage.packages["torch"] and lineage.hardware["cores"]


@pytest.mark.parametrize("position", [200, -1], ids=["in the header", "in a tensor"])
def test_a_flipped_bit_of_the_stored_weights_is_found(compressed_copy, position):
    flip(compressed_copy.output / "model.safetensors", position)
    assert "packed files" in broken(compressed_copy)


def test_a_packed_tensor_that_its_step_did_not_make_is_named(compressed_copy):
    checkpoint = Checkpoint.open(compressed_copy.output)
    name = next(iter(checkpoint.packed))
    entry = next(e for disk, e in checkpoint.entries.items() if name.endswith(disk.removesuffix(".weight")[-20:]))
    flip(entry.file, entry.begin + entry.nbytes - 1)
    found = states(compressed_copy)["packed weights"]
    assert found.state == "broken"
    assert "is not what its step made" in found.detail


def test_a_file_added_to_the_checkpoint_is_found(compressed_copy):
    (compressed_copy.output / "special_tokens_map.json").write_text("{}")
    assert broken(compressed_copy) == {"packed files"}


def test_another_recipe_than_that_of_the_steps_is_found(compressed_copy):
    rewrite(compressed_copy, lambda record: record["recipe"]["components"]["vision"].update(groups=3))
    assert "recipe" in broken(compressed_copy)


def test_a_changed_step_no_longer_has_its_key(compressed_copy):
    def change(record):
        key = next(iter(record["layers"].values()))["plan"]
        record["steps"][key]["identity"]["recipe"]["groups"] = 3

    rewrite(compressed_copy, change)
    assert {"step keys", "recipe"} <= broken(compressed_copy)


def test_a_step_exchanged_key_and_all_is_not_linked_to_the_others(compressed_copy):
    """Whoever writes a consistent record of another plan has a pack step that was made from no recorded plan."""

    def change(record):
        steps = next(iter(record["layers"].values()))
        plan = record["steps"][steps["plan"]]
        plan["outputs"]["plan.json"]["sha256"] = "0" * 64

    rewrite(compressed_copy, change)
    assert broken(compressed_copy, workspace=None) == {"links"}


def test_a_changed_base_model_is_found(compressed_copy, tmp_path):
    base = tmp_path / "llava"
    shutil.copytree(compressed_copy.model, base)
    rewrite(compressed_copy, lambda record: record["base_model"].update(id=str(base)))
    assert broken(compressed_copy) == set()
    flip(base / "model.safetensors")
    assert broken(compressed_copy) == {"base model"}


def test_what_is_not_on_this_machine_is_not_checked(compressed_copy):
    rewrite(compressed_copy, lambda record: record["base_model"].update(id="/nowhere"))
    found = states(compressed_copy, workspace=None)
    assert {subject for subject, finding in found.items() if finding.state == "not checked"} == {
        "base model",
        "workspace",
    }


def test_a_damaged_object_of_the_workspace_is_found_and_a_collected_one_is_not_missed(compressed_copy):
    shards = [step["outputs"]["weight.packed"]["sha256"] for step in compressed_copy.steps("pack")]
    flip(compressed_copy.workspace / "objects" / shards[0][:2] / shards[0])
    assert broken(compressed_copy) == {"workspace"}
    (compressed_copy.workspace / "objects" / shards[0][:2] / shards[0]).unlink()
    assert broken(compressed_copy) == set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the file is missing"),
        (b"{", "not a lineage record"),
        (b"[]", "not a lineage record"),
        (b'{"format": 1}', "created: Field required"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(compressed_copy, content, message):
    path = compressed_copy.output / "lineage.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=f"lineage.json: .*{message}"):
        read_lineage(compressed_copy.output)


ODD = {
    "components": (("recipe", "components"), ["x"], "recipe: .*components: expected settings by name"),
    "a component": (("recipe", "components", "vision"), 3, "components.vision: expected settings with a method"),
    "a method": (("recipe", "components", "vision"), {"method": [1]}, "components.vision: expected settings"),
    "tables": (("recipe", "tables"), "x", "tables: expected settings by name"),
    "evaluation": (("recipe", "evaluation"), 3, "evaluation: expected names of benchmarks"),
    "a name": (("recipe", "name"), None, "name: expected text"),
    "code": (("code",), {}, "code: .*version: the key is missing"),
    "layers": (("layers",), [], "layers: Input should be an object"),
    "a hash": (("packed", "sha256"), 7, "packed.sha256: Input should be a valid string, found 7"),
    "large": (("format",), 10**400, "expected a number below 1e308"),
    "base model": (("base_model",), None, "base_model: Input should be"),
}


@pytest.mark.parametrize("what", ODD)
def test_an_odd_record_is_refused_by_file_and_key(compressed_copy, what, capsys):
    place, value, message = ODD[what]

    def change(record):
        for key in place[:-1]:
            record = record[key]
        record[place[-1]] = value

    rewrite(compressed_copy, change)
    assert main(["lineage", str(compressed_copy.output)]) == BAD_INPUT
    said = capsys.readouterr().err
    assert re.search(f"lineage.json: not a lineage record: .*{message}", said) and said.count("\n") == 1


@pytest.mark.parametrize("stage", ["allocation", "block search"])
def test_a_step_that_chose_settings_has_to_say_which(compressed_copy, stage):
    def change(record):
        next(iter(record["steps"].values()))["identity"]["stage"] = stage

    rewrite(compressed_copy, change)
    with pytest.raises(InputError, match=r"figures\.settings: expected settings by layer, found None"):
        read_lineage(compressed_copy.output)


def test_a_record_that_is_nested_deep_is_refused(compressed_copy):
    path = compressed_copy.output / "lineage.json"
    deep = '"trigger": ' + "[" * 500 + "]" * 500 + ', "x":'
    path.write_text(path.read_text().replace('"trigger":', deep, 1))
    with pytest.raises(InputError, match=r"lineage\.json: not a lineage record: nested too deep"):
        read_lineage(compressed_copy.output)


def test_odd_inputs_and_figures_of_steps_are_broken_links_and_nothing_worse(compressed_copy):
    def change(record):
        for number, step in enumerate(record["steps"].values()):
            step["identity"]["inputs"] = [None, [1], "x" * 64, {"a": {"b": "0" * 64}}][number % 4]
            step["identity"]["recipe"] = [[], "x", 3, None][number % 4]
            step["figures"]["sha256"] = [[1], {"a": 1}, None, 3][number % 4]

    rewrite(compressed_copy, change)
    lineage = read_lineage(compressed_copy.output)
    found = {finding.subject: finding.state for finding in verify(lineage, compressed_copy.output)}
    assert (found["recipe"], found["step keys"], found["links"]) == ("broken", "broken", "broken")
    print_lineage("it", lineage, [])


def test_a_packed_name_that_is_no_layer_of_the_model_is_said(compressed_copy):
    def change(record):
        record["layers"]["model.nothing"] = next(iter(record["layers"].values()))

    packed = {"model.nothing": 100}
    change_json(
        compressed_copy.output / "config.json", lambda config: config["quantization_config"]["packed"].update(packed)
    )
    rewrite(compressed_copy, change)
    findings = verify(read_lineage(compressed_copy.output), compressed_copy.output)
    weights = next(finding for finding in findings if finding.subject == "packed weights")
    assert "model.nothing is packed, and the model has no such layer" in weights.detail


def test_a_record_of_a_later_format_is_refused(compressed_copy):
    rewrite(compressed_copy, lambda record: record.update(format=2))
    with pytest.raises(InputError, match="format 2, this code reads 1; update bivlm"):
        read_lineage(compressed_copy.output)


def test_the_command_says_what_holds_and_its_exit_code_what_does_not(compressed_copy, capsys):
    arguments = ["lineage", str(compressed_copy.output), "--workspace", str(compressed_copy.workspace)]
    assert main(arguments) == DONE
    printed = capsys.readouterr().out
    assert all(link in printed for link in LINKS)
    flip(compressed_copy.output / "model.safetensors")
    assert main([*arguments, "--json"]) == NOT_PASSED
    found = json.loads(capsys.readouterr().out)
    assert {f["subject"] for f in found["findings"] if f["state"] == "broken"} >= {"packed files"}
    assert Lineage.model_validate(found["lineage"]).format == 1


@pytest.mark.parametrize("version", ["llava-small/1", "llava-small@candidate", "models:/llava-small/1"])
def test_a_registered_version_is_verified_as_mlflow_stores_it(compressed, capsys, version):
    assert main(["lineage", version, "--workspace", str(compressed.workspace), "--json"]) == DONE
    found = json.loads(capsys.readouterr().out)
    assert {finding["state"] for finding in found["findings"]} == {"holds"}


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("llava-small/7", "model version llava-small/7: not in the registry"),
        ("llava-small@champion", "model version llava-small@champion: not in the registry"),
        ("nothing", "'nothing': no such folder, and not a model version; expected DIR, NAME/VERSION"),
    ],
)
def test_a_version_that_is_not_there_is_bad_input(compressed, capsys, version, message):
    assert main(["lineage", version, "--workspace", str(compressed.workspace)]) == BAD_INPUT
    assert message in capsys.readouterr().err


def test_the_run_and_the_registered_version_have_the_record_and_the_page(compressed):
    (parent,) = compressed.runs("compression")
    artifacts = {artifact.path for artifact in compressed.client.list_artifacts(parent.info.run_id)}
    figures = {artifact.path for artifact in compressed.client.list_artifacts(parent.info.run_id, "figures")}
    assert {"lineage.json", "report.html"} <= artifacts
    assert figures == {
        f"figures/{name}.svg"
        for name in ("weight_histogram", "kl_per_layer", "error_by_p_max", "bits_and_error", "accuracy_against_bits")
    }
