"""Calibration samples, frozen: the same images and texts for everything that is compared."""

from __future__ import annotations

import time

from prefect import task

from bivlm.calibration.frozen import freeze_samples
from bivlm.recipe.calibration import CalibrationSettings
from bivlm.workspace.hashing import digest, step_identity
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.progress import advance
from tasks.runtime.steps import StepResult, finish, open_workspace

STAGE = "calibration"
VERSION = 2  # raised when held-out samples joined


@task(name="calibration", **OVER_NETWORK)
def freeze_calibration(settings: CalibrationSettings, workspace: str) -> StepResult:
    """Return the samples that the settings request, as workspace files; `figures["sha256"]` is the hash over all.

    They are drawn anew each time, because a folder of images or a data set may have changed: this takes a second or
    two, and longer for a data set streamed from the hub. The key is the hash of the samples and of the settings that
    chose them, without those of tokens and blocks, so that later steps run again only if the samples differ.
    """
    store = open_workspace(workspace)
    started = time.perf_counter()
    with store.scratch() as folder:
        frozen = freeze_samples(settings, folder)
        outputs = store.put_folder(folder)
    identity = step_identity(STAGE, VERSION, {"samples": frozen.sha256}, settings.selection(), exact=True)
    record = store.step(digest(identity))
    if record is not None:
        done = StepResult(record, reused=True)
    else:
        figures = {
            "sha256": frozen.sha256,
            "source": settings.source,
            "samples": frozen.samples,
            "held_out": frozen.held_out,
            "text_only": frozen.text_only,
            "skipped": frozen.skipped,
            "revision": frozen.revision,
            "text_revision": frozen.text_revision,
        }
        done = finish(store, identity, outputs, figures, time.perf_counter() - started)
    advance(STAGE)
    return done
