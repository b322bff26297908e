"""Gathers statistics of a model's weights over batches of data, without touching the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from subspace_jax.core._adapt import Rules, chosen_methods
from subspace_jax.core._apply import with_adapters
from subspace_jax.core._errors import StatisticsError
from subspace_jax.core._finite import is_finite
from subspace_jax.core._need import Need, ScaleExamples, input_statistics
from subspace_jax.core._paths import leaves_with_paths, map_with_paths
from subspace_jax.core._probe import Probed
from subspace_jax.core._role import Role
from subspace_jax.core._roles import roles as find_roles
from subspace_jax.core._selectors import Selector, select_paths
from subspace_jax.core._types import Batch, Params
from subspace_jax.core._weight import is_weight

GRADIENT_STATISTICS = ("gradient", "squared_gradient")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    r"""Statistics of one weight's inputs and gradients, in float32.

    Attributes:
      gram: \(\sum_n x_n x_n^T\) over the rows that the weight was multiplied with, `[*stack, in, in]`.
      mean: mean of those rows, `[*stack, in]`.
      count: number of rows, `[*stack]`.
      examples: number of examples that those rows belong to, `[*stack]`: entries of the input's leading axis.
      gradient: gradient of the loss with respect to the whole weight, averaged over batches; the weight's shape.
      squared_gradient: its elementwise square, averaged over batches; the weight's shape.
      batches: number of batches.
      extra: sums of statistics that `register_statistic` added, by name.
    """

    gram: jax.Array | None = None
    mean: jax.Array | None = None
    count: jax.Array | None = None
    examples: jax.Array | None = None
    gradient: jax.Array | None = None
    squared_gradient: jax.Array | None = None
    batches: jax.Array | None = None
    extra: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def get(self, name: str) -> jax.Array | None:
        """Returns a statistic by its name, None if it was not gathered.

        Raises:
          StatisticsError: `name` is "second_moment", and the Gram matrix was not captured.
        """
        return self.extra.get(name, getattr(self, name, None) if name != "extra" else None)

    @property
    def second_moment(self) -> jax.Array:
        """The Gram matrix divided by the number of rows.

        Raises:
          StatisticsError: the Gram matrix was not captured.
        """
        if self.gram is None or self.count is None:
            raise StatisticsError('The Gram matrix was not captured; ask capture for statistics=("gram",).')
        return self.gram / self.count[..., None, None]


class _Wanted(NamedTuple):
    """What is gathered of one leaf.

    Attributes:
      role: how the model uses it.
      names: of statistics.
      scale_examples: what divides the rows of an example.
    """

    role: Role
    names: tuple[str, ...]
    scale_examples: ScaleExamples | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the statistics of inputs."""
        return tuple(n for n in self.names if n not in GRADIENT_STATISTICS)


def capture(
    fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Batch],
    *,
    statistics: str | Iterable[str] | None = None,
    select: Selector | Iterable[str] | None = None,
    rules: Rules | None = None,
    roles: Mapping[str, Role] | None = None,
    scale_examples: ScaleExamples | None = None,
    mask: Callable[[Any], jax.Array] | None = None,
    programs: dict[Any, Any] | None = None,
) -> dict[str, Statistics]:
    r"""Streams statistics of weights over batches: input Grams and means, gradients and their squares.

    Every batch is one compiled call; only that batch and the running float32 sums are in memory. Grams come from
    differentiating with respect to zeros whose custom derivative rule returns \(x^T x\), so they pass through scan,
    remat and jit, and the model's own backward pass is dead code that the compiler removes.

    Args:
      fn: `fn(params, batch)`. For gradients it returns the scalar loss; for input statistics any floating
        output that depends on the weights will do.
      params: a tree of arrays.
      batches: batches of equal shapes; another shape compiles again.
      statistics: which of "gram", "mean", "gradient" and "squared_gradient" (of batch gradients), and of those that
        `sj.core.register_statistic` added, to gather; "gram" if None.
      select: globs or a predicate of path and array that choose leaves; by default every kernel for input
        statistics, every floating leaf for gradients.
      rules: those that `adapt` is given: every leaf gets what its method needs, and nothing else is gathered. In
        place of `statistics`, `select` and `scale_examples`.
      roles: what `sj.roles` found; found from the first batch if None.
      scale_examples: divides the rows of each example by a number before they are summed: "max_abs" by the largest
        absolute value in the example, "signed_max" by the absolute value of its largest entry, which fails where
        that is zero. An example is one entry of the leading axis of a weight's input (for a stack of weights that are
        used together, of the first axis that is not theirs). A model that joins examples and tokens to one axis, or
        has no axis of examples, so has every row scaled by itself.
      mask: gives, of a batch, which rows count, `[examples]` or `[examples, tokens]`: padding counts as zeros and is
        not counted. Every input must begin with these axes, have them joined to one, or have examples only.
      programs: a dict of the caller's, in which the compiled step stays for further calls with the same functions.

    Returns:
      A dict from path to `Statistics`.

    Raises:
      StatisticsError: a statistic or `scale_examples` is unknown; `rules` come with `statistics`, `select` or
        `scale_examples`; `scale_examples` or `mask` comes with gradients alone; no method of the rules needs
        statistics, or one needs inputs scaled in several ways.
      StatisticsError: there are no batches, no leaf is selected, a selected leaf is no kernel that multiplies inputs, a
        kernel's output does not reach the function's result, the loss is not a scalar, an input holds NaN or infinity,
        or the mask does not fit an input.
      PatternError: a glob or a rule matches nothing.
      TypeError: `select` or a rule is of a wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> found = capture(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 5))}, [x], statistics=("gram", "mean"))
      >>> found["w"].gram.tolist(), found["w"].mean.tolist()
      ([[10.0, 14.0], [14.0, 20.0]], [2.0, 3.0])
    """
    if rules is not None and (statistics is not None or select is not None or scale_examples is not None):
        raise StatisticsError("rules say what is needed where; leave statistics, select and scale_examples out.")
    wanted = ("gram",) if statistics is None else (statistics,) if isinstance(statistics, str) else tuple(statistics)
    _check_names(wanted)
    if scale_examples not in (None, *get_args(ScaleExamples)):
        raise StatisticsError(f"scale_examples={scale_examples!r}: choose from {get_args(ScaleExamples)}, or None.")
    if rules is None and (scale_examples or mask) and all(n in GRADIENT_STATISTICS for n in wanted):
        raise StatisticsError(f"scale_examples and mask are about input statistics, but statistics={wanted}.")
    iterator = iter(batches)
    batch = next(iterator, None)
    if batch is None:
        raise StatisticsError("There are no batches to gather statistics from.")
    if roles is None:
        roles = find_roles(fn, params, batch)
    if rules is None:
        found = _selected(params, select, roles, wanted)
        chosen = {path: _Wanted(role, wanted, scale_examples) for path, role in found.items()}
    else:
        chosen = _needed(params, rules, roles)
    step = jax.jit(functools.partial(_step, fn, chosen, mask), donate_argnums=0)
    if programs is not None:  # a step that is kept keeps its functions, so these numbers stay theirs
        step = programs.setdefault((id(fn), id(mask), tuple(chosen.items())), step)
    sums = _zeros(params, chosen)
    while batch is not None:
        sums = jax.block_until_ready(step(sums, params, batch))
        batch = None  # free before the next one is made
        batch = next(iterator, None)
    return _finish(sums)


def _check_names(wanted: tuple[str, ...]) -> None:
    known = (*input_statistics(), *GRADIENT_STATISTICS)
    if not wanted or any(n not in known for n in wanted):
        raise StatisticsError(f"statistics={wanted}: choose from {known}.")


def _needed(params: Params, rules: Rules, roles: Mapping[str, Role]) -> dict[str, _Wanted]:
    """What the methods of the rules need of their leaves."""
    leaves, chosen = dict(leaves_with_paths(params)), {}
    for path, method in chosen_methods(params, rules).items():
        needs = [n if isinstance(n, Need) else Need(n) for n in method.needs]
        if not needs:
            continue
        scales: set[ScaleExamples | None]
        scales = {n.scale_examples for n in needs if n.statistic not in GRADIENT_STATISTICS}
        if len(scales) > 1:
            raise StatisticsError(
                f"{path}: {method.name} needs inputs scaled in several ways, {sorted(map(str, scales))}."
            )
        names, scale = tuple(n.statistic for n in needs), next(iter(scales), None)
        wanted = _Wanted(roles.get(path, Role("unused")), names, scale)
        _check_names(names)
        if wanted.inputs and not _multiplies(wanted.role):
            raise _no_kernel(path, leaves[path], wanted.role)
        if not _is_floating(leaves[path]):
            raise StatisticsError(f"{path}: {method.name} needs statistics of a leaf of {leaves[path].dtype}.")
        chosen[path] = wanted
    if not chosen:
        raise StatisticsError("No method of these rules needs statistics; adapt without stats=.")
    return chosen


def _selected(
    params: Params, select: Selector | Iterable[str] | None, roles: Mapping[str, Role], wanted: tuple[str, ...]
) -> dict[str, Role]:
    """Role of each leaf whose statistics are gathered."""
    leaves = [(p, v) for p, v in leaves_with_paths(params) if not is_weight(v)]
    paths = [p for p, _ in leaves] if select is None else select_paths(params, select)
    inputs = any(name not in GRADIENT_STATISTICS for name in wanted)
    chosen: dict[str, Role] = {}
    for path, leaf in leaves:
        role = roles.get(path, Role("unused"))
        if path not in paths or not _is_floating(leaf):
            continue
        if inputs and not _multiplies(role):
            if select is None:
                continue
            raise _no_kernel(path, leaf, role)
        chosen[path] = role
    if not chosen:
        raise StatisticsError(f"No leaf is selected for {wanted}; the model's leaves are used as {dict(roles)}.")
    return chosen


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _multiplies(role: Role) -> bool:
    """Whether a leaf of this role is multiplied with inputs, whose rows can be told."""
    return role.kind == "dense" or (role.kind == "conv" and role.groups == 1)


def _no_kernel(path: str, leaf: Any, role: Role) -> StatisticsError:
    return StatisticsError(
        f"{path}: input statistics need a dense or ungrouped convolution kernel, but the model uses this leaf of shape "
        f"{leaf.shape} as {role.kind!r} (groups={role.groups}). Narrow select."
    )


def _zeros(params: Params, chosen: Mapping[str, _Wanted]) -> dict[str, dict[str, jax.Array]]:
    """The sums before the first batch."""
    sums, known = {}, input_statistics()
    for path, leaf in leaves_with_paths(params):
        if path not in chosen:
            continue
        role, names = chosen[path].role, chosen[path].names
        shapes: dict[str, tuple[int, ...]] = {n: leaf.shape for n in names if n in GRADIENT_STATISTICS}
        if chosen[path].inputs:
            stack, sizes = role.stack_shape(leaf.shape), role.sizes(leaf.shape)
            shapes |= {"count": stack, "examples": stack}
            shapes |= {n: (*stack, *known[n].shape(*sizes)) for n in chosen[path].inputs}
        sums[path] = {n: jnp.zeros(s, jnp.float32) for n, s in (shapes | {"batches": ()}).items()}
    return sums


def _step(
    fn: Callable[..., Any],
    chosen: Mapping[str, _Wanted],
    mask: Callable[[Any], jax.Array] | None,
    sums: dict[str, dict[str, jax.Array]],
    params: Params,
    batch: Batch,
) -> dict[str, dict[str, jax.Array]]:
    """Adds the statistics of one batch."""
    values = {path: leaf for path, leaf in leaves_with_paths(params) if path in chosen}
    probes = {path: _probe(kept, chosen[path]) for path, kept in sums.items() if "count" in kept}
    gradients = any(name in GRADIENT_STATISTICS for one in chosen.values() for name in one.names)
    counted = None if mask is None else mask(batch)

    def loss(probes: dict[str, dict[str, Any]], values: dict[str, jax.Array]) -> jax.Array:
        def place(path: str, leaf: Any) -> Any:
            if path not in chosen:
                return leaf
            if path not in probes:
                return values[path]
            fields: dict[str, Any] = probes[path]
            return Probed(
                value=values[path],
                role=chosen[path].role,
                dtype=leaf.dtype,
                trainable=("value", *fields),
                mask=counted,
                scale_examples=chosen[path].scale_examples,
                **fields,
            )

        out = with_adapters(fn, custom_rules="inline")(map_with_paths(place, params), batch)
        if not gradients:
            floating = [v for v in jax.tree.leaves(out) if jnp.issubdtype(v.dtype, jnp.floating)]
            return sum((jnp.sum(v.astype(jnp.float32)) for v in floating), jnp.zeros(()))
        if getattr(out, "shape", None) != ():
            found = jax.tree.map(jnp.shape, out)
            raise StatisticsError(f"Gradients need fn(params, batch) to return a scalar loss; it returns {found}.")
        return out

    wrt = (0, 1) if gradients else 0
    found = jax.grad(loss, argnums=wrt)(probes, values)
    from_probes, from_values = found if gradients else (found, {})
    out = {}
    for path, kept in sums.items():
        new = dict(from_probes.get(path, {}))
        new |= new.pop("sums", {})
        if path in from_values:
            gradient = from_values[path].astype(jnp.float32)
            new |= {"gradient": gradient, "squared_gradient": gradient * gradient}
        new["batches"] = jnp.ones(())
        out[path] = {name: value + new[name] for name, value in kept.items()}
    return out


def _probe(kept: Mapping[str, jax.Array], wanted: _Wanted) -> dict[str, Any]:
    """Zeros of the shapes of the input statistics."""
    sums = {name: jnp.zeros_like(kept[name]) for name in wanted.inputs}
    return {"count": jnp.zeros_like(kept["count"]), "examples": jnp.zeros_like(kept["examples"]), "sums": sums}


def _finish(sums: dict[str, dict[str, jax.Array]]) -> dict[str, Statistics]:
    """Turns sums into means, and refuses weights that no data reached."""
    found = {}
    for path, kept in sums.items():
        count, batches = kept.get("count"), kept["batches"]
        if count is not None and not bool(jnp.all(count > 0)):
            raise StatisticsError(
                f"{path}: no input met this weight, or its output does not reach the function's result (is there a "
                "stop_gradient in between?). Narrow select, or return the layer's output from fn."
            )
        gathered = [name for name in input_statistics() if name in kept]
        for name in gathered:
            if not bool(is_finite(kept[name])):
                raise StatisticsError(
                    f"{path}: the {name} of the inputs holds NaN or infinity. Look for it in the batches; "
                    'scale_examples="signed_max" divides by zero where no entry of an example is above it.'
                )
        averaged = {n: kept[n] / batches for n in GRADIENT_STATISTICS if n in kept}
        if count is not None and "mean" in kept:
            averaged["mean"] = kept["mean"] / count[..., None]
        inputs = {n: kept.get(n) for n in ("count", "examples", "gram")}
        extra = {name: kept[name] for name in gathered if name not in ("gram", "mean")}
        found[path] = Statistics(batches=batches, extra=extra, **inputs, **averaged)
    return found
