"""The paper's figures and ours in one table, at the bits that each column stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bivlm.reports.markdown_table import markdown_table
from bivlm.reports.paper_tables.published import Published
from bivlm.reports.paper_tables.recipe_sets import FULL_PRECISION, OURS

SCORES = {
    "mme/perception": "MME perception",
    "mme/cognition": "MME cognition",
    "scienceqa/accuracy": "ScienceQA-IMG",
    "mmmu/accuracy": "MMMU",
    "vizwiz/accuracy": "VizWiz-VQA",
}
_NONE = "–"


def scores_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the table's scores from evaluations by task (``mme:hub``, ...), each with its ``metrics``; drop others."""
    by_kind = {task.partition(":")[0]: found["metrics"] for task, found in evaluation.items()}
    wanted = {score: score.split("/") for score in SCORES}
    return {
        score: by_kind[kind][metric]
        for score, (kind, metric) in wanted.items()
        if kind in by_kind and metric in by_kind[kind]
    }


def as_table(paper: Published, table: str, columns: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row per column of the paper's `table`, then per column of ours that it does not have.

    `columns` gives what was measured, by name: ``scores`` (of `scores_of`), and for all but full precision
    ``stored_bits`` of the linears that were packed, ``model_bits`` of the whole model, ``nominal_bits`` as the method's
    paper counts, and ``kl``. The result has these, and each score twice: measured, and as published.
    """
    rows = []
    for column in (*paper.columns[table], *OURS[table]):
        measured = columns.get(column, {})
        row: dict[str, Any] = {"column": column}
        row |= {key: measured.get(key) for key in ("nominal_bits", "stored_bits", "model_bits", "kl")}
        for score, label in SCORES.items():
            row[label] = measured.get("scores", {}).get(score)
            row[f"{label}, published"] = paper.figures[table].get(score, {}).get(column)
        row["failed"] = measured.get("failed")
        rows.append(row)
    return pd.DataFrame(rows)


def as_markdown(
    paper: Published,
    tables: Sequence[str],
    columns: Mapping[str, Mapping[str, Any]],
    measured_on: str = "held-out samples",
) -> str:
    """Return the tables as Markdown: each score as measured, and behind it in brackets as published.

    `measured_on` names the samples of the KL. The ``warnings`` of full precision stand above the tables.
    """
    lines = [f"# {paper.id}: the paper's tables", ""]
    lines += [
        "Scores are measured on the stored checkpoints; in brackets as published (arXiv 2509.18763v1). Bits per weight "
        "of the linears that a column packs, as the method's paper counts them (nominal) and as bytes in the files "
        "(stored); of the whole model's files (model). KL to full precision in nats per token, on "
        f"{measured_on}.",
        "",
    ]
    for said in columns.get(FULL_PRECISION, {}).get("warnings", ()):
        lines += [f"Warning: {said}.", ""]
    for table in tables:
        frame = as_table(paper, table, columns)
        headings = ["column", "nominal", "stored", "model", "KL", *SCORES.values()]
        rows = map(_cells, frame.to_dict("records"))
        lines += [f"## {table}", "", *markdown_table(headings, rows, left=("column",))]
        lines += [
            "",
            *(f"- {row.column}: {row.failed}" for row in frame.itertuples() if isinstance(row.failed, str)),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    bits = [_number(row[key], ".3f") for key in ("nominal_bits", "stored_bits", "model_bits", "kl")]
    name = "full precision" if row["column"] == FULL_PRECISION else row["column"]
    scores = [f"{_number(row[each], '.2f')} ({_number(row[f'{each}, published'], '.2f')})" for each in SCORES.values()]
    return [name, *bits, *scores]


def _number(value: Any, form: str) -> str:
    return _NONE if value is None or pd.isna(value) else format(value, form)
