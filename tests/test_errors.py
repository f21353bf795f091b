"""Every failure is told with its type and a sentence."""

import concurrent.futures
import socket

import httpx
import pytest

from bivlm.errors import GateNotPassed, InputError, describe


@pytest.fixture
def silent_server():
    """The port of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def caused(error: BaseException, cause: BaseException) -> BaseException:
    try:
        raise error from cause
    except BaseException as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InputError("recipe x: no such file"), "recipe x: no such file"),
        (InputError(), "InputError, without a message of its own"),
        (GateNotPassed("accuracy 1.0, bound 2.0"), "accuracy 1.0, bound 2.0"),
        (RuntimeError("the disk is gone"), "RuntimeError: the disk is gone"),
        (KeyError(None), "KeyError: key None not found"),  # Prefect's, of a temporary server that has gone
        (RuntimeError(None), "RuntimeError, without a message of its own"),
        (TimeoutError(), "TimeoutError, without a message of its own"),
        (concurrent.futures.CancelledError(), "CancelledError, without a message of its own"),
        (caused(RuntimeError(None), TimeoutError("no lock")), "RuntimeError, caused by TimeoutError: no lock"),
        (
            caused(ValueError(" "), caused(OSError(), KeyError("x"))),
            "ValueError, caused by KeyError: key 'x' not found",
        ),
        (ValueError("no https://me:a/b@host/x"), "ValueError: no https://host/x"),
    ],
)
def test_a_failure_has_a_type_and_a_sentence(error, told):
    assert describe(error) == told


def test_a_request_that_timed_out_says_which_and_after_how_long(silent_server):
    address = f"http://127.0.0.1:{silent_server}/api/flows"
    with pytest.raises(httpx.ReadTimeout) as raised, httpx.Client(trust_env=False, timeout=0.2) as client:
        client.post(address)
    assert describe(raised.value) == f"ReadTimeout: POST {address} was not answered within 0.2 s (timed out)"
    assert describe(caused(RuntimeError(), raised.value)).startswith("RuntimeError, caused by ReadTimeout: POST http")


def test_causes_that_lead_round_in_a_circle_come_to_an_end():
    first, second = ValueError(), RuntimeError()
    first.__cause__, second.__cause__ = second, first
    assert describe(first) == "ValueError, without a message of its own"
