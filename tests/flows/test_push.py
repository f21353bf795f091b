"""A packed checkpoint goes to the hub as it is, once, and comes back as it went."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from changed_files import change_json
from hub_server import Hub, environment, leading_to
from hub_state import Account
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForImageTextToText, AutoProcessor

from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.reports import pushing
from bivlm.reports.bits import bits_of
from bivlm.reports.lineage import find_workspace, read_lineage, verify
from bivlm.reports.model_card import model_card
from bivlm.reports.pushing import package, push
from bivlm.sources.models import resolve_model
from flows.cli import main as cli
from tasks.checkpoint import resolve_base
from tasks.runtime.policy import is_passing

TOKEN = "hf_writes"
BASE_CARD = b"---\nlicense: other\nlicense_name: maker-1\nlicense_link: LICENSE\n---\n# A model\n"


@pytest.fixture(scope="session")
def packed_from_hub(new_compression, tiny_llava, tmp_path_factory):
    """The tiny model, compressed by its name on a hub that is gone since; look, do not touch."""
    compression = new_compression(tmp_path_factory.mktemp("compressed-from-hub"))
    files = {path.name: path.read_bytes() for path in tiny_llava.iterdir()}
    running = Hub()
    commit = running.add("maker/llava", {**files, "README.md": BASE_CARD, "LICENSE": b"the licence"}).head.oid
    with leading_to(running, compression.place):
        compression.run(model="maker/llava")
    running.close()
    (compression.place / "commit").write_text(commit)
    return compression.output


@pytest.fixture
def packed(packed_from_hub, tmp_path):
    return shutil.copytree(packed_from_hub, tmp_path / "packed")


@pytest.fixture
def writer(hub, monkeypatch):
    """The hub, asked by an account that may write."""
    hub.accounts[TOKEN] = Account("me", writes=True)
    hub.accounts["hf_reads"] = Account("me")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def files_of(repository):
    return dict(repository.head.files)


def test_what_came_from_the_hub_is_recorded_by_its_commit(packed_from_hub):
    commit = (packed_from_hub.parent / "commit").read_text()
    report = json.loads((packed_from_hub / "compression_report.json").read_text())
    lineage = read_lineage(packed_from_hub)
    assert (lineage.base_model.id, lineage.base_model.revision) == ("maker/llava", commit)
    assert (report["base_model"]["id"], report["base_model"]["revision"]) == ("maker/llava", commit)


def test_a_hub_in_trouble_is_asked_again_by_the_policy(hub, tiny_llava, tmp_path):
    commit = hub.add("maker/llava", tiny_llava).head.oid
    hub.fail("/api/models/maker/llava", 503)
    assert resolve_base("maker/llava", None, str(tmp_path / "out")).model.revision == commit
    assert [each.status for each in hub.asked("GET", "/api/models/maker/llava")][:2] == [503, 200]


def test_a_refusal_is_final(hub, tmp_path):
    with pytest.raises(InputError, match="the hub gives no maker/llava"):
        resolve_base("maker/llava", None, str(tmp_path / "out"))
    assert len(hub.requests) == 1


def test_the_base_model_in_the_hubs_cache_is_verified(packed_from_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(packed_from_hub.parent / "hf" / "hub"))
    findings = verify(read_lineage(packed_from_hub), packed_from_hub, find_workspace("/nowhere"))
    states = {finding.subject: finding.state for finding in findings}
    assert states["base model"] == "holds"


def test_one_commit_holds_the_checkpoint_its_records_and_the_card(writer, packed):
    pushed = push(package(packed, "me/packed"), "me/packed")
    repository = writer.repositories["me/packed"]
    assert len(repository.commits) == 2, "the empty repository and one more"
    assert pushed.commit == repository.head.oid
    local = {path.relative_to(packed).as_posix(): path.read_bytes() for path in packed.rglob("*") if path.is_file()}
    remote = files_of(repository)
    assert {name: remote[name] for name in local} == local
    assert set(remote) - set(local) == {"README.md", ".gitattributes"}
    assert {"model.safetensors", "lineage.json", "compression_report.json", "report.html", "LICENSE"} <= set(local)
    assert "small" in repository.head.title


def test_a_second_push_finds_nothing_new_and_makes_no_commit(writer, packed, capsys):
    assert cli.main(["push", str(packed), "me/packed"]) == 0
    repository = writer.repositories["me/packed"]
    commits = len(repository.commits)
    assert repository.head.oid in capsys.readouterr().out
    assert cli.main(["push", str(packed), "me/packed"]) == 0
    assert (
        capsys.readouterr().out
        == f"nothing new: {writer.endpoint}/me/packed has it all at commit {repository.head.oid}\n"
    )
    assert len(repository.commits) == commits
    assert len(writer.asked("PUT", "/upload/")) == len({each.path for each in writer.asked("PUT", "/upload/")})


def test_what_came_of_it_can_be_read_by_a_program(writer, packed, capsys):
    assert cli.main(["push", str(packed), "me/packed", "--revision", "two-bits", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    repository = writer.repositories["me/packed"]
    assert (told["branch"], told["commit"]) == ("two-bits", repository.refs["two-bits"])
    assert {"model.safetensors", "README.md"} <= set(told["written"])


def test_only_what_changed_is_sent_and_what_went_is_deleted(writer, packed):
    push(package(packed, "me/packed"), "me/packed")
    repository = writer.repositories["me/packed"]
    before = files_of(repository)
    # As an earlier push of the same model in shards would have left it, and files of the owner's own.
    shard, mine = "model-00001-of-00002.safetensors", {"picture.png": b"mine", "requirements.txt": b"mine"}
    listing = before[".bivlm-files"] + shard.encode() + b"\n"
    stale = {**before, shard: b"old", **mine, "LICENSE": b"an older one", ".bivlm-files": listing}
    repository.commit(stale, "by hand")
    writer.requests.clear()
    pushed = push(package(packed, "me/packed"), "me/packed")
    assert (pushed.written, pushed.deleted) == ([".bivlm-files", "LICENSE"], [shard])
    assert files_of(repository) == {**before, **mine}
    assert not writer.asked("PUT", "/upload/")


def test_what_an_earlier_version_pushed_is_known_by_its_names(writer, packed):
    push(package(packed, "me/packed"), "me/packed")
    repository = writer.repositories["me/packed"]
    stale = {**files_of(repository), "model-00001-of-00002.safetensors": b"old", "picture.png": b"mine"}
    del stale[".bivlm-files"]
    repository.commit(stale, "by hand")
    assert push(package(packed, "me/packed"), "me/packed").deleted == ["model-00001-of-00002.safetensors"]


LINKS = {
    "the page": "report.html",
    "a file of a sweep": "pruning/sweep.csv",
    "a table of a sweep": "pruning/tables/a.csv",
    "the folder of a sweep": "pruning",
    "the tables of a sweep": "pruning/tables",
    "a licence": "LICENSE",
    "the record": "lineage.json",
    "the report": "compression_report.json",
    "the listing": ".bivlm-files",
    "the tokenizer": "tokenizer.json",
    "the weights": "model.safetensors",
}


@pytest.mark.parametrize("case", LINKS)
def test_a_link_out_of_the_folder_is_not_published(packed, tmp_path, case):
    place = packed / LINKS[case]
    elsewhere = tmp_path / "elsewhere"
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_file():
        shutil.move(place, elsewhere)  # with the very bytes that belong there
    else:
        elsewhere.mkdir() if not place.suffix else elsewhere.write_text("secret")
    place.symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"{place.name}: a link to .*elsewhere, outside the folder"):
        package(packed, "me/packed")


def test_what_is_no_file_is_refused_and_not_waited_for(packed):
    for name in ("report.html", "pruning/sweep.csv", "config.json", "model.safetensors"):
        (packed / name).parent.mkdir(exist_ok=True)
        held = (packed / name).read_bytes() if (packed / name).exists() else None
        (packed / name).unlink(missing_ok=True)
        os.mkfifo(packed / name)
        with pytest.raises(InputError, match=f"{name.rpartition('/')[2]}: expected a file"):
            package(packed, "me/packed")
        (packed / name).unlink()
        if held is not None:
            (packed / name).write_bytes(held)


def test_what_the_user_put_beside_the_checkpoint_is_not_published(packed):
    before = package(packed, "me/packed").names
    for name in (".git/config", "notes.md", "adapter/weights.bin", "pruning/notes.md"):
        (packed / name).parent.mkdir(exist_ok=True)
        (packed / name).write_text("mine")
    (packed / "linked").symlink_to("/etc")
    assert package(packed, "me/packed").names == before


def test_a_branch_is_made_and_main_is_left_alone(writer, packed):
    pushed = push(package(packed, "me/packed"), "me/packed", branch="two-bits")
    repository = writer.repositories["me/packed"]
    assert set(files_of(repository)) == {".gitattributes"}
    assert repository.refs["two-bits"] == pushed.commit
    assert "model.safetensors" in repository.at("two-bits").files
    assert not push(package(packed, "me/packed"), "me/packed", branch="two-bits").written


def test_a_private_repository_is_made_private_and_a_public_one_refused(writer, packed):
    push(package(packed, "me/secret"), "me/secret", private=True)
    assert writer.repositories["me/secret"].private
    push(package(packed, "me/open"), "me/open")
    with pytest.raises(InputError, match="me/open: it is there already and public"):
        push(package(packed, "me/open"), "me/open", private=True)


def test_large_files_go_up_in_parts_where_the_hub_wants_them_so(writer, packed):
    writer.part_size = 50_000
    push(package(packed, "me/packed"), "me/packed")
    weights = (packed / "model.safetensors").read_bytes()
    assert files_of(writer.repositories["me/packed"])["model.safetensors"] == weights
    assert len(writer.asked("PUT", "/part/")) >= -(-len(weights) // 50_000)


def test_an_upload_that_failed_is_taken_up_again(writer, packed, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    writer.fail("/upload/", 503, ("reset", 0))
    push(package(packed, "me/packed"), "me/packed")
    assert "model.safetensors" in files_of(writer.repositories["me/packed"])


def test_an_upload_that_cannot_be_finished_leaves_no_commit_and_the_next_one_does(writer, packed, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    writer.fail("/commit/", 503)
    with pytest.raises(ConnectionError, match="HTTP 503") as raised:
        push(package(packed, "me/packed"), "me/packed")
    assert is_passing(raised.value)
    repository = writer.repositories["me/packed"]
    assert set(files_of(repository)) == {".gitattributes"}
    uploads = len(writer.asked("PUT", "/upload/"))
    push(package(packed, "me/packed"), "me/packed")
    assert "model.safetensors" in files_of(repository)
    assert len(writer.asked("PUT", "/upload/")) == uploads, "what was there already was uploaded again"


def test_somebody_elses_commit_in_between_is_not_undone(writer, packed, monkeypatch):
    prepared = package(packed, "me/packed")
    push(prepared, "me/packed")
    repository = writer.repositories["me/packed"]
    repository.commit({**files_of(repository), "LICENSE": b"older"}, "by hand")
    checked = pushing._check_ours

    def and_somebody_commits(*arguments):
        checked(*arguments)
        repository.commit({**files_of(repository), "notes.md": b"new"}, "meanwhile")

    monkeypatch.setattr(pushing, "_check_ours", and_somebody_commits)
    with pytest.raises(ConnectionError, match="somebody else wrote to it meanwhile"):
        push(prepared, "me/packed")
    assert repository.head.title == "meanwhile"


def test_a_hub_that_knows_no_xet_storage_gets_git_lfs(writer, packed):
    """With hf_xet installed, as it is here, the client alone would ask such a hub for a xet token and fail."""
    push(package(packed, "me/packed"), "me/packed")
    assert [each.status for each in writer.asked("GET", "/xet-write-token/main")] == [404]
    assert writer.asked("POST", ".git/info/lfs/objects/batch")
    assert not constants.HF_HUB_DISABLE_XET, "the setting of the process was not put back"


DAMAGES = {
    "a weight": (lambda folder: flip(folder / "model.safetensors"), "packed files: model.safetensors has other bytes"),
    "the tokenizer": (
        lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
        "tokenizer_config.json has other bytes",
    ),
    "an added file": (lambda folder: (folder / "added.json").write_text("{}"), "added.json was not there"),
    "no lineage": (lambda folder: (folder / "lineage.json").unlink(), "lineage.json: the file is missing"),
    "no report": (lambda folder: (folder / "compression_report.json").unlink(), "report.json: the file is missing"),
    "bits that are not so": (lambda folder: lower_the_bits(folder), "is about another bits than"),
}


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def lower_the_bits(folder):
    change_json(folder / "compression_report.json", lambda report: report["bits"]["linears"].update(stored=1.08))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_not_what_its_records_say_is_refused(writer, packed, damage, capsys):
    change, said = DAMAGES[damage]
    change(packed)
    assert cli.main(["push", str(packed), "me/packed"]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert writer.requests == []


def test_a_model_that_is_not_packed_is_refused(writer, tiny_llava):
    with pytest.raises(InputError, match="not a packed checkpoint"):
        package(tiny_llava, "me/packed")


def test_a_repository_of_something_else_is_left_alone(writer, packed):
    repository = writer.add("me/other", {"config.json": "{}", "model.safetensors": b"another model"})
    with pytest.raises(InputError, match=r"me/other, branch main: it holds something else .*config.json"):
        push(package(packed, "me/other"), "me/other")
    assert len(repository.commits) == 1


RIGHTS = {
    "no token": ("", "the hub asks who writes: `hf auth login`, or set HF_TOKEN"),
    "an unknown token": ("hf_nobody", "does not accept the token"),
    "a token that may only read": ("hf_reads", "forbids it with the token that was sent: You don't have the rights"),
}


@pytest.mark.parametrize("case", RIGHTS)
def test_whoever_may_not_write_is_told_why(writer, packed, case, monkeypatch):
    token, said = RIGHTS[case]
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=said):
        push(package(packed, "me/packed"), "me/packed")


def test_a_push_without_a_hub_says_so(writer, packed, monkeypatch):
    prepared = package(packed, "me/packed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"^push to me/packed: .*HF_HUB_OFFLINE is set"):
        push(prepared, "me/packed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    writer.close()
    with pytest.raises(ConnectionError, match=r"^push to me/packed: the hub at .* cannot be reached"):
        push(prepared, "me/packed")


@pytest.mark.parametrize("name", ["packed", "a/b/c", "me/", "me/pa cked", "me/--x--"])
def test_a_name_that_can_be_none_is_refused(writer, packed, name):
    with pytest.raises(InputError, match=r"push: .*: expected owner/name"):
        push(package(packed, name), name)
    assert writer.requests == []


def test_the_card_says_what_the_records_say(packed):
    report = json.loads((packed / "compression_report.json").read_text())
    lineage = read_lineage(packed)
    text = model_card(report, lineage, "me/packed", ["LICENSE"])
    assert text == package(packed, "me/packed").card
    commit = lineage.base_model.revision
    assert ModelCard(text).data.to_dict() == {
        "license": "other",
        "license_name": "maker-1",
        "license_link": "LICENSE",
        "base_model": "maker/llava",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["bivlm", "quantized"],
    }
    bits = bits_of(packed)
    assert f"**{bits['linears']['stored']:.3f} stored bits per weight**" in text
    assert f"{bits['model']['stored']:.2f} bits per parameter" in text
    for part in bits["by_component"].values():
        assert (
            f"| {part['weights']:,} | {part['nominal']:.3f} | {part['entropy']:.3f} | **{part['stored']:.3f}** |"
            in text
        )
    for role in ("full precision", "packed"):
        (key,) = [key for name, key in lineage.evaluations.items() if name.startswith(f"{role}, vqa")]
        figures = lineage.steps[key].figures
        low, high = figures["ci95"]
        assert f"{figures['metrics']['accuracy']:.1f} ({low:.1f} to {high:.1f})" in text
    kl = lineage.steps[lineage.evaluations["packed, held-out samples"]].figures["kl"]
    assert f"{kl:.3g} nats" in text
    for value in (commit, lineage.recipe_sha256, lineage.packed.sha256, "from_pretrained('me/packed')", "[LICENSE]"):
        assert value in text
    places = [report["recipe"]["evaluation"][0].removeprefix("vqa:"), report["recipe"]["calibration"]["source"]]
    names = [Path(place).name for place in places]
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["components"] == report["recipe"]["components"]
    assert (recipe["evaluation"], recipe["calibration"]["source"]) == ([f"vqa:{names[0]}"], names[1])
    assert not any(place in text for place in places), "a path of this machine is in a public card"


def test_a_card_without_scores_licence_or_hub_says_so(packed):
    report = json.loads((packed / "compression_report.json").read_text())
    lineage = read_lineage(packed)
    base = lineage.base_model.model_copy(update={"id": "/models/llava", "revision": None})
    text = model_card(
        report | {"licence": None}, lineage.model_copy(update={"base_model": base, "evaluations": {}}), "X"
    )
    header = ModelCard(text).data.to_dict()
    assert not {"base_model", "base_model_relation", "license"} & set(header)
    assert "It was not evaluated." in text
    assert "whose card names none" in text
    assert "/models/" not in text


LICENCES = {
    "a file alone": (None, ["LICENSE"], ("other", "as-the-base-model", "LICENSE")),
    "a name that the hub knows": ({"license": "apache-2.0"}, ["LICENSE"], ("apache-2.0", None, None)),
    "a file of the base's repository": (
        {"license": "other", "license_name": "terms", "license_link": "TERMS.md"},
        [],
        ("other", "terms", "https://huggingface.co/maker/llava/blob/{commit}/TERMS.md"),
    ),
    "a link": (
        {"license": "other", "license_name": "terms", "license_link": "https://maker.example/terms"},
        [],
        ("other", "terms", "https://maker.example/terms"),
    ),
}


@pytest.mark.parametrize("case", LICENCES)
def test_the_licence_of_the_base_is_carried_over(packed, case):
    licence, files, expected = LICENCES[case]
    report = json.loads((packed / "compression_report.json").read_text()) | {"licence": licence}
    lineage = read_lineage(packed)
    text = model_card(report, lineage, "me/packed", files)
    found = ModelCard(text).data.to_dict()
    commit = lineage.base_model.revision
    named = [value and value.format(commit=commit) for value in expected]
    assert [found.get(key) for key in ("license", "license_name", "license_link")] == named
    assert all(file in text.split("## Licence")[1] for file in files)


def test_the_card_of_a_model_with_code_of_its_own_says_that_it_runs(packed):
    report = json.loads((packed / "compression_report.json").read_text())
    lineage = read_lineage(packed)
    assert "trust_remote_code" not in model_card(report, lineage, "me/packed")
    files = lineage.packed.model_copy(update={"files": {**lineage.packed.files, "modeling.py": "0" * 64}})
    text = model_card(report, lineage.model_copy(update={"packed": files}), "me/packed")
    assert "AutoModelForImageTextToText.from_pretrained('me/packed', trust_remote_code=True)" in text
    assert "comes with code of its own, which is here too" in text


def test_a_dry_run_prints_the_card_and_asks_nobody(writer, packed, capsys):
    assert cli.main(["push", str(packed), "me/packed", "--dry-run"]) == 0
    assert capsys.readouterr().out == package(packed, "me/packed").card
    assert writer.requests == []


def test_what_was_pushed_comes_back_the_same(writer, packed):
    pushed = push(package(packed, "me/packed"), "me/packed")
    resolved = resolve_model("me/packed")
    assert resolved.revision == pushed.commit
    assert Checkpoint.open(resolved.folder).digest() == Checkpoint.open(packed).digest()


FROM_PRETRAINED = """
import sys
import torch
import bivlm
from transformers import AutoModelForImageTextToText, AutoProcessor

model, loading = AutoModelForImageTextToText.from_pretrained("me/packed", output_loading_info=True)
assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
AutoProcessor.from_pretrained("me/packed")
torch.save(model.state_dict(), sys.argv[1])
"""


@pytest.mark.slow
def test_from_pretrained_loads_it_by_its_name(writer, packed, tmp_path):
    push(package(packed, "me/packed"), "me/packed")
    env = {**os.environ, **environment(writer, tmp_path / "elsewhere")}
    done = subprocess.run(
        [sys.executable, "-c", FROM_PRETRAINED, str(tmp_path / "state")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "state")
    local = AutoModelForImageTextToText.from_pretrained(packed).state_dict()
    assert loaded.keys() == local.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in local.items())
    assert AutoProcessor.from_pretrained(packed)
