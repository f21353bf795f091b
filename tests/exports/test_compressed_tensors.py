"""An export for compressed-tensors is, loaded by transformers, the model that the packed checkpoint loads as."""

import json
import logging
import shutil
import subprocess
import sys
from itertools import islice

import pytest
import torch
from changed_files import change_json, change_tensors
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tied_tables import load, logits, make_base
from tied_tables import pack as pack_tables
from tiny_families import (
    glm4v_moe,
    idefics3,
    internvl,
    llava,
    llava_onevision,
    make_published,
    make_tiny,
    mllama,
    paligemma,
    qwen2_5_vl,
    qwen2_5_vl_tied,
    qwen3_vl,
    qwen3_vl_moe,
)
from transformers import AutoModelForImageTextToText, AutoProcessor, Blip2Config

from bivlm import answer, compress_model, load_model
from bivlm.checkpoint.safetensors_file import outgoing_tensor, read_entries, write_tensors
from bivlm.compression.layer import pack_layer
from bivlm.errors import InputError
from bivlm.exports.building import PACKED
from bivlm.exports.compressed_tensors import described, export_compressed_tensors, quantization_config, tensors_of
from bivlm.exports.one_grid import Grid
from bivlm.methods import method
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.uniform_grid import GroupedCodes, group_width
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import grouped, unpack
from bivlm.reference import CHECKPOINT, questions
from flows.cli.main import main

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GRIDS = {"method": "rtn", "bits": 4, "group_size": 16}
FAMILIES = [llava, llava_onevision, qwen2_5_vl, qwen2_5_vl_tied, qwen3_vl, qwen3_vl_moe, mllama, idefics3, paligemma]
FAMILIES += [internvl]


def packed_model(folder, build=llava, dtype=torch.bfloat16, make=make_tiny, keep=(), **components):
    """A packed checkpoint in `folder` / packed, and inputs for it."""
    inputs = make(build, folder / "base", dtype)
    rules = components or dict.fromkeys(("vision", "adaptor", "language"), GRIDS)
    tables = rules.pop("tables", None)
    recipe = {"name": "r", "format": 1, "components": rules, "keep": list(keep)}
    (folder / "r.yaml").write_text(json.dumps(recipe | ({"tables": tables} if tables else {})))
    compress_model(folder / "base", folder / "r.yaml", folder / "packed")
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}


def assert_same_model(packed, exported, inputs):
    before = load(packed)
    after, loading = AutoModelForImageTextToText.from_pretrained(exported, output_loading_info=True)
    assert not any(loading.values())
    names = {name for name, _ in after.named_parameters()}
    for name, parameter in before.named_parameters():
        other = after.get_parameter(name)
        assert torch.equal(parameter, other) and parameter.dtype == other.dtype, name
        names.discard(name)
    assert not names and torch.equal(logits(before, inputs), logits(after, inputs))


def decoded(weight, grid, folder):
    """What compressed-tensors makes of a weight's tensors, in the dtype that transformers rounds it to."""
    file = folder / "decoded.safetensors"
    file.unlink(missing_ok=True)
    write_tensors(file, list(tensors_of(weight, grid)))
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in load_file(file).items()}
    said = quantization_config(grid, ["layer"], torch.nn.Module())["config_groups"]["group_0"]
    found = PackedQuantizationCompressor.decompress(tensors, QuantizationScheme.model_validate(said))["weight"]
    return found.to(weight.dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weight")


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 80),
    bits=st.sampled_from(grouped.BITS),
    group_size=st.sampled_from([0, 1, 2, 7, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.sampled_from([-150, -30, -18, -12, -3]),
    wider=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_codes_are_decoded_to_the_bit(folder, rows, columns, bits, group_size, dtype, exponent, wider, seed):
    generator = torch.Generator().manual_seed(seed)
    width = group_width(columns, group_size)
    shape = (rows, -(-columns // width))
    halves = torch.rand(shape, generator=generator).mul_(1000).sub_(100).to(torch.float16).double()
    coded = GroupedCodes(
        codes_MN=torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8),
        scales_MG=(halves * 2.0**exponent).float(),
        zeros_MG=torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8),
        bits=bits,
        width=width,
        exponent=exponent,
    )
    packed = grouped.pack(coded, dtype)
    file = folder / "packed.safetensors"
    file.unlink(missing_ok=True)
    write_tensors(file, [outgoing_tensor("layer.weight", packed)])
    weight = described("layer", read_entries(file)[0])
    grids = [Grid(bits, weight.layout.common_width)]
    grids += [Grid(8, weight.layout.common_width)] * wider + [Grid(bits, None)] * (width == columns)
    for grid in grids:
        # What they fail to read, see `Grid.holds`.
        if grid.bits == 4 and rows <= 8 and grid.groups(columns) > 1:
            assert not grid.holds(weight.layout)
            continue
        assert grid.holds(weight.layout)
        tensors = list(tensors_of(weight, grid))
        # The shape, two numbers of eight bytes, is not counted.
        assert sum(each.nbytes for each in tensors) == grid.nbytes(weight.layout) + 16
        assert torch.equal(decoded(weight, grid, folder), unpack(packed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_are_stored_in_the_dtype_that_holds_them(tmp_path, dtype):
    inputs = packed_model(tmp_path, dtype=dtype)
    export_compressed_tensors(tmp_path / "packed", tmp_path / "ct")
    scales = {
        t.dtype for name, t in load_file(tmp_path / "ct" / "model.safetensors").items() if name.endswith("_scale")
    }
    assert scales == {torch.float16 if dtype == torch.float16 else torch.float32}
    assert_same_model(tmp_path / "packed", tmp_path / "ct", inputs)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A packed checkpoint and inputs for it."""
    folder = tmp_path_factory.mktemp("export")
    kept = ("lm_head", "model.vision_tower.encoder.layers.0.mlp.fc1")
    inputs = packed_model(folder, keep=kept)
    (folder / "packed" / "LICENSE").write_text("theirs")
    (folder / "packed" / "lineage.json").write_text('{"of": "packed"}')
    return folder, inputs


def test_the_folder_is_what_transformers_and_people_expect(made, tmp_path, capfd, caplog):
    folder, inputs = made
    assert main(["export", str(folder / "packed"), str(tmp_path / "ct"), "--to", "compressed-tensors"]) == 0
    assert capfd.readouterr().out == f"exported: {tmp_path / 'ct'}\n"
    with caplog.at_level(logging.WARNING):
        assert_same_model(folder / "packed", tmp_path / "ct", inputs)
    assert caplog.records == [] and "REPORT" not in capfd.readouterr().err
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    said = QuantizationConfig.model_validate(config["quantization_config"])
    targets = said.config_groups["group_0"].targets
    model = load(folder / "base")
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears == {*targets, *said.ignore} and len(linears) == len(targets) + len(said.ignore)
    assert set(said.ignore) == {"lm_head", "model.vision_tower.encoder.layers.0.mlp.fc1"}
    assert (
        set(targets)
        == json.loads((folder / "packed" / "config.json").read_text())["quantization_config"]["packed"].keys()
    )
    before, after = load_file(folder / "base" / "model.safetensors"), load_file(tmp_path / "ct" / "model.safetensors")
    kept = before.keys() & after.keys()
    assert len(before) - len(kept) == len(targets) == (len(after) - len(kept)) / 4
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {name.rpartition(".")[0] for name in before.keys() - kept} == {
        name.removesuffix(".weight_packed") for name in after if name.endswith(".weight_packed")
    }
    assert (tmp_path / "ct" / "LICENSE").read_text() == "theirs"
    assert json.loads((tmp_path / "ct" / PACKED / "lineage.json").read_text()) == {"of": "packed"}
    assert not (tmp_path / "ct" / ".bivlm-files").exists() and [*tmp_path.iterdir()] == [tmp_path / "ct"]


def test_the_same_checkpoint_gives_the_same_bytes_in_any_shards(made, tmp_path):
    for name in ("one", "two"):
        export_compressed_tensors(made[0] / "packed", tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.is_dir() or file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    export_compressed_tensors(made[0] / "packed", tmp_path / "shards", max_shard_bytes=10_000)
    assert len([*(tmp_path / "shards").glob("model-*.safetensors")]) > 1
    assert_same_model(made[0] / "packed", tmp_path / "shards", made[1])


def test_weights_of_several_kinds_are_brought_onto_one_grid_or_rebuilt_and_named(tmp_path, capsys):
    inputs = packed_model(
        tmp_path,
        vision={**GRIDS, "bits": 3, "group_size": 32},  # of 48 columns, a short last group
        adaptor={**GRIDS, "bits": 2, "group_size": 0},
        language={**GRIDS},
        tables={"tokens": {"bits": 8, "group_size": 1}},
    )
    assert main(["export", str(tmp_path / "packed"), str(tmp_path / "ct"), "--to", "compressed-tensors"]) == 0
    dense, finer, _ = capsys.readouterr().out.splitlines()
    assert dense == "stored dense, all others have 4 bits, groups of 16: model.language_model.embed_tokens"
    assert finer.startswith("stored with 4 bits, groups of 16, as all have to be of one kind: model.multi_modal_proj")
    assert_same_model(tmp_path / "packed", tmp_path / "ct", inputs)


@pytest.mark.parametrize("head", ["absent", "equal", "different", "alone"])
@pytest.mark.parametrize("build", [llava, pytest.param(qwen2_5_vl, marks=pytest.mark.slow)])
def test_packed_tables_stay_packed(tmp_path, build, head):
    inputs = make_base(build, tmp_path / "base", True, head)
    packed = pack_tables(tmp_path / "base", tmp_path / "packed", 4)
    assert export_compressed_tensors(packed, tmp_path / "ct") == []
    names = [name for name in load_file(tmp_path / "ct" / "model.safetensors") if name.endswith("_packed")]
    assert len(names) == (2 if head == "different" else 1)
    assert_same_model(packed, tmp_path / "ct", inputs)


def test_a_model_whose_config_says_no_dtype_is_loaded_as_before(tmp_path):
    inputs = packed_model(tmp_path)
    change_json(tmp_path / "packed" / "config.json", lambda config: config.pop("dtype"))
    export_compressed_tensors(tmp_path / "packed", tmp_path / "ct")
    assert json.loads((tmp_path / "ct" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_model(tmp_path / "packed", tmp_path / "ct", inputs)


@pytest.mark.slow
@pytest.mark.parametrize("build", FAMILIES)
def test_every_family_is_the_model_that_was_packed(tmp_path, build):
    rules = dict.fromkeys(("vision", "adaptor", "language"), GRIDS)
    inputs = packed_model(tmp_path, build, make=make_published, keep=["lm_head"], **rules)
    assert export_compressed_tensors(tmp_path / "packed", tmp_path / "ct") == []
    assert_same_model(tmp_path / "packed", tmp_path / "ct", inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [64, 0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_reference_model_gives_the_same_answers(tmp_path, bits, group_size, dtype):
    shutil.copytree(CHECKPOINT, tmp_path / "base")
    change_json(
        tmp_path / "base" / "config.json", lambda config: config.update(dtype=str(dtype).removeprefix("torch."))
    )
    change_tensors(tmp_path / "base", lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    rule = {"method": "rtn", "bits": bits, "group_size": group_size}
    recipe = {"name": "r", "format": 1, "components": dict.fromkeys(("vision", "adaptor", "language"), rule)}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe | {"tables": {"tokens": {"bits": 4, "group_size": group_size}}}))
    compress_model(tmp_path / "base", tmp_path / "r.yaml", tmp_path / "packed")
    export_compressed_tensors(tmp_path / "packed", tmp_path / "ct")
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "ct")
    own = AutoProcessor.from_pretrained(tmp_path / "ct")
    asked = [(sample.image, sample.question) for sample in islice(questions("perception"), 4)]
    for loaded_as in (dtype, torch.float32):
        before, processor = load_model(tmp_path / "packed", "cpu", loaded_as)
        after = after.to(loaded_as)
        for name, parameter in before.named_parameters():
            other = after.get_parameter(name)
            assert torch.equal(parameter, other) and other.dtype == loaded_as, name
        assert answer(before, processor, asked) == answer(after, own, asked)


@pytest.mark.slow
def test_it_loads_without_bivlm(made, tmp_path):
    export_compressed_tensors(made[0] / "packed", tmp_path / "ct")
    code = (
        "import sys; from transformers import AutoModelForImageTextToText as A\n"
        f"A.from_pretrained({str(tmp_path / 'ct')!r})\nassert 'bivlm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


class TestWhatTheFormatDoesNotHold:
    def test_the_methods_layers_are_refused_by_name(self, tmp_path):
        packed_model(tmp_path, vision=GRIDS, language={"method": "bivlm", "groups": 2, "p_max": 0.05})
        with pytest.raises(InputError, match=r"^lm_head: packed by codec 'quantile'; .*; export it with --to dense"):
            export_compressed_tensors(tmp_path / "packed", tmp_path / "ct")
        assert {path.name for path in tmp_path.iterdir()} == {"base", "packed", "r.yaml"}

    @pytest.mark.parametrize(
        ("name", "codec"),
        [
            ("trellis", "trellis"),
            ("arb_rc", "rowblock"),
            ("billm", "rowblock"),
            ("hbllm", "wavelet"),
            ("pb_llm", "signs"),
        ],
    )
    def test_weights_of_other_methods(self, tmp_path, name, codec):
        generator = torch.Generator().manual_seed(0)
        x, weight = torch.randn(200, 128, generator=generator), torch.randn(32, 128, generator=generator)
        inputs = SiteStatistics(x.T @ x / 200, x.mean(0), x.abs().mean(0), {"text": 200}, torch.eye(32))
        chosen = method(name)
        plan = chosen.plan(LayerStatistics.measure(weight, 0.0), chosen.Settings(method=name))
        packed, _ = pack_layer(weight, plan, inputs=inputs)
        write_tensors(tmp_path / "one.safetensors", [outgoing_tensor("layer.weight", packed)])
        with pytest.raises(InputError, match=f"^layer: packed by codec '{codec}'; .*; export it with --to dense"):
            described("layer", read_entries(tmp_path / "one.safetensors")[0])

    def test_channel_scales(self, tmp_path):
        channels = grouped.stored_channel_scales(torch.rand(32) + 0.5)
        coded = GroupedCodes(*(torch.ones(8, n, dtype=kind) for n, kind in ((32, torch.uint8), (2, torch.float32),
                               (2, torch.uint8))), bits=4, width=16, exponent=0)  # fmt: skip
        for scales, held in ((None, True), (channels, False)):
            file = tmp_path / f"{held}.safetensors"
            write_tensors(file, [outgoing_tensor("layer.weight", grouped.pack(coded, torch.bfloat16, scales))])
            if held:
                assert described("layer", read_entries(file)[0]).layout.bits == 4
            else:
                with pytest.raises(InputError, match=r"^layer: grouped integers with channel scales \(awq\)"):
                    described("layer", read_entries(file)[0])

    def test_groups_so_narrow_that_dense_is_smaller(self, tmp_path):
        packed_model(tmp_path, language={**GRIDS, "bits": 8, "group_size": 1})
        with pytest.raises(InputError, match=r"^lm_head: groups of 1 columns, with which .* larger than dense"):
            export_compressed_tensors(tmp_path / "packed", tmp_path / "ct")

    def test_experts_that_transformers_stacks(self, tmp_path):
        packed_model(tmp_path, glm4v_moe, make=make_published, vision=GRIDS)
        with pytest.raises(InputError, match=r"experts\.0\.\w+\.weight: transformers makes .* --to dense"):
            export_compressed_tensors(tmp_path / "packed", tmp_path / "ct")

    def test_a_weight_that_would_be_rounded_otherwise(self, tmp_path):
        packed_model(tmp_path)
        change_json(tmp_path / "packed" / "config.json", lambda config: config.update(dtype="float32"))
        with pytest.raises(InputError, match=r"packed as bfloat16 in a model of float32.* --to dense"):
            export_compressed_tensors(tmp_path / "packed", tmp_path / "ct")

    def test_a_tensor_that_transformers_keeps_in_float32(self, tmp_path):
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {**sizes, "model_type": "opt", "vocab_size": 64, "ffn_dim": 48, "word_embed_proj_dim": 32}
        config = Blip2Config(
            vision_config={**sizes, "intermediate_size": 48, "image_size": 16, "patch_size": 8},
            qformer_config={**sizes, "intermediate_size": 48, "vocab_size": 64, "encoder_hidden_size": 32},
            text_config=text,
        )
        for dtype in (torch.bfloat16, torch.float16):  # in float16 alone, see `_keep_in_fp32_modules`
            folder = tmp_path / str(dtype)
            AutoModelForImageTextToText.from_config(config, dtype=dtype).save_pretrained(folder / "base")
            modules = {"vision": ["vision_model"], "adaptor": ["qformer"], "language": ["language_model"]}
            recipe = {"name": "r", "format": 1, "components": {"vision": GRIDS}, "modules": modules, "keep": []}
            (folder / "r.yaml").write_text(json.dumps(recipe))
            compress_model(folder / "base", folder / "r.yaml", folder / "packed")
            if dtype == torch.bfloat16:
                assert export_compressed_tensors(folder / "packed", folder / "ct") == []
                continue
            with pytest.raises(InputError, match=r"^qformer\..*: transformers keeps it in float32.* --to dense"):
                export_compressed_tensors(folder / "packed", folder / "ct")

    def test_damage_and_places_that_are_taken(self, made, tmp_path, capsys):
        with pytest.raises(InputError, match="expected a packed checkpoint"):
            export_compressed_tensors(made[0] / "base", tmp_path / "ct")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        said = ["export", str(made[0] / "packed"), str(tmp_path / "full"), "--to", "compressed-tensors"]
        assert main(said) == 2 and "expected a folder that is new or empty" in capsys.readouterr().err
        shutil.copytree(made[0] / "packed", tmp_path / "damaged")

        def damage(tensors):
            name = max(name for name, each in tensors.items() if each.dtype == torch.uint8)
            tensors[name][-1] ^= 1

        change_tensors(tmp_path / "damaged", damage)
        with pytest.raises(InputError, match="checksum"):
            export_compressed_tensors(tmp_path / "damaged", tmp_path / "ct")
        assert {path.name for path in tmp_path.iterdir()} == {"full", "damaged"}
