"""A new method is one file: it registers by being there, and everything else knows what to do with it."""

import textwrap

import pytest
import torch

import bivlm.methods
from bivlm.compression.layer import pack_layer
from bivlm.errors import InputError
from bivlm.methods import method, methods
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack
from bivlm.recipe.loading import parse_recipe

FILE = """
from typing import ClassVar, Literal

from pydantic import Field

from bivlm.methods.base import Method, MethodSettings, Quantized
from bivlm.packing import grouped
from bivlm.numerics.uniform_grid import round_to_nearest


class CoarseSettings(MethodSettings):
    method: Literal["coarse"]
    columns: int = Field(default=16, ge=1)


class Coarse(Method):
    name: ClassVar[str] = "coarse"
    version: ClassVar[int] = 1
    Settings = CoarseSettings

    def quantize(self, weight_MN, plan, inputs=None):
        coded = round_to_nearest(weight_MN, 4, plan.parameters["columns"])
        return Quantized(grouped.pack(coded, weight_MN.dtype))
"""


@pytest.fixture
def coarse(tmp_path, monkeypatch):
    (tmp_path / "coarse.py").write_text(textwrap.dedent(FILE))
    monkeypatch.setattr(bivlm.methods, "__path__", [*bivlm.methods.__path__, str(tmp_path)])
    methods.cache_clear()
    yield method("coarse")
    methods.cache_clear()


def test_a_new_method_is_one_file(coarse):
    recipe = {"name": "r", "format": 1, "components": {"language": {"method": "coarse", "columns": 8}}}
    settings = parse_recipe(recipe).components["language"]
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    packed, record = pack_layer(weight, coarse.plan(LayerStatistics.measure(weight, 0.0), settings))
    assert unpack(packed).shape == weight.shape
    assert 0 < record.error < 0.02
    assert record.bits.stored == 8 * packed.numel() / weight.numel()


def test_its_settings_are_checked_as_any_others(coarse):
    recipe = {"name": "r", "format": 1, "components": {"language": {"method": "coarse", "columns": 0}}}
    with pytest.raises(InputError, match=r"components\.language"):
        parse_recipe(recipe)
