"""The console command in hostile surroundings: namesakes of our packages, full or closed outputs, odd terminals."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What pip writes for the command, with this checkout where an installation has site-packages: at the end of the path.
SCRIPT = f"import sys; sys.path.append({str(ROOT)!r}); from bivlm_command import main; sys.exit(main())"
STRANGER = "raise ImportError('a namesake was imported')"


def command(*arguments: str, folder: Path, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in `folder`, its redirections as a shell writes them."""
    script = folder.parent / "bin" / "bivlm"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT)
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COLUMNS")} | environment
    line = " ".join(['"$@"', shell])
    return subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, str(script), *arguments],
        cwd=folder,
        env=own,
        capture_output=True,
        text=True,
        errors="replace",  # where the command writes in another encoding
        check=False,
        timeout=200,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def as_module(folder: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(STRANGER)


def as_package(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(STRANGER)


def as_plain_folder(folder: Path, name: str) -> None:
    (folder / name).mkdir()


@pytest.mark.parametrize("make", [as_module, as_package, as_plain_folder])
@pytest.mark.parametrize("names", [("tasks",), ("flows",), ("bivlm", "flows", "tasks", "benchmarks")])
@pytest.mark.parametrize("path", [".", None, ":/nonexistent"])
def test_a_users_own_modules_hide_none_of_ours(make, names, path, folder):
    for name in names:
        make(folder, name)
    done = command("--help", folder=folder, **({} if path is None else {"PYTHONPATH": path}))
    assert (done.returncode, done.stderr) == (0, "")
    assert "compress" in done.stdout


def test_the_packages_and_processes_of_a_command_are_ours(folder):
    """Also in processes that are started from it, which look for their modules anew."""
    for name in ("bivlm", "flows", "tasks"):
        as_module(folder, name)
    found = textwrap.dedent("""
        import json, subprocess, sys
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from bivlm_command import put_own_packages_first
        put_own_packages_first()
        import flows.runners, tasks.runtime.naming
        child = "import flows.cli.quiet, tasks, bivlm.addresses; print(flows.__file__)"
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            files = [flows.__file__, tasks.__file__, pool.submit(flows.runners.parse_runner, "threads").result().name]
        files.append(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip())
        print(json.dumps(files))
    """)
    begin = f"import sys; sys.path.append({str(ROOT)!r})\nif __name__ == '__main__':\n"
    (folder.parent / "look.py").write_text(begin + textwrap.indent(found, "    "))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "../look.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    flows, tasks, runner, of_a_child = json.loads(done.stdout)
    assert (flows, tasks) == (str(ROOT / "flows" / "__init__.py"), str(ROOT / "tasks" / "__init__.py"))
    assert (runner, of_a_child) == ("threads", flows)


def test_nothing_changes_where_nothing_hides_ours(folder):
    script = "import os, sys, bivlm_command as c; before = [*sys.path]; c.put_own_packages_first(); "
    script += "print(sys.path == before, 'PYTHONPATH' in os.environ)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = f"import sys; sys.path.append({str(ROOT)!r}); {script}"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_the_installed_command_starts_here():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"bivlm": "bivlm_command:main"}
    assert project["tool"]["setuptools"]["py-modules"] == ["bivlm_command"]


FULL = "bivlm: the output cannot be written: No space left on device\n"
OUTPUTS = [
    (">/dev/full", 1, FULL),
    (">/dev/full 2>/dev/full", 1, ""),
    ("2>/dev/full", 0, ""),
    (">&-", 0, ""),
    ("2>&-", 0, ""),
    ("<&- >&- 2>&-", 0, ""),
    ("| head -c 1 >/dev/null; exit ${PIPESTATUS[0]}", 0, ""),
]


def printing(text: str, *, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that runs `text`, with stdout and stderr as every command has them, and nothing else imported."""
    script = (
        "import sys; from flows.cli.terminal import run_command; sys.exit(run_command(lambda: exec(sys.argv[1]) or 0))"
    )
    own = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    own |= {"PYTHONPATH": str(ROOT)} | environment
    line = ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, "-c", script, text]
    return subprocess.run(line, env=own, capture_output=True, text=True, errors="replace", check=False, timeout=60)


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(("shell", "code", "told"), OUTPUTS)
def test_an_output_that_cannot_be_written_is_told_in_one_sentence(shell, code, told, buffered):
    # As argparse, which says nothing of it, and as rich.
    silent = "try: print('x' * 20)\nexcept OSError: pass\nprint('y', file=sys.stderr)"
    done = printing(silent, shell=shell, PYTHONUNBUFFERED=buffered)
    assert (done.returncode, done.stderr.replace("y\n", "")) == (code, told)


@pytest.mark.parametrize(("shell", "code", "told"), OUTPUTS)
def test_a_help_page_that_cannot_be_written_is_told_in_one_sentence(shell, code, told, folder):
    done = command("--help", folder=folder, shell=shell)
    assert (done.returncode, done.stderr) == (code, told)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["a table", "JSON"])
@pytest.mark.parametrize(("shell", "code", "told"), OUTPUTS)
def test_figures_that_cannot_be_written_are_told_in_one_sentence(shell, code, told, options, folder, compressed):
    done = command("bits", str(compressed.output), *options, folder=folder, shell=shell)
    assert (done.returncode, done.stderr) == (code, told)


def test_bad_usage_keeps_its_code_where_nobody_can_be_told(folder):
    done = command("--nonesuch", folder=folder, shell="2>/dev/full")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_closed_output_is_given_to_no_other_file(folder):
    """The next file that is opened would get its number, and be written into by whatever a library prints."""
    script = "import os, sys; from flows.cli.terminal import run_command; "
    script += "run_command(lambda: [os.write(3, str(open('x', 'w').fileno()).encode()), 0][1])"
    line = f'exec 3>found; exec {sys.executable} -c "$0" <&- >&- 2>&-'
    subprocess.run(["bash", "-c", line, script], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert int((folder / "found").read_text()) > 3


TERMINALS = [
    {"COLUMNS": "0"},
    {"COLUMNS": "garbage"},
    {"COLUMNS": "²"},
    {"COLUMNS": "1"},
    {"COLUMNS": "40", "TERM": "dumb"},
    {"NO_COLOR": "1"},
    {"LANG": "C", "LC_ALL": "C"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
]


ODD = "a ± b – 猫 \udcff"
TABLE = f"""
from rich.table import Table
from flows.cli.commands import print_json
from flows.cli.stacking import show
table = Table("name", "figure", title={ODD!a})
table.add_row({ODD!a}, "12.345")
show(table)
print({ODD!a})
print({ODD!a}, file=sys.stderr)
print("JSON")
print_json({{"name": {ODD!a}}})
"""


@pytest.mark.parametrize("terminal", TERMINALS, ids=str)
def test_an_odd_terminal_gets_every_figure(terminal):
    done = printing(TABLE, **terminal)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    table, _, text = done.stdout.partition("JSON\n")
    assert "12.345" in table.split()
    assert json.loads(text) == {"name": ODD}


@pytest.mark.slow
@pytest.mark.parametrize("terminal", TERMINALS, ids=str)
def test_a_command_works_in_an_odd_terminal(terminal, folder, compressed):
    from bivlm.reports.bits import bits_of

    done = command("bits", str(compressed.output), folder=folder, **terminal)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{bits_of(compressed.output)['linears']['stored']:.3f}" in done.stdout.split()
    done = command("bits", str(folder / "± – 猫"), folder=folder, **terminal)
    assert done.returncode == 2 and done.stderr.startswith("bivlm bits: ") and "Traceback" not in done.stderr
