"""Calibration data: what the recipe says of it, where samples come from, and the folder that freezes them.

`settings` is the recipe's part; `sources` and `hub` give conversations one at a time, `exchanges` reads the forms they
are written in; `drawing` chooses and mixes; `frozen` writes and reads the folder.
"""

from bivlm.calibration.frozen import CalibrationSet, freeze_samples, load_held_out, load_samples, open_calibration
from bivlm.calibration.settings import CalibrationSettings, TokenWeights, held_out_samples

__all__ = [
    "CalibrationSet",
    "CalibrationSettings",
    "TokenWeights",
    "freeze_samples",
    "held_out_samples",
    "load_held_out",
    "load_samples",
    "open_calibration",
]
