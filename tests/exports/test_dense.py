"""A dense export is the model that the packed checkpoint loads as, in a folder that needs no bivlm."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from changed_files import change_tensors
from safetensors import safe_open
from safetensors.torch import load_file
from tied_tables import load, logits, make_base
from tied_tables import pack as pack_tables
from tiny_families import llava, make_tiny, qwen2_5_vl
from transformers import AutoModelForImageTextToText

from bivlm import compress_model
from bivlm.errors import InputError
from bivlm.exports.building import PACKED
from bivlm.exports.dense import export_dense
from flows.cli.main import main

RECIPE = """
name: r
format: 1
components:
  vision: {method: rtn, bits: 2}
  language: {method: bivlm, groups: 2, p_max: 0.05}
tables: {tokens: 8}
"""


@pytest.fixture(scope="module", params=[llava, qwen2_5_vl], ids=["llava", "qwen2.5-vl"])
def made(request, tmp_path_factory):
    """A packed checkpoint and inputs for it."""
    folder = tmp_path_factory.mktemp("export")
    inputs = make_tiny(request.param, folder / "base")
    (folder / "base" / "LICENSE").write_text("theirs")
    (folder / "r.yaml").write_text(RECIPE)
    compress_model(folder / "base", folder / "r.yaml", folder / "packed")
    (folder / "packed" / "lineage.json").write_text('{"of": "packed"}')
    return folder, inputs


def test_it_is_the_model_that_the_packed_one_loads_as(made, tmp_path):
    folder, inputs = made
    dense = export_dense(folder / "packed", tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    assert "quantization_config" not in config
    base = json.loads((folder / "base" / "config.json").read_text())
    assert config == {key: value for key, value in base.items() if key != "quantization_config"}
    before, after = (AutoModelForImageTextToText.from_pretrained(each) for each in (folder / "packed", dense))
    names = {name for name, _ in after.named_parameters()}
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)) and parameter.dtype == after.get_parameter(name).dtype
        names.discard(name)
    assert not names and torch.equal(logits(before, inputs), logits(after, inputs))
    on_disk = {file.name: load_file(file) for file in (folder / "base").glob("*.safetensors")}
    with safe_open(dense / "model.safetensors", "pt") as file:
        assert {*file.keys()} == {name for tensors in on_disk.values() for name in tensors}
    assert (dense / "LICENSE").read_text() == "theirs"
    assert json.loads((dense / PACKED / "lineage.json").read_text()) == {"of": "packed"}
    assert (dense / PACKED / "compression_report.json").is_file() == (
        folder / "packed" / "compression_report.json"
    ).is_file()
    assert not (dense / ".bivlm-files").exists()
    assert [*tmp_path.iterdir()] == [dense]


@pytest.mark.slow
def test_it_loads_without_bivlm(made, tmp_path):
    dense = export_dense(made[0] / "packed", tmp_path / "dense")
    code = (
        "import sys; from transformers import AutoModelForImageTextToText as A\n"
        f"A.from_pretrained({str(dense)!r})\nassert 'bivlm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


@pytest.mark.parametrize("head", ["absent", "equal", "different"])
def test_a_tied_table_is_one_again(tmp_path, head):
    inputs = make_base(llava, tmp_path / "base", True, head)
    packed = pack_tables(tmp_path / "base", tmp_path / "packed", 4)
    dense = export_dense(packed, tmp_path / "dense")
    assert torch.equal(logits(load(packed), inputs), logits(load(dense), inputs))


def test_it_is_sharded(made, tmp_path):
    dense = export_dense(made[0] / "packed", tmp_path / "dense", max_shard_bytes=10_000)
    assert len([*dense.glob("model-*.safetensors")]) > 1
    assert torch.equal(logits(load(dense), made[1]), logits(load(made[0] / "packed"), made[1]))


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(made, tmp_path, capsys):
    folder, _ = made
    with pytest.raises(InputError, match="expected a packed checkpoint"):
        export_dense(folder / "base", tmp_path / "dense")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["export", str(folder / "packed"), str(tmp_path / "full"), "--to", "dense"]) == 2
    assert "expected a folder that is new or empty" in capsys.readouterr().err
    with pytest.raises(InputError, match="overlaps"):
        export_dense(folder / "packed", folder / "packed" / "dense")
    shutil.copytree(folder / "packed", tmp_path / "damaged")

    def damage(tensors):
        name = next(name for name, each in tensors.items() if each.dtype == torch.uint8)
        tensors[name][-1] ^= 1

    change_tensors(tmp_path / "damaged", damage)
    with pytest.raises(InputError, match="checksum"):
        export_dense(tmp_path / "damaged", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    assert not [*tmp_path.glob("*partial*")]
    (tmp_path / "empty").mkdir()
    assert main(["export", str(folder / "packed"), str(tmp_path / "empty"), "--to", "dense"]) == 0
    assert capsys.readouterr().out == f"exported: {tmp_path / 'empty'}\n"


@pytest.mark.parametrize("case", ["link to a folder", "dangling link", "below a file", "an address"])
def test_an_output_that_no_folder_can_take_is_refused_before_any_work(case, made, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    output = tmp_path / "output"
    if "link" in case:
        output.symlink_to(tmp_path / ("folder" if case == "link to a folder" else "none"))
    output = {"below a file": tmp_path / "file" / "x", "an address": "s3://bucket/x"}.get(case, output)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="output"):
        export_dense(made[0] / "packed", output)
    assert sorted(tmp_path.iterdir()) == before
