"""A byte-level BPE trained on the generator's own words, the image processor and the chat template."""

from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from bivlm.reference.catalogue import VALUES, creatures
from bivlm.reference.question_sets import LETTER, PHRASE, YES_NO

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


# The words that questions and captions are made of; a new question needs no new tokenizer, only more tokens.
_WORDS = """
 is are was does do a an the there in on of to at as than with what which where who how many much number
 image picture colour shape digit row column object objects live eat work look recall catalogue describe hint
 greater smaller even odd left right above below small large yes no unanswerable same letter option
 circle square triangle diamond star cross red green blue yellow purple orange cyan black
"""
_OPENINGS = "Is Are Does Do What Which Where Who How Describe Hint"
_SYMBOLS = "? ; : , . ' A B C D 0 1 2 3 4 5 6 7 8 9"


def _corpus() -> Iterator[str]:
    """Yield every word often enough to become one token, then the catalogue's names, of which only the syllables do."""
    values = " ".join(value for values in VALUES.values() for value in values)
    for _ in range(500):
        yield " " + " ".join(_WORDS.split()) + " " + values
        yield from _OPENINGS.split()
        yield from (f" {symbol}" for symbol in _SYMBOLS.split())
        yield from (f"\n{letter}." for letter in "ABCD")
    for creature in creatures():
        yield f" {creature.name}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the trained tokenizer. Every string can be encoded, and training it again gives the same tokens."""
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
    """Return image processor, tokenizer and chat template as one. The image processor needs no torchvision."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
