"""`Operation.linear`: an operation on a weight that is known only by what it does to rows."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import Weight, register_weight


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class ByRows(Weight):
    """An array whose products go through `linear`."""

    value: jax.Array

    axes: ClassVar[dict[str, str]] = {"value": "array"}

    @property
    def shape(self):
        return self.value.shape

    def materialize(self, dtype: Any = None):
        return self.value.astype(dtype or self.dtype)

    def contract(self, x, use):
        matrix = self.role.matrix(self.value)
        y = use.linear(x, lambda rows: rows @ matrix, lambda rows: rows @ jnp.swapaxes(matrix, -1, -2))
        assert (y is None) == (use.__class__.__name__ in ("Convolution", "Lookup")), "linear refuses what it could do"
        return use.apply(x, self.value) if y is None else y


def by_rows():
    return sj.Method(
        "by_rows",
        lambda key, array, role, stats: ByRows(value=array, role=role, dtype=array.dtype, trainable=("value",)),
    )


CASES = {
    "matmul": ((6, 5), (2, 3, 6), lambda w, x: x @ w),
    "transposed": ((5, 6), (2, 3, 6), lambda w, x: x @ w.T),
    "weight_first": ((5, 6), (6, 3), lambda w, x: w @ x),
    "heads_out": ((6, 2, 4), (3, 2, 6), lambda w, x: jnp.einsum("btd,dhk->bhtk", x, w)),
    "heads_in": ((2, 4, 6), (3, 2, 5, 4), lambda w, x: jnp.einsum("bhtk,hkd->btd", x, w)),
    "stack_in_the_middle": ((3, 4, 6), (5, 3, 4), lambda w, x: jnp.einsum("bse,sef->bsf", x, w)),
    "scanned": ((3, 5, 5), (2, 5), lambda w, x: jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0]),
    "conv": (
        (3, 3, 2, 4),
        (2, 5, 5, 2),
        lambda w, x: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_outputs_and_gradients_as_with_an_array(name):
    shape, x_shape, fn = CASES[name]
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, x_shape))
    tree = sj.adapt(
        {"w": w}, {"w": by_rows()}, key=jax.random.key(0), roles=sj.roles(lambda p, x: fn(p["w"], x), {"w": w}, x)
    )
    apply = sj.with_adapters(lambda p, x: fn(p["w"], x))
    np.testing.assert_allclose(jax.jit(apply)(tree, x), fn(w, x), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda t: jnp.sin(apply(t, x)).sum())(tree)["w"].value
    np.testing.assert_allclose(gradient, jax.grad(lambda w: jnp.sin(fn(w, x)).sum())(w), rtol=1e-4, atol=1e-5)


def test_a_tied_table_is_looked_up_and_multiplied_with_its_transpose():
    rng = np.random.default_rng(0)
    w, ids = jnp.asarray(rng.normal(size=(7, 4)), jnp.float32), jnp.array([[1, 3], [0, 6]])
    fn = lambda p, ids: jnp.tanh(jnp.take(p["w"], ids, axis=0)) @ p["w"].T
    tree = sj.adapt({"w": w}, {"w": by_rows()}, key=jax.random.key(0), roles=sj.roles(fn, {"w": w}, ids))
    np.testing.assert_allclose(sj.with_adapters(fn)(tree, ids), fn({"w": w}, ids), rtol=1e-5)
