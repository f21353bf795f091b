"""A checkpoint, packed or not, as a model of lmms-eval; needs the extra ``bivlm[lmms-eval]``.

lmms-eval finds it by its entry point::

    python -m lmms_eval --model bivlm --model_args pretrained=OUT --tasks mme,scienceqa_img --batch_size 8

It renders, encodes and answers with the functions that `bivlm.evaluation` uses, so that only prompts and scores are
lmms-eval's. Nothing in bivlm imports this module.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from bivlm.errors import InputError
from bivlm.evaluation.generation import answers, default_batch_size, load_model
from bivlm.sources.samples import VqaSample

MAX_NEW_TOKENS = 256  # of tasks that do not say


class BivlmModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Greedy answers to prompts with any number of images, which stand before the text."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_new_tokens: int | str = MAX_NEW_TOKENS,
    ) -> None:
        """Load the checkpoint in the folder `pretrained`; a `batch_size` of None or "auto" is bivlm's own choice.

        `max_new_tokens` is for tasks without a limit of their own. Raises `InputError` as `load_model`.
        """
        super().__init__()
        self._model, self._processor = load_model(pretrained, device)
        if batch_size is None or batch_size == "auto":
            batch_size = max_batch_size or default_batch_size(self._model)
        self._batch_size = int(batch_size)
        self._max_new_tokens = int(max_new_tokens)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return the answer to every request, cut before the task's stop words.

        A blank line is no stop word: lmms-eval adds it to every task, and its own models ignore it, too. Raises
        `InputError` when a task requests sampling, beams or anything but images.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_length[self._length(request)].append(number)
        said: dict[int, str] = {}
        for length, numbers in by_length.items():
            samples = self._samples([requests[number] for number in numbers])
            batches = answers(self._model, self._processor, samples, max_new_tokens=length, batch_size=self._batch_size)
            for batch in batches:
                for position, _, text in batch:
                    number = numbers[position]
                    said[number] = _cut(text, requests[number].args[1].get("until"))
        return [said[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raise `InputError`: only tasks that generate are answered."""
        raise InputError("lmms-eval model bivlm: found a loglikelihood task, expected one of type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raise `InputError`, as `loglikelihood`."""
        raise InputError("lmms-eval model bivlm: found a task of several rounds, expected one of type generate_until")

    def _samples(self, requests: Sequence[Instance]) -> Iterator[VqaSample]:
        """Yield the samples; images are decoded as they are needed."""
        for request in requests:
            text, _, images_of, number, task, split = request.args
            name = f"{task}, {split} {number}"
            images = images_of(self.task_dict[task][split][number]) or []
            for image in images:
                if not isinstance(image, Image.Image):
                    raise InputError(f"{name}: found {type(image).__name__}, expected images alone")
            first, *others = images or [None]
            yield VqaSample(name, name, first, text, answers=(), further_images=tuple(others))

    def _length(self, request: Instance) -> int:
        asked: dict[str, Any] = request.args[1]
        if asked.get("do_sample") or (asked.get("temperature") or 0) > 0 or (asked.get("num_beams") or 1) > 1:
            raise InputError(f"{request.args[4]}: found {asked}, expected greedy decoding")
        return int(asked.get("max_new_tokens", self._max_new_tokens))


def manifest() -> ModelManifest:
    """Return what lmms-eval expects from the entry point."""
    return ModelManifest(model_id="bivlm", simple_class_path=f"{__name__}.{BivlmModel.__name__}")


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        if stop.strip():
            text = text.split(stop)[0]
    return text.strip()
