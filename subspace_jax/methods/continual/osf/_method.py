"""`osf`: splits a weight by its singular values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Leaf, Method, PatternError, RankError, Role, check_choice, check_int, require_matrix
from subspace_jax.linalg import bucketed, truncated_svd, wide_dtype
from subspace_jax.methods.low_rank.svfit import SplitSVD
from subspace_jax.weights import Route

Preserved = float | int | Callable[[int, int], int]
Width = Literal["exact", "bucketed", "common"]


def osf(preserved: Preserved | Mapping[str, Any] = 0.5, *, width: Width = "exact", route: Route = "auto") -> Method:
    r"""Splits a weight by its singular values; the large part is frozen and the factors of the small part learn.

    \(K = L_h\,\mathrm{diag}(s_h)\,R_h + L\,\mathrm{diag}(s)\,R\), where the first term holds the \(k\) largest
    singular values. Train with `osf.projection` around the optimizer, which keeps the factors orthogonal to
    \(L_h\) and \(R_h\): then the weight's output is unchanged for inputs in the span of \(L_h\), and no output changes
    along the rows of \(R_h\). Before the next task `sj.merge`, and adapt again with a larger \(k\).

    Trains \((q - k)(d_{in} + d_{out} + 1)\) values of each matrix, where \(q = \min(d_{in}, d_{out})\). The factors are
    in float32 whatever the weight's dtype: in bfloat16 they would not be orthogonal.

    On a mesh give the start to `jax.jit`, with `sj.shardings` as `out_shardings`: each device then decomposes layers
    of its own, where a stack's layers can be divided among them, and holds its share of the factors.

    Args:
      preserved: \(k\): an int, a fraction of \(q\) that is rounded down, a function of the input and the output size,
        or a dict of ints or of arrays `[*stack]` by path. `osf.schedule` and `osf.ranks` are published policies; the
        one of the authors' T5 runs at task `t` is `lambda inputs, outputs: int(0.07 * t * max(inputs, outputs))`,
        cut off at \(q\), which freezes a 1024 x 4096 kernel whole at the fourth task.
      width: "exact" gives the factors \(k\) and \(q - k\) columns (of a stack with unequal ranks as many as one of its
        layers needs). "common" gives both \(q\) columns, most of them zero, so that every rank has the same shapes and
        no task of a stream compiles again, for more operations a step (see `osf.projection`). "bucketed" rounds both
        numbers up to multiples of \(q / 8\), padded with zeros: ranks of one eighth have the same shapes, for few
        operations more than "exact".
      route: how the weight is used; see `SplitSVD`.

    Returns:
      A method whose weights are `SplitSVD`. Everything that no rule selects stays as it is: give
      `sj.full()` for embeddings, norms, biases and heads that are to learn, as the authors' code lets them; PEFT
      freezes them.

    Raises:
      RankError: a rank is not in 0 .. q; raised by `adapt`, with the path, where it depends on the weight.
      PatternError: a weight is not in the dict; raised by `adapt`.
      RoleError: an array is not known to be a matrix; raised by `adapt`, with the path.
      ValueError: `width` or `route` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (6, 4))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.osf(1)}, key=jax.random.key(0))
      >>> adapted["w"].high_left.shape, adapted["w"].left.shape, sj.summary(adapted).trainable
      ((6, 1), (6, 3), 33)
      >>> bool(jnp.allclose(sj.merge(adapted)["w"], w, atol=1e-5))
      True
    """
    check_choice("osf: width", width, get_args(Width))
    check_choice("osf: route", route, get_args(Route))
    if not isinstance(preserved, Mapping):
        count_rank(preserved, 1, 1)

    def make_with(chosen: Any) -> Any:
        def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> SplitSVD:
            del key, stats
            require_matrix(array, role)
            ranks = ranks_of(chosen, role, array.shape)
            return _split(array, role, ranks, width, route)

        return make

    def plan(key: jax.Array, leaves: Mapping[str, Leaf]) -> dict[str, Any]:
        del key
        by_path: Mapping[str, Any] = preserved  # pyright: ignore[reportAssignmentType]
        missing = [path for path in leaves if path not in by_path]
        if missing:
            raise PatternError(f"{missing[0]}: osf: preserved has no rank for it, only for {sorted(by_path)[:5]}.")
        return {path: make_with(by_path[path]) for path in leaves}

    if isinstance(preserved, Mapping):
        return Method("osf", make_with(None), plan=plan)
    return Method("osf", make_with(preserved))


def count_rank(preserved: Preserved, inputs: int, outputs: int) -> int:
    """Returns the preserved rank of a matrix of these sizes, not above the smaller one for a function."""
    smaller = min(inputs, outputs)
    if callable(preserved):
        return min(int(preserved(inputs, outputs)), smaller)
    if isinstance(preserved, bool) or not isinstance(preserved, (int, float, np.integer, np.floating)):
        raise RankError(f"osf: preserved={preserved!r}; expected an int, a fraction of 1, a function, or a dict.")
    if isinstance(preserved, (float, np.floating)):
        if not 0.0 <= preserved <= 1.0:
            raise RankError(f"osf: preserved={preserved}; expected a fraction in [0, 1], or an int for a rank.")
        return int(preserved * smaller + 1e-9)  # (t - 1) / n is not exact
    return check_int("osf: preserved", preserved, least=0)


def ranks_of(chosen: Any, role: Role, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the preserved rank of every layer of an array, `[*stack]`; refuses those that it cannot have."""
    sizes, stack = role.sizes(shape), role.stack_shape(shape)
    if isinstance(chosen, (np.ndarray, jax.Array, list)):
        found = np.asarray(chosen)
        if not np.issubdtype(found.dtype, np.integer) or found.shape not in ((), stack):
            raise RankError(f"ranks {found.dtype}{found.shape} for a stack {stack}; expected one int per layer.")
    else:
        found = np.asarray(count_rank(chosen, *sizes))
    wrong = found[(found < 0) | (found > min(sizes))]
    if wrong.size:
        raise RankError(f"the preserved rank {int(wrong[0])} is not in 0 .. {min(sizes)}, the smaller side.")
    return np.broadcast_to(found, stack)


def _columns(ranks: np.ndarray, smaller: int, width: Width) -> tuple[int, int]:
    """How many columns the frozen factors have, and the index of the first one of the others."""
    if width == "common":
        return smaller, 0
    most, least = int(ranks.max(initial=0)), int(ranks.min(initial=smaller))
    if width == "exact":
        return most, least
    return bucketed(most, smaller), smaller - bucketed(smaller - least, smaller)


def _split(array: jax.Array, role: Role, ranks: np.ndarray, width: Width, route: Route) -> SplitSVD:
    most, least = _columns(ranks, min(role.sizes(array.shape)), width)
    uneven = width == "common" or most != least
    parts = _parts(array, jnp.asarray(ranks), role, most, least, uneven)
    return SplitSVD(
        **parts,
        in_sizes=role.in_shape(array.shape),
        out_sizes=role.out_shape(array.shape),
        route=route,
        role=role,
        dtype=array.dtype,
        trainable=("left", "core", "right"),
    )


# Outside of a trace this is one program, inside a part of the one that is traced.
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5), inline=True)
def _parts(
    array: jax.Array, ranks: jax.Array, role: Role, most: int, least: int, uneven: bool
) -> dict[str, jax.Array | None]:
    """What is frozen and what learns, with zeros in the columns of a layer that are of the other."""
    matrix = role.matrix(array).astype(wide_dtype(array.dtype))
    smaller = min(matrix.shape[-2:])
    u, s, vt = truncated_svd(matrix, smaller)
    high = (jnp.arange(smaller) < ranks[..., None]).astype(u.dtype)
    low = 1.0 - high
    left, core, right = (
        (u * low[..., None, :])[..., least:],
        (s * low)[..., least:],
        (vt * low[..., :, None])[..., least:, :],
    )
    small = jnp.matmul(left * core[..., None, :], right, precision=jax.lax.Precision.HIGHEST)
    return {
        # Nothing is frozen in a stream's first task, and no step then multiplies with a matrix of zeros.
        "base": role.unmatrix(matrix - small, array.shape).astype(array.dtype) if most else None,
        "high_left": (u * high[..., None, :])[..., :most],
        "high_right": (vt * high[..., :, None])[..., :most, :],
        "left": left,
        "core": core,
        "right": right,
        "live": low[..., least:] if uneven else None,
    }
