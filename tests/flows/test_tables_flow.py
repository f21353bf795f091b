"""A compression that packs the embedding of tokens and the head beside the linear layers."""

import json

import pytest
import torch
from changed_files import change_tensors
from tiny_llava import make_tiny_llava

from bivlm.checkpoint.linears import anatomy
from bivlm.checkpoint.reading import Checkpoint
from bivlm.compression.model import compress_model
from bivlm.errors import InputError
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.generation import load_model
from bivlm.evaluation.outcomes import evaluate
from bivlm.packing import format_bits
from bivlm.recipe.loading import parse_recipe
from bivlm.reports.bits import bits_of
from bivlm.reports.lineage import read_lineage, verify
from bivlm.workspace.hashing import digest
from tasks.runtime.steps import open_workspace


@pytest.fixture(scope="module")
def compressed(new_compression, tmp_path_factory):
    compression = new_compression(tmp_path_factory.mktemp("tables"))
    compression.recipe["components"] = {"language": {"method": "rtn", "bits": 4}}
    compression.recipe["tables"] = {"tokens": 8, "head": {"bits": 4, "group_size": 16}}
    compression.run()
    return compression


def test_both_are_packed_and_count_apart_from_the_linears(compressed):
    checkpoint, report = Checkpoint.open(compressed.output), compressed.report()
    embedding, head = report["tables"]
    assert [each["bits"] for each in report["tables"]] == [8, 4]
    assert {embedding["name"], head["name"]} < set(checkpoint.packed)
    assert head["name"] == "lm_head"
    assert not {embedding["name"], head["name"]} & {layer["name"] for layer in report["layers"]}
    assert report["bits"] == bits_of(compressed.output)
    stored = format_bits(checkpoint.read(anatomy(checkpoint).packable["lm_head"].disk_name)).stored
    assert head["stored_bits"] == stored / (head["shape"][0] * head["shape"][1])
    assert 0 < embedding["error"] < head["error"] < 0.02
    assert "embedding and head" in (compressed.output / "report.html").read_text()
    (run,) = compressed.runs("compression")
    assert run.data.metrics["bits/tables/stored"] == report["bits"]["tables"]["stored"]


def test_without_the_flow_they_are_packed_to_the_same_bytes(compressed, tmp_path):
    compress_model(compressed.model, parse_recipe(compressed.recipe), tmp_path / "out")
    ours = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert ours == {name: compressed.weights()[name] for name in ours}


def test_every_link_of_the_lineage_holds(compressed):
    lineage = read_lineage(compressed.output)
    assert {found.state for found in verify(lineage, compressed.output, open_workspace(str(compressed.workspace)))} == {
        "holds"
    }
    assert set(lineage.layers) == set(Checkpoint.open(compressed.output).packed)


def test_other_settings_of_a_table_than_those_of_its_step_are_found(compressed):
    record = json.loads((compressed.output / "lineage.json").read_text())
    record["recipe"]["tables"]["tokens"]["bits"] = 4
    lineage = read_lineage(compressed.output).model_validate(record)
    recipe = next(found for found in verify(lineage, compressed.output) if found.subject == "recipe")
    assert recipe.state == "broken"
    assert "embed_tokens was rounded with other settings" in recipe.detail


def test_accuracy_was_measured_on_the_stored_tables(compressed):
    (task,) = compressed.recipe["evaluation"]
    expected = evaluate(*load_model(compressed.output, device="cpu"), load_benchmark(task)).metrics
    assert compressed.results[0]["evaluation"]["packed"][task]["metrics"] == expected


def test_once_more_does_nothing_again(compressed):
    before = compressed.weights()
    assert compressed.run()["reused"]
    assert compressed.weights() == before


def test_a_head_that_is_not_kept_is_refused_before_anything_is_done(new_compression, tmp_path):
    compression = new_compression(tmp_path / "place")
    compression.recipe |= {"keep": [], "tables": 4}
    with pytest.raises(InputError, match=r"tables\.head: lm_head is compressed as a linear layer, too"):
        compression.run()
    assert not compression.steps("statistics")


EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def test_an_output_that_does_not_load_is_made_again_although_its_step_says_it_is_done(compressed):
    before, store = compressed.weights(), open_workspace(str(compressed.workspace))
    change_tensors(compressed.output, lambda tensors: tensors.update({HEAD: tensors[HEAD][:-1].clone()}))
    (step,) = compressed.steps("checkpoint")
    record = store.step(digest(step["identity"]))
    store.finish_step(record.model_copy(update={"figures": {"sha256": Checkpoint.open(compressed.output).digest()}}))
    assert not compressed.run()["reused"]
    assert compressed.weights() == before


@pytest.mark.parametrize(
    "equal", [pytest.param(True, id="equal", marks=pytest.mark.slow), pytest.param(False, id="different")]
)
def test_a_head_in_the_file_beside_a_config_that_ties_it(new_compression, tmp_path, equal):
    compression = new_compression(tmp_path / "place")
    tie = {"tie_word_embeddings": True}
    compression.model = make_tiny_llava(tmp_path / "base", text=tie, **tie)
    noise = 0 if equal else 0.1
    change_tensors(
        compression.model,
        lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + noise * torch.randn_like(tensors[EMBEDDING])}),
    )
    compression.recipe |= {"components": {"language": {"method": "rtn", "bits": 4}}, "tables": 4}
    compression.run()
    model, _ = load_model(compression.output, device="cpu")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == equal
    base, _ = load_model(compression.model, device="cpu")
    assert torch.dist(base.get_output_embeddings().weight, head) < 0.15 * head.norm()
    assert [each["name"] for each in compression.report()["tables"]][1:] == ([] if equal else ["lm_head"])
    lineage = read_lineage(compression.output)
    states = {each.state for each in verify(lineage, compression.output, open_workspace(str(compression.workspace)))}
    assert states == {"holds"}


def test_a_base_that_lacks_a_tensor_is_refused_before_any_work_and_leaves_the_earlier_output(compressed, tmp_path):
    broken = make_tiny_llava(tmp_path / "base")
    change_tensors(broken, lambda tensors: tensors.pop("language_model.model.norm.weight"))
    before, steps = compressed.weights(), len(compressed.steps("statistics"))
    with pytest.raises(InputError, match=r"tensor model\.language_model\.norm\.weight is missing"):
        compressed.run(model=str(broken))
    assert compressed.weights() == before
    assert len(compressed.steps("statistics")) == steps
