"""A packed checkpoint holds the packed weights under their own names and everything else as it was."""

import hashlib
import json
import weakref

import numpy as np
import pytest
import torch
from raw_codec import pack_linears, pack_raw
from safetensors.torch import load_file, save_file

from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.outputs import fresh_partial
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.errors import InputError
from bivlm.evaluation.generation import load_model
from bivlm.packing import container
from bivlm.recipe.selection import select

SIDE_FILES = {
    "chat_template.jinja",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def base(tiny_llava):
    return Checkpoint.open(tiny_llava)


@pytest.fixture(scope="module")
def chosen(base, whole_recipe):
    return select(linears(base), whole_recipe)[0]


@pytest.fixture
def packed(base, chosen):
    return pack_linears(base, chosen)


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_packed_weights_stand_under_their_own_names(base, chosen, packed, tmp_path):
    output = write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {})
    tensors = load_file(output / "model.safetensors")
    assert sorted(tensors) == list(base.entries)
    for linear in chosen:
        assert torch.equal(tensors[linear.disk_name], packed[linear.name]())


def test_every_other_tensor_is_copied_byte_for_byte(base, chosen, packed, tmp_path):
    output = write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {})
    tensors, before = load_file(output / "model.safetensors"), load_file(base.weight_files[0])
    others = set(before) - {linear.disk_name for linear in chosen}
    assert all(torch.equal(tensors[name], before[name]) for name in others)


def test_the_folder_holds_config_weights_side_files_licence_and_extra_files(base, chosen, packed, tmp_path):
    licence = base.folder / "LICENSE"
    licence.write_text("terms")
    try:
        fresh = Checkpoint.open(base.folder)
        output = write_packed_checkpoint(fresh, packed, chosen, tmp_path / "out", {}, {"report.json": b"{}"})
    finally:
        licence.unlink()
    names = {file.name for file in output.iterdir()}
    assert names == {".bivlm-files", "config.json", "model.safetensors", "LICENSE", "report.json"} | SIDE_FILES
    assert all((output / name).read_bytes() == (base.folder / name).read_bytes() for name in SIDE_FILES)
    assert (output / "report.json").read_bytes() == b"{}"


def test_the_config_gains_the_quantization_config_and_nothing_else(base, chosen, packed, tmp_path):
    output = write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {"code_version": "1"})
    config = json.loads((output / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == base.config
    assert quantization.pop("packed") == {linear.name: packed[linear.name]().numel() for linear in chosen}
    assert quantization == {"quant_method": "bivlm", "format": 1, "dequantize": "load", "code_version": "1"}


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 60_000])
def test_the_same_input_gives_the_same_bytes(base, chosen, packed, tmp_path, max_shard_bytes):
    write_packed_checkpoint(base, packed, chosen, tmp_path / "a", {}, max_shard_bytes=max_shard_bytes)
    reordered = dict(reversed(packed.items()))
    write_packed_checkpoint(base, reordered, chosen[::-1], tmp_path / "b", {}, max_shard_bytes=max_shard_bytes)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_shards_stay_under_the_limit_and_hold_the_same_tensors(base, chosen, packed, tmp_path):
    single = write_packed_checkpoint(base, packed, chosen, tmp_path / "single", {})
    output = write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {}, max_shard_bytes=60_000)
    shards = Checkpoint.open(output)
    assert len(shards.weight_files) > 3
    assert all(sum(e.nbytes for e in shards.entries.values() if e.file == f) <= 60_000 for f in shards.weight_files)
    whole = load_file(single / "model.safetensors")
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in whole.items())
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_leftovers_replace_tensors_and_the_rest_stays(base, chosen, packed, tmp_path):
    plain = write_packed_checkpoint(base, packed, chosen, tmp_path / "plain", {})
    before = load_file(plain / "model.safetensors")
    name = "language_model.model.norm.weight"
    save_file({name: before[name] + 1}, tmp_path / "leftovers")
    output = write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {}, leftovers=tmp_path / "leftovers")
    after = load_file(output / "model.safetensors")
    assert torch.equal(after.pop(name), before.pop(name) + 1)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[other], tensor) for other, tensor in before.items())
    assert load_model(output, "cpu")[0].get_parameter("model.language_model.norm.weight")[0] == 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("norm", lambda tensor: tensor.float(), r"norm\.weight: F32 of shape .*expected BF16 of shape"),
        ("norm", lambda tensor: tensor[1:], r"norm\.weight: BF16 of shape \(63,\), expected BF16 of shape \(64,\)"),
        ("norms", lambda tensor: tensor, r"norms\.weight: expected a tensor that .* has and that is not packed"),
    ],
)
def test_leftovers_that_are_not_the_bases_are_refused(base, chosen, packed, tmp_path, name, change, message):
    stored = base.read("language_model.model.norm.weight")
    save_file({f"language_model.model.{name}.weight": change(stored).contiguous()}, tmp_path / "leftovers")
    with pytest.raises(InputError, match=message):
        write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {}, leftovers=tmp_path / "leftovers")
    assert not (tmp_path / "out").exists()


def test_a_packed_weight_is_no_leftover(base, chosen, packed, tmp_path):
    save_file({chosen[0].disk_name: base.read(chosen[0].disk_name)}, tmp_path / "leftovers")
    with pytest.raises(InputError, match=rf"{chosen[0].disk_name}: expected a tensor that .* not packed"):
        write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {}, leftovers=tmp_path / "leftovers")


def test_packed_weights_may_come_from_files(base, chosen, packed, tmp_path):
    files = {}
    for number, (name, make) in enumerate(packed.items()):
        files[name] = tmp_path / str(number)
        make().numpy().tofile(files[name])
    write_packed_checkpoint(base, packed, chosen, tmp_path / "a", {})
    write_packed_checkpoint(base, files, chosen, tmp_path / "b", {})
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_one_packed_tensor_is_held_at_a_time(base, chosen, packed, tmp_path):
    alive, held = [], []

    def watched(make):
        held.append(sum(reference() is not None for reference in alive))
        tensor = make()
        alive.append(weakref.ref(tensor))
        return tensor

    watching = {name: (lambda make=make: watched(make)) for name, make in packed.items()}
    write_packed_checkpoint(base, watching, chosen, tmp_path / "out", {})
    assert held == [0] * len(chosen)


def test_an_earlier_output_is_replaced_whole(base, chosen, packed, tmp_path):
    write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {}, {"old.json": b"{}"})
    write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {}, {"new.json": b"{}"})
    assert not (tmp_path / "out" / "old.json").exists()
    assert (tmp_path / "out" / "new.json").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_earlier_output_and_no_rest(base, chosen, packed, tmp_path):
    write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {})
    before = digests(tmp_path / "out")

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_packed_checkpoint(base, {**packed, chosen[-1].name: fail}, chosen, tmp_path / "out", {})
    assert digests(tmp_path / "out") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_the_rest_of_a_killed_run_is_cleared(base, chosen, packed, tmp_path):
    left = fresh_partial(tmp_path / "out")
    (left / "model.safetensors").write_bytes(b"half")
    write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_other_things_in_it_is_not_touched(base, chosen, packed, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("text")
    with pytest.raises(InputError, match="not empty, and not an earlier output"):
        write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {})
    assert (tmp_path / "out" / "thesis.tex").read_text() == "text"


def test_an_empty_folder_is_used(base, chosen, packed, tmp_path):
    (tmp_path / "out").mkdir()
    write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {})
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_output_may_not_overlap_the_base(base, chosen, packed):
    for output in (base.folder, base.folder.parent, base.folder / "packed"):
        with pytest.raises(InputError, match="overlaps the base"):
            write_packed_checkpoint(base, packed, chosen, output, {})


def test_a_file_in_the_way_is_refused(base, chosen, packed, tmp_path):
    (tmp_path / "out").write_text("text")
    with pytest.raises(InputError, match="exists and is not a folder"):
        write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {})


def test_a_packed_base_is_refused(base, chosen, packed, tmp_path):
    once = Checkpoint.open(write_packed_checkpoint(base, packed, chosen, tmp_path / "once", {}))
    with pytest.raises(InputError, match=r"already quantized \(bivlm\)"):
        write_packed_checkpoint(once, packed, chosen, tmp_path / "twice", {})


def test_a_missing_packed_weight_is_named(base, chosen, packed, tmp_path):
    del packed[chosen[3].name]
    with pytest.raises(InputError, match=chosen[3].name):
        write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {})


def test_a_packed_weight_of_another_shape_is_named(base, chosen, packed, tmp_path):
    packed[chosen[0].name] = lambda: pack_raw(torch.zeros(3, 5, dtype=torch.bfloat16))
    with pytest.raises(InputError, match=rf"{chosen[0].disk_name}: packed weight of shape \(3, 5\)"):
        write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {})


def test_a_packed_weight_of_another_dtype_is_named(base, chosen, packed, tmp_path):
    section = np.zeros(chosen[0].size, np.uint8)
    packed[chosen[0].name] = lambda: container.write("top-byte", chosen[0].shape, torch.float16, [section])
    with pytest.raises(InputError, match=rf"{chosen[0].disk_name}: .*float16.*bfloat16"):
        write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {})


def test_a_damaged_packed_weight_is_named(base, chosen, packed, tmp_path):
    tensor = packed[chosen[0].name]()
    tensor[-1] ^= 1
    packed[chosen[0].name] = lambda: tensor
    with pytest.raises(InputError, match=rf"{chosen[0].disk_name}: checksum"):
        write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {})


def test_lengths_that_were_announced_wrong_are_named(base, chosen, packed, tmp_path):
    lengths = {linear.name: packed[linear.name]().numel() for linear in chosen}
    with pytest.raises(InputError, match=f"{chosen[5].name}: .* packed bytes, 7 were announced"):
        announced = {"packed": {**lengths, chosen[5].name: 7}}
        write_packed_checkpoint(base, packed, chosen, tmp_path / "out", announced)


@pytest.mark.parametrize("name", ["../evil", "a/b", "config.json", "model.safetensors"])
def test_an_extra_file_with_a_bad_name_is_refused(base, chosen, packed, tmp_path, name):
    with pytest.raises(InputError, match="extra file"):
        write_packed_checkpoint(base, packed, chosen, tmp_path / "out", {}, {name: b""})
