"""Have every peer quantize the reference model, and measure what came of it. See the package's own text."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import environments, table
from benchmarks.peers.exchange import DENSE, RUN, STORED
from benchmarks.peers.measure import Bench
from benchmarks.peers.stored import model_bits, stored_bits, tensor_bytes
from bivlm.errors import InputError
from bivlm.recipe.loading import load_recipe, shipped_recipes
from bivlm.reference import CHECKPOINT
from bivlm.reports.leaderboard.entries import Entry, mean_accuracy

ROOT = Path(__file__).parents[2]
BOARD, PEERS, PAGE = (ROOT / "docs" / name for name in ("leaderboard.csv", "peers.csv", "leaderboard.md"))
FIGURE = ROOT / "docs" / "leaderboard.svg"
RECIPE = "gptq-w2g64"  # whose linears, calibration samples and benchmarks are those of all
QUESTIONS = 250  # of each set, as on the board


@dataclass(frozen=True)
class Configuration:
    """One row: the peer that makes it and the settings of its program."""

    name: str
    peer: str
    settings: dict[str, Any]

    @property
    def program(self) -> str:
        return f"benchmarks.peers.by_{self.peer.replace('-', '_')}"


def _configurations() -> list[Configuration]:
    found = []
    for bits, group_size in ((2, 64), (2, 128), (3, 128)):
        size, shape = {"bits": bits, "group_size": group_size}, f"w{bits}g{group_size}"
        gptq = Configuration(f"llm-compressor-gptq-{shape}", "llmcompressor", size | {"observer": "memoryless_minmax"})
        # The axis with the lower KL; the peer's default is 1.
        hqq = Configuration(f"hqq-{shape}", "hqq", size | {"axis": 0 if shape == "w2g128" else 1})
        found += [gptq, hqq]
        if bits == 2:
            # Its default is 200 steps, its light preset 50.
            found.append(Configuration(f"auto-round-{shape}", "auto-round", size | {"iters": 50}))
    mse = {"bits": 2, "group_size": 64, "observer": "memoryless_mse"}
    return [*found, Configuration("llm-compressor-gptq-w2g64-mse", "llmcompressor", mse)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each configuration, and write the CSV file and the page's table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".peers", help="for environments and results")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations, in the place of all")
    parser.add_argument(
        "--board", type=Path, help="run none: of this folder, which `bivlm leaderboard` wrote, make the page's table"
    )
    options = parser.parse_args(arguments)
    if options.board:
        BOARD.write_text(
            table.with_board(table.read_rows(BOARD), table.read_rows(options.board / "board.csv", ["kind"]))
        )
        FIGURE.write_bytes((options.board / "board.svg").read_bytes())
        return _write_page()
    known = {each.name: each for each in _configurations()}
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"--only: {', '.join(sorted(unknown))}; expected names among {', '.join(known)}")
    configurations = [known[name] for name in options.only or known]
    ours = table.read_rows(BOARD)
    options.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(CHECKPOINT, load_recipe(RECIPE), QUESTIONS, options.folder)
    _check_same_board(bench, ours)
    rows = {row["recipe"]: row for row in table.read_rows(PEERS, table.COLUMNS)} if PEERS.is_file() else {}
    for each in configurations:
        rows[each.name] = _row(each, bench, options.folder)
        print(", ".join(f"{key} {value}" for key, value in rows[each.name].items()), flush=True)
        PEERS.write_text(table.as_csv(row for row in rows.values() if row["recipe"] in known))
    return _write_page()


def _write_page() -> int:
    ours, peers = table.read_rows(BOARD), table.read_rows(PEERS, table.COLUMNS)
    lines = table.table(ours, peers, shipped_recipes(), QUESTIONS)
    PAGE.write_text(table.with_table(PAGE.read_text(), lines))
    return 0


def _check_same_board(bench: Bench, ours: Sequence[table.Row]) -> None:
    """Raise `InputError` unless full precision answers here as it did for the board."""
    found = f"{mean_accuracy(bench.accuracy(CHECKPOINT).values())['accuracy']:.1f}"
    (expected,) = (row["accuracy"] for row in ours if row["recipe"] == "full precision")
    if found != expected:
        raise InputError(f"full precision: accuracy {found}, {BOARD.name} has {expected}; measure the board again")


def _row(each: Configuration, bench: Bench, folder: Path) -> dict[str, str]:
    output = folder / "results" / each.name
    run = _run_of(output)
    if run.get("settings") != each.settings or run.get("pins") != list(environments.PINS[each.peer]):
        _quantize(each, bench.samples, output, folder)
    made = bench.measure(output / DENSE, output / "checkpoint")
    stored = stored_bits(tensor_bytes(output / STORED), bench.linears)
    parameters = sum(entry.numel for entry in bench.base.entries.values())
    entry = Entry.read(
        {
            "recipe": each.name,
            "method": each.peer,
            "bits": {"nominal": each.settings["bits"], "entropy": stored.bits, "stored": stored.bits},
            "model_bits": model_bits(output / STORED, parameters),
            "relative_error": made.error,
            "kl": made.kl,
            "accuracy": made.accuracy,
            "seconds": 0,  # the machine is shared: not measured
        }
    )
    version = environments.version_of(each.peer)
    return table.row_of(entry, each.peer, version, stored.quantized, stored.quantized_bits)


def _run_of(output: Path) -> dict[str, Any]:
    """Return the record of what lies in the folder; nothing if there is none."""
    return json.loads((output / RUN).read_text()) if (output / RUN).is_file() else {}


def _quantize(each: Configuration, samples: Path, output: Path, folder: Path) -> None:
    """Run the peer's program in its environment; raises RuntimeError with the end of its log if it fails."""
    python = environments.python_of(each.peer, folder / "environments")
    output.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(each.settings)
    command = [str(python), "-m", each.program, *map(str, (CHECKPOINT, samples, output)), settings]
    # Threads that wait for one another take longer than one, for layers of this size.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}
    with (output / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{each.name}: {(output / 'log.txt').read_text()[-2000:]}")
    run = _run_of(output) | {"pins": list(environments.PINS[each.peer])}
    (output / RUN).write_text(json.dumps(run) + "\n")


if __name__ == "__main__":
    sys.exit(main())
