import botocore.exceptions
import httpx
import httpx2
import pytest
import requests
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

from bivlm.errors import InputError
from tasks.runtime.policy import OVER_NETWORK, is_out_of_memory, is_passing, smaller_after_out_of_memory


def client_error(status, code="Error"):
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "PutObject")


def wrapped(error, cause):
    error.__cause__ = cause
    return error


PASSING = [
    ConnectionResetError("reset"),
    TimeoutError("late"),
    requests.exceptions.ConnectionError("refused"),
    httpx.ConnectError("refused"),
    httpx2.ReadTimeout("late"),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://s3"),
    client_error(503, "SlowDown"),
    MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE),
    wrapped(RuntimeError("upload failed"), ConnectionResetError("reset")),
]
LASTING = [
    InputError("recipe: groups"),
    wrapped(InputError("model: not on the hub"), ConnectionError("refused")),
    client_error(403, "AccessDenied"),
    client_error(404, "NoSuchKey"),
    MlflowException("bad value", error_code=INVALID_PARAMETER_VALUE),
    ValueError("a defect"),
    MemoryError(),
    FileNotFoundError("gone"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_trouble_between_machines_is_tried_again(error):
    assert is_passing(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_bad_input_and_defects_are_not_tried_again(error):
    assert not is_passing(error)


def test_memory_can_run_out_on_the_machine_and_on_the_gpu():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("something else"))


def test_out_of_memory_is_met_with_smaller_sizes():
    tried = []

    def work(size):
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("too much")
        return f"done with {size}"

    assert smaller_after_out_of_memory(work, 32) == "done with 2"
    assert tried == [32, 16, 8, 4, 2]


def test_what_does_not_fit_alone_is_raised():
    def work(size):
        raise MemoryError

    with pytest.raises(MemoryError):
        smaller_after_out_of_memory(work, 4)


def test_the_policy_has_an_end_and_stores_nothing():
    assert 1 <= OVER_NETWORK["retries"] <= 10
    assert OVER_NETWORK["retry_jitter_factor"] > 0
    assert OVER_NETWORK["persist_result"] is False
