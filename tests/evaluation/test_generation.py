"""Answers are the model's own, whatever the batch, the padding and the checkpoint's taste in sampling."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from changed_files import change_tensors
from PIL import Image
from raw_codec import top_bytes

from bivlm.errors import InputError
from bivlm.evaluation.generation import answer_batch, answers, load_model
from bivlm.sources.samples import VqaSample


def _samples(count: int) -> list[VqaSample]:
    """Questions whose lengths are in no order, each about an image of its own."""
    pixels = np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
    return [
        VqaSample(
            question_id=str(index),
            image_id=str(index),
            image=Image.fromarray(pixels[index]),
            question="Why" + " so" * (7 * index % 11) + "?",
            answers=("",),
        )
        for index in range(count)
    ]


@torch.inference_mode()
def _token_by_token(model, processor, sample, steps):
    """Greedy decoding without cache, padding or `generate`."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(images=sample.image, text=text, return_tensors="pt")
    tokens = inputs["input_ids"]
    for _ in range(steps):
        best = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits[0, -1].argmax()
        if best == model.generation_config.eos_token_id:
            break
        tokens = torch.cat([tokens, best.view(1, 1)], dim=1)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_batch_gives_the_answers_of_plain_decoding_one_by_one(loaded):
    samples = _samples(6)
    expected = [_token_by_token(*loaded, sample, steps=6) for sample in samples]
    assert answer_batch(*loaded, samples, max_new_tokens=6) == expected
    assert len(set(expected)) > 1


@pytest.fixture(scope="module")
def one_by_one(loaded):
    """Fourteen samples and their answers."""
    samples = _samples(14)
    return samples, [answer_batch(*loaded, [sample], 4)[0] for sample in samples]


def test_questions_about_several_images_and_none_are_answered_as_one_by_one(loaded, one_by_one):
    plain = one_by_one[0]
    mixed = [
        replace(plain[0], further_images=(plain[1].image,)),
        plain[2],
        replace(plain[3], image=None),
        replace(plain[1], further_images=(plain[0].image,)),
        replace(plain[4], image=None),
    ]
    expected = [answer_batch(*loaded, [sample], 4)[0] for sample in mixed]
    batches = list(answers(*loaded, mixed, max_new_tokens=4, batch_size=8))
    assert sorted(len(batch) for batch in batches) == [1, 2, 2]
    assert {position: text for batch in batches for position, _, text in batch} == dict(enumerate(expected))


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_every_position_gets_the_answer_to_its_own_question(loaded, one_by_one, batch_size):
    samples, expected = one_by_one
    batches = list(answers(*loaded, samples, max_new_tokens=4, batch_size=batch_size))
    answered = {position: (sample, text) for batch in batches for position, sample, text in batch}
    assert [answered[position] for position in range(14)] == list(zip(samples, expected, strict=True))
    assert max(map(len, batches)) == min(batch_size, 14)


def test_questions_of_like_length_share_a_batch(loaded, one_by_one):
    batches = answers(*loaded, one_by_one[0], max_new_tokens=1, batch_size=4)
    lengths = [len(sample.question) for batch in batches for _, sample, _ in batch]
    assert lengths == sorted(lengths)


def test_questions_are_drawn_as_they_are_needed(loaded):
    drawn = []
    source = (drawn.append(sample) or sample for sample in _samples(20))
    next(answers(*loaded, source, max_new_tokens=1, batch_size=2))
    assert len(drawn) == 8  # four batches


def test_an_answer_ends_where_the_model_ends_it(loaded):
    model, processor = loaded
    sample = _samples(1)[0]
    tokens = []
    original = processor.tokenizer.batch_decode
    endless = copy.copy(model.generation_config)
    try:
        processor.tokenizer.batch_decode = lambda ids, **kw: tokens.append(ids[0].tolist()) or original(ids, **kw)
        answer_batch(model, processor, [sample], 6)
        model.generation_config.eos_token_id = tokens[0][2]
        answer_batch(model, processor, [sample], 6)
    finally:
        model.generation_config = endless
        del processor.tokenizer.batch_decode
    first = tokens[0].index(tokens[0][2])
    assert len(tokens[0]) == 6
    assert tokens[1] == tokens[0][: first + 1]


def test_what_the_checkpoint_recommends_for_chatting_does_not_matter(loaded):
    model, processor = loaded
    samples = _samples(4)
    expected = answer_batch(model, processor, samples, 6)
    own = model.generation_config
    try:
        model.generation_config = copy.copy(own)
        model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=1, top_k=3)
        assert answer_batch(model, processor, samples, 6) == expected
    finally:
        model.generation_config = own


def test_a_question_with_the_image_placeholder_is_refused_by_name(loaded):
    sample = VqaSample("q7", "i", Image.new("RGB", (32, 32)), "What is <image>?", ("x",))
    with pytest.raises(InputError, match=r"question q7: .*'<image>'.*without it"):
        answer_batch(*loaded, [sample], 2)


def test_a_checkpoint_without_chat_template_is_refused(loaded):
    model, processor = loaded
    silent = copy.copy(processor)
    silent.tokenizer = copy.copy(processor.tokenizer)
    silent.chat_template = silent.tokenizer.chat_template = None
    with pytest.raises(InputError, match="LlavaProcessor has no chat template"):
        answer_batch(model, silent, _samples(1), 2)


def test_a_cpu_computes_in_float32_unless_told_otherwise(tiny_llava):
    assert load_model(tiny_llava, device="cpu")[0].dtype == torch.float32
    assert load_model(tiny_llava, device="cpu", dtype="auto")[0].dtype == torch.bfloat16


def test_a_packed_checkpoint_answers_as_its_rebuilt_weights(loaded, packed_llava):
    rebuilt = copy.deepcopy(loaded[0])
    for name in json.loads((packed_llava / "config.json").read_text())["quantization_config"]["packed"]:
        layer = rebuilt.get_submodule(name)
        layer.weight.data = top_bytes(layer.weight.data.bfloat16()).float()
    packed = load_model(packed_llava, device="cpu", dtype="float32")
    samples = _samples(5)
    assert answer_batch(*packed, samples, 6) == answer_batch(rebuilt, loaded[1], samples, 6)


def test_a_checkpoint_that_lacks_a_weight_is_refused_instead_of_answering_at_random(tiny_llava, tmp_path):
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    change_tensors(folder, lambda tensors: tensors.pop("language_model.model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"found none for model\.language_model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer.json"])
def test_a_checkpoint_without_its_processor_is_refused(tiny_llava, tmp_path, file):
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "llava"))
    (folder / file).unlink()
    with pytest.raises(InputError, match=rf"model {folder}: expected a processor beside the weights"):
        load_model(folder)


def test_a_folder_without_a_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path}/config.json: the file is missing"):
        load_model(tmp_path)
