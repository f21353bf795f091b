"""Opening a Hugging Face checkpoint folder: its config, its tensors, its identity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from bivlm.checkpoint.architectures import MODULES_KEY, Modules, parse_modules
from bivlm.checkpoint.pickles import pickle_names, pickles_refused
from bivlm.checkpoint.safetensors_file import TensorEntry, digest_file, read_entries, read_tensor
from bivlm.errors import InputError
from bivlm.untrusted import MODEL_CONFIG, parse_object, read_object, short
from bivlm.workspace.hashing import file_digest

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# With peft installed transformers loads the base model that this names, and the adapter over it; without, neither.
ADAPTER = "adapter_config.json"
REPORT = "compression_report.json"
LINEAGE = "lineage.json"
QUANT_METHOD = "bivlm"
FORMAT = 1  # of the packed checkpoint
TABLES_KEY = "tables"  # in the quantization config: which packed weights are the embedding of tokens and the head

SHARDS_AT_ONCE = min(4, os.cpu_count() or 1)

# Files that a model needs beside its weights: configs, tokenizer, processor, chat template.
_SIDE_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe"}
TEMPLATES = "additional_chat_templates"
# Where a checkpoint names classes of its own, in files that lie beside these.
_CODE_CONFIGS = (
    CONFIG,
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
GENERATE = "custom_generate"  # whose generate.py takes the place of a trusted model's own
_SUFFIX_IN = {TEMPLATES: ".jinja", GENERATE: ".py"}  # of what is read in the folders of a checkpoint
_NOT_SIDE_FILES = {CONFIG, WEIGHTS_INDEX, REPORT, LINEAGE, "pytorch_model.bin.index.json", "trainer_state.json"}
_LICENCES = ("license", "licence", "notice", "use_policy")


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
        index names a file outside the folder or one is a link that leads out of it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"checkpoint {folder}: no such folder")
        refuse_links_out_of([folder / CONFIG, folder / WEIGHTS, folder / WEIGHTS_INDEX], folder)
        if (folder / ADAPTER).exists():
            raise InputError(
                f"checkpoint {folder}: has an adapter ({ADAPTER}), which is no part of its weights; merge it into "
                "them, or move it elsewhere"
            )
        config = read_config(folder / CONFIG)
        files = _weight_files(folder)
        refuse_links_out_of(files, folder)
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for entry in read_entries(file):
                if entry.name in entries:
                    raise InputError(f"tensor {entry.name} is both in {entries[entry.name].file} and in {file}")
                entries[entry.name] = entry
        for name, shard in _indexed_tensors(folder):
            if name not in entries:
                raise InputError(f"{folder / WEIGHTS_INDEX} says that tensor {name} is in {shard}; it is not there")
        carried = _carried_modules(config, folder / CONFIG)
        checkpoint = cls(folder, config, dict(sorted(entries.items())), modules or carried)
        refuse_links_out_of([*checkpoint.side_files, *checkpoint.licence_files], folder)
        return checkpoint

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
        config, tables = self.folder / CONFIG, quantization.get(TABLES_KEY, [])
        if not isinstance(tables, list) or not all(isinstance(name, str) for name in tables):
            raise InputError(f"{config}: quantization_config: {TABLES_KEY}: expected names, found {short(tables)}")
        return check_quantization(quantization.get("format"), quantization.get("packed"), config)

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, by name."""
        return sorted({entry.file for entry in self.entries.values()})

    @cached_property
    def side_files(self) -> list[Path]:
        """What is read beside config and weights: tokenizer, processor, chat templates, generation config, own code."""
        templates = (self.folder / TEMPLATES).glob(f"*{_SUFFIX_IN[TEMPLATES]}")
        files = [file for file in self.folder.iterdir() if is_side_name(file.name)]
        code = [*self.folder.glob("*.py"), *(self.folder / GENERATE).glob("*.py")] if names_code(self.folder) else ()
        return sorted(file for file in (*files, *templates, *code) if file.is_file())

    @cached_property
    def licence_files(self) -> list[Path]:
        """Licences and notices, which have to travel with the weights."""
        return sorted(file for file in self.folder.iterdir() if file.is_file() and is_licence_name(file.name))

    def read(self, disk_name: str, sha256: str | None = None) -> torch.Tensor:
        """Return the tensor called `disk_name`; raises `InputError` if there is none, or it is not of `sha256`."""
        try:
            entry = self.entries[disk_name]
        except KeyError:
            raise InputError(f"checkpoint {self.folder}: no tensor {disk_name}") from None
        return read_tensor(entry, sha256)

    def digests(self) -> Digests:
        """Return sha256 of the checkpoint's files and tensors; every file is streamed once, shards side by side."""
        files = {CONFIG: file_digest(self.folder / CONFIG)}
        files |= {self._name(file): file_digest(file) for file in self.side_files}
        tensors: dict[str, str] = {}
        inside: dict[Path, list[TensorEntry]] = {file: [] for file in self.weight_files}
        for entry in self.entries.values():
            inside[entry.file].append(entry)
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as threads:  # hashing leaves other threads their turn
            digests = threads.map(digest_file, inside, inside.values())
            for file, (of_file, of_tensors) in zip(inside, digests, strict=True):
                files[self._name(file)] = of_file
                tensors |= of_tensors
        return Digests(dict(sorted(files.items())), tensors)

    def digest(self) -> str:
        """Return sha256 of what the checkpoint is, wherever it lies: see `Digests`."""
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
    """Return one sha256 over names and sha256 of files."""
    total = hashlib.sha256(b"bivlm checkpoint 1\n")
    for name, sha256 in sorted(digests.items()):
        total.update(f"{sha256} {name}\n".encode())
    return total.hexdigest()


def check_quantization(format: Any, packed: Any, source: str | Path) -> dict[str, int]:
    """Return `packed`, lengths by linear; raises `InputError` naming `source` for an unknown format or bad lengths."""
    if format != FORMAT:
        found = short(format)
        raise InputError(f"{source}: quantization_config: format {found}, this code reads {FORMAT}; update bivlm")
    if not isinstance(packed, dict) or not all(type(length) is int and length > 0 for length in packed.values()):
        found = short(packed)
        raise InputError(f"{source}: quantization_config: packed: expected a byte length by linear, found {found}")
    return packed


def is_side_name(name: str) -> bool:
    """Return whether a file of this name in a checkpoint's folder is read beside config and weights."""
    return Path(name).suffix in _SIDE_SUFFIXES and name not in _NOT_SIDE_FILES and not is_licence_name(name)


def is_part_name(name: str) -> bool:
    """Return whether a file of this name, with forward slashes, in a checkpoint's folder is read or a licence."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder in _SUFFIX_IN and file.endswith(_SUFFIX_IN[folder])
    known = name in (CONFIG, WEIGHTS_INDEX) or name.endswith((".safetensors", ".py"))
    return known or is_side_name(name) or is_licence_name(name)


def is_licence_name(name: str) -> bool:
    """Return whether a file of this name in a checkpoint's folder is a licence or a notice."""
    return name.lower().startswith(_LICENCES)


def names_code(folder: Path) -> bool:
    """Return whether transformers would run code from `folder` if it were trusted: `code_maps`, or ``generate``."""
    return next(code_maps(folder), None) is not None or (folder / GENERATE / "generate.py").is_file()


def code_maps(folder: Path) -> Iterator[Any]:
    """Yield every ``auto_map`` in a config in `folder`; raises `InputError` naming a config that cannot be read."""
    for name in _CODE_CONFIGS:
        if (folder / name).exists():
            refuse_links_out_of([folder / name], folder)
            yield from auto_maps(read_object(folder / name, MODEL_CONFIG))


def auto_maps(value: Any) -> Iterator[Any]:
    """Yield what every ``auto_map`` in a parsed config says, however deep it is; null counts as an empty one."""
    if isinstance(value, dict):
        if "auto_map" in value:
            yield value["auto_map"] or {}
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from auto_maps(part)


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
        pickles = pickle_names(file.name for file in folder.iterdir())
        if pickles:
            raise pickles_refused(f"checkpoint {folder}", str(folder), pickles)
        raise InputError(f"checkpoint {folder}: neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    return sorted({folder / file for _, file in _indexed_tensors(folder)})


def weights_of_index(folder: Path) -> list[str]:
    """Return the weight files that the index in `folder` names, sorted; raises `InputError` as `Checkpoint.open`."""
    return sorted({file for _, file in _indexed_tensors(folder)})


def _indexed_tensors(folder: Path) -> list[tuple[str, str]]:
    """Return (tensor, file) pairs of the index of shards, checked; empty where a single file holds the weights."""
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return []
    refuse_links_out_of([index], folder)
    return list(_weight_map(read_object(index, MODEL_CONFIG), index).items())


def indexed_files(data: bytes, source: str) -> list[str]:
    """Return the weight files that an index of shards names, sorted; raises `InputError` naming `source`."""
    return sorted(set(_weight_map(parse_object(data, source, MODEL_CONFIG), source).values()))


def _weight_map(index: dict[str, Any], source: Path | str) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{source}: expected a mapping 'weight_map' from tensors to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_inside(file):
            found = short(file)
            raise InputError(f"{source}: tensor {name} is said to be in {found}, which is not a file of this folder")
    return weight_map


def is_inside(file: str) -> bool:
    """Return whether a name from a record is that of a file in the record's own folder or below it."""
    # Judged by the text: in the hub's cache the files themselves are links to a folder beside this one.
    path = PurePosixPath(file)
    drive = PureWindowsPath(file).drive
    return (
        bool(path.parts)
        and file.isprintable()
        and not path.is_absolute()
        and not drive
        and ".." not in path.parts
        and "\\" not in file
    )


def refuse_links_out_of(files: Iterable[Path], folder: Path) -> None:
    """Raise `InputError` naming one of `files` that is a link out of `folder`, or is there and no file (a pipe, say).

    What lies in the folder is copied, and goes into registries and to hubs: nothing else of this machine may. In the
    hub's cache a snapshot's files are links to the blobs of their repository.
    """
    place = folder.resolve()
    allowed = [place]
    if place.parent.name == "snapshots":
        allowed.append((place.parent.parent / "blobs").resolve())
    for file in files:
        try:
            target = file.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is none
            raise InputError(f"{file}: cannot be read ({error})") from None
        if not any(target.is_relative_to(each) for each in allowed):
            raise InputError(f"{file}: a link to {target}, outside the folder; copy the file into it")
        if target.exists() and not target.is_file():
            raise InputError(f"{file}: expected a file, found something else")


def read_config(file: Path) -> dict[str, Any]:
    """Return what config.json says, with what is read of it here checked; the model's own class checks the rest."""
    config = read_object(file, MODEL_CONFIG)
    for key, kind, valid in (("model_type", str, "text"), ("quantization_config", dict, "an object")):
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise InputError(f"{file}: {key}: expected {valid}, found {short(config[key])}")
    if "configuration_files" in config:
        raise InputError(
            f"{file}: configuration_files: transformers would read another config than this one; expected no such key"
        )
    return config
