import dataclasses
import math
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest

from subspace_jax.core import Role
from subspace_jax.io import ManifestError
from subspace_jax.io._static import decode, dtype_from_name, encode


@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...]
    role: Role
    name: str = "x"


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (None, int | None),
        (True, bool),
        (3, int),
        (10**30, int),
        (0.1, float),
        (-0.0, float),
        (math.inf, float),
        (-math.inf, float),
        ("ü/\n", str),
        ((1, (2.5, "x"), None), Any),
        ((1, 2), tuple[int, ...]),
        (np.dtype(ml_dtypes.bfloat16), np.dtype),
        (np.dtype("int64"), np.dtype),
        (Role.conv(5, groups=2, stack_axes=(0,)), Role),
        (Inner((1, 2), Role.embedding()), Inner | None),
    ],
)
def test_round_trip_through_json(value, hint):
    import json

    text = json.dumps(encode(value, "x"), allow_nan=False)
    back = decode(json.loads(text), hint, "x")
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_nan_round_trip():
    assert math.isnan(decode(encode(math.nan, "x"), float, "x"))


@pytest.mark.parametrize("value", [np.zeros(2), [1], {"a": 1}, object(), Role, np.float32, {1}, 1j, b"x"])
def test_encode_refuses_by_name(value):
    with pytest.raises(ManifestError, match=r"kernel\.scale"):
        encode(value, "kernel.scale")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("1.0", float),
        (True, int),
        (True, float),
        (1.5, int),
        ("a", Literal["b", "c"]),
        ({"tuple": [1, "a"]}, tuple[int, ...]),
        ({"tuple": [1]}, tuple[int, int]),
        (3, tuple[int, ...]),
        ({"dtype": "O"}, np.dtype),
        ({"dtype": "float32", "more": 1}, np.dtype),
        ({"dataclass": "Role", "fields": {"kind": "nonsense"}}, Role),
        ({"dataclass": "Role", "fields": {"kind": "dense", "in_axes": 3}}, Role),
        ({"dataclass": "Role", "fields": {"kind": "dense", "gruops": 3}}, Role),
        ({"dataclass": "Role", "fields": {}}, Role),
        ({"dataclass": "Inner", "fields": {}}, Role),
        ({"dataclass": "Role", "fields": {"kind": "dense"}}, Any),
        ({"float": "1.0"}, float),
        ([1], Any),
        ({}, Any),
    ],
)
def test_decode_refuses_what_does_not_fit(value, hint):
    with pytest.raises(ManifestError, match=r"kernel\.x"):
        decode(value, hint, "kernel.x")


@pytest.mark.parametrize("name", ["object", "O", "S1000000000", "f4,f4", "U3", "datetime64", "f4", ">f4", "nope", ""])
def test_only_dtypes_of_numbers(name):
    with pytest.raises(ManifestError, match="dtype of numbers"):
        dtype_from_name(name, "x")
