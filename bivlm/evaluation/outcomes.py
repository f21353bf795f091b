"""Run a benchmark: one row per question, and the figures made of the rows."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, ProcessorMixin

from bivlm.evaluation.benchmark import Benchmark
from bivlm.evaluation.generation import Progress, answers, default_batch_size
from bivlm.evaluation.metrics import accuracy, bootstrap_interval

SCHEMA = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("answers", pa.list_(pa.string()), nullable=False),
        pa.field("prediction", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
    ]
)
COLUMNS = tuple(SCHEMA.names)


@dataclass(frozen=True)
class Evaluation:
    """The result of a benchmark.

    `metrics` begins with `accuracy`, the mean score in percent; `ci95` is its 95 % interval by bootstrap over images.
    `intervals` are those of other figures by which the set is known, such as the scores of MME; `source` says where the
    questions were published. `outcomes` has `COLUMNS`, one row per question in the order of the benchmark.
    """

    task: str
    n: int
    metrics: dict[str, float]
    ci95: list[float]
    outcomes: pd.DataFrame
    intervals: dict[str, list[float]] = field(default_factory=dict)
    source: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """Return everything but the rows, ready for JSON."""
        return {
            "task": self.task,
            "n": self.n,
            "metrics": self.metrics,
            "ci95": self.ci95,
            **({"intervals": self.intervals} if self.intervals else {}),
            **({"source": self.source} if self.source else {}),
        }


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    benchmark: Benchmark,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> Evaluation:
    """Ask the model every question of the benchmark, greedily, and score the answers.

    `progress(done, total)`, in questions, is called after every batch. The answers do not depend on the batch size,
    except where two tokens are so close that rounding decides.
    """
    if device is not None:
        model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides that it is a method
    size = default_batch_size(model) if batch_size is None else batch_size
    rows: dict[int, dict[str, Any]] = {}
    for batch in answers(model, processor, benchmark, max_new_tokens=benchmark.max_new_tokens, batch_size=size):
        for position, sample, prediction in batch:
            answered = {"prediction": prediction, "score": benchmark.score(sample, prediction)}
            rows[position] = sample.texts | {"answers": list(sample.answers)} | answered
        if progress is not None:
            progress(len(rows), len(benchmark))
    outcomes = pd.DataFrame([rows[position] for position in sorted(rows)], columns=list(COLUMNS))
    return Evaluation(
        task=benchmark.task,
        n=len(outcomes),
        metrics={"accuracy": accuracy(outcomes["score"]), **benchmark.summarize(outcomes)},
        ci95=list(bootstrap_interval(outcomes["score"], outcomes["image_id"])),
        outcomes=outcomes,
        intervals=benchmark.intervals(outcomes),
        source=benchmark.source(),
    )


def write_outcomes(outcomes: pd.DataFrame, path: Path) -> Path:
    """Write a parquet file with `SCHEMA`, which appears whole or not at all; the same rows give the same bytes."""
    table = pa.Table.from_pandas(outcomes, schema=SCHEMA, preserve_index=False).replace_schema_metadata(None)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    pq.write_table(table, partial, compression="zstd")
    return partial.replace(path)


def read_outcomes(path: Path) -> pd.DataFrame:
    """Return the rows of `write_outcomes`, answers as lists."""
    outcomes = pq.read_table(path, schema=SCHEMA).to_pandas()
    return outcomes.assign(answers=[list(answers) for answers in outcomes["answers"]])
