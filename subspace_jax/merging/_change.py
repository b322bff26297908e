"""What an expert changes of one leaf, kept in factors where the expert holds it so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from subspace_jax.core import Role, StructureError, Weight, dense, static
from subspace_jax.linalg import wide_dtype
from subspace_jax.weights import AsLowRank, LowRank, LowRankCore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A change held as an array.

    Attributes:
      array: expert minus base, of the leaf's shape, in at least float32.
    """

    array: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Factored:
    r"""A change that is never formed: \(W_0\,\mathrm{diag}(g) + a\,b\).

    Attributes:
      a: `[*stack, in, rank]`, every scale folded in.
      b: `[*stack, rank, out]`.
      gain: \(g\), `[*stack, out]`; None for zero.
      role: folds matrices to the leaf.
    """

    a: jax.Array
    b: jax.Array
    gain: jax.Array | None = None
    role: Role = static()


Change = Dense | Factored | None  # None: the expert leaves the leaf as it is


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A leaf of an expert that is computed, or read from a file, only while it is merged.

    Attributes:
      shape: of the leaf.
      dtype: of the leaf.
      make: returns the array, or the `Change` from the base. It may be called several times, with one result.
      of: the leaf that it is made of, which tells its role and whether the result is to be an adapter.
    """

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], Any]
    of: Any = None

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)


class Form(NamedTuple):
    """How one class of weights is merged without forming it.

    Attributes:
      read: takes path, weight and base; returns the change, or None where it must be formed.
      write: takes the base and a factored change with a gain; returns the weight that holds it, or None.
    """

    read: Callable[[str, Any, Any], Factored | None]
    write: Callable[[Any, Factored], Weight | None] | None = None


_FORMS: dict[type, Form] = {}


def register_form(kind: type[Weight], form: Form) -> None:
    """Tells how a class of weights is merged in its parts; the package that defines it does this once.

    Args:
      kind: the class.
      form: reads its change, and writes a merged one.
    """
    _FORMS[kind] = form


def form_of(weight: Any) -> Form | None:
    """Returns how a weight is merged in its parts, or None if it is formed."""
    if isinstance(weight, AsLowRank):
        return _FORMS[AsLowRank]
    return _FORMS.get(type(weight))


def read_change(path: str, leaf: Any, base: Any) -> Change:
    """Returns what an expert's leaf changes of the base.

    Args:
      path: of the leaf, for messages.
      leaf: an array, a stand-in weight, or `Deferred`.
      base: the array of the base, or a weight that stands for it.

    Returns:
      A `Dense` or a `Factored` change; None where the expert leaves the leaf as it is.

    Raises:
      StructureError: an adapter stands on another array than the base's.
    """
    if isinstance(leaf, Deferred):
        leaf = leaf.make()
        if isinstance(leaf, Deferred):
            return read_change(path, leaf, base)
    if leaf is None or isinstance(leaf, (Dense, Factored)):
        return leaf
    if not isinstance(leaf, Weight):
        return None if _is_base(leaf, base) else Dense(array=_difference(jnp.asarray(leaf), _array(base)))
    form = form_of(leaf)
    change = None if form is None else form.read(path, leaf, base)
    return Dense(array=_difference(leaf, _array(base))) if change is None else change


def formed(change: Change, base: Any) -> jax.Array:
    """Returns the change as an array of the leaf's shape, in at least float32.

    Args:
      change: what is formed; None for no change.
      base: the base's leaf, an array or a weight that stands for one.
    """
    if isinstance(change, Dense):
        return change.array
    if change is None:
        return jnp.zeros(base.shape, wide_dtype(base.dtype))
    return _form(change, base if change.gain is not None else None, tuple(base.shape))


def wide_array(leaf: Any) -> jax.Array:
    """Returns a leaf, an array or a weight that stands for one, as an array in at least float32."""
    wide = wide_dtype(leaf.dtype)
    return leaf.materialize(wide) if isinstance(leaf, Weight) else jnp.asarray(leaf).astype(wide)


def check_base(path: str, inner: Any, base: Any) -> None:
    """Refuses an adapter whose frozen array is not the base's.

    Raises:
      StructureError: it is another one.
    """
    if inner is base or (tuple(inner.shape) == tuple(base.shape) and _known(_same(_array(inner), _array(base)), True)):
        return
    raise StructureError(
        f"{path}: the expert's adapter stands on other values than the base given, so their changes cannot be added. "
        "Pass as base the tree that adapt() was given; adapters of different bases can be merged only after merge()."
    )


def _array(value: Any) -> Any:
    return value.materialize() if isinstance(value, Weight) else value


def _is_base(leaf: Any, base: Any) -> bool:
    return leaf is base or _known(_same(leaf, _array(base)), False)


def _known(found: jax.Array, otherwise: bool) -> bool:
    """A truth value, or what is taken for it while tracing, where it is not known."""
    return otherwise if isinstance(found, Tracer) else bool(found)


@jax.jit
def _same(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.all(left == right)


@jax.jit
def _difference(leaf: Any, base: jax.Array) -> jax.Array:
    wide = wide_dtype(jnp.promote_types(leaf.dtype, base.dtype))
    array = leaf.materialize(wide) if isinstance(leaf, Weight) else leaf.astype(wide)
    return array - base.astype(wide)


def _form_parts(change: Factored, base: Any, shape: tuple[int, ...]) -> jax.Array:
    total = dense((change.a, change.b), change.role, shape)
    if change.gain is None:
        return total
    matrix = change.role.matrix(_array(base).astype(total.dtype)) * change.gain[..., None, :]
    return total + change.role.unmatrix(matrix, shape)


_form = jax.jit(_form_parts, static_argnums=2)


def _read_low_rank(path: str, weight: LowRank, base: Any) -> Factored | None:
    wide = wide_dtype(weight.dtype)
    if weight.start_a is None or weight.start_b is None:
        check_base(path, weight.base, base)
    elif isinstance(weight.base, Weight):  # the residual of a known start, rounded
        return None
    a, b = (v.astype(wide) for v in weight.original_factors())
    return Factored(a=a * weight.scale, b=b, role=weight.role)


def _read_core(path: str, weight: LowRankCore, base: Any) -> Factored | None:
    del path
    # Other methods keep a residual here, whose start is not known; they are formed.
    if weight.base is not base:
        return None
    wide = wide_dtype(weight.dtype)
    left, core, right = (v.astype(wide) for v in (weight.left, weight.core * weight.scale, weight.right))
    diagonal = core.ndim == left.ndim - 1
    middle = left * core[..., None, :] if diagonal else jnp.matmul(left, core, precision=jax.lax.Precision.HIGHEST)
    return Factored(a=middle, b=right, role=weight.role)


register_form(LowRank, Form(_read_low_rank))
register_form(AsLowRank, Form(lambda path, weight, base: _read_low_rank(path, weight.plain(), base)))
register_form(LowRankCore, Form(_read_core))
