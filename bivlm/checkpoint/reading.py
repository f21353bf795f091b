"""Opening a Hugging Face checkpoint folder: its config, its tensors, its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from bivlm.checkpoint.tensor_file import TensorEntry, digest_file, read_entries, read_tensor
from bivlm.errors import InputError
from bivlm.families import MODULES_KEY, Modules, parse_modules
from bivlm.identity import file_digest

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
REPORT = "compression_report.json"
LINEAGE = "lineage.json"
QUANT_METHOD = "bivlm"
FORMAT = 1  # of the packed checkpoint
TABLES_KEY = "tables"  # in the quantization config: which packed weights are the embedding of tokens and the head

# Files that a model needs beside its weights: configs, tokenizer, processor, chat template.
_SIDE_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe"}
_TEMPLATES = "additional_chat_templates"
_NOT_SIDE_FILES = {CONFIG, WEIGHTS_INDEX, REPORT, LINEAGE, "pytorch_model.bin.index.json", "trainer_state.json"}
_LICENCES = ("license", "licence", "notice", "use_policy")
_REFUSALS = {401, 403, 404}  # no access, no such model, no such revision
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened but not loaded.

    Attributes:
        folder: the folder.
        config: what config.json says.
        entries: every tensor by its name on disk, in the order of names.
        modules: which modules are vision, adaptor and language, where the caller says it or the packed checkpoint
            carries it; None where its family knows.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    modules: Modules | None = None

    @classmethod
    def open(cls, folder: str | Path, modules: Modules | None = None) -> Checkpoint:
        """Read config and tensor headers, no weights. `modules` go before what a packed checkpoint carries.

        As in transformers, one ``model.safetensors`` goes before an index of shards. Raises `InputError` naming folder
        and file if the config is missing or unreadable, weights are missing, cut short, only there as pickles, or an
        index names a file outside the folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"checkpoint {folder}: no such folder")
        config = _read_json(folder / CONFIG)
        files = _weight_files(folder)
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for entry in read_entries(file):
                if entry.name in entries:
                    raise InputError(f"tensor {entry.name} is both in {entries[entry.name].file} and in {file}")
                entries[entry.name] = entry
        for name, file in _indexed_tensors(folder):
            if name not in entries:
                raise InputError(f"{folder / WEIGHTS_INDEX} says that tensor {name} is in {file}; it is not there")
        return cls(folder, config, dict(sorted(entries.items())), modules or _carried_modules(config, folder / CONFIG))

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization config, of whatever method, or None."""
        return self.config.get("quantization_config")

    @cached_property
    def packed(self) -> dict[str, int]:
        """Byte length of every packed weight by the linear's name in the loaded model; empty unless we packed it.

        Raises `InputError` for a packed checkpoint of another format.
        """
        quantization = self.quantization or {}
        if quantization.get("quant_method") != QUANT_METHOD:
            return {}
        return check_quantization(quantization.get("format"), quantization.get("packed"), self.folder / CONFIG)

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, by name."""
        return sorted({entry.file for entry in self.entries.values()})

    @cached_property
    def side_files(self) -> list[Path]:
        """Tokenizer, processor, chat templates, generation config: what is read beside config and weights."""
        templates = (self.folder / _TEMPLATES).glob("*.jinja")
        files = [file for file in self.folder.iterdir() if _is_side_file(file)]
        return sorted([*files, *templates])

    @cached_property
    def licence_files(self) -> list[Path]:
        """Licences and notices, which have to travel with the weights."""
        return sorted(
            file for file in self.folder.iterdir() if file.is_file() and file.name.lower().startswith(_LICENCES)
        )

    def read(self, disk_name: str, sha256: str | None = None) -> torch.Tensor:
        """The tensor called `disk_name` on disk; raises `InputError` if there is none, or if it is not of `sha256`."""
        try:
            entry = self.entries[disk_name]
        except KeyError:
            raise InputError(f"checkpoint {self.folder}: no tensor {disk_name}") from None
        return read_tensor(entry, sha256)

    def digests(self) -> Digests:
        """sha256 of the checkpoint's files and tensors; every file is streamed once."""
        files = {CONFIG: file_digest(self.folder / CONFIG)}
        files |= {self._name(file): file_digest(file) for file in self.side_files}
        tensors: dict[str, str] = {}
        for file in self.weight_files:
            inside = [entry for entry in self.entries.values() if entry.file == file]
            files[self._name(file)], of_file = digest_file(file, inside)
            tensors |= of_file
        return Digests(dict(sorted(files.items())), tensors)

    def digest(self) -> str:
        """sha256 of what the checkpoint is, wherever it lies: see `Digests`."""
        return self.digests().sha256

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


@dataclass(frozen=True)
class Digests:
    """sha256 of what a checkpoint is: its weights, config, tokenizer and processor files, and every tensor, by name."""

    files: dict[str, str]
    tensors: dict[str, str]

    @property
    def sha256(self) -> str:
        """One over all files, names included; where the folder lies does not enter."""
        return digest_of_files(self.files)


def digest_of_files(digests: Mapping[str, str]) -> str:
    """One sha256 over names and sha256 of files."""
    total = hashlib.sha256(b"bivlm checkpoint 1\n")
    for name, sha256 in sorted(digests.items()):
        total.update(f"{sha256} {name}\n".encode())
    return total.hexdigest()


def check_quantization(format: Any, packed: Any, source: str | Path) -> dict[str, int]:
    """`packed`, the lengths by linear; raises `InputError` naming `source` for an unknown format or bad lengths."""
    if format != FORMAT:
        raise InputError(f"{source}: quantization_config: format {format!r}, this code reads {FORMAT}; update bivlm")
    if not isinstance(packed, dict) or not all(type(length) is int and length > 0 for length in packed.values()):
        raise InputError(f"{source}: quantization_config: packed: expected a byte length by linear, found {packed!r}")
    return packed


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model lies: `folder`, the `id` it was asked for by, and the hub's commit hash (None for a folder)."""

    folder: Path
    id: str
    revision: str | None


def resolve_model(model: str, revision: str | None = None) -> ResolvedModel:
    """A local folder as it is, anything else from the Hugging Face hub (or its cache, when offline).

    Raises `InputError` for a revision of a local folder and when neither folder nor hub has the model, and
    `ConnectionError` when the hub cannot be reached and its cache has no copy.
    """
    if model and Path(model).is_dir():
        if revision is not None:
            raise InputError(f"model {model} is a folder, which has no revision {revision!r}; leave the revision out")
        return ResolvedModel(Path(model), model, None)
    # The hub also knows ids without an owner, but no vision-language model is called so: it is a mistyped folder.
    if "/" not in model:
        raise InputError(f"model {model!r}: no such folder, and not a hub id of the form owner/name")
    wanted = f"{model} at revision {revision}" if revision else model
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=["*.safetensors", *(f"*{suffix}" for suffix in sorted(_SIDE_SUFFIXES)), "LICEN[CS]E*"],
            ignore_patterns=["original/*", "consolidated*", "onnx/*"],
        )
    except HFValidationError:
        raise InputError(f"model {model!r}: no such folder, and not a hub id of the form owner/name") from None
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        # The second stands for whatever went wrong on the way, which is its cause.
        reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        if isinstance(reason, OfflineModeIsEnabled):
            raise InputError(f"model {model!r}: no such folder, and {wanted} is not in the hub's cache") from error
        if isinstance(reason, HfHubHTTPError) and reason.response.status_code in _REFUSALS:
            raise InputError(f"model {model!r}: no such folder, and the hub gives no {wanted}: {reason}") from error
        raise ConnectionError(f"model {model!r}: no such folder, and the hub cannot be reached for {wanted}") from error
    return ResolvedModel(Path(folder), model, Path(folder).name)


def _carried_modules(config: dict[str, Any], source: Path) -> Modules | None:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        return None
    carried = quantization.get(MODULES_KEY)
    return None if carried is None else parse_modules(carried, f"{source}: quantization_config: {MODULES_KEY}")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).exists():
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"checkpoint {folder}: its weights are pickles ({pickles[0]}), which can run code when they are read; "
                "save it with safetensors first"
            )
        raise InputError(f"checkpoint {folder}: neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    return sorted({folder / file for _, file in _indexed_tensors(folder)})


def _indexed_tensors(folder: Path) -> list[tuple[str, str]]:
    """(tensor, file) of the index of shards, checked; empty where a single file holds the weights."""
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return []
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected a mapping 'weight_map' from tensors to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _inside(file):
            raise InputError(f"{index}: tensor {name} is said to be in {file!r}, which is not a file of this folder")
    return list(weight_map.items())


def _inside(file: str) -> bool:
    # Judged by the text: in the hub's cache the files themselves are links to a folder beside this one.
    path = PurePosixPath(file)
    drive = PureWindowsPath(file).drive
    return bool(path.parts) and not path.is_absolute() and not drive and ".." not in path.parts and "\\" not in file


def _is_side_file(file: Path) -> bool:
    named = file.suffix in _SIDE_SUFFIXES and file.name not in _NOT_SIDE_FILES
    return named and not file.name.lower().startswith(_LICENCES) and file.is_file()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: the file is missing") from None
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value
