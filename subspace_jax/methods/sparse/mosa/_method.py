"""`mosa`: an adapter split into parts, its merging, and the loss of two passes with different parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.core import InitFn, Leaf, Method, Params, check_choice, check_int, check_number, check_probability
from subspace_jax.core import with_dropout as with_keys
from subspace_jax.methods.sparse.mosa._weight import MixedAdapter
from subspace_jax.modules import Activation, Bottleneck, bottleneck
from subspace_jax.weights import hidden_zeros, map_weights

Share = Literal["down", "up", "none"]
Split = Literal["entries", "rows", "columns"]


def mosa(
    size: int,
    *,
    parts: int = 4,
    share: Share = "down",
    placement: Literal["sequential", "parallel"] = "sequential",
    reads: str | None = None,
    bias: bool = True,
    activation: Activation = "gelu",
    scale: float = 1.0,
    norm: bool = True,
    dropout: float = 0.1,
    split: Split = "entries",
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains an adapter by random parts of its entries, one in each pass; merged, it is a plain adapter.

    Every entry of a split kernel belongs to one of \(N\) parts of equal size, drawn once. A training pass, that is one
    on `sj.with_dropout(adapted, key)`, uses one part of every adapter, drawn for the whole batch; without it all parts
    are merged, \(K_0 + (K - K_0) / N\), which for a shared `down` is the mean of the passes over the draw. One array
    and its owners stand for the release's \(N\) copies with masked gradients, at \(1/N\) of their memory: the same
    parameters under SGD, and under Adam with one counter of steps for all parts, which see zero gradients where they
    are not drawn.

    Train on `two_pass_loss`. Hosts, as in `sj.bottleneck`: AdaptFormer is `placement="parallel", reads="fc1",
    scale=0.1`; Pfeiffer is sequential with "relu" on the feed-forward layer; Houlsby is sequential with "silu" and
    `norm=False` after attention and after the feed-forward layer. What a module can read differs from the release:
    the kernel's input (behind the model's norm) or its output, not the stream around them.

    Args:
      size: \(b\): 64, or 16 on VTAB.
      parts: \(N\): 4; 2 for Stanford Cars and for several tasks.
      share: which kernel is not split: "down", "up" (Cars), "none" (several tasks).
      placement: as in `sj.bottleneck`.
      reads: as in `sj.bottleneck`.
      bias: as in `sj.bottleneck`.
      activation: "gelu" in AdaptFormer, its exact form.
      scale: also of the last bias.
      norm: a layer norm of the adapter's own on what it reads, with eps 1e-6.
      dropout: of hidden features, in training passes.
      split: by "entries" as published; by whole "rows" or "columns" are in the released code as well.
      dtype: of what learns.

    Returns:
      A method whose weights are `MixedAdapter` and, where an input is kept, `KeptInput`. A split kernel has a bias for
      each part. They cannot be merged into an array; `merge_parts` makes plain adapters of them.

    Raises:
      PatternError: from `adapt`: as `sj.bottleneck`.
      ValueError: an option is out of range.

    Note:
      Published optimizer: AdamW with decay 0.01 of kernels, at 5e-4 to 5e-3, whose eps of 1e-6 is added before the bias
      is corrected: `sj.methods.lift.lift_adam(rate, b2=0.999, eps=1e-6)`, except that the release decays after its
      update. That entries which were not drawn rest entirely, and the term on hidden states, are left out. The
      owners are data: they are frozen, and stored with the adapter. A decayed `down` that is split does not shrink
      its common start here, as the release's copies do.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"fc2": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
      >>> adapted = sj.adapt(params, {"fc2/*": sj.methods.mosa.mosa(2, parts=2)}, key=jax.random.key(0))
      >>> [int(jnp.sum(adapted["fc2"]["kernel"].up_owner == part)) for part in range(2)]
      [4, 4]
    """
    parts = check_int("mosa: parts", parts, most=127)
    check_choice("mosa: share", share, ("down", "up", "none"))
    check_choice("mosa: split", split, ("entries", "rows", "columns"))
    check_probability("mosa: dropout", dropout)
    host = bottleneck(
        size, placement=placement, reads=reads, bias=bias, activation=activation, scale=scale, dtype=dtype
    )

    def mixed(init: InitFn) -> InitFn:
        def make(key: jax.Array, array: jax.Array, role: Any, stats: Any) -> Any:
            plain = init(key, array, role, stats)
            return _split(plain, key) if isinstance(plain, Bottleneck) else plain

        return make

    def _split(plain: Bottleneck, key: jax.Array) -> MixedAdapter:
        keys = jax.random.split(jax.random.fold_in(key, 1), 4)
        stack, features = plain.down.shape[:-2], plain.down.shape[-2]
        splits = {"down": share in ("up", "none"), "up": share in ("down", "none")}
        biases, owners = {}, {}
        for i, (name, is_split) in enumerate(splits.items()):
            kernel = getattr(plain, name)
            shape = (*stack, parts if is_split else 1, kernel.shape[-1])
            biases[f"{name}_bias"] = hidden_zeros(keys[i], shape, dtype)
            owners[f"{name}_owner"] = _owners(keys[2 + i], kernel.shape, parts, split) if is_split else None
        learned = {"norm_scale": jnp.ones((*stack, features), dtype), "norm_bias": jnp.zeros((*stack, features), dtype)}
        fields: dict[str, Any] = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
        fields |= {**biases, **owners, **(learned if norm else {})}
        fields["trainable"] = (*plain.trainable, *(learned if norm else ()))
        start = jnp.copy(plain.down) if splits["down"] else None
        return MixedAdapter(**fields, down_start=start, parts=parts, dropout=dropout)

    def plan(key: jax.Array, leaves: Mapping[str, Leaf]) -> Mapping[str, InitFn]:
        planned = host.plan(key, leaves) if host.plan else {}
        return {path: mixed(init) for path, init in planned.items()}

    return Method("mosa", mixed(host.init), plan=plan)


def _owners(key: jax.Array, shape: tuple[int, ...], parts: int, split: Split) -> jax.Array:
    """Which part owns each entry: that of the rank of a random score, so that sizes differ by one at most."""
    stack, (rows, columns) = shape[:-2], shape[-2:]
    scored = {"entries": (rows, columns), "rows": (rows, 1), "columns": (1, columns)}[split]
    count = scored[0] * scored[1]
    scores = jax.random.uniform(key, (*stack, count))
    ranks = jnp.argsort(jnp.argsort(scores, axis=-1), axis=-1)
    owners = (ranks * parts // count).astype(jnp.int8).reshape(*stack, *scored)
    return jnp.broadcast_to(owners, shape)


def merge_parts(adapted: Params) -> Params:
    r"""Merges the parts of every adapter: \(K_0 + (K - K_0) / N\) and the mean of the biases.

    What comes out is a plain adapter, of the same output as the tree without keys, and of a plain one's size and cost.
    Evaluate the tree itself, which merges in passing, as long as training goes on.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jnp.ones((8, 4))}
      >>> adapted = sj.adapt(params, {"w": sj.methods.mosa.mosa(2, bias=False, norm=False)}, key=jax.random.key(0))
      >>> sj.summary(adapted).trainable, sj.summary(merge_parts(adapted)).trainable
      (34, 22)
    """

    def merged(path: str, weight: MixedAdapter) -> MixedAdapter:
        del path
        one = dataclasses.replace(weight, dropout_key=None)
        down, up = one.kernels()
        means = {name: jnp.mean(getattr(one, name), axis=-2, keepdims=True) for name in ("down_bias", "up_bias")}
        return dataclasses.replace(
            one, down=down, up=up, **means, down_owner=None, up_owner=None, down_start=None, parts=1
        )

    return map_weights(MixedAdapter, merged, adapted)


class TwoPasses(NamedTuple):
    """Result of `two_pass_loss`: the loss and its parts.

    Attributes:
      loss: the sum that is trained.
      task: loss of the first pass.
      consistency: \\(R\\).
    """

    loss: jax.Array
    task: jax.Array
    consistency: jax.Array


def two_pass_loss(
    logits: Callable[[Params], jax.Array],
    adapted: Params,
    task_loss: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    *,
    add: float = 0.0,
    reg: float = 1.0,
) -> TwoPasses:
    r"""Returns MoSA's loss of a batch: two passes with parts and dropout of their own, and how far they are apart.

    \(L(z_1) + w_{add}\,L(z_2) + w_{reg}\,R\), with \(R\) of `consistency`.

    Args:
      logits: `logits(adapted)`, the model's on the batch, made with `sj.with_adapters`.
      adapted: the tree, without keys.
      task_loss: of logits.
      key: a random key; consumed. Another one at every step.
      add: \(w_{add}\).
      reg: \(w_{reg}\).

    Returns:
      The loss, that of the first pass, and how far both are apart.

    Raises:
      ValueError: `add` or `reg` is negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((8, 4))}, {"w": sj.methods.mosa.mosa(2, bias=False)}, key=jax.random.key(0))
      >>> run = sj.with_adapters(lambda p: jnp.ones((3, 8)) @ p["w"])
      >>> found = two_pass_loss(run, adapted, lambda z: jnp.mean(z * z), jax.random.key(1))
      >>> float(found.loss), float(found.consistency)
      (64.0, 0.0)
    """
    check_number("two_pass_loss: add", add, least=0.0)
    check_number("two_pass_loss: reg", reg, least=0.0)
    first, second = (logits(with_keys(adapted, one)) for one in jax.random.split(key))
    task, apart = task_loss(first), consistency(first, second)
    total = task + reg * apart
    return TwoPasses(total + add * task_loss(second) if add else total, task, apart)


def consistency(first: jax.Array, second: jax.Array) -> jax.Array:
    r"""Returns \(R = \frac12 [KL(\bar p_2 \| p_1) + KL(\bar p_1 \| p_2)]\), the mean over rows of logits, in float32.

    \(\bar p\) is held fixed in differentiation.

    Args:
      first: logits `[..., classes]`.
      second: logits of the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> float(consistency(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])))
      0.0
    """
    logs = [jax.nn.log_softmax(z.astype(jnp.promote_types(z.dtype, jnp.float32))) for z in (first, second)]

    def divergence(target: jax.Array, log: jax.Array) -> jax.Array:
        target = jax.lax.stop_gradient(target)
        return jnp.mean(jnp.sum(jnp.exp(target) * (target - log), axis=-1))

    return 0.5 * (divergence(logs[1], logs[0]) + divergence(logs[0], logs[1]))
