"""What is written down as having asked for a run."""

import pytest
from prefect import flow
from prefect._internal.schemas.fields import CreatedBy
from prefect.client.orchestration import get_client

from bivlm.errors import InputError
from flows.origin import in_words, trigger_of_run


@flow(name="asked")
def asked(said=None):
    return trigger_of_run(said)


@flow(name="outer", flow_run_name="outer-of-them")
def outer():
    return asked()


def test_a_run_that_somebody_started_is_by_hand():
    assert asked() == "by hand"
    assert trigger_of_run(None) == "by hand"


def test_a_run_within_another_has_the_trigger_of_the_outermost_and_its_name():
    assert outer() == "by hand, in outer-of-them"


def test_what_the_caller_says_goes_before_what_prefect_knows():
    assert asked(" event 4f2a-77 ") == "event 4f2a-77"


@pytest.mark.parametrize("said", ["", "two\nlines", "x" * 501, "\x1b]0;title\x07"])
def test_what_the_caller_says_is_one_line_that_can_be_read(said):
    with pytest.raises(InputError, match=r"trigger .*: expected one line of at most 500 characters"):
        asked(said)


@pytest.mark.parametrize(
    ("creator", "words"),
    [
        (None, "deployment nightly"),
        (CreatedBy(type="SCHEDULE", display_value="every-night"), "schedule every-night, deployment nightly"),
        (CreatedBy(type="AUTOMATION", display_value="on-base-model"), "automation on-base-model, deployment nightly"),
    ],
)
def test_of_a_deployments_run_it_is_the_schedule_or_the_automation_that_made_it(creator, words):
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(flow_id=client.create_flow(asked), name="nightly")
        run = client.create_flow_run_from_deployment(deployment)
        assert in_words(run.model_copy(update={"created_by": creator}), client) == words
