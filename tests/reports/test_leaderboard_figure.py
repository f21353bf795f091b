"""The figure of a board shows every entry at its stored and its claimed bits, names the best, and invents nothing."""

import io
import itertools
import math

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bivlm.reports import figures
from bivlm.reports.figures.labels import Label, place_labels
from bivlm.reports.leaderboard.entries import Entry, FailedEntry, FullPrecision, shannon_bound
from bivlm.reports.leaderboard.ranking import board
from bivlm.reports.report_page import Drawn, inline_svg
from tests.reports.drawn import by_label, texts

METHODS = ("bivlm", "rtn", "gptq", "awq", "pb-llm", "billm", "arb-rc", "hbllm", "trellis", "q-vlm", "awq+bivlm", "new")
LOSS_PANELS = {"accuracy": 0, "kl": 1, "relative_error": 2}


def result(accuracy):
    low, high = max(accuracy - 3, 0), min(accuracy + 3, 100)
    return {"reference:choice": {"n": 250, "accuracy": accuracy, "ci95": [low, high]}}


def entry(number, **more):
    """An entry whose every figure tells it apart from the others."""
    stored = 1.1 + 0.09 * number
    figures_ = {
        "recipe": f"recipe-{number}",
        "method": METHODS[number % len(METHODS)],
        "finish": number % 3 == 0,
        "bits": {"nominal": 1 + 0.01 * number, "entropy": stored - 0.05, "stored": stored},
        "model_bits": 4.0,
        "relative_error": (1.2 + number % 5) * shannon_bound(stored),
        "kl": 2.0 / (1 + number) + 0.3 * (number % 4),
        "accuracy": result(50 + number + 3.0 * (number % 4)),
        "seconds": 1.0,
    }
    return Entry.read(figures_ | more)


def made(entries, chance=25.0):
    full = FullPrecision(bits=16, model_bits=16, accuracy=result(97.0))
    return board(entries, full, model={"id": "the $small$ model"}, chance={"reference:choice": chance})


@pytest.fixture
def found():
    return made([entry(number) for number in range(30)])


def value(record, loss):
    return record["mean_accuracy"]["accuracy"] if loss == "accuracy" else record[loss]


@pytest.mark.parametrize("loss", LOSS_PANELS)
def test_every_entry_stands_at_its_stored_bits_and_leads_to_its_claimed_ones(found, loss):
    axes = figures.quality_against_bits(found).axes[LOSS_PANELS[loss]]
    claims = [line.get_xydata()[0].tolist() for line in by_label(axes, "_claimed")]
    gaps = [line.get_xydata().tolist() for line in by_label(axes, "_gap")]
    for record in found["entries"]:
        (mark,) = by_label(axes, record["recipe"])
        y, bits = value(record, loss), record["bits"]
        assert mark.get_xydata().tolist() == [[bits["stored"], y]]
        assert [bits["nominal"], y] in claims
        assert [[bits["nominal"], y], [bits["stored"], y]] in gaps
    assert all(np.isfinite(line.get_xydata()).all() for line in axes.lines)


def test_intervals_are_those_of_the_board(found):
    axes = figures.quality_against_bits(found).axes[0]
    drawn = [line.get_ydata().tolist() for line in by_label(axes, "_interval")]
    assert drawn == [record["mean_accuracy"]["ci95"] for record in found["entries"]]


def test_full_precision_and_chance_are_levels_of_accuracy(found):
    axes = figures.quality_against_bits(found).axes[0]
    assert [line.get_ydata()[0] for line in by_label(axes, "_reference")] == [97, 25]
    assert {"full precision, 16 bits: 97.0 %", "chance: 25.0 %"} <= {text.get_text() for text in axes.texts}
    unknown = figures.quality_against_bits(made([entry(1)], chance=None)).axes[0]
    assert [line.get_ydata()[0] for line in by_label(unknown, "_reference")] == [97]


def test_shannons_bound_is_drawn_with_the_errors(found):
    (line,) = by_label(figures.quality_against_bits(found).axes[2], "_Shannon")
    np.testing.assert_allclose(line.get_ydata(), 4.0 ** -line.get_xdata())


@pytest.mark.parametrize("loss", LOSS_PANELS)
def test_the_front_is_joined_and_named_and_the_others_are_numbered(found, loss):
    axes = figures.quality_against_bits(found).axes[LOSS_PANELS[loss]]
    members = [record for record in found["entries"] if record["recipe"] in found["pareto"][loss]]
    (line,) = by_label(axes, "_front")
    assert line.get_xydata().tolist() == [[r["bits"]["stored"], value(r, loss)] for r in members]
    written = {text.get_text() for text in axes.texts}
    assert {f"{record['number']} {record['recipe']}" for record in members} <= written
    assert {str(r["number"]) for r in found["entries"] if r not in members} <= written


@pytest.mark.parametrize("loss", LOSS_PANELS)
def test_names_do_not_cover_each_other(found, loss):
    axes = figures.quality_against_bits(found).axes[LOSS_PANELS[loss]]
    boxes = [text.get_window_extent() for text in axes.texts]
    clashes = [(a, b) for a, b in itertools.combinations(boxes, 2) if a.padded(-1).overlaps(b.padded(-1))]
    assert clashes == []
    assert all(axes.bbox.padded(1).contains(*corner) for box in boxes for corner in box.get_points())


def test_a_family_has_one_colour_and_its_methods_different_marks(found):
    axes = figures.quality_against_bits(found).axes[0]
    looks = {}
    for record in found["entries"]:
        (mark,) = by_label(axes, record["recipe"])
        looks[record["method"]] = (mark.get_color(), mark.get_marker())
    assert len(set(looks.values())) == len(METHODS)
    families = (("rtn", "gptq", "awq", "q-vlm"), ("pb-llm", "billm", "arb-rc", "hbllm"))
    assert [len({looks[method][0] for method in family}) for family in families] == [1, 1]
    assert set(METHODS) <= set(texts(figures.quality_against_bits(found)))


def test_finished_ones_are_full(found):
    axes = figures.quality_against_bits(found).axes[0]
    for record in found["entries"]:
        (mark,) = by_label(axes, record["recipe"])
        assert mark.get_markerfacecolor() == (mark.get_color() if record["finish"] else figures.PAPER)


def test_a_kl_of_zero_has_no_place_on_a_log_axis():
    positive = figures.quality_against_bits(made([entry(1), entry(2)])).axes[1]
    zero = figures.quality_against_bits(made([entry(1), entry(2, kl=0.0)])).axes[1]
    assert (positive.get_yscale(), zero.get_yscale()) == ("log", "linear")
    assert zero.get_ylabel() == "KL to full precision, nats per token"


def test_one_entry_is_a_figure():
    figure = figures.quality_against_bits(made([entry(3)]))
    assert figure.get_suptitle() == "Leaderboard of the $small$ model: 1 recipe, 250 questions"
    assert all(math.isfinite(limit) for axes in figure.axes for limit in (*axes.get_xlim(), *axes.get_ylim()))


def test_a_board_of_failures_says_so():
    failed = made([FailedEntry(recipe="broken", method="gptq", failed="no Hessian")])
    assert "No recipe could be measured." in texts(figures.quality_against_bits(failed))


def test_the_same_board_gives_the_same_document(found):
    first = figures.quality_against_bits(found)
    assert figures.svg(first) == figures.svg(first) == figures.svg(figures.quality_against_bits(found))
    with matplotlib.rc_context({"font.size": 20, "axes.linewidth": 5}):
        assert figures.svg(figures.quality_against_bits(found)) == figures.svg(first)
    assert Image.open(io.BytesIO(figures.png(first))).width == 1296


def test_the_figure_can_stand_in_a_page(found):
    drawn = inline_svg(Drawn.of("board", figures.quality_against_bits(found)))
    assert figures.INK not in drawn
    assert "nan" not in drawn.lower()


def test_a_label_takes_the_nearest_free_place():
    axes = Figure(figsize=(4, 4)).subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    alone, crowded = (
        place_labels(axes, [Label(0.5, 0.5, "name", 8, {})], [(0.5, 0.5), *neighbours])[0]
        for neighbours in ([], [(0.5 + 0.02 * step, 0.5) for step in range(1, 6)])
    )
    assert alone.xyann[1] == pytest.approx(0)
    assert alone.xyann[0] > 0  # to the right
    assert abs(crowded.xyann[1]) > 5
