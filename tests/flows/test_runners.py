"""Whoever works on the layers: the same bytes, nothing left behind, and less at once where memory runs out."""

import os
import signal

import pytest
from prefect import flow, task

from bivlm.errors import InputError
from bivlm.workspace.steps import StepRecord, Workspace
from flows import runners
from flows.cli.main import BAD_INPUT, main
from flows.layers import side_by_side
from flows.runners import WORKERS, Runner, parse_runner, started
from tasks import binarization, curves, saliency
from tasks.layers import Layer
from tasks.runtime.policy import WorkerLost
from tasks.runtime.progress import shown_by
from tasks.runtime.steps import StepResult, check_that_workers_share, open_workspace


@pytest.fixture(autouse=True)
def no_cluster_configured(monkeypatch):
    for variable in ("DASK_SCHEDULER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr(runners, "find_spec", lambda name: object())


class TestParsing:
    def test_threads_unless_something_else_is_said(self):
        assert parse_runner() == Runner("threads", None, WORKERS)
        assert parse_runner("processes", 3) == Runner("processes", None, 3)

    def test_a_running_cluster_is_named_by_its_address(self, all_installed, monkeypatch):
        assert parse_runner("dask=tcp://head:8786") == Runner("dask", "tcp://head:8786")
        assert parse_runner("ray=ray://head:10001") == Runner("ray", "ray://head:10001")
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://other:8786")
        monkeypatch.setenv("RAY_ADDRESS", "ray://other:10001")
        assert parse_runner("dask").address == "tcp://other:8786"
        assert parse_runner("ray").address == "ray://other:10001"
        assert parse_runner("dask=tcp://head:8786").address == "tcp://head:8786"
        assert parse_runner("threads").address is None

    @pytest.mark.parametrize(
        ("text", "workers", "said"),
        [
            ("spark", None, "runner 'spark': expected one of threads, processes, dask, ray"),
            ("threads=tcp://head:1", None, "expected an address after dask= or ray="),
            ("dask=", None, "runner 'dask=': expected an address"),
            ("processes", 0, "workers 0: expected at least 1"),
            ("dask=tcp://head:8786", 4, "workers 4: the cluster at tcp://head:8786 has workers of its own"),
        ],
    )
    def test_anything_else_is_refused(self, all_installed, text, workers, said):
        with pytest.raises(InputError, match=said):
            parse_runner(text, workers)

    @pytest.mark.parametrize("name", ["dask", "ray"])
    def test_an_extra_that_is_not_installed_is_named_with_its_command(self, monkeypatch, name):
        monkeypatch.setattr(runners, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=rf"prefect-{name} is not installed; pip install 'bivlm\[{name}\]'"):
            parse_runner(name)

    def test_it_is_told_before_anything_is_started(self, capsys):
        arguments = ["compress", "--model", "nowhere", "--recipe", "bivlm", "--output", "out", "--runner", "spark"]
        assert main(arguments) == BAD_INPUT
        assert capsys.readouterr().err.startswith("bivlm compress: runner 'spark'")

    def test_workers_share_the_cores(self, monkeypatch):
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        assert [Runner("processes", workers=n).threads for n in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]


def layer(name, weights=1 << 18, folder=""):
    return Layer(folder, name, f"{name}.weight", "vision", (weights, 1), "0" * 64, {"method": "rtn", "bits": 2})


class Shown:
    def __init__(self):
        self.advanced = {}

    def advance(self, stage, units=1.0):
        self.advanced[stage] = self.advanced.get(stage, 0) + units

    def expect(self, stage, units):
        raise AssertionError


def carry_out(stage, layers, runner):
    """The steps by layer, how many workers were left in the end, and what was shown."""
    progress = Shown()

    @flow
    def run():
        with started(runner) as workers, shown_by(progress):
            return side_by_side(stage, layers, "", lambda: None, workers), workers.count

    steps, left = run()
    return steps, left, progress.advanced


@task
def needs_little_at_once(chunk, workspace):
    if len(chunk) > 1:
        raise MemoryError
    return {item.name: StepResult(StepRecord(identity={"stage": "x"}, seconds=0), False) for item in chunk}


@task
def is_killed_by_large_chunks(chunk, workspace):
    if len(chunk) > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {item.name: StepResult(StepRecord(identity={"stage": "x"}, seconds=0), False) for item in chunk}


@task
def is_killed_by_one_layer(chunk, workspace):
    if chunk[0].name == "huge":
        os.kill(os.getpid(), signal.SIGKILL)
    return {item.name: StepResult(StepRecord(identity={"stage": "x"}, seconds=0), False) for item in chunk}


class TestProcesses:
    @pytest.mark.slow
    def test_the_bytes_are_the_same_and_the_rows_fill(self, new_compression, compressed, tmp_path, capsys):
        compression = new_compression(tmp_path)
        compression.run(evaluate=False, runner="processes", workers=2)
        assert compression.weights() == compressed.weights()
        assert compression.report()["runner"] == "processes, 2 workers"
        layers = len(compression.report()["layers"])
        shown = capsys.readouterr().err.splitlines()
        for stage in (saliency.STAGE, binarization.STAGE, curves.STAGE):
            assert any(line.startswith(stage) and f"{layers}/{layers}" in line for line in shown), shown

    @pytest.mark.slow
    def test_a_chunk_that_does_not_fit_is_done_in_smaller_ones(self):
        layers = [layer(str(number)) for number in range(3)]
        steps, left, shown = carry_out(needs_little_at_once, layers, Runner("processes", workers=2))
        assert (set(steps), left, shown) == ({"0", "1", "2"}, 2, {"x": 3})

    @pytest.mark.slow
    def test_so_is_one_whose_worker_is_killed(self):
        steps, left, shown = carry_out(
            is_killed_by_large_chunks, [layer("0"), layer("1")], Runner("processes", workers=2)
        )
        assert (set(steps), left, shown) == ({"0", "1"}, 1, {"x": 2})

    @pytest.mark.slow
    def test_a_layer_that_kills_every_worker_ends_the_run_and_is_named(self):
        layers = [layer("huge")]
        with pytest.raises(WorkerLost, match="a worker was killed while it was at huge, most likely because memory"):
            carry_out(is_killed_by_one_layer, layers, Runner("processes", workers=1))


class TestWorkersElsewhere:
    def test_a_worker_without_the_base_model_says_so(self, tmp_path):
        chunk = [layer("0", folder=str(tmp_path / "base"))]
        for stage in (saliency.measure_layers, binarization.pack_layers, curves.measure_curves):
            with pytest.raises(InputError, match=rf"base checkpoint {tmp_path}/base: no such folder on .*every worker"):
                stage.fn(chunk, str(tmp_path))

    def test_a_worker_without_the_workspace_says_so_and_makes_none(self, tmp_path):
        with pytest.raises(InputError, match=rf"workspace {tmp_path}/missing: no such folder on .*every worker"):
            open_workspace(str(tmp_path / "missing"))
        assert not (tmp_path / "missing").exists()

    def test_a_worker_with_another_workspace_of_that_name_is_noticed(self, tmp_path):
        ours, theirs = Workspace.open(tmp_path / "ours"), Workspace.open(tmp_path / "theirs")
        done = StepResult(
            StepRecord(identity={"stage": "x"}, outputs={"file": theirs.put_bytes(b"made")}, seconds=0), False
        )
        check_that_workers_share(theirs, [done])
        with pytest.raises(InputError, match=r"a worker has made 'file' \(x\), which is not there"):
            check_that_workers_share(ours, [done])

    def test_a_temporary_server_is_not_for_other_machines(self, monkeypatch):
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with (
            temporary_settings({PREFECT_API_URL: None}),
            pytest.raises(InputError, match="set PREFECT_API_URL"),
            started(Runner("dask", "tcp://head:8786")),
        ):
            raise AssertionError
