"""From a new model to its compression: what the watcher tells Prefect, how often, and what is made of it."""

import shutil
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.states import Pending, Scheduled
from tiny_llava import make_tiny_llava

from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import GateNotPassed, InputError
from bivlm.reports.lineage import read_lineage, verify
from bivlm.sources.s3_models import list_prefix
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from flows.base_model import on_base_model_flow
from flows.scheduled import SomeFailed, watch_flow
from tasks.watching.events import Answer, read_answers
from tasks.watching.looking import Found, is_due, recall_found
from tasks.watching.watch_lists import DEFAULT_RECIPE, Revision

AT = datetime(2026, 11, 24, 2, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def place(listed, tmp_path, monkeypatch) -> Path:
    """Everything that a worker has in its environment, and one listed folder of models with one model in it."""
    write_list(tmp_path, [{"model": f"{tmp_path}/models/*", "recipes": ["small"]}])
    monkeypatch.delenv("BIVLM_MODELS", raising=False)
    return tmp_path


def write_list(place, models):
    (place / "list.yaml").write_text(yaml.safe_dump({"format": 1, "models": models}))


def wait_for_event(revision):
    """What the server holds of the revision's event; it writes events down after a moment."""
    body = {"filter": {"id": {"id": [str(revision.event_id)]}, "occurred": {"since": "2020-01-01T00:00:00Z"}}}
    deadline = datetime.now(UTC) + timedelta(seconds=30)
    with get_client(sync_client=True) as client:
        while not (found := client.request("POST", "/events/filter", json=body).raise_for_status().json()["events"]):
            assert datetime.now(UTC) < deadline, "the server has no such event"
    return found


def found_revision(place, model="llava"):
    folder = place / "models" / model
    return Revision(str(folder), Checkpoint.open(folder).digest(), "small")


def compress(revision, **options):
    return on_base_model_flow(model_id=revision.model, revision=revision.revision, recipe=revision.recipe, **options)


@contextmanager
def run_to_come(revision, state=None, **parameters):
    """(a client, a run of the flow that is about `revision` and has not begun); it is deleted in the end."""
    asked = {"model_id": revision.model, "revision": revision.revision, **parameters}
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(on_base_model_flow, parameters=asked, state=state)
        yield client, run
        client.delete_flow_run(run.id)


def runs_of(revision):
    with get_client(sync_client=True) as client:
        tagged = FlowRunFilter(tags=FlowRunFilterTags(any_=[str(revision.event_id)]))
        return client.read_flow_runs(flow_run_filter=tagged)


def answer_to(revision):
    return read_answers.fn([revision])[revision]


def look(**options):
    return watch_flow(**({"settled_seconds": 0} | options))


def test_a_new_model_is_told_of_once_with_an_event_that_the_server_holds(place):
    assert look().waiting and not look(settled_seconds=3600).seen
    result = look()
    revision = found_revision(place)
    assert result.emitted == [str(revision.event_id)]
    (event,) = wait_for_event(revision)
    assert event["event"] == "bivlm.base_model.found"
    assert event["payload"] == {"revision": revision.revision, "recipe": "small"}
    assert event["resource"]["bivlm.model_id"] == revision.model
    # The next look, and one by a watcher that remembers nothing but what is in the workspace.
    assert look().emitted == []
    found = recall_found.fn([revision], default_workspace())[revision]
    assert len(found.emitted) == 1 and answer_to(revision) == Answer()


def test_what_came_while_no_watcher_ran_is_found_by_the_next(place, tiny_llava):
    look(), look()
    shutil.copytree(tiny_llava, place / "models" / "late")
    assert look().emitted == []
    assert look().emitted == [str(found_revision(place, "late").event_id)]


def test_an_event_that_the_server_did_not_take_is_emitted_by_the_next_look(place, monkeypatch):
    import flows.scheduled

    def refused(revision):
        raise ConnectionError("server away")

    look()
    with monkeypatch.context() as patch:
        patch.setattr(flows.scheduled, "emit_found", refused)
        with pytest.raises(ConnectionError):
            look()
    assert look().emitted == [str(found_revision(place).event_id)]


def test_trouble_with_one_model_is_told_and_keeps_no_other_from_being_found(place):
    entries = [
        {"model": f"{place}/none/*", "recipes": ["small"]},
        {"model": str(place / "models" / "llava"), "recipes": ["small"]},
    ]
    write_list(place, entries)
    with pytest.raises(SomeFailed, match=r"1 of the listed models could not be .*:\n  .*none/\*: no such folder"):
        look()
    with pytest.raises(SomeFailed):
        look()
    assert wait_for_event(found_revision(place))


def test_trouble_that_nobody_foresaw_is_one_models_too(place, tiny_llava, monkeypatch):
    shutil.copytree(tiny_llava, place / "models" / "broken")
    opened = Checkpoint.open

    def fails(folder, *modules):
        if Path(folder).name == "broken":
            raise RecursionError("too deep")
        return opened(folder, *modules)

    monkeypatch.setattr(Checkpoint, "open", fails)
    for _ in range(2):
        with pytest.raises(SomeFailed, match=r"1 of the listed models could not be .*:\n  .*/broken: RecursionError"):
            look()
    assert wait_for_event(found_revision(place))


def test_an_event_becomes_a_version_once_and_the_watcher_knows_of_it(place, counted):
    look(), look()
    revision = found_revision(place)
    first = compress(revision, event_id=str(revision.event_id))
    assert first.outcome == "compressed" and first.version == "llava-small/1"
    assert Path(first.output) == revision.output()
    assert revision.output().is_relative_to(place / "outputs")
    worked = {stage: len(calls) for stage, calls in counted.items()}
    assert worked["pack"] > 0

    again = compress(revision, event_id=str(revision.event_id))
    assert again.outcome == "registered before" and again.version == first.version
    assert again.page.endswith("#/models/llava-small/versions/1")
    assert {stage: len(calls) for stage, calls in counted.items()} == worked
    assert answer_to(revision).outcome == "Completed"
    later = look(again_after_minutes=6)
    assert (later.emitted, later.answered) == ([], [str(revision.event_id)])
    with get_client(sync_client=True) as client:
        for run in runs_of(revision):
            client.delete_flow_run(run.id)
    assert look().answered == [str(revision.event_id)]  # the workspace knows it without Prefect's runs


@pytest.mark.parametrize(
    ("outcome", "state"),
    [("compressed", "Completed"), ("gate not passed", "GateNotPassed"), ("bad input", "InputError"), (None, None)],
)
def test_an_outcome_that_an_earlier_version_wrote_down_stands(place, outcome, state):
    revision = found_revision(place)
    known = {"model": revision.model, "revision": revision.revision, "recipe": "small", "event": str(revision.event_id)}
    store = Workspace.open(default_workspace())
    found = known | {"first_seen": AT.isoformat(), "emitted": [AT.isoformat()]}
    store.put_state(f"base-models/{revision.event_id}/found", found)
    answer = known | {"flow_run": None, "taken": AT.isoformat(), "outcome": outcome, "detail": "", "version": None}
    store.put_state(f"base-models/{revision.event_id}/answer", answer)
    look()
    seen = look()
    assert recall_found.fn([revision], store.url)[revision].outcome == state
    assert seen.answered == ([str(revision.event_id)] if outcome else [])
    assert seen.emitted == ([] if outcome else [str(revision.event_id)])


def test_a_folder_that_is_no_longer_what_was_found_is_not_compressed(place):
    revision = found_revision(place)
    config = place / "models" / "llava" / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    with pytest.raises(InputError, match="which was asked for, is gone"):
        compress(revision)
    assert answer_to(revision).outcome == "InputError"
    assert not (place / "outputs").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_id": "/etc"}, "neither in the list"),
        ({"model_id": "../models/llava"}, "expected owner/name"),
        ({"model_id": "s3://bucket/x"}, "neither in the list"),
        ({"recipe": "no-such-recipe"}, "not one of"),
        ({"revision": "main"}, "expected the sha256"),
        ({"event_id": "00000000-0000-0000-0000-000000000000", "revision": "c" * 64}, "not that of"),
    ],
)
def test_what_an_event_says_is_judged_before_anything_is_done(place, changes, told):
    asked = {"model_id": str(place / "models" / "llava"), "recipe": "small", **changes}
    with pytest.raises(InputError, match=told):
        on_base_model_flow(**asked)
    assert not (place / "outputs").exists()


def test_an_event_with_a_path_for_a_recipe_does_not_even_begin(place):
    from prefect.exceptions import ParameterTypeError

    with pytest.raises(ParameterTypeError, match="recipe"):
        on_base_model_flow(model_id=str(place / "models" / "llava"), recipe="../../etc/passwd")


def test_a_failure_is_written_down_and_the_event_is_emitted_again_after_a_pause(place, monkeypatch):
    import flows.base_model
    import flows.scheduled

    look(), look()
    revision = found_revision(place)

    def failing(**_):
        raise RuntimeError("the GPU is on fire")

    monkeypatch.setattr(flows.base_model, "compress_flow", failing)
    with pytest.raises(RuntimeError):
        compress(revision)
    (run,) = runs_of(revision)
    assert run.state.message.endswith("RuntimeError: the GPU is on fire")
    assert answer_to(revision) == Answer(last=run.end_time)
    assert look().emitted == []
    later = datetime.now(UTC) + HOUR
    monkeypatch.setattr(flows.scheduled, "_now", lambda: later)
    assert look().emitted == [str(revision.event_id)]
    assert look().emitted == []


def test_a_run_that_was_lost_before_it_began_counts_for_a_day(place, monkeypatch):
    import tasks.watching.events

    revision = found_revision(place)
    with run_to_come(revision, Pending(), recipe="small") as (client, run):
        assert answer_to(revision).at_work == str(run.id)
        monkeypatch.setattr(tasks.watching.events, "LONGEST_PAUSE", timedelta(0))  # as if that day were over
        assert answer_to(revision).at_work is None
        client.set_flow_run_state(run.id, Scheduled(), force=True)  # it waits for a worker, however long
        assert answer_to(revision).at_work == str(run.id)


def test_a_run_that_names_no_recipe_is_for_the_default_one(place):
    revision = replace(found_revision(place), recipe=DEFAULT_RECIPE)
    with run_to_come(revision) as (_, run):
        assert answer_to(revision).at_work == str(run.id)


def test_a_run_that_waits_for_a_worker_is_not_asked_for_again(place):
    revision = found_revision(place)
    with run_to_come(revision, recipe="small"):
        look()
        assert look().at_work == [str(revision.event_id)]
    assert look().emitted == [str(revision.event_id)]


@pytest.mark.slow
def test_a_version_that_was_asked_too_little_is_not_finished(place, counted):
    revision = found_revision(place)
    assert compress(revision, evaluate=False).outcome == "compressed"
    packed = len(counted["pack"])
    for changes, outcome, evaluations in [
        ({"evaluate": False}, "registered before", 0),
        ({"questions": 2}, "compressed", 2),  # both models
        ({"questions": 1}, "registered before", 2),
        ({"evaluate": False}, "registered before", 2),
        ({}, "compressed", 4),
        ({"questions": 2}, "registered before", 4),
        ({}, "registered before", 4),
    ]:
        found = compress(revision, **changes)
        assert (found.outcome, found.version) == (outcome, "llava-small/1"), changes
        assert len(counted["evaluation"]) == evaluations, changes
    assert len(counted["pack"]) == packed


def test_a_folder_that_changes_after_it_was_pinned_is_not_compressed(place, monkeypatch):
    import flows.base_model

    revision = found_revision(place)
    config = place / "models" / "llava" / "config.json"

    def pinned_just_before(model, asked):
        config.write_bytes(config.read_bytes() + b"\n")
        return asked

    monkeypatch.setattr(flows.base_model, "pin_revision", pinned_just_before)
    with pytest.raises(InputError, match=f"now at .*; {revision.revision}, which was asked for, is gone"):
        compress(revision)
    assert not list((place / "outputs").rglob("*.*"))


@pytest.mark.slow
def test_a_model_below_an_s3_prefix_and_one_on_the_hub_become_versions_of_their_revision(
    place,
    tiny_llava,
    hub,
    s3_location,
):
    bucket, _, prefix = s3_location.removeprefix("s3://").partition("/")
    for file in tiny_llava.iterdir():
        boto3.client("s3").upload_file(str(file), bucket, f"{prefix}/models/llava/{file.name}")
    commit = hub.add("owner/llava", make_tiny_llava(place / "another", seed=1)).head.oid
    write_list(
        place,
        [
            {"model": f"{s3_location}/models/*", "recipes": ["small"]},
            {"model": "owner/llava", "revision": "main", "recipes": ["small"]},
        ],
    )
    first, second = look(), look()
    of_hub = Revision("owner/llava", commit, "small")
    of_s3 = Revision(f"{s3_location}/models/llava", list_prefix(f"{s3_location}/models/llava").revision, "small")
    assert (first.emitted, second.emitted) == ([str(of_hub.event_id)], [str(of_s3.event_id)])
    for revision, name in ((of_hub, "owner-llava-small"), (of_s3, "llava-small")):
        found = compress(revision, event_id=str(revision.event_id))
        assert found.version == f"{name}/1"
        lineage = read_lineage(found.output)
        assert (lineage.base_model.id, lineage.base_model.revision) == (revision.model, revision.revision)
        assert lineage.trigger == f"event {revision.event_id}"
        findings = verify(lineage, found.output, Workspace.open(default_workspace()))
        assert {finding.state for finding in findings} == {"holds"}
    # Another commit that changes no weight is another revision, and is packed from what is there.
    files = hub.repositories["owner/llava"].head.files
    newer = hub.repositories["owner/llava"].commit({**files, "README.md": b"---\nlicense: mit\n---\n"}, "a card")
    assert look().emitted == [str(Revision("owner/llava", newer.oid, "small").event_id)]


@pytest.mark.slow
def test_a_branch_is_pinned_to_its_commit_before_anything_is_done(place, tiny_llava, hub):
    commit = hub.add("owner/llava", tiny_llava).head.oid
    found = on_base_model_flow(model_id="owner/llava", recipe="small", evaluate=False, trigger="ci owner/repo run 1")
    assert Path(found.output).name == commit[:16]
    assert answer_to(Revision("owner/llava", commit, "small")).outcome == "Completed"
    assert read_lineage(found.output).trigger == "ci owner/repo run 1"
    (place / "owner" / "llava").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        with pytest.raises(InputError, match="a folder of that name"):
            on_base_model_flow(model_id="owner/llava", recipe="small")


@pytest.mark.slow
def test_a_gate_that_says_no_ends_red_and_is_told_again_not_tried_again(place, small_recipe, counted):
    impossible = {**small_recipe, "name": "impossible", "gate": {"bits": {"linears": 0.001}}}
    (place / "impossible.yaml").write_text(yaml.safe_dump(impossible))
    revision = replace(found_revision(place), recipe="impossible")
    with pytest.raises(GateNotPassed) as first:
        compress(revision, evaluate=False)
    assert first.value.result is not None
    worked = {stage: len(calls) for stage, calls in counted.items()}
    with pytest.raises(GateNotPassed, match="llava-impossible/1 was made before") as again:
        compress(revision, evaluate=False)
    assert again.value.result is None
    assert {stage: len(calls) for stage, calls in counted.items()} == worked
    assert answer_to(revision).outcome == "GateNotPassed"


# When an event is due


FOUND = {"model": "a/b", "revision": "c" * 40, "recipe": "small", "event": "e", "first_seen": AT}


@pytest.mark.parametrize(
    ("emitted", "outcome", "last_run", "hours", "due"),
    [
        ([], None, None, 0, True),
        ([AT], None, None, 0.9, False),
        ([AT], None, None, 1, True),
        ([AT, AT], None, None, 1.9, False),
        ([AT, AT], None, None, 2, True),
        ([AT] * 10, None, None, 23, False),
        ([AT] * 10, None, None, 24, True),
        ([AT] * 40, None, None, 23, False),
        ([AT] * 4000, None, None, 24, True),
        ([AT], "Completed", AT, 1000, False),
        ([AT], "GateNotPassed", AT, 1000, False),
        ([AT], "InputError", AT, 1000, False),
        ([AT], None, AT + HOUR, 1.9, False),
        ([AT], None, AT + HOUR, 2, True),
        ([], "Completed", AT, 1000, False),  # by a schedule, before the watcher saw it
        ([], None, AT, 0.5, False),
        ([], None, AT, 1, True),
    ],
)
def test_an_event_is_due_until_it_is_answered_with_growing_pauses(emitted, outcome, last_run, hours, due):
    found = Found(**FOUND, emitted=tuple(emitted), outcome=outcome)
    assert is_due(found, last_run, HOUR, AT + hours * HOUR) is due
