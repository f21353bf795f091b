"""A GGUF export holds the packed model to the last bit, in two files with llama.cpp's names."""

import hashlib
import json
import shutil
import sys

import pytest
import torch
from changed_files import change_tensors
from exportable import FAMILIES, MEAN, RECIPE, STD, llama_clip, make, qwen2_5_vl, qwen2_siglip
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize
from transformers import AutoModelForImageTextToText

from bivlm.errors import InputError
from bivlm.exports.building import PACKED
from bivlm.exports.gguf import MMPROJ, MODEL, export_gguf, summary
from flows.cli.main import main

ARCHITECTURES = {llama_clip: MODEL_ARCH.LLAMA, qwen2_siglip: MODEL_ARCH.QWEN2, qwen2_5_vl: MODEL_ARCH.QWEN2VL}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda build: build.__name__)
def exported(request, tmp_path_factory):
    """The family, the packed checkpoint and its export."""
    folder = tmp_path_factory.mktemp("gguf")
    packed = make(request.param, folder)
    return request.param, packed, folder / "out", export_gguf(packed, folder / "out")


def read(file):
    """Tensors of a GGUF file by name, float32 in torch's order of dimensions, and their types."""
    tensors = GGUFReader(file).tensors
    shapes = {each.name: [int(size) for size in reversed(each.shape)] for each in tensors}
    decoded = {each.name: torch.from_numpy(dequantize(each.data, each.tensor_type).copy()) for each in tensors}
    kinds = {each.name: each.tensor_type.name for each in tensors}
    return {name: numbers.view(shapes[name]) for name, numbers in decoded.items()}, kinds


def metadata(file):
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def unpermuted(weight, heads):
    """Undo llama.cpp's order of a Llama's queries or keys, as transformers does when it reads GGUF."""
    pairs = weight.view(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def expected_names(build, config, parameters):
    """The names in both files by the table of the gguf package, and of LLaVA's projector by the legacy converter."""
    text = get_tensor_name_map(ARCHITECTURES[build], config.text_config.num_hidden_layers)
    vision = get_tensor_name_map(MODEL_ARCH.MMPROJ, 8)
    names = {}
    for parameter in parameters:
        if parameter.startswith(("lm_head", "model.language_model.")):
            published, table = parameter.replace("model.language_model.", "model."), text
        else:
            published = parameter.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
            table = vision
        name = table.get_name(published, try_suffixes=(".weight", ".bias"))
        if published.startswith("multi_modal_projector"):
            name = published.replace("multi_modal_projector.linear_1", "mm.0").replace(
                "multi_modal_projector.linear_2", "mm.2"
            )
        names[parameter] = name
    return names


def taken(build, config, parameter, name, found):
    """Take the tensors of one parameter out of those found in the files, and put them together as transformers has it.

    None for what the features of LLaVA's tower do not go through, which must not be there.
    """
    unused = {llama_clip: (".post_layernorm.", "tower.encoder.layers.2."), qwen2_siglip: (".post_layernorm.",)}
    if any(part in parameter for part in unused.get(build, ())):
        assert name not in found
        return None
    if ".attn.qkv." in parameter:
        return torch.cat([found.pop(name.replace("attn_qkv", f"attn_{each}")) for each in "qkv"])
    if "patch_embed.proj" in parameter:
        return torch.stack([found.pop(name), found.pop(f"{name}.1")], 2)
    tensor = found.pop(name)
    if build is llama_clip and "language_model" in parameter and (".q_proj." in parameter or ".k_proj." in parameter):
        text = config.text_config
        return unpermuted(tensor, text.num_attention_heads if ".q_proj." in parameter else text.num_key_value_heads)
    if "visual.blocks." in parameter and ".mlp." in parameter:
        return without_padding(tensor, parameter)
    return tensor


def test_every_tensor_is_the_packed_models(exported):
    build, packed, out, _ = exported
    model = AutoModelForImageTextToText.from_pretrained(packed, dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    found = {**read(out / MODEL)[0], **read(out / MMPROJ)[0]}
    for parameter, name in expected_names(build, model.config, parameters).items():
        tensor, weight = taken(build, model.config, parameter, name, found), parameters[parameter].data
        if tensor is not None:
            assert tensor.shape == weight.shape, name
            assert torch.equal(tensor.to(torch.bfloat16), weight), name
    assert not found


def without_padding(tensor, parameter):
    """Take neurons without inputs away: 92 behind the 420 of a layer of Qwen2.5-VL's tower make two blocks."""
    if parameter.endswith("down_proj.bias"):
        return tensor
    if parameter.endswith("down_proj.weight"):
        assert tensor.shape == (256, 512)
        return tensor[:, :420]
    assert len(tensor) == 512 and not tensor[420:].any()
    return tensor[:420]


def test_packed_weights_are_blocks_and_the_rest_keeps_its_dtype(exported):
    _, _, out, written = exported
    for file in (MODEL, MMPROJ):
        kinds = read(out / file)[1]
        assert kinds == {each.name: each.kind for each in written if each.file == file}
        for name, kind in kinds.items():
            assert kind == expected_kind(name), name


def expected_kind(name):
    """By the recipe: 2 bits in Q2_K, 4 bits of rows in Q4_K, 4 bits in groups of 128 in Q5_0."""
    if name in ("token_embd.weight", "output.weight"):
        return "Q5_0" if name.startswith("token") else "BF16"
    part = name.split(".")[-2]
    if not name.endswith(".weight") or "norm" in part or "ln" in part or "embd" in part or name.endswith("weight.1"):
        return "F32"
    return "Q4_K" if name.startswith("v.") else "Q2_K"


def test_the_files_say_what_llama_cpp_asks(exported):
    build, packed, out, _ = exported
    text, vision = metadata(out / MODEL), metadata(out / MMPROJ)
    name = {llama_clip: "llama", qwen2_siglip: "qwen2", qwen2_5_vl: "qwen2vl"}[build]
    assert text["general.architecture"] == name
    assert (text[f"{name}.block_count"], text[f"{name}.embedding_length"], text[f"{name}.attention.head_count_kv"]) == (
        2,
        256,
        2,
    )
    assert len(text["tokenizer.ggml.tokens"]) == 1024 and text["tokenizer.chat_template"] == "{{ messages }}"
    assert text["tokenizer.ggml.eos_token_id"] == 1
    assert vision["clip.vision.image_mean"] == pytest.approx(MEAN) and vision["clip.vision.image_std"] == pytest.approx(
        STD
    )
    assert vision["clip.vision.block_count"] == {llama_clip: 2, qwen2_siglip: 3, qwen2_5_vl: 4}[build]
    for each in (text, vision):
        assert each["bivlm.lineage.sha256"] == hashlib.sha256((packed / "lineage.json").read_bytes()).hexdigest()
    assert json.loads((out / PACKED / "lineage.json").read_text()) == {"of": "packed"}
    assert {file.name for file in out.iterdir()} == {MODEL, MMPROJ, PACKED, "LICENSE"}


def test_a_class_token_is_said_to_be_read_wrongly(exported):
    build, _, _, written = exported
    assert any("leaves out the first patch" in line for line in summary(written)) == (build is llama_clip)


def test_the_same_checkpoint_gives_the_same_bytes(exported, tmp_path):
    _, packed, out, _ = exported
    export_gguf(packed, tmp_path / "again")
    for file in (MODEL, MMPROJ):
        assert (tmp_path / "again" / file).read_bytes() == (out / file).read_bytes()


def test_a_tied_head_is_left_to_the_embedding(tmp_path):
    def tied():
        config = qwen2_siglip()
        config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
        return config

    packed = make(tied, tmp_path, RECIPE.replace("keep: [lm_head]\n", ""))
    export_gguf(packed, tmp_path / "out")
    tensors = read(tmp_path / "out" / MODEL)[0]
    assert "output.weight" not in tensors
    model = AutoModelForImageTextToText.from_pretrained(packed, dtype=torch.bfloat16)
    assert torch.equal(tensors["token_embd.weight"].bfloat16(), model.get_input_embeddings().weight.data)


def test_a_table_that_no_type_holds_is_dense_and_said(tmp_path, capsys):
    packed = make(qwen2_siglip, tmp_path, RECIPE.replace("{tokens: 4}", "{tokens: 8}"))
    assert main(["export", str(packed), str(tmp_path / "out"), "--to", "gguf"]) == 0
    said = capsys.readouterr().out
    assert "model.gguf: BF16: 1 of the tensors, 262,144 numbers, 16.000 bits each, packed 8." in said
    assert "no block type holds token_embd.weight" in said
    assert said.endswith(f"exported: {tmp_path / 'out'}\n")
    assert read(tmp_path / "out" / MODEL)[1]["token_embd.weight"] == "BF16"


@pytest.mark.parametrize(
    ("language", "why"),
    [
        ("{method: rtn, bits: 8, group_size: 256}", "8 bits fit with zero points of 128 alone"),
        ("{method: rtn, bits: 2, group_size: 48}", "groups of 48 columns; blocks need a multiple of 32"),
        ("{method: bivlm, groups: 2, p_max: 0.05}", "expected no salient weights and levels at odd multiples"),
        ("{method: bivlm, groups: 2, p_max: 0}", "expected no salient weights and levels at odd multiples"),
        ("{method: trellis, feedback: none, rate: 2}", "expected one of grouped, quantile"),
    ],
)
def test_a_linear_layer_that_no_type_holds_is_refused_and_leaves_nothing(tmp_path, language, why):
    recipe = RECIPE.replace("{method: rtn, bits: 2, group_size: 0}", language)
    packed = make(qwen2_siglip, tmp_path, recipe)
    with pytest.raises(InputError, match=rf"model\.language_model\.layers\.0\..*{why}"):
        export_gguf(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob("*partial*")]


def changed(packed, folder, name, change):
    """A copy of a packed checkpoint with another JSON file."""
    shutil.copytree(packed, folder)
    said = json.loads((folder / name).read_text())
    change(said)
    (folder / name).write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("config.json", lambda said: said["text_config"].update(hidden_act="gelu"), "hidden_act: found 'gelu'"),
        (
            "config.json",
            lambda said: said["text_config"].update(
                rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
            ),
            "rope_type: found 'yarn'",
        ),
        ("config.json", lambda said: said["vision_config"].update(window_size=56), "window_size: found 56"),
        (
            "config.json",
            lambda said: said["vision_config"].update(fullatt_block_indexes=[0, 3]),
            r"fullatt_block_indexes: found \[0, 3\]",
        ),
        ("preprocessor_config.json", lambda said: said.pop("image_mean"), "image_mean: none of"),
        ("preprocessor_config.json", lambda said: said.update(image_std=[1]), r"image_std: expected three numbers"),
        (
            "tokenizer.json",
            lambda said: said.update(pre_tokenizer={"type": "Whitespace"}),
            "tokenizer.json: pre_tokenizer: found",
        ),
        (
            "tokenizer.json",
            lambda said: said.update(normalizer={"type": "Lowercase"}),
            "tokenizer.json: normalizer: found 'Lowercase'",
        ),
        ("tokenizer.json", lambda said: said.pop("model"), "no tokenizer of the tokenizers library"),
        ("tokenizer.json", lambda said: said["model"].update(merges=[]), "BPE without merges"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(qwen, tmp_path, name, change, why):
    packed = changed(qwen, tmp_path / "changed", name, change)
    with pytest.raises(InputError, match=why):
        export_gguf(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob("*partial*")]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make(qwen2_5_vl, tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize(
    ("build", "changes", "why"),
    [
        (
            qwen2_siglip,
            {"vision_feature_select_strategy": "default"},
            "vision_feature_select_strategy: found 'default'",
        ),
        (qwen2_siglip, {"vision_feature_layer": [-1, -2]}, "vision_feature_layer: found"),
        (llama_clip, {"projector_hidden_act": "relu"}, "projector_hidden_act: found 'relu'"),
    ],
)
def test_a_tower_that_llama_cpp_has_not_is_refused(tmp_path, build, changes, why):
    packed = make(build, tmp_path)
    config = json.loads((packed / "config.json").read_text()) | changes
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=why):
        export_gguf(packed, tmp_path / "out")


def test_other_folders_are_refused(qwen, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="expected a packed checkpoint"):
        export_gguf(qwen.parent / "base", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="expected a folder that is new or empty"):
        export_gguf(qwen, tmp_path / "full")
    with pytest.raises(InputError, match="overlaps"):
        export_gguf(qwen, qwen / "out")
    shutil.copytree(qwen, tmp_path / "damaged")

    def damage(tensors):
        name = next(name for name, each in tensors.items() if each.dtype == torch.uint8)
        tensors[name][-1] ^= 1

    change_tensors(tmp_path / "damaged", damage)
    with pytest.raises(InputError, match="checksum"):
        export_gguf(tmp_path / "damaged", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"gguf is not installed; pip install 'bivlm\[gguf\]'"):
        export_gguf(qwen, tmp_path / "out")
    assert {each.name for each in tmp_path.iterdir()} == {"full", "damaged"}
