"""However narrow the terminal, every figure of a table is printed whole."""

import random
import re
import sys
from collections import Counter

import pytest
from rich.table import Column, Table

from flows.cli import console as tables
from flows.cli import demo
from flows.cli.stacking import show

WIDTHS = [20, 40, 57, 60, 80, 100, 120]


@pytest.fixture(params=["a terminal", "a pipe"])
def columns(request, monkeypatch):
    """A function that sets the width of stdout."""

    def of(width: int) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: request.param == "a terminal")

    return of


def plain(capsys) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def drawn(seed: int) -> tuple[Table, list[str]]:
    """A table of random figures and names, and its figures."""
    draw = random.Random(seed)
    figures, headings = [], draw.randint(1, 9)
    table = Table(
        *(
            Column(f"head-\ning{place}", overflow=draw.choice(["fold", "ellipsis"]), no_wrap=draw.random() < 0.3)
            for place in range(headings)
        ),
        title=draw.choice([None, "the title of 12,345 questions"]),
        box=draw.choice([None, tables.Table().box]),
    )
    for _ in range(draw.randint(0, 6)):
        cells = []
        for _ in range(headings):
            word = draw.choice([f"{draw.uniform(-1e4, 1e4):,.3f}", f"{draw.randrange(10**12)}", f"{draw.random():.2e}"])
            words = [word, draw.choice(["%", "GB", "of the model"]), word] if draw.random() < 0.4 else [word]
            figures += [each for each in words if any(map(str.isdigit, each))]
            cells.append(" ".join(words))
        table.add_row(*cells)
    return table, figures + (["12,345"] if table.title else [])


@pytest.mark.parametrize("width", WIDTHS)
def test_no_figure_is_cut(width, columns, capsys):
    columns(width)
    for seed in range(60):
        table, figures = drawn(seed)
        show(table)
        printed = plain(capsys)
        assert Counter(figures) <= Counter(printed.split()), (seed, printed)
        assert max((len(line.rstrip()) for line in printed.splitlines()), default=0) <= width, seed


BITS = {"weights": 1_234_567_890, "nominal": 2.0625, "entropy": 1.98765, "stored": 2.28125}
LOSS = {"loss": 1.25, "low": -0.5, "high": 3.125, "worse": 31, "better": 17, "p_value": 0.0421}
EVALUATION = {"metrics": {"accuracy": 81.25}, "ci95": [76.5, 85.75], "intervals": {"yes/no": (70.5, 80.25)}}


def bits(_):
    by_component = dict.fromkeys(("vision", "adaptor", "language"), BITS)
    tables.print_bits({"linears": BITS, "by_component": by_component, "tables": None, "model": BITS})
    return ["1,234,567,890"] * 5 + ["2.062"] * 5 + ["1.988"] * 5 + ["2.281"] * 5


def evaluation(_):
    against = {"model": "llava", "metrics": {"accuracy": 82.5}}
    record = {"model": "packed", "task": "mme:all", "n": 2374, "against": against, "loss": LOSS, "outcomes": "o"}
    tables.print_evaluation(EVALUATION | record)
    return ["81.25", "76.50", "85.75", "70.50", "80.25", "82.50", "1.25", "(-0.50", "3.12)", "31,", "0.042)", "(2374"]


def estimate(_):
    stage = {"memory": 12.5e9, "gpu": 3.25e9, "disk": 4.75e9}
    stages = [{"stage": name, "seconds": 754.0, **stage} for name in ("block inputs", "layers of the model")]
    tables.print_estimate({"stages": stages, "memory": 99.5e9, "disk": 88.5e9, "refused": None})
    return ["12.5", "12.5", "3.2", "3.2", "4.8", "4.8", "99.5", "88.5", "12.6", "12.6"]


def demonstration(_):
    result = {
        "bits": {"linears": BITS, "model": BITS},
        "evaluation": {
            "full_precision": {f"reference:{name}": EVALUATION | {"n": 250} for name in ("perception", "cognition")},
            "packed": {f"reference:{name}": EVALUATION for name in ("perception", "cognition")},
            "kl": 0.123456,
            "chance": {f"reference:{name}": 50.0 for name in ("perception", "cognition")},
        },
        "seconds": 31.25,
        "peak_memory_bytes": 812.4e6,
    }
    show(demo._table({"bivlm": result, "bivlm-paper": result}))
    return ["81.2"] * 6 + ["0.123"] * 2 + ["2.062"] * 2 + ["1.988"] * 2 + ["2.281"] * 2 + ["31.2"] * 2 + ["812"] * 2


def inspection(tiny_llava):
    from bivlm.reports.inspection import inspect

    found = inspect(tiny_llava)
    tables.print_inspection(found)
    return [f"{found['parameters']:,}", *(f"{part['parameters']:,}" for part in found["parts"])]


def made_of(_):
    row = {"version": "llava/12345", "standing": "champion", "revision": None, "sha256": "ab12" * 16}
    row |= {"recipe": "bivlm-6-hessian-feedback-finish", "trigger": "event 0123456789abcdef0123456789abcdef"}
    tables.print_made_of("llava", [row | {"bits": "2.28125", "accuracy": "81.25", "gate": "passed"}])
    return ["llava/12345", "2.28125", "81.25", "0123456789abcdef0123456789abcdef"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("table", [bits, evaluation, estimate, demonstration, inspection, made_of])
def test_the_tables_of_the_commands_keep_their_figures(table, width, columns, capsys, tiny_llava):
    columns(width)
    figures = table(tiny_llava)
    printed = plain(capsys)
    assert Counter(figures) <= Counter(printed.split()), printed
