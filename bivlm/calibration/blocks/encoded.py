"""Tensors of every calibration sample in one file, read one sample at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from bivlm.checkpoint.safetensors_file import TensorEntry, read_entries, read_tensor
from bivlm.errors import InputError
from bivlm.sources.replies import Reply

_REPLY, _OUTPUT, _ABSENT = "reply", "output", "absent"


class SampleTensors:
    """The file of `write_samples`: for every sample some tensors by name.

    It is read plainly: the used samples of a mapped file would still count as memory.
    """

    def __init__(self, file: str | Path) -> None:
        """Raise `InputError` if the file is missing, cut short or without samples."""
        self._entries: dict[int, dict[str, TensorEntry]] = {}
        for entry in read_entries(Path(file)):
            number, _, name = entry.name.partition("/")
            self._entries.setdefault(int(number), {})[name] = entry
        if sorted(self._entries) != list(range(len(self._entries))) or not self._entries:
            raise InputError(f"{file}: expected tensors of samples 0, 1, ...")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a sample, on the CPU."""
        return {name: read_tensor(entry) for name, entry in self._entries[sample].items()}


# Tensors of every sample by name: in a file, or in memory.
Samples = SampleTensors | Sequence[Mapping[str, torch.Tensor]]


def write_samples(samples: Iterable[Mapping[str, torch.Tensor]], file: str | Path) -> None:
    """Write the tensors of every sample; the same tensors give the same bytes."""
    tensors = {
        f"{number:05d}/{name}": tensor.detach().cpu().contiguous()
        for number, sample in enumerate(samples)
        for name, tensor in sample.items()
    }
    save_file(tensors, file)


def with_reply(reply: Reply) -> dict[str, torch.Tensor]:
    """Return a sample as the model takes it and the position of its reply, ready for `write_samples`."""
    return {**reply.inputs, _REPLY: torch.tensor([reply.start, reply.count])}


def model_inputs(sample: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the entries of `with_reply` that the model takes."""
    return {name: tensor for name, tensor in sample.items() if name != _REPLY}


def reply_range(sample: Mapping[str, torch.Tensor]) -> range:
    """Return the positions of the reply's tokens."""
    start, count = sample[_REPLY].tolist()
    return range(start, start + count)


def is_image(tokens: torch.Tensor, config: object) -> torch.Tensor:
    """Return which of the tokens, int64 (1, T), stand for image patches: bool (T,)."""
    names = ("image_token_id", "image_token_index")
    token = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if token is None:
        raise InputError(f"{type(config).__name__}: no image token; expected one of {', '.join(names)}")
    return tokens[0] == token


def has_image(sample: Mapping[str, torch.Tensor]) -> bool:
    """Return whether the sample has pixels for the vision model."""
    return any(name.startswith("pixel_values") for name in sample)


def stack(outputs: Sequence[torch.Tensor | None]) -> list[dict[str, torch.Tensor]]:
    """Return a unit's outputs for every sample as `write_samples` takes them; None where the unit did not run."""
    return [{_ABSENT: torch.zeros(0)} if output is None else {_OUTPUT: output} for output in outputs]


def outputs_at(given: Mapping[str, Samples], sample: int) -> dict[str, torch.Tensor]:
    """Return the units' outputs for a sample, by name, from files of `stack`; units that did not run are left out."""
    found = {name: tensors[sample] for name, tensors in given.items()}
    return {name: tensors[_OUTPUT] for name, tensors in found.items() if _OUTPUT in tensors}
