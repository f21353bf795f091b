"""An evaluation is one row a question, and the figures follow from the rows."""

import json

import pandas as pd
import pytest

from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.outcomes import evaluate, read_outcomes, write_outcomes


@pytest.fixture(scope="module")
def evaluation(loaded):
    return evaluate(*loaded, load_benchmark("reference:open", limit=11), batch_size=4)


def test_rows_stand_in_the_order_of_the_benchmark(evaluation):
    asked = [(s.question_id, s.image_id, s.question, list(s.answers)) for s in load_benchmark("reference:open", 11)]
    columns = ["question_id", "image_id", "question", "answers"]
    assert list(evaluation.outcomes[columns].itertuples(index=False, name=None)) == asked


def test_accuracy_is_the_mean_score_in_percent_and_comes_first(loaded, write_folder):
    lines = [{"image": "blue.jpg", "question": "What" + "?" * n, "answers": ["x"]} for n in range(6)]
    said = evaluate(*loaded, load_benchmark(f"vqa:{write_folder(*lines)}")).outcomes["prediction"]
    for line, answer in zip(lines[:3], said[:3], strict=True):
        line["answers"] = [answer]
    evaluation = evaluate(*loaded, load_benchmark(f"vqa:{write_folder(*lines)}"))
    assert next(iter(evaluation.metrics)) == "accuracy"
    assert evaluation.metrics["accuracy"] == pytest.approx(100 * evaluation.outcomes["score"].mean())
    assert evaluation.metrics["accuracy"] >= 50
    assert evaluation.n == 6
    assert evaluation.ci95 == [evaluation.metrics["accuracy"]] * 2  # one image: nothing to resample


def test_the_record_is_plain_json(evaluation):
    assert json.loads(json.dumps(evaluation.record()))["task"] == "reference:open"


def test_progress_counts_the_answered_questions_batch_by_batch(loaded):
    calls = []
    benchmark = load_benchmark("reference:perception", limit=5)
    evaluate(*loaded, benchmark, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_outcomes_survive_parquet_and_the_same_rows_give_the_same_bytes(evaluation, tmp_path):
    first = write_outcomes(evaluation.outcomes, tmp_path / "new" / "a.parquet")
    second = write_outcomes(evaluation.outcomes, tmp_path / "b.parquet")
    pd.testing.assert_frame_equal(read_outcomes(first), evaluation.outcomes)
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == ["a.parquet"]
