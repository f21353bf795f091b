"""Every image-text architecture of transformers, at the size of its default config, without a weight on the disk."""

import json
import struct

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from bivlm.checkpoint.architectures import ARCHITECTURES
from bivlm.checkpoint.linears import anatomy
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.reports.inspection import inspect

KNOWN = sorted(ARCHITECTURES)
OTHERS = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(KNOWN))


def skeleton_of(model_type, folder):
    """The model of the type's default config, written and read again, on the meta device.

    Skips a type that has no such config, or whose model needs a further package.
    """
    try:
        AutoConfig.for_model(model_type).save_pretrained(folder)
        with torch.device("meta"), no_init_weights():
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        pytest.skip(f"its default config makes no model here: {error}")
    state = model.state_dict()
    if any(state[name].shape != state[other].shape for name, other in model.all_tied_weights_keys.items()):
        pytest.skip("its default config ties a head to an embedding of another shape")
    return model


def write_headers(model, folder):
    """A checkpoint of the model's size and names whose file is one hole."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def linears_in(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KNOWN)
def test_a_known_architecture_lists_all_its_linears_and_every_parameter(model_type, tmp_path):
    model = skeleton_of(model_type, tmp_path)
    write_headers(model, tmp_path)
    parts = anatomy(Checkpoint.open(tmp_path))
    plain = {name for name in linears_in(model) if type(model.get_submodule(name)) is nn.Linear}
    assert {linear.name for linear in parts.linears} == plain
    others = {
        tensor.kind for tensor in parts.left_alone if "Linear" in tensor.kind and not tensor.kind.endswith("bias")
    }
    assert others <= {"NonDynamicallyQuantizableLinear"}  # of the pooling head that SigLIP has by default
    found = inspect(tmp_path, statistics=False)
    tied = model.all_tied_weights_keys
    assert found["parameters"] == sum(t.numel() for name, t in model.state_dict().items() if name not in tied)
    assert sum(part["parameters"] for part in found["parts"]) == found["parameters"]
    assert all(part["component"] != "outside" or part["share"] < 1e-5 for part in found["parts"])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS)
def test_an_unknown_architecture_is_refused_with_its_linears_and_counted_by_a_map(model_type, tmp_path):
    model = skeleton_of(model_type, tmp_path)
    write_headers(model, tmp_path)
    with pytest.raises(InputError) as refused:
        inspect(tmp_path, statistics=False)
    _, _, listing = str(refused.value).partition("outputs x inputs):\n")
    lines = listing.splitlines()
    assert sum(int(line.split(" x ")[0]) for line in lines) == len(linears_in(model))
    # Any two of the model's parts will do to see that nothing is missed.
    body = [name for name, module in model.named_children() if any(True for _ in module.parameters())]
    inner = [f"{body[0]}.{name}" for name, module in model.get_submodule(body[0]).named_children()]
    modules = {"vision": inner[:1], "language": [*inner[1:], *body[1:]]}
    found = inspect(tmp_path, statistics=False, modules=modules)
    tied = model.all_tied_weights_keys
    assert found["parameters"] == sum(t.numel() for name, t in model.state_dict().items() if name not in tied)
    listed = {linear["name"] for linear in found["linears"]}
    left = [tensor for tensor in found["left_alone"]["tensors"] if "Linear" in tensor["kind"]]
    assert len(listed) + len(left) >= len(linears_in(model))
