"""Packing changes nothing: a packed question gets the logits that it gets alone."""

import random

import pytest
import torch

from bivlm.reference.architecture import IMAGE_SIZE, PATCH_SIZE, TINY
from bivlm.reference.scenes import draw_scene, render
from bivlm.reference.sequences import IGNORED, Packer, Segment
from bivlm.reference.tokenizer import build_processor
from bivlm.reference.train import Trainee
from bivlm.reference.training_data import pixels_of

SEGMENTS = [
    Segment("Is the star red?", "no"),
    Segment("What digit is on the blue cross?", "7"),
    Segment("Describe the image.", "row 1 column 2: small red star 3", weight=0.5),
]


@pytest.fixture(scope="module")
def trainee(tokenizer):
    torch.manual_seed(0)
    return Trainee(tokenizer, TINY).eval()


@pytest.fixture(scope="module")
def scene():
    return draw_scene(random.Random(4), "train")


def test_pixels_are_those_of_the_image_processor(tokenizer, scene):
    processor = build_processor(tokenizer, IMAGE_SIZE, PATCH_SIZE)
    inputs = processor(images=render(scene), text="<image>", return_tensors="pt")
    assert torch.allclose(inputs["pixel_values"], pixels_of([scene]), atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("index", range(len(SEGMENTS)))
def test_packed_logits_equal_those_of_the_chat_template_alone(tokenizer, trainee, scene, index):
    packed = Packer(tokenizer, 192).pack([SEGMENTS], image=True)
    _, image = trainee.see(pixels_of([scene]))
    logits = trainee.read(packed, image)
    together = logits[packed.segment_ids[packed.targets != IGNORED] == index + 1]

    processor = build_processor(tokenizer, IMAGE_SIZE, PATCH_SIZE)
    segment = SEGMENTS[index]
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": segment.user}]},
        {"role": "assistant", "content": [{"type": "text", "text": segment.assistant}]},
    ]
    inputs = processor(images=render(scene), text=processor.apply_chat_template(turns), return_tensors="pt")
    alone = trainee.model(**inputs).logits[0, -len(together) - 1 : -1]
    assert torch.allclose(together, alone, atol=1e-5)


def test_targets_are_the_reply_and_the_end_of_the_turn(tokenizer):
    packed = Packer(tokenizer, 192).pack([SEGMENTS[:1]], image=True)
    learned = packed.targets[packed.targets != IGNORED]
    assert tokenizer.decode(learned) == " no</s>"


def test_segments_that_do_not_fit_are_left_out_whole(tokenizer):
    packed = Packer(tokenizer, 100).pack([[SEGMENTS[0], Segment("Is it? " * 50, "no"), SEGMENTS[1]]], image=True)
    assert packed.segment_ids.max() == 2


def test_a_reply_carries_its_weight(tokenizer):
    packed = Packer(tokenizer, 192).pack([SEGMENTS], image=True)
    assert set(packed.weights[packed.segment_ids == 3].tolist()) == {0.0, 0.5}


def test_a_user_turn_is_learned_only_when_it_has_a_weight(tokenizer):
    quiet, loud = Segment("Is the star red?", "yes"), Segment("Is the star red?", "yes", user_weight=0.25)
    packed = Packer(tokenizer, 192).pack([[quiet], [loud]], image=True)
    reply = len(tokenizer(" yes</s>")["input_ids"])
    assert (packed.targets[0] != IGNORED).sum() == reply
    assert (packed.weights[1] == 0.25).sum() == len(tokenizer("Is the star red? ASSISTANT:")["input_ids"]) - 1
