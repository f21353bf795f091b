"""Two runs that tell MLflow of the same new data set at the same moment."""

import pytest
from mlflow import MlflowClient
from mlflow.entities import DatasetInput
from mlflow.exceptions import MlflowException

from tasks.tracking.record import LoggedData, log_inputs

DATA = DatasetInput(LoggedData("calibration", "0" * 32, "/data", 3).entity(), [])
TAKEN = 'BAD_REQUEST: duplicate key value violates unique constraint "dataset_pk"'


class Refused(MlflowClient):
    """Refuses so many times, as a database does where somebody else has just written the row."""

    times, said = 1, TAKEN

    def log_inputs(self, *arguments, **options):
        if self.times:
            self.times -= 1
            raise MlflowException(self.said)
        return super().log_inputs(*arguments, **options)


@pytest.fixture
def client(tmp_path):
    return Refused(f"sqlite:///{tmp_path}/mlflow.db")


def run_of(client, tmp_path):
    return client.create_run(client.create_experiment("bivlm", artifact_location=tmp_path.as_uri())).info.run_id


def test_the_one_that_was_refused_finds_the_data_set(client, tmp_path):
    run = run_of(client, tmp_path)
    log_inputs(client, run, [DATA])
    (found,) = client.get_run(run).inputs.dataset_inputs
    assert found.dataset.name == "calibration"


@pytest.mark.parametrize(("times", "said"), [(1, "BAD_REQUEST: no such run"), (100, TAKEN)])
def test_other_trouble_and_endless_trouble_are_told(client, tmp_path, times, said):
    run = run_of(client, tmp_path)
    client.times, client.said = times, said
    with pytest.raises(MlflowException, match=said.split(":")[0]):
        log_inputs(client, run, [DATA])
