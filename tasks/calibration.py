"""Calibration samples, frozen: the same pictures and conversations for everything that is compared."""

from __future__ import annotations

import time
from typing import Any

from prefect import task

from bivlm.calibration import freeze_samples
from bivlm.identity import step_key
from bivlm.recipe import CalibrationSettings
from bivlm.workspace import StepRecord
from tasks.policy import OVER_NETWORK
from tasks.progress import advance
from tasks.steps import Done, open_workspace

STAGE = "calibration"


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
    key = step_key(STAGE, 1, {"samples": frozen.sha256}, settings, exact=True)
    record = store.step(key)
    reused = record is not None
    if record is None:
        figures = {"sha256": frozen.sha256, "samples": settings["samples"], "source": settings["source"]}
        seconds = time.perf_counter() - started
        record = StepRecord(stage=STAGE, outputs=outputs, figures=figures, seconds=seconds)
        store.finish_step(key, record)
    advance(STAGE)
    return Done(key, record, reused)
