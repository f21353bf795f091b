"""What the trigger in prefect.yaml makes of an event, as Prefect's server renders it."""

from datetime import UTC, datetime
from pathlib import Path

import yaml
from prefect.server.events.actions import RunDeployment
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.utilities.schema_tools.hydration import HydrationContext, hydrate

from tasks.watching.watch_lists import EVENT, Revision

PREFECT = yaml.safe_load((Path(__file__).parents[2] / "prefect.yaml").read_text())


def test_the_event_starts_a_run_with_its_model_revision_recipe_and_id():
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
