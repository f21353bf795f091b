"""What a run does to its output folder, and to whatever else lies there."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from changed_files import change_json

from bivlm.checkpoint.outputs import lock_of
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.reports.lineage import read_lineage
from bivlm.reports.pushing import package
from bivlm.workspace.locks import one_at_a_time
from flows import recording
from flows.cli import main as cli
from flows.leaderboard import leaderboard_flow
from flows.pruning import sweep_flow
from tasks import checkpoint, evaluation

MINE = {"notes.md": "mine", ".git/HEAD": "ref", "adapter/adapter_config.json": "{}", "pruning/notes.md": "mine"}


def put_mine(output, elsewhere):
    for name, text in MINE.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(text)
    elsewhere.write_text("secret")
    (output / "linked").symlink_to(elsewhere)


def mine_in(output):
    return {name: (output / name).read_text() for name in MINE if (output / name).is_file()}


def names_beside(compression):
    return {path.name for path in compression.place.iterdir()} - {"workspace", "recipe.yaml", "elsewhere"}


@pytest.fixture
def failing(monkeypatch):
    """Let the model that is loaded from the packed checkpoint fail to answer."""

    def fail(compression):
        def answer(folder, *arguments, **options):
            if Checkpoint.open(folder).packed:
                raise RuntimeError("the GPU fell off the bus")
            return loaded(folder, *arguments, **options)

        loaded = evaluation.load_model
        monkeypatch.setattr(evaluation, "load_model", answer)
        with pytest.raises(RuntimeError, match="fell off the bus"):
            compression.run()
        monkeypatch.setattr(evaluation, "load_model", loaded)

    return fail


def test_a_run_that_fails_leaves_no_output_and_the_next_one_takes_its_checkpoint(new_compression, tmp_path, failing):
    compression = new_compression(tmp_path)
    failing(compression)
    assert not compression.output.exists()
    assert compression.run()["reused"]
    assert names_beside(compression) == {"packed"}
    lineage = read_lineage(compression.output)
    assert Checkpoint.open(compression.output).digest() == lineage.packed.sha256
    assert compression.run()["reused"]


@pytest.mark.slow
def test_an_earlier_output_stays_whole_until_another_is_recorded(compressed_copy, failing):
    compression, output = compressed_copy, compressed_copy.output
    elsewhere = compression.place / "elsewhere"
    put_mine(output, elsewhere)
    before = read_lineage(output)
    compression.recipe["components"]["vision"]["groups"] = 3
    failing(compression)
    assert read_lineage(output) == before
    assert Checkpoint.open(output).digest() == before.packed.sha256

    result = compression.run()
    assert read_lineage(output).packed.sha256 == result["packed_sha256"] != before.packed.sha256
    assert mine_in(output) == MINE
    assert (output / "linked").readlink() == elsewhere
    assert names_beside(compression) == {"packed"}


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_fails_leaves_a_finished_output_of_the_same_weights_as_it_was(
    compressed_copy, questions, tmp_path, failing
):
    compression, output = compressed_copy, compressed_copy.output
    before = files_of(output)
    other = shutil.copytree(questions, tmp_path / "other")
    with (other / "data.jsonl").open("a") as file:
        file.write(json.dumps({"image": "red.png", "question": "Other?", "answers": ["no"]}) + "\n")
    compression.recipe |= {"name": "second", "evaluation": [f"vqa:{other}"]}
    failing(compression)
    assert files_of(output) == before
    package(output, "me/packed")


def test_all_of_a_run_is_written_when_all_of_it_is_known(compressed_copy, monkeypatch):
    """Report, lineage, page and the sweep's files; until then the output is locked for everybody who can see it."""
    compression, output = compressed_copy, compressed_copy.output
    before = files_of(output)
    sweep = {"places": ["language"], "layers": [1], "shares": [0.5], "masses": [0.5]}
    compression.recipe |= {"name": "second", "pruning": {"sweep": sweep}}
    page_text, locked = recording.page_text, []

    def full(*_):
        locked.append(lock_of(output).exists())
        raise RuntimeError("no room for the page")

    monkeypatch.setattr(recording, "page_text", full)
    with pytest.raises(RuntimeError, match="no room"):
        compression.run()
    assert locked == [True] and names_beside(compression) == {"packed"}
    assert files_of(output) == before

    monkeypatch.setattr(recording, "page_text", page_text)
    assert compression.run()["reused"]
    assert (output / "pruning" / "adaptive.csv").is_file()
    compression.recipe["pruning"] = {"sweep": {"places": ["vision"], "layers": [1], "shares": [0.5]}}
    compression.run()
    tables = {path.name for path in (output / "pruning").rglob("*") if path.is_file()}
    assert {"adaptive.csv"} & tables == set() and not [name for name in tables if "-language-" in name]
    assert [name for name in tables if "-vision-" in name]
    package(output, "me/packed")


@pytest.mark.slow
def test_an_output_of_any_name_goes_to_mlflow(new_compression, tmp_path):
    compression = new_compression(tmp_path)
    compression.output = tmp_path / "p%41q #?"
    compression.run(evaluate=False)
    (logged,) = (compression.workspace / "mlflow-artifacts").rglob("model.safetensors")
    assert logged.read_bytes() == (compression.output / "model.safetensors").read_bytes()


def test_the_lock_of_an_output_lets_one_in_at_a_time_and_is_gone_afterwards(tmp_path):
    inside, seen = [], []

    def work(_):
        with one_at_a_time(tmp_path / "lock", left=False):
            inside.append(1)
            seen.append(len(inside))
            time.sleep(0.001)
            inside.pop()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(40)))
    assert seen == [1] * 40
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_used_is_refused_before_the_model_is_downloaded(tmp_path, monkeypatch):
    def downloaded(*_):
        raise AssertionError("downloaded")

    monkeypatch.setattr(checkpoint, "resolve_model", downloaded)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not empty, and not an earlier output"):
        checkpoint.resolve_base.fn("owner/model", None, str(tmp_path))


def test_tables_are_not_written_over_a_checkpoint_or_files_of_others(compressed, tmp_path, questions):
    before = files_of(compressed.output)
    places = {"models": [str(compressed.model)], "workspace": str(tmp_path / "workspace"), "quiet": True}
    sweep = places | {"benchmarks": [f"vqa:{questions}"], "sweep": {"places": ["language"], "layers": [1]}}
    with pytest.raises(InputError, match="a checkpoint lies there"):
        sweep_flow(**sweep, output=str(compressed.output))
    board = {"model": str(compressed.model), "workspace": str(tmp_path / "workspace")}
    with pytest.raises(InputError, match="a checkpoint lies there"):
        leaderboard_flow(**board, recipes=[str(compressed.recipe_file())], output=str(compressed.output))
    assert files_of(compressed.output) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adaptive.csv").write_text("mine")
    with pytest.raises(InputError, match=r"adaptive\.csv: not made by bivlm"):
        sweep_flow(**sweep, output=str(tmp_path / "out"))


@pytest.mark.slow
def test_what_the_user_put_beside_a_checkpoint_does_not_go_to_mlflow(new_compression, tmp_path):
    compression = new_compression(tmp_path)
    compression.run(evaluate=False)
    put_mine(compression.output, tmp_path / "elsewhere")
    compression.recipe["components"]["vision"]["groups"] = 3
    compression.recipe["name"] = "other"
    compression.run(evaluate=False)
    artifacts = compression.workspace / "mlflow-artifacts"
    logged = {path.name for path in artifacts.rglob("*")}
    assert {"model.safetensors", "tokenizer.json", "lineage.json"} <= logged
    assert not {"linked", "notes.md", ".git", "HEAD", "adapter_config.json"} & logged
    assert not [path for path in artifacts.rglob("*") if path.is_symlink()]


def test_overlaps_and_files_of_others_are_bad_input_before_any_work(compressed_copy, capsys):
    compression, output = compressed_copy, compressed_copy.output
    before = {path: path.read_bytes() for path in compression.place.rglob("*") if path.is_file()}
    steps = len(list((compression.workspace / "steps").iterdir()))
    for changes in ({"workspace": str(output / "ws")}, {"output": str(compression.workspace / "out")}, {"output": ""}):
        assert cli.main(["compress", *compression.arguments(**changes)]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said and ("overlaps the" in said or "expected a folder" in said)
    (output / "special_tokens_map.json").write_text("{}")
    assert cli.main(["compress", *compression.arguments()]) == 2
    assert "special_tokens_map.json: not of the earlier output" in capsys.readouterr().err
    (output / "special_tokens_map.json").unlink()
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((compression.workspace / "steps").iterdir())) == steps
    assert not (output / "ws").exists()


def test_a_board_refuses_what_lies_where_its_checkpoints_go_before_the_first(new_compression, tmp_path, capsys):
    compression = new_compression(tmp_path)
    (tmp_path / "board" / "small").mkdir(parents=True)
    (tmp_path / "board" / "small" / "thesis.tex").write_text("mine")
    arguments = ["leaderboard", "--model", str(compression.model), "--recipes", str(compression.recipe_file())]
    arguments += ["--output", str(tmp_path / "board"), "--workspace", str(compression.workspace)]
    assert cli.main(arguments) == 2
    assert "small: not empty, and not an earlier output" in capsys.readouterr().err
    (tmp_path / "board" / "small").rename(tmp_path / "moved")
    (tmp_path / "board" / "board.csv").write_text("mine")
    assert cli.main(arguments) == 2
    assert "board.csv: not made by bivlm" in capsys.readouterr().err
    compression.recipe["name"] = "board.json"
    arguments[4] = str(compression.recipe_file())
    assert cli.main(arguments) == 2
    assert "recipe board.json: its folder would lie where the board's own file does" in capsys.readouterr().err
    assert not (compression.workspace / "steps").exists()


def tree(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def record_names(compression, workspace):
    change_json(compression.output / "lineage.json", lambda record: record.update(workspace=workspace))


def findings(compression, capsys, *options):
    cli.main(["lineage", str(compression.output), "--json", *options])
    return {each["subject"]: each for each in json.loads(capsys.readouterr().out)["findings"]}


def test_lineage_looks_and_writes_nothing(compressed_copy, capsys):
    before = tree(compressed_copy.place)
    found = findings(compressed_copy, capsys, "--workspace", str(compressed_copy.workspace))
    assert found["workspace"]["state"] == "holds"
    assert tree(compressed_copy.place) == before


@pytest.mark.parametrize("kind", ["a folder", "a bucket"])
def test_a_place_that_only_the_record_names_is_not_looked_into(compressed_copy, capsys, monkeypatch, kind):
    place = "s3://a-strangers-bucket/x" if kind == "a bucket" else str(compressed_copy.workspace)
    record_names(compressed_copy, place)

    def asked(*_):
        raise AssertionError("looked into")

    monkeypatch.setattr("bivlm.reports.lineage.find_workspace", asked)
    monkeypatch.setattr("bivlm.workspace.stores.s3.s3_client", asked)
    found = findings(compressed_copy, capsys)["workspace"]
    assert found["state"] == "not checked"
    assert f"--workspace {place}" in found["detail"]


def test_this_machines_own_workspace_is_looked_into(compressed_copy, capsys, monkeypatch):
    monkeypatch.setenv("BIVLM_WORKSPACE", f"{compressed_copy.workspace}/")
    record_names(compressed_copy, str(compressed_copy.workspace))
    assert findings(compressed_copy, capsys)["workspace"]["state"] == "holds"


def test_a_workspace_that_was_given_and_is_not_there_is_bad_input(compressed_copy, capsys, tmp_path):
    arguments = ["lineage", str(compressed_copy.output), "--workspace", str(tmp_path / "none")]
    assert cli.main(arguments) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
