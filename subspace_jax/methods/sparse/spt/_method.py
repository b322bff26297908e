"""`spt`: puts modules and trained entries where an allocation says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import (
    Full,
    InitFn,
    Method,
    PatternError,
    Role,
    StructureError,
    check_probability,
    matches,
    nearest,
    require_matrix,
)
from subspace_jax.core import Leaf as PlannedLeaf
from subspace_jax.linalg import wide_dtype
from subspace_jax.methods.sparse.spt._allocate import Allocation
from subspace_jax.methods.sparse.spt._weights import DepthLowRank, LayerAdapter
from subspace_jax.weights import SparseDelta, flat_entries, hidden_zeros, positions_of


def spt(
    allocation: Allocation,
    *,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    undropped: str | None = None,
    parallel: str | None = None,
) -> Method:
    r"""Trains what an allocation chose: a module on some kernels, single entries of the others.

    A module is \(y + D(\mathrm{drop}(x))\,A B\) ("lora", no scale, no bias), or, after the layer with its bias,
    \(z + U\,\mathrm{gelu}(D\,\mathrm{drop}(z) + d) + u\) ("adapter"). \(B\), \(U\), \(u\) and the entries' additions
    start at zero, so the model is the pretrained one. With `sj.with_dropout` a module's inputs are dropped, and its
    output for whole examples. Select what was scored: `{allocation.paths: sj.methods.spt.spt(allocation)}`, and the
    head and class token by `sj.full()`. Published: AdamW at 1e-3 with decay 1e-4 of arrays of two axes and more;
    additions to entries have one, and the class token is not decayed either.

    Args:
      allocation: from `allocate`.
      dropout: of a module's inputs.
      drop_path: of a module's output.
      undropped: a glob of kernels without input dropout: the attention's projection in the released form, there in both
        kinds of module.
      parallel: the glob that `allocate` was given: adapters that read their kernel's input, without input dropout.

    Returns:
      A method whose weights are `DepthLowRank` with factors `[*stack, in, rank]` and `[*stack, rank, out]`, or
      `LayerAdapter`, which cannot be merged; `SparseDelta` with additions `[*stack, k]` for entries (none where
      nothing learns); `Full` for whole vectors.

    Raises:
      PatternError: the rule matches an array that was not scored, or an adapter's layer has a bias that it does not
        match; raised by `adapt`.
      StructureError: an array has another shape than the one that was scored; raised by `adapt`.

    Note:
      In the released low-rank form queries, keys and values share one dropout mask; here each kernel draws its own.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params, spt = {"w": jnp.ones((4, 3))}, sj.methods.spt
      >>> loss = lambda p, x: jnp.mean((x @ p["w"])[:, 0] ** 2)
      >>> stats = sj.capture(loss, params, [jnp.eye(4)], statistics="squared_gradient")
      >>> found = spt.allocate(stats, 2, step=1, most=12)
      >>> adapted = sj.adapt(params, {found.paths: spt.spt(found)}, key=jax.random.key(0))
      >>> found.leaves["w"].part, type(adapted["w"]).__name__
      ('entries', 'SparseDelta')
    """
    check_probability("spt: dropout", dropout)
    check_probability("spt: drop_path", drop_path)

    def make(path: str, leaves: Mapping[str, PlannedLeaf]) -> InitFn:
        part = allocation.leaves[path].part
        if part == "module":
            apart = parallel is not None and matches(parallel, path)
            kept = apart or (undropped is not None and matches(undropped, path))
            rates: dict[str, Any] = {"dropout": 0.0 if kept else dropout, "drop_path": drop_path}
            if allocation.module == "lora":
                return _low_rank(allocation.rank, rates)
            return _adapter(allocation, path, leaves, apart, rates)
        return _whole if part == "whole" else _entries(allocation.leaves[path].chosen)

    def plan(key: jax.Array, leaves: Mapping[str, PlannedLeaf]) -> Mapping[str, InitFn]:
        del key
        for path, leaf in leaves.items():
            if path not in allocation.leaves:
                raise PatternError(
                    f"{path}: spt: was not scored; nearest are {nearest(path, allocation.paths)}. Match what was: "
                    "{allocation.paths: spt(allocation)}."
                )
            chosen = allocation.leaves[path].chosen
            if chosen is not None and chosen.shape != leaf.array.shape:
                raise StructureError(
                    f"{path}: spt: has shape {leaf.array.shape}, and {chosen.shape} was scored; score this model."
                )
        return {path: make(path, leaves) for path in leaves}

    return Method("spt", _alone, plan=plan)


def _alone(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Any:
    raise PatternError("spt decides for all arrays together; use it as the method of a rule of sj.adapt.")


def _low_rank(rank: int, rates: Mapping[str, Any]) -> InitFn:
    def init(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> DepthLowRank:
        del stats
        require_matrix(array, role)
        stack, (inputs, outputs) = role.stack_shape(array.shape), role.sizes(array.shape)
        keys, bound = jax.random.split(key), 1.0 / math.sqrt(inputs)
        return DepthLowRank(
            base=array,
            a=jax.random.uniform(keys[0], (*stack, inputs, rank), jnp.float32, -bound, bound),
            b=hidden_zeros(keys[1], (*stack, rank, outputs)),
            role=role,
            dtype=array.dtype,
            trainable=("a", "b"),
            **rates,
        )

    return init


def _adapter(
    allocation: Allocation, path: str, leaves: Mapping[str, PlannedLeaf], own_input: bool, rates: Mapping[str, Any]
) -> InitFn:
    """The adapter of a layer; the bias beside the kernel is what the layer adds, if it was scored."""
    bias = f"{path.rpartition('/')[0]}/bias".lstrip("/")
    links: tuple[tuple[str, str, str], ...] = ()
    learned: tuple[str, ...] = ()
    if bias in allocation.leaves and not own_input:
        if bias not in leaves:
            raise PatternError(f"{path}: spt: its adapter reads the layer's output with {bias!r}; match that too.")
        if allocation.leaves[bias].part == "whole":
            links, learned = (("bias", bias, "value"),), ("bias",)
        else:
            names = (("bias", "base"), ("bias_indices", "indices"), ("bias_values", "values"))
            links, learned = tuple((field, bias, source) for field, source in names), ("bias_values",)
    size = allocation.rank

    def init(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> LayerAdapter:
        del stats
        require_matrix(array, role)
        stack, (inputs, outputs) = role.stack_shape(array.shape), role.sizes(array.shape)
        reads = inputs if own_input else outputs
        keys, bound = jax.random.split(key, 4), 1.0 / math.sqrt(reads)
        return LayerAdapter(
            base=array,
            down=jax.random.uniform(keys[0], (*stack, reads, size), jnp.float32, -bound, bound),
            down_bias=jax.random.uniform(keys[1], (*stack, size), jnp.float32, -bound, bound),
            up=hidden_zeros(keys[2], (*stack, size, outputs)),
            up_bias=hidden_zeros(keys[3], (*stack, outputs)),
            activation="gelu",
            own_input=own_input,
            links=links,
            role=role,
            dtype=array.dtype,
            trainable=("down", "down_bias", "up", "up_bias", *learned),
            **rates,
        )

    return init


def _whole(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Full:
    del key, stats
    return Full(value=array, role=role, dtype=array.dtype, trainable=("value",))


def _entries(chosen: np.ndarray | None) -> InitFn:
    """Additions to the chosen entries; to none where there are none."""

    def init(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> SparseDelta:
        del stats
        with jax.ensure_compile_time_eval():  # the choice is known, also where the array is abstract
            mask = jnp.zeros(array.shape, bool) if chosen is None else jnp.asarray(chosen)
            indices = positions_of(np.asarray(flat_entries(mask, role)))
        return SparseDelta(
            base=array,
            indices=jnp.asarray(indices),
            values=hidden_zeros(key, indices.shape, wide_dtype(array.dtype)),
            mode="add",
            role=role,
            dtype=array.dtype,
            trainable=("values",),
        )

    return init
