"""What a registered version's tags say of it: enough to trace it, and to write every page that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bivlm.evaluation.chance import AtChance
from bivlm.evaluation.gate import Decision
from bivlm.recipe.loading import Recipe
from bivlm.reports.lineage import Lineage, stage_hashes
from tasks.runtime.naming import slug
from tasks.runtime.steps import StepResult
from tasks.tracking.documents import SAMPLES_TAG
from tasks.tracking.record import CHANCE_TAG, LONGEST, PACKED_TAG, chance_in_words
from tasks.tracking.run import Tracking

GATE_TAG = "bivlm.gate"  # passed | refused | not decided; a recipe without a gate has none
REASONS_TAG = "bivlm.gate.reasons"
QUESTIONS_TAG = "bivlm.gate.questions"
PASSED, REFUSED, UNDECIDED = "passed", "refused", "not decided"
ASKED_TAG = "bivlm.questions"  # of each of the recipe's benchmarks: all, the first so many, or 0
ALL, NOTHING = "all", "0"
EXPERIMENT_TAG = "bivlm.experiment"
BASE_MODEL_TAG = "bivlm.base.model_id"
CALIBRATION_TAG = "bivlm.calibration"
MADE_TAG = "bivlm.made"
STAGE_PREFIX = "bivlm.stage."
ACCURACY_PREFIX = "bivlm.accuracy."
LINEARS_TAG, MODEL_BITS_TAG, KL_TAG = "bivlm.bits.linears", "bivlm.bits.model", "bivlm.kl"
KL_SAMPLES_TAG = "bivlm.kl.samples"  # what the KL was measured on, in words


def facts_of(
    tracking: Tracking,
    lineage: Lineage,
    calibration: StepResult,
    report: dict[str, Any],
    base_model_id: str,
) -> dict[str, str]:
    """The tags of a version: its origins, a hash a stage, bits as people read them; what it can do: `scores_of`."""
    samples, bits = calibration.record.figures, report["bits"]
    return {
        EXPERIMENT_TAG: tracking.experiment_id,
        BASE_MODEL_TAG: base_model_id,
        CALIBRATION_TAG: f"{samples['source']}, {samples['samples']} samples",
        SAMPLES_TAG: samples["sha256"],
        PACKED_TAG: lineage.packed.sha256,
        MADE_TAG: lineage.created,
        LINEARS_TAG: f"{bits['linears']['stored']:.3f}",
        MODEL_BITS_TAG: f"{bits['model']['stored']:.2f}",
        **_stage_tags({stage: sha for stage, sha in stage_hashes(lineage).items() if stage not in lineage.evaluations}),
    }


def scores_of(lineage: Lineage, evaluation: dict[str, Any] | None, questions: str) -> dict[str, str]:
    """The tags that say what a version can do, after how many `questions` (`questions_asked`), and by which steps."""
    scores = {ASKED_TAG: questions, **_stage_tags(lineage.evaluations)}
    if evaluation is not None:
        scores[KL_TAG] = f"{evaluation['kl']:.4g}"
        scores[KL_SAMPLES_TAG] = evaluation["measured_on"][:LONGEST]
        scores[CHANCE_TAG] = chance_in_words([AtChance(**found) for found in evaluation["at_chance"]])
        for benchmark, packed in evaluation["packed"].items():
            before = evaluation["full_precision"][benchmark]["metrics"]["accuracy"]
            loss = evaluation["loss"][benchmark]
            scores[f"{ACCURACY_PREFIX}{slug(benchmark)}"] = (
                f"{packed['metrics']['accuracy']:.1f} of {before:.1f} % on {packed['n']:,} questions; lost "
                f"{loss['loss']:.1f} ({loss['low']:.1f} to {loss['high']:.1f})"
            )
    return scores


def _stage_tags(hashes: Mapping[str, str]) -> dict[str, str]:
    return {f"{STAGE_PREFIX}{slug(stage)}": sha256 for stage, sha256 in hashes.items()}


def questions_asked(recipe: Recipe, evaluate: bool, questions: int | None) -> str:
    """How many questions of each of the recipe's benchmarks are asked, as `ASKED_TAG` says it."""
    if not recipe.evaluation:
        return ALL
    return NOTHING if not evaluate else ALL if questions is None else str(questions)


def as_many(asked: str, wanted: str) -> bool:
    """Whether as many questions were `asked` as are `wanted`."""
    return asked == ALL or (wanted != ALL and int(asked) >= int(wanted))


def of_decision(decision: Decision, questions: int) -> dict[str, str]:
    """The tags of a gate's decision after so many questions."""
    return {
        GATE_TAG: PASSED if decision.passed else REFUSED,
        REASONS_TAG: "; ".join(decision.reasons)[:LONGEST],
        QUESTIONS_TAG: str(questions),
    }
