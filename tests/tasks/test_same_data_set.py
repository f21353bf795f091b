"""Two runs that log the same new data set in MLflow at the same moment."""

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tasks.runtime.policy import OVER_NETWORK, is_passing
from tasks.tracking.record import as_input, data_set

DATA = as_input(data_set("calibration", "0" * 32, "/data", 3), "calibration")
TAKEN = 'BAD_REQUEST: duplicate key value violates unique constraint "dataset_pk"'


@pytest.fixture
def log(tmp_path):
    """Log the data set as a task does, refused so many times as by a database where somebody has just written it."""
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.create_run(client.create_experiment("bivlm", artifact_location=tmp_path.as_uri())).info.run_id

    def log(times, said):
        for attempt in range(1 + OVER_NETWORK["retries"]):
            try:
                if attempt < times:
                    raise MlflowException(said)
                client.log_inputs(run, [DATA])
                break
            except MlflowException as error:
                if attempt == OVER_NETWORK["retries"] or not is_passing(error):
                    raise
        return client.get_run(run).inputs.dataset_inputs

    return log


def test_the_one_that_was_refused_finds_the_data_set(log):
    (found,) = log(1, TAKEN)
    assert found.dataset.name == "calibration"


@pytest.mark.parametrize(("times", "said"), [(1, "BAD_REQUEST: no such run"), (100, TAKEN)])
def test_other_trouble_and_endless_trouble_are_told(log, times, said):
    with pytest.raises(MlflowException, match=said.split(":")[0]):
        log(times, said)
