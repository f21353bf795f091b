"""A report or a score of the wrong kind is refused by file and key before anything is published."""

import json

import pytest

from bivlm.errors import InputError
from bivlm.reports.lineage import read_lineage
from bivlm.reports.model_card import model_card
from bivlm.reports.pushing import package
from tasks.report import earlier_report

ODD = {
    "nothing": ({}, "not the report of a compression: base_model: Field required"),
    "no base model": ({"base_model": None}, "not the report of a compression: base_model: "),
    "a hash": ({"base_model": {"sha256": 1}}, "base_model.sha256: Input should be a valid string, found 1"),
    "bits": ({"bits": [1]}, r"not the report of a compression: bits: .*found \[1\]"),
    "other bits": ({"bits": {}}, r"is about another bits than the checkpoint beside it: \{\}, not "),
    "warnings": ({"warnings": 3}, "not the report of a compression: warnings: "),
    "a licence": ({"licence": {"license": [1]}}, r"licence\.license: Input should be a valid string"),
    "another recipe": ({"recipe": {"name": "x"}}, "is about another recipe than the checkpoint beside it"),
}


@pytest.mark.parametrize("what", ODD)
def test_an_odd_report_is_refused_by_file_and_key(compressed_copy, what):
    changes, message = ODD[what]
    file = compressed_copy.output / "compression_report.json"
    file.write_text(json.dumps((json.loads(file.read_text()) if changes else {}) | changes))
    with pytest.raises(InputError, match=rf"compression_report\.json: .*{message}"):
        package(compressed_copy.output, "me/packed")


@pytest.mark.parametrize("content", ["[]", "{", "[" * 5000, '{"base_model": []}', '{"format": 1, "base_model": 3}'])
def test_an_odd_report_is_that_of_no_earlier_run(compressed_copy, content, monkeypatch):
    (compressed_copy.output / "compression_report.json").write_text(content)
    monkeypatch.setattr("tasks.report.digest", lambda _recipe: None)
    monkeypatch.setattr("tasks.report.code_version", lambda: None)

    class Recipe:
        def canonical(self):
            return {}

    assert earlier_report(str(compressed_copy.output), None, Recipe()) is None


@pytest.mark.parametrize("figures", [{}, {"n": 3, "ci95": [1], "metrics": {"accuracy": 1.0}}, {"n": 3, "metrics": []}])
def test_an_odd_score_is_refused_by_its_name(compressed_copy, figures):
    lineage = read_lineage(compressed_copy.output)
    name = next(name for name in lineage.evaluations if name.startswith("packed, vqa"))
    key = lineage.evaluations[name]
    steps = lineage.steps | {key: lineage.steps[key].model_copy(update={"figures": figures})}
    with pytest.raises(InputError, match=r"lineage\.json: figures of 'packed, vqa:.*: (n|ci95|metrics)"):
        model_card(compressed_copy.report(), lineage.model_copy(update={"steps": steps}), "me/packed")
