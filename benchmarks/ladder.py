"""What each part of the trellis recipes gains, one after the other: ``python -m benchmarks.ladder --output DIR``.

Every row is a recipe that differs from another row's in one thing. Each is compressed with several seeds of its
rotations, on the reference model, by ``bivlm leaderboard``; all figures are of the packed checkpoints. A killed run
resumes. Means over seeds of: stored bits per weight, the error of weights and of layers' outputs, the divergence from
full precision (nats per token; of short and long replies apart), the accuracy with the half width of its interval over
questions, and the seconds that compressing took; also as ``ladder.csv`` in the folder. The row with text is judged on
held-out samples of its own mixture.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from bivlm.reference import CHECKPOINT

SETS = [f"reference:{name}" for name in ("perception", "cognition", "choice", "open")]
LEAST = {2.0: 1.5, 1.5: 1.0, 1.25: 1.0, 1.0: 0.75}
SAMPLES = 512
HELD_OUT = 1024  # of which four fifths are questions, with replies of a few tokens
TEXT = {"text_share": 0.25, "text_source": "reference"}
COLUMNS = ("bits", "error", "outputs", "KL", "short", "long", "accuracy", "±", "seconds")


def rows(rate: float) -> dict[str, dict[str, Any]]:
    """Return, by the name of a row, the method's settings and, under other keys, those of the recipe."""
    trellis: dict[str, Any] = {"method": "trellis", "rate": rate}
    budget = {"bits": rate, "importance": "curvature", "least": LEAST[rate]}
    both = trellis | {"feedback": "both"}
    found: dict[str, dict[str, Any]] = {}
    if rate == 2.0:
        two = {"method": "bivlm", "groups": 2, "p_max": 0.05, "salient_bits": 2}
        found["groups of the paper"] = {"method": two | {"refit": False}}
        found["refitted"] = {"method": two | {"refit": True}}
        found["with feedback"] = {"method": two | {"refit": True, "feedback": True}}
    found |= {
        "trellis alone": {"method": trellis | {"feedback": "none", "rotate": "none"}},
        "rotated": {"method": trellis | {"feedback": "none"}},
        "feedback to inputs": {"method": trellis},
        "... not rotated": {"method": trellis | {"rotate": "none"}},
        "rates by curvature": {"method": trellis, "budget": budget},
        "feedback to both": {"method": both, "budget": budget},
        "... equal rates": {"method": both},
        "... 64 samples": {"method": both, "budget": budget, "calibration": {"samples": 64}},
        "... a quarter text": {"method": both, "budget": budget, "calibration": TEXT},
        "... leftovers tuned": {
            "method": both,
            "budget": budget,
            "finish": {"leftovers": True, "steps": 45, "judging_share": 0.125},
        },
        "... quantized inputs": {"method": both, "budget": budget, "calibration": {"inputs": "quantized"}},
        "2^14 states": {"method": both | {"state_bits": 14}, "budget": budget},
        "2^16 states": {"method": both | {"state_bits": 16}, "budget": budget},
    }
    return found


def recipe(name: str, row: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the recipe of a row, with rotations of this seed where there are any."""
    settings = row["method"] | ({"seed": seed} if row["method"]["method"] == "trellis" else {})
    return {
        "name": name,
        "format": 1,
        "components": dict.fromkeys(("vision", "adaptor", "language"), settings),
        "calibration": {"source": "reference", "samples": SAMPLES, "held_out": HELD_OUT, "seed": 0}
        | row.get("calibration", {}),
        "evaluation": SETS,
        **({"budget": row["budget"]} if "budget" in row else {}),
        **({"finish": row["finish"]} if "finish" in row else {}),
    }


def figures(folder: Path, entry: dict[str, Any]) -> dict[str, float]:
    """Return a row's figures from its checkpoint's folder and its entry on the board."""
    report = json.loads((folder / "compression_report.json").read_text())
    lineage = json.loads((folder / "lineage.json").read_text())
    divergence = lineage["steps"][lineage["evaluations"]["packed, held-out samples"]]["figures"]
    outputs = [layer["output_error"] for layer in report["layers"] if layer["output_error"] is not None]
    mean = entry["mean_accuracy"]
    return {
        "bits": entry["bits"]["stored"],
        "error": report["relative_error"],
        "outputs": fmean(outputs) if outputs else float("nan"),
        "KL": divergence["kl"],
        "short": divergence["kl_short_replies"],
        "long": divergence["kl_long_replies"],
        "accuracy": mean["accuracy"],
        "±": (mean["ci95"][1] - mean["ci95"][0]) / 2,
        "seconds": report["seconds"],
    }


def ladder(
    output: Path, rate: float, wanted: list[str], seeds: int, questions: int
) -> Iterator[tuple[str, dict[str, str]]]:
    """Compress what is missing, and yield the name and the figures of each row."""
    output.mkdir(parents=True, exist_ok=True)
    labels: dict[str, list[str]] = {}
    boards: dict[str, list[str]] = {}
    for number, (name, row) in enumerate(rows(rate).items()):
        if wanted and name not in wanted:
            continue
        board = f"board-{rate:g}" + ("-texts" if row.get("calibration") == TEXT else "")
        for seed in range(seeds if row["method"]["method"] == "trellis" else 1):
            label = f"{rate:g}-{number:02d}-{seed}"
            (output / f"{label}.yaml").write_text(yaml.safe_dump(recipe(label, row, seed)))
            labels.setdefault(name, []).append(label)
            boards.setdefault(board, []).append(label)
    found = {
        label: figures for board, some in boards.items() for label, figures in _measured(output, board, some, questions)
    }
    digits = {"bits": 3, "accuracy": 1, "±": 1, "seconds": 0}
    for name, some in labels.items():
        means = {column: fmean(found[label][column] for label in some) for column in COLUMNS}
        yield name, {column: f"{mean:.{digits.get(column, 4)}f}" for column, mean in means.items()}


def _measured(output: Path, board: str, labels: list[str], questions: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the labels of a board's recipes and their figures, once all are compressed."""
    files = [str(output / f"{label}.yaml") for label in labels]
    asked = ["--model", str(CHECKPOINT), "--questions", str(questions), "--workspace", str(output / "workspace")]
    command = [sys.executable, "-m", "flows.cli", "leaderboard", *asked, "--recipes", *files]
    subprocess.run([*command, "--output", str(output / board)], check=True, stdout=subprocess.DEVNULL)
    for entry in json.loads((output / board / "board.json").read_text())["entries"]:
        if entry["recipe"] in labels:
            yield entry["recipe"], figures(output / board / entry["recipe"], entry)


def main() -> None:
    """Print the ladder of each rate that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and finished steps")
    parser.add_argument("--rates", type=float, nargs="+", choices=LEAST, default=[2.0])
    parser.add_argument("--rows", nargs="+", default=[], help="names of rows; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=250, help="of each set")
    given = parser.parse_args()
    table = []
    for rate in given.rates:
        print(f"{f'at {rate:g} bits':<22}" + "".join(f"{column:>9}" for column in COLUMNS))
        for name, means in ladder(given.output, rate, given.rows, given.seeds, given.questions):
            print(f"{name:<22}" + "".join(f"{means[column]:>9}" for column in COLUMNS), flush=True)
            table.append({"rate": f"{rate:g}", "recipe": name} | means)
    with (given.output / "ladder.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
