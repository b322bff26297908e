"""A frozen kernel and a pool of experts beside it, mixed for every sample by the router of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import Operation, RoleError, Scalar, register_weight, static
from subspace_jax.methods.continual.igsp._routing import probabilities
from subspace_jax.modules import Module, features_last
from subspace_jax.weights import step_keys


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertPool(Module):
    r"""A frozen kernel and \(\sum_e g_e E_e(u)\), \(E_e(u) = s\,(\mathrm{relu}(u D_e + c_e)\,U_e + v_e)\).

    The gates are one softmax over the experts that a task has, of the router of that task on the sample's first token.
    All slots of the pool are there from the start, and masks say which are in use; `compact` removes the others.

    Attributes:
      base: the kernel.
      down: \(D\), `[*stack, experts, in, size]`.
      down_bias: \(c\), `[*stack, experts, size]`.
      up: \(U\), `[*stack, experts, size, out]`, zero at the start.
      up_bias: \(v\), `[*stack, experts, out]`, zero at the start.
      router: \(R\), `[*stack, tasks, in, experts]`, zero at the start.
      noise_router: \(R_n\), likewise, of the noise in training; None without.
      active: zeros and ones `[*stack, tasks, experts]`: which experts a task uses.
      candidates: zeros and ones `[*stack, experts]`: which experts the current task trains.
      task: int32, whose router counts: a scalar, or one for every sample; -1 for the kernel alone.
      noise: amplitude of the noise on logits, a scalar; it takes a dropout key, too.
      settled: 1 where `top` counts, 0 for dense gates, a scalar.
      dropout_key: keys `[*stack]` for one training step, set by `with_dropout`.
      scale: \(s\), a scalar.
      reads: name of the kept input; empty for the kernel's own input.
      token: which token of a sample the router reads, 0 for the class token, -1 for one at the end of the text.
      top: number of experts that a sample uses; all of its task's if None.
      dropout: probability of dropping a hidden value.
    """

    down: jax.Array
    down_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array
    router: jax.Array
    active: jax.Array
    candidates: jax.Array
    task: jax.Array
    noise: jax.Array
    settled: jax.Array
    noise_router: jax.Array | None = None
    dropout_key: jax.Array | None = None
    scale: Scalar = 0.1
    reads: str = static(default="")
    token: int = static(default=0)
    top: int | None = static(default=None)
    dropout: float = static(default=0.0)

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "down": "stack expert feature size",
        "down_bias": "stack expert size",
        "up": "stack expert size out",
        "up_bias": "stack expert out",
        "router": "stack task feature expert",
        "noise_router": "stack task feature expert",
        "active": "stack task expert",
        "candidates": "stack expert",
        "task": "",
        "noise": "",
        "settled": "",
        "dropout_key": "stack",
        "scale": "",
    }
    padded: ClassVar[tuple[str, ...]] = ("size",)

    @property
    def rank(self) -> int:
        """The hidden size of an expert."""
        return self.down.shape[-1]

    def with_key(self, key: jax.Array) -> ExpertPool:
        """Returns the weight with keys for one step of dropout and noise, one per stacked layer."""
        if not self.dropout and self.noise_router is None:
            return self
        return dataclasses.replace(self, dropout_key=step_keys(key, self.down.shape[:-3]))

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns what the kernel gives and the experts add, and reports the router's probabilities."""
        y = self.contract_base(x, operation)
        u = self._inputs(x, operation)
        first = lax.index_in_dim(u, self.token % u.shape[-2], -2, keepdims=False) if u.ndim > 2 else u
        logits, active = self._logits(first.astype(jnp.float32), self.router)
        p = probabilities(logits, active)
        operation.context.report(operation.name, p)
        gates = self._gates(first.astype(jnp.float32), logits, active, p, operation)
        features_last(y, operation.out_labels, operation.role.out_axes, self.shape)
        added = self._mixed(u.astype(operation.dtype), gates, operation).astype(y.dtype)
        return y + added.reshape(y.shape)

    def _inputs(self, x: jax.Array, operation: Operation) -> jax.Array:
        if not self.reads:
            return features_last(x, operation.x_labels, operation.role.in_axes, self.shape)
        kept = operation.context.read(self.reads)
        if kept is None:
            raise RoleError(
                f"{operation.name}: the experts read an input that no kernel has kept before them in this block. "
                "Name by reads= a kernel that runs before this one, and let the rule match both."
            )
        return kept

    def _logits(self, first: jax.Array, router: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits of rows by a router of their tasks, and which experts count; none where the task is -1."""
        task = jnp.maximum(self.task, 0)
        chosen, active = router[task], self.active[task] * (self.task >= 0)[..., None]
        if not self.task.ndim:
            return jnp.matmul(first, chosen, precision=lax.Precision.HIGHEST), active
        if first.ndim < 2 or first.shape[0] != self.task.shape[0]:
            raise RoleError(
                f"ExpertPool.task {self.task.shape} names a task for every sample, and the kernel of shape "
                f"{self.shape} meets rows {first.shape[:-1]}; expected one sample each along the first axis."
            )
        logits = jnp.einsum("b...d,bde->b...e", first, chosen, precision=lax.Precision.HIGHEST)
        return logits, active.reshape(active.shape[0], *[1] * (first.ndim - 2), active.shape[-1])

    def _gates(
        self, first: jax.Array, logits: jax.Array, active: jax.Array, p: jax.Array, operation: Operation
    ) -> jax.Array:
        if self.noise_router is not None and self.dropout_key is not None:
            spread = jax.nn.softplus(self._logits(first, self.noise_router)[0]) + 0.01
            drawn = jax.random.normal(self._key(operation, 0), spread.shape)
            p = probabilities(logits + self.noise * drawn * spread, active)
        if self.top is None:
            return p
        return jnp.where(self.settled > 0, probabilities(logits, active, self.top), p)

    def _mixed(self, u: jax.Array, gates: jax.Array, operation: Operation) -> jax.Array:
        dtype = u.dtype
        down, up = self.down.astype(dtype), self.up.astype(dtype)
        hidden = jax.nn.relu(jnp.einsum("...d,edr->...er", u, down) + self.down_bias.astype(dtype))
        if self.dropout and self.dropout_key is not None:
            mask = jax.random.bernoulli(self._key(operation, 1), 1.0 - self.dropout, hidden.shape)
            hidden = jnp.where(mask, hidden / (1.0 - self.dropout), jnp.zeros((), dtype))
        weights = gates[..., None, :] if u.ndim > 2 else gates  # the same for all tokens of a sample
        weights = weights.astype(dtype) * jnp.asarray(self.scale, dtype)
        added = jnp.einsum("...er,ero->...o", hidden * weights[..., None], up)
        return added + jnp.einsum("...e,eo->...o", weights, self.up_bias.astype(dtype))

    def _key(self, operation: Operation, number: int) -> jax.Array:
        key = self.dropout_key
        assert key is not None
        for index in (*operation.path, number):
            key = jax.random.fold_in(key, index)
        return key
