"""`comp_lora`, and its confinement for other low-rank methods."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import InitFn, Leaf, Method, Params, PlanFn, Role, check_rank
from subspace_jax.methods.low_rank.comp_lora._bases import Protect, Sides, check_options, directions
from subspace_jax.methods.low_rank.comp_lora._weight import ComplementLowRank
from subspace_jax.methods.low_rank.lora import lora
from subspace_jax.weights import LowRank, map_weights


def comp_lora(
    rank: int = 2,
    *,
    alpha: float = 1.0,
    rank_stabilized: bool = True,
    protect: Protect = None,
    energy: float = 0.5,
    sides: Sides = "both",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains a low-rank addition orthogonal to a weight's principal directions: \(W + s\,P_{in}\,a\,b\,P_{out}\).

    With \(W = U \Sigma V^T\): \(P_{in} = I - U_p U_p^T\) and \(P_{out} = I - V_p V_p^T\). Whatever is learned,
    \(u_i, \sigma_i, v_i\) for \(i \le p\) remain singular triples of the adapted weight, and inputs in the span of
    \(U_p\) give what they gave before (without dropout). With sides "in" alone \(W'^T u_i = \sigma_i v_i\), with "out"
    alone \(W' v_i = \sigma_i u_i\). No further values are trained.

    Args:
      rank: \(r\).
      alpha: \(s = \alpha / \sqrt r\), as in the CLIP-LoRA code that the publication extends.
      rank_stabilized: False for \(s = \alpha / r\).
      protect: \(p\), at most one below the smaller side for "both" sides; "all_but_rank" leaves \(r\) directions; None
        takes it from the spectrum. The publication's rule was not to be had.
      energy: share of the squared singular values that the protected directions hold, for `protect=None`; at least
        one direction is left, and where fewer than \(r\) are, `adapt` warns.
      sides: "both", "in" or "out".
      dropout: probability of dropping an input of the addition in training; CLIP-LoRA has 0.25.
      dtype: dtype of `a` and `b`; directions and projections are in float32.

    Returns:
      A method whose weights are `ComplementLowRank`, with `a` and `b` as LoRA starts them, and the frozen directions
      `[*stack, in, p]` and `[*stack, out, p]`. Stacked layers with different automatic \(p\) have columns of zeros.

    Raises:
      RankError: `rank` is not a positive integer, or `protect` leaves nothing; raised by `adapt`, with the path.
      ValueError: another option is out of its range.

    Note:
      A step has \(4 r p\,(d_{in} + d_{out})\) operations more than LoRA's for the projections, forward, and as many
      backward, whatever the number of rows. `dora(comp_lora(...))` scales whole columns, protected directions included.
      A fused kernel of query, key and value is to be split first, or its directions are those of all three. Files of
      `save_adapter` hold the directions, \(p\,(d_{in} + d_{out})\) values; those of `comp_lora.to_lora` do not.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (6, 5))
      >>> method = sj.methods.comp_lora.comp_lora(2, protect=2)
      >>> adapted = sj.adapt({"w": w}, {"w": method}, key=jax.random.key(0))
      >>> adapted["w"].protected_in.shape, sj.summary(adapted).trainable
      ((6, 2), 22)
    """
    check_rank(rank, what="comp_lora: rank")
    check_options("comp_lora", protect, energy, sides)
    try:
        inner = lora(rank, alpha=alpha, rank_stabilized=rank_stabilized, dropout=dropout, dtype=dtype)
    except ValueError as error:
        raise type(error)(str(error).replace("lora:", "comp_lora:", 1)) from error
    name = "comp_lora" if sides == "both" else f"comp_lora[{sides}]"  # reports say which guarantee holds
    return confine(inner, protect=protect, energy=energy, sides=sides)._replace(name=name)


def confine(method: Method, *, protect: Protect = None, energy: float = 0.5, sides: Sides = "both") -> Method:
    r"""Confines another method's low-rank addition to the complement of a weight's principal directions.

    For `o_lora` the adapter of every task is confined, so that no task of a stream changes the protected triples:
    `o_lora.next_task` stores the projected factors.

    Args:
      method: one whose weights are `LowRank` with both factors trained, on the weight's own array: `lora`, `o_lora`.
      protect: \(p\); see `comp_lora`. "all_but_rank" goes by the rank of the method.
      energy: likewise.
      sides: likewise.

    Returns:
      A method whose weights are `ComplementLowRank`.

    Raises:
      TypeError: `method` is not a method, or, from `adapt`, its weights are others.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.comp_lora.confine(sj.o_lora(2, tasks=3), protect=1)
      >>> w = jax.random.normal(jax.random.key(1), (6, 5))
      >>> adapted = sj.adapt({"w": w}, {"w": method}, key=jax.random.key(0))
      >>> float(sj.methods.o_lora.penalty(adapted)), adapted["w"].method
      (0.0, 'comp(o_lora)')
    """
    if not isinstance(method, Method):
        raise TypeError(f"confine: takes a method such as confine(lora(rank=8)), not {type(method).__name__}.")
    check_options("confine", protect, energy, sides)

    def make(init: InitFn, key: jax.Array, array: jax.Array, role: Role, stats: Any) -> ComplementLowRank:
        inner = init(key, array, role, stats)
        if type(inner) is not LowRank or inner.start_a is not None or {"a", "b"} - set(inner.trainable):
            raise TypeError(
                f"confine: {method.name} makes {type(inner).__name__}; only a LowRank on the weight's own array whose "
                "factors both learn can be confined, as lora(rank=8) makes it."
            )
        left, right = directions(array, role, protect, energy, sides, rank=inner.rank)
        fields = {f.name: getattr(inner, f.name) for f in dataclasses.fields(inner)}
        return ComplementLowRank(**fields, protected_in=left, protected_out=right)

    def plan(inner: PlanFn, key: jax.Array, leaves: Mapping[str, Leaf]) -> dict[str, InitFn]:
        return {path: functools.partial(make, init) for path, init in inner(key, leaves).items()}

    planned = method.plan and functools.partial(plan, method.plan)
    name = "comp" if sides == "both" else f"comp[{sides}]"
    return Method(f"{name}({method.name})", functools.partial(make, method.init), method.needs, planned)


def reproject(adapted: Params) -> Params:
    """Projects the stored factors; the function stays as it is.

    Gradients do not depend on what is projected away, so with SGD, momentum, Adam and decoupled decay it makes no
    difference to training, however often it is called. It does where an update reads the factors nonlinearly: decay
    inside Adam's gradient, or rates that go by norms.

    Args:
      adapted: a tree with weights of `comp_lora`, also inside others; other leaves stay as they are.

    Returns:
      A tree like the given one.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jnp.diag(jnp.array([2.0, 1.0]))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.methods.comp_lora.comp_lora(1, protect=1)}, key=jax.random.key(0))
      >>> float(sj.methods.comp_lora.reproject(adapted)["w"].a[0, 0])
      0.0
    """

    def one(_: str, weight: ComplementLowRank) -> ComplementLowRank:
        a, b = weight.original_factors()
        return dataclasses.replace(weight, a=a.astype(weight.a.dtype), b=b.astype(weight.b.dtype))

    return map_weights(ComplementLowRank, one, adapted)


def to_lora(adapted: Params) -> Params:
    """Turns confined weights into plain LoRA with the projected factors, to be saved, served or trained on freely.

    Args:
      adapted: a tree with weights of `comp_lora`, also inside others; other leaves stay as they are.

    Returns:
      The tree with `LowRank` weights of the same function.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jnp.diag(jnp.array([2.0, 1.0]))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.methods.comp_lora.comp_lora(1, protect=1)}, key=jax.random.key(0))
      >>> type(sj.methods.comp_lora.to_lora(adapted)["w"]).__name__
      'LowRank'
    """

    def one(_: str, weight: ComplementLowRank) -> LowRank:
        plain = weight.plain()
        a, b = plain.a.astype(weight.a.dtype), plain.b.astype(weight.b.dtype)
        return dataclasses.replace(plain, a=a, b=b, base=weight.base, method="lora")

    return map_weights(ComplementLowRank, one, adapted)
