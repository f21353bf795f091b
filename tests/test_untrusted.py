"""Files that others wrote are read within bounds, and refused in a message that names them."""

import os
import socket
import time

import pytest
import yaml

from bivlm.errors import InputError
from bivlm.untrusted import (
    MATCH_SECONDS,
    MAX_DEPTH,
    MODEL_CONFIG,
    RECORD,
    SAMPLES,
    Kind,
    matching,
    open_file,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    short,
)


def loop(path):
    path.symlink_to(path.name)


def listening(path):
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


NO_FILES = {
    "missing": (lambda path: None, "the file is missing"),
    "a folder": (lambda path: path.mkdir(), "found a folder"),
    "a pipe": (os.mkfifo, "found a named pipe"),
    "a socket": (listening, "found a socket"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "found a device"),
    "a loop": (loop, "cannot be read"),
    "a link to a pipe": (lambda path: (os.mkfifo(path.with_name("p")), path.symlink_to("p")), "found a named pipe"),
}


@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_is_refused_without_waiting(what, tmp_path):
    make, message = NO_FILES[what]
    path = tmp_path / "f.json"
    make(path)
    with pytest.raises(InputError, match=rf"f\.json: .*{message}"):
        read_json(path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "f.json/below"])
def test_a_name_that_is_none_is_refused(name, tmp_path):
    (tmp_path / "f.json").write_text("{}")
    with pytest.raises(InputError):
        open_file(tmp_path / name)


def test_a_file_that_is_too_large_is_refused_with_its_size(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    assert read_bytes(tmp_path / "f", 5) == b"12345"
    with pytest.raises(InputError, match="f: 5 bytes, expected at most 4"):
        read_bytes(tmp_path / "f", 4)


NO_JSON = {
    "empty": ("", "not valid JSON"),
    "cut short": ('{"a": ', "not valid JSON"),
    "not UTF-8": (b'"\xff"', "not a UTF-8 text file"),
    "a mark of byte order": ("\ufeff{}", "not valid JSON"),
    "deep": ("[" * 100_000 + "]" * 100_000, "nested too deep"),
    "deeper than the bound": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deep"),
    "5,000 digits": ("9" * 5000, "not valid JSON"),
    "400 digits": ("9" * 400, "expected a number below 1e308"),
    "NaN": ('{"a": NaN}', "expected a finite number"),
    "infinite": ("1e999", "expected a finite number"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', "the key 'b' is given twice"),
    "half a character": (r'"\ud800"', "without lone surrogates"),
    "half a character as a key": (r'{"\udfff": 1}', "without lone surrogates"),
}


@pytest.mark.parametrize("case", NO_JSON)
def test_json_that_is_none_or_out_of_bounds_is_refused_with_its_source(case):
    data, message = NO_JSON[case]
    with pytest.raises(InputError, match=f"^the source: .*{message}"):
        parse_json(data, "the source")


def test_what_is_allowed_depends_on_who_writes_such_files():
    assert parse_json('{"a": Infinity, "b": 1, "b": 1}', "f", MODEL_CONFIG) == {"a": float("inf"), "b": 1}
    with pytest.raises(InputError, match="given twice"):
        parse_json('{"a": 1, "a": 2}', "f", MODEL_CONFIG)
    assert parse_json(r'["\ud800", NaN]', "f", SAMPLES)[0] == "\ud800"
    assert parse_json('{"n": 1000000000000000019884624838656}', "f", RECORD) == {"n": int(1e30)}
    with pytest.raises(InputError, match="f: 6 bytes, expected at most 5"):
        parse_json("[1, 2]", "f", Kind(max_bytes=5))


def bomb(levels):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for one, other in zip("abcdefghijkl"[:levels], "bcdefghijklm", strict=False):
        lines.append(f"{other}: &{other} [{', '.join([f'*{one}'] * 9)}]")
    return "\n".join(lines)


NO_YAML = {
    "a tag on other text": ("a: !!int x", "not what its tag or form says"),
    "a date that is none": ("!!timestamp 2026-99-99", "not what its tag or form says"),
    "a word as a date": ("!!timestamp x", "not what its tag or form says"),
    "a boolean that is none": ("!!bool maybe", "not what its tag or form says"),
    "bytes": ("!!binary aGk=", "of class bytes"),
    "a set": ("!!set {a}", "of class set"),
    "code": ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "a list as a key": ("? [a]\n: 1", "unhashable key"),
    "a number as a key": ("1: 2", "the key 1: expected text"),
    "itself": ("&a [*a]", "aliases written out"),
    "merged with itself": ("<<: &a\n  <<: *a", "aliases written out"),
    "aliases that grow": (bomb(11), "aliases written out"),
    "nested": ("[" * 50_000, "nested too deep"),
    "nested by aliases": ("- &a0 []\n" + "".join(f"- &a{n + 1} [*a{n}]\n" for n in range(70)), "levels"),
    "5,000 digits": ("x: " + "9" * 5000, "not what its tag or form says"),
    "20,000 bits": ("0x" + "f" * 5000, "expected a number below 1e308"),
    "not a number": ("a: .nan", "expected a finite number"),
    "half a character": (r'"\ud800"', "without lone surrogates"),
    "no character": (r'"\UFFFFFFFF"', "not what its tag or form says"),
    "two documents": ("---\n1\n---\n2", "single document"),
    "a key twice": ("a: 1\na: 1", "the key 'a' is given twice"),
    "long": ("a" * 300_000, "expected at most"),
}


@pytest.mark.parametrize("case", NO_YAML)
def test_yaml_that_is_none_or_out_of_bounds_is_refused_with_its_source(case):
    data, message = NO_YAML[case]
    began = time.monotonic()
    with pytest.raises(InputError, match=f"^the source: .*{message}"):
        parse_yaml(data, "the source")
    assert time.monotonic() - began < 10


def test_aliases_and_merges_within_bounds_are_read():
    text = "a: &a {x: 1}\nb:\n  <<: *a\n  y: 2026-01-01\nc: [*a, *a]"
    assert parse_yaml(text, "f") == {"a": {"x": 1}, "b": {"x": 1, "y": "2026-01-01"}, "c": [{"x": 1}] * 2}


def test_a_key_goes_before_the_merged_one_and_the_first_of_two_merges_before_the_second():
    text = "a: &a {x: 1, y: 1}\nb: &b {x: 2, z: 2}\nc: {<<: *a, x: 3}\nd: {<<: [*a, *b]}\ne: {y: 4, <<: *b}"
    merged = {"c": {"x": 3, "y": 1}, "d": {"x": 1, "y": 1, "z": 2}, "e": {"x": 2, "y": 4, "z": 2}}
    assert parse_yaml(text, "f") == {"a": {"x": 1, "y": 1}, "b": {"x": 2, "z": 2}} | merged
    with pytest.raises(InputError, match="'x' is given twice"):
        parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}", "f")


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "a'b", b"b", [], [1, "2"], (1,), (1, 2), {"a": {"b": [1]}}, {}])
def test_a_short_value_is_shown_as_python_does(value):
    assert short(value) == repr(value)


def test_of_a_long_value_no_more_is_built_than_is_shown():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    itself: list = []
    itself.append(itself)
    expanding = yaml.safe_load(bomb(11))  # 9^12 values as text
    for value in (deep, itself, expanding, "x" * 10**6, [0] * 10**6, {"a": "\0" * 1000}):
        assert len(short(value)) == 120 and short(value).endswith("...")
    assert short(10**5000) == "an integer of 16,610 bits"


def test_a_pattern_has_a_limit_of_time():
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(40)]
    assert matching(r".*\.\d\.self_attn.*", names, "f") == set(names[:10])
    slow = r"(?:(?=(.+)(.+)(.+)(.+)(.+))|.)*(?:\1|\2|\3|\4|\5|[a-z_.0-9])*\1{20}proj"
    for pattern in ("(a+)+$", "(.*)*x", r"(\w+\s?)+!", slow):
        began = time.process_time()
        try:
            assert matching(pattern, ["a" * 40 + "?", *names], "f") == set()
        except InputError as error:
            assert f"more than {MATCH_SECONDS} seconds" in str(error)
        assert time.process_time() - began < 2 * MATCH_SECONDS


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        ("(" * 5000, "not a regular expression"),
        ("a{99999999999}", "not a regular expression"),
        (r"\p{L}", "not a regular expression"),
        ("((a{100}){100}){100}", "counted repeats of at most 10,000"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(pattern, message):
    with pytest.raises(InputError, match=f"^f:? .*{message}"):
        matching(pattern, ["a"], "f")
