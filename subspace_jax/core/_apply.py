"""`with_adapters`: runs any function of parameters on a tree in which stand-in weights take arrays' places."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from subspace_jax.core import (  # noqa: F401  (all but the first register rules)
    _compat,
    _control_flow,
    _cutting,
    _joining,
    _rescaled,
    _rules,
)
from subspace_jax.core._context import Context
from subspace_jax.core._interpret import CustomRules, Interpreter, MaterializeRules, OnMaterialize
from subspace_jax.core._links import resolved
from subspace_jax.core._nnx import advise, is_nnx_module, is_nnx_variable
from subspace_jax.core._paths import path_string
from subspace_jax.core._selectors import check_selector, rule_pairs, selects
from subspace_jax.core._weight import Weight, is_weight
from subspace_jax.core._weight_view import WeightView

F = TypeVar("F", bound=Callable[..., Any])


def with_adapters(
    fn: F,
    *,
    on_materialize: MaterializeRules = "error",
    custom_rules: CustomRules = "keep",
    collect: bool = False,
) -> F:
    r"""Makes a function of parameters accept stand-in weights in any of its arguments.

    `fn` is traced once with every weight replaced by an abstract array of its shape and dtype. The program is then
    evaluated with the weights as values: products, convolutions and lookups become `weight.contract`, casts and
    transposes are carried along, loops, branches and calls are written out again. For `LowRank` that is
    \(y = x W + s\,(x a)\,b\) in this bracketing, and the gradient of \(W\) is never formed.

    Args:
      fn: any function; `model.apply` of Flax Linen, a function that merges an NNX graph, a plain one. Everything
        that is not a weight (arrays, flags, keys, strings) is passed on unchanged.
      on_materialize: what to do where the model needs the full array: "error" refuses and names the primitive, the
        weight and what helps; "warn" forms it with a warning; "allow" forms it. Or ordered rules, as `adapt` takes
        them, from selectors of leaves to one of these words: the first that matches counts, and a leaf that none
        matches is refused.
      custom_rules: what to do where a weight enters a function with a derivative rule of its own (`jax.custom_vjp`,
        `jax.custom_jvp`). "keep" needs the full array, so that the rule holds; "inline" differentiates the function's
        body in place of the rule, and forms nothing.
      collect: return beside the result what stand-ins report, such as the probabilities of routers: a dict from the
        weight's path to what it reported. A scan over layers stacks reports along a leading axis, a branch that is
        not run reports zeros, and a weight that is used in several places reports a list.

    Returns:
      The function. Its result is what `fn` returns; a weight that `fn` hands through comes out as it went in.

    Raises:
      MaterializeError: when called, if the full array would be formed and `on_materialize` is "error".
      PatternError: when called, if a rule of `on_materialize` matches no stand-in.
      TypeError: when called, if a selector of `on_materialize` is no glob, predicate or tuple of these.
      ValueError: a word of `on_materialize`, or `custom_rules`, is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> adapted = sj.adapt(params, {"kernel": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> apply = sj.with_adapters(lambda p, x: x @ p["kernel"] + p["bias"])
      >>> apply(adapted, jnp.ones((1, 4)))
      Array([[4., 4., 4.]], dtype=float32)
    """
    _check_words(on_materialize)
    if custom_rules not in ("keep", "inline"):
        raise ValueError(f'custom_rules is "keep" or "inline", not {custom_rules!r}.')

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # What holds no weight is one leaf: what the function changes in place must not be a copy.
        leaves, treedef = jax.tree_util.tree_flatten_with_path((list(args), kwargs), is_leaf=_is_passed_on)
        paths = [path for path, _ in leaves]
        named = [(path_string(path), v) for path, v in leaves]
        linked = resolved({path: v for path, v in named if isinstance(v, Weight)})
        values = [linked.get(path, v) for path, v in named]
        values = [v.materialize() if isinstance(v, Weight) and v.formed else v for v in values]
        places = [i for i, v in enumerate(values) if isinstance(v, Weight)]
        if not places:
            args, kwargs = jax.tree.unflatten(treedef, values)
            return (fn(*args, **kwargs), {}) if collect else fn(*args, **kwargs)
        outputs: dict[str, Any] = {}

        def traced(*arrays: jax.Array) -> list[jax.Array]:
            filled = list(values)
            for i, array in zip(places, arrays, strict=True):
                filled[i] = array
            args, kwargs = jax.tree.unflatten(treedef, filled)
            results, outputs["tree"] = jax.tree.flatten(fn(*args, **kwargs))
            outputs["static"] = [None if _is_array(r) else r for r in results]
            return [r for r in results if _is_array(r)]

        weights: list[Any] = [values[i] for i in places]
        abstract = [jax.ShapeDtypeStruct(w.shape, w.dtype, **_sharding(w)) for w in weights]
        try:
            closed = jax.make_jaxpr(traced)(*abstract)
        except Exception as error:
            advise(error)
            raise
        standins = [
            WeightView.of(w.with_frozen_stopped(), path_string(paths[i][2:]))
            for i, w in zip(places, weights, strict=True)
        ]
        context = Context(collect=collect)
        chosen = _chosen_words(on_materialize, [(view.path, view.weight) for view in standins])
        interpreter = Interpreter(chosen, custom_rules, context=context)
        results = _assemble(outputs, interpreter.run(_compat.program(closed), standins), interpreter.form)
        reports = {path: found[0] if len(found) == 1 else found for path, found in context.reports.items()}
        return (results, reports) if collect else results

    return wrapped  # pyright: ignore[reportReturnType]


def _check_words(rules: MaterializeRules) -> None:
    by_rules = isinstance(rules, (Mapping, list, tuple))
    words: list[Any] = [word for _, word in rule_pairs(rules)] if by_rules else [rules]
    for word in words:
        if word not in ("error", "warn", "allow"):
            raise ValueError(f'on_materialize is "error", "warn" or "allow", for all or by rules, not {word!r}.')


def _chosen_words(rules: MaterializeRules, leaves: list[tuple[str, Any]]) -> OnMaterialize | dict[str, OnMaterialize]:
    """What to do where a stand-in would be formed, by path: what the first matching rule says."""
    if isinstance(rules, str):
        return rules
    pairs = rule_pairs(rules)
    for selector, _ in pairs:
        check_selector(selector, leaves, "on_materialize: ")
    words: dict[str, OnMaterialize] = {}
    for path, leaf in leaves:
        words[path] = next((word for selector, word in pairs if selects(selector, path, leaf)), "error")
    return words


def _assemble(outputs: dict[str, Any], results: list[Any], form: Callable[[Any, str], Any]) -> Any:
    """Puts arrays, handed-through weights and static results back into the tree that `fn` returned."""
    whole = (
        r.weight if isinstance(r, WeightView) and r.is_plain else form(r, "the result of the function") for r in results
    )
    leaves = [next(whole) if s is None else s for s in outputs["static"]]
    return jax.tree.unflatten(outputs["tree"], leaves)


def _is_passed_on(value: Any) -> bool:
    """Whether a part of the arguments reaches the function as it is: the same object, or a stand-in.

    Variables of an `nnx.State` do not: the trace makes them again, so that the function may change them.
    """
    if is_weight(value):
        return True
    split = is_weight if is_nnx_module(value) else lambda v: is_weight(v) or is_nnx_variable(v)
    return not any(map(split, jax.tree.leaves(value, is_leaf=split)))


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic))


def _sharding(weight: Weight) -> dict[str, Any]:
    """The array's own sharding, which a trace under explicit mesh axes has to know."""
    sharding = weight.sharding()
    return {} if sharding is None else {"sharding": sharding}
