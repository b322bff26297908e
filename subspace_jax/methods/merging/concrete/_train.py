"""Training of masks and of coefficients on inputs without labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import Params, check_choice, check_int, leaves_with_paths
from subspace_jax.methods.merging.concrete._mask import add_masked, init_logits, sample_mask

# apply(params, inputs, task), the logits of a task's frozen head.
Apply = Callable[[Any, Any, int], jax.Array]
# inputs(key), a batch of unlabeled inputs of every task.
Inputs = Callable[[jax.Array], Sequence[Any]]
Coefficients = Literal["task", "layer"]


class Concrete(NamedTuple):
    """The merged model of a learned mask, and how it was learned.

    Attributes:
      params: the merged model.
      logits: of the mask; None where none was learned.
      coefficients: of the experts: a number, `[experts]`, or a dict from path to `[experts]`.
      losses: of every step, `[steps]`.
    """

    params: Params
    logits: Params | None
    coefficients: Any
    losses: jax.Array


def entropy_loss(logits: jax.Array) -> jax.Array:
    r"""Returns the mean Shannon entropy of predictions, \(-\sum_k p_k \log p_k\), in nats.

    Args:
      logits: `[..., classes]`; minus infinity where a class does not count.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(entropy_loss(jnp.zeros((3, 4)))), 4)
      1.3863
    """
    log = jax.nn.log_softmax(logits.astype(jnp.float32))
    kept = jnp.isfinite(log)
    return -jnp.mean(jnp.sum(jnp.where(kept, jnp.exp(log) * jnp.where(kept, log, 0.0), 0.0), axis=-1))


def total_entropy(apply: Apply, params: Params, batches: Sequence[Any]) -> jax.Array:
    """Returns the sum over tasks of the mean entropy of a batch of each."""
    return sum((entropy_loss(apply(params, batch, i)) for i, batch in enumerate(batches)), jnp.zeros(()))


def concrete_task_arithmetic(
    apply: Apply,
    base: Params,
    vectors: Sequence[Params],
    inputs: Inputs,
    key: jax.Array,
    *,
    coefficient: float = 0.3,
    temperature: float = 0.5,
    steps: int = 2000,
    learning_rate: float = 1e-3,
) -> Concrete:
    r"""Learns one mask for all task vectors, at fixed coefficients: Concrete Task Arithmetic.

    Minimizes the entropy of predictions on unlabeled inputs, summed over tasks, of \(\theta_0 + \lambda \sum_i \tilde m
    \tau_i\) with a mask drawn at every step, by Adam on the logits. Where the merged model starts near chance, entropy
    falls and accuracy with it: the loss says that predictions are certain, not that they are right.

    Args:
      apply: `apply(params, batch, task)` returns logits.
      base: \(\theta_0\).
      vectors: as `task_vectors` gives them.
      inputs: `inputs(key)` draws a batch of each task, inside the compiled loop.
      key: draws batches and masks; consumed.
      coefficient: \(\lambda\).
      temperature: of the mask.
      steps: of Adam.
      learning_rate: of Adam.

    Returns:
      The model at one more drawn mask, and what was learned.

    Raises:
      StructureError: there are no vectors, or they differ.
      RankError: `steps` is no positive integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> base, vectors = {"w": jnp.zeros((2, 2))}, [{"w": jnp.eye(2)}]
      >>> found = concrete_task_arithmetic(lambda p, x, task: x @ p["w"], base, vectors,
      ...                                  lambda key: [jax.random.normal(key, (4, 2))], jax.random.key(0), steps=3)
      >>> found.losses.shape
      (3,)
    """
    check_int("concrete_task_arithmetic: steps", steps)
    logits = init_logits(vectors)
    optimizer = optax.adam(learning_rate)

    def loss(logits: Params, draw: jax.Array, batches: Sequence[Any]) -> jax.Array:
        mask = sample_mask(draw, logits, temperature)
        return total_entropy(apply, add_masked(base, vectors, coefficient, mask), batches)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        logits, state = carry
        draw, data = jax.random.split(key)
        value, gradient = jax.value_and_grad(loss)(logits, draw, inputs(data))
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(logits, updates), state), value

    last, key = jax.random.split(key)
    keys = jax.random.split(key, steps)
    (logits, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, keys))((logits, optimizer.init(logits)))
    merged = add_masked(base, vectors, coefficient, sample_mask(last, logits, temperature))
    return Concrete(merged, logits, coefficient, losses)


def ada_merging(
    apply: Apply,
    base: Params,
    vectors: Sequence[Params],
    inputs: Inputs,
    key: jax.Array,
    *,
    coefficients: Coefficients = "layer",
    mask: Params | None = None,
    start: float = 0.3,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    clamp: bool = False,
) -> Concrete:
    r"""Learns how much of every task vector to add, on unlabeled inputs: AdaMerging, or its last phase with a mask.

    Args:
      apply: `apply(params, batch, task)` returns logits.
      base: \(\theta_0\).
      vectors: as `task_vectors` gives them.
      inputs: `inputs(key)` draws a batch of each task.
      key: draws batches; consumed.
      coefficients: "task", one for every expert, or "layer", one for every expert and leaf.
      mask: multiplies all vectors; none if None.
      start: of all coefficients.
      steps: of Adam.
      learning_rate: of Adam.
      clamp: keep coefficients in [0, 1].

    Returns:
      The merged model and the coefficients.

    Raises:
      ValueError: unknown `coefficients`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> found = ada_merging(lambda p, x, task: x @ p["w"], {"w": jnp.zeros((2, 2))}, [{"w": jnp.eye(2)}],
      ...                     lambda key: [jnp.ones((1, 2))], jax.random.key(0), steps=2)
      >>> found.coefficients["w"].shape
      (1,)
    """
    check_choice("ada_merging: coefficients", coefficients, ("task", "layer"))
    check_int("ada_merging: steps", steps)
    optimizer, lam = optax.adam(learning_rate), _start(vectors, coefficients, start)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        lam, state = carry
        batches = inputs(key)
        value, gradient = jax.value_and_grad(
            lambda lam: total_entropy(apply, add_masked(base, vectors, lam, mask), batches)
        )(lam)
        updates, state = optimizer.update(gradient, state)
        lam = optax.apply_updates(lam, updates)
        return (_clamped(lam) if clamp else lam, state), value

    keys = jax.random.split(key, steps)
    (lam, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, keys))((lam, optimizer.init(lam)))
    return Concrete(add_masked(base, vectors, lam, mask), None, lam, losses)


def concrete_ada_merging(
    apply: Apply,
    base: Params,
    vectors: Sequence[Params],
    inputs: Inputs,
    key: jax.Array,
    *,
    coefficients: Coefficients = "layer",
    temperature: float = 0.5,
    start: float = 0.3,
    steps: int = 2000,
    learning_rate: float = 1e-3,
    inner_rate: float = 1.0,
    lam_at: Literal["start", "previous"] = "start",
    resample_outer: bool = False,
    discrete: bool = False,
    adaptation_steps: int = 1000,
    adaptation_rate: float = 1e-3,
    clamp: bool = False,
) -> Concrete:
    r"""Learns a mask under which coefficients adapt well, then the coefficients: Concrete AdaMerging.

    Every step resets the coefficients, takes one inner step on them with the mask held fixed, by Adam at a rate of 1
    whose moments persist, and one outer step on the logits of the mask on fresh inputs at the coefficients so adapted;
    to first order, without a gradient through the inner step. Then one mask is drawn and kept, and the coefficients
    alone are learned, see `ada_merging`.

    Args:
      apply: `apply(params, batch, task)` returns logits.
      base: \(\theta_0\).
      vectors: as `task_vectors` gives them.
      inputs: `inputs(key)` draws a batch of each task.
      key: draws batches and masks; consumed.
      coefficients: "task" or "layer".
      temperature: of the mask.
      start: of all coefficients.
      steps: of the first phase; 1000 in the maintained code.
      learning_rate: of Adam on the logits.
      inner_rate: of Adam on the coefficients within the first phase.
      lam_at: where the inner gradient is taken: at the "start", or, as both public codes have it, at what the
        "previous" step had adapted.
      resample_outer: draw another mask for the outer step, as the original code; the maintained one does not.
      discrete: keep a mask of zeros and ones.
      adaptation_steps: of the second phase.
      adaptation_rate: of Adam in the second phase.
      clamp: keep coefficients in [0, 1].

    Returns:
      The merged model, the logits, the coefficients, and the losses of the first phase.

    Raises:
      ValueError: an unknown option.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> found = concrete_ada_merging(lambda p, x, task: x @ p["w"], {"w": jnp.zeros((2, 2))}, [{"w": jnp.eye(2)}],
      ...                              lambda key: [jnp.ones((1, 2))], jax.random.key(0), steps=2, adaptation_steps=2)
      >>> found.logits["w"].shape, found.coefficients["w"].shape
      ((2, 2), (1,))
    """
    check_choice("concrete_ada_merging: coefficients", coefficients, ("task", "layer"))
    check_choice("concrete_ada_merging: lam_at", lam_at, ("start", "previous"))
    check_int("concrete_ada_merging: steps", steps)
    logits, first = init_logits(vectors), _start(vectors, coefficients, start)
    outer, inner = optax.adam(learning_rate), optax.adam(inner_rate)

    def entropy(lam: Any, mask: Params, batches: Sequence[Any]) -> jax.Array:
        return total_entropy(apply, add_masked(base, vectors, lam, mask), batches)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        logits, state, lam, moments = carry
        draw, again, one, two = jax.random.split(key, 4)
        mask = jax.lax.stop_gradient(sample_mask(draw, logits, temperature))
        slope = jax.grad(entropy)(first if lam_at == "start" else lam, mask, inputs(one))
        updates, moments = inner.update(slope, moments)
        lam = optax.apply_updates(first, updates)
        lam = _clamped(lam) if clamp else lam
        batches, key = inputs(two), again if resample_outer else draw

        def loss(logits: Params) -> jax.Array:
            return entropy(lam, sample_mask(key, logits, temperature), batches)

        value, gradient = jax.value_and_grad(loss)(logits)
        updates, state = outer.update(gradient, state)
        return (optax.apply_updates(logits, updates), state, lam, moments), value

    last, phase, key = jax.random.split(key, 3)
    keys = jax.random.split(key, steps)
    carry = (logits, outer.init(logits), first, inner.init(first))
    (logits, *_), losses = jax.jit(functools.partial(jax.lax.scan, step))(carry, keys)
    mask = sample_mask(last, logits, temperature, discrete=discrete)
    end = ada_merging(
        apply, base, vectors, inputs, phase, coefficients=coefficients, mask=mask, start=start,
        steps=adaptation_steps, learning_rate=adaptation_rate, clamp=clamp,
    )  # fmt: skip
    return Concrete(end.params, logits, end.coefficients, losses)


def _start(vectors: Sequence[Params], coefficients: Coefficients, start: float) -> Any:
    one = jnp.full(len(vectors), start, jnp.float32)
    if coefficients == "task":
        return one
    return {path: one for path, leaf in leaves_with_paths(vectors[0]) if leaf is not None}


def _clamped(lam: Any) -> Any:
    return jax.tree.map(lambda v: jnp.clip(v, 0.0, 1.0), lam)
