"""Changes the rank of low-rank adapters, keeping the best of what they learned."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    Params,
    PatternError,
    RankError,
    StructureError,
    check_choice,
    check_int,
    check_rank,
    key_for,
    matches,
    nearest,
)
from subspace_jax.linalg import SVD, product_svd, randomized_svd, wide_matmul
from subspace_jax.weights import LowRank, map_weights

Alpha = Literal["proportional", "sqrt", "fixed"]
Algorithm = Literal["factored", "dense"]

# Values at or below this share of the largest are rounding; their channels keep one side, and can learn again.
DEAD = 1e-6


def squeeze(
    adapted: Params,
    rank: int | Mapping[str, int],
    *,
    alpha: Alpha = "proportional",
    algorithm: Algorithm = "factored",
    oversample: int = 10,
    iterations: int = 2,
    key: jax.Array | None = None,
) -> Params:
    r"""Changes the rank of LoRAs: \(s'\,a' b'\) is the best approximation of \(s\,a\,b\) of the new rank.

    With \(a\,b = U\,\mathrm{diag}(S)\,V^T\): \(a' = \sqrt{s / s'}\,U_k S_k^{1/2}\) and
    \(b' = \sqrt{s / s'}\,S_k^{1/2} V_k^T\), as large as each other. Shapes change, so call it outside of jit, and
    make the optimizer's state anew, or by `squeeze_state`.

    Args:
      adapted: a tree with weights of `lora`, also inside `dora` (whose magnitude stays, so that its columns keep their
        lengths and the directions are approximated). Other leaves stay as they are.
      rank: \(k\), for all, or by path or glob; adapters that none names stay as they are. A larger rank than there
        is adds columns drawn as LoRA's are, and rows of zeros.
      alpha: what becomes of the scale, which the function does not depend on: "proportional" keeps \(s\) (alpha
        falls with the rank), "fixed" keeps alpha, so that \(s' = s\,r / k\), or \(s \sqrt{r / k}\) where the scale is
        rank-stabilized, and "sqrt" lets alpha fall as the root of the rank.
      algorithm: "factored" decomposes through the factors, exactly; "dense" forms \(a\,b\) and decomposes it at
        random, the publication's first algorithm, which needs a key.
      oversample: extra columns of the dense one.
      iterations: its power iterations.
      key: draws the test matrix of the dense algorithm, and columns that are added.

    Returns:
      The tree with `LowRank` weights of `a` `[*stack, in, k]` and `b` `[*stack, k, out]`, in their dtypes. Where the
      adapter has less than rank \(k\), a spare column is a direction of length 1 and its row zero, so that it can
      learn.

    Raises:
      RankError: a rank is not a positive integer, or columns are to be drawn and there is no key.
      PatternError: a glob of `rank` matches no adapter.
      StructureError: there is no LoRA in the tree, or one that is not of `lora`; the message has the path.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(rank=3)}, key=jax.random.key(0))
      >>> small = sj.methods.lora_squeeze.squeeze(adapted, 1)
      >>> small["w"].a.shape, small["w"].b.shape, bool((small["w"].b == 0).all())
      ((6, 1), (1, 4), True)
    """
    check_choice("squeeze: alpha", alpha, get_args(Alpha))
    check_choice("squeeze: algorithm", algorithm, get_args(Algorithm))
    oversample = check_int("squeeze: oversample", oversample, least=0)
    iterations = check_int("squeeze: iterations", iterations, least=0)
    if algorithm == "dense" and key is None:
        raise RankError("squeeze: the dense algorithm draws a random matrix; pass key=.")
    wanted = target_ranks(adapted, rank)

    def one(path: str, weight: LowRank) -> LowRank:
        if path not in wanted:
            return weight
        own = None if key is None else key_for(key, path)
        found = _decompose(weight, min(wanted[path], *_limits(weight)), algorithm, oversample, iterations, own)
        scale = weight.scale * _factor(weight, wanted[path], alpha)
        a, b = _balanced(found, jnp.sqrt(weight.scale / scale))
        a, b = _padded(path, a, b, wanted[path], own)
        fields: dict[str, Any] = {"a": a.astype(weight.a.dtype), "b": b.astype(weight.b.dtype), "scale": scale}
        return dataclasses.replace(weight, **fields, dropout_key=None)

    return map_weights(LowRank, one, adapted)


def loras(adapted: Params) -> dict[str, LowRank]:
    """Returns the LoRAs of a tree by path.

    Raises:
      StructureError: there is none, or one whose factors are more than a sum over columns.
    """
    found: dict[str, LowRank] = {}

    def one(path: str, weight: LowRank) -> LowRank:
        if type(weight) is not LowRank or weight.start_a is not None or {"a", "b"} - set(weight.trainable):
            raise StructureError(
                f"{path}: squeeze: the {type(weight).__name__} of {weight.method!r} is no LoRA on the untouched array "
                "with two factors that learn. Convert it first, by sj.to_lora for PiSSA and CorDA or truncate_rank of "
                "matryoshka, or squeeze a tree without it."
            )
        found[path] = weight
        return weight

    map_weights(LowRank, one, adapted)
    if not found:
        raise StructureError("squeeze: the tree holds no LoRA; give what adapt() or load_adapter() returned.")
    return found


def target_ranks(adapted: Params, rank: int | Mapping[str, int]) -> dict[str, int]:
    """Returns the wanted rank of every adapter that gets one, by path."""
    paths = loras(adapted)
    if not isinstance(rank, Mapping):
        return dict.fromkeys(paths, check_rank(rank, what="squeeze: rank"))
    for pattern, one in rank.items():
        check_rank(one, what=f"squeeze: rank of {pattern!r}")
        if not any(matches(pattern, path) for path in paths):
            raise PatternError(
                f"squeeze: rank has {pattern!r}, which matches no LoRA; nearest are "
                f"{nearest(pattern.replace('**/', ''), paths)}."
            )
    first = {path: next((r for pattern, r in rank.items() if matches(pattern, path)), None) for path in paths}
    return {path: int(found) for path, found in first.items() if found is not None}


def _limits(weight: LowRank) -> tuple[int, int, int]:
    return weight.rank, weight.a.shape[-2], weight.b.shape[-1]


def _decompose(
    weight: LowRank, rank: int, algorithm: Algorithm, oversample: int, iterations: int, key: jax.Array | None
) -> SVD:
    if algorithm == "factored" or key is None:
        found = product_svd(weight.a, weight.b)
        return SVD(found.u[..., :rank], found.s[..., :rank], found.vt[..., :rank, :])
    matrix = wide_matmul(weight.a, weight.b)
    return randomized_svd(jax.random.fold_in(key, 1), matrix, rank, iterations=iterations, oversample=oversample)


def _factor(weight: LowRank, rank: int, alpha: Alpha) -> float:
    """How the scale changes with the rank."""
    ratio = weight.rank / rank
    fixed = math.sqrt(ratio) if weight.rank_stabilized else ratio
    return {"proportional": 1.0, "fixed": fixed, "sqrt": fixed / math.sqrt(ratio)}[alpha]


@jax.jit
def _balanced(found: SVD, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors that share the singular values evenly; dead channels keep their direction on the inputs' side."""
    live = found.s > DEAD * jnp.max(found.s, axis=-1, keepdims=True)
    root = jnp.sqrt(found.s) * factor
    a = found.u * jnp.where(live, root, 1.0)[..., None, :]
    return a, found.vt * jnp.where(live, root, 0.0)[..., :, None]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: jax.Array, shape: tuple[int, ...], columns: int) -> jax.Array:
    bound = 1.0 / math.sqrt(shape[-2])
    return jax.random.uniform(key, (*shape[:-1], columns), jnp.float32, -bound, bound)


def _padded(path: str, a: jax.Array, b: jax.Array, rank: int, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The factors with columns drawn as LoRA draws them and rows of zeros, up to a rank."""
    missing = rank - a.shape[-1]
    if missing == 0:
        return a, b
    if key is None:
        raise RankError(
            f"{path}: squeeze: the adapter has {a.shape[-1]} singular values at most and rank={rank}, so "
            f"{missing} columns are to be drawn; pass key=."
        )
    a = jnp.concatenate([a, _drawn(key, a.shape, missing).astype(a.dtype)], axis=-1)
    return a, jnp.concatenate([b, jnp.zeros((*b.shape[:-2], missing, b.shape[-1]), b.dtype)], axis=-2)
