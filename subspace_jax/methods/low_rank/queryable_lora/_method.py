"""`queryable_lora`: which kernels make a block, who stores the memory, and how all of it starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import (
    InitFn,
    Leaf,
    Method,
    Params,
    PatternError,
    RankError,
    Role,
    StructureError,
    check_int,
    check_number,
    check_probability,
    check_rank,
    map_with_paths,
    matches,
    nearest,
    require_matrix,
)
from subspace_jax.methods.low_rank.queryable_lora._weight import PRIOR, SHARED, QueryableLowRank
from subspace_jax.weights import hidden_zeros


def queryable_lora(
    rank: int = 8,
    *,
    blocks: Sequence[str],
    head: str,
    atoms: int = 8,
    kept: int = 4,
    width: int = 16,
    layers_per_block: int = 1,
    text: int | None = None,
    strength: float = 1.0,
    temperature: float = 1.0,
    sigma: float = 0.1,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> Method:
    r"""Trains low-rank factors around an operator that every row assembles from a shared memory of atoms.

    \(y = x K + s\,((x A) R) B\) with \(R = \sum_i \alpha_i M_i\), an `[rank, rank]` matrix for each row (example or
    token) and block of layers. The first kernel of a block finds \(\alpha\): a query of \(\mathrm{LN}(x A)\) and of a
    summary of the same in earlier blocks meets the keys of the atoms, biased by an instruction if there is one; see
    `route`. \(\|R\| \le \max_i \|M_i\|\), whatever the router does. Rows look at themselves alone, so causal models
    stay causal. \(B = 0\) at the start, and \(M_i = I + \sigma N(0, 1)\): the first steps are nearly those of LoRA.

    The publication's formulas could not be read; what its abstract leaves open is this library's design. The model's
    blocks must run in the order given, on the same rows, and each block's `head` before its other kernels.

    Args:
      rank: \(r\), at least 3: the layer norm of two numbers is one bit.
      blocks: globs of the adapted kernels of each block, in the order in which the model runs them. A stack of layers
        (a scanned model) is named once, and is as many blocks as it has layers, or fewer by `layers_per_block`.
      head: a glob that matches the kernel of each block, one, whose input the router reads: the one that runs first.
      atoms: \(m\).
      kept: atoms that a row uses; equal to `atoms` for a dense softmax.
      width: \(d_k\), of queries and keys.
      layers_per_block: of stacked layers.
      text: \(d_t\), the size of an instruction's embedding; None for no prior. `with_instruction` sets the embedding,
        which is data; until then it is zero, and the prior uniform.
      strength: \(\beta\) of the prior.
      temperature: \(\tau\) of the logits.
      sigma: deviation of the atoms at the start; above 0, or all atoms stay alike.
      alpha: the scale is \(\alpha / r\); the rank if None.
      dropout: of the factors' inputs; the router sees all of them.

    Returns:
      A method whose weights are `QueryableLowRank`, \(r (d_{in} + d_{out})\) values each, and
      \(m r^2 + m d_k + 3 r d_k + N_b d_k\) (with a prior \(d_t d_k + m d_k\) more) in the first block's head, which the
      others link to. They cannot be merged; `freeze_routing` exports a LoRA and tells what it loses.

    Raises:
      RankError: an integer option is out of range, or `kept` is above `atoms`.
      PatternError: from `adapt`: a kernel is in no block or in two, or a block has no head or several.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"one": {"kernel": jnp.eye(6)}, "two": {"kernel": jnp.eye(6)}}
      >>> method = sj.methods.queryable_lora.queryable_lora(3, blocks=("one/*", "two/*"), head="**", atoms=4)
      >>> adapted = sj.adapt(params, {"*/kernel": method}, key=jax.random.key(0))
      >>> sj.summary(adapted).trainable == 2 * 3 * 12 + 4 * 9 + 4 * 16 + 3 * 3 * 16 + 2 * 16
      True
    """
    rank = check_rank(rank, what="queryable_lora: rank")
    if rank < 3:
        raise RankError(f"queryable_lora: rank={rank}: expected at least 3; the router normalizes rows of that size.")
    atoms = check_int("queryable_lora: atoms", atoms)
    kept = check_int("queryable_lora: kept", kept, most=atoms)
    width = check_int("queryable_lora: width", width)
    layers_per_block = check_int("queryable_lora: layers_per_block", layers_per_block)
    if text is not None:
        text = check_int("queryable_lora: text", text)
    check_number("queryable_lora: strength", strength)
    for name, value in (("temperature", temperature), ("sigma", sigma)):
        check_number(f"queryable_lora: {name}", value, above=0.0)
    if alpha is not None:
        check_number("queryable_lora: alpha", alpha, above=0.0)
    check_probability("queryable_lora: dropout", dropout)
    if isinstance(blocks, str) or not blocks:
        raise PatternError(f"queryable_lora: blocks={blocks!r}: expected globs in the order in which the model runs.")

    def memory(key: jax.Array, count: int) -> dict[str, jax.Array]:
        keys = iter(jax.random.split(key, 8))

        def normal(shape: tuple[int, ...], deviation: float = 1.0) -> jax.Array:
            return deviation * jax.random.normal(next(keys), shape, jnp.float32)

        found = {"atoms": jnp.eye(rank) + normal((atoms, rank, rank), sigma), "keys": normal((atoms, width))}
        found |= {n: normal((rank, width), 1.0 / math.sqrt(rank)) for n in ("query", "summary", "depth")}
        found["blocks"] = hidden_zeros(next(keys), (count, width))
        if text is not None:
            found["projection"] = normal((text, width), 1.0 / math.sqrt(text))
            found["descriptors"] = normal((atoms, width))
            found["instruction"] = hidden_zeros(key, (text,))
        return found

    def init_of(path: str, place: _Place, store: str, count: int) -> InitFn:
        names = SHARED if text is None else (*SHARED, *PRIOR)
        linked = names if text is None else (*names, "instruction")

        def init(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> QueryableLowRank:
            del stats
            require_matrix(array, role)
            stack, (inputs, outputs) = role.stack_shape(array.shape), role.sizes(array.shape)
            keys, bound = jax.random.split(key, 3), 1.0 / math.sqrt(inputs)
            own: dict[str, Any] = memory(keys[2], count) if path == store else {}
            return QueryableLowRank(
                base=array,
                a=jax.random.uniform(keys[0], (*stack, inputs, rank), jnp.float32, -bound, bound),
                b=hidden_zeros(keys[1], (*stack, rank, outputs)),
                block=jnp.asarray(place.block),
                first=jnp.asarray(place.first),
                **own,
                links=() if own else tuple((name, store, name) for name in linked),
                scale=1.0 if alpha is None else alpha / rank,
                strength=strength,
                temperature=temperature,
                routes=place.routes,
                kept=kept,
                dropout=dropout,
                role=role,
                dtype=array.dtype,
                trainable=("a", "b", *names),
            )

        return init

    def plan(key: jax.Array, leaves: Mapping[str, Leaf]) -> Mapping[str, InitFn]:
        del key
        places, store, count = _places(leaves, blocks, head, layers_per_block)
        return {path: init_of(path, places[path], store, count) for path in leaves}

    return Method("queryable_lora", _alone, plan=plan)


def with_instruction(adapted: Params, embedding: jax.Array) -> Params:
    """Returns the tree with the embedding of an instruction, which biases the routing.

    Args:
      adapted: a tree from `queryable_lora(..., text=...)`.
      embedding: `[text]`, or `[batch, text]` with one of each example; of any frozen text encoder. Data: another one
        of the same shape compiles nothing, and no gradient reaches it.

    Raises:
      StructureError: no weight holds an instruction, or the size is another one.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.queryable_lora.queryable_lora(3, blocks=("w",), head="w", text=5)
      >>> adapted = sj.adapt({"w": jnp.eye(6)}, {"w": method}, key=jax.random.key(0))
      >>> with_instruction(adapted, jnp.ones(5))["w"].instruction.tolist()
      [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    found: list[str] = []

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, QueryableLowRank) or leaf.projection is None:
            return leaf
        found.append(path)
        if embedding.ndim not in (1, 2) or embedding.shape[-1] != leaf.projection.shape[0]:
            raise StructureError(
                f"{path}: an instruction of shape {embedding.shape}: expected [{leaf.projection.shape[0]}] or "
                f"[batch, {leaf.projection.shape[0]}]."
            )
        return dataclasses.replace(leaf, instruction=embedding)

    changed = map_with_paths(one, adapted)
    if not found:
        raise StructureError("with_instruction: no weight has a prior; make them by queryable_lora(..., text=size).")
    return changed


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a leaf is: the number of its block and whether it begins it, one for each stacked layer."""

    block: np.ndarray
    first: np.ndarray
    routes: bool


def _alone(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Any:
    raise PatternError("queryable_lora plans all kernels together; use it as the method of a rule of sj.adapt.")


def _places(
    leaves: Mapping[str, Leaf], blocks: Sequence[str], head: str, per_block: int
) -> tuple[dict[str, _Place], str, int]:
    """The place of every leaf, the leaf that stores the memory, and the number of blocks."""
    owner: dict[str, int] = {}
    for path in leaves:
        hits = [i for i, pattern in enumerate(blocks) if matches(pattern, path)]
        if len(hits) != 1:
            what = "none" if not hits else f"{len(hits)}: {', '.join(repr(blocks[i]) for i in hits)}"
            raise PatternError(f"{path}: queryable_lora: expected one of blocks= to match it; {what} of them do.")
        owner[path] = hits[0]
    places: dict[str, _Place] = {}
    count, store = 0, ""
    for number, pattern in enumerate(blocks):
        inside = [path for path in leaves if owner[path] == number]
        heads = [path for path in inside if matches(head, path)]
        if len(heads) != 1:
            raise PatternError(
                f"queryable_lora: head={head!r} matches {len(heads)} kernels of the block {pattern!r} "
                f"({', '.join(inside) or 'empty; nearest: ' + nearest(pattern, leaves)}); expected one, which runs "
                "first."
            )
        stacks = {leaf.role.stack_shape(leaf.array.shape) for leaf in (leaves[path] for path in inside)}
        if len(stacks) != 1 or len(next(iter(stacks))) > 1:
            raise PatternError(
                f"queryable_lora: the block {pattern!r} has kernels of stacks {sorted(stacks)}; expected all alike, of "
                "at most one axis."
            )
        layers = np.arange(math.prod(next(iter(stacks))))
        block, first = count + layers // per_block, layers % per_block == 0
        shape = next(iter(stacks))
        for path in inside:
            values = block.astype(np.int32).reshape(shape), first.reshape(shape)
            places[path] = _Place(*values, routes=path == heads[0])
        count, store = int(block[-1]) + 1, store or heads[0]
    return places, store, count
