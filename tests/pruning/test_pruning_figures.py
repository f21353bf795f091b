"""What is drawn of a sweep, read back from the drawing."""

import pytest

from bivlm.reports.figures.pruning import accuracy_by_share, loss_maps
from bivlm.reports.figures.style import svg
from bivlm.reports.pruning_tables import ROW, as_table


def rows(**changes):
    return [
        dict.fromkeys(ROW)
        | {"model": model, "task": task, "place": place, "score": "attention", "layer": layer, "share": share}
        | {"n": 100, "accuracy": 90 - 10 * share, "low": 80.0, "high": 95.0}
        | {"loss": 10 * share, "loss_low": 10 * share - 5, "loss_high": 10 * share + 5}
        | changes
        for model in ("full", "packed")
        for task in ("t", "all")
        for place in ("vision", "language")
        for layer in (1, 2)
        for share in (0.25, 0.75)
    ]


def written(axes):
    return [text.get_text() for text in axes.texts]


def test_a_map_has_a_number_a_cell_and_a_star_where_zero_is_left_out():
    panels = loss_maps(as_table(rows())).axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "full, vision",
        "full, language",
        "packed, vision",
        "packed, language",
    ]
    assert written(panels[0]) == ["2.5", "7.5*", "2.5", "7.5*"]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["25 %", "75 %"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["1", "2"]


def test_a_cell_that_could_not_be_is_a_dash():
    table = as_table([row | ({"loss": None, "accuracy": None} if row["share"] == 0.75 else {}) for row in rows()])
    assert written(loss_maps(table).axes[0]) == ["2.5", "–", "2.5", "–"]


def test_lines_are_accuracies_of_a_layer_and_the_level_is_without_pruning():
    axes = accuracy_by_share(as_table(rows()), {"full": {"all": 91.0}, "packed": {"all": 85.0}}).axes[0]
    first, second, level = axes.lines
    assert list(first.get_xdata()) == [25.0, 75.0]
    assert list(first.get_ydata()) == [87.5, 82.5]
    assert (first.get_label(), second.get_label()) == ("from layer 1", "from layer 2")
    assert set(level.get_ydata()) == {91.0}


@pytest.mark.parametrize("draw", [loss_maps, lambda table: accuracy_by_share(table, {})])
def test_nothing_measured_is_said_in_a_sentence(draw):
    table = as_table(rows(loss=None, accuracy=None, refused="leaves none"))
    assert "No cell of the sweep could be measured." in svg(draw(table))


def test_the_same_sweep_gives_the_same_bytes():
    table = as_table(rows())
    assert svg(loss_maps(table)) == svg(loss_maps(table))
