"""``docs/peers.csv``, and the table of ``docs/leaderboard.md`` with the peers among our recipes."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bivlm.errors import InputError
from bivlm.reports.leaderboard.entries import Accuracy, Entry, FullPrecision, shannon_bound
from bivlm.reports.leaderboard.ranking import board, fronts_of, ranks_of

Row = Mapping[str, str]
SETS = ("perception", "cognition", "choice", "open")
# Those of docs/leaderboard.csv without what follows from the other rows, then a peer's own.
COLUMNS = (
    *("recipe", "package", "version", "claimed_bits", "stored_bits", "model_bits", "accuracy", "interval", *SETS),
    *("kl", "error", "error_over_shannon", "quantized_linears", "quantized_bits"),
)
MARK = "†"  # behind the name of what a peer's own code made
HEADING = "recipe | **stored** | accuracy | KL | rank A/K | error | front"
RULE = "---|---:|---:|---:|---:|---:|---"
_FRONTS = {"accuracy": "A", "kl": "K", "relative_error": "E"}


def read_rows(file: Path, columns: Iterable[str] = ("recipe", "stored_bits", "accuracy", "kl", "error")) -> list[Row]:
    """Return the rows of a CSV file by column; raises `InputError` if it lacks one of the `columns`."""
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise InputError(
                f"{file}: expected the columns {', '.join(columns)}; found no {', '.join(sorted(missing))}"
            )
        return list(reader)


def row_of(entry: Entry, package: str, version: str, quantized: int, quantized_bits: float) -> dict[str, str]:
    """Return a peer's row of ``docs/peers.csv``, with numbers rounded as in ``docs/leaderboard.csv``."""
    mean = entry.mean
    accuracy, (low, high) = mean["accuracy"], mean["ci95"]
    return {
        "recipe": entry.recipe,
        "package": package,
        "version": version,
        "claimed_bits": f"{entry.bits.nominal:.3f}",
        "stored_bits": f"{entry.bits.stored:.3f}",
        "model_bits": f"{entry.model_bits:.2f}",
        "accuracy": f"{accuracy:.1f}",
        "interval": f"{max(accuracy - low, high - accuracy):.1f}",
        **{name: f"{entry.accuracy[f'reference:{name}'].accuracy:.1f}" for name in SETS},
        "kl": _kl(entry.kl),
        "error": f"{entry.relative_error:.4f}",
        "error_over_shannon": f"{entry.relative_error / shannon_bound(entry.bits.stored):.2f}",
        "quantized_linears": str(quantized),
        "quantized_bits": f"{quantized_bits:.3f}",
    }


def as_csv(rows: Iterable[Row]) -> str:
    """Return ``docs/peers.csv``, by rising stored bits."""
    return _written(COLUMNS, sorted(rows, key=lambda row: (float(row["stored_bits"]), row["recipe"])))


def with_board(ours: Sequence[Row], measured: Sequence[Row]) -> str:
    """Return ``docs/leaderboard.csv`` with rows of recipes that are not finished as ``board.csv`` has them.

    `measured` are the rows of that file; rows of `ours` that are finished stay.
    """
    columns = list(ours[0])
    rows = [row for row in measured if row["kind"] in ("full precision", "recipe", "chance")]
    found = [dict.fromkeys(columns, "") | _of_board(row) for row in rows]
    return _written(columns, [*found[:-1], *(row for row in ours if row["finishing"] == "yes"), found[-1]])


def _of_board(row: Row) -> dict[str, str]:
    name = row["recipe"] or row["kind"]
    values = {"recipe": name, "finishing": "no" if row["recipe"] else ""}
    accuracy = float(row["accuracy"])
    values |= {"accuracy": f"{accuracy:.1f}"} | {each: f"{float(row[f'reference:{each}']):.1f}" for each in SETS}
    if row["kind"] == "chance":
        return values
    interval = max(accuracy - float(row["accuracy_low"]), float(row["accuracy_high"]) - accuracy)
    values |= {"interval": f"{interval:.1f}"}
    bits = {"claimed_bits": "claimed_bits", "stored_bits": "stored_bits"}
    values |= {key: f"{float(row[column]):.3f}" for key, column in bits.items()}
    values |= {"model_bits": f"{float(row['model_bits']):.2f}"}
    if row["kind"] == "full precision":
        return values | {"kl": "0", "error": "0"}
    fronts = "".join(_FRONTS[loss] for loss in _FRONTS if row[f"front_{loss}"] == "1")
    return values | {
        "kl": _kl(float(row["kl"])),
        "rank_accuracy": row["rank_accuracy"],
        "rank_kl": row["rank_kl"],
        "error": f"{float(row['relative_error']):.4f}",
        "error_over_shannon": f"{float(row['times_shannon']):.2f}",
        "front": fronts,
    }


def _kl(divergence: float) -> str:
    """Return it with three digits or, where they would make recipes alike that are not, with four."""
    return f"{divergence:.{3 if divergence >= 0.01 else 4}f}"


def _written(columns: Sequence[str], rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(ours: Sequence[Row], peers: Sequence[Row], shown: Iterable[str], questions: int) -> list[str]:
    """Return the lines of the board's table in Markdown: the recipes `shown`, and among them every peer with `MARK`.

    Ranks and fronts are those among all rows that are not finished. `questions` were asked of each set. Raises
    `InputError` if a peer has the name of a recipe, or a recipe to be shown is not in `ours`.
    """
    (full,), (chance,) = ([row for row in ours if row["recipe"] == name] for name in ("full precision", "chance"))
    packed = {row["recipe"]: row for row in ours if row["finishing"] == "no"}
    if missing := set(shown) - set(packed):
        raise InputError(f"recipes {', '.join(sorted(missing))}: expected them on the board, found no row")
    entries = [_entry(row, questions) for row in (*packed.values(), *peers)]
    level = FullPrecision(
        bits=float(full["stored_bits"]), model_bits=float(full["model_bits"]), accuracy=_accuracy(full, questions)
    )
    ranked = board(entries, level, model={"name": "reference"})
    lines = [HEADING, RULE, _row(["full precision", "**16**", _percent(full), "0", "", "0"])]
    names = {row["recipe"] for row in peers} | set(shown)
    rows = packed | {row["recipe"]: row for row in peers}
    for name in (entry["recipe"] for entry in ranked["entries"] if entry["recipe"] in names):
        row, ranks = rows[name], ranks_of(ranked, name)
        cells = [
            f"`{name}`{'' if name in packed else MARK}",
            f"**{row['stored_bits']}**",
            _percent(row),
            row["kl"],
        ]
        cells += [f"{ranks['accuracy']}/{ranks['kl']}", row["error"]]
        cells.append("".join(_FRONTS[loss] for loss in fronts_of(ranked, name)))
        lines.append(_row(cells))
    return [*lines, _row(["chance", "", chance["accuracy"]])]


def with_table(page: str, lines: Sequence[str]) -> str:
    """Return the page with the table that begins with `HEADING` replaced; raises `InputError` if it has none."""
    before, found, rest = page.partition(f"{HEADING}\n")
    if not found:
        raise InputError(f"the page has no table with the heading {HEADING!r}")
    _, _, after = rest.partition("\n\n")
    return before + "\n".join(lines) + "\n\n" + after


def _row(cells: Sequence[str]) -> str:
    """Return a row of the table, without the empty cells at its end."""
    return re.sub(r"( \|\s*)+$", "", " | ".join(cells))


def _entry(row: Row, questions: int) -> Entry:
    bits = {"nominal": float(row["claimed_bits"]), "stored": float(row["stored_bits"])}
    return Entry.read(
        {
            "recipe": row["recipe"],
            "method": row.get("package", ""),
            "bits": bits | {"entropy": bits["stored"]},
            "model_bits": float(row["model_bits"]),
            "relative_error": float(row["error"]),
            "kl": float(row["kl"]),
            "accuracy": _accuracy(row, questions),
            "seconds": 0,
        }
    )


def _accuracy(row: Row, questions: int) -> dict[str, Accuracy]:
    values = {name: float(row[name]) for name in SETS}
    return {name: Accuracy(n=questions, accuracy=value, ci95=(value, value)) for name, value in values.items()}


def _percent(row: Row) -> str:
    return f"{row['accuracy']}±{row['interval']}"
