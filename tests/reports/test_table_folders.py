"""Tables are written into a folder without the loss of anything that is not bivlm's."""

from contextlib import suppress
from pathlib import Path

import pytest

from bivlm.checkpoint.outputs import check_replaceable, is_of_sweep
from bivlm.errors import InputError
from bivlm.reports.table_folders import check_tables, write_tables


def put(path, text="mine"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_tables_do_not_overwrite_files_of_the_same_name(tmp_path):
    names = ("board.json", "board.md")

    def check():
        check_tables(tmp_path, names.__contains__, names)

    check()
    put(tmp_path / "board.md")
    with pytest.raises(InputError, match=r"board\.md: not made by bivlm, and would be overwritten"):
        check()
    put(tmp_path / "board.json", "{}")
    check()  # all of them: a board of before there was a listing
    (tmp_path / "board.json").unlink()
    check()
    with pytest.raises(InputError, match="not an earlier output"):  # a board is no packed checkpoint
        check_replaceable(tmp_path)


def test_tables_are_not_written_into_a_checkpoint(tmp_path):
    put(tmp_path / "config.json", "{}")
    with pytest.raises(InputError, match="a checkpoint lies there"):
        check_tables(tmp_path, {"board.md"}.__contains__, ["board.md"])
    assert contents(tmp_path) == {"config.json": "{}"}


def of_sweep(name):
    return is_of_sweep(name, below="")


@pytest.mark.parametrize("name", ["adaptive.csv", "tables/mine.csv", "tables"])
def test_no_name_that_a_sweep_may_write_is_the_users(tmp_path, name):
    put(tmp_path / name)
    with pytest.raises(InputError, match=name):
        check_tables(tmp_path, of_sweep, ["sweep.csv"])
    assert contents(tmp_path) == {name: "mine"}


def test_tables_of_an_earlier_run_go_and_those_of_the_user_stay(tmp_path):
    earlier = {"sweep.csv": "1", "adaptive.csv": "1", "tables/a.csv": "1"}
    for name, text in earlier.items():  # of before there was a listing
        put(tmp_path / name, text)
    check_tables(tmp_path, of_sweep, ["sweep.csv"])
    put(tmp_path / "tables" / "late.csv")
    write_tables(tmp_path, {"sweep.csv": "2", "tables/b.csv": "2"}, of_sweep)
    found = contents(tmp_path)
    assert found.pop(".bivlm-files").split() == ["sweep.csv", "tables/b.csv"]
    assert found == {"sweep.csv": "2", "tables/b.csv": "2", "tables/late.csv": "mine"}


@pytest.mark.parametrize("kill", range(8))
def test_tables_of_a_run_that_was_killed_are_no_strangers(tmp_path, monkeypatch, kill):
    class Killed(BaseException):
        pass

    texts = {"sweep.csv": "1", "tables/a.csv": "1", "losses.svg": "1"}
    left = [kill]
    replace_file = Path.replace

    def killed(path, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with suppress(Killed):
        write_tables(tmp_path, texts, of_sweep)
    left[0] = 100
    check_tables(tmp_path, of_sweep, ["sweep.csv", "losses.svg"])
    write_tables(tmp_path, texts, of_sweep)
    assert {name: (tmp_path / name).read_text() for name in texts} == texts
