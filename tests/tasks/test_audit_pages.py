"""What MLflow's pages say of versions, models and base models, and that they stay within what its database holds."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from bivlm.errors import InputError
from bivlm.recipe.loading import load_recipe
from tasks.tracking.pages import audit_base, audit_version, write_pages
from tasks.tracking.promotion import promote_by_gate, promote_by_hand, roll_back
from tasks.tracking.run import note
from tasks.tracking.tags import Score

COLUMN = 5000  # characters of a description, in the registry's tables
SCORE = Score(packed=90.0, full_precision=100.0, questions=1000, lost=10.0, low=5.0, high=15.0)
SHA = {"first": "a" * 64, "second": "b" * 64}


@pytest.fixture(scope="module")
def registry_file(tmp_path_factory):
    """An empty registry."""
    file = tmp_path_factory.mktemp("registry") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").create_experiment("bivlm", artifact_location=file.parent.as_uri())
    return file


@pytest.fixture
def client(registry_file, tmp_path, monkeypatch):
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "cache"))
    return MlflowClient(f"sqlite:///{shutil.copyfile(registry_file, tmp_path / 'mlflow.db')}")


def base_model(client, revision, base_id="org/model"):
    """The full-precision model of a revision, as a compression logs it."""
    (experiment,) = [each.experiment_id for each in client.search_experiments() if each.name == "bivlm"]
    tags = {"bivlm.base.sha256": SHA[revision], "bivlm.base.id": base_id}
    return client.create_logged_model(experiment, name="model-full-precision", tags=tags)


def register(client, name, base, **tags):
    """A version as a compression registers it; returns its number."""
    if name not in {model.name for model in client.search_registered_models()}:
        client.create_registered_model(name)
    run = client.create_run(base.experiment_id, tags={"mlflow.note.content": "**org/model** compressed."})
    model = client.create_logged_model(base.experiment_id, name="packed")
    tags = {
        "bivlm.model_id": model.model_id,
        "bivlm.recorded": "2026-11-24T00:00:00+00:00",
        "bivlm.base.id": base.tags["bivlm.base.id"],
        "bivlm.base.sha256": base.tags["bivlm.base.sha256"],
        "bivlm.base.model_id": base.model_id,
        "bivlm.experiment": base.experiment_id,
        "bivlm.recipe": name.rpartition("-")[2],
        "bivlm.recipe.sha256": "c" * 64,
        "bivlm.trigger": "event 4f2a",
        "bivlm.calibration": "reference, 64 samples",
        "bivlm.calibration.sha256": "d" * 64,
        "bivlm.bits.linears": "2.164",
        # as older versions of bivlm wrote it
        "bivlm.accuracy.reference.open": "80.0 of 90.0 % on 100 questions; lost 10.0 (5.0 to 15.0)",
        "bivlm.accuracy.reference.choice": SCORE.model_dump_json(),
        "bivlm.stage.pack": "e" * 64,
    } | {key.replace("__", "."): value for key, value in tags.items()}
    return int(client.create_model_version(name, "/nowhere", run.info.run_id, tags=tags).version)


def page(client, name, version=None):
    found = client.get_registered_model(name) if version is None else client.get_model_version(name, str(version))
    return found.description


def test_a_version_leads_to_all_that_made_it(client):
    base = base_model(client, "first")
    register(client, "model-small", base)
    write_pages(client, "model-small")
    version = client.get_model_version("model-small", "1")
    text = page(client, "model-small", 1)
    links = dict(re.findall(r"\[([^]]+)\]\(([^)]+)\)", text))
    run = f"#/experiments/{base.experiment_id}/runs/{version.run_id}"
    assert links["org/model"] == f"#/experiments/{base.experiment_id}/models/{base.model_id}"
    assert (links["run"], links["lineage"], links["small"]) == (
        run,
        f"{run}/artifacts/lineage.json",
        f"{run}/artifacts/recipe.json",
    )
    assert links["logged model"].endswith(version.tags["bivlm.model_id"])
    for said in (
        "event 4f2a",
        "a" * 64,
        "c" * 64,
        "d" * 64,
        "e" * 12,
        "80.0 of 90.0 %",
        "90.0 of 100.0 % on 1,000",
        "2.164",
    ):
        assert said in text
    assert client.get_logged_model(version.tags["bivlm.model_id"]).tags["mlflow.note.content"] == text


def test_a_version_says_what_its_kl_was_measured_on_and_where_full_precision_is_at_chance(client):
    base = base_model(client, "first")
    said = {"bivlm__kl": "0.2083", "bivlm__kl__samples": "64 held-out samples of /data/my_own"}
    register(client, "model-small", base, **said, bivlm__not_above_chance="none")
    register(client, "model-small", base, **said, bivlm__not_above_chance="open: full precision scores 0.0 %")
    register(client, "model-small", base, bivlm__kl="0.2083")  # of before either was written down
    write_pages(client, "model-small")
    first, second, old = (page(client, "model-small", number) for number in (1, 2, 3))
    assert "0.2083 nats per token, on 64 held-out samples of /data/my\\_own" in first and "above chance" not in first
    assert "| not above chance\u00a0\u00a0 | open: full precision scores 0.0 %" in second
    assert "0.2083 nats per token, on held-out samples" in old and "above chance" not in old
    assert page(client, "model-small").count("85.0 of 95.0 % (not above chance)") == 1


def test_the_runs_description_begins_with_where_its_version_stands_and_keeps_the_rest(client):
    register(client, "model-small", base_model(client, "first"), bivlm__gate="passed")
    run_id = client.get_model_version("model-small", "1").run_id
    for act, stands in (
        (lambda: None, "an earlier candidate, not champion"),
        (lambda: promote_by_gate(client, "model-small", 1, "kept"), "champion since 20"),
    ):
        act()
        write_pages(client, "model-small")
        note = client.get_run(run_id).data.tags["mlflow.note.content"]
        assert note.startswith(f"Registered as [model-small/1](#/models/model-small/versions/1): {stands}")
        assert note.endswith("; gate passed.\n\n**org/model** compressed.")


def test_a_base_model_leads_to_all_that_was_made_of_it_and_of_its_other_revisions(client):
    first, second = base_model(client, "first"), base_model(client, "second")
    register(client, "model-small", first)
    register(client, "model-large", first)
    register(client, "model-small", second)
    promote_by_gate(client, "model-small", 2, "kept")
    for name in ("model-small", "model-large"):
        write_pages(client, name)
    text = client.get_logged_model(first.model_id).tags["mlflow.note.content"]
    of_this, _, of_others = text.partition("other revisions")
    assert re.findall(r"#/models/(\S+)\)", of_this) == ["model-large/versions/1", "model-small/versions/1"]
    assert re.findall(r"#/models/(\S+)\)", of_others) == ["model-small/versions/2"]
    assert "85.0 of 95.0 %" in of_this
    assert "| champion" in of_others

    rows = audit_base(client, "org/model")
    assert [row["version"] for row in rows] == ["model-large/1", "model-small/2", "model-small/1"]
    assert [row["version"] for row in audit_base(client, SHA["first"])] == ["model-large/1", "model-small/1"]
    assert [row["version"] for row in audit_base(client, "bbbbbbbb")] == ["model-small/2"]
    for unknown in ("org/other", "cccccccc", "x' OR 'a' = 'a", "bbb"):
        with pytest.raises(InputError, match=r"the registry at sqlite:.* has nothing that was made of it"):
            audit_base(client, unknown)


def test_the_history_of_champions_is_on_the_models_page_and_in_the_audit(client):
    base = base_model(client, "first")
    for _ in range(3):
        register(client, "model-small", base)
    promote_by_gate(client, "model-small", 1, "0.5 points lost at most")
    promote_by_hand(client, "model-small", 3, "ann", "smaller")
    roll_back(client, "model-small", "bob", "slow")
    write_pages(client, "model-small")
    text = page(client, "model-small")
    assert text.startswith("**Version 1 is champion.**")
    rows = [[cell.strip("\u00a0 ") for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| " in line]
    moves = [row[1:] for row in rows if len(row) == 5][2:]
    assert moves == [
        ["3", "1", "bob (rollback)", "slow"],
        ["1", "3", "ann", "smaller"],
        ["-", "1", "gate", "0.5 points lost at most"],
    ]
    assert [row[1] for row in rows if len(row) == 7][2:] == [
        "was champion",
        "an earlier candidate, not champion",
        "champion",
    ]
    found = audit_version(client, client.get_model_version("model-small", "3"))
    assert (found["version"], found["tags"]["trigger"]) == ("model-small/3", "event 4f2a")
    assert [(move["from"], move["to"]) for move in found["moves"]] == [(1, 3), (3, 1)]
    assert not any(key.startswith("move.") for key in found["tags"])


def test_pages_of_long_histories_fit_into_their_column(client):
    base = base_model(client, "first")
    for _ in range(40):
        register(client, "model-small", base)
    for number in range(1, 21):
        promote_by_gate(client, "model-small", number, "why " * 900)
    write_pages(client, "model-small")
    pages = [page(client, "model-small"), *(page(client, "model-small", number) for number in (1, 20, 40))]
    assert all(len(text) < COLUMN for text in pages)
    assert "**Version 20 is champion.**" in pages[0] and "[40](" in pages[0]
    assert pages[0].endswith("and more: see the tags, and `bivlm audit`")
    longest = max(len(value) for value in client.get_registered_model("model-small").tags.values())
    assert longest < COLUMN


def test_what_is_so_already_is_not_written_again(client, monkeypatch):
    register(client, "model-small", base_model(client, "first"))
    write_pages(client, "model-small")

    def written(*_, **__):
        raise AssertionError("written again")

    writes = ("update_registered_model", "update_model_version", "set_logged_model_tags", "set_tag")
    for name in writes:
        monkeypatch.setattr(MlflowClient, name, written)
    write_pages(client, "model-small")


@pytest.mark.parametrize("base_id", ["bob's models/one", 'the "best" one', 'it\'s "both"'])
def test_a_base_model_of_any_name_has_its_page(client, base_id):
    base = base_model(client, "first", base_id)
    register(client, "model-small", base)
    write_pages(client, "model-small")
    assert "model-small/1" in client.get_logged_model(base.model_id).tags["mlflow.note.content"]
    assert len(audit_base(client, SHA["first"])) == 1


def test_a_version_that_somebody_else_registered_is_listed_with_the_others(client):
    register(client, "model-small", base_model(client, "first"))
    client.create_model_version("model-small", "/nowhere")
    write_pages(client, "model-small")
    assert "an earlier candidate, not champion" in page(client, "model-small", 2)
    for version in (1, 2):
        assert f"[{version}](#/models/model-small/versions/{version})" in page(client, "model-small")


def test_names_from_outside_are_text_and_nothing_else(client):
    """No link, picture, HTML or table cell can be smuggled onto a page."""
    bad = "a](javascript:alert(1)) | ![x](http://x/y) <img src=x onerror=alert(1)> `code` **bold**\n# heading"
    base = base_model(client, "first", bad)
    register(client, "model-small", base, bivlm__trigger=bad, bivlm__base__revision=bad, bivlm__recipe=bad)
    promote_by_hand(client, "model-small", 1, bad.replace("\n", " "), "why")
    write_pages(client, "model-small")
    texts = [
        page(client, "model-small"),
        page(client, "model-small", 1),
        client.get_logged_model(base.model_id).tags["mlflow.note.content"],
        client.get_run(client.get_model_version("model-small", "1").run_id).data.tags["mlflow.note.content"],
    ]
    for text in texts:
        plain = re.sub(r"`[^`]*`", "", text)
        assert not re.search(r"(?<!\\)\]\((?!#/)", plain)
        assert not re.search(r"(?<!\\)[<!]", plain)
        assert not re.search(r"^#", plain, re.MULTILINE)
    rows = [line for line in texts[1].splitlines() if line.startswith("|") and "asked for" in line]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 3


def test_the_runs_description_takes_names_from_outside_as_text():
    recipe = load_recipe("rtn-w2g128")
    model = SimpleNamespace(id="/data/[x](http://a)", revision=None)
    said = note(SimpleNamespace(model=model, sha256="a" * 64), recipe, "<b>me</b>", "on 4 samples of [y](http://b)<i>.")
    assert not re.search(r"(?<!\\)\]\(|(?<!\\)<", said.replace(f"`{model.id}`", ""))
    assert "samples of" in said and "me" in said
