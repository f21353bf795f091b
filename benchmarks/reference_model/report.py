"""Scores of a checkpoint on the four sets: `python -m benchmarks.reference_model.report [--checkpoint DIR] [--rtn]`.

The checkpoint is loaded and asked as `bivlm evaluate` does. With `--rtn` the same is done once more after plain
round-to-nearest to 2 bits, which says how sensitive the model is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.reference_model.model_card import write_card
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.generation import load_model
from bivlm.evaluation.outcomes import Evaluation, evaluate
from bivlm.evaluation.reference_sets import chance
from bivlm.reference import CHECKPOINT
from bivlm.reference.catalogue import ATTRIBUTES, creatures
from bivlm.reference.question_sets import QUESTION_SETS
from bivlm.untrusted import read_object


def evaluate_sets(model, processor, limit: int | None = None) -> dict[str, Evaluation]:
    """The model on each of the four sets, all questions or the first `limit`."""
    return {name: evaluate(model, processor, load_benchmark(f"reference:{name}", limit)) for name in QUESTION_SETS}


def summary(results: dict[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Per set, in percent: accuracy, chance, accuracy by category; and the MME score where the set has one."""
    return {
        name: {
            "accuracy": result.metrics["accuracy"],
            "chance": chance(name),
            "mme": result.metrics.get("mme_score"),
            "categories": {
                key.removesuffix("/acc"): value for key, value in result.metrics.items() if key.endswith("/acc")
            },
        }
        for name, result in results.items()
    }


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """The weight (M, N) rebuilt from asymmetric min-max round-to-nearest, in groups of `group` along N."""
    rows, columns = weight.shape
    if columns % group:
        raise ValueError(f"{columns} input features are no multiple of the group size {group}")
    grouped = weight.float().view(rows, columns // group, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return ((grouped - low).div(step).round() * step + low).view(rows, columns).to(weight.dtype)


def quantize_plainly(model: nn.Module, bits: int = 2, group: int = 128) -> int:
    """Rounds every linear layer but the head in place; returns how many weights that were."""
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            module.weight.data = round_to_nearest(module.weight.data, bits, group)
            count += module.weight.numel()
    return count


def table(title: str, figures: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]] | None = None) -> str:
    """A printed table of `summary`, one line a set and its categories below."""
    lines = [title, f"{'set':<12}{'accuracy':>10}{'chance':>10}{'MME':>10}" + (f"{'lost':>10}" if before else "")]
    for name, of_set in figures.items():
        mme = "" if of_set["mme"] is None else f"{of_set['mme']:.1f}"
        lost = f"{before[name]['accuracy'] - of_set['accuracy']:>10.2f}" if before else ""
        lines.append(f"{name:<12}{of_set['accuracy']:>10.2f}{of_set['chance']:>10.2f}{mme:>10}{lost}")
        lines.append("    " + "  ".join(f"{category} {value:.1f}" for category, value in of_set["categories"].items()))
    return "\n".join(lines)


def _card_facts(checkpoint: Path, model: nn.Module) -> dict:
    vision, text = model.config.vision_config, model.config.text_config
    log = checkpoint / "training.json"
    training = ""
    if log.exists():
        run = read_object(log)
        hours = f"{run['steps']:,} joint steps in {run['hours']:.1f} hours on {run['device']}"
        training = f"These weights: {hours}. {run.get('note', '')}".strip()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vision_layers": vision.num_hidden_layers,
        "decoder_layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "vocabulary": text.vocab_size,
        "creatures": len(creatures()),
        "facts": len(creatures()) * len(ATTRIBUTES),
        "training": training,
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reference_model.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--limit", type=int, help="questions a set instead of 2,000")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rtn", action="store_true", help="also score 2-bit round-to-nearest in groups of 128")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--card", action="store_true", help="write the checkpoint's README.md with these figures")
    options = parser.parse_args(arguments)
    model, processor = load_model(options.checkpoint, options.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    record = {"full": summary(evaluate_sets(model, processor, options.limit))}
    print(table("as trained", record["full"]), flush=True)
    if options.rtn:
        count = quantize_plainly(model)
        record["rtn2_g128"] = summary(evaluate_sets(model, processor, options.limit))
        title = f"2-bit round-to-nearest, groups of 128, {count:,} weights"
        print(table(title, record["rtn2_g128"], record["full"]), flush=True)
    if options.card:
        write_card(options.checkpoint, record, _card_facts(options.checkpoint, model))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
