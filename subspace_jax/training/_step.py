"""One training step: gradients of what learns, over micro-batches if wanted, reusing the previous state's buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from subspace_jax.core import Batch, Params, PyTree, StructureError, Updates, combine, path_string
from subspace_jax.training._state import TrainState

Loss = Callable[[Any, Any, jax.Array], Any]


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    weight: Callable[[Batch], jax.Array] | None = None,
    has_aux: bool = False,
    remat: Callable[..., Any] | None = None,
) -> TrainStep:
    r"""Makes the compiled step of a training run.

    Only the trainable tree is differentiated. With `accumulate=n` the batch is cut into \(n\) micro-batches, of which
    one is in memory at a time, and the gradient is \(\sum_i w_i g_i / \sum_i w_i\): that of the whole batch where the
    loss is a mean over what \(w_i\) counts. Each micro-batch takes rows of every device, so nothing moves.

    Args:
      loss: `loss(adapted, batch, key)`, a scalar that is a mean over the batch; with `has_aux` a pair of it and a dict
        of scalars that are means as well.
      optimizer: the one of `init_train_state`.
      accumulate: \(n\), a divisor of the number of rows.
      weight: `weight(batch)`, \(w_i\), where the mean is not over rows: the number of real tokens, say.
      has_aux: whether `loss` returns a pair.
      remat: a policy of `jax.checkpoint_policies` for the loss as a whole: what of its forward pass is kept for the
        backward pass. Models with scanned layers have a switch of their own, which saves more.

    Returns:
      `step(state, batch)`, which returns the new state and the metrics: float32 scalars `loss` and `gradient_norm`, and
      what `has_aux` adds. The state that goes in is consumed, except for its frozen arrays.

    Raises:
      ValueError: `accumulate` is not a positive integer; when called, if what `loss` returns beside its value is no
        dict, or has a name `loss` or `gradient_norm`.
      StructureError: when called, if `accumulate` does not divide the rows of an array of the batch.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> from subspace_jax.training import init_train_state
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(2)}, key=jax.random.key(0))
      >>> optimizer = optax.adam(1e-2)
      >>> apply = sj.with_adapters(lambda params, x: x @ params["w"])
      >>> step = make_train_step(lambda p, x, key: jnp.mean(apply(p, x) ** 2), optimizer, accumulate=2)
      >>> state = init_train_state(adapted, optimizer, jax.random.key(1))
      >>> state, metrics = step(state, jnp.ones((8, 6)))
      >>> int(state.step), float(metrics["loss"])
      (1, 36.0)
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"make_train_step: accumulate={accumulate!r}; expected a positive int.")

    def value(trainable: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        found = loss(combine(trainable, frozen), batch, key)
        return found if has_aux else (found, {})

    if remat is not None:
        value = jax.checkpoint(value, policy=remat)

    def gradients(
        trainable: Params, frozen: Params, batch: Batch, key: jax.Array
    ) -> tuple[Updates, dict[str, jax.Array]]:
        """Gradients, and loss with metrics."""
        (loss_value, aux), found = jax.value_and_grad(value, has_aux=True)(trainable, frozen, batch, key)
        _check_aux(aux)
        return found, {name: jnp.asarray(v, jnp.float32) for name, v in {"loss": loss_value, **aux}.items()}

    def accumulated(
        trainable: Params, frozen: Params, batch: Batch, key: jax.Array
    ) -> tuple[Updates, dict[str, jax.Array]]:
        """The weighted means of `gradients` over micro-batches."""
        parts = jax.tree_util.tree_map_with_path(lambda path, v: _cut(path, v, accumulate), batch)

        def body(total: PyTree, one: Batch) -> tuple[PyTree, Any]:
            part, number = one
            found, metrics = gradients(trainable, frozen, part, jax.random.fold_in(key, number))
            share = jnp.ones(()) if weight is None else jnp.asarray(weight(part), jnp.float32)
            total = jax.tree.map(lambda t, v: t + share.astype(v.dtype) * v, total, found)
            return total, (share, jax.tree.map(lambda v: share * v, metrics))

        start = jax.tree.map(jnp.zeros_like, trainable)
        total, (shares, metrics) = jax.lax.scan(body, start, (parts, jnp.arange(accumulate)))
        share = jnp.sum(shares)
        means = jax.tree.map(lambda v: v / share.astype(v.dtype), total)
        return means, jax.tree.map(lambda v: jnp.sum(v, axis=0) / share, metrics)

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        run = gradients if accumulate == 1 else accumulated
        means, metrics = run(state.trainable, frozen, batch, jax.random.fold_in(state.key, state.step))
        metrics["gradient_norm"] = optax.tree.norm(means).astype(jnp.float32)
        updates, opt_state = optimizer.update(means, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, None, opt_state, state.key), metrics

    return TrainStep(step)


def _check_aux(aux: Any) -> None:
    if not isinstance(aux, dict) or {"loss", "gradient_norm"} & aux.keys():
        raise ValueError(
            f"make_train_step: loss returned {aux!r} beside its value; expected a dict of scalars without the names "
            "loss and gradient_norm."
        )


def _cut(path: Any, value: jax.Array, count: int) -> jax.Array:
    """`[rows, ...]` as `[count, rows / count, ...]`, part i with rows i, i + count, ...: of each device's own."""
    if not value.ndim or value.shape[0] % count:
        raise StructureError(
            f"{path_string(path) or 'batch'}: make_train_step: an array of shape {value.shape} cannot be cut into "
            f"accumulate={count} parts; expected [rows, ...] with a multiple of {count} rows."
        )
    return jnp.swapaxes(value.reshape(-1, count, *value.shape[1:]), 0, 1)


class TrainStep:
    """A compiled training step, a function of state and batch; made by `make_train_step`."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = step
        self._compiled: dict[Any, Any] = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Returns the new state and the metrics; see `make_train_step`."""
        learned = state._replace(frozen=None)
        new, metrics = self._jitted(learned)(learned, state.frozen, batch)
        return new._replace(frozen=state.frozen), metrics

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """Returns `jax.jit(...).lower` of the step, to compile ahead of time; arrays may be abstract.

        The compiled program takes the state without its frozen arrays, those, and the batch.
        """
        learned = state._replace(frozen=None)
        return self._jitted(learned).lower(learned, state.frozen, batch)

    def _jitted(self, learned: TrainState) -> Any:
        """The step that leaves every array of the state where it is; otherwise the compiler could move some."""
        leaves, structure = jax.tree.flatten(learned)
        places = tuple(getattr(leaf, "sharding", None) for leaf in leaves)
        if not all(isinstance(place, NamedSharding) for place in places):
            places = None
        if (structure, places) not in self._compiled:
            out = None
            if places is not None:
                out = (jax.tree.unflatten(structure, places), None)
            self._compiled[structure, places] = jax.jit(self._step, donate_argnums=0, out_shardings=out)
        return self._compiled[structure, places]
