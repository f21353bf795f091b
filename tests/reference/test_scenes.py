"""Scenes are what they say they are, and splits never meet."""

import random

import numpy as np
import pytest

from bivlm.reference.scenes import CELL, COLOURS, SIDE, SPLITS, Thing, draw_scene, paint, render, split_of
from bivlm.reference.scenes import Scene as SceneType


def test_the_same_random_source_draws_the_same_scene_and_image():
    first, second = (draw_scene(random.Random(7), "train") for _ in range(2))
    assert first == second
    assert np.array_equal(paint(first), paint(second))


@pytest.mark.parametrize("split", SPLITS)
def test_every_scene_belongs_to_the_split_that_drew_it(split):
    rng = random.Random(1)
    assert {split_of(draw_scene(rng, split)) for _ in range(50)} == {split}


def test_a_scene_changes_its_image_seed_but_not_its_split():
    scene = draw_scene(random.Random(3), "test")
    assert split_of(SceneType(scene.things, scene.seed + 1)) == "test"


def test_scenes_hold_two_to_four_objects_in_distinct_cells_with_distinct_names():
    rng = random.Random(2)
    for _ in range(200):
        things = draw_scene(rng, "train").things
        assert 2 <= len(things) <= 4
        assert len({(t.row, t.column) for t in things}) == len({t.name for t in things}) == len(things)


def test_unknown_splits_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'validation'.*train, calibration, test"):
        draw_scene(random.Random(0), "validation")


@pytest.mark.parametrize("colour", COLOURS)
def test_an_object_is_painted_in_its_cell_and_in_its_colour(colour):
    image = paint(SceneType((Thing("square", colour, "large", 1, 2, 3),), seed=5)).astype(int)
    cell = image[CELL : 2 * CELL, 2 * CELL : 3 * CELL]
    near = (np.abs(cell - np.array(COLOURS[colour])).max(-1) <= 8).mean()
    assert near > 0.25
    elsewhere = np.ones((SIDE, SIDE), dtype=bool)
    elsewhere[CELL : 2 * CELL, 2 * CELL : 3 * CELL] = False
    assert image[elsewhere].std() < 10


def test_images_are_rgb_and_as_large_as_the_model_expects():
    image = render(draw_scene(random.Random(0), "train"))
    assert (image.mode, image.size) == ("RGB", (128, 128))
