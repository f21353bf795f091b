"""Packing changes nothing: a packed question gets the logits that it gets alone."""

import random

import pytest
import torch

from benchmarks.reference_model.architecture import IMAGE_SIZE, PATCH_SIZE, TINY
from benchmarks.reference_model.sequences import IGNORED, Packer, Segment
from benchmarks.reference_model.train import Trainee
from benchmarks.reference_model.training_data import known_place, pixels_of
from bivlm.reference.question_sets import ask
from bivlm.reference.scenes import draw_scene, render
from bivlm.reference.tokenizer import build_processor

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


def test_a_word_known_to_be_true_is_learned_where_it_is_foretold(tokenizer):
    text = "Is the star red?"
    packed = Packer(tokenizer, 192).pack([[Segment(text, "yes", known=text.index("?") - 1)]], image=True)
    place = int((packed.targets[0] != IGNORED).nonzero()[0])
    assert tokenizer.decode(packed.targets[0, place]) == " red"
    assert tokenizer.decode(packed.input_ids[0, place]) == " star"


@pytest.mark.parametrize("name", ["perception", "cognition", "choice", "open"])
def test_known_words_are_the_true_ones(name):
    rng = random.Random(3)
    for _ in range(100):
        for question in ask(rng, draw_scene(rng, "train"), name):
            place = known_place(question)
            if question.choices is not None:
                assert question.text[: place + 1].endswith(
                    f"\n{question.target}. {question.choices['ABCD'.index(question.target)]}"
                )
            elif question.target == "yes":
                assert question.text[place + 1] == "?"
            else:
                assert place is None


def test_the_middle_of_the_decoder_learns_the_truth_behind_a_yes_or_no(tokenizer):
    packed = Packer(tokenizer, 192).pack([[Segment("Is the star red?", "no", truth="blue")]], image=True)
    (place,) = (packed.middle[0] != IGNORED).nonzero()
    assert tokenizer.decode(packed.middle[0, place]) == " blue"
    assert tokenizer.decode(packed.targets[0, place]) == " no"
