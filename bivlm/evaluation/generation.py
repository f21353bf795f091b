"""Load a model for evaluation, and answer batches of questions greedily."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
)

from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.remote_code import code_refused, remote_code_allowed
from bivlm.errors import InputError
from bivlm.numerics.logits import LogitsWatch
from bivlm.sources.chat_template import encode, render_prompt
from bivlm.sources.images import decode_image
from bivlm.sources.samples import VqaSample
from bivlm.untrusted import in_a_line

if TYPE_CHECKING:
    from bivlm.checkpoint.transformers_plugin import Dequantize
    from bivlm.packing import Activations

Progress = Callable[[int, int], None]

WINDOW = 4  # batches that are drawn together, so that questions of one length meet
SMALL_MODEL = 500_000_000  # parameters
BATCH_SMALL, BATCH_LARGE = 64, 8


def load_model(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    dequantize: Dequantize | None = None,
    activations: Activations = "float32",
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return the model and processor of a checkpoint folder, packed or not, ready to answer.

    `device` is the GPU if there is one, else the CPU. `dtype` is what the model computes in: by default the
    checkpoint's ("auto") on a GPU and float32 on a CPU, where bf16 is slower and less exact. The weights are the stored
    ones whatever it is, since float32 holds every bf16 and fp16 number; they then take four bytes each in memory.
    `dequantize` is how packed weights are used, "load", "forward" or "packed" (`bivlm.checkpoint.transformers_plugin`);
    by default as the checkpoint says; with "packed", `activations` may be "int8". Raises `InputError` when the folder
    holds no checkpoint, one that lacks weights or the processor, or, with `dequantize`, one that is not packed.

    >>> import bivlm
    >>> from bivlm.reference import CHECKPOINT, questions
    >>> model, processor = bivlm.load_model(CHECKPOINT, device="cpu")
    >>> sample = next(iter(questions("perception")))
    >>> bivlm.answer(model, processor, [(sample.image, sample.question)]), sample.answers
    (['yes'], ('yes',))
    """
    folder = Path(folder)
    packed = Checkpoint.open(folder).packed  # says which file is missing or damaged; transformers does not
    given: dict[str, Any] = {}
    if dequantize is not None or activations != "float32":
        from bivlm.checkpoint.transformers_plugin import BiVLMConfig

        if not packed:
            asked = f"dequantize {dequantize!r}" if dequantize else f"activations {activations!r}"
            raise InputError(f"model {folder}: {asked}: expected a packed checkpoint")
        given["quantization_config"] = BiVLMConfig(dequantize=dequantize or "load", activations=activations)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    processor = load_processor(folder)
    # A pair because of output_loading_info, which the return type of transformers leaves out.
    with warnings.catch_warnings():
        # That the checkpoint's own way is overridden is what was asked for.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=remote_code_allowed(folder), **given
        )
    model, loading = loaded
    if loading["missing_keys"]:  # transformers warns, and leaves random numbers in them
        missing = ", ".join(sorted(loading["missing_keys"]))
        raise InputError(f"model {folder}: expected a weight for every parameter, found none for {missing}")
    return model.to(device).eval(), processor


def load_processor(folder: str | Path) -> ProcessorMixin:
    """Return the processor of a checkpoint folder; raises `InputError` when there is none for images and text."""
    code = remote_code_allowed(folder)
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=code)
    # Configs that its classes cannot use fail somewhere in their code, in whatever way; nothing of ours runs here.
    except Exception as error:
        if not code and "trust_remote_code" in str(error):
            raise code_refused(folder, "its processor or tokenizer is code of its own (auto_map)") from error
        said = in_a_line(error)
        raise InputError(f"model {folder}: expected a processor beside the weights: {said}") from error
    if not isinstance(processor, ProcessorMixin):
        found = type(processor).__name__
        raise InputError(f"model {folder}: expected a processor for images and text, found {found}")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token  # padding is masked: any token will do
    return processor


def default_batch_size(model: PreTrainedModel) -> int:
    """Return how many questions make a batch when the caller does not say."""
    return BATCH_SMALL if model.num_parameters() < SMALL_MODEL else BATCH_LARGE


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Iterable[tuple[Image.Image | bytes, str]],
    max_new_tokens: int = 16,
) -> list[str]:
    """Return the greedy answers of a model from `load_model` to questions, each about an image, in their order.

    An image may be the bytes of a file. All go through the model at once. Raises `InputError` naming the question,
    counted from 0, when its image cannot be read or its text holds the image placeholder; ArithmeticError naming the
    model when it gives NaN or infinity.

    >>> import bivlm
    >>> from bivlm.reference import CHECKPOINT, questions
    >>> sample = next(iter(questions("perception")))
    >>> bivlm.answer(*bivlm.load_model(CHECKPOINT, device="cpu"), [(sample.image, sample.question)])
    ['yes']
    """
    samples = []
    for number, (image, text) in enumerate(questions):
        if isinstance(image, bytes):
            image = decode_image(image, f"question {number}, image")
        samples.append(VqaSample(str(number), str(number), image, text, answers=()))
    return answer_batch(model, processor, samples, max_new_tokens) if samples else []


@torch.inference_mode()
def answer_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[VqaSample],
    max_new_tokens: int,
    streamer: Any = None,
) -> list[str]:
    """Return the model's greedy answers, without special tokens and white space around.

    All samples have equally many images. A `streamer`, as `generate` takes it, is told of every token. Raises
    `InputError` naming the question when its text holds the image placeholder, ArithmeticError naming the model when it
    gives NaN or infinity.
    """
    inputs = encode(
        processor,
        model,
        [_prompt(processor, sample) for sample in samples],
        [sample.images or None for sample in samples],
    )
    watch = LogitsWatch()
    produced = model.generate(  # type: ignore[operator]  # not a method of PreTrainedModel, but of every model loaded
        **inputs,
        generation_config=greedy(model, processor, max_new_tokens),
        logits_processor=LogitsProcessorList([watch]),
        streamer=streamer,
    )
    watch.check(model)
    texts = processor.tokenizer.batch_decode(produced[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Iterable[VqaSample],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[list[tuple[int, VqaSample, str]]]:
    """Yield batches of (position in `samples`, sample, answer), as they are answered and in no order.

    At most `WINDOW` batches of images are held.
    """
    numbered = enumerate(samples)
    while window := list(islice(numbered, WINDOW * batch_size)):
        for batch in _batches(window, batch_size):
            said = answer_batch(model, processor, [sample for _, sample in batch], max_new_tokens)
            yield [(position, sample, text) for (position, sample), text in zip(batch, said, strict=True)]


def greedy(model: PreTrainedModel, processor: ProcessorMixin, max_new_tokens: int) -> GenerationConfig:
    """Return plain greedy decoding, whatever sampling and penalties the checkpoint recommends for chatting."""
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else processor.tokenizer.eos_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=processor.tokenizer.pad_token_id,
    )


def _batches(window: list[tuple[int, VqaSample]], batch_size: int) -> list[list[tuple[int, VqaSample]]]:
    """Return batches of samples of like images and question length: less padding, the same answers.

    No batch mixes numbers of images, which processors treat differently.
    """

    def images(numbered: tuple[int, VqaSample]) -> int:
        return len(numbered[1].images)

    def length(numbered: tuple[int, VqaSample]) -> tuple[int, int, int]:
        _, sample = numbered
        area = sum(image.width * image.height for image in sample.images)
        return images(numbered), area, len(sample.question)

    groups = (list(group) for _, group in groupby(sorted(window, key=length), key=images))
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def _prompt(processor: ProcessorMixin, sample: VqaSample) -> str:
    try:
        return render_prompt(processor, sample.question, image=len(sample.images))
    except InputError as error:
        raise InputError(f"question {sample.question_id}: {error}") from None
