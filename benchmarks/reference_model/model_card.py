"""The README of the checkpoint, with the figures of its own report in it."""

from collections.abc import Mapping
from pathlib import Path

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
language: en
tags: [llava, siglip, qwen2, synthetic, quantization]
---

# The reference model of bivlm

A small trained vision-language model, made to be compressed: {parameters:,} parameters, a SigLIP tower
({vision_layers} layers, 64 image tokens), a two-layer projector and a Qwen2 decoder ({decoder_layers} layers), width
{hidden}, bf16, vocabulary {vocabulary}. It stands in for a large model where a test, a demo or a leaderboard must run
on any machine. It knows nothing of the real world.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("bivlm/reference/checkpoint")
model = AutoModelForImageTextToText.from_pretrained("bivlm/reference/checkpoint")
```

## Training data

Generated images of two to four numbered objects on a 4 x 4 grid, their captions, questions about them, and a
catalogue of {creatures:,} invented creatures with three facts each ({facts:,} facts), which it memorizes. Train,
calibration and test images are disjoint. The facts of the catalogue are the same everywhere, because they cannot be
inferred.

## Scores

Percent right on the 2,000 test questions of each set (VQA accuracy for *open*), greedy generation, float32. *Chance* is
the best constant answer, or a random letter for *choice*. The last column is plain 2-bit round-to-nearest
(asymmetric, groups of 128) of every linear layer but the head.

{scores}

By category:

{categories}

## Training

```
python -m benchmarks.reference_model.train --output DIR
python -m benchmarks.reference_model.report --checkpoint DIR --rtn --card
```

The first command takes two to three hours on two CPU cores (not timed on a GPU). After a kill, `--resume` continues it.

{training}

## Limits

It answers the question forms it was trained on, in English, about images drawn by `bivlm.reference.scenes`. Other
answers mean nothing.
"""


def _scores(record: Mapping) -> str:
    lines = ["| set | accuracy | chance | MME-style | 2-bit RTN |", "|---|---:|---:|---:|---:|"]
    rounded = record.get("rtn2_g128", {})
    for name, result in record["full"].items():
        mme = "" if result["mme"] is None else f"{result['mme']:.0f}"
        lost = f"{rounded[name]['accuracy']:.1f}" if name in rounded else ""
        lines.append(f"| {name} | {result['accuracy']:.1f} | {result['chance']:.1f} | {mme} | {lost} |")
    return "\n".join(lines)


def _categories(record: Mapping) -> str:
    return "\n".join(
        f"- *{name}*: " + ", ".join(f"{category} {value:.1f}" for category, value in result["categories"].items())
        for name, result in record["full"].items()
    )


def write_card(checkpoint: Path, record: Mapping, facts: Mapping) -> None:
    """Writes `README.md` from a report's record and the `facts` that the text names; returns nothing."""
    text = _CARD.format(scores=_scores(record), categories=_categories(record), **facts)
    (checkpoint / "README.md").write_text(text)
