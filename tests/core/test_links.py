"""Fields stored in one weight and read by others."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import Leaf, Method, StructureError, Weight, register_weight, resolve_links
from tests.tolerances import tolerance


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedScale(Weight):
    """An array times a number that all weights of one method share."""

    base: jax.Array
    factor: jax.Array | None = None

    axes: ClassVar[dict[str, str]] = {"base": "array", "factor": ""}

    @property
    def shape(self):
        return self.base.shape

    def materialize(self, dtype: Any = None):
        one = self.with_frozen_stopped()
        return (one.base * one.factor).astype(dtype or self.dtype)


def shared_scale(seen=None) -> Method:
    """Every leaf but the first reads the factor of the first."""

    def make(owner, factor):
        def init(key, array, role, stats):
            links = () if owner is None else (("factor", owner, "factor"),)
            return SharedScale(
                base=array, factor=factor, links=links, role=role, dtype=array.dtype, trainable=("factor",)
            )

        return init

    def plan(key, leaves):
        if seen is not None:
            seen.append(leaves)
        first = next(iter(leaves))
        return {path: make(*((None, jnp.ones(())) if path == first else (first, None))) for path in leaves}

    return Method("shared_scale", make(None, jnp.ones(())), plan=plan)


def model(params, x):
    return x @ params["a"] @ params["b"] @ params["c"]


PARAMS = {name: jnp.asarray(np.random.default_rng(i).normal(size=(4, 4)), jnp.float32) for i, name in enumerate("abc")}
X = jnp.linspace(0.0, 1.0, 8).reshape(2, 4)


def adapted(rules=None):
    return sj.adapt(PARAMS, rules or {"*": shared_scale()}, key=jax.random.key(0))


def with_factor(tree, value):
    return {**tree, "a": dataclasses.replace(tree["a"], factor=jnp.asarray(value))}


def test_one_array_serves_all_and_its_gradient_is_the_sum():
    trainable, frozen = sj.partition(adapted())
    assert len(jax.tree.leaves(trainable)) == 1
    apply = sj.with_adapters(model, on_materialize="allow")

    def total(trainable, x):
        return apply(sj.combine(trainable, frozen), x).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(trainable, X)
    # The product of three weights with one factor f is f^3 times that of the arrays, so its slope at 1 is 3 of it.
    np.testing.assert_allclose(gradient["a"].factor, 3 * value, rtol=1e-5)
    np.testing.assert_allclose(apply(with_factor(adapted(), 2.0), X), 8 * model(PARAMS, X), rtol=1e-5)


def test_merge_and_rounding_read_the_stored_array():
    tree = with_factor(adapted(), 3.0)
    for name, array in sj.merge(tree).items():
        np.testing.assert_allclose(array, 3 * PARAMS[name], rtol=tolerance())
    assert sj.core.merge_rounding(tree)["c"].max_error == 0


def test_the_count_has_it_once():
    assert sj.summary(adapted()).trainable == 1


def test_a_deeper_tree_and_two_trees_at_once():
    def both(student, teacher, x):
        return model(student["params"], x), model(teacher["params"], x)

    apply = sj.with_adapters(both, on_materialize="allow")
    outputs = apply({"params": with_factor(adapted(), 2.0)}, {"params": with_factor(adapted(), 3.0)}, X)
    np.testing.assert_allclose(outputs[0], 8 * model(PARAMS, X), rtol=1e-5)
    np.testing.assert_allclose(outputs[1], 27 * model(PARAMS, X), rtol=1e-5)


def test_a_link_inside_another_weight():
    tree = adapted({"*": sj.dora(shared_scale())})
    assert tree["b"].direction.factor is None
    for name, array in sj.merge(tree).items():
        np.testing.assert_allclose(array, PARAMS[name], rtol=1e-5)


def test_a_part_of_the_tree_is_refused_by_name():
    tree = adapted()
    with pytest.raises(StructureError, match="b: its 'factor' is stored as 'factor' at a"):
        resolve_links({"b": tree["b"]})


def test_a_weight_that_was_filled_in_stands_alone():
    tree = resolve_links(with_factor(adapted(), 2.0))
    assert tree["b"].links
    np.testing.assert_allclose(sj.merge({"b": tree["b"]})["b"], 2 * PARAMS["b"], rtol=tolerance())


def test_trees_without_links_come_back_as_they_are():
    tree = sj.adapt(PARAMS, {"*": sj.lora(2)}, key=jax.random.key(0))
    assert all(one is other for one, other in zip(resolve_links(tree).values(), tree.values(), strict=True))


def test_plan_sees_every_leaf_of_its_method_with_roles():
    seen = []
    method = shared_scale(seen)
    roles = sj.roles(model, PARAMS, X)
    sj.adapt(PARAMS, {"a": method, "b": sj.lora(2), "c": method}, key=jax.random.key(0), roles=roles)
    (leaves,) = seen
    assert list(leaves) == ["a", "c"]
    assert all(isinstance(leaf, Leaf) and leaf.role.kind == "dense" for leaf in leaves.values())
    assert leaves["c"].array is PARAMS["c"]
