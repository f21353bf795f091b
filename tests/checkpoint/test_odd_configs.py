"""Configs, indexes and headers with values of the wrong kind or size are refused by the name of their file and key."""

import json
import shutil
from functools import reduce
from operator import getitem

import pytest
from changed_files import change_json

from bivlm.checkpoint.linears import anatomy, linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.safetensors_file import read_entries
from bivlm.errors import InputError
from bivlm.evaluation.generation import load_processor
from bivlm.reports.bits import bits_of
from bivlm.reports.inspection import inspect


@pytest.fixture
def folder(tiny_llava, tmp_path):
    return shutil.copytree(tiny_llava, tmp_path / "odd")


def change(file, place, value):
    """Set the value at the end of a path of keys."""
    change_json(file, lambda content: reduce(getitem, place[:-1], content).update({place[-1]: value}))


ODD = {
    "quantization_config is text": (("quantization_config",), "int4", "quantization_config: expected an object"),
    "quantization_config is a list": (("quantization_config",), [1], r"quantization_config: .*found \[1\]"),
    "model_type is a list": (("model_type",), ["llava"], r"model_type: expected text, found \['llava'\]"),
    "another config is meant": (("configuration_files",), ["config.4.0.0.json"], "configuration_files"),
    "more layers than tensors": (
        ("text_config", "num_hidden_layers"),
        10**9,
        r"config\.json\.text_config\.num_hidden_layers: found 1000000000, the weights are of",
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_an_odd_config_is_refused_by_file_key_and_value(what, folder):
    place, value, message = ODD[what]
    change(folder / "config.json", place, value)
    with pytest.raises(InputError, match=rf"config\.json.*{message}|{message}"):
        linears(Checkpoint.open(folder))


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "patch_size")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("value", [0, -1, 10**30, "64", [64], None, 0.5, {}, True], ids=str)
def test_an_odd_size_gives_a_refusal_that_names_the_checkpoint(part, value, folder):
    good = (folder / "config.json").read_text()
    for key in SIZES:
        (folder / "config.json").write_text(good)
        if key not in json.loads(good)[part]:
            continue
        change(folder / "config.json", (part, key), value)
        try:
            inspect(folder, statistics=False)
        except InputError as error:
            assert str(folder) in str(error) or ".weight" in str(error), (key, str(error))


@pytest.mark.parametrize("value", [[], "x", 3, [[1]]], ids=str)
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_of_a_config_that_is_none_is_refused(part, value, folder):
    change(folder / "config.json", (part,), value)
    with pytest.raises(InputError, match="odd"):
        anatomy(Checkpoint.open(folder))


PACKED = {
    "tables": (3, "quantization_config: tables: expected names, found 3"),
    "packed": (["x"], r"quantization_config: packed: expected a byte length by linear, found \['x'\]"),
    "format": ([1], r"quantization_config: format \[1\]"),
    "modules": ({"vision": 1}, "quantization_config: modules.vision: expected a list"),
}


@pytest.mark.parametrize("key", PACKED)
def test_an_odd_quantization_config_is_refused(key, packed_llava):
    value, message = PACKED[key]
    change(packed_llava / "config.json", ("quantization_config", key), value)
    with pytest.raises(InputError, match=message):
        bits_of(packed_llava)


@pytest.mark.parametrize("value", [3, ["x"], {"a": 1}, {}, {"a": "../b.safetensors"}, {"a": "\n"}], ids=str)
def test_an_odd_index_is_refused(value, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: "):
        Checkpoint.open(folder)


GOOD = '"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
HEADERS = {
    "nested": "[" * 5000,
    "a list": "[]",
    "a tensor twice": f"{{{GOOD},{GOOD}}}",
    "a tensor that is a list": '{"a":[1]}',
    "a tensor without a shape": '{"a":{"dtype":"U8","data_offsets":[0,2]}}',
    "a shape that is text": '{"a":{"dtype":"U8","shape":"2","data_offsets":[0,2]}}',
    "a negative shape": '{"a":{"dtype":"U8","shape":[-1,-2],"data_offsets":[0,2]}}',
    "true as a size": '{"a":{"dtype":"BOOL","shape":[true,2],"data_offsets":[0,2]}}',
    "5,000 digits": f'{{"a":{{"dtype":"U8","shape":[{"9" * 5000}],"data_offsets":[0,2]}}}}',
    "more numbers than bits": '{"a":{"dtype":"F4","shape":[1000000],"data_offsets":[0,2]}}',
    "a thousand dimensions": f'{{"a":{{"dtype":"U8","shape":[2{",1" * 1000}],"data_offsets":[0,2]}}}}',
    "a dtype that is none": '{"a":{"dtype":["U8"],"shape":[2],"data_offsets":[0,2]}}',
    "an offset too few": '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0]}}',
    "offsets backwards": '{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,0]}}',
    "half a character": r'{"\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
}


@pytest.mark.parametrize("what", HEADERS)
def test_an_odd_header_is_refused_by_the_name_of_its_file(what, tmp_path):
    def write(header):
        (tmp_path / "t.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"ab")
        return read_entries(tmp_path / "t.safetensors")

    assert [entry.shape for entry in write(f"{{{GOOD}}}")] == [(2,)]
    with pytest.raises(InputError, match=r"t\.safetensors: its header is not a safetensors header"):
        write(HEADERS[what])


def test_weights_without_a_number_are_refused(folder):
    header = b'{"a":{"dtype":"I64","shape":[0],"data_offsets":[0,0]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="odd: holds no parameters"):
        bits_of(folder)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[]", "{}", "[" * 5000, "{", "3", "null", '{"image_processor": 3}', "\ud800"])
def test_an_odd_processor_is_refused_by_the_name_of_its_folder(name, content, folder):
    (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        load_processor(folder)
    except InputError as error:
        assert str(folder) in str(error)


def test_an_adapter_beside_the_weights_is_refused(folder):
    """transformers would load another base model for it if peft is installed, and pass it over otherwise."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(InputError, match=r"has an adapter \(adapter_config.json\).*merge it"):
        Checkpoint.open(folder)
