"""Checkpoint folders and recipes that nobody means to write, made from good ones by a seed."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bivlm.errors import InputError

SECONDS = 10  # of a core for one case
_WAITING = 60  # seconds until a case that does nothing at all is ended
_LONGEST_MESSAGE = 4000

# What JSON itself cannot be made of in Python, by what stands for it until the text is written.
_RAW = {
    "@digits@": "9" * 5000,
    "@deep@": "[" * 3000 + "]" * 3000,
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
    "@half@": r'"\ud800"',
    "@huge@": "1" + "0" * 400,
}
_VALUES: tuple[Any, ...] = (
    *_RAW,
    *(None, True, False, 0, 1, -1, -7, 2, 3, 64, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, -0.0),
    *("", "x", "1", "../../etc", "/", "a/b", "llava", "clip", "none", "é", "x" * 5000),
    *([], [1], [[]], [None], ["x", "x"], [1, 2, 3, 4, 5, 6, 7, 8], list(range(500)), {}, {"a": 1}, {"": {}}),
    *({"auto_map": {"AutoConfig": "a.B"}}, {"quant_method": "bivlm"}, {"model_type": "llava"}),
)


def changed(value: Any, rng: random.Random) -> Any:
    """A copy with something in it replaced, left out, doubled, renamed or moved."""
    value = copy.deepcopy(value)
    levels = _holders(value)
    if not levels:
        return rng.choice(_VALUES)
    holders = rng.choice(levels)  # most of a large record is deep inside of it
    holder = rng.choice(holders)
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    action = rng.randrange(6)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "auto_map", "format", "sha256", f"{key}s", key.upper()])] = holder.pop(key)
    elif action == 2:
        other = rng.choice(holders)
        holder[key] = copy.deepcopy(other)
    elif action == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        number = holder[key]
        others = (-number, number + 1, number * 2, number * 10**6, str(number), float(number), 0, [number])
        holder[key] = rng.choice(others)
    else:
        holder[key] = rng.choice(_VALUES)
    return value


def _holders(value: Any) -> list[list[Any]]:
    """The lists and mappings in a value that are not empty, level by level."""
    levels, level = [], [value]
    while level:
        holders = [each for each in level if isinstance(each, dict | list) and each]
        levels += [holders] if holders else []
        level = [part for each in holders for part in (each.values() if isinstance(each, dict) else each)]
    return levels


def json_text(value: Any, rng: random.Random) -> str:
    """JSON with what `changed` could only hint at; now and then a key stands in it twice."""
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = '{"model_type": "clip", "format": 7,' + text[1:]
    return text


def strange_folder(good: Path, folder: Path, outside: Path, rng: random.Random) -> Path:
    """A copy of the checkpoint in `good` with one to three things wrong; links that leave it lead to `outside`."""
    shutil.copytree(good, folder)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
        file = rng.choice(files)
        rng.choices((_other_values, _other_bytes, _no_file), (8, 1, 2))[0](file, outside, rng)
    return folder


def _other_values(file: Path, _outside: Path, rng: random.Random) -> None:
    if not file.is_file() or file.suffix == ".jinja":
        return
    data = file.read_bytes()
    length = 0
    if file.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        data, rest = data[8 : 8 + length], data[8 + length :]
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # by an earlier change
        return
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = changed(value, rng)
    text = json_text(value, rng).encode("utf-8", "surrogatepass")
    if file.suffix == ".safetensors":
        text = len(text).to_bytes(8, "little") + text + rest
    file.write_bytes(text)


def _other_bytes(file: Path, _outside: Path, rng: random.Random) -> None:
    if not file.is_file():
        return
    data = bytearray(file.read_bytes())
    begin = rng.randrange(min(len(data), 2000) + 1)
    action = rng.randrange(4)
    if action == 0:
        del data[begin:]
    elif action == 1:
        data[begin:begin] = rng.randbytes(rng.randrange(1, 9))
    elif action == 2:
        data[:0] = b"\xef\xbb\xbf"
    else:
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(min(len(data), 2000)) if data else 0 : 1] = b""
    file.write_bytes(data)


def _no_file(file: Path, outside: Path, rng: random.Random) -> None:
    content = outside / file.name
    if file.is_file():
        shutil.copyfile(file, content)
    if file.is_dir() and not file.is_symlink():
        return
    file.unlink()
    targets = (content, file.name, "nowhere", "/dev/zero", "/dev/stdin", "/", outside, "config.json")
    makers: list[Callable[[], Any]] = [file.mkdir, lambda: os.mkfifo(file), file.touch, lambda: None]
    makers += [lambda target=target: file.symlink_to(target) for target in targets]
    rng.choice(makers)()


def strange_recipe(good: dict[str, Any], rng: random.Random) -> bytes:
    """The text of a recipe with something wrong in its values or in its text."""
    value = good
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = changed(value, rng)
    text = json_text(value, rng) if rng.random() < 0.2 else yaml.safe_dump(value, sort_keys=False)
    for mark, raw in _RAW.items():
        text = text.replace(f"'{mark}'", raw)
    if rng.random() < 0.25:
        begin = rng.randrange(len(text) + 1)
        end = begin + rng.choice((0, 0, 1, 5, 50))
        text = text[:begin] + rng.choice(_YAML) + text[end:]
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data) + 1)] + rng.randbytes(rng.randrange(4))
    return data


_YAML = (
    *("!!int x", "!!timestamp 2026-99-99", "!!timestamp x", "!!bool x", "!!float x", "!!binary x", "!!set {a}", "!x y"),
    *("!!python/object/apply:os.system [x]", "&a [*a]", "*a", "&a ", "<<: *a", "<<: {a: 1}", "? [a]\n: 1\n", "[" * 500),
    *("{" * 500, "- " * 500, "\t", "\0", "\n---\n", "...\n", "'", '"\\ud800"', "0x" + "f" * 5000, "1" + ":1" * 500),
    *(".nan", "-.inf", "~", ": ", "#", "|\n", ">\n", "%YAML 1.2\n", "1: 2\n", "@", "`", "é", "\x85", "\ufeff"),
    "keep: ['re:(a|aa)+[.]x?b']\n",
    "keep: ['re:(.+)(.+)(.+)(.+)\\4\\3\\2\\1x?z']\n",
    "keep: ['re:((a{90}){90}){90}']\n",
    "keep: ['re:" + "(" * 300 + "']\n",
    "b: &b [&a [1, 1, 1, 1, 1, 1, 1, 1, 1], " + ", ".join(["*a"] * 99) + "]\nc: [" + ", ".join(["*b"] * 99) + "]\n",
)


class Tally:
    """What came of a number of cases: done or refused, and everything that must not be."""

    def __init__(self) -> None:
        self.came = Counter()
        self.wrong: dict[str, list[str]] = {}
        self.longest = 0.0

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        began = time.process_time()
        before = signal.signal(signal.SIGALRM, _ended)
        signal.alarm(_WAITING)
        try:
            yield
            self.came["done"] += 1
        except InputError as error:
            self.came["refused"] += 1
            if len(str(error)) > _LONGEST_MESSAGE:
                self.note("a message of more than 4,000 characters", f"{name}: {str(error)[:200]}")
        except _Ended:
            self.note("hangs", f"{name}: {traceback.format_exc(limit=-4)}")
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/bivlm/" in frame.filename]
            where = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else ""
            self.note("tracebacks", f"{name}: {type(error).__name__} at {place.name}, {where}: {str(error)[:200]}")
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            took = time.process_time() - began
            self.longest = max(self.longest, took)
            if took > SECONDS:
                self.note(f"more than {SECONDS} seconds", f"{name}: {took:.1f}")

    def note(self, kind: str, what: str) -> None:
        self.wrong.setdefault(kind, []).append(what)

    def report(self, what: str) -> None:
        """Print the counts; fails if anything was wrong."""
        counts = [f"{len(self.wrong.get(kind, []))} {kind}" for kind in ("tracebacks", "hangs", "links followed")]
        print(f"\n{what}: {self.came['done']} done, {self.came['refused']} refused; {', '.join(counts)};", end=" ")
        print(f"the longest took {self.longest:.1f} s of a core")
        assert not self.wrong, "\n".join(f"{kind}: {each}" for kind, found in self.wrong.items() for each in found[:40])


class _Ended(BaseException):
    pass


def _ended(*_: object) -> None:
    raise _Ended
