"""The board ranks what was measured, says how sure it is, and lists what could not be measured."""

import csv
import io
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.errors import InputError
from bivlm.reports.leaderboard.entries import (
    LOSSES,
    Accuracy,
    Entry,
    FailedEntry,
    FullPrecision,
    mean_accuracy,
    method_label,
    relative_error,
    shannon_bound,
)
from bivlm.reports.leaderboard.ranking import board, fingerprint, pareto_front, ranks_of
from bivlm.reports.leaderboard.tables import as_csv, as_markdown
from flows.cli.console import print_board

MODEL = {"id": "small", "revision": None, "sha256": "ab" * 32}
CHANCE = {"reference:choice": 25.0, "reference:open": 10.0}


def accuracies(choice=80.0, open_=60.0, n=250):
    tasks = zip(CHANCE, (choice, open_), strict=True)
    return {task: {"n": n, "accuracy": x, "ci95": [max(x - 8, 0), min(x + 8, 100)]} for task, x in tasks}


def entry(recipe="plain", stored=2.0, *, claimed=None, kl=0.5, error=0.1, **more):
    nominal = stored - 0.5 if claimed is None else claimed
    figures = {
        "bits": {"nominal": nominal, "entropy": stored - 0.1, "stored": stored},
        "model_bits": stored + 2,
        "relative_error": error,
        "kl": kl,
        "accuracy": accuracies(),
        "seconds": 12.5,
    }
    return Entry.read({"recipe": recipe, "method": "bivlm", **figures, **more})


def failure(recipe="broken", reason="no Hessian | of rank 0"):
    return FailedEntry(recipe=recipe, method="gptq", needs_calibration=True, failed=reason)


FULL = FullPrecision(bits=16, model_bits=16.02, accuracy=accuracies(98.0, 93.0))


def made(entries):
    return board(entries, FULL, model=MODEL, chance=CHANCE)


def cells(line):
    return [cell.strip() for cell in line.replace("\\|", "¦").strip().strip("|").split("|")]


# Few distinct values, so that ties in one or both are common.
_PLACES = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(0, 5)), max_size=12)


@given(_PLACES, st.sampled_from(LOSSES), st.none() | st.tuples(st.integers(1, 5), st.integers(0, 5)))
@settings(deadline=None)
def test_the_front_is_what_nothing_dominates(places, loss, full_precision):
    entries = [
        entry(f"r{number}", bits, kl=float(lost), error=lost / 10, accuracy=accuracies(100 - lost, 100 - other))
        for number, (bits, lost, other) in enumerate(places)
    ]
    scale = {"accuracy": 1, "kl": 1, "relative_error": 0.1}[loss]
    end = None if full_precision is None else (full_precision[0], full_precision[1] * scale)
    points = {e.recipe: (e.bits.stored, e.loss(loss)) for e in entries}
    rivals = [*points.values(), *([end] if end else [])]

    def dominated(point):
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in rivals)

    expected = {name for name, point in points.items() if not dominated(point)}
    front = [e.recipe for e in pareto_front(entries, loss, end)]
    assert set(front) == expected
    assert [points[name] for name in front] == sorted(points[name] for name in front)


def test_entries_equal_in_bits_and_loss_stand_on_the_front_together():
    twins = [entry("b"), entry("a"), entry("worse", kl=0.6), entry("larger", 2.1)]
    assert [e.recipe for e in pareto_front(twins, "kl")] == ["a", "b"]


def test_what_full_precision_beats_is_not_on_the_front():
    found = made([entry("small", 2.0), entry("bloated", 17.0, kl=0.01, error=0.001)])
    assert found["pareto"] == {loss: ["small"] for loss in LOSSES}


@pytest.mark.parametrize(("bits", "error"), [(1, 0.25), (1.25, 0.177), (1.5, 0.125), (2, 0.0625)])
def test_shannons_bound_has_the_published_values(bits, error):
    assert shannon_bound(bits) == pytest.approx(error, abs=3e-4)
    assert entry(stored=bits, error=3 * shannon_bound(bits)).times_shannon == pytest.approx(3)


def test_the_interval_of_the_mean_is_the_normal_one_where_accuracies_are_moderate():
    results = [Accuracy(n=2000, accuracy=x, ci95=(x, x)) for x in (40.0, 55.0, 70.0)]
    variance = sum(p * (1 - p) / 2000 for p in (0.4, 0.55, 0.7)) / 9
    found = mean_accuracy(results)
    assert found["accuracy"] == pytest.approx(55)
    assert found["ci95"] == pytest.approx([55 - 196 * math.sqrt(variance), 55 + 196 * math.sqrt(variance)], abs=0.03)


@pytest.mark.parametrize(
    "shares", [(0.5, 0.7, 0.3), (0.97, 0.99, 0.995), (0.02, 0.9, 0.6, 0.99), (0.999, 0.995, 0.998)]
)
def test_the_interval_holds_the_truth_in_95_of_100_experiments(shares):
    random, experiments, n = np.random.default_rng(0), 2000, 120
    inside = 0
    for right in random.binomial(n, shares, size=(experiments, len(shares))):
        found = mean_accuracy([Accuracy(n=n, accuracy=100 * k / n, ci95=(100 * k / n,) * 2) for k in right])
        inside += found["ci95"][0] <= 100 * np.mean(shares) <= found["ci95"][1]
    # Wilson's own coverage swings by some percent where less than one wrong answer is expected.
    assert 0.93 <= inside / experiments <= (0.97 if max(shares) < 0.9 else 1)


def test_nothing_but_right_answers_is_not_certainty():
    found = mean_accuracy([Accuracy(n=50, accuracy=100, ci95=(100, 100))] * 2)
    assert found["ci95"][1] == 100
    assert 94 < found["ci95"][0] < 96  # Wilson's lower limit of 50 in 50 is 92.9; two such sets know more


def test_an_interval_that_knows_of_images_is_not_narrowed():
    one = Accuracy(n=1000, accuracy=50, ci95=(40, 61))  # five times as wide as of independent questions
    assert mean_accuracy([one])["ci95"] == pytest.approx([40, 61])


def test_the_relative_error_of_a_model_is_weighted_by_the_energy_of_its_layers():
    random = np.random.default_rng(0)
    weights = [random.normal(0.1, scale, shape) for scale, shape in ((1, (8, 4)), (3, (5, 6)))]
    rebuilt = [weight + random.normal(0, 0.2, weight.shape) for weight in weights]
    lost = [((w - r) ** 2).sum() for w, r in zip(weights, rebuilt, strict=True)]
    total = [(w**2).sum() for w in weights]
    layers = [
        {"name": "l", "shape": list(w.shape), "mean": w.mean(), "std": w.std(), "error": e / t}
        for w, e, t in zip(weights, lost, total, strict=True)
    ]
    assert relative_error(layers) == pytest.approx(sum(lost) / sum(total))


def test_a_layer_without_a_finite_error_is_named():
    layer = {"name": "model.q", "shape": [2, 2], "mean": 0.0, "std": 1.0, "error": math.inf}
    with pytest.raises(InputError, match=r"layer model\.q: relative error inf"):
        relative_error([layer])
    with pytest.raises(InputError, match="other than zero"):
        relative_error([layer | {"std": 0.0, "error": 0.0}])


def test_a_recipe_is_labelled_by_its_methods():
    plain, other = {"method": "bivlm", "groups": 2}, {"method": "awq"}
    assert method_label({"vision": plain, "language": plain}) == "bivlm"
    assert method_label({"vision": plain, "language": other}) == "awq+bivlm"


def test_the_board_stands_by_stored_bits_whatever_the_order_of_entries():
    entries = [entry("b", 2.0), entry("a", 2.0), entry("tiny", 1.1, kl=3.0), failure("z"), failure("c")]
    boards = [made(order) for order in itertools.permutations(entries)]
    assert all(found == boards[0] for found in boards)
    assert [(e["number"], e["recipe"]) for e in boards[0]["entries"]] == [(1, "tiny"), (2, "a"), (3, "b")]
    assert [f["recipe"] for f in boards[0]["failed"]] == ["c", "z"]
    assert boards[0]["pareto"]["kl"] == ["tiny", "a", "b"]


def test_the_board_is_ready_for_json():
    found = made([entry(), failure()])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_only_the_seconds_may_change_between_two_runs_of_the_same_work():
    first, again, other = (made([entry(seconds=1.0)]), made([entry(seconds=9.0)]), made([entry(kl=0.4)]))
    assert first["seconds"] != again["seconds"]
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)


def test_an_entry_survives_json():
    for each in (entry(), failure()):
        assert type(each).model_validate(json.loads(each.model_dump_json())) == each


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no entries: expected at least one recipe"),
        ([entry("a"), failure("a")], "'a' is on the board 2 times"),
        ([entry("a", accuracy=accuracies(n=100))], r"'a' was asked 100 of reference:choice.*full precision 250 of"),
        ([entry("a", accuracy={"other": accuracies()["reference:open"]})], "'a' was asked 250 of other"),
    ],
)
def test_what_cannot_be_compared_is_refused(entries, message):
    with pytest.raises(InputError, match=message):
        made(entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": math.nan}, "'plain' cannot go on the board: kl"),
        ({"relative_error": math.inf}, "relative_error"),
        ({"bits": {"nominal": 1, "entropy": 2, "stored": math.nan}}, "bits"),
        ({"kl": None}, "kl: Input should be a valid number"),
        ({"accuracy": {}}, "accuracy: .* at least 1 item"),
        ({"failed": "out of memory"}, "failed: Extra inputs are not permitted"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_an_entry_has_every_figure_and_no_reason_to_fail(change, message):
    with pytest.raises(InputError, match=message):
        entry(**change)


def test_markdown_is_one_table_with_full_precision_first_and_chance_last():
    found = made([entry("b", 2.087, claimed=1.014, kl=0.25, error=0.125), entry("a", 3.4, kl=0.1)])
    lines = as_markdown(found).splitlines()
    table = [cells(line) for line in lines if line.startswith("|")]
    assert len({len(row) for row in table}) == 1
    assert [row[1] for row in table] == ["recipe", ":---", "full precision", "b", "a", "chance"]
    row = dict(zip(table[0], table[3], strict=True))
    assert row == {
        "#": "1",
        "recipe": "b",
        "claimed": "1.014",
        "stored": "2.087",
        "model": "4.09",
        "accuracy": "70.0 ± 5.7",  # sqrt(8^2 + 8^2) / 2
        "choice": "80.0",
        "open": "60.0",
        "KL": "0.250",
        "rank A/K": "1/1",
        "error": "0.1250",
        "× Shannon": f"{0.125 / 2 ** (-2 * 2.087):.2f}",
        "front": "AKE",
    }
    assert dict(zip(table[0], table[4], strict=True))["front"] == "KE"  # no more accurate than with fewer bits
    assert lines[-1].startswith("Bits per weight") and lines[-1].endswith(
        "× Shannon: the error over 2^(−2 × stored bits)."
    )
    assert dict(zip(table[0], table[-1], strict=True))["accuracy"] == "17.5"


def test_tasks_of_one_last_name_keep_their_whole_names():
    names = ("folder:/a/val", "folder:/b/val")
    results = dict(zip(names, accuracies().values(), strict=True))
    full = FullPrecision(bits=16, model_bits=16, accuracy=results)
    heading = as_markdown(board([entry(accuracy=results)], full, model=MODEL)).splitlines()[0]
    assert all(name in heading for name in names)


def test_failed_recipes_are_listed_with_their_reason():
    found = made([entry(), failure(reason="no Hessian |\nof rank 0")])
    assert "- broken: no Hessian | of rank 0" in as_markdown(found).splitlines()
    (row,) = [row for row in csv.DictReader(io.StringIO(as_csv(found))) if row["kind"] == "failed"]
    assert (row["recipe"], row["method"], row["needs_calibration"]) == ("broken", "gptq", "True")
    assert row["reason"] == "no Hessian |\nof rank 0"
    assert made([failure()])["entries"] == []


def test_csv_holds_every_figure():
    found = made([entry("b", 2.087, kl=0.123456789), entry("a", 3.4, finish=True), failure()])
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [row["kind"] for row in rows] == ["full precision", "recipe", "recipe", "failed", "chance"]
    full, b, _, _, chance = rows
    assert (b["recipe"], b["stored_bits"], b["claimed_bits"], b["kl"]) == ("b", "2.087", "1.587", "0.123457")
    assert (b["reference:open"], b["reference:open_low"], b["reference:open_high"]) == ("60", "52", "68")
    assert (b["finish"], b["front_kl"], b["seconds"]) == ("False", "1", "12.5")
    assert (full["stored_bits"], full["kl"], full["number"]) == ("16", "0", "")
    assert (chance["accuracy"], chance["reference:choice"]) == ("17.5", "25")


def test_an_unknown_chance_is_a_dash():
    found = board([entry()], FULL, model=MODEL, chance={"reference:choice": 25.0})
    assert found["chance"] == {"accuracy": {"reference:choice": 25.0, "reference:open": None}, "mean": None}
    assert cells(as_markdown(found).splitlines()[4])[5:8] == ["–", "25.0", "–"]


def test_the_terminal_table_fits_into_100_columns(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    tasks = {f"reference:{name}": accuracies()["reference:open"] for name in ("perception", "cognition", "choice", "o")}
    full = FullPrecision(bits=16, model_bits=16.02, accuracy=tasks)
    names = ["bivlm-6-hessian-feedback-finish", "gptq-3"]
    entries = [entry(name, 3.66, kl=12.345, error=0.5, accuracy=tasks) for name in names]
    print_board(board([*entries, failure(reason="[bold] brackets " * 12)], full, model=MODEL))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "…" not in printed
    assert "not on the board: broken: [bold] brackets" in printed


def test_the_terminal_leaves_many_benchmarks_to_the_files(capsys):
    tasks = {f"set:{number}": accuracies()["reference:open"] for number in range(12)}
    full = FullPrecision(bits=16, model_bits=16.02, accuracy=tasks)
    print_board(board([entry("bivlm-6-hessian-feedback-finish", accuracy=tasks)], full, model=MODEL))
    printed = capsys.readouterr().out
    assert "bivlm-6-hessian-feedback-finish" in printed
    assert max(map(len, printed.splitlines())) <= 100


@given(_PLACES)
@settings(deadline=None)
def test_the_rank_is_one_more_than_the_recipes_of_no_more_bits_that_lose_less(places):
    entries = [
        entry(f"r{number}", bits, kl=float(lost), error=0.1, accuracy=accuracies(100 - other, 100 - other))
        for number, (bits, lost, other) in enumerate(places)
    ]
    found = made(entries) if entries else None
    for number, (bits, lost, other) in enumerate(places):
        ranks = ranks_of(found, f"r{number}")
        assert ranks["kl"] - 1 == sum(b <= bits and kl < lost for b, kl, _ in places)
        assert ranks["accuracy"] - 1 == sum(b <= bits and o < other for b, _, o in places)


def test_what_the_kl_was_measured_on_stands_in_every_form_of_the_board(capsys):
    samples = "64 held-out samples of /data/mine"
    found = board([entry()], FULL, model=MODEL, chance=CHANCE, measured_on=samples)
    print_board(found)
    assert f"KL to full precision in nats per token, on {samples}." in " ".join(capsys.readouterr().out.split())
    assert f"KL to full precision in nats per token, on {samples}." in as_markdown(found)
    assert fingerprint(found) != fingerprint(made([entry()]))


def test_a_board_says_on_which_sets_full_precision_is_not_above_chance(capsys):
    full = FullPrecision(bits=16, model_bits=16.02, accuracy=accuracies(24.0, 93.0))
    found = board([entry()], full, model=MODEL, chance=CHANCE)
    said = "reference:choice: full precision scores 24.0 %, chance is 25.0 %: these questions do not measure this model"
    assert as_markdown(found).startswith(f"Warning: {said}; name its own benchmark in `evaluation`, e.g. vqa:FOLDER.\n")
    print_board(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"warning: {said}" in printed and "reference:open: full" not in printed
    assert "Warning" not in as_markdown(made([entry()]))
