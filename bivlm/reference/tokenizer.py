"""A byte-level BPE trained on the generator's own text, the image processor and the chat template."""

import random
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from bivlm.reference.catalogue import ATTRIBUTES, VALUES, creatures
from bivlm.reference.question_sets import DESCRIBE, LETTER, PHRASE, QUESTION_SETS, YES_NO, ask
from bivlm.reference.scenes import caption, draw_scene

VOCABULARY = 1024
IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
EOS_TOKEN = "</s>"
USER = "USER: "
ASSISTANT = " ASSISTANT:"

# Fixed phrases are one token each: they carry one bit between them, and sequences become half as long.
_PHRASES = (USER, ASSISTANT, YES_NO, LETTER, PHRASE)
# A line break with an option letter stays one piece ("\nA."), words keep the space before them.
_PIECES = Regex(r"\n[A-D]\.| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% else %}"
    " ASSISTANT: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}</s>"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def _corpus(scenes: int = 1500) -> Iterator[str]:
    """Questions, answers and captions of the train split, and every name and value of the catalogue."""
    for index in range(scenes):
        rng = random.Random(f"tokenizer/{index}")
        scene = draw_scene(rng, "train")
        yield f"{DESCRIBE} {caption(scene)}"
        for name in QUESTION_SETS:
            for question in ask(rng, scene, name):
                body = question.text.replace(YES_NO, "").replace(LETTER, "").replace(PHRASE, "")
                yield f"{body} {question.target}"
    for creature in creatures():
        yield " " + " ".join((creature.name, *(creature[attribute] for attribute in ATTRIBUTES)))
    for values in VALUES.values():
        yield " " + " ".join(values)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The trained tokenizer; every string can be encoded, and training it again gives the same tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(_PHRASES),
        special_tokens=[PAD_TOKEN, EOS_TOKEN, IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in _PHRASES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int) -> LlavaProcessor:
    """Image processor, tokenizer and chat template as one. The image processor needs no torchvision."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
