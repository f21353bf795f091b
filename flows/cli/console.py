"""Print the results of commands for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from flows.cli.stacking import show

if TYPE_CHECKING:
    from bivlm.evaluation.asking import Asked
    from bivlm.reports.lineage import Finding, Lineage


def print_bits(bits: dict[str, Any]) -> None:
    """Print the result of `bivlm.reports.bits.bits_of`."""
    from bivlm.reports.bits import named_parts

    table = Table("", "weights", "nominal", "entropy", "stored", title="bits per weight")
    for name, part in named_parts(bits):
        shown = [_bits(part.get(key)) for key in ("nominal", "entropy", "stored")]
        _row(table, name, f"{part['weights']:,}", *shown)
    show(table)


def print_inspection(found: dict[str, Any]) -> None:
    """Print the result of `bivlm.reports.inspection.inspect`: the parts that add up to the whole, then every tensor."""
    quantization = found["quantization"]
    parts = Table(
        Column("component", footer="all"),
        Column("kind", overflow="fold"),
        title=f"{found['model_type']}{f', packed by {quantization}' if quantization else ''}",
        box=box.SIMPLE,
        show_footer=True,
        pad_edge=False,
    )
    for heading, footer in (
        ("tensors", sum(part["tensors"] for part in found["parts"])),
        ("parameters", f"{found['parameters']:,}"),
        ("share", _percent(sum(part["share"] for part in found["parts"]))),
    ):
        parts.add_column(heading, str(footer), justify="right", no_wrap=True)
    parts.add_column("", no_wrap=True)
    before = None
    for part in found["parts"]:
        component = part["component"]
        if before not in (None, component):
            parts.add_section()
        cells = (f"{part['tensors']:,}", f"{part['parameters']:,}", _percent(part["share"]), part["state"])
        _row(parts, "" if component == before else component, part["kind"], *cells)
        before = component
    show(parts)

    linears = Table("linear", "component", "shape", "dtype", "mean", "std", "kurtosis", "KL to Gaussian", box=None)
    for linear in found["linears"]:
        figures = [_figure(linear[key], ".4g") for key in ("mean", "std", "kurtosis", "kl_gaussian")]
        dtype = f"{linear['dtype']}, packed" if linear["packed"] else linear["dtype"]
        _row(linears, linear["name"], linear["component"], _shape(linear["shape"]), dtype, *figures)
    print_whole(linears)

    tensors = Table("left alone", "what it is", "shape", "dtype", "share", box=None)
    for tensor in found["left_alone"]["tensors"]:
        cells = (_shape(tensor["shape"]), tensor["dtype"], _percent(tensor["share"]))
        _row(tensors, tensor["name"], tensor["kind"], *cells)
    print()
    print_whole(tensors)


def print_evaluation(record: dict[str, Any]) -> None:
    """Print the record of `bivlm evaluate --json` as a table."""
    table = Table("metric", "value", title=f"{record['model']} on {record['task']} ({record['n']} questions)")
    for name, value in record["metrics"].items():
        _row(table, name, f"{value:.2f}")
    low, high = record["ci95"]
    _row(table, "accuracy, 95 % interval", _interval(low, high, 2))
    for name, (low, high) in record.get("intervals", {}).items():
        _row(table, f"{name}, 95 % interval", _interval(low, high, 2))
    if record.get("chance") is not None:
        _row(table, "chance", f"{record['chance']:.2f}")
    if before := record.get("against"):
        loss = record["loss"]
        _row(table, f"accuracy of {before['model']}", f"{before['metrics']['accuracy']:.2f}")
        _row(table, "loss on the same questions", f"{loss['loss']:.2f} ({loss['low']:.2f} to {loss['high']:.2f})")
        _row(table, "worse, better", f"{loss['worse']}, {loss['better']} (p = {loss['p_value']:.2g})")
    show(table)
    if source := record.get("source"):
        print(f"questions: {source['data_set']}, {source['split']}, revision {source['revision'] or 'of the folder'}")
    _warn_at_chance(record.get("at_chance", []))
    print(f"outcomes: {record['outcomes']}")


def print_asked(found: Mapping[str, Asked]) -> None:
    """Print answers of checkpoints, by name, and what each took."""
    names = [Path(name).name for name in found]
    headings = names if len(set(names)) == len(names) else list(found)
    table = Table("", *map(escape, headings), box=box.SIMPLE, pad_edge=False)
    for column in table.columns[1:]:
        column.overflow = "fold"
    rows = {
        "answer": lambda asked: asked.answer,
        "tokens": lambda asked: str(asked.tokens),
        "tokens a second": lambda asked: _figure(asked.tokens_a_second, ".1f"),
        "first token": lambda asked: f"{asked.first:.2f} s",
        "loading": lambda asked: f"{asked.loading:.1f} s",
        "memory at most": lambda asked: _size(asked.memory),
        "of it for libraries": lambda asked: _size(asked.before),
        "packed weights": lambda asked: asked.dequantize or "none",
        "activations": lambda asked: asked.activations if asked.dequantize == "packed" else asked.dtype,
        "computed in": lambda asked: f"{asked.dtype}, {asked.device}, {asked.threads} threads",
    }
    for name, shown in rows.items():
        _row(table, name, *map(shown, found.values()))
    show(table)


def print_estimate(found: dict[str, Any]) -> None:
    """Print the result of `flows.estimates.estimate_compression`."""
    table = Table("stage", "memory", "GPU memory", "on disk", "time", title="about, on this machine")
    for each in found["stages"]:
        sizes = (_size(each[key]) for key in ("memory", "gpu", "disk"))
        _row(table, each["stage"], *sizes, "" if each["seconds"] is None else _duration(each["seconds"]))
    _row(table, "all", _size(found["memory"]), "", _size(found["disk"]), "")
    show(table)
    print("All: the largest stage with the libraries, and what is left on disk. Stages without a time were not timed.")
    if found["refused"]:
        print(f"It does not fit: {found['refused']}")


def print_compression(result: dict[str, Any]) -> None:
    """Print what `flows.compress.compress_flow` returned."""
    print_bits(result["bits"])
    if found := result["evaluation"]:
        table = Table("accuracy", "full precision", "packed", "95 % interval", "loss, paired", title="evaluation")
        for benchmark, packed in found["packed"].items():
            before = found["full_precision"][benchmark]["metrics"]["accuracy"]
            low, high = packed["ci95"]
            loss = found["loss"][benchmark]
            lost = f"{loss['loss']:.1f} ({loss['low']:.1f} to {loss['high']:.1f})"
            after = f"{packed['metrics']['accuracy']:.1f}"
            _row(table, benchmark, f"{before:.1f}", after, _interval(low, high), lost)
            for name, (low, high) in packed.get("intervals", {}).items():
                both = (found[role][benchmark]["metrics"][name] for role in ("full_precision", "packed"))
                _row(table, f"  {name}", *(f"{score:.1f}" for score in both), _interval(low, high), "")
        show(table)
        print(f"KL to full precision: {found['kl']:.4f} nats per token, on {found['measured_on']}")
        apart = {"short": found.get("kl_short_replies"), "long": found.get("kl_long_replies")}
        if None not in apart.values():
            print("  of " + ", ".join(f"{kind} replies {kl:.4f}" for kind, kl in apart.items()))
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    if gate := result["gate"]:
        for reason in gate["reasons"]:
            print(f"gate: {reason}")
        print(f"gate {'passed' if gate['passed'] else 'NOT PASSED'}: {gate['said']}")
    tracked = result["mlflow"]
    print(f"checkpoint: {result['output']}")
    print(f"report: {result['page']}")
    print(f"MLflow: model {tracked['registered_model']} version {tracked['version']}, run {tracked['run_id']}")
    print(f"to see it: {tracked['ui']}, then {tracked['page']}")


def print_board(board: dict[str, Any]) -> None:
    """Print a board of `bivlm.reports.leaderboard.ranking.board` in 100 columns.

    Of more than four benchmarks only the mean is shown; the files have all columns.
    """
    from bivlm.reports.leaderboard.ranking import not_above_chance
    from bivlm.reports.leaderboard.tables import SHANNON, as_cells, explanation

    headings, rows = as_cells(board)
    tasks = range(headings.index("accuracy") + 1, headings.index("KL"))
    many = len(tasks) > 4
    kept = [place for place in range(len(headings)) if headings[place] != SHANNON and not (many and place in tasks)]
    short = {"claimed": "claim-\ned", "accuracy": "accu-\nracy", "rank A/K": "rank\nA/K"}
    model = board["model"].get("name") or board["model"].get("id") or "the model"
    table = Table(title=f"leaderboard of {model}", box=None, padding=(0, 1, 0, 0))
    for place in kept:
        heading = headings[place]
        if place in tasks and len(heading) > 5:
            heading = f"{heading[:4]}."
        table.add_column(short.get(heading, heading), justify="left" if heading == "recipe" else "right", no_wrap=True)
    for row in rows:
        number, recipe, *cells = (row[place].replace(" ± ", "±") for place in kept)
        _row(table, number, recipe if many or not tasks else "\n".join(wrap(recipe, 20)), *cells)  # at its hyphens
    show(table, piped=100)
    asked = ", ".join(f"{n:,} of {task}" for task, n in board["questions"].items())
    said = [f"Questions: {asked}. {explanation(board)}", *(f"warning: {each}" for each in not_above_chance(board))]
    said += [f"not on the board: {failure['recipe']}: {failure['reason']}" for failure in board["failed"]]
    for line in said:
        Console().print(escape(line), highlight=False)


def print_reproduction(found: dict[str, Any]) -> None:
    """Print the result of `flows.reproduction.reproduce_flow`: every score as measured and as published."""
    from bivlm.reports.paper_tables.published import published
    from bivlm.reports.paper_tables.recipe_sets import FULL_PRECISION
    from bivlm.reports.paper_tables.report import SCORES, as_table

    for name in found["tables"]:
        table = Table("", "stored bits", *SCORES.values(), title=f"{found['id']}: {name}, measured / published")
        for row in as_table(published(found["model"]), name, found["columns"]).to_dict("records"):
            pairs = ((row[score], row[f"{score}, published"]) for score in SCORES.values())
            shown = (" / ".join(_figure(None if value != value else value, ".2f") for value in pair) for pair in pairs)
            _row(table, row["column"], _bits(row["stored_bits"]), *shown)
        show(table)
    for said in found["columns"].get(FULL_PRECISION, {}).get("warnings", ()):
        print(f"warning: {said}")
    print(f"tables: {found['output']} (reproduction.md, .json, a .csv each)")


def print_sweep(result: dict[str, Any]) -> None:
    """Print what `flows.pruning.sweep_flow` returned: one grid per model, place and score, over all questions."""
    from bivlm.reports.pruning_tables import as_table, grid

    table = as_table(result["rows"])
    task = "all" if (table["task"] == "all").any() else table["task"].iloc[0]
    for (model, place, score), _ in table[table["task"] == task].groupby(["model", "place", "score"], sort=False):
        level = result["baselines"][model][task]
        wide = grid(table, model, task, place, score)
        print(f"{model}: {place}, {score}; accuracy in percent, without pruning {level:.1f}")
        shown = Table("from layer", *wide.columns, box=None)
        for layer, accuracies in wide.iterrows():
            _row(shown, layer, *(_figure(None if value != value else value, ".1f") for value in accuracies))
        show(shown)
    _print_adaptive(result["adaptive"])
    _warn_at_chance(result["at_chance"])


def _print_adaptive(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    print("keeping a share of the attention, and a fixed share of as many tokens; accuracy lost in percentage points")
    shown = Table("model", "from layer", "score", "mass", "kept", "adaptive", "fixed", "gain", box=None)
    for row in rows:
        losses = [
            f"{row[key]:.1f} ({row[f'{key}_low']:.1f} to {row[f'{key}_high']:.1f})" for key in _COMPARED if key in row
        ]
        mass, kept = f"{100 * row['mass']:g} %", f"{100 * row['kept_image']:.1f} %"
        _row(shown, row["model"], row["layer"], row["score"], mass, kept, *losses)
    print_whole(shown)


_COMPARED = ("adaptive", "fixed", "gain")


def print_redundancy(results: list[dict[str, Any]]) -> None:
    """Print what `flows.pruning.redundancy_flow` returned."""
    for found in results:
        layer = "" if found["layer"] is None else f" from layer {found['layer']}"
        print(f"{found['task']}, {found['place']}{layer}: {found['in_words']}")
        _warn_at_chance(found["at_chance"])
        shown = Table("dropped", "accuracy lost", "95 % interval", "worse", "better", box=None)
        for share, loss in found["losses"].items():
            interval = _interval(loss["low"], loss["high"])
            _row(shown, f"{100 * share:g} %", f"{loss['loss']:.1f}", interval, loss["worse"], loss["better"])
        show(shown)


_MARKS = {"holds": "[green]holds[/]", "broken": "[bold red]BROKEN[/]", "not checked": "[yellow]not checked[/]"}


def print_lineage(name: str, lineage: Lineage, findings: list[Finding]) -> None:
    """Print the chain from the base model to the packed files, then what was found of each link."""
    chain = Table("", Column(overflow="fold"), title=f"lineage of {name}", show_header=False)  # hashes whole
    base, code = lineage.base_model, lineage.code
    commit = f", commit {code['commit']}{' (changed)' if code.get('changed') else ''}" if "commit" in code else ""
    calibration = lineage.steps.get(lineage.calibration)
    drawn = calibration.identity.get("recipe") if calibration else None
    samples = drawn if isinstance(drawn, dict) else {}
    stages = Counter(stage for steps in lineage.layers.values() for stage in steps)
    for name, value in (
        ("base model", f"{base.id}, revision {base.revision or 'none (a folder)'}\nsha256 {base.sha256}"),
        ("recipe", f"{lineage.recipe.get('name')}\nsha256 {lineage.recipe_sha256}"),
        ("calibration", _listed(samples)),
        ("layers", ", ".join(f"{count} {stage}" for stage, count in stages.items()) + " steps"),
        ("packed", f"sha256 {lineage.packed.sha256}"),
        ("evaluated", "\n".join(lineage.evaluations) or "no"),
        ("recorded", f"{lineage.created} by bivlm {code['version']}{commit}"),
        ("asked for", lineage.trigger or "not recorded"),
        ("on", _listed(lineage.hardware, "\n")),
        ("with", _listed(lineage.packages)),
        ("in MLflow", _listed(lineage.tracking, "\n")),
    ):
        _row(chain, name, value)
    show(chain)
    found = Table("checked", "", Column("what was found", overflow="fold"))
    for finding in findings:
        found.add_row(finding.subject, _MARKS[finding.state], escape(finding.detail))
    show(found)


def print_version(found: dict[str, Any]) -> None:
    """Print the result of `tasks.tracking.pages.audit_version`."""
    table = Table("", "", title=f"{found['version']}: {found['standing']}", show_header=False)
    for key, value in found["tags"].items():
        _row(table, key, value)
    _row(table, "run in MLflow", found["run"])
    for move in found["moves"]:
        said = f"{move['when']} by {move['who']}: {move['why']}"
        _row(table, f"champion, {move['from'] or 'none'} to {move['to']}", said)
    print_whole(table)


def print_made_of(base: str, rows: list[dict[str, Any]]) -> None:
    """Print the result of `tasks.tracking.pages.audit_base`."""
    table = Table("version", "", "revision", "recipe", "asked for", "bits", "accuracy", "gate", title=f"made of {base}")
    for row in rows:
        shown = row | {"revision": (row["revision"] or f"sha256 {row['sha256']}")[:19]}
        keys = ("version", "standing", "revision", "recipe", "trigger", "bits", "accuracy", "gate")
        _row(table, *("-" if shown[key] is None else shown[key] for key in keys))
    print_whole(table)


def _listed(values: Mapping[str, Any], separator: str = ", ") -> str:
    return separator.join(f"{key} {value}" for key, value in values.items())


def _interval(low: float, high: float, places: int = 1) -> str:
    return f"{low:.{places}f} to {high:.{places}f}"


def _warn_at_chance(found: list[dict[str, Any]]) -> None:
    from bivlm.evaluation.chance import AtChance

    for each in found:
        print(f"warning: {AtChance(**each)}")


def _bits(value: float | None) -> str:
    return _figure(value, ".3f")


def _size(nbytes: float) -> str:
    if not nbytes:
        return ""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(share: float) -> str:
    """Return the share with two places; what is there is never shown as nothing."""
    return "< 0.01 %" if 0 < share < 0.00005 else f"{100 * share:.2f} %"


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _row(table: Table, *cells: Any) -> None:
    # Names of tensors and folders may hold brackets, which rich would read as markup.
    table.add_row(*(escape(str(cell)) for cell in cells))


def print_whole(table: Table) -> None:
    """Print one line per row where the output is no terminal: names and hashes are there to be copied."""
    show(table, piped=1000)


def in_short(result: dict[str, Any]) -> str:
    """Return one line for a log of what `flows.compress.compress_flow` returned."""
    bits, version = result["bits"], "{registered_model}/{version}".format_map(result["mlflow"])
    said = [
        f"{version}: {bits['linears']['stored']:.3f} stored bits per linear weight",
        f"{bits['model']['stored']:.2f} of the whole model",
    ]
    if found := result["evaluation"]:
        for benchmark, packed in found["packed"].items():
            before = found["full_precision"][benchmark]["metrics"]["accuracy"]
            said.append(f"{benchmark} {packed['metrics']['accuracy']:.1f} of {before:.1f} %")
        said.append(f"KL {found['kl']:.4f} on {found['measured_on']}")
        if at_chance := found["at_chance"]:
            said.append(f"full precision not above chance on {', '.join(each['task'] for each in at_chance)}")
    if gate := result["gate"]:
        said.append(f"gate {'passed' if gate['passed'] else 'not passed'}")
    return ", ".join(said)
