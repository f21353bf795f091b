"""What the tests of all codecs ask for: gradients that are those of the weight, and damage that is named."""

import numpy as np
import pytest
import torch

from bivlm.errors import InputError
from bivlm.packing import container, format_bits, open_packed, unpack


def check_gradients(packed, every, step):
    """The gradient of every so many-th number, against the difference that a step of it to both sides makes.

    A weight is linear in each of its numbers alone, so that the difference is the derivative.
    """
    codec, header = open_packed(packed)
    opened = codec.tunable(packed, header)
    leaves = {name: values.clone().requires_grad_() for name, values in opened.parameters.items()}
    slope = torch.randn(header.shape, generator=torch.Generator().manual_seed(5))
    (opened.rebuild(leaves) * slope).sum().backward()
    for name, values in opened.parameters.items():
        for index in range(0, values.numel(), every):
            change = torch.zeros_like(values)
            change.view(-1)[index] = step
            ahead, behind = (opened.rebuild({**opened.parameters, name: values + c}) for c in (change, -change))
            numeric = ((ahead - behind).double() * slope.double()).sum() / (2 * step)
            assert float(leaves[name].grad.view(-1)[index]) == pytest.approx(float(numeric), rel=1e-3, abs=1e-4)


def check_damage_is_named(packed, section, content, message):
    """With other bytes in one section, the envelope intact, the weight is refused by shape and reason."""
    codec, header = open_packed(packed)
    sections = [container.section(packed, header, index).numpy() for index in range(len(header.sections))]
    sections[section : section + 1] = [np.frombuffer(content, np.uint8)]  # one behind the last is one more
    damaged = container.write(codec.name, header.shape, header.dtype, sections)
    rows, columns = header.shape
    for read in (unpack, format_bits):
        with pytest.raises(InputError, match=f"shape \\({rows}, {columns}\\): .*{message}"):
            read(damaged)
