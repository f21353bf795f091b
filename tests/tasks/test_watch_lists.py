"""The list of base models, and what names from outside may be."""

import uuid

import pytest
import yaml

from bivlm.errors import InputError
from tasks.watching.watch_lists import (
    Revision,
    Watched,
    base_models_file,
    check_asked,
    check_permitted,
    kind_of,
    load_base_models,
    model_slug,
    named_recipe,
    nothing_watched,
)

COMMIT, CONTENT = "a" * 40, "b" * 64


@pytest.fixture
def write(tmp_path):
    def make(*models, **changes):
        file = tmp_path / "base-models.yaml"
        file.write_text(yaml.safe_dump({"format": 1, "models": list(models), **changes}))
        return file

    return make


def test_the_shipped_list_is_empty_and_says_where_to_write(monkeypatch):
    """A first deployment downloads nothing."""
    monkeypatch.delenv("BIVLM_BASE_MODELS", raising=False)
    assert base_models_file().name == "base-models.yaml"
    assert load_base_models() == []
    assert nothing_watched() == f"no base models are watched; write them into {base_models_file()}"


def test_the_example_in_the_shipped_list_is_in_order(write, monkeypatch, tmp_path):
    monkeypatch.delenv("BIVLM_BASE_MODELS", raising=False)
    monkeypatch.setenv("MODELS", "/data/models")
    lines = base_models_file().read_text().splitlines()
    example = lines[lines.index("# models:") : lines.index("format: 1")]
    file = tmp_path / "example.yaml"
    file.write_text("\n".join(["format: 1", *(line.removeprefix("# ") for line in example)]))
    assert [entry.kind for entry in load_base_models(file)] == ["hub", "hub", "folder", "s3"]


def test_a_list_of_all_three_kinds(write, monkeypatch):
    monkeypatch.setenv("MODELS", "/data/models")
    entries = load_base_models(
        write(
            {"model": "owner/name", "revision": "v1.0/rc", "recipes": ["bivlm"]},
            {"model": "$MODELS/*", "recipes": ["bivlm", "gptq-w2g64"]},
            {"model": "s3://bucket/llava", "recipes": ["bivlm"], "leaderboard": ["billm", "bivlm"]},
        )
    )
    assert [(entry.kind, entry.place, entry.every) for entry in entries] == [
        ("hub", "owner/name", False),
        ("folder", "/data/models", True),
        ("s3", "s3://bucket/llava", False),
    ]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"model": "owner/name"}, "models.0.recipes: Field required"),
        ({"model": "owner/name", "recipes": []}, "models.0.recipes"),
        ({"model": "owner/name", "recipes": ["bivlm", "bivlm"]}, "named twice"),
        ({"model": "owner/name", "recipes": "bivlm"}, "models.0.recipes: Input should be a valid list"),
        ({"model": "owner/name", "recipes": ["no-such"]}, "recipe 'no-such'"),
        ({"model": "owner/name", "recipes": ["../bivlm"]}, "not a path"),
        ({"model": "owner/name", "recipes": ["bivlm"], "branch": "main"}, "models.0.branch: Extra inputs"),
        ({"model": "owner/name", "recipes": ["bivlm"], "revision": "--upload-pack"}, "revision '--upload-pack'"),
        ({"model": "owner/*", "recipes": ["bivlm"]}, "model 'owner"),
        ({"model": "/models/x", "recipes": ["bivlm"], "revision": "main"}, "a folder model has none"),
        ({"model": "$NOT_SET_AT_ALL/x", "recipes": ["bivlm"]}, "not set in the environment"),
        ({"model": "models/a/b", "recipes": ["bivlm"]}, "expected owner/name"),
    ],
)
def test_a_list_that_is_not_in_order_is_refused_with_file_and_key(write, entry, told):
    file = write(entry)
    with pytest.raises(InputError) as refused:
        load_base_models(file)
    assert str(file) in str(refused.value) and told in str(refused.value)


def test_a_model_is_listed_once(write):
    twice = {"model": "owner/name", "recipes": ["bivlm"]}
    with pytest.raises(InputError, match="owner/name is listed twice"):
        load_base_models(write(twice, {**twice, "recipes": ["billm"]}))


def test_a_list_that_is_not_there_names_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("BIVLM_BASE_MODELS", str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match=r"BIVLM_BASE_MODELS: no file .*none\.yaml"):
        load_base_models()


ELSEWHERE = r"""
llava ../models/x owner/.. owner/name;reboot owner/$(id) -o/name /models/../etc/passwd s3://bucket/../other s3://bucket//x
s3://Bucket_/x s3://bucket/a\b https://huggingface.co/a/b a/b/c"""


@pytest.mark.parametrize("name", ["", "owner/na me", "/models/x\n--output=/", *ELSEWHERE.split()])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(InputError, match="expected owner/name on the hub, an absolute folder"):
        kind_of(name)


def test_a_revision_has_one_form_by_kind():
    for kind, revision in [("hub", "refs/pr/1"), ("hub", "v1+fix"), ("folder", CONTENT)]:
        check_asked(kind, revision)
    check_asked("hub", COMMIT, pinned=True)
    wrong = [("hub", each) for each in ("a/../b", "$(id)", "", "main/", "main.lock")]
    for kind, revision in [*wrong, ("folder", COMMIT), ("s3", "main")]:
        with pytest.raises(InputError, match="revision "):
            check_asked(kind, revision)
    with pytest.raises(InputError, match="revision "):
        check_asked("hub", "main", pinned=True)


def test_folders_and_prefixes_are_permitted_by_list_or_place_alone(tmp_path, monkeypatch):
    (tmp_path / "listed" / "model").mkdir(parents=True)
    (tmp_path / "placed" / "model").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "placed" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("BIVLM_MODELS", f"{tmp_path}/placed, s3://bucket/models")
    listed = [
        Watched(model=f"{tmp_path}/listed/*", recipes=["bivlm"]),
        Watched(model="s3://other/model", recipes=["bivlm"]),
    ]
    folders = [f"{tmp_path}/{name}" for name in ("listed/model", "placed", "placed/model")]
    for model in [*folders, "owner/name", "s3://bucket/models", "s3://bucket/models/x", "s3://other/model"]:
        check_permitted(model, listed)
    folders = [f"{tmp_path}/{name}" for name in ("elsewhere", "placed/link", "placed-not")]
    for model in [*folders, "/etc", "s3://bucket/models-of-others/x", "s3://other/model/inside"]:
        with pytest.raises(InputError, match="neither in the list of base models nor in a place of BIVLM_MODELS"):
            check_permitted(model, listed)


def test_a_place_may_be_spelled_as_in_a_shell(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BIVLM_MODELS", "~/models, s3://bucket/models/")
    for model in (f"{tmp_path}/models", f"{tmp_path}/models/x", "s3://bucket/models", "s3://bucket/models/x"):
        check_permitted(model, [])


def test_a_recipe_comes_from_the_folder_or_is_shipped(tmp_path, monkeypatch):
    monkeypatch.setenv("BIVLM_RECIPES", str(tmp_path))
    recipe = {"name": "mine", "format": 1, "components": {"language": {"method": "rtn", "bits": 4, "group_size": 32}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "yours.yaml").write_text(yaml.safe_dump(recipe))
    assert named_recipe("mine").name == "mine"
    assert named_recipe("bivlm").name == "bivlm"
    with pytest.raises(InputError, match="its name is 'mine'"):
        named_recipe("yours")
    for name in ("../mine", "/etc/passwd", "a..b", "", "mine.yaml;id"):
        with pytest.raises(InputError, match=r"not a path|not one of"):
            named_recipe(name)


def test_an_event_is_the_same_wherever_a_revision_is_found_and_another_for_anything_else():
    one = Revision("owner/name", COMMIT, "bivlm")
    # Kept: a change of this number would emit everything again.
    assert one.event_id == Revision("owner/name", COMMIT, "bivlm").event_id == uuid.UUID(EVENT_OF_ONE)
    others = [
        Revision("owner/other", COMMIT, "bivlm"),
        Revision("owner/name", "c" * 40, "bivlm"),
        Revision("owner/name", COMMIT, "billm"),
    ]
    assert len({one.event_id, *(other.event_id for other in others)}) == 4
    assert one.event()["payload"] == {"revision": COMMIT, "recipe": "bivlm"}
    assert one.event()["resource"]["bivlm.model_id"] == "owner/name"
    assert one.event()["resource"]["prefect.resource.id"].startswith("bivlm.base-model.owner-name-")


def test_outputs_of_different_things_are_different_folders_below_the_root(tmp_path, monkeypatch):
    monkeypatch.setenv("BIVLM_OUTPUTS", str(tmp_path))
    models = ["a/b-c", "a-b/c", "/a/b-c", "s3://abc/b", "/abc/b", "/models/ü/x y"]
    folders = {Revision(model, CONTENT, "bivlm").output() for model in models}
    assert len(folders) == len(models)
    assert all(folder.is_relative_to(tmp_path) and len(folder.relative_to(tmp_path).parts) == 3 for folder in folders)
    assert all(set(model_slug(model)) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for model in models)


EVENT_OF_ONE = "09d75af7-e8a0-50c9-a3e8-c87a3ba8b381"
