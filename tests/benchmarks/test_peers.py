"""Peers' bytes counted on small files written by hand, and their rows among those of the board."""

import csv
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.peers import environments
from benchmarks.peers.__main__ import BOARD, PAGE, PEERS, QUESTIONS, _configurations
from benchmarks.peers.exchange import read_samples, write_samples
from benchmarks.peers.stored import model_bits, stored_bits, tensor_bytes
from benchmarks.peers.table import (
    COLUMNS,
    HEADING,
    MARK,
    SETS,
    as_csv,
    read_rows,
    row_of,
    table,
    with_board,
    with_table,
)
from bivlm.checkpoint.linears import Linear
from bivlm.errors import InputError
from bivlm.recipe.loading import shipped_recipes
from bivlm.reports.leaderboard.entries import Entry


def linear(name, rows, columns, disk_name=None):
    return Linear(name, f"{disk_name or name}.weight", "language", (rows, columns), torch.bfloat16)


LINEARS = [linear("model.a", 64, 128, "a"), linear("model.b", 32, 64, "b")]
# Two bits in groups of 64: 2 groups in each of 64 rows, with a scale of 16 bits and a zero point of 2.
PACKED = {
    "a.qweight": torch.zeros(64 * 128 // 16, dtype=torch.int32),
    "a.scales": torch.zeros(2, 64, dtype=torch.float16),
    "a.qzeros": torch.zeros(2, 4, dtype=torch.int32),
    "a.bias": torch.zeros(64, dtype=torch.float16),
}
LEFT = {"b.weight": torch.zeros(32, 64, dtype=torch.bfloat16), "norm.weight": torch.zeros(64)}


def test_bits_are_the_bytes_of_the_packed_tensors_and_16_for_what_is_left(tmp_path):
    save_file(PACKED | LEFT, tmp_path / "model.safetensors")
    found = stored_bits(tensor_bytes(tmp_path), LINEARS)
    assert found.quantized == 1
    assert found.quantized_bits == 2 + (16 + 2) / 64
    assert found.bits == pytest.approx((64 * 128 * (2 + 18 / 64) + 32 * 64 * 16) / (64 * 128 + 32 * 64))


def test_a_file_of_torch_counts_alike_under_the_names_of_the_loaded_model(tmp_path):
    state = {part.removeprefix("a."): tensor for part, tensor in PACKED.items()}
    torch.save({"model.a": {**state, "nbits": 2}, "model.b": {"weight": LEFT["b.weight"]}}, tmp_path / "qmodel.pt")
    save_file(PACKED | LEFT, (tmp_path / "model.safetensors"))
    other = tmp_path / "other"
    other.mkdir()
    shutil.move(tmp_path / "qmodel.pt", other)
    assert stored_bits(tensor_bytes(other), LINEARS) == stored_bits(tensor_bytes(tmp_path), LINEARS)


def test_the_models_bits_are_the_size_of_its_files(tmp_path):
    save_file(PACKED, tmp_path / "model-1.safetensors")
    save_file(LEFT, tmp_path / "model-2.safetensors")
    (tmp_path / "config.json").write_text("{}" * 1000)
    nbytes = sum((tmp_path / f"model-{part}.safetensors").stat().st_size for part in (1, 2))
    assert model_bits(tmp_path, 1000) == 8 * nbytes / 1000


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (PACKED, r"model\.b: the peer's files hold no tensor of this linear"),
        ({"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}, "hold no quantized linear"),
        ({**PACKED, "b.bias": torch.zeros(1)}, r"model\.b"),
        (None, "holds no file of weights, expected one that ends in .safetensors or .pt"),
    ],
)
def test_files_that_say_nothing_of_a_linear_are_refused(tmp_path, tensors, message):
    if tensors is not None:
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        stored_bits(tensor_bytes(tmp_path), LINEARS)


def test_samples_come_back_in_order(tmp_path):
    samples = [{"input_ids": torch.tensor([[number]]), "pixel_values": torch.rand(1, 3, 2, 2)} for number in range(12)]
    write_samples(samples, tmp_path / "samples.safetensors")
    found = read_samples(tmp_path / "samples.safetensors")
    assert [each["input_ids"].item() for each in found] == list(range(12))
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(found, samples, strict=True))


def entry(name="peer-w2g64", stored=2.25, accuracy=80.0, kl=0.0123456, error=0.125):
    accuracies = {f"reference:{each}": {"n": 250, "accuracy": accuracy, "ci95": (accuracy,) * 2} for each in SETS}
    bits = {"nominal": 2, "entropy": stored, "stored": stored}
    figures = {"model_bits": 3.5, "relative_error": error, "kl": kl, "accuracy": accuracies, "seconds": 12.6}
    return Entry.read({"recipe": name, "method": "peer", "bits": bits, **figures})


def peer(**more):
    return row_of(entry(**more), "peer", "1.0", 74, 2.125)


def test_a_row_rounds_as_the_board_does():
    row = peer()
    assert tuple(row) == COLUMNS
    expected = {"claimed_bits": "2.000", "stored_bits": "2.250", "accuracy": "80.0", "kl": "0.012", "error": "0.1250"}
    assert expected.items() <= row.items()
    assert (row["error_over_shannon"], row["quantized_bits"]) == (
        f"{0.125 * 2**4.5:.2f}",
        "2.125",
    )


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [peer(name="b", stored=3.0), peer(name="a")]
    (tmp_path / "peers.csv").write_text(as_csv(rows))
    assert read_rows(tmp_path / "peers.csv", COLUMNS) == rows[::-1]


def test_a_file_without_a_column_is_refused(tmp_path):
    (tmp_path / "peers.csv").write_text("recipe,kl\na,1\n")
    with pytest.raises(InputError, match=r"peers\.csv: expected the columns .* found no package"):
        read_rows(tmp_path / "peers.csv", ("recipe", "package"))


def ours():
    names = {"full precision": "", "one": "no", "two": "no", "chance": ""}
    figures = {"claimed_bits": "2", "model_bits": "4", "interval": "1.0", "error": "0.1", **dict.fromkeys(SETS, "70")}
    rows = [{"recipe": name, "finishing": done, **figures} for name, done in names.items()]
    for row, (stored, accuracy, kl) in zip(
        rows, [("16", "98", "0"), ("2.0", "70", "0.5"), ("2.5", "70", "0.1"), ("", "30", "")], strict=True
    ):
        row |= {"stored_bits": stored, "accuracy": accuracy, "kl": kl}
    rows[0] |= dict.fromkeys(SETS, "98")
    return [*rows, rows[1] | {"finishing": "yes", "accuracy": "75", "kl": "0.4"}]


def cells(lines):
    rows = [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]
    return {row[0]: row + [""] * (HEADING.count(" | ") + 1 - len(row)) for row in rows}


def test_peers_stand_among_the_recipes_by_their_bits_and_count_in_ranks_and_fronts():
    found = table(ours(), [peer()], ["one", "two"], 250)
    assert found[0] == HEADING
    assert list(cells(found)) == ["full precision", "`one`", f"`peer-w2g64`{MARK}", "`two`", "chance"]
    rows = cells(found)
    assert [rows[name][4] for name in ("`one`", f"`peer-w2g64`{MARK}", "`two`")] == ["1/1", "1/1", "2/2"]
    assert [rows[name][6] for name in ("`one`", f"`peer-w2g64`{MARK}", "`two`")] == ["AKE", "AK", ""]
    without = cells(table(ours(), [], ["one", "two"], 250))
    assert (without["`two`"][4], without["`two`"][6]) == ("1/1", "K")


def test_a_recipe_that_is_not_on_the_board_is_refused():
    with pytest.raises(InputError, match="recipes three: expected them on the board"):
        table(ours(), [], ["one", "three"], 250)


def test_a_peer_with_a_recipes_name_is_refused():
    with pytest.raises(InputError, match="'one' is on the board 2 times"):
        table(ours(), [peer(name="one")], ["one"], 250)


def test_only_the_table_of_a_page_is_replaced():
    page = f"before\n\n{HEADING}\n---\nold\n\nafter | a\n"
    assert with_table(page, [HEADING, "new"]) == f"before\n\n{HEADING}\nnew\n\nafter | a\n"
    with pytest.raises(InputError, match="no table with the heading"):
        with_table("nothing", [])


def test_the_page_has_the_table_of_both_files():
    lines = table(read_rows(BOARD), read_rows(PEERS, COLUMNS), shipped_recipes(), QUESTIONS)
    page = PAGE.read_text()
    assert with_table(page, lines) == page


def test_without_peers_the_ranks_and_fronts_are_those_that_the_board_wrote():
    rows = {row["recipe"]: row for row in read_rows(BOARD) if row["finishing"] == "no"}
    found = cells(table(read_rows(BOARD), [], shipped_recipes(), QUESTIONS))
    for name in shipped_recipes():
        expected = (f"{rows[name]['rank_accuracy']}/{rows[name]['rank_kl']}", rows[name]["front"])
        assert (found[f"`{name}`"][4], found[f"`{name}`"][6]) == expected, name


def test_a_new_board_takes_the_place_of_the_old_one_and_leaves_finished_rows():
    old = read_rows(BOARD)
    head = [*old[0]]
    measured = [
        {"kind": "full precision", "recipe": "", "accuracy": "97.7", "accuracy_low": "96", "accuracy_high": "98.5"},
        {"kind": "recipe", "recipe": "bivlm", "accuracy": "87.24", "accuracy_low": "85", "accuracy_high": "89.8"},
        {"kind": "failed", "recipe": "gptq-w2g64", "accuracy": ""},
        {"kind": "chance", "recipe": "", "accuracy": "37.75"},
    ]
    for row in measured:
        row |= {"claimed_bits": "1.0684", "stored_bits": "2.1644", "model_bits": "3.631", "kl": "0.00214"}
        row |= {"relative_error": "0.10631", "times_shannon": "2.131", "rank_accuracy": "1", "rank_kl": "2"}
        row |= {f"front_{each}": "1" for each in ("accuracy", "relative_error")} | {"front_kl": ""}
        row |= {f"reference:{each}": "50" for each in SETS}
    new = list(csv.DictReader(with_board(old, measured).splitlines()))
    assert [*new[0]] == head
    finished = [row for row in old if row["finishing"] == "yes"]
    assert [row["recipe"] for row in new] == ["full precision", "bivlm", *(row["recipe"] for row in finished), "chance"]
    assert new[2:-1] == finished
    said = [new[1][key] for key in ("stored_bits", "accuracy", "interval", "kl", "error", "front", "finishing")]
    assert said == ["2.164", "87.2", "2.6", "0.0021", "0.1063", "AE", "no"]
    assert (new[-1]["accuracy"], new[-1]["stored_bits"], new[-1]["perception"]) == ("37.8", "", "50.0")


def test_every_row_of_peers_is_of_a_configuration_and_a_pinned_version():
    known = {each.name: each.peer for each in _configurations()}
    with PEERS.open() as stream:
        for row in csv.DictReader(stream):
            assert known[row["recipe"]] == row["package"]
            assert row["version"] == environments.version_of(row["package"])
            assert float(row["stored_bits"]) >= float(row["claimed_bits"])


def test_an_environment_with_other_pins_is_made_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(environments.venv, "create", lambda place, **how: place.mkdir(exist_ok=True))
    monkeypatch.setattr(environments.subprocess, "run", lambda command, **how: calls.append(command[5:]) or _Done())
    for _ in range(2):
        python = environments.python_of("hqq", tmp_path)
    assert python == tmp_path / "hqq" / "bin" / "python"
    assert calls == [[environments.TORCH], [environments.TORCH, *environments.PINS["hqq"]]]
    (tmp_path / "hqq" / "installed.txt").write_text("older\n")
    environments.python_of("hqq", tmp_path)
    assert len(calls) == 4


class _Done:
    returncode, stderr = 0, ""


def test_what_pip_says_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(environments.venv, "create", lambda place, **how: place.mkdir())
    failed = subprocess.CompletedProcess([], 1, stderr="ResolutionImpossible")
    monkeypatch.setattr(environments.subprocess, "run", lambda *command, **how: failed)
    with pytest.raises(RuntimeError, match=r"(?s)pip could not install torch==.*ResolutionImpossible"):
        environments.python_of("hqq", tmp_path)
    assert not (tmp_path / "hqq" / "installed.txt").exists()
