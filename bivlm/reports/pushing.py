"""Push a packed checkpoint to the Hugging Face hub as one commit, if it is what its records say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2  # the hub's
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not marked as exported
    build_hf_headers,
    get_session,
    validate_repo_id,
)
from pydantic import BaseModel, JsonValue

from bivlm.addresses import without_credentials
from bivlm.checkpoint.outputs import LISTING, RECORDS, extra_files, is_written, names_in
from bivlm.checkpoint.reading import (
    CONFIG,
    LINEAGE,
    REPORT,
    WEIGHTS,
    WEIGHTS_INDEX,
    Checkpoint,
    is_licence_name,
    refuse_links_out_of,
)
from bivlm.errors import InputError
from bivlm.reports.bits import bits_of
from bivlm.reports.lineage import Lineage, read_lineage, verify_folder
from bivlm.reports.model_card import CARD, model_card
from bivlm.sources.hub_errors import hub_error
from bivlm.untrusted import RECORD, parse_model, read_bytes, short
from bivlm.workspace.hashing import digest, file_digest

BRANCH = "main"
_NEW = {".gitattributes", CARD}  # what a repository has when it was just made, licences apart


@dataclass(frozen=True)
class Package:
    """The files of a packed checkpoint by their names on the hub, and its card."""

    lineage: Lineage
    report: dict[str, Any]
    files: dict[str, Path]
    card: str

    def content(self, name: str) -> Path | bytes:
        return self.card.encode() if name == CARD else self.files[name]

    @property
    def names(self) -> list[str]:
        return sorted({*self.files, CARD})


class _BaseModel(BaseModel):
    sha256: str


class _Report(BaseModel):
    """The parts of compression_report.json that are read."""

    base_model: _BaseModel
    recipe: dict[str, JsonValue]
    recipe_sha256: str
    code_version: str
    bits: dict[str, JsonValue]
    warnings: list[str]
    licence: dict[str, str] | None = None


@dataclass(frozen=True)
class Pushed:
    """The commit that now holds the checkpoint, and the files that it wrote and deleted.

    Both are empty if the hub had it all already; then `commit` is an earlier one.
    """

    repository: str
    branch: str
    commit: str
    url: str
    written: list[str]
    deleted: list[str]


def package(folder: str | Path, name: str) -> Package:
    """Return the packed checkpoint in `folder`, to be loaded by `name`, checked against its own records.

    Every packed byte is hashed. Raises `InputError` if it is no packed checkpoint, if a file is not the one of its
    lineage record, or if its report is about something else.
    """
    folder = Path(folder)
    checkpoint = Checkpoint.open(folder)
    if not checkpoint.packed:
        raise InputError(f"{folder}: not a packed checkpoint; expected the output of `bivlm compress`")
    files = {path.relative_to(folder).as_posix(): path for path in _files(checkpoint)}
    refuse_links_out_of(files.values(), folder)
    lineage = read_lineage(folder)
    broken = [finding for finding in verify_folder(lineage, folder) if finding.state == "broken"]
    if broken:
        said = "\n".join(f"  {finding.subject}: {finding.detail}" for finding in broken)
        raise InputError(f"{folder}: not what its {LINEAGE} says, so it is not pushed; compress it again\n{said}")
    report = _report(folder, lineage)
    licences = [path.name for path in checkpoint.licence_files]
    return Package(lineage, report, files, model_card(report, lineage, name, licences))


def push(package: Package, repository: str, *, private: bool = False, branch: str | None = None) -> Pushed:
    """Make the repository and `branch` (default main) if they are missing, and commit what they do not have yet.

    Files of an earlier push that this checkpoint does not have are deleted in the same commit; other files stay.
    Raises `InputError` for a name, token or right that is not good enough, for a repository that holds something else
    than a packed checkpoint, and for `private` where it is public. `ConnectionError` where trying again may help; what
    was uploaded then need not be again.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"push: {repository!r}: expected owner/name ({error})") from None
    if "/" not in repository:
        raise InputError(f"push: {repository!r}: expected owner/name")
    if get_token() is None and not constants.is_offline_mode():
        raise InputError(f"push to {repository}: the hub asks who writes: `hf auth login`, or set HF_TOKEN")
    try:
        return _push(package, repository, private, branch or BRANCH)
    except HfHubHTTPError as error:
        if error.response.status_code == httpx2.codes.PRECONDITION_FAILED:
            raise ConnectionError(f"push to {repository}: somebody else wrote to it meanwhile; push again") from error
        raise hub_error(error, repository, branch, pushing=True) from error
    except (httpx2.HTTPError, OfflineModeIsEnabled, RuntimeError) as error:  # the last is what failed uploads come as
        raise hub_error(error, repository, branch, pushing=True) from error


def _push(package: Package, repository: str, private: bool, branch: str) -> Pushed:
    api = HfApi()
    api.create_repo(repository, private=private or None, exist_ok=True)
    if branch != BRANCH:
        api.create_branch(repository, branch=branch, exist_ok=True)
    info = api.model_info(repository, revision=branch)
    if private and not info.private:
        raise InputError(
            f"push to {repository}: it is there already and public; make it private in its settings, or leave "
            "--private out"
        )
    if (head := info.sha) is None:
        raise InputError(f"push to {repository}: found no commit of branch {branch}, expected at least one")
    tree = api.list_repo_tree(repository, recursive=True, revision=head)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    _check_ours(repository, branch, there)
    written = [name for name in package.names if not _same(package, name, there.get(name))]
    deleted = sorted((there.keys() - set(package.names)) & _pushed_before(api, repository, head, there))
    commit = head
    if written or deleted:
        adds = [CommitOperationAdd(name, package.content(name)) for name in written]
        deletes = [CommitOperationDelete(name) for name in deleted]
        with _xet_where_there_is_any(repository, branch):
            try:
                done = api.create_commit(
                    repository,
                    [*adds, *deletes],
                    commit_message=_message(package),
                    commit_description=f"base model {_base(package)}\npacked sha256 {package.lineage.packed.sha256}",
                    revision=branch,
                    parent_commit=head,
                )
            except ValueError as error:  # the hub refuses the card's header
                raise InputError(f"push to {repository}: {error}") from error
        commit = done.oid
    return Pushed(
        repository, branch, commit, f"{without_credentials(constants.ENDPOINT)}/{repository}", written, deleted
    )


def _report(folder: Path, lineage: Lineage) -> dict[str, Any]:
    file = folder / REPORT
    if not file.exists():
        raise InputError(f"{file}: the file is missing; compress it again")
    refuse_links_out_of([file], folder)
    report = parse_model(_Report, read_bytes(file, RECORD.max_bytes), file, "the report of a compression")
    expected = {
        "base model": (report.base_model.sha256, lineage.base_model.sha256),
        "recipe": (digest(report.recipe), report.recipe_sha256, lineage.recipe_sha256),
        "bits": (_rounded(report.bits), _rounded(bits_of(folder))),
    }
    for what, (*found, wanted) in expected.items():
        if any(each != wanted for each in found):
            said = short(next(each for each in found if each != wanted))
            raise InputError(
                f"{file}: is about another {what} than the checkpoint beside it: {said}, not {short(wanted)}"
            )
    if report.bits["linears"] is None:
        raise InputError(f"{file}: bits.linears: the checkpoint packs no linear layer, so there is nothing to show")
    return report.model_dump()


def _rounded(bits: Any) -> Any:
    """Round figures to nine digits: the last ones depend on the order in which layers are added up."""
    if isinstance(bits, dict):
        return {key: _rounded(value) for key, value in bits.items()}
    return float(f"{bits:.9g}") if isinstance(bits, float) else bits


def _files(checkpoint: Checkpoint) -> Iterator[Path]:
    folder = checkpoint.folder
    yield from checkpoint.weight_files
    yield from checkpoint.side_files
    yield from checkpoint.licence_files
    yield from (folder / name for name in (CONFIG, REPORT, LINEAGE))
    if not (folder / WEIGHTS).exists():
        yield folder / WEIGHTS_INDEX
    yield from extra_files(folder)
    if (folder / LISTING).exists():
        yield folder / LISTING


def _pushed_before(api: HfApi, repository: str, commit: str, there: Mapping[str, RepoFile]) -> set[str]:
    """Return the files that an earlier push brought, by its listing; by their names where there is none."""
    if LISTING not in there:
        return set(filter(is_written, there))
    return RECORDS | names_in(Path(api.hf_hub_download(repository, LISTING, revision=commit)).read_bytes())


def _check_ours(repository: str, branch: str, there: Mapping[str, RepoFile]) -> None:
    others = sorted(name for name in there if name not in _NEW and not is_licence_name(name))
    if others and LINEAGE not in there:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise InputError(
            f"push to {repository}, branch {branch}: it holds something else than a packed checkpoint "
            f"({', '.join(others[:3])}{more}); expected a new repository or an earlier push"
        )


def _same(package: Package, name: str, there: RepoFile | None) -> bool:
    """Return whether the hub has these bytes: by sha256 what it keeps outside git, by git's own hash the rest."""
    if there is None:
        return False
    content = package.content(name)
    if there.lfs is not None:
        known = package.lineage.packed.files.get(name)
        return there.lfs.sha256 == (known or _sha256(content))
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != there.size:
        return False
    data = content if isinstance(content, bytes) else content.read_bytes()
    return there.blob_id == hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def _sha256(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_digest(content)


def _message(package: Package) -> str:
    stored, recipe = package.report["bits"]["linears"]["stored"], package.report["recipe"]["name"]
    return f"{Path(package.lineage.base_model.id).name} by bivlm's recipe {recipe}: {stored:.3f} stored bits"


def _base(package: Package) -> str:
    base = package.lineage.base_model
    return f"{base.id} at {base.revision}" if base.revision else f"sha256 {base.sha256}"


@contextmanager
def _xet_where_there_is_any(repository: str, branch: str) -> Iterator[None]:
    """Turn xet off for a hub that has none, so that Git LFS is used: with hf_xet the client uploads without asking."""
    url = f"{constants.ENDPOINT}/api/models/{repository}/xet-write-token/{branch.replace('/', '%2F')}"
    disabled = constants.HF_HUB_DISABLE_XET
    if not disabled:
        answer = get_session().get(url, headers=build_hf_headers())
        constants.HF_HUB_DISABLE_XET = answer.status_code == httpx2.codes.NOT_FOUND
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = disabled
