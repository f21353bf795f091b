"""The cells of a sweep, and the tables made of what came of them."""

import pytest
from pydantic import ValidationError

from bivlm.recipe.pruning import SweepSettings
from bivlm.reports.pruning_tables import ROW, as_table, grid


def test_every_combination_is_there_once():
    sweep = SweepSettings(
        places=["vision", "language", "joint"], layers=[1, 2, 3, 4], shares=[0.25, 0.5], scores=["attention"]
    )
    cells = sweep.cells()
    assert len(cells) == len(set(cells)) == 3 * 4 * 2
    assert {(cell.place, cell.layer, cell.share) for cell in cells} == {
        (place, layer, share)
        for place in ("vision", "language", "joint")
        for layer in (1, 2, 3, 4)
        for share in (0.25, 0.5)
    }


def test_scores_go_where_they_are_known_and_layers_where_there_are_any():
    sweep = SweepSettings(
        places=["input", "language"], layers={"language": [3]}, shares=[0.5], scores=["attention", "divprune", "random"]
    )
    assert [(cell.place, cell.layer, cell.score) for cell in sweep.cells()] == [
        ("input", None, "divprune"),
        ("input", None, "random"),
        ("language", 3, "attention"),
        ("language", 3, "random"),
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shares": [0.5, 1.0]}, "share: .*less than 1, found 1.0"),
        ({"layers": [0]}, "layer: .*expected a layer from 1 on.*found 0"),
        ({"layers": {"vision": [1]}}, "found none for joint, language"),
        ({"scores": ["divprune"]}, "at place 'vision' expected one of attention"),
        ({"places": ["vision"], "masses": [0.9]}, "expected the place 'language'"),
        ({"masses": [1.5]}, "mass: .*less than or equal to 1"),
        ({"places": []}, "at least 1 item"),
        ({"questions": 0}, "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused_beforehand(settings, said):
    with pytest.raises(ValidationError, match=said):
        SweepSettings(**settings)


def row(**given):
    return dict.fromkeys(ROW) | {"model": "m", "task": "t", "place": "language", "score": "attention"} | given


def test_a_table_has_a_row_a_layer_and_a_column_a_share():
    rows = [row(layer=layer, share=share, accuracy=100 * layer + share) for layer in (5, 2) for share in (0.863, 0.25)]
    found = grid(as_table(rows), "m", "t", "language", "attention")
    assert found.columns.tolist() == ["25 %", "86.3 %"]
    assert found.index.tolist() == [2, 5]
    assert found.to_numpy().tolist() == [[200.25, 200.863], [500.25, 500.863]]


def test_without_layers_there_is_one_row():
    rows = [row(place="input", score="random", share=share, accuracy=1.0) for share in (0.5, 0.9)]
    assert grid(as_table(rows), "m", "t", "input", "random").index.tolist() == ["-"]


def test_a_cell_that_could_not_be_has_its_reason_and_a_gap():
    table = as_table([row(layer=2, share=0.99, refused="leaves none"), row(layer=2, share=0.5, accuracy=3.0)])
    assert table["refused"].isna().tolist() == [True, False]
    assert table["accuracy"].isna().tolist() == [False, True]
    assert grid(table, "m", "t", "language", "attention").isna().to_numpy().tolist() == [[False, True]]


def test_names_stand_as_they_came_and_layers_in_order():
    rows = [row(model=model, layer=layer, share=0.5) for model in ("z", "a") for layer in (10, 2)]
    table = as_table(rows)
    assert table["model"].tolist() == ["z", "z", "a", "a"]
    assert table["layer"].tolist() == [2, 10, 2, 10]
