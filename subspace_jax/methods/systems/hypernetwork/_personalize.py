"""Puts what a hypernetwork has written into the model: for many subjects at once, or for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, StructureError, leaves_with_paths, map_with_paths
from subspace_jax.methods.systems.hypernetwork._layout import Kernel, Layout, unflatten
from subspace_jax.weights import AdapterBank, LowRank


def personalized(params: Params, layout: Layout, output: jax.Array) -> Params:
    r"""Returns the model with the LoRAs of several subjects, for `sj.per_row`: \(x W + s\,(x A_i)\,B_i\).

    Slot 0 is the model itself, subject i of the outputs has slot \(i + 1\). Rows of a batch name their slots, so that
    several targets of a subject share its factors, and no weight is formed. Gradients reach the factors, and through
    them the hypernetwork; the model gets none.

    Args:
      params: the frozen model's.
      layout: of its kernels.
      output: \(o\), `[subjects, size]`.

    Returns:
      A tree like `params`, with an `AdapterBank` for every kernel of the layout.

    Raises:
      StructureError: the tree has no leaf of the layout's, or of another shape.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> home, params = sj.methods.hypernetwork, {"w": jnp.eye(2)}
      >>> layout = home.layout_of(params, "w", rank=1)
      >>> bank = home.personalized(params, layout, jnp.ones((3, layout.size)))
      >>> run = sj.per_row(lambda p, x: x @ p["w"])
      >>> run(bank, jnp.array([0, 3]), jnp.ones((2, 2))).round(3).tolist()
      [[1.0, 1.0], [1.1410000324249268, 1.1410000324249268]]
    """
    factors = unflatten(layout, output)
    scale = jnp.full((output.shape[0] + 1,), layout.scale, jnp.float32)

    def stand_in(kernel: Kernel, base: jax.Array) -> AdapterBank:
        axis = len(kernel.stack)
        a, b = (jnp.moveaxis(_after_base(v), 0, axis) for v in factors[kernel.path])
        fields: dict[str, Any] = {"role": kernel.role, "dtype": base.dtype, "trainable": ("a", "b")}
        return AdapterBank(base=base, a=a, b=b, scale=scale, **fields)

    return _placed(params, layout, stand_in)


def adapter_of(params: Params, layout: Layout, output: jax.Array) -> Params:
    r"""Returns the model with the LoRA of one subject, to be saved, merged (`sj.merge`) or put into a bank.

    Args:
      params: the frozen model's.
      layout: of its kernels.
      output: \(o\), `[size]`. For several references of a subject the mean of their outputs serves, or join their
        features before the hypernetwork.

    Returns:
      A tree like `params`, with a `LowRank` for every kernel of the layout.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> home, params = sj.methods.hypernetwork, {"w": jnp.eye(2)}
      >>> layout = home.layout_of(params, "w", rank=1)
      >>> sj.merge(home.adapter_of(params, layout, jnp.zeros(layout.size)))["w"].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    factors = unflatten(layout, output[None])
    scale = jnp.asarray(layout.scale, jnp.float32)

    def stand_in(kernel: Kernel, base: jax.Array) -> LowRank:
        a, b = (v[0] for v in factors[kernel.path])
        fields: dict[str, Any] = {"role": kernel.role, "dtype": base.dtype, "trainable": ("a", "b"), "method": "lora"}
        return LowRank(base=base, a=a, b=b, scale=scale, **fields)

    return _placed(params, layout, stand_in)


def _placed(params: Params, layout: Layout, stand_in: Callable[[Kernel, Any], Any]) -> Params:
    known, leaves = {kernel.path: kernel for kernel in layout.kernels}, dict(leaves_with_paths(params))
    for path, kernel in known.items():
        found = leaves.get(path)
        sizes = None if found is None else (kernel.role.stack_shape(found.shape), *kernel.role.sizes(found.shape))
        if sizes != (kernel.stack, kernel.inputs, kernel.outputs):
            raise StructureError(
                f"{path}: the layout has a kernel of {kernel.inputs} inputs and {kernel.outputs} outputs here, the "
                f"tree {'none' if found is None else tuple(found.shape)}. Make the layout from this model's parameters."
            )
    return map_with_paths(lambda path, leaf: stand_in(known[path], leaf) if path in known else leaf, params)


def _after_base(values: jax.Array) -> jax.Array:
    """Factors after those of slot 0, which are zero."""
    return jnp.concatenate([jnp.zeros_like(values[:1]), values])
