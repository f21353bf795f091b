"""Native code is taken where it is this version's, and its absence is said."""

import itertools

import numpy as np
import pytest

from bivlm import kernels
from bivlm.numerics import trellis

needs_native = pytest.mark.skipif(kernels.native() is None, reason="the native code was not built")


@needs_native
def test_native_code_of_another_interface_is_left_out(monkeypatch):
    monkeypatch.setattr(kernels, "_INTERFACE", 99)
    with pytest.warns(
        UserWarning, match=r"_native.*expected native code with interface 99, found \d+; .*Install again"
    ):
        assert kernels.native.__wrapped__() is None


@needs_native
def test_a_file_that_is_no_library_is_left_out(monkeypatch, tmp_path):
    (tmp_path / "other.so").write_text("no library")
    monkeypatch.setattr(
        kernels.importlib.util, "find_spec", lambda _: type("Spec", (), {"origin": str(tmp_path / "other.so")})
    )
    with pytest.warns(UserWarning, match=r"other\.so: expected native code"):
        assert kernels.native.__wrapped__() is None


def test_the_switch_leaves_it_out_in_silence(monkeypatch, recwarn):
    monkeypatch.setenv("BIVLM_NATIVE", "0")
    assert kernels.native.__wrapped__() is None
    assert not recwarn.list


def test_a_search_without_it_warns_of_its_time(monkeypatch):
    monkeypatch.setattr(kernels, "native", lambda: None)
    monkeypatch.delenv("BIVLM_NATIVE", raising=False)
    trellis.warn_of_time.cache_clear()
    code = trellis.trellis_code(12, 2.0)
    with pytest.warns(UserWarning, match="without native code the trellis is searched .* times as slowly"):
        trellis.search(np.zeros((1, 64), np.float32), code, trellis.levels_of(code.magnitudes))


@pytest.mark.parametrize("team", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_parts_are_done_once_and_told_in_their_order(monkeypatch, team, threads):
    if not team:
        monkeypatch.setattr(kernels, "_team", lambda: None)
    done = []

    def work(one, other):
        done.append(one)
        return one * other

    assert kernels.in_threads(work, range(7), range(7), threads=threads) == [n * n for n in range(7)]
    assert sorted(done) == list(range(7))
    cuts = kernels.in_parts(lambda begin, end: (begin, end), 1001, 1 << 30, threads)
    assert cuts[0][0] == 0 and cuts[-1][1] == 1001 and len(cuts) <= threads
    assert all(one[1] == other[0] and one[1] % 4 == 0 for one, other in itertools.pairwise(cuts))
    assert kernels.in_parts(work, 0, 0, threads) == []


@pytest.mark.parametrize("team", [True, False])
def test_what_a_part_raises_is_raised(monkeypatch, team):
    if not team:
        monkeypatch.setattr(kernels, "_team", lambda: None)

    def work(number):
        if number == 3:
            raise MemoryError("of part 3")
        return number

    with pytest.raises(MemoryError, match="of part 3"):
        kernels.in_threads(work, range(6), threads=2)
