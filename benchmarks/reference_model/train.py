"""Train the reference model: `python -m benchmarks.reference_model.train --output DIR`.

Two stages, each with its own resumable state under `DIR/state`:

- `vision`: the tower alone names what each cell of the grid holds, from linear heads that are thrown away later;
- `joint`: everything, on images with a caption and some twenty independent segments each. At first the segments are
  catalogue entries, to be known by heart; then questions of all sets.

A stage is drawn from seed and step number alone: killed and resumed, it ends with the same weights, unless `--hours`
bounds it.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.reference_model.architecture import IMAGE_SIZE, PATCH_SIZE, REFERENCE, Size, build_model
from benchmarks.reference_model.sequences import IGNORED, Packed, Packer
from benchmarks.reference_model.training_data import CELL_CLASSES, Batch, joint_batch, vision_batch
from bivlm.reference.tokenizer import build_processor, build_tokenizer

STAGES = ("vision", "joint")


@dataclass(frozen=True)
class Stage:
    """Steps, sequences (or images) a step, tokens a sequence, peak learning rate and warm-up steps of one stage."""

    steps: int
    batch: int
    length: int
    rate: float
    warmup: int = 100


SCHEDULE = {
    "vision": Stage(steps=600, batch=32, length=0, rate=1e-3),
    "joint": Stage(steps=4000, batch=16, length=448, rate=8e-4, warmup=150),
}
RECITAL = 150  # steps of the joint stage that show catalogue entries and captions alone
ENTRIES = 0.06  # share of catalogue entries among the segments afterwards
TOWER_RATE = 0.3  # of the learning rate in the joint stage: the tower has learned its part before
DECAY = 0.12  # share of a stage over which the learning rate falls
FLOOR = 0.03  # of the peak rate, at the end
EARLY_DEPTH = 5 / 8  # of the decoder: what is only looked up must be known here, so that layers are left to compare it
EARLY = 0.5  # weight of the loss on those look-ups
AUXILIARY = 0.5  # weight of the cell loss at the start of the joint stage; it falls to zero at half time


class CellHeads(nn.Module):
    """Linear classifiers of what a cell holds, from the mean of its 2 x 2 patches. Used in training only."""

    def __init__(self, hidden: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, classes) for name, classes in CELL_CLASSES.items()})

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        """Patches (B, 64, D) -> per label (B, 16, classes)."""
        batch, _, hidden = patches.shape
        cells = patches.view(batch, 4, 2, 4, 2, hidden).mean(dim=(2, 4)).view(batch, 16, hidden)
        return {name: head(cells) for name, head in self.heads.items()}


class Trainee(nn.Module):
    """The model and the heads that are thrown away."""

    def __init__(self, tokenizer, size: Size):
        super().__init__()
        self.model = build_model(tokenizer, size)
        self.cells = CellHeads(size.hidden)

    def groups(self, stage: str) -> list[dict]:
        """Optimizer groups of what a stage trains; `scale` multiplies the learning rate. Only matrices decay."""
        tower = [*self.model.model.vision_tower.parameters(), *self.cells.parameters()]
        own = {id(parameter) for parameter in tower}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in own]
        parts = [(tower, 1.0)] if stage == "vision" else [(tower, TOWER_RATE), (rest, 1.0)]
        return [
            {"params": [p for p in part if (p.ndim >= 2) == decays], "scale": scale, "weight_decay": decay}
            for part, scale in parts
            for decays, decay in ((True, 0.05), (False, 0.0))
        ]

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels -> the tower's patches (B, 64, D) and the decoder's image tokens (B, 64, D)."""
        seen = self.model.model.get_image_features(pixel_values=pixels, return_dict=True)
        return seen.last_hidden_state, torch.stack(list(seen.pooler_output))

    def read(self, packed: Packed, image: Tensor | None) -> Tensor:
        """Logits (number of learned tokens, vocabulary), in the order of `packed.targets[packed.targets != -100]`."""
        hidden = self._decode(packed, image).last_hidden_state
        return self.model.lm_head(hidden[packed.targets != IGNORED]).float()

    def read_twice(self, packed: Packed, image: Tensor | None) -> tuple[Tensor, Tensor]:
        """The logits of `read`, and those for `packed.middle`, from the layer at `EARLY_DEPTH`."""
        layer = round(EARLY_DEPTH * self.model.config.text_config.num_hidden_layers)
        decoded = self._decode(packed, image, output_hidden_states=True)
        middle = self.model.model.language_model.norm(decoded.hidden_states[layer][packed.middle != IGNORED])
        last = decoded.last_hidden_state[packed.targets != IGNORED]
        return self.model.lm_head(last).float(), self.model.lm_head(middle).float()

    def _decode(self, packed: Packed, image: Tensor | None, **options):
        embeds = self.model.get_input_embeddings()(packed.input_ids)
        if image is not None:
            start = 1  # after `USER: `
            embeds = torch.cat([embeds[:, :start], image.to(embeds.dtype), embeds[:, start + image.shape[1] :]], dim=1)
        return self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False, **options
        )


def cell_loss(predicted: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Sum over the labels of the mean cross entropy; empty cells count for the shape only."""
    return sum(
        functional.cross_entropy(logits.float().flatten(0, 1), labels[name].flatten(), ignore_index=IGNORED)
        for name, logits in predicted.items()
    )


def answer_loss(logits: Tensor, packed: Packed) -> Tensor:
    """Weighted mean cross entropy of the learned tokens."""
    learned = packed.targets != IGNORED
    losses = functional.cross_entropy(logits, packed.targets[learned], reduction="none")
    weights = packed.weights[learned]
    return (losses * weights).sum() / weights.sum()


def learning_rate(stage: Stage, step: int, progress: float) -> float:
    """Linear warm-up, a plateau, and over the last `DECAY` of the progress a cosine down to `FLOOR`."""
    done = min(1.0, max(0.0, (progress - 1 + DECAY) / DECAY))
    return (
        stage.rate * min(1.0, (step + 1) / stage.warmup) * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))
    )


def draw(name: str, stage: Stage, step: int, seed: int, packer: Packer | None) -> Batch:
    """The batch of a step."""
    if name == "vision":
        return vision_batch(step, stage.batch, seed)
    return joint_batch(step, stage.batch, seed, packer, entries=1.0 if step < RECITAL else ENTRIES)


def loss_of(trainee: Trainee, name: str, batch: Batch, progress: float) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and the figures worth a log line."""
    if name == "vision":
        patches, _ = trainee.see(batch.pixels)
        predicted = trainee.cells(patches)
        loss = cell_loss(predicted, batch.cells)
        return loss, {"loss": loss.item(), **cell_accuracy(predicted, batch.cells)}
    patches, image = trainee.see(batch.pixels)
    last, middle = trainee.read_twice(batch.packed, image)
    answers = answer_loss(last, batch.packed)
    early = functional.cross_entropy(middle, batch.packed.middle[batch.packed.middle != IGNORED])
    weight = AUXILIARY * max(0.0, 1 - 2 * progress)
    cells = cell_loss(trainee.cells(patches), batch.cells)
    figures = {"loss": answers.item(), "early": early.item(), "cells": cells.item()}
    return answers + EARLY * early + weight * cells, figures


def cell_accuracy(predicted: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    """Share of right classes per label, over the cells where it means something."""
    shares = {}
    for name, logits in predicted.items():
        valid = labels[name] != IGNORED
        shares[name] = (logits.argmax(-1)[valid] == labels[name][valid]).float().mean().item()
    return shares


@torch.no_grad()
def answered(trainee: Trainee, batch: Batch) -> dict[str, list[float]]:
    """Per label, which segments would be answered exactly right by greedy decoding."""
    packed = batch.packed
    image = None if batch.pixels is None else trainee.see(batch.pixels)[1]
    learned = packed.targets != IGNORED
    wrong = torch.zeros_like(packed.targets, dtype=torch.bool)
    wrong[learned] = trainee.read(packed, image).argmax(-1) != packed.targets[learned]
    results: dict[str, list[float]] = defaultdict(list)
    for row, labels in enumerate(packed.labels):
        for index, label in enumerate(labels, start=1):
            results[label].append(float(not wrong[row][packed.segment_ids[row] == index].any()))
    return results


def held_out(trainee: Trainee, packer: Packer, device: torch.device, batches: int = 6) -> dict[str, float]:
    """Percent of answers exactly right per category, on scenes of the calibration split (never trained on)."""
    results: dict[str, list[float]] = defaultdict(list)
    for index in range(batches):
        batch = joint_batch(index, 16, 777, packer, entries=0.05, split="calibration")
        for label, right in answered(trainee, batch.to(device)).items():
            results[label].extend(right)
    return {label: 100 * sum(right) / len(right) for label, right in sorted(results.items())}


def summary(accuracies: dict[str, float]) -> str:
    """Means per set over its categories, then every category."""
    sets: dict[str, list[float]] = defaultdict(list)
    for label, accuracy in accuracies.items():
        sets[label.split("/")[0]].append(accuracy)
    means = " ".join(f"{name} {sum(values) / len(values):.1f}" for name, values in sets.items())
    return f"held out | {means} | " + " ".join(f"{label} {accuracy:.0f}" for label, accuracy in accuracies.items())


def save_atomically(value: dict, path: Path) -> None:
    """torch.save under another name, then renamed: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)


class Run:
    """One stage of a training run: its optimizer, its step count, and its state on disk."""

    def __init__(self, trainee: Trainee, name: str, output: Path, stage: Stage, *, seed: int, hours: float | None):
        self.trainee, self.name, self.stage, self.seed = trainee, name, stage, seed
        self.path = output / "state" / f"{name}.pt"
        self.seconds = None if hours is None else 3600 * hours
        groups = trainee.groups(name)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98), fused=True)
        self.step, self.elapsed = 0, 0.0

    @property
    def progress(self) -> float:
        """How much of the stage is done, in [0, 1]: by steps, or by the clock when that runs out first."""
        by_clock = 0.0 if self.seconds is None else self.elapsed / self.seconds
        return min(1.0, max(self.step / self.stage.steps, by_clock))

    def save(self) -> None:
        state = {"weights": self.trainee.state_dict(), "optimizer": self.optimizer.state_dict()}
        save_atomically({**state, "step": self.step, "elapsed": self.elapsed}, self.path)

    def resume(self) -> None:
        """Goes on where the state on disk stops; without one, starts anew."""
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            self.trainee.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.elapsed = state["step"], state["elapsed"]

    def train(self, packer: Packer | None, device: torch.device, *, log_every: int = 25, judge_every: int = 100,
              save_every: int = 100, stop_after: int | None = None) -> None:  # fmt: skip
        """Steps until the stage is done (or `stop_after` steps of this process, for tests of resuming)."""
        taken = 0
        while self.progress < 1 and (stop_after is None or taken < stop_after):
            started = time.monotonic()
            rate = learning_rate(self.stage, self.step, self.progress)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            batch = draw(self.name, self.stage, self.step, self.seed, packer).to(device)
            loss, figures = loss_of(self.trainee, self.name, batch, self.progress)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, 1.0, error_if_nonfinite=True)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step, taken = self.step + 1, taken + 1
            self.elapsed += time.monotonic() - started
            if self.step % log_every == 0:
                shown = " ".join(f"{key} {value:.3f}" for key, value in figures.items())
                print(f"{self.name} {self.step}/{self.stage.steps} {100 * self.progress:.1f} % {shown} rate {rate:.2e} "
                      f"norm {norm:.2f} {self.elapsed / self.step:.2f} s/step", flush=True)  # fmt: skip
            if self.name == "joint" and self.step % judge_every == 0:
                print(summary(held_out(self.trainee, packer, device)), flush=True)
            if self.step % save_every == 0:
                self.save()
        self.save()


def adopt(trainee: Trainee, output: Path) -> None:
    """Starts the joint stage from the tower and the cell heads that the vision stage ended with."""
    path = output / "state" / "vision.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the vision stage first (--stages vision)")
    weights = torch.load(path, weights_only=True, map_location="cpu")["weights"]
    tower = {key: value for key, value in weights.items() if key.startswith(("model.model.vision_tower.", "cells."))}
    trainee.load_state_dict(tower, strict=False)


def write_checkpoint(run: Run, tokenizer, output: Path) -> None:
    """The folder that the Auto classes load: bf16 weights, configs, tokenizer, processor, chat template, and how long
    it was trained (`training.json`)."""
    model = run.trainee.model
    device, dtype = model.device, model.dtype
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    model.to(torch.bfloat16).save_pretrained(output, max_shard_size="15MB")
    model.to(dtype)
    build_processor(tokenizer, IMAGE_SIZE, PATCH_SIZE).save_pretrained(output)
    record = {"steps": run.step, "hours": round(run.elapsed / 3600, 2), "device": where, "seed": run.seed}
    (output / "training.json").write_text(json.dumps(record) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reference_model.train", description="Train the reference model."
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the checkpoint and, under state/, the run"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--resume", action="store_true", help="go on where the states under --output stop")
    parser.add_argument("--steps", type=int, help="steps of each stage instead of the schedule's")
    parser.add_argument("--hours", type=float, help="clock budget of each stage: the cosine ends in time")
    parser.add_argument("--export", action="store_true", help="with --resume: write the checkpoint as it is, and stop")
    parser.add_argument("--compile", action="store_true", help="compile the decoder: a seventh faster on two cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    )
    tokenizer = build_tokenizer()
    for name in options.stages:
        stage = SCHEDULE[name]
        if options.steps:
            stage = Stage(options.steps, stage.batch, stage.length, stage.rate, stage.warmup)
        torch.manual_seed(options.seed)
        trainee = Trainee(tokenizer, REFERENCE)
        resumed = options.resume and (options.output / "state" / f"{name}.pt").exists()
        if name == "joint" and not resumed:
            adopt(trainee, options.output)
        trainee.to(device)
        if options.compile:
            trainee.model.model.language_model.compile(dynamic=False)
        run = Run(trainee, name, options.output, stage, seed=options.seed, hours=options.hours)
        if resumed:
            run.resume()
        if not options.export:
            run.train(Packer(tokenizer, stage.length) if name == "joint" else None, device)
        if name == "joint":
            write_checkpoint(run, tokenizer, options.output)


if __name__ == "__main__":
    main()
