"""A new benchmark is one file: it registers by being there."""

import textwrap

import pytest

import bivlm.evaluation
from bivlm.errors import InputError
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.outcomes import evaluate

FILE = """
from PIL import Image

from bivlm.evaluation.benchmark import Benchmark
from bivlm.sources.samples import VqaSample


class Echo(Benchmark):
    kind, argument, version = "echo", "WORD", 1
    max_new_tokens = 2

    def __init__(self, word, limit):
        self.name, self.limit = word, limit

    @classmethod
    def load(cls, argument, limit):
        return cls(argument, limit)

    @property
    def task(self):
        return f"echo:{self.name}"

    def __len__(self):
        return 1

    def __iter__(self):
        yield VqaSample("1", "1", Image.new("RGB", (4, 4)), f"Say {self.name}.", (self.name,))

    def score(self, sample, prediction):
        return float(prediction == self.name)
"""


@pytest.fixture
def one_more_file(tmp_path, monkeypatch):
    (tmp_path / "echo_word.py").write_text(textwrap.dedent(FILE))
    monkeypatch.setattr(bivlm.evaluation, "__path__", [*bivlm.evaluation.__path__, str(tmp_path)])


def test_a_file_in_the_room_is_all_that_a_benchmark_needs(one_more_file, loaded):
    benchmark = load_benchmark("echo:hello")
    assert evaluate(*loaded, benchmark).n == 1
    with pytest.raises(InputError, match="valid: echo:WORD, mme:"):
        load_benchmark("unheard-of:x")


@pytest.mark.parametrize("task", ["mme", "reference", "reference:", ":open", "", "Reference:open"])
def test_unknown_tasks_are_refused_with_the_valid_forms(task):
    with pytest.raises(InputError, match=r"reference:perception\|cognition\|choice\|open, .*vqa:FOLDER"):
        load_benchmark(task)


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(InputError, match=f"limit of reference:open: found {limit}, expected 1"):
        load_benchmark("reference:open", limit)
