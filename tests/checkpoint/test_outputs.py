"""A new output takes the place of an earlier one: whole, and without the loss of anything that is not bivlm's."""

import errno
import json
import os
import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from bivlm.checkpoint import outputs
from bivlm.checkpoint.outputs import check_replaceable, list_files, own_copy, own_files, replace, settle
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.workspace.places import output_folder

OURS = {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "additional_chat_templates/tool.jinja"}
RECORDS = ("lineage.json", "compression_report.json", "report.html")
CONFIG = json.dumps({"quantization_config": {"quant_method": "bivlm", "format": 1, "packed": {}}})
# Names that people put beside a checkpoint, in places of their own and in bivlm's.
THEIRS = ("notes.md", "README.md", ".git/HEAD", ".git/objects/ab/cd", "adapter/adapter_config.json", "adapter/a.bin")
THEIRS += ("pruning/notes.md", "pruning/tables/mine.ods", "empty/", "Config.JSON.bak", "sweep.csv", ".hidden")
LINKED = ("secrets", "adapter", "pruning", "notes.md", "shared/link", "report.bak")
READ = ("special_tokens_map.json", "extra.safetensors", "additional_chat_templates/mine.jinja", "modeling.py")


def put(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_output(folder, label, listed=True, extra=()):
    """An output whose files say `label`; without a listing it is as earlier versions left it, records included."""
    names = [*OURS, *extra]
    for name in names:
        put(folder / name, CONFIG if name == "config.json" else label)
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
        if name in LINKED and chance.random() < 0.6:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(chance.choice([outside, outside / "secret", "nowhere", "../missing", "config.json"]))
        elif name.endswith("/"):
            path.mkdir(parents=True)
        else:
            put(path, f"mine {name}")
    return {name: found for name, found in contents(folder).items() if name not in before}


def contents(folder):
    """Text or target by name of everything in `folder`, links not followed; folders without anything are None."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path, below = Path(place) / name, (Path(place) / name).relative_to(folder).as_posix()
            if path.is_symlink():
                found[below] = ("link", str(path.readlink()))
            elif path.is_file():
                found[below] = path.read_text()
            elif not any(path.iterdir()):
                found[below] = None
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
    outside = put(place / "outside" / "secret", "secret").parent
    output = place / chance.choice(["out", "OUT.v1", "o" * 255, "ä b\u00a0c"])
    old = make_output(output, "old", listed=chance.random() < 0.7, extra=("added_tokens.json",))
    if chance.random() < 0.5 and (old / ".bivlm-files").exists():
        put(old / "pruning" / "sweep.csv", "old")
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


def refuses(output, match, base=None):
    """Whether the check raises and changes nothing."""
    before = contents(output.parent)
    with pytest.raises(InputError, match=match):
        check_replaceable(output, base)
    return contents(output.parent) == before


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", READ)
def test_what_would_be_read_as_a_part_of_the_new_output_is_refused_by_name(tmp_path, listed, name):
    output = make_output(tmp_path / "out", "old", listed)
    put(output / name)
    assert refuses(output, rf"{name}: not of the earlier output")


def test_a_file_that_the_new_output_has_with_the_same_bytes_is_no_loss(tmp_path):
    """What an earlier version left when it was killed has neither listing nor record."""
    output = make_output(tmp_path / "out", "same", listed=False)
    (output / "lineage.json").unlink()
    assert refuses(output, "not of the earlier output")
    base = make_output(tmp_path / "base", "same", listed=False)
    shutil.rmtree(base / "additional_chat_templates")
    shutil.rmtree(output / "additional_chat_templates")
    check_replaceable(output, base)
    put(output / "notes.md")
    replace(output, make_output(tmp_path / "new", "same"))
    assert contents(output).keys() == {*OURS, *RECORDS, ".bivlm-files", "notes.md"}
    assert not outputs.earlier_of(output).exists()
    put(output / "NOTICE")
    put(base / "NOTICE", "another")
    assert refuses(output, "NOTICE: not of the earlier output", base)


def test_a_link_in_the_place_of_a_file_of_ours_is_the_users(tmp_path):
    output = make_output(tmp_path / "out", "old")
    (output / "tokenizer.json").unlink()
    (output / "tokenizer.json").symlink_to(put(tmp_path / "mine.json"))
    assert refuses(output, r"tokenizer.json: not of the earlier output")


def test_what_a_listing_says_of_other_places_is_not_believed(tmp_path):
    mine, elsewhere = put(tmp_path / "mine.txt"), put(tmp_path / "elsewhere" / "file")
    output = make_output(tmp_path / "out", "old")
    (output / "linked").symlink_to(elsewhere.parent)
    with (output / ".bivlm-files").open("a") as listing:
        listing.write(f"../mine.txt\n{tmp_path}/mine.txt\nlinked/file\n..\n.\n\n")
    replace(output, make_output(tmp_path / "new", "new"))
    assert mine.read_text() == elsewhere.read_text() == "mine"
    assert (output / "linked").is_symlink()


@pytest.mark.parametrize("kind", ["partial", "earlier", "copy"])
def test_a_folder_of_the_users_beside_the_output_is_not_removed(tmp_path, kind):
    put(tmp_path / f".out.{kind}" / "thesis.tex")
    assert refuses(tmp_path / "out", rf"\.out\.{kind}: needed beside the output, and not made by bivlm")


def test_a_run_killed_between_the_two_renames_loses_no_output(tmp_path):
    output = make_output(tmp_path / "out", "old")
    put(output / "notes.md")
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
    put(tmp_path / "file")
    (tmp_path / "broken").symlink_to("missing")
    (tmp_path / "loop").symlink_to("loop")
    for text in ("/", "/proc", *(tmp_path / name for name in ("file", "broken", "loop", "file/below"))):
        with pytest.raises(InputError, match="output "):
            check_replaceable(output_folder(text))
    (tmp_path / "out").mkdir()
    for text in (f"{tmp_path}/out/", f"{tmp_path}/out/.", f"{tmp_path}/file/../out", f"{tmp_path}/./out"):
        assert output_folder(text) == tmp_path / "out"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission_is_refused(tmp_path):
    output = make_output(tmp_path / "out", "old")
    for closed in (output, tmp_path):
        closed.chmod(0o555)
        assert refuses(output, "cannot be written to")
        closed.chmod(0o755)


def test_a_copy_for_others_holds_our_files_alone_and_is_gone_afterwards(tmp_path):
    output = make_output(tmp_path / "out", "old")
    expected = {name: (output / name).read_text() for name in own_files(output)}
    put(output / "notes.md")
    (output / "id_rsa").symlink_to("/etc/passwd")
    with own_copy(output) as copy:
        assert contents(copy) == expected
        assert (copy / "model.safetensors").stat().st_ino == (output / "model.safetensors").stat().st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_space_of_a_killed_build_is_given_back(tmp_path):
    left = outputs.fresh_partial(tmp_path / "out")
    (left / "model.safetensors").write_bytes(b"half")
    assert list(outputs.fresh_partial(tmp_path / "out").iterdir()) == [left / ".bivlm-files"]
    shutil.rmtree(left)


@pytest.mark.parametrize("name", ["custom_generate/generate.py", "NOTICE"])
def test_code_and_licences_of_the_users_do_not_become_a_part_of_the_new_output(tmp_path, name):
    output = make_output(tmp_path / "out", "old")
    (output / "custom_generate").mkdir()
    check_replaceable(output)
    put(output / name)
    assert refuses(output, f"{name.partition('/')[0]}: not of the earlier output")


def test_an_output_of_before_there_was_a_listing_has_the_licences_of_its_base(tmp_path):
    output = make_output(tmp_path / "out", "old", listed=False)
    put(output / "lineage.json", json.dumps({"packed": {"files": dict.fromkeys(OURS - {"LICENSE"}, "")}}))
    check_replaceable(output)
    later = (output / "lineage.json").stat().st_mtime + 60
    os.utime(put(output / "NOTICE", "the user's, added to the finished output"), (later, later))
    assert refuses(output, "NOTICE: not of the earlier output")
    (output / "NOTICE").unlink()
    replace(output, make_output(tmp_path / "new", "new"))
    assert (output / "LICENSE").read_text() == "new"


@pytest.mark.parametrize("read", [False, True], ids=["nothing is read", "some is read"])
def test_a_listing_counts_for_names_that_bivlm_writes_alone(tmp_path, read):
    output = make_output(tmp_path / "out", "old")
    mine = {*THEIRS[:-3], "img.png", "pruning/tables/a/b.csv", "deep/config.json"} - {"empty/"}
    mine |= {"custom_generate/data.bin"} if read else set()
    for name in mine:
        put(output / name)
    with (output / ".bivlm-files").open("a") as listing:
        listing.write("".join(f"{name}\n" for name in mine))
    assert not mine & own_files(output)
    with pytest.raises(InputError, match="custom_generate") if read else nullcontext():
        replace(output, make_output(tmp_path / "new", "new"))
    assert {(output / name).read_text() for name in mine} == {"mine"}


def test_what_a_checkpoint_has_is_what_its_listing_may_name(tiny_llava, tmp_path):
    """Whatever `Checkpoint` reads is bivlm's in an output; nothing that it reads may be carried into one."""
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    for name in ("modeling.py", "custom_generate/generate.py", "additional_chat_templates/a.jinja", "LICENSE", "a.txt"):
        put(folder / name, "")
    checkpoint = Checkpoint.open(folder)
    files = [*checkpoint.weight_files, *checkpoint.side_files, *checkpoint.licence_files, folder / "config.json"]
    names = {file.relative_to(folder).as_posix() for file in files}
    assert {"modeling.py", "custom_generate/generate.py", "additional_chat_templates/a.jinja", "LICENSE"} < names
    assert {name for name in names if not outputs.is_written(name)} == set()


def test_a_folder_that_cannot_be_moved_is_refused_by_name_and_the_output_stays(tmp_path, monkeypatch):
    output = make_output(tmp_path / "out", "old")
    put(output / "data" / "file")
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
    put(output / "data" / "file")
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
    left = put(outputs.earlier_of(output) / ".partial-0123456789abcdef", "").parent
    check_replaceable(output)
    settle(output)
    assert not left.exists()
    assert output.exists() == there


def test_a_listing_on_the_hub_names_no_file_of_others():
    listing = b"config.json\nNOTICE\ncustom_generate/a.py\npruning/tables/a.csv\nREADME.md\n.git/HEAD\n../x\nimg.png\n"
    assert outputs.names_in(listing) == {"config.json", "NOTICE", "custom_generate/a.py", "pruning/tables/a.csv"}
