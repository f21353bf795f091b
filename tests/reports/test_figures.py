"""The figures show the numbers of the records, leave out what is missing, and come out the same every time."""

import io
import threading
from statistics import median

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import ndtr

from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.reports import figures
from tests.reports.drawn import by_label, marks, texts

SHARES = ("0.01", "0.02", "0.05", "0.1")
LAYER_FIGURES = (figures.weight_histogram, figures.kl_per_layer, figures.error_by_p_max, figures.bits_and_error)
NAMES = {
    "vision": [f"model.vision_tower.layers.{block}.self_attn.{kind}" for block in range(3) for kind in ("qkv", "proj")],
    "adaptor": ["model.merger.mlp.0", "model.merger.mlp.2"],
    "language": [f"model.layers.{block}.mlp.{kind}" for block in range(4) for kind in ("up_proj", "down_proj")],
}


def layer(name, component, number):
    """A record whose every figure tells it apart from the others."""
    histogram = [0] * 130
    histogram[60:70] = [number + 1, 5, 20, 60, 100, 100, 60, 20, 5, 1]
    return {
        "name": name,
        "component": component,
        "shape": [2 + number, 4],
        "error": 0.1 + number / 1000,
        "kl_gaussian": 0.001 * (number + 1),
        "bits": {"nominal": 1.1, "entropy": 2.0, "stored": 2 + number / 100},
        "seconds": 0.5,
        "histogram": histogram,
        "error_by_p_max": {share: 0.2 - float(share) + number / 1000 for share in SHARES},
    }


@pytest.fixture
def layers():
    named = [(name, component) for component, names in NAMES.items() for name in names]
    return [layer(name, component, number) for number, (name, component) in enumerate(named)]


def point(label, bits, accuracy, **more):
    return {"label": label, "stored_bits": bits, "accuracy": accuracy, "kl": None, "this_run": False, **more}


def test_a_histogram_is_drawn_as_density_in_standard_deviations(layers):
    figure = figures.weight_histogram(layers)
    values, edges, _ = figure.axes[0].patches[0].get_data()
    counts = np.array(layers[2]["histogram"])  # of six vision layers with rising KL the lower middle one
    np.testing.assert_allclose(values * np.diff(edges), counts[1:-1] / counts.sum())
    assert (edges[0], edges[-1]) == (-8, 8)
    assert figure.axes[0].get_title("left") == "vision, layers.1.self_attn.qkv\nKL 0.003 nats, median of 6"


def test_the_histogram_lies_on_its_gaussian_where_the_weights_are_gaussian(layers):
    edges = np.arange(-64, 65) / 8
    layers[0]["histogram"] = (
        np.round(1e9 * np.diff(ndtr(np.concatenate([[-np.inf], edges, [np.inf]])))).astype(int).tolist()
    )
    axes = figures.weight_histogram(layers[:1]).axes[0]
    values, edges, _ = axes.patches[0].get_data()
    x, y = axes.lines[0].get_data()
    np.testing.assert_allclose(values, np.interp((edges[1:] + edges[:-1]) / 2, x, y), atol=5e-4)


def test_the_bins_are_those_of_the_statistics(layers):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) ** 3
    statistics = LayerStatistics.measure(weight, 0.0)
    standard = (weight.double().numpy().ravel() - statistics.mean) / statistics.std
    layers[0] |= {"histogram": statistics.histogram().tolist(), "kl_gaussian": statistics.kl_gaussian()}
    figure = figures.weight_histogram(layers[:1])
    values, edges, _ = figure.axes[0].patches[0].get_data()
    inside = (standard > -8) & (standard <= 8)
    expected, _ = np.histogram(-standard[inside], bins=-edges[::-1])  # mirrored: numpy closes its bins on the left
    np.testing.assert_allclose(values * np.diff(edges) * weight.numel(), expected[::-1])
    assert f"beyond ±8: {100 * (~inside).mean():.2g} %" in figure.axes[1].get_xlabel()


def test_the_kl_of_every_layer_is_drawn_at_its_place_in_its_component(layers):
    figure = figures.kl_per_layer(layers)
    for axes, component in zip(figure.axes, NAMES, strict=True):
        of_component = [record["kl_gaussian"] for record in layers if record["component"] == component]
        assert marks(axes) == list(enumerate(of_component))
        assert axes.get_title("left") == component


def test_layers_of_one_kind_look_alike_in_every_component(layers):
    figure = figures.kl_per_layer(layers)
    legend = {text.get_text(): handle.get_color() for text, handle in _entries(figure)}
    assert list(legend) == ["qkv", "proj", "up_proj", "down_proj", "others"]
    drawn = {line.get_color(): len(line.get_xdata()) for axes in figure.axes for line in axes.lines}
    counts = {"qkv": 3, "proj": 3, "others": 2, "up_proj": 4, "down_proj": 4}
    assert drawn == {legend[kind]: count for kind, count in counts.items()}


def test_blocks_are_ticked_where_they_begin_and_other_layers_by_name(layers):
    vision, adaptor, language = figures.kl_per_layer(layers).axes
    assert list(zip(vision.get_xticks(), _tick_texts(vision), strict=True)) == [(0, "0"), (2, "1"), (4, "2")]
    assert _tick_texts(adaptor) == ["mlp.0", "mlp.2"]
    assert _tick_texts(language) == ["0", "1", "2", "3"]


def test_ticks_stay_few_in_a_deep_model():
    deep = [layer(f"model.layers.{number // 7}.mlp.part{number % 7}", "language", number) for number in range(700)]
    (axes,) = figures.kl_per_layer(deep).axes
    assert 10 <= len(axes.get_xticks()) <= 24
    assert len(marks(axes)) == 700


def test_the_error_of_every_layer_is_drawn_for_every_p_max(layers):
    figure = figures.error_by_p_max(layers)
    for share in SHARES:
        drawn = [line.get_ydata() for axes in figure.axes for line in by_label(axes, f"p_max {share}")]
        assert np.concatenate(drawn).tolist() == [record["error_by_p_max"][share] for record in layers]
    middle = median(record["error_by_p_max"]["0.05"] for record in layers)
    legend = [text.get_text() for text, _ in _entries(figure)]
    assert [entry.partition(",")[0] for entry in legend] == ["p_max 1 %", "p_max 2 %", "p_max 5 %", "p_max 10 %"]
    assert legend[2] == f"p_max 5 %, median {middle:.3f}"


def test_bits_and_errors_of_every_layer_and_the_mean_over_weights(layers):
    figure = figures.bits_and_error(layers)
    columns = len(NAMES)
    for column, component in enumerate(NAMES):
        members = [record for record in layers if record["component"] == component]
        above, below = figure.axes[column], figure.axes[columns + column]
        assert by_label(above, "stored bits")[0].get_ydata().tolist() == [m["bits"]["stored"] for m in members]
        assert by_label(below, "error")[0].get_ydata().tolist() == [m["error"] for m in members]
        weights = [m["shape"][0] * m["shape"][1] for m in members]
        bits = sum(w * m["bits"]["stored"] for w, m in zip(weights, members, strict=True))
        assert by_label(above, "mean")[0].get_ydata()[0] == pytest.approx(bits / sum(weights))
    assert "largest error 0.115 in language layers.3.mlp.down_proj" in figure.get_suptitle()


def test_a_component_has_one_colour_in_every_figure(layers):
    bits, kl, histogram = (
        draw(layers) for draw in (figures.bits_and_error, figures.kl_per_layer, figures.weight_histogram)
    )
    for column, component in enumerate(NAMES):
        colour = figures.COMPONENT_COLOURS[component]
        assert by_label(bits.axes[column], "stored bits")[0].get_color() == colour
        assert matplotlib.colors.to_hex(kl.axes[column].spines["top"].get_edgecolor()) == colour
        assert matplotlib.colors.to_hex(histogram.axes[column].patches[0].get_facecolor()) == colour


@pytest.mark.parametrize("draw", LAYER_FIGURES)
def test_a_layer_without_the_figure_is_left_out_and_the_others_keep_their_place(draw, layers):
    for key in ("kl_gaussian", "histogram", "error", "error_by_p_max"):
        layers[1][key] = None
        del layers[4][key]
    layers[3] |= {"kl_gaussian": float("nan"), "error": float("inf"), "error_by_p_max": {"0.1": float("nan")}}
    figure = draw(layers)
    if draw is figures.weight_histogram:
        assert figure.axes[0].get_title("left").endswith("median of 3")
    else:
        assert {x for x, _ in marks(figure.axes[0])} == {0, 2, 5}


def test_a_missing_p_max_leaves_out_only_that_mark(layers):
    layers[0]["error_by_p_max"]["0.1"] = None
    vision = figures.error_by_p_max(layers).axes[0]
    assert by_label(vision, "p_max 0.1")[0].get_xdata().tolist() == [1, 2, 3, 4, 5]
    assert by_label(vision, "p_max 0.01")[0].get_xdata().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("bare", [[], [{"name": "a", "component": "vision", "shape": [1, 1], "bits": None}]])
@pytest.mark.parametrize("draw", LAYER_FIGURES)
def test_a_figure_of_nothing_says_why(draw, bare):
    assert any(text.startswith("No layer has ") for text in texts(draw(bare)))


def test_accuracies_are_drawn_at_their_bits_with_their_mean():
    points = [point("small", 2, {"a": 60, "b": 80}), point("full", 16, {"a": 90, "b": 100})]
    axes = figures.accuracy_against_bits(points).axes[0]
    drawn = {label: by_label(axes, label)[0].get_xydata().tolist() for label in ("a", "b", "mean of the 2")}
    assert drawn == {"a": [[2, 60], [16, 90]], "b": [[2, 80], [16, 100]], "mean of the 2": [[2, 70], [16, 95]]}


def test_the_line_passes_by_models_that_a_smaller_one_beats():
    points = [point(str(bits), bits, {"a": accuracy}) for bits, accuracy in ((4, 70), (2, 80), (8, 90), (1, 30))]
    (line,) = by_label(figures.accuracy_against_bits(points).axes[0], "no smaller model is better")
    assert line.get_xydata().tolist() == [[1, 30], [2, 80], [8, 90]]


def test_a_model_without_every_task_has_marks_but_no_mean():
    points = [point("part", 2, {"a": 60, "b": None}, this_run=True), point("full", 16, {"a": 90, "b": 100})]
    figure = figures.accuracy_against_bits(points)
    axes = figure.axes[0]
    assert by_label(axes, "a")[0].get_xydata().tolist() == [[2, 60], [16, 90]]
    assert by_label(axes, "mean of the 2")[0].get_xydata().tolist() == [[16, 95]]
    assert by_label(axes, "_this run") == []
    assert "part" in texts(figure)


def test_every_model_is_labelled_and_this_run_stands_out():
    points = [
        point("alpha $x^$", 2.1, {"a": 60}, kl=0.25, this_run=True),
        point("beta", 2.1, {"a": 61}),
        point("full", 16, {"a": 99}, kl=0.0),
    ]
    figure = figures.accuracy_against_bits(points)
    assert {"alpha $x^$, 60.0 %, KL 0.25", "beta, 61.0 %", "full, 99.0 %, KL 0"} <= set(texts(figure))
    bold = [text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"]
    assert bold == ["alpha $x^$, 60.0 %, KL 0.25"]
    assert by_label(figure.axes[0], "_this run")[0].get_xydata().tolist() == [[2.1, 60]]


def test_labels_of_neighbours_do_not_cover_each_other():
    points = [point(f"model {number}", 2 + number / 100, {"a": 60 + number}) for number in range(8)]
    anchors = [text.get_position()[0] for text in figures.accuracy_against_bits(points).axes[0].texts]
    assert min(np.diff(anchors)) >= 0.039


def test_chance_is_a_line_at_its_level_for_the_tasks_there_are():
    figure = figures.accuracy_against_bits([point("p", 2, {"a": 60, "b": 70})], {"a": 25, "b": 50, "other": 10})
    assert [line.get_ydata()[0] for line in by_label(figure.axes[0], "_chance")] == [25, 50]
    assert "a (chance 25)" in texts(figure)


@pytest.mark.parametrize("points", [[], [point("p", None, {"a": 1})], [point("p", 2, {})], [point("p", 2, None)]])
def test_no_model_to_draw_says_why(points):
    assert "No model has both stored bits and an accuracy." in texts(figures.accuracy_against_bits(points))


@pytest.mark.parametrize("draw", LAYER_FIGURES)
def test_the_same_records_give_the_same_document_however_often_they_are_rendered(draw, layers):
    figure = draw(layers)
    assert figures.svg(figure) == figures.svg(figure) == figures.svg(draw(layers))


def test_settings_of_the_process_neither_change_a_figure_nor_are_changed(layers):
    expected = figures.svg(figures.kl_per_layer(layers))
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.linewidth": 5}):
        before = dict(matplotlib.rcParams)
        assert figures.svg(figures.kl_per_layer(layers)) == expected
        assert dict(matplotlib.rcParams) == before


def test_figures_may_be_made_in_threads(layers):
    expected, made = figures.svg(figures.kl_per_layer(layers)), []
    threads = [
        threading.Thread(target=lambda: made.append(figures.svg(figures.kl_per_layer(layers)))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [expected] * 2


def test_a_png_is_wide_enough_for_a_page_and_the_same_every_time(layers):
    first, second = (figures.png(figures.kl_per_layer(layers)) for _ in range(2))
    assert first == second
    assert Image.open(io.BytesIO(first)).width == 1296


def test_an_svg_has_no_date_and_keeps_its_letters(layers):
    document = figures.svg(figures.kl_per_layer(layers))
    assert "dc:date" not in document
    assert ">KL, nats, log axis<" in document


def _entries(figure):
    legend = figure.legends[0]
    return zip(legend.get_texts(), legend.legend_handles, strict=True)


def _tick_texts(axes):
    return [label.get_text() for label in axes.get_xticklabels()]
