"""Bottleneck adapters: a small network after a block's last kernel, or beside the block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    Full,
    InitFn,
    Leaf,
    Method,
    PatternError,
    Role,
    check_choice,
    check_int,
    check_number,
    require_matrix,
)
from subspace_jax.modules._weights import ACTIVATIONS, Activation, Bottleneck, KeptInput
from subspace_jax.weights import hidden_zeros


def bottleneck(
    size: int,
    *,
    placement: Literal["sequential", "parallel"] = "sequential",
    reads: str | None = None,
    bias: bool = True,
    activation: Activation = "relu",
    scale: float = 1.0,
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains a small network in a block, whose own weights stay frozen: \(y + s\,(U\,\phi(D\,h + d) + u)\).

    Sequential (Houlsby et al.; Pfeiffer et al.): \(h\) is the output of the block's last kernel with its bias, before
    what the model does with it. The rule matches that kernel and its bias, `"**/fc2/{kernel,bias}"`. Houlsby et al.
    have a module after the attention's output and after the MLP, Pfeiffer et al. after the MLP alone: that is which
    kernels the rule matches. Parallel (AdaptFormer): \(h\) is the input of the block's first kernel, that is after the
    norm, as in the paper; the authors' code takes the stream before it, which no kernel sees. The rule matches the
    first and the last kernel, `"**/{fc1,fc2}/kernel"`, and `reads="fc1"` says which is the first. \(U\) and \(u\)
    start at zero, so the model is the pretrained one.

    Args:
      size: hidden features.
      placement: "sequential" or "parallel".
      reads: parallel only: the name that the first kernel's path has and the last one's has not.
      bias: sequential only: the model adds a bias to the kernel's output, which the rule matches too.
      activation: \(\phi\): "relu", "gelu", "silu" or "tanh".
      scale: \(s\); 0.1 in AdaptFormer.
      dtype: dtype of what learns.

    Returns:
      A method whose weights are `Bottleneck` and, where an input is kept, `KeptInput`. They cannot be merged.

    Raises:
      PatternError: from `adapt`: the rule matches no kernel to read from, or none to stand on, or no bias.
      RoleError: from `adapt`: a kernel is not known to be a matrix.
      RankError: `size` is not a positive integer.
      ValueError: `placement` or `activation` is unknown, `scale` is not a finite number, or `reads` is missing where a
        parallel module needs it, or is given to a sequential one.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"fc1": {"kernel": jnp.ones((4, 8))}, "fc2": {"kernel": jnp.ones((8, 4))}}
      >>> method = sj.bottleneck(2, placement="parallel", reads="fc1", scale=0.1)
      >>> adapted = sj.adapt(params, {"*/kernel": method}, key=jax.random.key(0))
      >>> sorted(type(w).__name__ for w in jax.tree.leaves(adapted, is_leaf=sj.core.is_weight))
      ['Bottleneck', 'KeptInput']
    """
    check_int("bottleneck: size", size)
    check_choice("bottleneck: placement", placement, ("sequential", "parallel"))
    check_choice("bottleneck: activation", activation, tuple(ACTIVATIONS))
    check_number("bottleneck: scale", scale)
    parallel = placement == "parallel"
    if parallel != (reads is not None):
        raise ValueError(
            f"bottleneck: placement={placement!r} with reads={reads!r}: a parallel module needs the name of the kernel "
            "whose input it reads, a sequential one reads its own kernel's output."
        )
    options: dict[str, Any] = {"activation": activation, "scale": float(scale)}

    def module(features: int | None, kept: str, linked: str | None) -> InitFn:
        def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Bottleneck:
            del stats
            require_matrix(array, role)
            stack, outputs = role.stack_shape(array.shape), role.sizes(array.shape)[1]
            inputs = outputs if features is None else features
            bound = 1.0 / math.sqrt(inputs)
            return Bottleneck(
                base=array,
                down=jax.random.uniform(key, (*stack, inputs, size), dtype, -bound, bound),
                down_bias=hidden_zeros(key, (*stack, size), dtype),
                up=hidden_zeros(key, (*stack, size, outputs), dtype),
                up_bias=hidden_zeros(key, (*stack, outputs), dtype),
                reads=kept,
                links=() if linked is None else (("bias", linked, "value"),),
                role=role,
                dtype=array.dtype,
                trainable=("down", "down_bias", "up", "up_bias"),
                **options,
            )

        return make

    def plan(key: jax.Array, leaves: Mapping[str, Leaf]) -> Mapping[str, InitFn]:
        del key
        return _parallel(leaves, reads, module) if reads is not None else _sequential(leaves, bias, module)

    return Method("bottleneck", module(None, "", None), plan=plan)


def _sequential(leaves: Mapping[str, Leaf], bias: bool, module: Any) -> dict[str, InitFn]:
    """A module on every kernel; its bias stays and is read."""
    kernels = [path for path in leaves if not _is_bias(path)]
    inits: dict[str, InitFn] = {}
    for path in kernels:
        own = f"{path.rpartition('/')[0]}/bias".lstrip("/")
        if bias and own not in leaves:
            raise PatternError(
                f"{path}: a sequential module reads the kernel's output with its bias, and the rule does not match "
                f"{own!r}. Match it too, as in '**/fc2/{{kernel,bias}}', or say bottleneck(..., bias=False) where the "
                "layer has none."
            )
        inits[path] = module(None, "", own if bias else None)
        if bias:
            inits[own] = _keep
    if missing := [path for path in leaves if path not in inits]:
        raise PatternError(f"{missing[0]}: is a bias without a kernel in this rule. Match the layer's kernel too.")
    return inits


def _parallel(leaves: Mapping[str, Leaf], reads: str, module: Any) -> dict[str, InitFn]:
    """A module on the kernel of every block that does not have the name, reading the input of the one that has."""
    first = {path for path in leaves if reads in path.split("/")}
    if not first:
        raise PatternError(f"bottleneck: reads={reads!r} is in no path that the rule matches: {', '.join(leaves)}.")
    inits: dict[str, InitFn] = {}
    for path in leaves.keys() - first:
        block = [p for p in first if _block(p, reads) == path[: len(_block(p, reads))]]
        if not block:
            raise PatternError(f"{path}: no kernel {reads!r} of the same block is matched by the rule; match both.")
        nearest = max(block, key=lambda p: len(_block(p, reads)))
        leaf = leaves[nearest]
        require_matrix(leaf.array, leaf.role)
        name = f"input of {nearest}"
        inits[path] = module(leaf.role.sizes(leaf.array.shape)[0], name, None)
        inits[nearest] = _keeper(name)
    if unused := sorted(first - inits.keys()):
        raise PatternError(f"{unused[0]}: its input would be kept for no one: the rule matches no other kernel there.")
    return inits


def _block(path: str, reads: str) -> str:
    """The path of the block: what stands before the name, with its slash."""
    names = path.split("/")
    return "".join(f"{name}/" for name in names[: names.index(reads)])


def _is_bias(path: str) -> bool:
    return path.rpartition("/")[2] == "bias"


def _keep(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Full:
    """The bias as it is, where the module can read it."""
    del key, stats
    return Full(value=array, role=role, dtype=array.dtype, trainable=())


def _keeper(name: str) -> InitFn:
    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> KeptInput:
        del key, stats
        return KeptInput(base=array, writes=name, role=role, dtype=array.dtype, trainable=())

    return make
