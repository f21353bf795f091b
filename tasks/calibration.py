"""Calibration samples, frozen: the same pictures and conversations for everything that is compared."""

from __future__ import annotations

import time
from typing import Any

from prefect import task

from bivlm.calibration import freeze_samples
from bivlm.identity import digest, step_identity
from bivlm.recipe import CalibrationSettings
from tasks.policy import OVER_NETWORK
from tasks.progress import advance
from tasks.steps import Done, finish, open_workspace

STAGE = "calibration"
VERSION = 1


@task(name="calibration", **OVER_NETWORK)
def freeze_calibration(settings: dict[str, Any], workspace: str) -> Done:
    """The samples that the settings ask for, as workspace files; `figures["sha256"]` is the hash over all of them.

    They are drawn anew each time, which takes a second or two, because a folder of pictures may have changed since. The
    key is made of what was drawn, so that later steps run again only if it is different.
    """
    store = open_workspace(workspace)
    started = time.perf_counter()
    with store.scratch() as folder:
        frozen = freeze_samples(CalibrationSettings.model_validate(settings), folder)
        outputs = store.put_folder(folder)
    identity = step_identity(STAGE, VERSION, {"samples": frozen.sha256}, settings, exact=True)
    record = store.step(digest(identity))
    if record is not None:
        done = Done(record, reused=True)
    else:
        figures = {"sha256": frozen.sha256, "samples": settings["samples"], "source": settings["source"]}
        done = finish(store, identity, outputs, figures, time.perf_counter() - started)
    advance(STAGE)
    return done
