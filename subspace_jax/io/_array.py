"""Describes one array in a file, and converts arrays to and from the form in which a file stores them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from subspace_jax.io._errors import ManifestError
from subspace_jax.io._static import dtype_from_name, dtype_name

# TensorStore and safetensors know no integers below a byte (TensorStore has int4 alone).
_WIDENED = {"int2": "int8", "uint2": "uint8", "int4": "int8", "uint4": "uint8"}


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape, dtype and kind of an array, without its values.

    Attributes:
      shape: its shape; of a typed random key, that of the key's data.
      dtype: its dtype, in the same sense.
      kind: "jax", or "numpy" for an array and "scalar" for a scalar of NumPy.
      weak: whether JAX treats its dtype as weak in promotions. A run resumes bit-identically only if that is kept.
      key: name of the generator of a typed random key; empty for other arrays.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    kind: Literal["jax", "numpy", "scalar"] = "jax"
    weak: bool = False
    key: str = ""

    def __str__(self) -> str:
        what = f"key of {self.key}, " if self.key else ""
        return f"{what}{self.dtype.name}{list(self.shape)}"

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype that the array has in a file."""
        return np.dtype(_WIDENED.get(self.dtype.name, self.dtype))

    def to_json(self) -> dict[str, Any]:
        """Returns the spec as JSON."""
        out: dict[str, Any] = {"shape": list(self.shape), "dtype": self.dtype.name}
        defaults = {"kind": "jax", "weak": False, "key": ""}
        return out | {n: getattr(self, n) for n, usual in defaults.items() if getattr(self, n) != usual}

    @classmethod
    def from_json(cls, value: Any, where: str) -> ArraySpec:
        """Returns the spec of some JSON; raises ManifestError where it is of another form."""
        match value:
            case {"shape": list() as shape, "dtype": str() as name, **rest} if not set(rest) - {
                "kind",
                "weak",
                "key",
            }:
                sizes = all(type(n) is int and 0 <= n < 2**62 for n in shape) and len(shape) <= 32
                kinds = rest.get("kind", "jax") in ("jax", "numpy", "scalar")
                if sizes and kinds and type(rest.get("weak", False)) is bool and type(rest.get("key", "")) is str:
                    return cls(tuple(shape), dtype_from_name(name, where), **rest)
        raise ManifestError(f"{where}: {str(value)[:80]!r} does not describe an array.")

    def abstract(self, where: str) -> jax.ShapeDtypeStruct:
        """Returns the array without its numbers."""
        data = jax.ShapeDtypeStruct(self.shape, self.dtype, weak_type=self.weak)
        return jax.eval_shape(lambda x: _wrap(x, self.key, where), data) if self.key else data


def array_spec(value: Any, where: str) -> ArraySpec:
    """Returns the spec of an array, abstract or not.

    Raises:
      ManifestError: the value is a tracer, a deleted array, or of a dtype that no file holds.
    """
    if isinstance(value, Tracer):
        raise ManifestError(f"{where}: is traced, so it has no numbers to save. Save outside jit, grad and vmap.")
    if isinstance(value, jax.Array) and value.is_deleted():
        raise ManifestError(f"{where}: the array was donated or deleted. Save what the step returned, not its input.")
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data, name = _key_data(value, where)
        return ArraySpec(data.shape, np.dtype(data.dtype), key=name)
    dtype = dtype_from_name(dtype_name(value.dtype, where), where)
    kind = "scalar" if isinstance(value, np.generic) else "numpy" if isinstance(value, np.ndarray) else "jax"
    return ArraySpec(tuple(value.shape), dtype, kind, bool(getattr(value, "weak_type", False)))


def _key_data(value: Any, where: str) -> tuple[jax.ShapeDtypeStruct, str]:
    """The data of a random key without their numbers, and the name of its generator."""
    names: list[Any] = []

    def data(key: jax.Array) -> jax.Array:
        names.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    abstract = jax.eval_shape(data, value)
    if not isinstance(names[0], str):
        raise ManifestError(f"{where}: keys of the unregistered generator {names[0]} cannot be saved.")
    return abstract, names[0]


def _wrap(data: Any, key: str, where: str) -> Any:
    try:
        return jax.random.wrap_key_data(data, impl=key)
    except (TypeError, ValueError) as error:
        raise ManifestError(f"{where}: is not a key of the random generator {key[:40]!r}: {error}") from error


def to_stored(value: Any, spec: ArraySpec) -> Any:
    """Returns the array as it goes into a file: of plain numbers, of at least a byte each."""
    data = jax.random.key_data(value) if spec.key else value
    if spec.kind == "scalar":
        data = np.asarray(data)
    return data if spec.stored_dtype == spec.dtype else data.astype(spec.stored_dtype)


def from_stored(data: Any, spec: ArraySpec, where: str) -> Any:
    """Returns the array that `to_stored` was given.

    Args:
      data: an array of NumPy, or one of JAX that is already placed.
      spec: what was saved.
      where: what to call it in errors.

    Raises:
      ManifestError: this process cannot hold the dtype, or the data are not a random key.
    """
    check_representable(spec, where)
    if spec.stored_dtype != spec.dtype:
        data = data.astype(spec.dtype)
    if spec.kind != "jax":
        array = np.asarray(data)
        return array[()] if spec.kind == "scalar" else array
    array = data if isinstance(data, jax.Array) else jnp.array(data)
    if spec.weak:
        array = _as_weak(array)
    return _wrap(array, spec.key, where) if spec.key else array


def check_representable(spec: ArraySpec, where: str) -> None:
    """Raises ManifestError for an array of 64 bits in a process where JAX would cut it to 32."""
    if spec.kind == "jax" and jax.dtypes.canonicalize_dtype(spec.dtype) != spec.dtype:
        raise ManifestError(
            f"{where}: was saved as {spec.dtype.name}, which JAX cuts to 32 bits here. Set "
            'jax.config.update("jax_enable_x64", True) before loading.'
        )


def _as_weak(array: jax.Array) -> jax.Array:
    """The same numbers with a weak dtype: an update in place keeps the type of what is updated."""
    zero = {"c": 0j, "f": 0.0}.get(array.dtype.kind, 0)
    weak = jnp.broadcast_to(jnp.asarray(zero), array.shape).at[...].set(array)
    return jax.device_put(weak, array.sharding) if array.committed else weak


def empty(spec: ArraySpec, where: str) -> np.ndarray:
    """Returns the array of a spec without entries."""
    try:
        return np.zeros(spec.shape, spec.stored_dtype)
    except ValueError as error:
        raise ManifestError(f"{where}: {spec} is not the shape of an array: {error}.") from error


def has_entries(spec: ArraySpec) -> bool:
    """Tells whether there is anything to store; TensorStore takes no arrays without entries."""
    return math.prod(spec.shape) > 0


def on_host(value: Any, where: str) -> np.ndarray:
    """Returns the bytes of an array as NumPy, contiguous; of one that every host holds whole, this host's.

    Raises:
      ManifestError: parts of the array lie on other hosts.
    """
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        raise ManifestError(
            f"{where}: is spread over several hosts, so this one cannot read it whole. Use save_checkpoint without "
            "base=, which every host takes part in."
        )
    return np.asarray(value, order="C")
