"""What MLflow's pages say: of a registered version, of its model, of the base model; and the links between them.

Every page is written anew from the tags of versions and of their model, so that it always says what they say, and
writing it twice, or by two at once, does no harm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from bivlm.checkpoint.outputs import PAGE
from tasks.tracking.champions import Move, line_of, moves_of
from tasks.tracking.facts import (
    ACCURACY_PREFIX,
    BASE_MODEL_TAG,
    CALIBRATION_TAG,
    EXPERIMENT_TAG,
    GATE_TAG,
    KL_SAMPLES_TAG,
    KL_TAG,
    LINEARS_TAG,
    MADE_TAG,
    MODEL_BITS_TAG,
    PASSED,
    REASONS_TAG,
    STAGE_PREFIX,
)
from tasks.tracking.record import CHANCE_TAG, NONE, PACKED_TAG
from tasks.tracking.registry import CANDIDATE, CHAMPION, MODEL_TAG, is_absent, version_at, versions_of, versions_where
from tasks.tracking.run import BASE_ID_TAG, BASE_TAG, NOT_RECORDED, NOTE_TAG, TRIGGER_TAG

LONGEST = 4900  # of the 5,000 characters of the registry's column
_SHOWN = 160  # characters of a reason in a table
_HEAD = "Registered as "
_ACCURACY = re.compile(r"(?P<packed>[\d.]+) of (?P<before>[\d.]+) %")


def write_pages(client: MlflowClient, name: str) -> None:
    """Write the page of a registered model, of each of its versions, and of the base models they were made of."""
    model, versions = client.get_registered_model(name), versions_of(client, name)
    if (text := model_page(model, versions)) != (model.description or ""):
        client.update_registered_model(name, text)
    for version in versions:
        text = version_page(model, version)
        if text != (version.description or ""):
            client.update_model_version(name, str(version.version), text)
        _write_on_run_and_model(client, version, text, standing(model, version))
    for base in {version.tags.get(BASE_MODEL_TAG): version for version in versions}.values():
        _write_base_page(client, base)


def _write_on_run_and_model(client: MlflowClient, version: ModelVersion, text: str, stands: str) -> None:
    """The version's page on the logged model, too, and its standing at the head of the run's description."""
    if MODEL_TAG not in version.tags:
        return
    gate = version.tags.get(GATE_TAG)
    head = f"{_HEAD}{_version_link(version, f'{version.name}/{version.version}')}: {_text(stands)}"
    head += "." if gate is None else f"; gate {_text(gate)}."
    try:
        if client.get_logged_model(version.tags[MODEL_TAG]).tags.get(NOTE_TAG) != text:
            client.set_logged_model_tags(version.tags[MODEL_TAG], {NOTE_TAG: text})
        note = client.get_run(version.run_id).data.tags.get(NOTE_TAG, "")
    except MlflowException as error:
        if not is_absent(error):
            raise
        return  # somebody has deleted them
    rest = note.partition("\n\n")[2] if note.startswith(_HEAD) else note
    if note != (text := f"{head}\n\n{rest}"):
        client.set_tag(version.run_id, NOTE_TAG, text)


def _write_base_page(client: MlflowClient, made: ModelVersion) -> None:
    """The page of the full-precision model that this version was made of."""
    if BASE_MODEL_TAG not in made.tags:
        return
    versions = versions_of_base(client, made.tags[BASE_ID_TAG], made.tags[BASE_TAG])
    champions = {name: client.get_registered_model(name) for name in {version.name for version in versions}}
    text = base_page(made.tags[BASE_TAG], versions, champions)
    try:
        base = client.get_logged_model(made.tags[BASE_MODEL_TAG])
    except MlflowException as error:
        if not is_absent(error):
            raise
        return  # somebody has deleted it
    if base.tags.get(NOTE_TAG) != text:
        client.set_logged_model_tags(base.model_id, {NOTE_TAG: text})


def versions_of_base(client: MlflowClient, base_id: str, sha256: str | None = None) -> list[ModelVersion]:
    """All that was made of a base model, whatever the revision, and of one with this sha256, whatever its name."""
    conditions = [f"tags.`{BASE_TAG}` = '{sha256}'"] if sha256 else []
    mark = next((mark for mark in ("'", '"') if mark not in base_id), None)
    if mark is not None:  # MLflow's filters know no escapes
        conditions.append(f"tags.`{BASE_ID_TAG}` = {mark}{base_id}{mark}")
    found = [version for condition in conditions for version in versions_where(client, condition)]
    return list({(version.name, int(version.version)): version for version in found}.values())


def version_page(model: RegisteredModel, version: ModelVersion) -> str:
    """The description of a version, in Markdown: what it is, where each part of it comes from, what it can do."""
    tags = version.tags
    run = f"#/experiments/{tags.get(EXPERIMENT_TAG, '0')}/runs/{version.run_id}"
    rows = [
        ("base model", f"{_base_link(tags)}, revision {_code(tags.get('bivlm.base.revision', 'none (a folder)'))}"),
        ("its sha256", _code(tags.get(BASE_TAG))),
        (
            "recipe",
            f"[{_text(tags.get('bivlm.recipe'))}]({run}/artifacts/recipe.json), sha256 "
            f"{_code(tags.get('bivlm.recipe.sha256'))}",
        ),
        (
            "calibration",
            f"{_text(tags.get(CALIBRATION_TAG))}, sha256 {_code(tags.get(f'{CALIBRATION_TAG}.sha256'))}",
        ),
        ("asked for", _text(tags.get(TRIGGER_TAG))),
        ("made", f"{_text(tags.get(MADE_TAG))} by bivlm {_text(tags.get('bivlm.code_version'))}, [run]({run})"),
        (
            "checkpoint",
            f"[logged model]({_logged_model(tags, tags.get(MODEL_TAG))}), sha256 {_code(tags.get(PACKED_TAG))}",
        ),
        ("stored bits", f"{_text(tags.get(LINEARS_TAG))} in the linears, {_text(tags.get(MODEL_BITS_TAG))} in all"),
        *((f"accuracy, {_text(benchmark)}", _text(figures)) for benchmark, figures in _accuracies(tags)),
        *([("not above chance", _text(tags[CHANCE_TAG]))] if at_chance(tags) else []),
        ("KL", _divergence(tags)),
        ("gate", _gate(tags)),
    ]
    documents = ", ".join(
        f"[{what}]({run}/artifacts/{quote(path)})"
        for what, path in (("report", PAGE), ("lineage", "lineage.json"), ("layers", "layers.json"))
    )
    parts = [
        _text(standing(model, version)),
        _table(("", ""), rows),
        f"{documents}, [figures]({run}/artifacts/figures), [evaluations and their answers]({run}), "
        f"[all versions](#/models/{quote(version.name)})",
        "Stages, each by the hash of what made it (`lineage.json` has every step, `bivlm lineage "
        f"{version.name}/{version.version}` checks them): "
        + ", ".join(
            f"{_text(key.removeprefix(STAGE_PREFIX))} {_code(value[:12])}"
            for key, value in tags.items()
            if key.startswith(STAGE_PREFIX)
        ),
        *_history(moves_of(model.tags), int(version.version)),
    ]
    return _cut(parts)


def model_page(model: RegisteredModel, versions: Sequence[ModelVersion]) -> str:
    """The description of a registered model: its champion, its versions, and the history of its champions."""
    champion = version_at(model, CHAMPION)
    moves = list(moves_of(model.tags).values())
    first = "No version is champion." if champion is None else f"**Version {champion} is champion.**"
    before = [version for version in line_of(moves) if version != champion]
    if before:
        first += f" Before: {', '.join(map(str, reversed(before[-5:])))}."
    rows = [_row_of(model, version) for version in versions]
    history = [_move_row(move) for move in reversed(moves) if move.done]
    parts = [
        first,
        *(
            ["Champions, the last move first:", _table(("when (UTC)", "from", "to", "by", "why"), history[:8])]
            * bool(history)
        ),
        "Versions:",
        _table(("version", "", "base model", "asked for", "bits", "accuracy", "gate"), rows),
    ]
    return _cut(parts)


def base_page(sha256: str, versions: Sequence[ModelVersion], models: Mapping[str, RegisteredModel]) -> str:
    """The description of a full-precision model: all that was made of it, and of other revisions of it."""
    of_this = [version for version in versions if version.tags.get(BASE_TAG) == sha256]
    others = [version for version in versions if version.tags.get(BASE_TAG) != sha256]
    headings = ("model", "", "recipe", "asked for", "bits", "accuracy", "gate")
    some = (of_this or versions)[0].tags
    parts = [
        f"**{_text(some.get(BASE_ID_TAG))}** in full precision, revision "
        f"{_code(some.get('bivlm.base.revision', 'none (a folder)'))}, sha256 {_code(sha256)}. Made of it:",
        _table(headings, [_row_below_base(models[version.name], version) for version in of_this]),
    ]
    if others:
        rows = [_row_below_base(models[version.name], version) for version in others]
        parts += ["Made of other revisions of the same model:", _table(headings, rows)]
    return "\n\n".join(parts)


def _row_of(model: RegisteredModel, version: ModelVersion) -> tuple[str, ...]:
    tags = version.tags
    revision = tags.get("bivlm.base.revision") or f"sha256 {tags.get(BASE_TAG, '')}"
    return (
        _version_link(version, str(version.version)),
        _text(_shortly(standing(model, version))),
        f"[{_text(revision[:15])}]({_logged_model(tags, tags.get(BASE_MODEL_TAG))})",
        *_figures(tags),
    )


def _row_below_base(model: RegisteredModel, version: ModelVersion) -> tuple[str, ...]:
    return (
        _version_link(version, f"{version.name}/{version.version}"),
        _text(_shortly(standing(model, version))),
        _text(version.tags.get("bivlm.recipe")),
        *_figures(version.tags),
    )


def _figures(tags: Mapping[str, str]) -> tuple[str, ...]:
    """The cells that every table of versions ends with: trigger, bits, mean accuracy, gate."""
    return (
        _text(tags.get(TRIGGER_TAG)),
        _text(tags.get(LINEARS_TAG)),
        mean_accuracy(tags),
        _text(tags.get(GATE_TAG, "-")),
    )


def mean_accuracy(tags: Mapping[str, str]) -> str:
    """Over all benchmarks, packed and in full precision; a dash where nothing was evaluated."""
    found = [match for _, figures in _accuracies(tags) if (match := _ACCURACY.match(figures))]
    if not found:
        return "-"
    packed, before = (sum(float(match[role]) for match in found) / len(found) for role in ("packed", "before"))
    return f"{packed:.1f} of {before:.1f} %{' (not above chance)' * at_chance(tags)}"


def _accuracies(tags: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for key, value in tags.items():
        if key.startswith(ACCURACY_PREFIX):
            yield key.removeprefix(ACCURACY_PREFIX), value


def standing(model: RegisteredModel, version: ModelVersion) -> str:
    """Whether a version is champion, was, or is the candidate; in words that are no Markdown."""
    number = int(version.version)
    moves = [move for move in moves_of(model.tags).values() if move.done]
    became = [move for move in moves if move.after == number]
    if version_at(model, CHAMPION) == number:
        return f"champion since {_minute(became[-1].when)}, by {became[-1].who}" if became else "champion"
    if became:
        left = [move for move in moves if move.before == number]
        return f"was champion until {_minute(left[-1].when)}" if left else "was champion"
    kind = "candidate" if version_at(model, CANDIDATE) == number else "an earlier candidate"
    return f"{kind}, not champion" if passed(version.tags) else f"{kind}, gate {version.tags[GATE_TAG]}"


def _shortly(stands: str) -> str:
    """The standing without its dates, for tables that have no room."""
    return re.split(" since | until |, gate", stands)[0]


def _minute(when: str) -> str:
    return f"{when[:16].replace('T', ' ')} UTC"


def _gate(tags: Mapping[str, str]) -> str:
    decided = tags.get(GATE_TAG)
    if decided is None:
        return "the recipe has none"
    return f"{_text(decided)}: {_text(tags.get(REASONS_TAG, 'the run was cut off before'))}"


def _divergence(tags: Mapping[str, str]) -> str:
    if KL_TAG not in tags:
        return "not evaluated"
    samples = tags.get(KL_SAMPLES_TAG)  # versions of before it was written down have none
    return f"{_text(tags[KL_TAG])} nats a token, on {'held-out samples' if samples is None else _text(samples)}"


def at_chance(tags: Mapping[str, str]) -> bool:
    """Whether full precision is not above chance on one of the benchmarks that a version was asked."""
    return tags.get(CHANCE_TAG, NONE) != NONE


def passed(tags: Mapping[str, str]) -> bool:
    """Whether nothing speaks against a version: its gate let it pass, or it has none."""
    return tags.get(GATE_TAG, PASSED) == PASSED


def _history(moves: Mapping[str, Move], version: int) -> list[str]:
    own = [_move_row(move) for move in reversed(moves.values()) if move.done and version in (move.before, move.after)]
    return (
        ["Moves of the champion from or to this version:", _table(("when (UTC)", "from", "to", "by", "why"), own[:5])]
        if own
        else []
    )


def _move_row(move: Move) -> tuple[str, ...]:
    before = "-" if move.before is None else str(move.before)
    by = _text(move.who) if move.kind != "rollback" else f"{_text(move.who)} (rollback)"
    why = move.why if len(move.why) <= _SHOWN else f"{move.why[:_SHOWN].rsplit(' ', 1)[0]} ..."
    return move.when[:16].replace("T", " "), before, str(move.after), by, _text(why)


def _base_link(tags: Mapping[str, str]) -> str:
    return f"[{_text(tags.get(BASE_ID_TAG))}]({_logged_model(tags, tags.get(BASE_MODEL_TAG))})"


def _logged_model(tags: Mapping[str, str], model_id: str | None) -> str:
    return f"#/experiments/{tags.get(EXPERIMENT_TAG, '0')}/models/{model_id}"


def _version_link(version: ModelVersion, text: str) -> str:
    return f"[{_text(text)}](#/models/{quote(version.name)}/versions/{version.version})"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """MLflow's tables have no space between columns, hence the two that do not break at the end of a cell."""
    lines = [f"| {' | '.join(headings)} |", f"|{' :--- |' * len(headings)}"]
    return "\n".join([*lines, *("|" + "".join(f" {cell}\u00a0\u00a0 |" for cell in row) for row in rows)])


_MEANS_SOMETHING = re.compile(r"([\\`*_{}\[\]()#+!|<>~])")


def _text(value: str | None) -> str:
    """Text from outside in Markdown, as it stands: no link, no picture, no HTML, no cell of its own."""
    return NOT_RECORDED if value is None else _MEANS_SOMETHING.sub(r"\\\1", " ".join(value.split()))


def _code(value: str | None) -> str:
    if value is None:
        return NOT_RECORDED
    return f"`{' '.join(value.split()).replace('`', '').replace('|', '/')}`"


def _cut(parts: list[str]) -> str:
    """As many lines of `parts` as the column holds."""
    lines = "\n\n".join(parts).split("\n")
    text = "\n".join(lines)
    while len(text) > LONGEST:
        lines.pop()
        text = "\n".join([*lines, "", "and more: see the tags, and `bivlm audit`"])
    return text
