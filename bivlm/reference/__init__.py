"""The small vision-language model that ships with the project, its questions, and how it was trained."""

from pathlib import Path

from bivlm.reference.question_sets import QUESTION_SETS, calibration_samples, questions

CHECKPOINT = Path(__file__).parent / "checkpoint"

__all__ = ["CHECKPOINT", "QUESTION_SETS", "calibration_samples", "questions"]
