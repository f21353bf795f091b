"""Overlap and concentration of salient weights against counting by hand, and the figure of them."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import QuadMesh

from benchmarks.saliency_overlap import TOP_SHARE, compare
from bivlm.errors import InputError
from bivlm.reports import figures

METRICS = ("magnitude", "activation", "hessian")


def mask(rows, columns, places):
    found = np.zeros((rows, columns), bool)
    for place in places:
        found[place] = True
    return found


_CELLS = st.sets(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=20)


@given(_CELLS, _CELLS)
def test_the_overlap_is_that_of_the_two_sets(a, b):
    found = compare({"a": mask(6, 8, a), "b": mask(6, 8, b)})
    assert found["overlap"] == {"a|b": len(a & b) / len(a | b) if a | b else None}
    assert found["salient"] == {"a": len(a) / 48, "b": len(b) / 48}


@given(_CELLS)
def test_concentration_counts_the_fullest_column_and_row(cells):
    found = compare({"a": mask(6, 8, cells)})
    for lines, axis in (("rows", 0), ("columns", 1)):
        counts = [sum(cell[axis] == line for cell in cells) for line in range(8)]
        assert found[lines]["a"] == (max(counts) / len(cells) if cells else None)


def test_one_in_a_hundred_columns_is_looked_at():
    salient = np.zeros((10, 300), bool)
    salient[:, 7] = salient[:4, 8] = salient[:3, 9] = salient[:2, 10] = True
    assert math.ceil(TOP_SHARE * 300) == 3
    assert compare({"a": salient})["columns"]["a"] == 17 / 19


def test_independent_sets_overlap_as_said():
    random, share = np.random.default_rng(0), 0.1
    found = compare({metric: random.random((500, 400)) < share for metric in METRICS})
    assert list(found["overlap"]) == ["magnitude|activation", "magnitude|hessian", "activation|hessian"]
    assert list(found["overlap"].values()) == pytest.approx([share / (2 - share)] * 3, rel=0.05)


def test_masks_may_be_tensors_and_the_result_is_ready_for_json():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    found = compare({"magnitude": weight.abs() > 1.5, "positive": weight > 1.5})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["overlap"]["magnitude|positive"] == pytest.approx(
        float((weight > 1.5).sum() / (weight.abs() > 1.5).sum())
    )


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "no masks to compare"),
        ({"a": np.ones((2, 3), bool), "b": np.ones((3, 2), bool)}, r"by 'b': a mask of bool \(3, 2\)"),
        ({"a": np.ones((2, 3))}, r"by 'a': a mask of float64 \(2, 3\); expected boolean masks"),
        ({"a": np.ones(6, bool)}, r"\(6,\)"),
        ({"a": np.ones((0, 3), bool)}, r"\(0, 3\)"),
    ],
)
def test_other_masks_are_refused(masks, message):
    with pytest.raises(InputError, match=message):
        compare(masks)


def record(number, component):
    random = np.random.default_rng(number)
    masks = {metric: random.random((40, 200)) < 0.05 for metric in METRICS}
    name = f"model.{component}.layers.{number // 2}.part{number % 2}"
    return {"name": name, "component": component, **compare(masks)}


@pytest.fixture
def records():
    return [record(number, component) for component in ("vision", "language") for number in range(6)]


def cells(axes):
    return {mesh.get_label(): float(mesh.get_array()[0, 0]) for mesh in axes.collections if isinstance(mesh, QuadMesh)}


def test_a_cell_is_the_mean_overlap_of_a_component(records):
    figure = figures.salient_overlap(records)
    for axes, component in zip(figure.axes, ("vision", "language"), strict=False):
        members = [r["overlap"] for r in records if r["component"] == component]
        expected = {pair: np.mean([overlap[pair] for overlap in members]) for pair in members[0]}
        assert cells(axes) == pytest.approx(expected)
        assert [text.get_text() for text in axes.texts] == [f"{cells(axes)[pair]:.2f}" for pair in cells(axes)]


def test_panels_say_what_chance_would_give(records):
    titles = [axes.get_title("left") for axes in figures.salient_overlap(records).axes[:2]]
    assert titles == [f"{component}, 6 layers (0.026 by chance)" for component in ("vision", "language")]
    for each in records:
        del each["salient"]
    assert figures.salient_overlap(records).axes[0].get_title("left") == "vision, 6 layers"


def test_a_pair_may_be_named_either_way_round(records):
    turned = [
        r | {"overlap": {"|".join(reversed(pair.split("|"))): x for pair, x in r["overlap"].items()}}
        for r in records[1:]
    ]
    plain, mixed = (figures.salient_overlap(found).axes[0] for found in (records, [records[0], *turned]))
    assert cells(mixed) == cells(plain)


def test_every_layer_has_its_concentration_by_every_metric(records):
    drawn = figures.salient_overlap(records).axes[2:]
    for axes, (lines, component) in zip(
        drawn, [(lines, part) for lines in ("columns", "rows") for part in ("vision", "language")], strict=True
    ):
        for metric in METRICS:
            (line,) = [line for line in axes.lines if line.get_label() == f"{lines} {metric}"]
            expected = [100 * r[lines][metric] for r in records if r["component"] == component]
            assert line.get_ydata().tolist() == expected


def test_what_is_missing_is_left_out(records):
    records[0]["overlap"] = dict.fromkeys(records[0]["overlap"])
    records[1]["columns"]["hessian"] = None
    del records[2]["rows"]
    columns, rows = (figures.salient_overlap(records).axes[place] for place in (2, 4))
    by_label = {line.get_label(): line.get_xdata().tolist() for line in (*columns.lines, *rows.lines)}
    assert by_label["columns hessian"] == [2, 3, 4, 5]
    assert by_label["columns magnitude"] == [1, 2, 3, 4, 5]
    assert by_label["rows magnitude"] == [1, 3, 4, 5]


def test_nothing_to_compare_says_so(records):
    lonely = [{"name": "a", "component": "vision", **compare({"magnitude": np.ones((2, 2), bool)})}]
    for nothing in ([], lonely):
        assert "No layer has salient weights by two metrics." in figures.svg(figures.salient_overlap(nothing))


def test_the_same_records_give_the_same_document(records):
    assert figures.svg(figures.salient_overlap(records)) == figures.svg(figures.salient_overlap(records))
