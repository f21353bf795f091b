"""Every string has tokens, answers are one token, and the built tokenizer is the shipped one."""

import pytest
from transformers import AutoTokenizer

from bivlm.reference import CHECKPOINT
from bivlm.reference.catalogue import VALUES
from bivlm.reference.scenes import COLOURS, SHAPES


@pytest.mark.parametrize("text", ["Is the ž star 42% of Größe?", " yes", "\nA. plums\nB. 7", "<b>\t{}</b>"])
def test_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_answer_word_is_one_token(tokenizer):
    catalogue = [value for values in VALUES.values() for value in values]
    words = ["yes", "no", "unanswerable", *"ABCD", *COLOURS, *SHAPES, *map(str, range(10)), *catalogue]
    assert {word: len(tokenizer(f" {word}")["input_ids"]) for word in words} == dict.fromkeys(words, 1)


def test_the_vocabulary_is_a_multiple_of_sixty_four(tokenizer):
    assert len(tokenizer) == 1024


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="no checkpoint in this tree")
def test_training_again_would_use_the_shipped_tokens(tokenizer):
    assert AutoTokenizer.from_pretrained(CHECKPOINT).get_vocab() == tokenizer.get_vocab()
