"""A new output takes the place of an earlier one: whole, and without the loss of anything that is not bivlm's."""

import errno
import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from bivlm.checkpoint import outputs
from bivlm.checkpoint.outputs import check_replaceable, list_files, own_copy, own_files, replace, settle
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.reports.table_folders import check_tables, write_tables
from bivlm.workspace.places import output_folder

OURS = {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "additional_chat_templates/tool.jinja"}
RECORDS = ("lineage.json", "compression_report.json", "report.html")
CONFIG = json.dumps({"quantization_config": {"quant_method": "bivlm", "format": 1, "packed": {}}})
# Names that people put beside a checkpoint, in places of their own and in bivlm's.
THEIRS = ("notes.md", "README.md", ".git/HEAD", ".git/objects/ab/cd", "adapter/adapter_config.json", "adapter/a.bin")
THEIRS += ("pruning/notes.md", "pruning/tables/mine.ods", "empty/", "Config.JSON.bak", "sweep.csv", ".hidden")
LINKED = ("secrets", "adapter", "pruning", "notes.md", "shared/link", "report.bak")
READ = ("special_tokens_map.json", "extra.safetensors", "additional_chat_templates/mine.jinja", "modeling.py")


def make_output(folder, label, listed=True, extra=()):
    """An output whose files say `label`; without a listing it is as earlier versions left it, records included."""
    names = [*OURS, *extra]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(CONFIG if name == "config.json" else label)
    if listed:
        list_files(folder, names)
    for name in RECORDS:
        (folder / name).write_text(json.dumps({"packed": {"files": dict.fromkeys(names, "")}}))
    return folder


def add_theirs(folder, chance, outside, names):
    """Some files, folders and links of the user, as `contents` shows them."""
    before = contents(folder)
    for name in chance.sample(names, chance.randint(0, len(names))):
        path = folder / name
        if any(parent.is_symlink() or parent.is_file() for parent in (path, *path.parents)) or path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in LINKED and chance.random() < 0.6:
            path.symlink_to(chance.choice([outside, outside / "secret", "nowhere", "../missing", "config.json"]))
        elif name.endswith("/"):
            path.mkdir()
        else:
            path.write_text(f"mine {name}")
    return {name: found for name, found in contents(folder).items() if name not in before}


def contents(folder):
    """Text or target by name of everything in `folder`, links not followed; folders without anything are None."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            if path.is_symlink():
                found[path.relative_to(folder).as_posix()] = ("link", str(path.readlink()))
            elif path.is_file():
                found[path.relative_to(folder).as_posix()] = path.read_text()
            elif not any(path.iterdir()):
                found[path.relative_to(folder).as_posix()] = None
    return found


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """A function that kills the process, as it were, at the n-th change to the disk from now on."""
    left = [None]

    def counting(function):
        def changed(*arguments, **options):
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return function(*arguments, **options)

        return changed

    for name in ("rename", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(Path, name, counting(getattr(Path, name)))

    def set_to(number):
        left[0] = number

    return set_to


def check_case(seed, place, killed_at):
    """An output of some kind, things of the user before and during the run, and a death anywhere."""
    chance = random.Random(seed)
    outside = place / "outside"
    outside.mkdir(parents=True)
    (outside / "secret").write_text("secret")
    output = place / chance.choice(["out", "OUT.v1", "o" * 255, "ä b\u00a0c"])
    old = make_output(output, "old", listed=chance.random() < 0.7, extra=("added_tokens.json",))
    if chance.random() < 0.5 and (old / ".bivlm-files").exists():
        (old / "pruning").mkdir()
        (old / "pruning" / "sweep.csv").write_text("old")
        list_files(old, ["pruning/sweep.csv"])
    theirs = add_theirs(old, chance, outside, [*THEIRS, *LINKED])
    new = make_output(place / "new", "new", extra=chance.choice([(), ("pruning/sweep.csv",)]))
    try:
        check_replaceable(output)
    except InputError as refused:
        assert any(str(refused).count(name) for name in theirs)
        killed_at(None)
        return "refused"
    theirs |= add_theirs(old, chance, outside, ["late.md", "adapter/late.bin"])
    before = contents(old)
    killed_at(chance.choice([None, *range(12)]))
    died = False
    try:
        replace(output, new)
    except Killed:
        died = True
    except InputError:
        assert contents(output) == before, "refused, with something changed"
        return "refused"
    killed_at(None)
    # Nothing of the user's is gone, wherever it is now; the output is the one or the other.
    beside = outputs.earlier_of(output)
    for _ in range(2):
        everything = (contents(beside) if beside.exists() else {}) | (contents(output) if output.exists() else {})
        assert {name: everything.get(name, "gone") for name in theirs} == theirs
        found = {(output / name).read_text() for name in OURS - {"config.json"}} if output.exists() else {"old"}
        assert len(found) == 1
        settle(output)
    assert not beside.exists()
    after = contents(output)
    stale = {name for name in before if name not in theirs and name not in after}
    if found == {"new"}:
        assert {name for name in after if name not in theirs} == own_files(output)
        assert "added_tokens.json" in stale
    else:
        assert after == before
    assert (outside / "secret").read_text() == "secret"
    assert contents(outside) == {"secret": "secret"}
    return "killed" if died else "replaced"


def run_cases(seeds, tmp_path, killed_at):
    came = [check_case(seed, tmp_path / str(seed), killed_at) for seed in seeds]
    assert {"killed", "replaced", "refused"} <= set(came)


def test_nothing_of_the_users_is_lost_and_the_output_is_whole(tmp_path, killed_at):
    run_cases(range(100), tmp_path, killed_at)


@pytest.mark.slow
def test_nothing_of_the_users_is_lost_in_a_thousand_cases(tmp_path, killed_at):
    run_cases(range(100, 1100), tmp_path, killed_at)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", READ)
def test_what_would_be_read_as_a_part_of_the_new_output_is_refused_by_name(tmp_path, listed, name):
    output = make_output(tmp_path / "out", "old", listed)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"{name}: not of the earlier output"):
        check_replaceable(output)
    assert contents(tmp_path) == before


def test_a_file_that_the_new_output_has_with_the_same_bytes_is_no_loss(tmp_path):
    """What an earlier version left when it was killed has neither listing nor record."""
    output = make_output(tmp_path / "out", "same", listed=False)
    (output / "lineage.json").unlink()
    with pytest.raises(InputError, match="not of the earlier output"):
        check_replaceable(output)
    base = make_output(tmp_path / "base", "same", listed=False)
    shutil.rmtree(base / "additional_chat_templates")
    shutil.rmtree(output / "additional_chat_templates")
    check_replaceable(output, base)
    (output / "notes.md").write_text("mine")
    replace(output, make_output(tmp_path / "new", "same"))
    assert contents(output).keys() == {*OURS, *RECORDS, ".bivlm-files", "notes.md"}
    assert not outputs.earlier_of(output).exists()
    (output / "NOTICE").write_text("mine")
    (base / "NOTICE").write_text("another")
    with pytest.raises(InputError, match="NOTICE: not of the earlier output"):
        check_replaceable(output, base)


def test_a_link_in_the_place_of_a_file_of_ours_is_the_users(tmp_path):
    output = make_output(tmp_path / "out", "old")
    (tmp_path / "mine.json").write_text("mine")
    (output / "tokenizer.json").unlink()
    (output / "tokenizer.json").symlink_to(tmp_path / "mine.json")
    with pytest.raises(InputError, match=r"tokenizer.json: not of the earlier output"):
        check_replaceable(output)


def test_what_a_listing_says_of_other_places_is_not_believed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    output = make_output(tmp_path / "out", "old")
    (output / "linked").symlink_to(tmp_path / "elsewhere")
    with (output / ".bivlm-files").open("a") as listing:
        listing.write(f"../mine.txt\n{tmp_path}/mine.txt\nlinked/file\n..\n.\n\n")
    replace(output, make_output(tmp_path / "new", "new"))
    assert (tmp_path / "mine.txt").read_text() == (tmp_path / "elsewhere" / "file").read_text() == "mine"
    assert (output / "linked").is_symlink()


@pytest.mark.parametrize("kind", ["partial", "earlier"])
def test_a_folder_of_the_users_beside_the_output_is_not_removed(tmp_path, kind):
    (tmp_path / f".out.{kind}").mkdir()
    (tmp_path / f".out.{kind}" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=rf"\.out\.{kind}: needed beside the output, and not made by bivlm"):
        check_replaceable(tmp_path / "out")
    assert (tmp_path / f".out.{kind}" / "thesis.tex").read_text() == "mine"


def test_a_run_killed_between_the_two_renames_loses_no_output(tmp_path):
    output = make_output(tmp_path / "out", "old")
    (output / "notes.md").write_text("mine")
    before = contents(output)
    output.rename(outputs.earlier_of(output))
    check_replaceable(output)
    settle(output)
    assert contents(output) == before


@pytest.mark.parametrize("text", ["", " ", "s3://bucket/out", "a\0b", "~nobody-of-this-name/out", "x" * 256, "\udcff"])
def test_a_name_that_can_be_no_folder_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="output "):
        check_replaceable(output_folder(text))
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_no_output_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken").symlink_to("missing")
    (tmp_path / "loop").symlink_to("loop")
    for text in ("/", str(tmp_path / "file"), str(tmp_path / "broken"), str(tmp_path / "loop"), "/proc"):
        with pytest.raises(InputError, match="output "):
            check_replaceable(output_folder(text))
    with pytest.raises(InputError, match="output "):
        check_replaceable(output_folder(tmp_path / "file" / "below"))
    (tmp_path / "out").mkdir()
    for text in (f"{tmp_path}/out/", f"{tmp_path}/out/.", f"{tmp_path}/file/../out", f"{tmp_path}/./out"):
        assert output_folder(text) == tmp_path / "out"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission_is_refused(tmp_path):
    output = make_output(tmp_path / "out", "old")
    for closed in (output, tmp_path):
        closed.chmod(0o555)
        with pytest.raises(InputError, match="cannot be written to"):
            check_replaceable(output)
        closed.chmod(0o755)


def test_a_copy_for_others_holds_our_files_alone_and_is_gone_afterwards(tmp_path):
    output = make_output(tmp_path / "out", "old")
    expected = {name: (output / name).read_text() for name in own_files(output)}
    (output / "notes.md").write_text("mine")
    (output / "id_rsa").symlink_to("/etc/passwd")
    with own_copy(output) as copy:
        assert contents(copy) == expected
        assert (copy / "model.safetensors").stat().st_ino == (output / "model.safetensors").stat().st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tables_do_not_overwrite_files_of_the_same_name(tmp_path):
    names = ("board.json", "board.md")

    def check():
        check_tables(tmp_path, names.__contains__, names)

    check()
    (tmp_path / "board.md").write_text("mine")
    with pytest.raises(InputError, match=r"board\.md: not made by bivlm, and would be overwritten"):
        check()
    (tmp_path / "board.json").write_text("{}")
    check()  # all of them: a board of before there was a listing
    (tmp_path / "board.json").unlink()
    check()
    with pytest.raises(InputError, match="not an earlier output"):  # a board is no packed checkpoint
        check_replaceable(tmp_path)


def test_the_space_of_a_killed_build_is_given_back(tmp_path):
    left = outputs.fresh_partial(tmp_path / "out")
    (left / "model.safetensors").write_bytes(b"half")
    assert list(outputs.fresh_partial(tmp_path / "out").iterdir()) == [left / ".bivlm-files"]
    shutil.rmtree(left)


def test_code_of_the_users_does_not_become_a_part_of_the_new_output(tmp_path):
    output = make_output(tmp_path / "out", "old")
    (output / "custom_generate").mkdir()
    check_replaceable(output)
    (output / "custom_generate" / "generate.py").write_text("mine")
    with pytest.raises(InputError, match="custom_generate: not of the earlier output"):
        check_replaceable(output)


def test_a_licence_that_is_not_the_earlier_outputs_is_refused(tmp_path):
    output = make_output(tmp_path / "out", "old")
    (output / "NOTICE").write_text("mine")
    with pytest.raises(InputError, match="NOTICE: not of the earlier output"):
        check_replaceable(output)


def test_an_output_of_before_there_was_a_listing_has_the_licences_of_its_base(tmp_path):
    output = make_output(tmp_path / "out", "old", listed=False)
    files = dict.fromkeys(OURS - {"LICENSE"}, "")
    (output / "lineage.json").write_text(json.dumps({"packed": {"files": files}}))
    check_replaceable(output)
    later = (output / "lineage.json").stat().st_mtime + 60
    (output / "NOTICE").write_text("the user's, added to the finished output")
    os.utime(output / "NOTICE", (later, later))
    with pytest.raises(InputError, match="NOTICE: not of the earlier output"):
        check_replaceable(output)
    (output / "NOTICE").unlink()
    replace(output, make_output(tmp_path / "new", "new"))
    assert (output / "LICENSE").read_text() == "new"


@pytest.mark.parametrize("seed", range(20))
def test_a_listing_counts_for_names_that_bivlm_writes_alone(tmp_path, seed):
    chance = random.Random(seed)
    output = make_output(tmp_path / "out", "old")
    names = [
        *THEIRS[:-3],
        "README.md",
        "img.png",
        "pruning/tables/a/b.csv",
        "custom_generate/data.bin",
        "deep/config.json",
    ]
    mine = [name for name in chance.sample(names, 6) if not name.endswith("/")]
    for name in mine:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("mine")
    with (output / ".bivlm-files").open("a") as listing:
        listing.write("".join(f"{name}\n" for name in mine))
    assert not {*mine} & own_files(output)
    try:
        replace(output, make_output(tmp_path / "new", "new"))
    except InputError:
        assert "custom_generate/data.bin" in mine
    assert {(output / name).read_text() for name in mine} == {"mine"}


def test_what_a_checkpoint_has_is_what_its_listing_may_name(tiny_llava, tmp_path):
    """Whatever `Checkpoint` reads is bivlm's in an output; nothing that it reads may be carried into one."""
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    for name in ("modeling.py", "custom_generate/generate.py", "additional_chat_templates/a.jinja", "LICENSE", "a.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    checkpoint = Checkpoint.open(folder)
    files = [*checkpoint.weight_files, *checkpoint.side_files, *checkpoint.licence_files, folder / "config.json"]
    names = {file.relative_to(folder).as_posix() for file in files}
    assert {"modeling.py", "custom_generate/generate.py", "additional_chat_templates/a.jinja", "LICENSE"} < names
    assert {name for name in names if not outputs.is_written(name)} == set()


def test_a_folder_that_cannot_be_moved_is_refused_by_name_and_the_output_stays(tmp_path, monkeypatch):
    output = make_output(tmp_path / "out", "old")
    (output / "data").mkdir()
    (output / "data" / "file").write_text("mine")
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "data" or ismount(path))
    before = contents(output)
    new = make_output(tmp_path / "new", "new")
    for attempt in (check_replaceable, lambda output: replace(output, new)):
        with pytest.raises(InputError, match="out/data cannot be moved"):
            attempt(output)
        assert contents(output) == before


def test_a_move_that_the_disk_refuses_leaves_the_new_output_whole(tmp_path, monkeypatch):
    output = make_output(tmp_path / "out", "old")
    (output / "data").mkdir()
    (output / "data" / "file").write_text("mine")
    rename = Path.rename

    def refused(path, target):
        if path.name == "data":
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    new = make_output(tmp_path / "new", "new")
    for attempt in (lambda: replace(output, new), lambda: settle(output)):
        with pytest.raises(InputError, match=r"\.out\.earlier/data: cannot be moved or removed .*busy"):
            attempt()
        assert (output / "model.safetensors").read_text() == "new"
    monkeypatch.setattr(Path, "rename", rename)
    settle(output)
    assert (output / "data" / "file").read_text() == "mine"
    assert not outputs.earlier_of(output).exists()


def test_an_output_that_is_gone_from_beside_is_said_in_one_sentence(tmp_path):
    output = make_output(tmp_path / "out", "old")
    before = contents(output)
    with pytest.raises(InputError, match="new: cannot be moved"):
        replace(output, tmp_path / "new")
    assert contents(output) == before


@pytest.mark.parametrize("there", [True, False])
def test_what_two_kills_leave_beside_an_output_is_removed(tmp_path, there):
    output = make_output(tmp_path / "out", "old") if there else tmp_path / "out"
    left = outputs.earlier_of(output)
    left.mkdir()
    (left / ".partial-0123456789abcdef").touch()
    check_replaceable(output)
    settle(output)
    assert not left.exists()
    assert output.exists() == there


def test_tables_are_not_written_into_a_checkpoint(tmp_path):
    output = make_output(tmp_path / "out", "old")
    before = contents(output)
    with pytest.raises(InputError, match="a checkpoint lies there"):
        check_tables(output, {"board.md"}.__contains__, ["board.md"])
    assert contents(output) == before


def of_sweep(name):
    return outputs.is_of_sweep(name, below="")


@pytest.mark.parametrize("name", ["adaptive.csv", "tables/mine.csv", "tables"])
def test_no_name_that_a_sweep_may_write_is_the_users(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=name):
        check_tables(tmp_path, of_sweep, ["sweep.csv"])
    assert contents(tmp_path) == {name: "mine"}


def test_tables_of_an_earlier_run_go_and_those_of_the_user_stay(tmp_path):
    earlier = {"sweep.csv": "1", "adaptive.csv": "1", "tables/a.csv": "1"}
    for name, text in earlier.items():  # of before there was a listing
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    check_tables(tmp_path, of_sweep, ["sweep.csv"])
    (tmp_path / "tables" / "late.csv").write_text("mine")
    write_tables(tmp_path, {"sweep.csv": "2", "tables/b.csv": "2"}, of_sweep)
    found = contents(tmp_path)
    assert found.pop(".bivlm-files").split() == ["sweep.csv", "tables/b.csv"]
    assert found == {"sweep.csv": "2", "tables/b.csv": "2", "tables/late.csv": "mine"}


@pytest.mark.parametrize("kill", range(8))
def test_tables_of_a_run_that_was_killed_are_no_strangers(tmp_path, monkeypatch, kill):
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


def test_a_listing_on_the_hub_names_no_file_of_others():
    listing = b"config.json\nNOTICE\ncustom_generate/a.py\npruning/tables/a.csv\nREADME.md\n.git/HEAD\n../x\nimg.png\n"
    assert outputs.names_in(listing) == {"config.json", "NOTICE", "custom_generate/a.py", "pruning/tables/a.csv"}
