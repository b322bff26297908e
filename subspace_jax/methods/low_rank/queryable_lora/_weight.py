"""A frozen kernel with low-rank factors around an operator that is assembled for every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core import Operation, RoleError, Scalar, product, register_weight, static
from subspace_jax.methods.low_rank.queryable_lora._routing import Router, layer_norm, log_prior, route
from subspace_jax.modules import Module, features_last
from subspace_jax.weights import drop_inputs, step_keys

HISTORY, WEIGHTS = "queryable_lora/history", "queryable_lora/weights"
SHARED = ("atoms", "keys", "query", "summary", "depth", "blocks")
PRIOR = ("projection", "descriptors")


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryableLowRank(Module):
    r"""A frozen kernel and \(s\,((x A) R) B\), with \(R = \sum_i \alpha_i M_i\) of a memory that all kernels share.

    The first kernel of a block finds \(\alpha\) for every row from its own \(x A\) and from those of the blocks before,
    and the others of the block use it.

    Attributes:
      base: the kernel.
      a: \(A\), `[*stack, in, rank]`.
      b: \(B\), `[*stack, rank, out]`, zero at the start.
      block: number of the block that a layer is in, from 0, int32 `[*stack]`.
      first: whether the layer begins its block, bool `[*stack]`.
      atoms: \(M\), `[atoms, rank, rank]`; this and what follows is stored in one weight and linked in the others.
      keys: `[atoms, width]`.
      query: \(W_q\), `[rank, width]`.
      summary: \(W_s\), `[rank, width]`.
      depth: \(W_d\), `[rank, width]`.
      blocks: \(e\), `[blocks, width]`.
      projection: \(W_t\), `[text, width]`; None without a prior.
      descriptors: \(T\), `[atoms, width]`; None without a prior.
      instruction: \(t\), `[text]` or `[batch, text]`, data; None without a prior.
      dropout_key: keys `[*stack]` for one training step, set by `with_dropout`.
      scale: \(s\), a scalar.
      strength: \(\beta\) of the prior, a scalar.
      temperature: \(\tau\), a scalar.
      routes: this is the kernel of its layer that finds \(\alpha\).
      kept: atoms that a row uses.
      dropout: probability of dropping an input of the factors; routing sees all.
    """

    a: jax.Array
    b: jax.Array
    block: jax.Array
    first: jax.Array
    atoms: jax.Array | None = None
    keys: jax.Array | None = None
    query: jax.Array | None = None
    summary: jax.Array | None = None
    depth: jax.Array | None = None
    blocks: jax.Array | None = None
    projection: jax.Array | None = None
    descriptors: jax.Array | None = None
    instruction: jax.Array | None = None
    dropout_key: jax.Array | None = None
    scale: Scalar = 1.0
    strength: Scalar = 1.0
    temperature: Scalar = 1.0
    routes: bool = static(default=False)
    kept: int = static(default=1)
    dropout: float = static(default=0.0)

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "a": "stack in rank",
        "b": "stack rank out",
        "block": "stack",
        "first": "stack",
        "atoms": "atom rank rank",
        "keys": "atom width",
        "query": "rank width",
        "summary": "rank width",
        "depth": "rank width",
        "blocks": "block width",
        "projection": "text width",
        "descriptors": "atom width",
        "instruction": "batch text",
        "dropout_key": "stack",
        "scale": "",
        "strength": "",
        "temperature": "",
    }
    keeps_state: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        """The width of the factors."""
        return self.a.shape[-1]

    def with_key(self, key: jax.Array) -> QueryableLowRank:
        """Returns the weight with keys for one step of dropout, one per stacked layer."""
        if not self.dropout:
            return self
        return dataclasses.replace(self, dropout_key=step_keys(key, self.a.shape[:-2]))

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Refuses: what is added depends on the input."""
        raise RoleError(
            f"A queryable kernel of shape {self.shape} is no array: every row has an operator of its own. Use it in "
            "products with the model's inputs alone, or export the mean routing by freeze_routing(...)."
        )

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns what the kernel gives and the routed factors add, and keeps the routing for later kernels."""
        y = self.contract_base(x, operation)
        rows = features_last(x, operation.x_labels, operation.role.in_axes, self.shape)
        few = _rows(rows.astype(jnp.float32), self.a)
        weights = self._weights(few, operation)
        if self.dropout_key is not None:
            rows = drop_inputs(rows, operation, self.dropout_key, self.dropout)
            few = _rows(rows.astype(jnp.float32), self.a)
        atoms = _required(self.atoms)
        each = jnp.einsum("...r,mrq->...mq", few, atoms)
        mixed = jnp.einsum("...m,...mq->...q", weights, each) * jnp.asarray(self.scale, jnp.float32)
        added = _rows(mixed.astype(operation.dtype), self.b.astype(operation.dtype))
        features_last(y, operation.out_labels, operation.role.out_axes, self.shape)
        return y + added.astype(y.dtype).reshape(y.shape)

    def _weights(self, few: jax.Array, operation: Operation) -> jax.Array:
        """The weights of the atoms for every row; found anew where a block begins."""
        context = operation.context
        held = context.read(WEIGHTS)
        count = _required(self.keys).shape[0]
        shape = (*few.shape[:-1], count)
        if held is not None and held.shape != shape:
            raise RoleError(
                f"{operation.name}: rows {few.shape[:-1]} meet a routing of rows {held.shape[:-1]}; all adapted "
                "kernels need the same examples and tokens. Leave those of other rows out of the rule."
            )
        if not self.routes:
            if held is None:
                raise RoleError(
                    f"{operation.name}: no kernel of its block has found a routing before it; head= must name the "
                    "kernel of every block that runs first."
                )
            return held
        size = _required(self.blocks).shape[0]
        history = context.read(HISTORY)
        history = jnp.zeros((size, *few.shape)) if history is None else history
        held = jnp.zeros(shape) if held is None else held
        normed = layer_norm(few)
        found = route(normed, history, self.block, self._router(few.ndim), self.kept)
        weights = jnp.where(self.first, found, held)
        kept = jnp.where(self.first, normed, history[self.block])
        context.write(HISTORY, history.at[self.block].set(kept), lasting=True)
        context.write(WEIGHTS, weights, lasting=True)
        context.report(operation.name, {"weights": weights, "block": self.block, "first": self.first})
        return weights

    def _router(self, ndim: int) -> Router:
        prior = jnp.zeros(())
        if self.instruction is not None:
            prior = log_prior(self.instruction, _required(self.projection), _required(self.descriptors), ndim)
        shared = {n: _required(getattr(self, n)) for n in ("keys", "query", "summary", "depth", "blocks")}
        prior = prior * jnp.asarray(self.strength, jnp.float32)
        return Router(**shared, log_prior=prior, temperature=jnp.asarray(self.temperature))


def _required(value: jax.Array | None) -> jax.Array:
    if value is None:
        raise RoleError("A queryable kernel is used without the memory that it shares; pass the tree from sj.adapt.")
    return value


def _rows(x: jax.Array, factor: jax.Array) -> jax.Array:
    rows = tuple(f"r{i}" for i in range(x.ndim - 1))
    return product(x, (*rows, "in"), factor.astype(x.dtype), ("in", "out"), (*rows, "out"))
