"""Model inputs are what the processor makes of the chat template, padded on the left."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from published_data import write_set
from tiny_llava import CHAT_TEMPLATE
from tokenizers.processors import TemplateProcessing

from bivlm.errors import InputError
from bivlm.evaluation.generation import load_model, load_processor
from bivlm.sources.chat_template import encode, render_dialogue, render_prompt
from flows.cli import main as cli

IMAGE = Image.new("RGB", (32, 32), "red")


@pytest.fixture(scope="module")
def loaded(tiny_llava):
    return load_model(tiny_llava, device="cpu", dtype="auto")


def test_a_prompt_ends_where_the_assistant_begins_and_a_dialogue_with_its_turn(loaded):
    assert render_prompt(loaded[1], "Is it?") == "USER: <image>\nIs it? ASSISTANT:"
    assert render_dialogue(loaded[1], "Is it?", "no") == "USER: <image>\nIs it? ASSISTANT: no</s>"


def test_texts_are_padded_on_the_left_and_masked(loaded):
    model, processor = loaded
    short, long = "USER: <image>\na", "USER: <image>\nabc"
    inputs = encode(processor, model, [short, long], [IMAGE, IMAGE])
    alone = encode(processor, model, [short], [IMAGE])
    padding = processor.tokenizer.pad_token_id
    assert inputs["input_ids"][0].tolist() == [padding] * 2 + alone["input_ids"][0].tolist()
    assert inputs["attention_mask"].tolist()[0][:3] == [0, 0, 1]
    assert inputs["attention_mask"][1].all()


def test_images_come_in_the_dtype_of_the_model_and_tokens_stay_integers(loaded):
    inputs = encode(loaded[1], loaded[0], ["<image>"], [IMAGE])
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
    tokens = encode(begun, model, [text], [IMAGE])["input_ids"][0].tolist()
    assert (tokens[0], tokens.count(begin)) == (begin, 1)


def test_several_images_stand_before_the_text(loaded):
    model, processor = loaded
    text = render_prompt(processor, "Are they?", image=2)
    assert text == "USER: <image>\n<image>\nAre they? ASSISTANT:"
    blue = Image.new("RGB", (32, 32), "blue")
    inputs = encode(processor, model, [text, text], [(IMAGE, blue), (blue, IMAGE)])
    assert inputs["pixel_values"].shape[0] == 4
    assert torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][3])
    assert not torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])


def test_text_alone_is_rendered_without_an_image(loaded):
    assert render_prompt(loaded[1], "Is it?", image=False) == "USER: Is it? ASSISTANT:"
    assert render_dialogue(loaded[1], "Is it?", "no", image=False) == "USER: Is it? ASSISTANT: no</s>"


def test_text_alone_has_no_pixels_and_the_model_reads_it(loaded):
    model, processor = loaded
    inputs = encode(processor, model, ["USER: Is it?"], [None])
    assert "pixel_values" not in inputs
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == "USER: Is it?"
    assert model(**inputs).logits.shape == (1, len("USER: Is it?"), 259)


def test_texts_with_and_without_an_image_do_not_mix(loaded):
    with pytest.raises(ValueError, match="expected one kind"):
        encode(loaded[1], loaded[0], ["USER: <image>\na", "USER: b"], [IMAGE, None])


@pytest.mark.parametrize("render", [render_prompt, lambda processor, user: render_dialogue(processor, user, "yes")])
def test_the_image_placeholder_in_a_text_is_refused(loaded, render):
    with pytest.raises(InputError, match=r"'Is <image> a cat\?' holds '<image>'"):
        render(loaded[1], "Is <image> a cat?")


def test_the_image_placeholder_in_a_reply_is_refused(loaded):
    with pytest.raises(InputError, match="'an <image>' holds '<image>'"):
        render_dialogue(loaded[1], "What is it?", "an <image>", image=False)


PLAIN = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' + message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def with_template(processor, template):
    changed = copy.copy(processor)
    changed.tokenizer = copy.copy(processor.tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize("template", [PLAIN, PLAIN.replace(" + message['content']", " ~ message['content']")])
def test_a_template_for_plain_strings_gets_the_placeholder_and_the_text(loaded, template):
    """One fails on a list of parts, the other prints it."""
    processor = with_template(loaded[1], template)
    assert render_prompt(processor, "Is it?") == "USER: <image>\nIs it? ASSISTANT:"
    assert render_prompt(processor, "Are they?", image=2) == "USER: <image>\n<image>\nAre they? ASSISTANT:"
    assert render_prompt(processor, "Is it?", image=False) == "USER: Is it? ASSISTANT:"
    assert render_dialogue(processor, "Is it?", "no") == "USER: <image>\nIs it? ASSISTANT: no "
    inputs = encode(processor, loaded[0], [render_prompt(processor, "Is it?")], [IMAGE])
    assert loaded[0](**inputs).logits.isfinite().all()


def test_a_template_that_leaves_out_a_reply_in_parts_gets_it_as_a_string(loaded):
    string = "{% if message['content'] is string %}{{ message['content'] }}{% elif message['role'] == 'user' %}"
    template = CHAT_TEMPLATE.replace("{% for part", f"{string}{{% for part").replace(
        "{% endfor %}{% if message", "{% endfor %}{% endif %}{% if message"
    )
    assert render_dialogue(with_template(loaded[1], template), "Is it?", "a long reply").count("a long reply") == 1
    silent = template.replace("{{ message['content'] }}", "")
    with pytest.raises(InputError, match="it leaves out the reply 'a long reply'"):
        render_dialogue(with_template(loaded[1], silent), "Is it?", "a long reply")


def test_a_template_may_leave_out_the_reasoning_before_a_reply(loaded):
    template = CHAT_TEMPLATE.replace("part['text']", "part['text'].split('</think>')[-1]")
    assert template != CHAT_TEMPLATE
    rendered = render_dialogue(with_template(loaded[1], template), "Is it?", "<think>hm</think>no")
    assert "hm" not in rendered and "no" in rendered


def test_a_template_may_take_the_reply_alone_as_a_string(loaded):
    template = CHAT_TEMPLATE.replace(
        "{% for part", "{% if message['role'] == 'assistant' %}{{ message['content'] }}{% else %}{% for part"
    ).replace("{% endfor %}{% if message", "{% endfor %}{% endif %}{% if message")
    assert render_dialogue(with_template(loaded[1], template), "Is it?", "no") == render_dialogue(
        loaded[1], "Is it?", "no"
    )


FAULTY = {
    "drops the image": ("{{ messages[0]['content'][-1]['text'] }}", "writes <image> 0 times, expected 1"),
    "drops all": ("USER:", "leaves out the text 'Is it?'"),
    "writes nothing": ("{{ '' }}", "leaves out the text 'Is it?'"),
    "two placeholders": (CHAT_TEMPLATE.replace("<image>", "<image><image>"), "writes <image> 2 times, expected 1"),
    "raises": ("{{ raise_exception('no images, please') }}", "fails with TemplateError: no images, please"),
    "undefined": ("{{ nothing.at.all }}", "fails with UndefinedError"),
    "syntax": ("{% for %}", "fails with TemplateSyntaxError"),
    "a long loop": ("{% for i in range(10**9) %}{% endfor %}", "fails with OverflowError: Range too big"),
    "a key error": ("{{ messages[7]['content'] }}", "fails with UndefinedError"),
    "division": ("{{ 1 / 0 }}", "fails with ZeroDivisionError"),
    "unsafe": ("{{ ''.__class__.__mro__ }}", "fails with SecurityError"),
    "endless": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails with RecursionError"),
    "a filter": ("{{ messages | shine }}", "fails with TemplateAssertionError"),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_a_template_that_cannot_be_used_is_named_with_what_it_made(loaded, tiny_llava, kind):
    template, message = FAULTY[kind]
    processor = with_template(loaded[1], template)
    place = tiny_llava / "chat_template.jinja"
    for render in (render_prompt, lambda processor, user: render_dialogue(processor, user, "no")):
        with pytest.raises(InputError, match=rf"^{place}: expected a chat template that writes .*{re.escape(message)}"):
            render(processor, "Is it?")


@pytest.mark.parametrize("template", [7, ["a"], {"tools": PLAIN}])
def test_what_is_no_template_is_refused(loaded, template):
    with pytest.raises(InputError, match=r"chat_template\.jinja: found .*, expected"):
        render_prompt(with_template(loaded[1], template), "Is it?")


def test_of_several_templates_the_default_is_used(loaded):
    processor = with_template(loaded[1], {"default": PLAIN, "tools": "no"})
    assert render_prompt(processor, "Is it?") == "USER: <image>\nIs it? ASSISTANT:"


def test_a_template_in_the_config_of_the_tokenizer_is_used_and_named(tiny_llava, tmp_path):
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    with pytest.raises(InputError, match=rf"^{folder}: LlavaProcessor has no chat template: expected .*tokenizer_conf"):
        render_prompt(load_processor(folder), "Is it?")
    file.write_text(json.dumps(config | {"chat_template": PLAIN}))
    assert render_prompt(load_processor(folder), "Is it?") == "USER: <image>\nIs it? ASSISTANT:"
    file.write_text(json.dumps(config | {"chat_template": "USER:"}))
    with pytest.raises(InputError, match=rf"^{file}, key 'chat_template': .*leaves out the text"):
        render_prompt(load_processor(folder), "Is it?")


@pytest.mark.parametrize("text", ["It's a {'type': 'text'}?", ' "quoted" \n twice ', "{{ 7 * 7 }}", "ünï\tcode"])
def test_any_text_is_written_as_it_is(loaded, text):
    for processor in (loaded[1], with_template(loaded[1], PLAIN)):
        assert f"<image>\n{text} ASSISTANT" in render_prompt(processor, text)
        assert render_prompt(processor, text, image=False) == f"USER: {text} ASSISTANT:"


def test_the_command_names_a_template_that_drops_the_image(tiny_llava, tmp_path, capsys):
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    (folder / "chat_template.jinja").write_text(FAULTY["drops the image"][0])
    task = f"mme:{write_set('mme', tmp_path / 'set')}"
    assert cli.main(["evaluate", "--model", str(folder), "--task", task]) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert f"{folder}/chat_template.jinja: expected a chat template" in said
    assert "Traceback" not in said
