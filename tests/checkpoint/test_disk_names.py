"""Where packed weights lie on disk is told by names and lengths as transformers would tell it, or not at all."""

import pytest
import torch
from tiny_families import FAMILIES, PUBLISHED, make_published, make_tiny
from transformers import AutoModelForImageTextToText

from bivlm.checkpoint.disk_names import pair_names
from bivlm.checkpoint.linears import anatomy
from bivlm.checkpoint.reading import Checkpoint


@pytest.mark.parametrize("make", [make_tiny, make_published], ids=["as saved", "as published"])
@pytest.mark.parametrize("build", dict.fromkeys([*FAMILIES, *PUBLISHED]), ids=lambda build: build.__name__)
def test_every_architecture_is_told_as_by_transformers(build, make, tmp_path):
    make(build, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    expected = {
        name: linear.disk_name.removesuffix(".weight")
        for name, linear in anatomy(checkpoint).packable.items()
        if linear.tied_to is None
    }
    lengths = {name: checkpoint.entries[f"{disk_name}.weight"].nbytes for name, disk_name in expected.items()}
    assert pair_names(lengths, {expected[name]: nbytes for name, nbytes in lengths.items()}) == expected


def test_the_longest_common_end_goes_first():
    ours = {"model.tower.layers.0.fc": 8, "model.language.layers.0.fc": 8}
    assert pair_names(ours, {"tower.layers.0.fc": 8, "language.model.layers.0.fc": 8}) == {
        "model.tower.layers.0.fc": "tower.layers.0.fc",
        "model.language.layers.0.fc": "language.model.layers.0.fc",
    }


@pytest.mark.parametrize(
    "on_disk",
    [
        {"one.0.fc": 8, "other.0.fc": 8},  # both could be either
        {"a.0.fc": 8, "b.0.fc": 9},  # another length
        {"a.0.fc": 8},  # one is missing
        {"a.0.fc": 8, "b.0.fc": 8, "c.0.fc": 8},  # one too many
        {"a.0.fc": 8, "b.0.linear": 8},  # another name
    ],
)
def test_what_names_leave_open_is_not_guessed(on_disk):
    assert pair_names({"x.a.0.fc": 8, "x.b.0.fc": 8}, on_disk) is None


@pytest.mark.parametrize("build", PUBLISHED, ids=lambda build: build.__name__)
def test_a_leftover_is_loaded_as_it_lies_on_disk(build, tmp_path):
    make_published(build, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    parts = anatomy(checkpoint)
    found, model = parts.leftovers([]), AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert {parts.tokens.disk_name} < set(found) < set(checkpoint.entries)
    for disk_name, name in found.items():
        assert torch.equal(model.get_parameter(name), checkpoint.read(disk_name)), disk_name
