"""Makes a bank of adapters, and pads adapters to one rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from subspace_jax.banks._modules import check_links, grouped, kept, stacked
from subspace_jax.banks._parts import Part, check_base, pad, padded, part_of
from subspace_jax.core import (
    Full,
    Params,
    RankError,
    StructureError,
    check_int,
    is_weight,
    leaves_with_paths,
    map_with_paths,
    resolve_links,
)
from subspace_jax.methods.low_rank.orthogonal_adaptation import ConceptLowRank
from subspace_jax.methods.low_rank.pego import GroupLowRank
from subspace_jax.modules import KeptInput, Module, ModuleBank
from subspace_jax.weights import AdapterBank, LowRank, LowRankCore, map_weights


def bank(
    params: Params,
    adapters: Sequence[Params],
    *,
    rank: int | None = None,
    size: int | None = None,
    slots: int | None = None,
    trainable: bool = False,
) -> Params:
    r"""Stacks adapters of one model, so that each row of a batch can use its own: \((W + s_i a_i b_i)\,g_i\).

    Slot 0 is the plain base; `adapters[i]` gets slot \(i + 1\). Adapters may have different ranks and scales, cover
    different leaves, and be of LoRA, of DoRA, or of any method whose weight is a low-rank addition. Those that stand
    on a residual (PiSSA, CorDA) enter on the original array, at twice their rank. Modules on activations (bottleneck
    adapters, MoSA, iGSP, Queryable LoRA) enter as they are, of unequal sizes too; those of one kind lie in one stack,
    and every kind on a kernel costs each row what one of its modules costs. Run the model by `per_row`; change the bank
    by `put` and `remove`.

    Args:
      params: the parameters that all adapters were made on.
      adapters: trees that `adapt` made of `params`, trained or loaded.
      rank: what low-rank adapters are padded to; the largest rank there is if None.
      size: what hidden layers of modules are padded to; the largest of each kind if None.
      slots: number of slots, slot 0 included; one for each adapter if None. Further ones are free.
      trainable: let the factors, and the magnitudes of DoRA, go on learning, all adapters in one batch. Else all is
        frozen, and DoRA's norms are computed once, here.

    Returns:
      A tree like `params`, with an `AdapterBank` wherever an adapter has a low-rank weight, and a `ModuleBank` wherever
      one has a module. Other leaves are those of `params`.

    Raises:
      StructureError: an adapter is of another tree or on other numbers, holds a weight that is neither a low-rank
        addition nor a module, or, with `trainable`, one that cannot go on learning here; or a module is above `size`.
      RankError: an adapter's rank is above `rank`.
      ValueError: there are fewer slots than adapters and base.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jnp.ones((4, 3))}
      >>> made = [sj.adapt(params, {"w": sj.lora(rank=r)}, key=jax.random.key(r)) for r in (1, 2)]
      >>> bank = sj.bank(params, made)
      >>> bank["w"].a.shape, bank["w"].slots
      ((3, 4, 2), 3)
      >>> rows = jnp.array([0, 2, 1, 2])
      >>> sj.per_row(lambda p, x: x @ p["w"])(bank, rows, jnp.ones((4, 4))).shape
      (4, 3)
    """
    slots = check_int("bank: slots", len(adapters) + 1 if slots is None else slots, least=1)
    if slots <= len(adapters):
        raise ValueError(f"bank: {len(adapters)} adapters and the base need {len(adapters) + 1} slots; slots={slots}.")
    found = [adapter_parts(params, one, f"adapter {i}") for i, one in enumerate(adapters)]
    paths = dict.fromkeys(path for parts in found for path in parts)
    if not paths:
        raise StructureError("bank: no adapter has a stand-in weight; give trees that adapt() made.")
    ranks = [one.a.shape[-1] for parts in found for one in parts.values() if isinstance(one, Part)]
    common: int = max(ranks, default=1) if rank is None else check_int("bank: rank", rank, least=1)
    size = None if size is None else check_int("bank: size", size, least=1)
    leaves, weights = dict(leaves_with_paths(params)), {}
    trees = [dict(leaves_with_paths(tree)) for tree in adapters]
    for path in paths:
        of_slot = {i + 1: parts[path] for i, parts in enumerate(found) if path in parts}
        below = kept(path, leaves[path], [v for v in of_slot.values() if isinstance(v, (KeptInput, Full))])
        for group in grouped(path, {i: v for i, v in of_slot.items() if isinstance(v, Module)}, trainable):
            below = stacked(path, below, group, slots, trainable=trainable, size=size)
        low = {i: padded(path, v, common, f"adapter {i - 1}") for i, v in of_slot.items() if isinstance(v, Part)}
        if low:
            below = _stacked(path, trees[min(low) - 1][path], below, low, slots, trainable)
        weights[path] = below
    return map_with_paths(lambda path, leaf: weights.get(path, leaf), params)


def adapter_parts(params: Params, adapted: Params, what: str) -> dict[str, Any]:
    """Returns the parts of one adapter by path: a `Part`, a `Module`, or what only hands on an input or a bias.

    Raises:
      StructureError: the adapter does not fit `params`.
    """
    leaves, found = dict(leaves_with_paths(params)), {}
    adapter = {p: leaf for p, leaf in leaves_with_paths(resolve_links(adapted)) if is_weight(leaf)}
    for path, leaf in adapter.items():
        if path not in leaves:
            raise StructureError(f"{path}: {what} has a {type(leaf).__name__} here, and the parameters nothing.")
        base = leaves[path]
        if tuple(base.shape) != tuple(leaf.shape):
            raise StructureError(f"{path}: {what} has shape {leaf.shape}, the parameters {base.shape}.")
        if isinstance(leaf, (Module, KeptInput)):
            check_base(path, leaf.base, base, what)
            found[path] = leaf
            if isinstance(leaf, Module):
                check_links(path, leaf, adapter, what)
        elif isinstance(leaf, Full) and not leaf.trainable:
            check_base(path, leaf.value, base, what)
            found[path] = leaf
        else:
            found[path] = part_of(path, leaf, base, what)
    return found


def _stacked(path: str, sample: Any, base: Any, parts: Mapping[int, Part], slots: int, trainable: bool) -> AdapterBank:
    """The bank of one leaf; slots without a part are zeros, of gain one."""
    role = sample.role
    depth, dtype = len(role.stack_axes), jnp.result_type(*(p.a.dtype for p in parts.values()))
    example = next(iter(parts.values()))
    if trainable and (stuck := [i for i, part in parts.items() if not part.learns]):
        raise StructureError(
            f"{path}: adapter {stuck[0] - 1} cannot go on learning in a bank: it is no plain LoRA (or DoRA of one). "
            "Make the bank without trainable=True, or convert it by sj.to_lora."
        )

    def stacked(name: str, missing: Any, of: Any) -> Any:
        arrays = [getattr(parts[i], name) if i in parts else None for i in range(slots)]
        return jnp.stack([missing if v is None else jnp.asarray(v, of) for v in arrays], axis=depth)

    fields: dict[str, Any] = {}
    size = (*role.stack_shape(base.shape), role.sizes(base.shape)[1])
    if any(part.gain is not None for part in parts.values()):
        if trainable:
            fields["magnitude"] = stacked("magnitude", jnp.ones(size, jnp.float32), jnp.float32)
            fields["has_magnitude"] = jnp.asarray([i in parts and parts[i].has_magnitude for i in range(slots)])
        else:
            fields["gain"] = stacked("gain", jnp.ones(size, jnp.float32), jnp.float32)
    if "magnitude" in fields and isinstance(base, ModuleBank):
        raise StructureError(
            f"{path}: a magnitude of DoRA learns on a kernel on which other adapters have modules, so it has no norm. "
            "Make the bank without trainable=True, or two banks."
        )
    learning = ("a", "b", "magnitude") if "magnitude" in fields else ("a", "b")
    return AdapterBank(
        base=base,
        a=stacked("a", jnp.zeros(example.a.shape, dtype), dtype),
        b=stacked("b", jnp.zeros(example.b.shape, dtype), dtype),
        scale=jnp.stack([jnp.asarray(parts[i].scale if i in parts else 0.0, jnp.float32) for i in range(slots)]),
        role=role,
        dtype=sample.dtype,
        trainable=learning if trainable else (),
        detach_norm=getattr(sample, "detach_norm", True),
        method="bank",
        **fields,
    )


def pad_rank(adapted: Params, rank: int) -> Params:
    r"""Pads low-rank weights with zeros to one rank, so that adapters of unequal ranks run in one compiled program.

    What the weight stands for, \(W + s\,a\,b\), is unchanged: the scale stays that of the true rank. The zeros get no
    gradient, so they stay zero in training.

    Args:
      adapted: a tree with `LowRank` or `LowRankCore` weights, also inside others.
      rank: the rank of all of them afterwards.

    Returns:
      The tree with longer factors.

    Raises:
      RankError: a weight's rank is above `rank`.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((4, 3))}, {"w": sj.lora(rank=1)}, key=jax.random.key(0))
      >>> sj.banks.pad_rank(adapted, 2)["w"].a.shape
      (4, 2)
    """
    rank = check_int("pad_rank: rank", rank, least=1)

    def missing(path: str, weight: LowRank | LowRankCore) -> int:
        if weight.rank > rank:
            raise RankError(f"{path}: has rank {weight.rank}, above {rank}; give the largest rank there is.")
        return rank - weight.rank

    def factors(path: str, weight: LowRank) -> LowRank:
        count = missing(path, weight)
        if count and isinstance(weight, (ConceptLowRank, GroupLowRank)):
            weight = weight.plain()  # zeros belong to no column of a basis, and to no group
        sides = {"a": -1, "b": -2, "start_a": -1, "start_b": -2, "gains": -1}
        found = {n: getattr(weight, n, None) for n in sides}
        return dataclasses.replace(weight, **{n: pad(v, sides[n], count) for n, v in found.items() if v is not None})

    def core(path: str, weight: LowRankCore) -> LowRankCore:
        count = missing(path, weight)
        middle = pad(weight.core, -1, count)
        middle = pad(middle, -2, count) if weight.core.ndim == weight.left.ndim else middle
        return dataclasses.replace(
            weight, left=pad(weight.left, -1, count), core=middle, right=pad(weight.right, -2, count)
        )

    return map_weights(LowRankCore, core, map_weights(LowRank, factors, adapted))
