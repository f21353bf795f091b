"""Measure how far a compressed model's predictions are from full precision: KL divergence on held-out samples.

Both models read the same sample (teacher forcing), rendered by the chat template with the reply. At every
position that predicts a token of the reply, the end of the turn included,

    KL(full || model) = sum over the vocabulary of p (log p - log q)   in nats,

with p the full-precision model's probabilities and q the other's. Full precision runs once: its log-probabilities go
to a file, and any number of models are compared with it.

**Storage error.** Log-probabilities are stored in float16, whose relative rounding error is at most 2^-11, and p is
normalised again on reading. An entry is then off by at most 2^-11 |log p|, so that the KL of a model with itself, half
the p-weighted mean of the squared errors, stays below 2^-23 E[(log p)^2]: about 1e-5 nats where p is flat over 32,000
tokens, and less than 1e-6 where it is peaked.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, ProcessorMixin

from bivlm.errors import InputError, describe
from bivlm.numerics.logits import not_finite, unusable
from bivlm.sources.replies import Reply, read_reply
from bivlm.sources.samples import CalibrationSample
from bivlm.untrusted import parse_json

FORMAT = "bivlm-log-probabilities-1"
LONG_REPLY = 8  # tokens


def reply_logits(model: PreTrainedModel, reply: Reply) -> torch.Tensor:
    """Return the logits (T, vocabulary) at the `reply.count` positions that predict its tokens."""
    length = reply.inputs["input_ids"].shape[1]
    kept = length - reply.start + 1  # from the token before the reply on
    logits = model(**reply.inputs, use_cache=False, logits_to_keep=kept).logits[0]
    return logits[logits.shape[0] - kept :][: reply.count]


@torch.inference_mode()
def reply_log_probabilities(model: PreTrainedModel, reply: Reply) -> torch.Tensor:
    """Return the log-probabilities (T, vocabulary), float64, of `reply_logits`.

    Raises ArithmeticError naming the model for NaN and infinity.
    """
    predicting = reply_logits(model, reply).double()
    if unusable(predicting):
        raise not_finite(model, "logits on a sample")
    return torch.log_softmax(predicting, dim=-1)


def reference_logits(
    model: PreTrainedModel, processor: ProcessorMixin, samples: Sequence[CalibrationSample], file: str | Path
) -> Path:
    """Write the full-precision model's log-probabilities for later comparisons, one entry per sample.

    A safetensors file with float16 entries ``00000``, ``00001``, ... of shape (T, vocabulary); one is held at a time.
    The same model gives the same bytes. Raises `InputError` as `read_reply`, and when there is no sample.
    """
    file = Path(file)
    if not samples:
        raise InputError("reference log-probabilities: found no sample, expected one or more")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    body = file.with_name(f".{file.name}.{os.getpid()}.body")
    try:
        entries, digests, end = {}, [], 0
        with body.open("wb") as stream:
            for index, sample in enumerate(samples):
                reply = read_reply(model, processor, sample)
                stored = reply_log_probabilities(model, reply).half().cpu()
                begin, end = end, end + stream.write(stored.numpy().tobytes())
                entries[_entry(index)] = {"dtype": "F16", "shape": list(stored.shape), "data_offsets": [begin, end]}
                digests.append(reply.tokens_sha256)
        metadata = {"format": FORMAT, "tokens_sha256": json.dumps(digests)}
        header = json.dumps({"__metadata__": metadata, **entries}).encode()
        header += b" " * (-len(header) % 8)
        with partial.open("wb") as target, body.open("rb") as source:
            target.write(len(header).to_bytes(8, "little") + header)
            while chunk := source.read(1 << 24):
                target.write(chunk)
        return partial.replace(file)
    finally:
        body.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Divergence:
    """KL(full precision || model) in nats, means over judged positions.

    Attributes:
        kl: over all positions.
        short, long: over those of replies below `LONG_REPLY` tokens and of the others; None where there are none. Of
            captions beside one-word answers most positions are the captions', and hide what the answers lose.
    """

    kl: float
    short: float | None
    long: float | None


def kl_divergence(
    model: PreTrainedModel, processor: ProcessorMixin, samples: Sequence[CalibrationSample], file: str | Path
) -> Divergence:
    """Return the divergence of a model from full precision, summed in float64.

    `file` is from `reference_logits` with the same samples. Raises `InputError` if it is not, or if the model reads
    other tokens than the full-precision one did; ArithmeticError naming the model if it gives NaN, or probability 0 to
    what full precision may say, so that the divergence is infinite.
    """
    short: list[float] = []
    long: list[float] = []
    with StoredLogProbabilities(file, len(samples)) as stored:
        for index, sample in enumerate(samples):
            reply = read_reply(model, processor, sample)
            full = stored.of(index, reply).to(model.device)
            found = kl_by_token(full, reply_log_probabilities(model, reply)).tolist()
            (short if reply.count < LONG_REPLY else long).extend(found)
    mean = _mean(short + long)
    if mean is None or not math.isfinite(mean):
        raise ArithmeticError(
            f"model {model.name_or_path}: gives probability 0 to tokens that full precision may say; KL is infinite"
        )
    return Divergence(mean, _mean(short), _mean(long))


def _mean(divergences: list[float]) -> float | None:
    return math.fsum(divergences) / len(divergences) if divergences else None


class StoredLogProbabilities:
    """A file that `reference_logits` wrote, to be closed at the end of a ``with`` block."""

    def __init__(self, file: str | Path, samples: int) -> None:
        """Raise `InputError` for another kind of file, or one with another number of samples."""
        self._file, self._stored = Path(file), _open(Path(file))
        self._digests = parse_json(self._stored.metadata().get("tokens_sha256", ""), file)
        if not isinstance(self._digests, list) or len(self._digests) != samples:
            raise InputError(f"{file}: holds {len(self._digests)} samples, expected the {samples} to compare")

    def of(self, index: int, reply: Reply) -> torch.Tensor:
        """Return log-probabilities (T, vocabulary), float64, normalised again, of a sample that was read as `reply`.

        Raises `InputError` if full precision read other tokens.
        """
        if reply.tokens_sha256 != self._digests[index]:
            raise InputError(f"{self._file}, sample {index}: the model reads other tokens than full precision did")
        return torch.log_softmax(self._stored.get_tensor(_entry(index)).double(), dim=-1)

    def __enter__(self) -> StoredLogProbabilities:
        self._stored.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stored.__exit__(*error)


def kl_by_token(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return KL(full || other) per row of log-probabilities, where 0 log 0 = 0; infinite where only `other` is 0."""
    probability = full.exp()
    return torch.where(probability > 0, probability * (full - other), 0.0).sum(-1)


def _entry(index: int) -> str:
    return f"{index:05d}"


def _open(file: Path) -> safe_open:
    try:
        stored = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: expected log-probabilities written by reference_logits: {describe(error)}") from None
    found = (stored.metadata() or {}).get("format")
    if found != FORMAT:
        raise InputError(f"{file}: expected the format {FORMAT!r} of log-probabilities, found {found!r}")
    return stored
