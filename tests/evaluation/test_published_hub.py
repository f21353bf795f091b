"""Published benchmarks from the hub, by its own client against a small server: what is fetched, what is recorded."""

import datasets
import huggingface_hub
import pytest
from hub_server import hub as server  # noqa: F401  a fixture
from hub_state import sha256_of
from published_data import SETS, vizwiz_rows, write, write_set

from bivlm.errors import InputError
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.sources.parquet_rows import _commit
from tasks.runtime.policy import is_passing

NAME = "lmms-lab-encoder/VizWiz-VQA"
SHARDS = [f"data/val-{part:05}-of-00003.parquet" for part in range(3)]


@pytest.fixture(autouse=True)
def no_commit_remembered():
    _commit.cache_clear()
    yield
    _commit.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """VizWiz, two rows in each of three files, beside another split."""
    rows = [{**row, "question_id": f"{part}-{number}"} for part in range(3) for number, row in enumerate(vizwiz_rows())]
    for part, file in enumerate(SHARDS):
        write(tmp_path / "hub", rows[2 * part :][:2], SETS["vizwiz"][1], file)
    write(tmp_path / "hub", rows[:1], SETS["vizwiz"][1], "data/test-00000-of-00001.parquet")
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: cc\n---\n# VizWiz\n")
    return tmp_path / "hub"


@pytest.fixture
def hub(server, folder, tmp_path, monkeypatch):  # noqa: F811
    """The folder under its default name on a hub, nothing of it in the cache."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    server.add(NAME, folder)
    return server


def _files(hub):
    """The parquet files that were downloaded."""
    names = {sha256_of(data): name for name, data in hub.repositories[NAME].head.files.items()}
    return [names[request.path.rpartition("/")[2]] for request in hub.asked("GET", "/large/")]


def test_the_split_is_downloaded_once_and_its_commit_is_recorded(hub, folder):
    benchmark = load_benchmark("vizwiz:hub")
    assert len(list(benchmark)) == len(benchmark) == 6
    assert _files(hub) == SHARDS
    assert benchmark.source() == {
        "data_set": NAME,
        "revision": hub.repositories[NAME].refs["main"],
        "subset": "default",
        "split": "val",
    }
    again = load_benchmark(f"vizwiz:{NAME}@main")
    assert again.digest == benchmark.digest == load_benchmark(f"vizwiz:{folder}").digest
    assert _files(hub) == SHARDS


def test_a_folder_called_hub_is_not_taken_for_the_hub(hub, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_benchmark("vizwiz:hub", 1).source()["revision"] == hub.repositories[NAME].refs["main"]
    assert load_benchmark("vizwiz:./hub", 1).source()["data_set"] == str(folder)


def test_a_limit_downloads_no_more_files_than_it_takes(hub):
    assert [sample.question_id for sample in load_benchmark("vizwiz:hub", 3)] == ["0-0", "0-1", "1-0"]
    assert _files(hub) == SHARDS[:2]


def test_a_commit_that_moves_on_does_not_change_the_questions_of_a_run(hub):
    commit = load_benchmark("vizwiz:hub", 1).source()["revision"]
    assert hub.repositories[NAME].refs.pop("main") == commit  # main is gone, or stands for another commit now
    assert load_benchmark("vizwiz:hub", 1).source()["revision"] == commit


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("vizwiz:lmms-lab/none", r"no folder lmms-lab/none, and the hub gives no data set lmms-lab/none: "),
        ("vizwiz:hub@abc", r"the hub gives no data set lmms-lab-encoder/VizWiz-VQA at revision abc: "),
        ("mme:lmms-lab-encoder/VizWiz-VQA@main", r"split test: column 'answer' is missing, found the columns"),
        ("mmmu:lmms-lab-encoder/VizWiz-VQA", r"split val: column 'id' is missing, found the columns question_id"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(hub, task, message):
    with pytest.raises(InputError, match=message) as refused:
        load_benchmark(task)
    assert not is_passing(refused.value)


def test_a_subset_is_looked_up_in_the_card(hub, folder):
    write_set("scienceqa", folder)
    configs = "- config_name: ScienceQA-IMG\n  data_files:\n  - {split: test, path: ScienceQA-IMG/test-*}\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    hub.add("maker/several", folder)
    benchmark = load_benchmark("scienceqa:maker/several")
    assert benchmark.source()["subset"] == "ScienceQA-IMG"
    assert len(list(benchmark)) == 2


@pytest.mark.parametrize("failing", ["README.md", SHARDS[1]])
def test_a_hub_that_is_busy_is_asked_again_later_and_goes_on(hub, monkeypatch, failing):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail(failing, *[503] * 100)
    with pytest.raises(ConnectionError, match=r"vizwiz:hub: the hub cannot be reached for the data set") as passing:
        load_benchmark("vizwiz:hub")
    assert is_passing(passing.value)
    hub.faults.clear()
    assert len(load_benchmark("vizwiz:hub")) == 6
    assert sorted(_files(hub)) == SHARDS  # what was there is not fetched again


def test_a_hub_that_cannot_be_reached_is_trouble_that_may_pass(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"the hub cannot be reached for the data set lmms-lab-encoder/MME: "):
        load_benchmark("mme:hub")


def test_offline_a_folder_is_asked_for(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set; .* give their folder as mmmu:FOLDER"):
        load_benchmark("mmmu:hub")
