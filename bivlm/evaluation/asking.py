"""Ask a checkpoint one question about an image, and measure what that takes."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bivlm.errors import InputError
from bivlm.sources.images import open_image

if TYPE_CHECKING:
    from bivlm.checkpoint.transformers_plugin import Dequantize
    from bivlm.packing import Activations


@dataclass(frozen=True)
class Asked:
    """An answer, and what it took.

    Attributes:
        answer: without special tokens.
        tokens: of the answer.
        loading, first, rest: seconds of loading the model, from there to the first token, and to the last.
        memory: bytes that the process held at most; `before` those before it loaded the model, both of the GPU where
            there is one.
        threads: of the CPU.
        dequantize: how packed weights were used, None if there are none.
        activations: of packed weights.
        dtype, device: of the computation.
    """

    answer: str
    tokens: int
    loading: float
    first: float
    rest: float
    memory: int
    before: int
    threads: int
    dequantize: Dequantize | None
    activations: Activations
    dtype: str
    device: str

    @property
    def tokens_a_second(self) -> float | None:
        """Tokens a second after the first; None if there is only one."""
        return (self.tokens - 1) / self.rest if self.tokens > 1 else None


def ask(
    folder: Path,
    image: Path,
    question: str,
    *,
    dequantize: Dequantize | None = None,
    activations: Activations = "float32",
    max_new_tokens: int = 64,
) -> Asked:
    """Return what a checkpoint, packed or not, answers, in a process of its own, so that its memory is the model's.

    `dequantize` as in `bivlm.checkpoint.transformers_plugin`; by default packed weights are multiplied as they are on a
    CPU, and rebuilt on a GPU. `activations` are those of packed weights, as there. Raises `InputError` for what is no
    checkpoint or no image, ArithmeticError naming the model if it gives NaN.
    """
    if max_new_tokens < 1:
        raise InputError(f"max new tokens: found {max_new_tokens}, expected 1 or more")
    open_image(image)  # before a model is loaded
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(_ask, folder, image, question, dequantize, activations, max_new_tokens).result()


def _ask(
    folder: Path,
    image: Path,
    question: str,
    dequantize: Dequantize | None,
    activations: Activations,
    max_new_tokens: int,
) -> Asked:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from bivlm.checkpoint.reading import Checkpoint
    from bivlm.evaluation.generation import answer_batch, load_model
    from bivlm.sources.samples import VqaSample

    disable_progress_bar()
    gpu = torch.cuda.is_available()
    if not Checkpoint.open(folder).packed:
        dequantize, activations = None, "float32"
    elif dequantize is None:
        dequantize = "load" if gpu else "packed"
    before, started = _memory(gpu), time.perf_counter()
    model, processor = load_model(folder, dequantize=dequantize, activations=activations)
    loading = time.perf_counter() - started
    sample = VqaSample("0", "0", open_image(image), question, answers=())
    clock = _Clock()
    started = time.perf_counter()
    (text,) = answer_batch(model, processor, [sample], max_new_tokens, streamer=clock)
    return Asked(
        answer=text,
        tokens=len(clock.times),
        loading=loading,
        first=clock.times[0] - started,
        rest=clock.times[-1] - clock.times[0],
        memory=_memory(gpu),
        before=before,
        threads=torch.get_num_threads(),
        dequantize=dequantize,
        activations=activations,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
    )


class _Clock:
    """A streamer of `generate`: it is told of the prompt, then of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, tokens: Any) -> None:
        """Note the time of a token; the first call is the prompt's."""
        if not self._prompt:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        """Do nothing: the last token had its time."""


def _memory(gpu: bool) -> int:
    """Return the most bytes that this process has held so far, on the GPU if that is meant."""
    if gpu:
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
