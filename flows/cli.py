"""The command line. Each command imports what it needs and no more: `bits` and `inspect` load no orchestrator."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.push import add_push
from flows.quiet import hide_loading_bars, quieten
from flows.reproduce import add_reproduce

DONE, FAILED, BAD_INPUT, GATE_NOT_PASSED = 0, 1, 2, 3

_EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 bad input or usage, 3 a gate was not passed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Bad input is told in one message on stderr. Of any other failure the whole trace is shown, because it is ours to
    mend.
    """
    options = _parser().parse_args(arguments)
    quieten()
    from bivlm.errors import InputError

    if threading.current_thread() is threading.main_thread():
        # As Ctrl-C: what was started is ended in order, the temporary server included.
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    try:
        if getattr(options, "trust_remote_code", None):
            from bivlm.remote_code import trust

            trust(options.trust_remote_code)
        return options.run(options)
    except InputError as error:
        print(f"bivlm {options.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"bivlm {options.command}: interrupted; run it again to go on from where it was", file=sys.stderr)
        return FAILED
    except ConnectionError as error:  # nothing of ours to mend, so no trace
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return DONE
        print(f"bivlm {options.command}: failed: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:
        traceback.print_exc()
        print(f"bivlm {options.command}: failed: {error}", file=sys.stderr)
        return FAILED


def _nobody_reads() -> bool:
    """Whether our output goes to a pipe whose reader has seen enough, as with ``| head``; it is then given up."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bivlm", description="Vision-language models at an honest two bits and below.", epilog=_EXIT_CODES
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    compress = commands.add_parser("compress", help="compress a model, evaluate it and record everything in MLflow")
    compress.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="the full-precision checkpoint")
    compress.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    compress.add_argument("--recipe", required=True, metavar="R", help="name of a shipped recipe, or a YAML file")
    compress.add_argument("--output", required=True, metavar="DIR", help="folder for the packed checkpoint")
    compress.add_argument(
        "--workspace",
        metavar="DIR_OR_URL",
        help="folder or s3://bucket/prefix for finished steps (default: $BIVLM_WORKSPACE or ~/.cache/bivlm/workspace)",
    )
    compress.add_argument("--no-evaluate", action="store_true", help="leave accuracy and divergence out")
    compress.add_argument("--questions", type=int, metavar="N", help="only the first N of every benchmark")
    compress.add_argument(
        "--runner",
        default="threads",
        metavar="R",
        help="threads (default), processes, dask, ray, or a running cluster: dask=tcp://HOST:8786, ray=ray://HOST:10001",
    )
    compress.add_argument("--workers", type=int, metavar="N", help="layers at once (default: cores, at most 4)")
    compress.add_argument("--estimate", action="store_true", help="say what it needs of memory, disk and time; no work")
    compress.add_argument("--no-check", action="store_true", help="try what is said not to fit")
    compress.set_defaults(run=_compress)

    leaderboard = commands.add_parser("leaderboard", help="many recipes on one model, at the bits they store")
    leaderboard.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="the full-precision checkpoint")
    leaderboard.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    leaderboard.add_argument(
        "--recipes", nargs="+", default=["all"], metavar="R", help="shipped names, YAML files; 'all' the shipped ones"
    )
    leaderboard.add_argument("--output", required=True, metavar="DIR", help="folder for checkpoints, table and figure")
    leaderboard.add_argument("--workspace", metavar="DIR_OR_URL", help="as for compress")
    leaderboard.add_argument("--questions", type=int, metavar="N", help="only the first N of every benchmark")
    leaderboard.add_argument("--finish", action="store_true", help="tune scales and levels of every packed model by KL")
    leaderboard.set_defaults(run=_leaderboard)

    sweep = commands.add_parser("sweep", help="drop tokens by layer and share, and see what that costs")
    sweep.add_argument(
        "--model", required=True, nargs="+", metavar="DIR_OR_HUB_ID", help="checkpoints, packed or not, side by side"
    )
    sweep.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    sweep.add_argument("--task", required=True, nargs="+", metavar="TASK", help="reference:SET or vqa:FOLDER")
    sweep.add_argument("--output", required=True, metavar="DIR", help="folder for tables and figures")
    sweep.add_argument("--places", nargs="+", metavar="PLACE", help="vision, input, language, text, joint")
    sweep.add_argument(
        "--layers", nargs="+", metavar="J", help="first layers without the dropped tokens; or PLACE=J,J,... for some"
    )
    sweep.add_argument("--shares", nargs="+", type=_share, metavar="S", help="dropped, for example 0.5 or 50%%")
    sweep.add_argument(
        "--masses", nargs="+", type=_share, metavar="M", help="of attention kept, adaptively; at language"
    )
    sweep.add_argument("--scores", nargs="+", metavar="SCORE", help="attention, last_token, divprune, ...")
    sweep.add_argument("--questions", type=int, metavar="N", help="only the first N of every task")
    sweep.add_argument("--modules", metavar="FILE", type=Path, help="as for inspect")
    sweep.add_argument("--workspace", metavar="DIR_OR_URL", help="as for compress")
    sweep.set_defaults(run=_sweep)

    redundancy = commands.add_parser("redundancy", help="how many image tokens a model can do without")
    redundancy.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="a checkpoint, packed or not")
    redundancy.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    redundancy.add_argument("--task", required=True, nargs="+", metavar="TASK", help="reference:SET or vqa:FOLDER")
    redundancy.add_argument(
        "--tolerance", required=True, type=_share, metavar="T", help="accuracy that may be lost, for example 1%%"
    )
    redundancy.add_argument("--place", default="language", metavar="PLACE", help="as for sweep (default: %(default)s)")
    redundancy.add_argument("--layers", nargs="+", type=int, metavar="J", help="each on its own")
    redundancy.add_argument("--score", metavar="SCORE", help="as for sweep")
    redundancy.add_argument("--questions", type=int, metavar="N", help="only the first N of every task")
    redundancy.add_argument("--modules", metavar="FILE", type=Path, help="as for inspect")
    redundancy.add_argument("--workspace", metavar="DIR_OR_URL", help="as for compress")
    redundancy.add_argument("--json", action="store_true", help="print one JSON object")
    redundancy.set_defaults(run=_redundancy)

    evaluate = commands.add_parser("evaluate", help="accuracy of a checkpoint, packed or not, on one task")
    evaluate.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID")
    evaluate.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    evaluate.add_argument(
        "--task",
        required=True,
        metavar="TASK",
        help="reference:SET, vqa:FOLDER, or mme:, mmmu:, scienceqa:, vizwiz:hub",
    )
    evaluate.add_argument("--against", metavar="DIR", type=Path, help="full precision: what is lost against it")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    evaluate.add_argument("--batch-size", type=int, metavar="N", help="questions that are answered together")
    evaluate.add_argument("--pruned", action="store_true", help="drop tokens as the checkpoint says it may")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_evaluate)

    inspect = commands.add_parser("inspect", help="components, linear layers and weight statistics of a checkpoint")
    inspect.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID")
    inspect.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    said = inspect.add_mutually_exclusive_group()
    said.add_argument("--recipe", metavar="NAME_OR_FILE", help="whose 'modules' name the model's parts")
    said.add_argument(
        "--modules", metavar="FILE", type=Path, help="YAML: names of modules by vision, adaptor, language"
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)

    bits = commands.add_parser("bits", help="bits a weight of a checkpoint: nominal, entropy and stored")
    bits.add_argument("folder", metavar="DIR", type=Path)
    bits.add_argument("--json", action="store_true", help="print one JSON object")
    bits.set_defaults(run=_bits)
    lineage = commands.add_parser(
        "lineage", help="where a packed checkpoint comes from, and whether what is stored is still that"
    )
    lineage.add_argument("model", metavar="DIR_OR_VERSION", help="a folder, or NAME/VERSION or NAME@ALIAS in MLflow")
    lineage.add_argument("--workspace", metavar="DIR_OR_URL", help="where its steps are (default: as it was recorded)")
    lineage.add_argument("--json", action="store_true", help="print one JSON object")
    lineage.set_defaults(run=_lineage)

    push, reproduce = add_push(commands), add_reproduce(commands)
    for command in (compress, leaderboard, sweep, redundancy, evaluate, inspect, bits, lineage, push, reproduce):
        command.add_argument(
            "--trust-remote-code",
            action="append",
            metavar="DIR_OR_HUB_ID",
            help="let the code that comes with this model run; for workers: $BIVLM_TRUST_REMOTE_CODE",
        )
    return parser


def _compress(options: argparse.Namespace) -> int:
    from bivlm.recipe import load_recipe
    from flows.runners import parse_runner

    load_recipe(options.recipe)  # a mistake in it is told before anything is started
    parse_runner(options.runner, options.workers)
    asked = {
        "model": options.model,
        "recipe": options.recipe,
        "output": options.output,
        "revision": options.revision,
        "workspace": options.workspace,
        "evaluate": not options.no_evaluate,
        "questions": options.questions,
        "runner": options.runner,
        "workers": options.workers,
    }
    if options.estimate:
        from flows.estimates import told
        from flows.tables import print_estimate

        found = told(**asked)
        print_estimate(found)
        return BAD_INPUT if found["refused"] else DONE
    print("starting: Prefect, MLflow and the model's anatomy", file=sys.stderr)
    from flows.compress import compress_flow
    from flows.local import temporary_server
    from flows.tables import print_compression

    hide_loading_bars()
    with temporary_server():
        result = compress_flow(**asked, check=not options.no_check)
    print_compression(result)
    return DONE


def _leaderboard(options: argparse.Namespace) -> int:
    from bivlm.recipe import load_recipe, shipped_recipes

    recipes = [name for given in options.recipes for name in (shipped_recipes() if given == "all" else [given])]
    for name in recipes:
        load_recipe(name)
    print("starting: Prefect, MLflow and the model's anatomy", file=sys.stderr)
    from flows.leaderboard import leaderboard_flow
    from flows.local import temporary_server
    from flows.tables import print_board

    hide_loading_bars()
    with temporary_server():
        result = leaderboard_flow(
            model=options.model,
            recipes=recipes,
            output=options.output,
            revision=options.revision,
            workspace=options.workspace,
            questions=options.questions,
            finish=options.finish,
        )
    print_board(result["board"])
    print(f"board: {result['output']} (board.json, board.md, board.csv, board.svg)")
    print(f"fingerprint: {result['fingerprint']}")
    return DONE


def _sweep(options: argparse.Namespace) -> int:
    given = {key: getattr(options, key) for key in ("places", "layers", "shares", "scores", "masses", "questions")}
    from flows.inspection import modules_from

    modules = modules_from(None, options.modules)
    print("starting: Prefect and the models", file=sys.stderr)
    from flows.local import temporary_server
    from flows.pruning import parse_sweep, sweep_flow
    from flows.tables import print_sweep

    sweep = {key: value for key, value in given.items() if value is not None}
    if "layers" in sweep:
        sweep["layers"] = _layers(sweep["layers"])
    parse_sweep(sweep)
    hide_loading_bars()
    with temporary_server():
        result = sweep_flow(
            models=options.model,
            benchmarks=options.task,
            sweep=sweep,
            output=options.output,
            revision=options.revision,
            workspace=options.workspace,
            modules=modules,
        )
    print_sweep(result)
    print(f"sweep: {result['output']} (sweep.csv, tables/, losses.svg, accuracy.svg)")
    return DONE


def _redundancy(options: argparse.Namespace) -> int:
    layers = options.layers or ([None] if options.place == "input" else [1])
    score = {} if options.score is None else {"score": options.score}
    cells = [{"place": options.place, "layer": layer, **score} for layer in layers]
    from flows.inspection import modules_from

    modules = modules_from(None, options.modules)
    print("starting: Prefect and the model", file=sys.stderr)
    from flows.local import temporary_server
    from flows.pruning import redundancy_flow
    from flows.tables import print_redundancy

    hide_loading_bars()
    with temporary_server():
        results = redundancy_flow(
            model=options.model,
            benchmarks=options.task,
            tolerance=100 * options.tolerance,
            cells=cells,
            questions=options.questions,
            revision=options.revision,
            workspace=options.workspace,
            modules=modules,
        )
    if options.json:
        _print_json({"model": options.model, "tolerance": 100 * options.tolerance, "found": results})
    else:
        print_redundancy(results)
    return DONE


def _layers(given: Sequence[str]) -> list[int] | dict[str, list[int]]:
    """Layers for all places, ``1 2``, or by place, ``vision=1 language=1,2``."""
    from bivlm.errors import InputError

    try:
        if any("=" in text for text in given):
            by_place = (text.split("=", 1) for text in given)
            return {place: [int(layer) for layer in layers.split(",")] for place, layers in by_place}
        return [int(text) for text in given]
    except ValueError:
        raise InputError(f"--layers {' '.join(given)}: expected numbers, or PLACE=NUMBER,NUMBER,... by place") from None


def _share(text: str) -> float:
    """A share as a number, or in percent with its sign."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share from 0 up to but not 1, such as 0.25 or 25%")
    return share


def _evaluate(options: argparse.Namespace) -> int:
    from bivlm.checkpoint import resolve_model
    from flows.evaluate import evaluate_folders

    hide_loading_bars()
    given = {key: getattr(options, key) for key in ("limit", "against", "pruned", "batch_size")}
    record = evaluate_folders(resolve_model(options.model, options.revision).folder, options.task, **given)
    record["model"] = options.model
    if options.json:
        _print_json(record)
    else:
        from flows.tables import print_evaluation

        print_evaluation(record)
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    from bivlm.checkpoint import resolve_model
    from bivlm.inspection import inspect
    from flows.inspection import modules_from, print_inspection

    folder = resolve_model(options.model, options.revision).folder
    found = inspect(folder, modules=modules_from(options.recipe, options.modules))
    if options.json:
        _print_json(found)
    else:
        print_inspection(found)
    return DONE


def _bits(options: argparse.Namespace) -> int:
    from bivlm.bits import bits_of

    bits = bits_of(options.folder)
    if options.json:
        _print_json(bits)
    else:
        from flows.tables import print_bits

        print_bits(bits)
    return DONE


def _lineage(options: argparse.Namespace) -> int:
    import tempfile

    from bivlm.lineage import find_workspace, read_lineage, verify

    with tempfile.TemporaryDirectory() as place:
        folder = Path(options.model)
        if not folder.is_dir():
            folder = _downloaded(options.model, options.workspace, Path(place))
        lineage = read_lineage(folder)
        findings = verify(lineage, folder, find_workspace(options.workspace or lineage.workspace))
    if options.json:
        _print_json({"lineage": lineage.model_dump(mode="json"), "findings": [vars(finding) for finding in findings]})
    else:
        from flows.tables import print_lineage

        print_lineage(options.model, lineage, findings)
    return GATE_NOT_PASSED if any(finding.state == "broken" for finding in findings) else DONE


def _downloaded(version: str, workspace: str | None, place: Path) -> Path:
    """A registered version's checkpoint. A folder needs no MLflow, which takes seconds to import."""
    from bivlm.errors import InputError
    from bivlm.stores.location import default_workspace
    from bivlm.workspace import Workspace
    from tasks.tracking.lookup import VERSION_FORMS, download_version, is_version

    if not is_version(version):
        raise InputError(f"{version!r}: no such folder, and not a model version; expected DIR, {VERSION_FORMS}")
    return download_version(version, Workspace.open(workspace or default_workspace()), place)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
