"""What whoever waits for a run is told of its end, and shown of its log."""

import logging

import pytest
from prefect import flow, get_run_logger
from prefect.logging.formatters import PrefectFormatter

from bivlm.errors import GateNotPassed
from flows.cli.follow import _without_frames, follow


def raised(depth: int, error: Exception) -> None:
    if depth:
        raised(depth - 1, error)
    raise error


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("no such model"), "ValueError: no such model"),
        (ValueError("two\nlines"), "ValueError: two\nlines"),
        (ValueError("an\n    indented one"), "ValueError: an\n    indented one"),
        (KeyError("x"), "KeyError: 'x'"),
        (
            ValueError('bad file:\n  File "x.yaml", line 3\n    is it'),
            'ValueError: bad file:\n  File "x.yaml", line 3\n    is it',
        ),
    ],
)
def test_of_a_traceback_the_error_stays(error, shown):
    try:
        raised(3, error)
    except Exception as caught:
        record = logging.LogRecord(
            "flow", logging.ERROR, "x", 1, "It %s", ("failed",), (type(caught), caught, caught.__traceback__)
        )
    message = PrefectFormatter("%(message)s").format(record)
    assert message.count("test_triggering.py") > 3
    assert _without_frames(message) == f"It failed\n{shown}"


def test_a_recursion_is_shown_by_its_error():
    try:
        endless()
    except RecursionError as caught:
        record = logging.LogRecord("flow", logging.ERROR, "x", 1, "", (), (type(caught), caught, caught.__traceback__))
    message = PrefectFormatter("%(message)s").format(record)
    assert "[Previous line repeated" in message
    assert _without_frames(message).strip() == "RecursionError: maximum recursion depth exceeded"


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
        record = logging.LogRecord(
            "flow", logging.ERROR, "x", 1, "It failed", (), (type(caught), caught, caught.__traceback__)
        )
    assert _without_frames(PrefectFormatter("%(message)s").format(record)) == "It failed\nRuntimeError: outer"


@flow(name="refused-within")
def refused():
    get_run_logger().critical("about to be refused")
    raise GateNotPassed("too many bits")


@flow(name="a-night")
def night(error=None):
    with pytest.raises(GateNotPassed):
        refused()
    if error:
        raise RuntimeError(error)


def followed(flow, **parameters):
    """(how its run ended, what was told of it) by somebody who looks once it has ended."""
    state = flow(**parameters, return_state=True)
    told = []
    return follow(state.state_details.flow_run_id, told.append), told


def test_a_gate_that_was_not_passed_is_the_end_of_its_own_run_alone():
    ended, told = followed(refused)
    assert (ended.completed, ended.refused) == (False, True) and "too many bits" in ended.message
    assert any("about to be refused" in line for line in told)
    ended, told = followed(night, error="the GPU is on fire")
    assert (ended.completed, ended.refused) == (False, False) and "the GPU is on fire" in ended.message
    assert any("about to be refused" in line for line in told)  # of the run within it
    assert followed(night)[0].completed
