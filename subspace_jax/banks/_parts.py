"""What a bank holds of one adapter of one leaf."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import RankError, StructureError, Weight, is_tracer
from subspace_jax.methods.low_rank.comp_lora import ComplementLowRank
from subspace_jax.methods.low_rank.dora import Magnitude
from subspace_jax.methods.low_rank.matryoshka import NestedLowRank
from subspace_jax.weights import AsLowRank, LowRank, LowRankCore


@dataclasses.dataclass(frozen=True)
class Part:
    """One adapter of one leaf, in the form of a bank.

    Attributes:
      a: `[*stack, in, rank]`.
      b: `[*stack, rank, out]`.
      scale: a scalar.
      gain: `[*stack, out]`, what columns are multiplied with; None for one.
      magnitude: `[*stack, out]`, the lengths of columns that `gain` was made of; None without.
      has_magnitude: whether the adapter has a magnitude of its own.
      learns: whether the adapter can go on learning in a bank: it is a LoRA or a DoRA on the untouched array, and both
        of its factors learn.
    """

    a: Any
    b: Any
    scale: Any
    gain: Any = None
    magnitude: Any = None
    has_magnitude: bool = False
    learns: bool = True


_MEND = "A bank holds additions of low rank to one shared base. merge() this adapter into a model of its own."


def part_of(path: str, weight: Any, base: Any, what: str) -> Part:
    """Returns what a bank holds of a stand-in weight.

    Args:
      path: of the leaf.
      weight: of `lora`, `pissa`, `corda`, `dora`, `matryoshka`, `lora_xs` or another method of low rank.
      base: the array that all adapters of the bank share.
      what: which adapter this is, for errors.

    Raises:
      StructureError: the weight is no low-rank addition to `base`.
    """
    if isinstance(weight, Magnitude):
        part = part_of(path, weight.direction, base, what)
        learns, own = part.learns and type(weight.direction) is LowRank, weight.magnitude
        return dataclasses.replace(part, gain=weight.factors(), magnitude=own, has_magnitude=True, learns=learns)
    if isinstance(weight, (NestedLowRank, ComplementLowRank, AsLowRank)):
        return dataclasses.replace(part_of(path, weight.plain(), base, what), learns=False)
    if isinstance(weight, LowRankCore) and weight.base is not None:
        check_base(path, weight.base, base, what)
        core = weight.core if weight.core.ndim == weight.left.ndim else weight.core[..., :, None]
        diagonal = weight.core.ndim != weight.left.ndim
        right = core * weight.right if diagonal else jnp.matmul(core, weight.right, precision=jax.lax.Precision.HIGHEST)
        return Part(weight.left, right, weight.scale, learns=False)
    if not isinstance(weight, LowRank):
        raise StructureError(f"{path}: {what} has a {type(weight).__name__} of {weight.method!r} here. {_MEND}")
    if weight.start_a is None or weight.start_b is None:
        check_base(path, weight.base, base, what)
        # What freezes a side, as Orthogonal Adaptation does, would lose that in a bank that trains both.
        return Part(weight.a, weight.b, weight.scale, learns={"a", "b"} <= set(weight.trainable))
    start = dataclasses.replace(weight, a=weight.start_a, b=weight.start_b, start_a=None, start_b=None)
    _check_residual(path, start, base, what)
    return Part(*weight.original_factors(), weight.scale, learns=False)


def check_base(path: str, found: Any, base: Any, what: str) -> None:
    """Refuses another base than the shared one.

    Raises:
      StructureError: the adapter stands on other numbers, or on another kind of weight.
    """
    if isinstance(found, Weight) or isinstance(base, Weight):
        if jax.tree.structure(found) != jax.tree.structure(base):
            raise StructureError(
                f"{path}: {what} stands on a {type(found).__name__}, the bank on a {type(base).__name__}. {_MEND}"
            )
        same = all(_equal(x, y) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(base), strict=True))
    else:
        same = _equal(found, base)
    if not same:
        raise StructureError(
            f"{path}: {what} stands on other numbers than the shared base. Make it on the same parameters. {_MEND}"
        )


def _equal(found: Any, base: Any) -> bool:
    if found is base:
        return True
    if (found.shape, found.dtype) != (base.shape, base.dtype):
        return False
    if any(is_tracer(v) or isinstance(v, jax.ShapeDtypeStruct) for v in (found, base)):
        return True  # not known while tracing
    return bool(jnp.array_equal(found, base))


def _check_residual(path: str, start: LowRank, base: Any, what: str) -> None:
    """Refuses a residual that is not the shared base without the adapter's start, but for rounding."""
    if isinstance(start.base, Weight) or isinstance(base, Weight) or start.shape != base.shape:
        raise StructureError(f"{path}: {what} has shape {start.shape}, the bank {base.shape}. {_MEND}")
    original, wide = start.materialize(jnp.float32), jnp.asarray(base, jnp.float32)
    if is_tracer(original) or is_tracer(wide):
        return
    largest = float(jnp.abs(wide).max(initial=0.0)) + float(jnp.abs(jnp.asarray(start.base)).max(initial=0.0))
    coarsest = max(float(jnp.finfo(v.dtype).eps) for v in (base, start.base, start.a))
    difference = float(jnp.abs(original - wide).max(initial=0.0))
    if not difference <= 64 * coarsest * largest:
        raise StructureError(
            f"{path}: the residual and the start of {what} make an array that differs from the shared base by "
            f"{difference:.1e}. Make it on the same parameters. {_MEND}"
        )


def padded(path: str, part: Part, rank: int, what: str) -> Part:
    """Returns the part with zeros up to `rank` columns of `a` and rows of `b`.

    Raises:
      RankError: its rank is above that.
    """
    missing = rank - part.a.shape[-1]
    if missing < 0:
        raise RankError(
            f"{path}: {what} has rank {part.a.shape[-1]}, and the bank was made for rank {rank}. Make the bank with "
            f"rank={part.a.shape[-1]} or more."
        )
    return dataclasses.replace(part, a=pad(part.a, -1, missing), b=pad(part.b, -2, missing))


def pad(array: Any, axis: int, count: int) -> Any:
    """Returns an array with `count` zeros behind an axis; of concrete arrays without compiling anything."""
    widths = [(0, count if i == axis % array.ndim else 0) for i in range(array.ndim)]
    if not count:
        return array
    if is_tracer(array) or not getattr(array, "is_fully_addressable", True):
        return jnp.pad(array, widths)
    host = np.pad(np.asarray(array), widths)
    return jnp.asarray(host)
