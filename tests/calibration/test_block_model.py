"""A model run one block at a time against the same model run whole."""

from contextlib import ExitStack

import pytest
import torch
from tiny_families import FAMILIES, make_tiny
from tiny_llava import make_tiny_llava
from transformers import AutoModelForImageTextToText

from bivlm.calibration.blocks.model import BlockwiseModel
from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError


def whole_run(folder, inputs, names):
    """Output of every module in `names`, and the logits, of the ordinary model."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    outputs = {}
    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(
                lambda _, arguments, output, name=name: outputs.__setitem__(name, output)
            )
            hooks.callback(hook.remove)
        logits = model(**inputs, use_cache=False).logits
    return outputs, logits


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_every_unit_gives_what_it_gives_in_the_whole_model(build, tmp_path):
    inputs = make_tiny(build, tmp_path, torch.float32)
    model = BlockwiseModel(Checkpoint.open(tmp_path))
    expected, logits = whole_run(tmp_path, inputs, [unit.name for unit in model.units])
    assert set(expected) == {unit.name for unit in model.units}
    for component in ("vision", "language"):  # Qwen3-VL's deep-stack mergers run between vision blocks
        names = [unit.name for unit in model.units if unit.component == component]
        assert [name for name in expected if name in names] == names  # the order in which they ran
    outputs = {}
    for unit in model.units:
        given = {other.name: outputs[other.name] for other in model.predecessors(unit)}
        with torch.no_grad(), model.at(unit) as step:
            outputs[unit.name] = step(inputs, given)
        assert torch.allclose(outputs[unit.name], expected[unit.name], atol=1e-5), unit.name
    blocks = [unit for unit in model.units if unit.name != "lm_head"]
    last = {unit.name: outputs[unit.name] for unit in blocks if unit.component == "adaptor" or unit is blocks[-1]}
    with torch.no_grad(), model.at_end() as step:
        assert torch.allclose(step(inputs, last), logits, atol=1e-5)


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_units_hold_every_linear_once(build, tmp_path):
    make_tiny(build, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    inside = [name for unit in BlockwiseModel(checkpoint).units for name in unit.linears]
    layers = [linear for linear in linears(checkpoint) if linear.tied_to is None and linear.stacked_in is None]
    assert sorted(inside) == sorted(linear.name for linear in layers)


def test_only_the_unit_at_work_is_in_memory(tiny_llava):
    model = BlockwiseModel(Checkpoint.open(tiny_llava))
    block = model.unit("model.language_model.layers.1")

    def loaded():
        return {name for unit in model.units for name in unit.linears if not model.linear(name).weight.is_meta}

    assert loaded() == set()
    with model.at(block):
        assert loaded() == set(block.linears)
    assert loaded() == set()


def test_of_the_tokens_embedding_only_their_rows_are_read(tiny_llava, monkeypatch):
    model = BlockwiseModel(Checkpoint.open(tiny_llava))
    first = model.unit("model.language_model.layers.0")
    read = model._read
    rows = []
    monkeypatch.setattr(model, "_read", lambda path, row=None: (rows.append((path, row)), read(path, row))[1])
    with torch.no_grad(), model.at(first) as step:
        rows.clear()
        step({"input_ids": torch.tensor([[9, 5, 9, 12]])}, {})
        assert rows == [("model.language_model.embed_tokens.weight", row) for row in (5, 9, 12)]
        with pytest.raises(IndexError, match=r"embed_tokens\.weight: row 100000 of \d+"):
            step({"input_ids": torch.tensor([[9, 100_000]])}, {})


def test_given_weights_take_the_place_of_the_stored_ones(tiny_llava):
    model = BlockwiseModel(Checkpoint.open(tiny_llava))
    unit = model.units[0]
    weights = {unit.linears[0]: torch.zeros(64, 64)}
    with model.at(unit, weights):
        assert not model.linear(unit.linears[0]).weight.any()
        assert model.linear(unit.linears[1]).weight.any()
    with model.at(unit):
        assert model.linear(unit.linears[0]).weight.any()


def test_a_head_tied_to_the_embedding_is_no_unit_and_still_gives_logits(tmp_path):
    folder = make_tiny_llava(
        tmp_path, dtype=torch.float32, tie_word_embeddings=True, text={"tie_word_embeddings": True}
    )
    model = BlockwiseModel(Checkpoint.open(folder))
    assert model.units[-1].name == "model.language_model.layers.1"
    inputs = {"input_ids": torch.tensor([[5, 9, 12]])}
    outputs, logits = whole_run(folder, inputs, [model.units[-1].name])
    with torch.no_grad(), model.at_end() as step:
        assert torch.allclose(step(inputs, outputs), logits, atol=1e-5)


def test_a_packed_checkpoint_is_refused(packed_llava):
    with pytest.raises(InputError, match="packed; expected full precision"):
        BlockwiseModel(Checkpoint.open(packed_llava))
