"""Which revision of a base model there is: on the hub, in a folder, below an S3 prefix; and nothing half-copied."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest
from hub_server import hub  # noqa: F401  a fixture
from s3_server import s3_endpoint, s3_location  # noqa: F401  fixtures
from tiny_llava import make_tiny_llava

from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.sources.models import resolve_model
from bivlm.sources.s3_models import cached_copy, list_models, list_prefix, what_is_missing
from tasks.watching.revisions import folder_listing, hub_revision, models_of, s3_listing, settle
from tasks.watching.watch_lists import Watched

START = datetime(2026, 11, 24, 2, 0, tzinfo=UTC)


@pytest.fixture(scope="session")
def sharded_llava(tmp_path_factory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("sharded") / "llava", max_shard_size="100KB")


@pytest.fixture
def model(sharded_llava, tmp_path) -> Path:
    return Path(shutil.copytree(sharded_llava, tmp_path / "models" / "llava"))


class Looking:
    """Looks at a place, a minute after each other."""

    def __init__(self, listing, settled_seconds=60):
        self.listing, self.settled_seconds, self.look, self.time = listing, settled_seconds, None, START

    def again(self, minutes=1):
        self.time += timedelta(minutes=minutes)
        self.look = settle(self.look, self.listing, self.settled_seconds, self.time)
        return self.look


def test_a_folder_is_a_revision_once_it_is_whole_and_stays_as_it_is(model):
    looking = Looking(lambda: folder_listing(model))
    assert looking.again().revision is None
    assert looking.again(minutes=0.5).revision is None  # too soon
    assert looking.again().revision == Checkpoint.open(model).digest()


def test_a_revision_of_a_folder_is_its_content_not_its_times(model, sharded_llava):
    for file in model.iterdir():
        file.touch()
    looking = Looking(lambda: folder_listing(model))
    looking.again()
    assert looking.again().revision == Checkpoint.open(sharded_llava).digest()


def test_a_folder_that_is_being_copied_is_none(sharded_llava, tmp_path):
    place = tmp_path / "arriving"
    looking = Looking(lambda: folder_listing(place))
    assert "no such folder" in looking.again().problem
    place.mkdir()
    for file in sorted(sharded_llava.iterdir()):
        shutil.copyfile(file, place / file.name)
        assert looking.again(minutes=0.5).revision is None
    assert looking.again().revision == Checkpoint.open(sharded_llava).digest()


@pytest.mark.parametrize("missing", ["config.json", "model-00002-of-*.safetensors", "model.safetensors.index.json"])
def test_what_is_missing_keeps_a_folder_from_being_one_however_long(model, missing):
    (gone,) = model.glob(missing)
    gone.unlink()
    looking = Looking(lambda: folder_listing(model))
    for _ in range(3):
        look = looking.again(minutes=60)
        assert look.revision is None and look.problem


def test_a_shard_that_is_cut_short_keeps_a_folder_from_being_one(model):
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    looking = Looking(lambda: folder_listing(model))
    assert [looking.again().revision for _ in range(3)] == [None] * 3
    assert shard.name in looking.look.problem


def test_a_changed_folder_is_another_revision_and_the_old_bytes_the_old_one(model):
    looking = Looking(lambda: folder_listing(model))
    looking.again()
    first = looking.again().revision
    config = (model / "config.json").read_bytes()
    (model / "config.json").write_bytes(config + b"\n")
    assert looking.again().revision is None
    assert looking.again().revision not in (None, first)
    (model / "config.json").write_bytes(config)
    looking.again()
    assert looking.again().revision == first


def test_a_folder_that_changes_while_it_is_hashed_has_no_revision_yet(model):
    def listing():
        found = folder_listing(model)

        def revision():
            value = found.revision()
            (model / "config.json").write_bytes((model / "config.json").read_bytes() + b"\n")
            return value

        return type(found)(found.digest, found.problem, revision)

    looking = Looking(listing)
    looking.again()
    assert looking.again().revision is None


def test_a_known_revision_is_not_hashed_again(model):
    hashed = []

    def listing():
        found = folder_listing(model)
        return type(found)(found.digest, found.problem, lambda: hashed.append(1) or found.revision())

    looking = Looking(listing)
    assert len({looking.again().revision for _ in range(5)}) == 2
    assert hashed == [1]


def test_every_model_in_a_folder(model):
    (model.parent / ".hidden").mkdir()
    (model.parent / "a-file").touch()
    entry = Watched(model=f"{model.parent}/*", recipes=["bivlm"])
    assert models_of(entry) == [str(model)]
    with pytest.raises(InputError, match="no such folder"):
        models_of(Watched(model=f"{model}/none/*", recipes=["bivlm"]))


def test_the_hub_says_the_commit_of_a_branch(hub, sharded_llava):  # noqa: F811
    repository = hub.add("owner/llava", sharded_llava)
    first = repository.head.oid
    assert hub_revision("owner/llava") == hub_revision("owner/llava", "main") == first
    repository.commit({**repository.head.files, "README.md": b"new"}, "a card")
    assert hub_revision("owner/llava") == repository.head.oid != first
    with pytest.raises(InputError, match="no revision 'v2'"):
        hub_revision("owner/llava", "v2")
    hub.fail("/api/models/", 500)
    with pytest.raises(ConnectionError, match="the hub is in trouble"):
        hub_revision("owner/llava")


# S3


def upload(folder: Path, url: str, names=None) -> None:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    for file in folder.iterdir():
        if names is None or file.name in names:
            boto3.client("s3").upload_file(str(file), bucket, f"{prefix}/{file.name}")


def test_a_prefix_is_a_revision_once_everything_that_its_index_names_is_there(s3_location, sharded_llava):  # noqa: F811
    url = f"{s3_location}/llava"
    looking = Looking(lambda: s3_listing(url))
    last = sorted(file.name for file in sharded_llava.glob("*.safetensors"))[-1]
    upload(sharded_llava, url, {file.name for file in sharded_llava.iterdir()} - {last})
    assert [looking.again().revision for _ in range(3)] == [None] * 3
    assert looking.look.problem == f"model.safetensors.index.json names {last}, which is not there"
    upload(sharded_llava, url, {last})
    assert looking.again().revision is None
    assert looking.again().revision == list_prefix(url).revision
    assert list_models(s3_location) == [url]


def test_a_model_below_a_prefix_is_copied_pinned_and_used_as_any_other(s3_location, sharded_llava, model):  # noqa: F811
    url = f"{s3_location}/llava"
    upload(sharded_llava, url)
    revision = list_prefix(url).revision
    found = resolve_model(url, revision)
    assert (found.id, found.revision, found.folder.name) == (url, revision, "llava")
    assert Checkpoint.open(found.folder).digest() == Checkpoint.open(sharded_llava).digest()
    assert cached_copy(url, revision) == found.folder

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"new": True}))
    upload(model, url, {"config.json"})
    assert resolve_model(url, revision).folder == found.folder  # the pinned copy is still that
    newer = resolve_model(url)
    assert newer.revision == list_prefix(url).revision != revision
    assert newer.folder != found.folder
    with pytest.raises(InputError, match="which was asked for, is gone"):
        resolve_model(url, "c" * 64)


def test_a_copy_that_was_cut_short_goes_on(s3_location, sharded_llava, monkeypatch):  # noqa: F811
    from bivlm.sources import s3_models

    url = f"{s3_location}/llava"
    upload(sharded_llava, url)
    client, calls = s3_models.s3_client, []

    def failing():
        made = client()
        download = made.download_file

        def download_file(bucket, key, path):
            calls.append(key)
            if len(calls) == 4:
                raise ConnectionError("lost")
            download(bucket, key, path)

        made.download_file = download_file
        return made

    monkeypatch.setattr(s3_models, "s3_client", failing)
    with pytest.raises(ConnectionError):
        resolve_model(url)
    resolve_model(url)
    assert len(calls) == len(list_prefix(url).objects) + 1


@pytest.mark.parametrize("name", ["../../outside.json", "a/../../outside.json", "back\\slash.json"])
def test_objects_whose_names_lead_out_of_a_folder_are_refused(s3_location, sharded_llava, tmp_path, name):  # noqa: F811
    url = f"{s3_location}/llava"
    upload(sharded_llava, url)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=b"{}")
    with pytest.raises(InputError, match="has a name that leads out of a folder"):
        resolve_model(url)
    assert not list(tmp_path.rglob("outside.json"))


def test_a_bucket_that_is_not_there_is_bad_input(s3_endpoint):  # noqa: F811
    with pytest.raises(InputError, match="cannot be read"):
        s3_listing("s3://no-such-bucket/llava")
    with pytest.raises(InputError, match="expected s3://bucket/prefix"):
        resolve_model("s3://bucket/..")


def test_an_index_that_is_not_one_is_told(s3_location):  # noqa: F811
    bucket, _, prefix = s3_location.removeprefix("s3://").partition("/")
    for name, body in (("config.json", b"{}"), ("model.safetensors.index.json", b"[1]")):
        boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/x/{name}", Body=body)
    assert "expected a JSON object, found [1]" in what_is_missing(list_prefix(f"{s3_location}/x"))


def test_an_object_that_goes_between_two_requests_is_told(s3_location, sharded_llava, monkeypatch):  # noqa: F811
    from bivlm.sources import s3_models

    url = f"{s3_location}/llava"
    upload(sharded_llava, url)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    listing = list_prefix(url)
    index = f"{prefix}/model.safetensors.index.json"
    boto3.client("s3").delete_object(Bucket=bucket, Key=index)
    assert what_is_missing(listing).startswith(f"model {url}: cannot be read: ")
    monkeypatch.setattr(s3_models, "what_is_missing", lambda listing: "")
    monkeypatch.setattr(s3_models, "list_prefix", lambda url: listing)
    with pytest.raises(InputError, match=r"llava: cannot be read: .*NoSuchKey"):
        resolve_model(url)
