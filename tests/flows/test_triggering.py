"""What is shown of a run's log to whoever waits for it."""

import logging

import pytest
from prefect.logging.formatters import PrefectFormatter

from flows.triggering import _without_frames


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
