"""Bits are counted in the files: stored bits times weights are the bytes there are."""

import json

import pytest
from changed_files import change_json, change_tensors
from safetensors.torch import load_file

from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.errors import InputError
from bivlm.recipe.selection import select
from bivlm.reports.bits import bits_of


def header_of(file):
    """(length of the JSON text without padding, the text) as the file has it."""
    raw = file.read_bytes()
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode().rstrip()


def test_the_model_costs_the_bytes_of_its_files(packed_llava, tiny_llava):
    model = bits_of(packed_llava)["model"]
    assert model["stored"] * model["weights"] == pytest.approx(
        8 * sum(file.stat().st_size for file in packed_llava.glob("*.safetensors")), rel=1e-15
    )
    assert model["weights"] == sum(tensor.numel() for tensor in load_file(tiny_llava / "model.safetensors").values())


def test_the_linears_cost_their_tensors_and_what_the_header_says_of_them(packed_llava):
    config = json.loads((packed_llava / "config.json").read_text())
    lengths = config["quantization_config"]["packed"].values()
    # The header less the entries of all other tensors is what is attributed to the packed ones.
    text = header_of(packed_llava / "model.safetensors")
    header = json.loads(text)
    packed = {name for name, record in header.items() if record.get("dtype") == "U8"}
    others = {name: record for name, record in header.items() if name not in packed}
    attributed = len(text) - len(json.dumps(others, separators=(",", ":")))
    found = bits_of(packed_llava)["linears"]
    assert len(packed) == len(lengths)
    assert round(found["stored"] * found["weights"]) == 8 * (sum(lengths) + attributed)


def test_the_denominator_is_the_weights_that_are_rebuilt(tiny_llava, whole_recipe, packed_llava):
    chosen, _ = select(linears(Checkpoint.open(tiny_llava)), whole_recipe)
    found = bits_of(packed_llava)
    assert found["linears"]["weights"] == sum(linear.size for linear in chosen)
    assert found["by_component"]["adaptor"]["weights"] == 2 * 64 * 64


def test_nominal_and_entropy_are_the_formats(packed_llava):
    # The test codec's format: eight bits per weight, 7.5 of them needed.
    found = bits_of(packed_llava)["linears"]
    assert (found["nominal"], found["entropy"]) == (8.0, 7.5)


def test_components_add_up_to_the_linears(packed_llava):
    found = bits_of(packed_llava)
    assert list(found["by_component"]) == ["vision", "adaptor", "language"]
    for key in ("nominal", "entropy", "stored"):
        total = sum(part[key] * part["weights"] for part in found["by_component"].values())
        assert total == pytest.approx(found["linears"][key] * found["linears"]["weights"])


def test_shards_are_all_counted(tiny_llava, whole_recipe, packed_llava, tmp_path):
    base, packed = Checkpoint.open(tiny_llava), Checkpoint.open(packed_llava)
    chosen, _ = select(linears(base), whole_recipe)
    parts = {linear.name: (lambda name=linear.disk_name: packed.read(name)) for linear in chosen}
    folder = write_packed_checkpoint(base, parts, chosen, tmp_path / "shards", {}, max_shard_bytes=60_000)
    model = bits_of(folder)["model"]
    on_disk = 8 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert round(model["stored"] * model["weights"]) == on_disk


def test_a_full_precision_checkpoint_has_no_packed_linears(tiny_llava):
    found = bits_of(tiny_llava)
    assert found["linears"] is None and found["by_component"] == {}
    assert 16 < found["model"]["stored"] < 17


def test_a_damaged_tensor_is_named(packed_llava):
    change_tensors(packed_llava, lambda tensors: tensors["multi_modal_projector.linear_1.weight"][-1].bitwise_xor_(1))
    with pytest.raises(InputError, match=r"multi_modal_projector\.linear_1\.weight: checksum"):
        bits_of(packed_llava)


def test_a_checkpoint_of_another_format_is_refused(packed_llava):
    change_json(packed_llava / "config.json", lambda config: config["quantization_config"].update(format=2))
    with pytest.raises(InputError, match=r"config\.json: quantization_config: format 2, this code reads 1"):
        bits_of(packed_llava)


def test_the_figures_are_ready_for_json(packed_llava):
    assert json.loads(json.dumps(bits_of(packed_llava))) == bits_of(packed_llava)
