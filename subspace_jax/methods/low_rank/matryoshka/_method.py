"""`matryoshka`, and functions that cut its adapters to a smaller rank."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from subspace_jax.core import InitFn, Leaf, Method, Params, PlanFn, RankError, Role, check_choice, check_int, check_rank
from subspace_jax.methods.low_rank.matryoshka._weight import NestedLowRank, RankScale
from subspace_jax.weights import LowRank, map_weights

Inference = Literal["published", "keep_p"]


def matryoshka(
    method: Method,
    *,
    ranks: Sequence[int] | None = None,
    rank_scale: RankScale = "none",
    normalize: bool = False,
    a_init: Literal["official", "lora"] = "official",
) -> Method:
    r"""Trains one LoRA whose leading \(r\) columns and rows are an adapter of rank \(r\), for every \(r\) of a set.

    \(W + a\,\mathrm{diag}(p)\,b\) with \(p_i = \sum_{r \in S,\, r \ge i} s(r)\): one product gives the sum of the
    adapters of every rank in \(S\), at the cost of LoRA. `at_rank` uses one of them, `truncate_rank` cuts it out as
    plain LoRA, and `sample_rank` trains one random rank at each step, which is DyLoRA.

    Args:
      method: a low-rank method that starts at zero, such as `lora(rank=16)`. Its rank is the largest, and its scale
        multiplies everything (the published method has none: leave `alpha` out).
      ranks: \(S\); powers of two up to the method's rank, and that rank, if None. Ranks above it are dropped.
      rank_scale: \(s(r)\): "none" is 1, "rank" \(1/r\), "sqrt" \(1/\sqrt{r}\).
      normalize: divide \(p\) by the number of ranks.
      a_init: "official" widens the method's draw of `a` by \(\sqrt{d_{in} / R}\), as the authors' initializer does,
        whose fan is the rank; "lora" leaves it.

    Returns:
      A method whose weights are `NestedLowRank`. `matryoshka(lora(R), ranks=(R,))` is LoRA with scale \(s(R)\).

    Raises:
      RankError: no rank is left, or one is not a positive integer.
      TypeError: `method` is not a method, or, from `adapt`, its weights are not `LowRank` ones that start at zero.

    Warning:
      In training the ranks add up; alone, each is smaller than what was trained. `at_rank(..., inference="keep_p")`
      keeps the gains of training, and at the largest rank is exactly the trained function.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jnp.ones((6, 4))}
      >>> adapted = sj.adapt(params, {"w": sj.matryoshka(sj.lora(8))}, key=jax.random.key(0))
      >>> adapted["w"].gains.tolist()
      [4.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
      >>> sj.methods.matryoshka.truncate_rank(adapted, 2)["w"].a.shape
      (6, 2)

    References:
      Valipour et al., DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
      Adaptation, 2023.
    """
    if not isinstance(method, Method):
        raise TypeError(f"matryoshka: takes a method such as matryoshka(lora(rank=16)), not {type(method).__name__}.")
    check_choice("matryoshka: rank_scale", rank_scale, get_args(RankScale))
    check_choice("matryoshka: a_init", a_init, ("official", "lora"))
    if ranks is not None:
        ranks = tuple(check_rank(rank, what="matryoshka: a rank of ranks") for rank in ranks)

    def make(init: InitFn, key: jax.Array, array: jax.Array, role: Role, stats: Any) -> NestedLowRank:
        inner = init(key, array, role, stats)
        if type(inner) is not LowRank or inner.start_a is not None:
            raise TypeError(
                f"matryoshka: {method.name} makes {type(inner).__name__}; its columns add up from zero only over a "
                "LowRank that starts at zero, as lora(rank=16) does."
            )
        kept = _ranks(ranks, inner.rank)
        a = inner.a
        if a_init == "official":
            a = a * jnp.asarray(math.sqrt(a.shape[-2] / inner.rank), a.dtype)
        fields = {f.name: getattr(inner, f.name) for f in dataclasses.fields(inner)}
        return NestedLowRank(
            **{**fields, "a": a},
            gains=jnp.asarray(training_gains(kept, inner.rank, rank_scale, normalize)),
            ranks=kept,
            rank_scale=rank_scale,
            normalize=normalize,
        )

    def plan(inner: PlanFn, key: jax.Array, leaves: Mapping[str, Leaf]) -> dict[str, InitFn]:
        return {path: functools.partial(make, init) for path, init in inner(key, leaves).items()}

    planned = method.plan and functools.partial(plan, method.plan)
    return Method(f"matryoshka({method.name})", functools.partial(make, method.init), method.needs, planned)


def _ranks(ranks: Sequence[int] | None, largest: int) -> tuple[int, ...]:
    if ranks is None:
        return tuple(sorted({2**i for i in range(largest.bit_length()) if 2**i <= largest} | {largest}))
    kept = tuple(sorted({r for r in ranks if r <= largest}))
    if not kept:
        raise RankError(f"matryoshka: ranks={tuple(ranks)} are all above the adapter's rank {largest}.")
    return kept


def _scale(rank: Any, rank_scale: RankScale) -> Any:
    """The scale of an adapter of `rank` used alone; of one rank or of an array of them."""
    return {"none": lambda r: 1.0 + 0.0 * r, "rank": lambda r: 1.0 / r, "sqrt": lambda r: r**-0.5}[rank_scale](rank)


def training_gains(ranks: Sequence[int], largest: int, rank_scale: RankScale, normalize: bool = False) -> np.ndarray:
    """Returns the diagonal between the factors: a running sum of scales from the largest index down.

    Args:
      ranks: ascending, none above `largest`.
      largest: length of the diagonal.
      rank_scale: scale of a rank r used alone: "none" is 1, "rank" 1 / r, "sqrt" one over the root of r.
      normalize: divide by the number of ranks.

    Returns:
      `[largest]` in float32.

    Example:
      >>> training_gains((1, 2, 4), 4, "none").tolist()
      [3.0, 2.0, 1.0, 1.0]
    """
    steps = np.zeros(largest)
    steps[np.asarray(ranks) - 1] = _scale(np.asarray(ranks, np.float64), rank_scale)
    gains = np.cumsum(steps[::-1])[::-1]
    return np.asarray(gains / (len(ranks) if normalize else 1), np.float32)


def at_rank(adapted: Params, rank: int | jax.Array, *, inference: Inference = "published") -> Params:
    r"""Sets the rank at which every nested adapter of a tree works.

    Args:
      adapted: a tree with `NestedLowRank` weights; other leaves stay as they are.
      rank: \(r\); may be traced, so that one program serves every rank, and `jax.vmap` a mean loss over ranks.
      inference: "published" uses \(s(r)\) on the first \(r\) columns; "keep_p" keeps the gains of training on them.

    Raises:
      RankError: a concrete `rank` is outside 1..R, or `rank` is not an integer.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.matryoshka(sj.lora(4))}, key=jax.random.key(0))
      >>> sj.methods.matryoshka.at_rank(adapted, 2)["w"].gains.tolist()
      [1.0, 1.0, 0.0, 0.0]
      >>> sj.methods.matryoshka.at_rank(adapted, 2, inference="keep_p")["w"].gains.tolist()
      [3.0, 2.0, 0.0, 0.0]
    """
    check_choice("at_rank: inference", inference, get_args(Inference))

    def one(_: str, weight: NestedLowRank) -> NestedLowRank:
        _check_within(rank, weight)
        return dataclasses.replace(weight, gains=_gains_at(weight, rank, inference))

    return map_weights(NestedLowRank, one, adapted)


def _gains_at(weight: NestedLowRank, rank: int | jax.Array, inference: Inference) -> jax.Array:
    leading = jnp.arange(weight.rank) < rank
    if inference == "keep_p":
        # From the metadata, not from the tree: the gains there may be those of another rank.
        trained = training_gains(weight.ranks, weight.rank, weight.rank_scale, weight.normalize)
        return jnp.where(leading, trained, 0.0)
    return jnp.where(leading, _scale(jnp.asarray(rank, jnp.float32), weight.rank_scale), 0.0).astype(jnp.float32)


def _check_within(rank: int | jax.Array, weight: NestedLowRank) -> None:
    """Refuses a rank that the adapter has not; a traced integer may be any."""
    if not isinstance(rank, Tracer):
        check_int("rank", rank, most=weight.rank)
    elif rank.ndim or not jnp.issubdtype(rank.dtype, jnp.integer):
        raise RankError(f"rank is a traced {rank.dtype}{list(rank.shape)}: expected an integer scalar.")


def sample_rank(
    adapted: Params, key: jax.Array, *, only_last: bool = False, every_rank: bool = False
) -> tuple[Params, jax.Array]:
    """Draws one rank for a training step and works at it in every layer, as DyLoRA does.

    Call it inside the differentiated function, with another key at every step and the same key on every host.

    Args:
      adapted: a tree with `NestedLowRank` weights of one set of ranks.
      key: a random key; it is consumed.
      only_last: learn the last of the drawn columns alone, the frozen variant of DyLoRA.
      every_rank: draw from 1..R, as the original DyLoRA does, in place of the adapters' own ranks. Its scale alpha / r
        is `matryoshka(lora(R, alpha=alpha * R), rank_scale="rank")`.

    Returns:
      The tree, and the rank, a scalar integer.

    Raises:
      RankError: there is no nested adapter, or they differ in their ranks.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.matryoshka(sj.lora(4))}, key=jax.random.key(0))
      >>> _, rank = sj.methods.matryoshka.sample_rank(adapted, jax.random.key(3))
      >>> int(rank) in (1, 2, 4)
      True
    """
    found: list[NestedLowRank] = []
    map_weights(NestedLowRank, lambda _, weight: (found.append(weight), weight)[1], adapted)
    sets = {tuple(range(1, w.rank + 1)) if every_rank else w.ranks for w in found}
    if len(sets) != 1:
        raise RankError(
            f"sample_rank: the tree has nested adapters of the rank sets {sorted(sets)}; one rank is drawn for all "
            "layers, so they must agree (and there must be one)."
        )
    rank = jax.random.choice(key, jnp.asarray(sets.pop()))

    def one(_: str, weight: NestedLowRank) -> NestedLowRank:
        a, b = weight.a, weight.b
        if only_last:
            last = jnp.arange(weight.rank) == rank - 1
            a = jnp.where(last, a, jax.lax.stop_gradient(a))
            b = jnp.where(last[:, None], b, jax.lax.stop_gradient(b))
        return dataclasses.replace(weight, a=a, b=b, gains=_gains_at(weight, rank, "published"))

    return map_weights(NestedLowRank, one, adapted), rank


def truncate_rank(adapted: Params, rank: int, *, inference: Inference = "published") -> Params:
    """Cuts out the adapter of one rank as plain LoRA, to be saved or served alone.

    Args:
      adapted: a tree with `NestedLowRank` weights; other leaves stay as they are.
      rank: a Python int, as shapes depend on it.
      inference: "published" uses the scale of the rank itself; "keep_p" keeps the gains of training.

    Returns:
      The tree with `LowRank` weights of `a` `[*stack, in, rank]`; the gains are multiplied into `b`.

    Raises:
      RankError: `rank` is outside 1..R.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.matryoshka(sj.lora(4))}, key=jax.random.key(0))
      >>> type(sj.methods.matryoshka.truncate_rank(adapted, 1)["w"]).__name__
      'LowRank'
    """
    check_rank(rank)
    masked = at_rank(adapted, rank, inference=inference)

    def one(_: str, weight: NestedLowRank) -> LowRank:
        gains = weight.gains[:rank, None].astype(weight.b.dtype)
        return weight.as_low_rank(weight.a[..., :rank], weight.b[..., :rank, :] * gains)

    return map_weights(NestedLowRank, one, masked)
