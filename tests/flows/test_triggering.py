"""What starts a run; what whoever waits for it is told of its end, and shown of its log."""

import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from prefect import flow, get_run_logger
from prefect.logging.formatters import PrefectFormatter
from prefect.server.events.actions import RunDeployment
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.utilities.schema_tools.hydration import HydrationContext, hydrate

from bivlm.errors import GateNotPassed
from flows.cli.follow import _without_frames, follow
from infra.automations import ENDS
from tasks.runtime.states import GATE_STATE, INPUT_STATE, failed_by
from tasks.watching.watch_lists import EVENT, Revision

PREFECT = yaml.safe_load((Path(__file__).parents[2] / "prefect.yaml").read_text())


def raised(depth: int, error: Exception) -> None:
    if depth:
        raised(depth - 1, error)
    raise error


def logged(error: Exception) -> str:
    about = (type(error), error, error.__traceback__)
    record = logging.LogRecord("flow", logging.ERROR, "x", 1, "It %s", ("failed",), about)
    return PrefectFormatter("%(message)s").format(record)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("no such model"), "ValueError: no such model"),
        (ValueError("two\nlines"), "ValueError: two\nlines"),
        (ValueError("an\n    indented one"), "ValueError: an\n    indented one"),
        (KeyError("x"), "KeyError: 'x'"),
        (
            ValueError('bad:\n  File "x.yaml", line 3\n    is it'),
            'ValueError: bad:\n  File "x.yaml", line 3\n    is it',
        ),
    ],
)
def test_of_a_traceback_the_error_stays(error, shown):
    try:
        raised(3, error)
    except Exception as caught:
        message = logged(caught)
    assert message.count("test_triggering.py") > 3
    assert _without_frames(message) == f"It failed\n{shown}"


def test_a_recursion_is_shown_by_its_error():
    try:
        endless()
    except RecursionError as caught:
        message = logged(caught)
    assert "[Previous line repeated" in message
    assert _without_frames(message) == "It failed\nRecursionError: maximum recursion depth exceeded"


def endless():
    endless()


def test_other_lines_stay_as_they_are():
    for message in ("Completed", 'a\n  File "x"\n    y', ""):
        assert _without_frames(message) == message


def test_of_a_chain_the_last_error_stays():
    try:
        try:
            raised(2, KeyError("inner"))
        except KeyError as inner:
            raise RuntimeError("outer") from inner
    except RuntimeError as caught:
        assert _without_frames(logged(caught)) == "It failed\nRuntimeError: outer"


@flow(name="refused-within")
def refused():
    get_run_logger().critical("about to be refused")
    return failed_by(GateNotPassed("too many bits"))


@flow(name="a-night")
def night(error=None):
    with pytest.raises(GateNotPassed):
        refused()
    if error:
        raise RuntimeError(error)


def followed(flow, **parameters):
    """(the last state of its run, what was told of it) by somebody who looks once it has ended."""
    state = flow(**parameters, return_state=True)
    told = []
    return follow(state.state_details.flow_run_id, told.append).state, told


@pytest.mark.slow
def test_a_gate_that_was_not_passed_is_the_end_of_its_own_run_alone():
    ended, told = followed(refused)
    assert (ended.is_completed(), ended.name) == (False, GATE_STATE) and "too many bits" in ended.message
    assert any("about to be refused" in line for line in told)
    ended, told = followed(night, error="the GPU is on fire")
    assert (ended.is_completed(), ended.name) == (False, "Failed") and "the GPU is on fire" in ended.message
    assert any("about to be refused" in line for line in told)  # of the run within it
    assert followed(night)[0].is_completed()


def test_a_run_that_ends_in_a_state_of_ours_has_not_fallen_silent():
    assert {GATE_STATE, INPUT_STATE} <= ENDS


def test_the_event_starts_a_run_with_its_model_revision_recipe_and_id():
    """By the trigger in prefect.yaml, as Prefect's server renders it."""
    revision = Revision('/models/it\'s "one"', "c" * 64, "small")
    event = ReceivedEvent(occurred=datetime.now(UTC), id=revision.event_id, **revision.event())
    (trigger,) = next(each for each in PREFECT["deployments"] if each["name"] == "on-base-model")["triggers"]
    assert trigger["expect"] == [EVENT]
    assert event.resource.id.startswith(trigger["match"]["prefect.resource.id"].removesuffix("*"))
    parameters = trigger["parameters"]
    RunDeployment._upgrade_v1_templates(parameters)
    context = HydrationContext(raise_on_error=True, render_jinja=True, jinja_context={"event": event})
    assert hydrate(parameters, context) == {
        "model_id": revision.model,
        "revision": revision.revision,
        "recipe": revision.recipe,
        "event_id": str(revision.event_id),
    }
