"""Tensors of calibration samples, written once and read one sample at a time."""

import pytest
import torch
from safetensors.torch import save_file

from bivlm.calibration.blocks.encoded import SampleTensors, outputs_at, stack, write_samples
from bivlm.errors import InputError


def test_samples_are_read_as_they_were_written(tmp_path):
    samples = [
        {"a": torch.arange(6).view(2, 3), "b": torch.randn(4).to(torch.bfloat16)},
        {"a": torch.ones(1, dtype=bool)},
    ]
    write_samples(samples, tmp_path / "samples")
    found = SampleTensors(tmp_path / "samples")
    assert len(found) == 2
    for number, sample in enumerate(samples):
        assert found[number].keys() == sample.keys()
        assert all(torch.equal(found[number][name], tensor) for name, tensor in sample.items())


def test_what_was_read_is_no_part_of_the_file(tmp_path):
    """Of a mapped file every sample that was ever looked at would count as memory."""
    write_samples([{"a": torch.zeros(1000)}], tmp_path / "samples")
    found = SampleTensors(tmp_path / "samples")[0]["a"]
    with (tmp_path / "samples").open("r+b") as file:
        file.seek(-4000, 2)
        file.write(b"\xff" * 4000)
    assert not found.any()


def test_a_unit_that_did_not_run_is_left_out(tmp_path):
    write_samples(stack([torch.ones(2), None]), tmp_path / "outputs")
    outputs = SampleTensors(tmp_path / "outputs")
    assert outputs_at({"unit": outputs}, 0)["unit"].tolist() == [1.0, 1.0]
    assert outputs_at({"unit": outputs}, 1) == {}


def test_other_files_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="absent: the file is missing"):
        SampleTensors(tmp_path / "absent")
    save_file({}, tmp_path / "empty")
    with pytest.raises(InputError, match=r"empty: expected tensors of samples 0, 1"):
        SampleTensors(tmp_path / "empty")
