"""What dropping image tokens saves: time to read a prompt, and bytes of the key and value cache.

``python -m benchmarks.pruning [--layers 24] [--hidden 512] [--side 64]``: a random Qwen2.5-VL of that shape reads a
image of side x side patches, a quarter as many image tokens, and a short question; tokens are dropped from layer 2 of
the language model on. At 90 % the language model's part of it is to be at least 3 times as fast, and the cache 80 %
smaller. Runs with and without pruning take turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen2_5_VLConfig

from bivlm.pruning.anatomy import anatomy
from bivlm.pruning.dropping import pruned
from bivlm.recipe.pruning import PruningSettings

SHARES = (0.0, 0.5, 0.75, 0.9)
LAYER = 2
REPEATS = 5
IMAGE = 5
QUESTION = 32  # tokens of text
FASTER, SMALLER = 3.0, 0.8  # at a share of 0.9


def main(arguments: Sequence[str] | None = None) -> int:
    """Print seconds and bytes by share; returns 1 if a bound is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--side", type=int, default=64, help="patches along each side of the image")
    options = parser.parse_args(arguments)
    model = _model(options.layers, options.hidden)
    inputs = _inputs(options.side)
    tokens = int((inputs["input_ids"] == IMAGE).sum())
    print(
        f"{options.layers} layers of width {options.hidden}, {tokens:,} image tokens and {QUESTION} of text, "
        f"dropped from layer {LAYER} on; {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"{platform.machine()}"
    )
    runs: dict[float, list[tuple[float, float, int]]] = {share: [] for share in SHARES}
    for _ in range(REPEATS + 1):  # the first of each warms up
        for share in SHARES:
            runs[share].append(_read(model, inputs, share))
    plain = [median(values) for values in zip(*runs[0.0][1:], strict=True)]
    print(f"{'dropped':>8}{'language, s':>13}{'faster':>8}{'whole, s':>10}{'faster':>8}{'cache, MB':>11}{'smaller':>9}")
    for share in SHARES:
        language, whole, nbytes = (median(values) for values in zip(*runs[share][1:], strict=True))
        faster, smaller = plain[0] / language, 1 - nbytes / plain[2]
        print(
            f"{100 * share:>6.0f} %{language:>13.3f}{faster:>8.2f}{whole:>10.3f}{plain[1] / whole:>8.2f}"
            f"{nbytes / 1e6:>11.2f}{100 * smaller:>7.0f} %"
        )
    print(
        f"at 90 %: {faster:.2f} times as fast (bound {FASTER:g}), cache {100 * smaller:.0f} % smaller "
        f"(bound {100 * SMALLER:g})"
    )
    return int(faster < FASTER or smaller < SMALLER)


@torch.inference_mode()
def _read(model: PreTrainedModel, inputs: dict[str, torch.Tensor], share: float) -> tuple[float, float, int]:
    """Seconds in the language model, seconds in all, and bytes of the cache."""
    seconds: list[float] = []
    text_model = anatomy(model).text_model
    hooks = [
        text_model.register_forward_pre_hook(lambda *_: seconds.append(time.perf_counter()), prepend=True),
        text_model.register_forward_hook(lambda *_: seconds.append(time.perf_counter())),
    ]
    settings = PruningSettings(place="language", layer=LAYER, share=share) if share else None
    with pruned(model, settings) if settings else nullcontext():
        begin = time.perf_counter()
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        whole = time.perf_counter() - begin
    for hook in hooks:
        hook.remove()
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return seconds[1] - seconds[0], whole, nbytes


def _model(layers: int, hidden: int) -> PreTrainedModel:
    torch.manual_seed(0)
    heads = hidden // 64
    vision = {"depth": 8, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "patch_size": 14}
    config = Qwen2_5_VLConfig(
        vision_config={**vision, "out_hidden_size": hidden, "window_size": 112, "fullatt_block_indexes": [3, 7]},
        text_config={
            "vocab_size": 1024,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        image_token_id=IMAGE,
        video_token_id=6,
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def _inputs(side: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 1024, (QUESTION,), generator=generator)
    ids = torch.cat([text[:8], torch.full((side * side // 4,), IMAGE), text[8:]])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(side * side, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


if __name__ == "__main__":
    sys.exit(main())
