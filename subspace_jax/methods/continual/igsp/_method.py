"""The method that puts pools of experts into a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    InitFn,
    Leaf,
    Method,
    PatternError,
    Role,
    check_dtype,
    check_int,
    check_number,
    check_probability,
    require_matrix,
)
from subspace_jax.methods.continual.igsp._weight import ExpertPool
from subspace_jax.modules import KeptInput
from subspace_jax.weights import hidden_zeros


def igsp(
    size: int = 64,
    *,
    tasks: int,
    candidates: int = 2,
    reads: str | None = None,
    token: int = 0,
    top: int | None = None,
    scale: float = 0.1,
    noise: bool = True,
    dropout: float = 0.1,
    dtype: Any = jnp.float32,
) -> Method:
    r"""Puts a pool of experts beside kernels: \(y + \sum_e g_e\,s\,(\mathrm{relu}(u D_e + c_e)\,U_e + v_e)\).

    \(g = \mathrm{softmax}(u_{first} R_t)\) over the experts of task t. Beside a block's MLP, as published, the rule
    matches its first and last kernel, `"**/{fc1,fc2}/kernel"`, with `reads="fc1"`; experts then read what that kernel
    reads, after the norm (the host's code takes the stream before it, which no kernel sees). Without `reads` they stand
    beside each kernel that is matched. `igsp.learner` grows the pool task by task; the tree from `adapt` is ready for
    the first one, and is the model itself.

    Args:
      size: \(r\), hidden values of an expert.
      tasks: number of tasks that there is room for; the pool has `candidates * tasks` slots.
      candidates: \(N_c\), new experts that a task begins with.
      reads: the name that the path of a block's first kernel has and that of the last one has not.
      token: which token of a sample the router reads. 0 is the host's, in the text tower too, where causal attention
        makes it the same for every text; -1 for texts that end in their last position.
      top: number of experts that a sample uses once a task's structure is fixed; all if None, 2 in the host.
      scale: \(s\).
      noise: noise on logits in training, \(\epsilon\,(\mathrm{softplus}(u R_n) + 0.01)\) with \(R_n\) that learns.
      dropout: probability of dropping a hidden value in training.
      dtype: dtype of what learns.

    Returns:
      A method whose weights are `ExpertPool` and, where an input is kept, `KeptInput`. They cannot be merged.

    Raises:
      RankError: a number of something is not a positive integer.
      ValueError: an option is out of its range.
      PatternError: from `adapt`: the rule matches no kernel to read from, or none to stand on.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"fc1": {"kernel": jnp.ones((4, 8))}, "fc2": {"kernel": jnp.ones((8, 4))}}
      >>> method = sj.methods.igsp.igsp(2, tasks=3, reads="fc1")
      >>> sj.adapt(params, {"*/kernel": method}, key=jax.random.key(0))["fc2"]["kernel"].down.shape
      (6, 4, 2)
    """
    size, tasks = check_int("igsp: size", size), check_int("igsp: tasks", tasks)
    candidates = check_int("igsp: candidates", candidates)
    top = None if top is None else check_int("igsp: top", top)
    check_int("igsp: token", token, least=-(10**6))
    check_number("igsp: scale", scale)
    check_probability("igsp: dropout", dropout)
    dtype = check_dtype("igsp: dtype", dtype)
    experts = tasks * candidates

    def pool(features: int | None, kept: str) -> InitFn:
        def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> ExpertPool:
            del stats
            require_matrix(array, role)
            stack, (own, outputs) = role.stack_shape(array.shape), role.sizes(array.shape)
            inputs = own if features is None else features
            new = (jnp.arange(experts) < candidates).astype(jnp.float32)
            active = jnp.zeros((*stack, tasks, experts)).at[..., 0, :].set(new)
            router = hidden_zeros(key, (*stack, tasks, inputs, experts), jnp.float32)
            return ExpertPool(
                base=array,
                down=draw_down(key, (*stack, experts, inputs, size), dtype),
                down_bias=hidden_zeros(key, (*stack, experts, size), dtype),
                up=hidden_zeros(key, (*stack, experts, size, outputs), dtype),
                up_bias=hidden_zeros(key, (*stack, experts, outputs), dtype),
                router=router,
                noise_router=jnp.copy(router) if noise else None,
                active=active,
                candidates=jnp.broadcast_to(new, (*stack, experts)),
                task=jnp.zeros([], jnp.int32),
                noise=jnp.ones([], jnp.float32),
                settled=jnp.zeros([], jnp.float32),
                scale=jnp.asarray(scale, jnp.float32),
                reads=kept,
                token=token,
                top=top,
                dropout=float(dropout),
                role=role,
                dtype=array.dtype,
                trainable=("down", "down_bias", "up", "up_bias", "router", *(["noise_router"] if noise else [])),
            )

        return make

    def plan(key: jax.Array, leaves: Mapping[str, Leaf]) -> Mapping[str, InitFn]:
        del key
        return dict.fromkeys(leaves, pool(None, "")) if reads is None else _beside(leaves, reads, pool)

    return Method("igsp", pool(None, ""), plan=plan)


def draw_down(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Kaiming-uniform with slope sqrt 5: within one over the root of the inputs."""
    bound = 1.0 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _beside(leaves: Mapping[str, Leaf], reads: str, pool: Any) -> dict[str, InitFn]:
    """A pool on the kernels of every block whose paths do not have the name, reading the input of the one that has."""
    first = {path: path.split("/") for path in leaves if reads in path.split("/")}
    inits: dict[str, InitFn] = {}
    for path in leaves.keys() - first.keys():
        blocks = {p: "".join(f"{n}/" for n in names[: names.index(reads)]) for p, names in first.items()}
        own = [p for p, block in blocks.items() if path.startswith(block)]
        if not own:
            raise PatternError(
                f"{path}: igsp: no kernel {reads!r} of the same block is matched by the rule; match both, as in "
                "'**/{fc1,fc2}/kernel'."
            )
        nearest = max(own, key=lambda p: len(blocks[p]))
        leaf = leaves[nearest]
        require_matrix(leaf.array, leaf.role)
        inits[path] = pool(leaf.role.sizes(leaf.array.shape)[0], f"input of {nearest}")
        inits[nearest] = _keeper(f"input of {nearest}")
    if unused := sorted(leaves.keys() - inits.keys()):
        raise PatternError(f"{unused[0]}: igsp: its input would be kept for no one: the rule matches no other kernel.")
    return inits


def _keeper(name: str) -> InitFn:
    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> KeptInput:
        del key, stats
        return KeptInput(base=array, writes=name, role=role, dtype=array.dtype, trainable=())

    return make
