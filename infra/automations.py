"""Prefect's automations that are not a deployment's own: `python -m infra.automations` makes or renews them.

A run whose worker was killed, or whose machine is gone, cannot say so: without this it would be `Running` for ever.
Runs send a heartbeat every ``PREFECT_FLOWS_HEARTBEAT_FREQUENCY`` seconds; one that has been silent for `SILENCE` is
marked as crashed, which lets whoever waits for it know. Running it again goes on from its finished steps.
"""

from __future__ import annotations

import sys
from datetime import timedelta

from prefect.automations import Automation
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.server.schemas.states import StateType

LOST_RUNS = "bivlm: a run that has fallen silent has crashed"
SILENCE = timedelta(seconds=120)  # four heartbeats of 30 s
_HEARTBEAT = "prefect.flow-run.heartbeat"
_ENDS = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "Crashed", "Cancelling")}


def lost_runs() -> Automation:
    """After a heartbeat there must be another, or an end, within `SILENCE`; else the run has crashed."""
    return Automation(
        name=LOST_RUNS,
        description="Its worker was killed or its machine is gone. Run it again: finished steps are not done twice.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            after={_HEARTBEAT},
            expect={_HEARTBEAT, *_ENDS},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"no heartbeat for {SILENCE.seconds} s: its worker or machine is lost; run it again, it goes "
                "on from its finished steps",
            )
        ],
    )


def renew(wanted: Automation) -> None:
    """Make the automation, or bring the one of that name up to date."""
    try:
        found = Automation.read(name=wanted.name)
    except ValueError:
        wanted.create()
        print(f"made: {wanted.name}")
        return
    found.trigger, found.actions, found.description = wanted.trigger, wanted.actions, wanted.description
    found.update()
    print(f"renewed: {wanted.name}")


if __name__ == "__main__":
    renew(lost_runs())
    sys.exit()
