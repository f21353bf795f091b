import pytest
from hypothesis import given
from hypothesis import strategies as st

from bivlm.errors import InputError
from bivlm.workspace.hashing import canonical_json, digest, file_digest, step_identity

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)


def reversed_keys(value):
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(list(value))}
    if isinstance(value, list):
        return [reversed_keys(item) for item in value]
    return value


@given(values)
def test_the_order_of_keys_does_not_matter(value):
    assert digest(value) == digest(reversed_keys(value))


@given(values, values)
def test_different_values_have_different_digests(one, other):
    # repr tells 1, 1.0 and True apart, and 0.0 from -0.0; keys are compared in sorted order.
    same = canonical_repr(one) == canonical_repr(other)
    assert (digest(one) == digest(other)) == same


def canonical_repr(value):
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{canonical_repr(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical_repr, value)) + "]"
    return repr(value)


def test_digests_stay_what_they_were():
    # Computed with `printf '%s' '{"a":[1,1.5,null,true],"b":"ü"}' | sha256sum`.
    expected = "8a8f621e1545b46868ae47b37046207dfae7ff9152b0ea0d9799232d03ec8a9f"
    value = {"b": "ü", "a": (1, 1.5, None, True)}
    assert canonical_json(value) == '{"a":[1,1.5,null,true],"b":"ü"}'.encode()
    assert digest(value) == expected


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, float("nan")]}, r"\$\.a\[1\]: nan"),
        ({"a": float("inf")}, r"\$\.a: inf"),
        ({"a": {1, 2}}, r"\$\.a: a value of class set"),
        ([{1: "x"}], r"\$\[0\]: key 1 is of class int"),
        ({"a": b"bytes"}, r"\$\.a: a value of class bytes"),
        (object(), r"\$: a value of class object"),
        ("\ud800", r"\$: .* is not valid Unicode"),
    ],
)
def test_values_without_a_stable_form_are_refused_with_their_place(value, place):
    with pytest.raises(InputError, match=place):
        digest(value)


def test_file_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


KEY = {"stage": "plan", "version": 1, "inputs": {"weight": "ab"}, "recipe_part": {"groups": 2}}


@pytest.mark.parametrize(
    "change",
    [{"stage": "pack"}, {"version": 2}, {"inputs": {"weight": "cd"}}, {"recipe_part": {"groups": 3}}],
    ids=lambda change: next(iter(change)),
)
def test_a_step_is_another_one_with_every_part_of_the_step(change):
    assert step_identity(**KEY, exact=True) != step_identity(**(KEY | change), exact=True)


def test_only_a_step_that_is_not_exact_depends_on_the_device():
    assert step_identity(**KEY, exact=True, device="cpu") == step_identity(**KEY, exact=True, device="cuda")
    assert step_identity(**KEY, exact=False, device="cpu") != step_identity(**KEY, exact=False, device="cuda")
