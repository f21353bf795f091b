"""Peak memory of calibration block by block, above what the process held before and the hidden states it must hold.

``python -m benchmarks.calibration_memory [--hidden 2048] [--intermediate 5504] [--samples 16]`` on a random bfloat16
LLaVA with images of 576 tokens; takes some ten minutes. The bound is twice the largest block's bytes and those of its
site statistics.

**What counts.** A unit's weights, the statistics of its sites, one sample's activations, and whatever else there is
from the files that are read to those that are written. **Hidden states** that are subtracted: the unit's outputs for
all samples; in the gradient pass the gradients of one unit's outputs for all samples, which turn into those of the unit
before it. What a unit reads of others' outputs is not subtracted: it is read one sample at a time. With squares the
gradient pass holds a float32 number for every weight of a unit; these are its statistics there, it makes no others.

One sample's activations grow with the hidden size, blocks and statistics with its square: the smaller the model, the
nearer it comes to the bound. Tens of megabytes are not in use but kept by the C library for what is next; with the
environment variable ``MALLOC_MMAP_THRESHOLD_=131072`` they are given back.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig
from transformers.utils.logging import disable_progress_bar

from bivlm.calibration.blocks.encoded import SampleTensors, stack, with_reply, write_samples
from bivlm.calibration.blocks.gradients import token_gradients
from bivlm.calibration.blocks.model import BlockwiseModel
from bivlm.calibration.blocks.run import UnitRun, run_unit
from bivlm.calibration.blocks.sites import by_modality, names_of
from bivlm.checkpoint.reading import Checkpoint
from bivlm.sources.replies import Reply
from bivlm.workspace.memory import peak_bytes, reset_peak

BOUND = 2
IMAGE_SIZE, PATCH_SIZE = 336, 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
VOCABULARY = 32_000
PROMPT, REPLY = 24, 16  # tokens of text before and after the image's, those of the answer among the latter
MODEL, SAMPLES, TINY = "model", "samples.safetensors", "tiny"


@dataclass(frozen=True)
class Measured:
    """Bytes of one unit: the peak above the baseline and the hidden states, weights, statistics, hidden states."""

    unit: str
    peak: int
    weights: int
    statistics: int
    hidden: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row a unit of the walk and of the gradient passes; returns 1 if one is above the bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration_memory", description=_first_line())
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5504)
    parser.add_argument("--blocks", type=int, default=2, help="of vision and language each")
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _alone(_make, place / TINY, 64, 96, 1, 2, 512)
        units = _alone(_make, place, options.hidden, options.intermediate, options.blocks, options.samples, VOCABULARY)
        print(
            f"hidden {options.hidden}, intermediate {options.intermediate}, {options.samples} samples of "
            f"{IMAGE_TOKENS + PROMPT + REPLY} tokens, {torch.get_num_threads()} threads; MB"
        )
        walk = [_alone(_walk, place, unit) for unit in units]
        without, with_squares = (_alone(_gradients, place, units[:-1], squares) for squares in (False, True))
    worst = 0.0
    # A unit's gradients without squares: the block whose memory is the yardstick is that of the walk.
    sites = {each.unit: each.statistics for each in walk}
    without = [Measured(e.unit, e.peak, e.weights, sites.get(e.unit, 0), e.hidden) for e in without]
    for title, measured in (("walk", walk), ("gradients", without), ("gradients with squares", with_squares)):
        largest = max(each.weights + each.statistics for each in measured)
        ratio = max(each.peak for each in measured) / largest
        worst = max(worst, ratio)
        print(f"{title}: {ratio:.2f} times the largest block and its statistics; bound {BOUND}")
        for each in measured:
            print(
                f"  {each.unit:<40} peak {each.peak / 1e6:6.1f}  weights {each.weights / 1e6:6.1f}  "
                f"statistics {each.statistics / 1e6:6.1f}  hidden states {each.hidden / 1e6:6.1f}  "
                f"{each.peak / largest:.2f}"
            )
    return int(worst >= BOUND)


def _alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own: memory that earlier work freed may stay with it and hide what this one needs."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _make(place: Path, hidden: int, intermediate: int, blocks: int, samples: int, vocabulary: int) -> list[str]:
    """Write model and samples; returns the names of the units."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks}
    heads = {"num_attention_heads": hidden // 64}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            **sizes, **heads, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, vision_use_head=False
        ),
        text_config=LlamaConfig(**sizes, **heads, vocab_size=vocabulary, num_key_value_heads=hidden // 64),
        image_token_index=vocabulary - 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=IMAGE_TOKENS,
    )
    torch.set_default_dtype(torch.bfloat16)
    disable_progress_bar()
    LlavaForConditionalGeneration(config).save_pretrained(place / MODEL)
    write_samples((with_reply(_sample(vocabulary - 1)) for _ in range(samples)), place / SAMPLES)
    return [unit.name for unit in BlockwiseModel(Checkpoint.open(place / MODEL)).units]


def _sample(image_token: int) -> Reply:
    image = torch.full((IMAGE_TOKENS,), image_token)
    before, after = (torch.randint(image_token, (count,)) for count in (PROMPT // 2, PROMPT - PROMPT // 2 + REPLY))
    tokens = torch.cat([before, image, after])[None]
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE),
    }
    return Reply(inputs, tokens.shape[1] - REPLY, REPLY)


def _walk(place: Path, name: str) -> Measured:
    """One unit on all samples with its statistics, to the files."""
    _warm_up(place / TINY)
    model, samples = _opened(place)
    weights = _weight_bytes(model, name)
    before = _baseline()
    run = _run(place, model, samples, name)
    peak = peak_bytes() - before
    statistics = sum(
        tensor.nbytes
        for site in run.sites.values()
        for tensor in (site.second_moment_NN, site.mean_N, site.magnitude_N)
    )
    hidden = sum(output.nbytes for output in run.outputs if output is not None)
    return Measured(name, peak - hidden, weights, statistics, hidden)


def _run(place: Path, model: BlockwiseModel, samples: SampleTensors, name: str) -> UnitRun:
    """What is measured of the walk: one unit from files to files."""
    unit = model.unit(name)
    given = {each.name: SampleTensors(place / f"{each.name}.outputs") for each in model.predecessors(unit)}
    run = run_unit(model, unit, samples, given, weigh=lambda _: by_modality(0.1))
    write_samples(stack(run.outputs), place / f"{name}.outputs")
    for site, file in names_of(list(run.sites)).items():
        run.sites[site].save(place / file)
    return run


def _gradients(place: Path, names: list[str], squares: bool) -> list[Measured]:
    """All units, from the last to the first; the first row has the answer's own gradient, and the head, in it."""
    _warm_up(place / TINY)
    model, samples = _opened(place)
    weights = {name: _weight_bytes(model, name) for name in names}
    measured = []
    before = _baseline()
    outputs = {name: SampleTensors(place / f"{name}.outputs") for name in names}
    for found in token_gradients(model, samples, outputs, squares=squares):
        write_samples(found.norms, place / "norms")
        if found.squares:
            save_file(found.squares, place / "squares")
        hidden = _bytes_of(place / f"{found.unit}.outputs")
        statistics = sum(square.nbytes for square in found.squares.values())
        measured.append(Measured(found.unit, peak_bytes() - before - hidden, weights[found.unit], statistics, hidden))
        del found
        reset_peak()
    return measured


def _opened(place: Path) -> tuple[BlockwiseModel, SampleTensors]:
    return BlockwiseModel(Checkpoint.open(place / MODEL)), SampleTensors(place / SAMPLES)


def _warm_up(place: Path) -> None:
    """All of it on a tiny model, so that libraries take what they keep: threads, kernels, the autograd engine."""
    model, samples = _opened(place)
    for unit in model.units:
        _run(place, model, samples, unit.name)
    outputs = {unit.name: SampleTensors(place / f"{unit.name}.outputs") for unit in model.units[:-1]}
    for found in token_gradients(model, samples, outputs, squares=True):
        write_samples(found.norms, place / "norms")


def _baseline() -> int:
    """Bytes that the process holds now; its peak counts from here."""
    gc.collect()
    if not reset_peak():
        print("this system cannot reset a process's peak memory; the figures count from its start")
    return peak_bytes()  # by the same counter: another may be off by megabytes


def _weight_bytes(model: BlockwiseModel, name: str) -> int:
    """Bytes of the weights that belong to a unit."""
    return sum(parameter.nbytes for parameter in model.linear(name).parameters())


def _bytes_of(file: Path) -> int:
    """Bytes of the tensors of all samples."""
    samples = SampleTensors(file)
    return sum(tensor.nbytes for number in range(len(samples)) for tensor in _tensors(samples[number]))


def _tensors(sample: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return list(sample.values())


def _first_line() -> str:
    return __doc__.partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
