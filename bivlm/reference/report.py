"""Scores of a checkpoint on the four sets: `python -m bivlm.reference.report [--checkpoint DIR] [--rtn]`.

The checkpoint is loaded with the Auto classes and answers by greedy generation, as any user would run it. With `--rtn`
the same is done once more after plain round-to-nearest to 2 bits, which says how sensitive the model is.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from bivlm.reference import CHECKPOINT, QUESTION_SETS, chance, questions
from bivlm.reference.catalogue import ATTRIBUTES, creatures
from bivlm.reference.model_card import write_card
from bivlm.reference.scoring import mme_score, score


@dataclass(frozen=True)
class Result:
    """Percent right on a set and what chance scores; the MME score where the set has one; percent per category."""

    accuracy: float
    chance: float
    mme: float | None
    categories: dict[str, float]


def load(checkpoint: Path, device: torch.device, dtype: torch.dtype = torch.float32):
    """The processor and the model in evaluation mode. float32 by default: bf16 products are slow on most CPUs."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    return processor, AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).to(device).eval()


@torch.inference_mode()
def answer(processor, model, samples) -> list[str]:
    """The model's greedy answers to a batch of samples."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}],
            add_generation_prompt=True,
        )
        for sample in samples
    ]
    inputs = processor(images=[sample.image for sample in samples], text=prompts, padding=True, return_tensors="pt")
    produced = model.generate(**inputs.to(model.device), max_new_tokens=8)
    return processor.batch_decode(produced[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(processor, model, name: str, *, limit: int | None = None, batch: int = 50, split: str = "test") -> Result:
    """Scores the model on a set."""
    rows = []
    asked = questions(name, split=split, limit=limit)
    while samples := list(islice(asked, batch)):
        for sample, said in zip(samples, answer(processor, model, samples), strict=True):
            rows.append((sample.category, sample.image_id, score(name, said, sample.answers)))
    categories = {
        category: 100 * sum(right) / len(right)
        for category in sorted({row[0] for row in rows})
        for right in [[row[2] for row in rows if row[0] == category]]
    }
    return Result(
        accuracy=100 * sum(row[2] for row in rows) / len(rows),
        chance=chance(name),
        mme=mme_score(rows) if name in ("perception", "cognition") else None,
        categories=categories,
    )


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


def table(title: str, results: dict[str, Result], before: dict[str, Result] | None = None) -> str:
    """A printed table, one line a set and its categories below."""
    lines = [title, f"{'set':<12}{'accuracy':>10}{'chance':>10}{'MME':>10}" + (f"{'lost':>10}" if before else "")]
    for name, result in results.items():
        mme = "" if result.mme is None else f"{result.mme:.1f}"
        lost = f"{before[name].accuracy - result.accuracy:>10.2f}" if before else ""
        lines.append(f"{name:<12}{result.accuracy:>10.2f}{result.chance:>10.2f}{mme:>10}{lost}")
        lines.append("    " + "  ".join(f"{category} {value:.1f}" for category, value in result.categories.items()))
    return "\n".join(lines)


def _card_facts(checkpoint: Path, model: nn.Module) -> dict:
    vision, text = model.config.vision_config, model.config.text_config
    log = checkpoint / "training.json"
    training = ""
    if log.exists():
        run = json.loads(log.read_text())
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
    parser = argparse.ArgumentParser(prog="python -m bivlm.reference.report", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--limit", type=int, help="questions a set instead of 2,000")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rtn", action="store_true", help="also score 2-bit round-to-nearest in groups of 128")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--card", action="store_true", help="write the checkpoint's README.md with these figures")
    options = parser.parse_args(arguments)
    processor, model = load(options.checkpoint, torch.device(options.device))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    full = {name: evaluate(processor, model, name, limit=options.limit) for name in QUESTION_SETS}
    print(table("as trained", full), flush=True)
    record = {"full": {name: asdict(result) for name, result in full.items()}}
    if options.rtn:
        count = quantize_plainly(model)
        rounded = {name: evaluate(processor, model, name, limit=options.limit) for name in QUESTION_SETS}
        print(table(f"2-bit round-to-nearest, groups of 128, {count:,} weights", rounded, full), flush=True)
        record["rtn2_g128"] = {name: asdict(result) for name, result in rounded.items()}
    if options.card:
        write_card(options.checkpoint, record, _card_facts(options.checkpoint, model))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
