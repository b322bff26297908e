"""Lets `jax.export` serialize functions that take or return adapted trees."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from typing import Any

import jax.export

from subspace_jax.core import Full, Weight, structure_names, structure_of
from subspace_jax.io._manifest import static_names
from subspace_jax.io._static import decode_fields, encode


def register_for_export(cls: type[Weight]) -> None:
    """Registers a class of stand-in weights with `jax.export`, so that exported functions of adapted trees serialize.

    The library's own classes are registered already; call it for one of yours.

    Args:
      cls: a class with the decorator `register_weight`.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((4, 3))}, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> run = jax.jit(sj.with_adapters(lambda p, x: x @ p["w"]))
      >>> data = jax.export.export(run)(adapted, jnp.ones((2, 4))).serialize()
      >>> jax.export.deserialize(data).call(adapted, jnp.ones((2, 4))).shape
      (2, 3)
    """
    statics, remarks = structure_names(cls)

    def serialize(structure: Any) -> bytes:
        fields = dict(zip(statics, structure[0], strict=True)) | dict(zip(remarks, structure[1], strict=True))
        return json.dumps({n: encode(v, f"{cls.__name__}.{n}") for n, v in fields.items()}).encode()

    def deserialize(data: bytes) -> Any:
        found = decode_fields(cls, static_names(cls), json.loads(data), cls.__name__)
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        return structure_of(cls, {n: found.get(n, defaults[n]) for n in (*statics, *remarks)})

    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"subspace_jax.{cls.__name__}",
        serialize_auxdata=serialize,
        deserialize_auxdata=deserialize,
    )


@functools.cache  # a class registers once
def register_library_for_export() -> None:
    """Registers the library's weight classes with `jax.export`; importing the library has done it."""
    for cls in Weight.classes.values():
        ours = cls.__module__.startswith("subspace_jax.") and ".core." not in cls.__module__
        if cls is Full or (ours and not inspect.isabstract(cls)):
            register_for_export(cls)
