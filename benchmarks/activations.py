"""What int8 activations cost in accuracy: ``python -m benchmarks.activations [--recipes NAME ...] [--questions 250]``.

The reference model is compressed by recipes that need weights alone, and each packed checkpoint is used in three ways:
its weights rebuilt, multiplied straight from the bytes in float32, and so with int8 activations. Printed are the
divergence from full precision on held-out samples, in nats per token (of all replies, and of short ones), that from the
rebuilt weights' answers, and the accuracy.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from bivlm import compress_model, load_model, load_recipe
from bivlm.calibration.frozen import freeze_samples, load_held_out
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.divergence import kl_divergence, reference_logits
from bivlm.evaluation.outcomes import evaluate
from bivlm.reference import CHECKPOINT
from bivlm.sources.samples import CalibrationSample

RECIPES = ("bivlm", "bivlm-1bit", "rtn-w2g128")
SETS = [f"reference:{name}" for name in ("perception", "cognition", "choice", "open")]
WAYS = {
    "rebuilt": {"dequantize": "load"},
    "float32": {"dequantize": "packed"},
    "int8": {"dequantize": "packed", "activations": "int8"},
}


def rows(recipe: str, samples: Sequence[CalibrationSample], questions: int, folder: Path) -> Iterator[str]:
    """Yield a line of figures for each way of using what a recipe makes."""
    packed = folder / recipe
    compress_model(CHECKPOINT, recipe, packed)
    for name, way in WAYS.items():
        model, processor = load_model(packed, "cpu", **way)  # type: ignore[arg-type]
        full = kl_divergence(model, processor, samples, folder / "full")
        if name == "rebuilt":
            reference_logits(model, processor, samples, folder / recipe / "rebuilt")
        rebuilt = kl_divergence(model, processor, samples, folder / recipe / "rebuilt")
        sets = [evaluate(model, processor, load_benchmark(each, questions)) for each in SETS]
        accuracy = sum(each.metrics["accuracy"] for each in sets) / len(sets)
        yield f"{recipe:<14}{name:<10}{full.kl:10.5f}{full.short or 0:10.5f}{rebuilt.kl:14.2e}{accuracy:10.1f}"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--questions", type=int, default=250, help="of each of four sets (250)")
    given = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        freeze_samples(load_recipe("trellis-2bit").calibration, folder / "samples")
        samples = load_held_out(folder / "samples")
        reference_logits(*load_model(CHECKPOINT, "cpu"), samples, folder / "full")
        print(f"{'recipe':<14}{'products':<10}{'KL':>10}{'short':>10}{'of rebuilt':>14}{'accuracy':>10}")
        for recipe in given.recipes:
            for row in rows(recipe, samples, given.questions, folder):
                print(row, flush=True)


if __name__ == "__main__":
    main()
