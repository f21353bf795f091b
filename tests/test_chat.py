"""Model inputs are what the processor makes of the chat template, padded on the left."""

import copy

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from bivlm.chat import encode, render_dialogue, render_prompt
from bivlm.errors import InputError
from bivlm.evaluation import load_model

PICTURE = Image.new("RGB", (32, 32), "red")


@pytest.fixture(scope="module")
def loaded(tiny_llava):
    return load_model(tiny_llava, device="cpu", dtype="auto")


def test_a_prompt_ends_where_the_assistant_begins_and_a_dialogue_with_its_turn(loaded):
    assert render_prompt(loaded[1], "Is it?") == "USER: <image>\nIs it? ASSISTANT:"
    assert render_dialogue(loaded[1], "Is it?", "no") == "USER: <image>\nIs it? ASSISTANT: no</s>"


def test_texts_are_padded_on_the_left_and_masked(loaded):
    model, processor = loaded
    short, long = "USER: <image>\na", "USER: <image>\nabc"
    inputs = encode(processor, model, [short, long], [PICTURE, PICTURE])
    alone = encode(processor, model, [short], [PICTURE])
    padding = processor.tokenizer.pad_token_id
    assert inputs["input_ids"][0].tolist() == [padding] * 2 + alone["input_ids"][0].tolist()
    assert inputs["attention_mask"].tolist()[0][:3] == [0, 0, 1]
    assert inputs["attention_mask"][1].all()


def test_pictures_come_in_the_dtype_of_the_model_and_tokens_stay_integers(loaded):
    inputs = encode(loaded[1], loaded[0], ["<image>"], [PICTURE])
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("written_by_the_template", [True, False])
def test_there_is_one_beginning_of_the_sequence_whoever_writes_it(loaded, written_by_the_template):
    model, processor = loaded
    begun = copy.copy(processor)
    begun.tokenizer = copy.deepcopy(processor.tokenizer)
    begun.tokenizer.bos_token = "<pad>"  # any special token will do
    begin = begun.tokenizer.bos_token_id
    begun.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", begin)]
    )
    text = ("<pad>" if written_by_the_template else "") + "USER: <image>"
    tokens = encode(begun, model, [text], [PICTURE])["input_ids"][0].tolist()
    assert (tokens[0], tokens.count(begin)) == (begin, 1)


def test_several_pictures_stand_before_the_text(loaded):
    model, processor = loaded
    text = render_prompt(processor, "Are they?", image=2)
    assert text == "USER: <image>\n<image>\nAre they? ASSISTANT:"
    blue = Image.new("RGB", (32, 32), "blue")
    inputs = encode(processor, model, [text, text], [(PICTURE, blue), (blue, PICTURE)])
    assert inputs["pixel_values"].shape[0] == 4
    assert torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][3])
    assert not torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])


def test_text_alone_is_rendered_without_a_picture(loaded):
    assert render_prompt(loaded[1], "Is it?", image=False) == "USER: Is it? ASSISTANT:"
    assert render_dialogue(loaded[1], "Is it?", "no", image=False) == "USER: Is it? ASSISTANT: no</s>"


def test_text_alone_has_no_pixels_and_the_model_reads_it(loaded):
    model, processor = loaded
    inputs = encode(processor, model, ["USER: Is it?"], [None])
    assert "pixel_values" not in inputs
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == "USER: Is it?"
    assert model(**inputs).logits.shape == (1, len("USER: Is it?"), 259)


def test_texts_with_and_without_a_picture_do_not_mix(loaded):
    with pytest.raises(ValueError, match="expected one kind"):
        encode(loaded[1], loaded[0], ["USER: <image>\na", "USER: b"], [PICTURE, None])


@pytest.mark.parametrize("render", [render_prompt, lambda processor, user: render_dialogue(processor, user, "yes")])
def test_the_image_placeholder_in_a_text_is_refused(loaded, render):
    with pytest.raises(InputError, match=r"'Is <image> a cat\?' holds '<image>'"):
        render(loaded[1], "Is <image> a cat?")


def test_the_image_placeholder_in_a_reply_is_refused(loaded):
    with pytest.raises(InputError, match="'an <image>' holds '<image>'"):
        render_dialogue(loaded[1], "What is it?", "an <image>", image=False)
