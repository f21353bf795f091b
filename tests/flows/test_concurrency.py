"""Several compressions at once, in one workspace and one registry."""

from __future__ import annotations

import copy

import pytest

from bivlm.reports.lineage import find_workspace, read_lineage, verify
from flows.cli.main import DONE
from tests.flows.running import Running


@pytest.mark.slow
def test_two_identical_requests_at_once_make_one_of_everything(new_compression, compressed, tmp_path):
    first = new_compression(tmp_path)
    second = copy.deepcopy(first)
    second.output = tmp_path / "second"
    runs = [Running(c, str(c.workspace), tmp_path / f"{c.output.name}.log") for c in (first, second)]
    assert [run.end() for run in runs] == [DONE, DONE], [run.errors() for run in runs]
    assert first.weights() == second.weights() == compressed.weights()
    assert [len(first.runs(role)) for role in ("compression", "full precision", "packed")] == [1, 1, 1]
    assert [version.version for version in first.client.search_model_versions("name = 'llava-small'")] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("server", ["one server", "a temporary server each"])
def test_four_compressions_at_once_are_each_as_if_alone(new_compression, compressed, tmp_path, server):
    """Each with other settings of the adaptor, so that they share most steps and no packed checkpoint."""
    together, alone = new_compression(tmp_path / "together"), new_compression(tmp_path / "alone")
    environment = {} if server == "one server" else {"PREFECT_API_URL": "", "PREFECT_HOME": str(tmp_path / "prefect")}
    runs = []
    for groups in (1, 2, 3, 4):
        compression = copy.deepcopy(together)
        compression.place = tmp_path / f"groups-{groups}"
        compression.place.mkdir()
        compression.output = compression.place / "packed"
        compression.recipe["name"] = f"groups-{groups}"
        compression.recipe["components"]["adaptor"]["groups"] = groups
        workspace = str(together.workspace)
        runs.append((compression, Running(compression, workspace, compression.place / "log", **environment)))
    assert [run.end() for _, run in runs] == [DONE] * 4, [run.errors()[-3000:] for _, run in runs]
    for compression, _ in runs:
        expected = copy.deepcopy(compression)
        expected.output = alone.place / compression.recipe["name"]
        expected.run(workspace=str(alone.workspace), evaluate=False)
        assert compression.weights() == expected.weights()
        found = verify(read_lineage(compression.output), compression.output, find_workspace(str(together.workspace)))
        assert {finding.state for finding in found} == {"holds"}
    names = sorted(model.name for model in together.client.search_registered_models())
    assert names == [f"llava-groups-{groups}" for groups in (1, 2, 3, 4)]
    assert {len(model.latest_versions) for model in together.client.search_registered_models()} == {1}
    assert [len(together.runs(role)) for role in ("compression", "full precision", "packed")] == [4, 4, 4]
    assert {run.info.status for run in together.runs("compression")} == {"FINISHED"}
