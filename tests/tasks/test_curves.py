"""Which layers an error curve is measured on, and on how much of them."""

from dataclasses import replace

import pytest

from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from tasks import curves
from tasks.layers import Layer

SETTINGS = {"method": "bivlm", "groups": 2, "p_max": 0.05}


def layer(name, shape=(64, 64), settings=SETTINGS):
    return Layer("folder", name, f"{name}.weight", "language", shape, "0" * 64, settings)


def test_every_layer_of_a_small_model_that_has_a_share_to_vary():
    layers = [layer("blocks.0.q"), layer("blocks.1.q"), layer("blocks.1.k", settings={"method": "rtn"})]
    layers += [layer("blocks.1.v", settings=SETTINGS | {"p_max": 0, "levels": "odd"})]
    assert curves.varied_layers(layers) == layers[:2]


def test_of_a_large_model_every_kind_at_even_distances(monkeypatch):
    monkeypatch.setattr(curves, "MODEL_WEIGHTS", 6 * 64 * 64)
    layers = [layer(f"blocks.{number}.{kind}") for number in range(9) for kind in ("q", "down")]
    chosen = [each.name for each in curves.varied_layers(layers)]
    assert chosen == [f"blocks.{number}.{kind}" for number in (0, 3, 6) for kind in ("q", "down")]


def test_a_large_layers_curve_is_near_that_of_all_its_rows(tiny_llava, tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(tiny_llava)
    linear = max(linears(checkpoint), key=lambda linear: linear.size)
    sums = checkpoint.digests().tensors
    known = Layer(
        str(tiny_llava),
        linear.name,
        linear.disk_name,
        linear.component,
        linear.shape,
        sums[linear.disk_name],
        {"method": "bivlm", "groups": 2, "p_max": 0.05},
    )
    known = replace(known, settings=known.method_settings.model_dump(mode="json"))

    def errors():
        (done,) = curves.measure_curves.fn([known], str(tmp_path)).values()
        return done.record.figures["error_by_p_max"]

    whole = errors()
    monkeypatch.setattr(curves, "LAYER_WEIGHTS", linear.size // 2)
    half = errors()
    assert whole != half
    assert half == pytest.approx(whole, rel=0.15)
    assert list(half) == ["0.01", "0.02", "0.05", "0.1"]
