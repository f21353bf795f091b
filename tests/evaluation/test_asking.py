"""One question to a checkpoint in a process of its own."""

import json
import re

import pytest

import bivlm
from bivlm.errors import InputError
from bivlm.evaluation.asking import ask
from bivlm.reference import CHECKPOINT, questions
from flows import cli
from flows.cli.main import main

QUESTION = "What colour is the largest shape? Answer the question using a single word or phrase."


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "a.png"
    next(iter(questions("open"))).image.save(path)
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    recipe = folder / "r.yaml"
    recipe.write_text("name: r\nformat: 1\ncomponents: {language: {method: rtn, bits: 4, group_size: 64}}\n")
    bivlm.compress_model(CHECKPOINT, recipe, folder / "out")
    return folder / "out"


def expected(folder, image):
    return bivlm.answer(*bivlm.load_model(folder, device="cpu"), [(image.read_bytes(), QUESTION)], 8)


def test_the_answer_is_the_models_and_what_it_took_is_measured(image, packed):
    found = ask(packed, image, QUESTION, max_new_tokens=8)
    assert [found.answer] == expected(packed, image)
    assert (found.dequantize, found.device, found.dtype) == ("packed", "cpu", "float32")
    assert 1 <= found.tokens <= 8 and found.loading > 0 and found.first > 0
    assert found.memory >= found.before > 1e8
    if found.tokens > 1:
        assert found.tokens_a_second == pytest.approx((found.tokens - 1) / found.rest)
    one = ask(CHECKPOINT, image, QUESTION, max_new_tokens=1)
    assert (one.tokens, one.rest, one.tokens_a_second, one.dequantize) == (1, 0.0, None, None)


def test_the_command_shows_both_answers(image, packed, capsys):
    told = ["ask", str(packed), str(image), QUESTION, "--against", str(CHECKPOINT), "--max-new-tokens", "8"]
    assert main(told) == 0
    said = capsys.readouterr().out
    for folder in (packed, CHECKPOINT):
        assert folder.name in said and expected(folder, image)[0] in said
    assert re.search(r"tokens a second +[\d.-]+ +[\d.-]+", said)
    assert main([*told, "--activations", "int8"]) == 0
    assert re.search(r"activations +int8 +float32", capsys.readouterr().out)
    assert main([*told[:4], "--dequantize", "load", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out).values()
    assert record["dequantize"] == "load" and record["answer"] == expected(packed, image)[0]


def test_bad_input_is_named_before_a_model_is_loaded(image, packed, tmp_path, capsys):
    (tmp_path / "no.png").write_text("text")
    for bad, message in (("no.png", "no.png"), ("none.png", "none.png")):
        with pytest.raises(InputError, match=message):
            ask(packed, tmp_path / bad, QUESTION)
    with pytest.raises(InputError, match="max new tokens: found 0, expected 1 or more"):
        ask(packed, image, QUESTION, max_new_tokens=0)
    assert main(["ask", str(tmp_path), str(image), QUESTION]) == cli.commands.BAD_INPUT
    with pytest.raises(InputError, match="activations 'int8': expected a packed checkpoint"):
        bivlm.load_model(CHECKPOINT, activations="int8")
    with pytest.raises(InputError, match="dequantize 'packed': expected a packed checkpoint"):
        bivlm.load_model(CHECKPOINT, dequantize="packed")
