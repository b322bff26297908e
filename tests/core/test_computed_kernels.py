"""Kernels that libraries compute from what they store: normalized, permuted, masked, padded, multiplied.

Where the entries only move, nothing is formed; where they change, the leaf is refused by its path until forming is
allowed, and is then exact. Every case is compared with the model on merged weights, gradients included.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import subspace_jax as sj
from subspace_jax.core import MaterializeError, RoleError
from tests.core.test_foreign_uses import KEY, X, check, filled, normal
from tests.tolerances import assert_rounding

ORDER = np.array([3, 0, 4, 1, 2])
KEPT = np.random.default_rng(0).random((6, 5)) < 0.8

MOVED = {
    "outputs permuted": (lambda p, x: x @ p["w"][:, ORDER], (6, 5), {}),
    "inputs permuted": (lambda p, x: x @ p["w"][jnp.arange(5, -1, -1)], (6, 5), {}),
    # Keras stores a depthwise kernel as [space, inputs, multiplier] and reshapes it before it convolves.
    "depthwise, reshaped": (
        lambda p, x: lax.conv_general_dilated(
            x[None], p["w"].reshape(3, 1, 12), (1,), "SAME", None, None, ("NWC", "WIO", "NWC"), feature_group_count=6
        ),
        (3, 6, 2),
        {"kind": "conv", "groups": 6},
    ),
    # Gemma stacks the kernels of keys and values, which one product reads.
    "keys and values, one kernel": (
        lambda p, x: jnp.einsum("td,cndh->ctnh", x, p["w"]),
        (2, 3, 6, 4),
        {"in_axes": (2,), "out_axes": (0, 1, 3)},
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_kernels_whose_entries_only_move_are_not_formed(name):
    fn, shape, found = MOVED[name]
    check(fn, shape, X, **found)


def test_keys_and_values_of_one_kernel_share_an_input_factor_unless_they_are_called_a_stack():
    fn, shape, _ = MOVED["keys and values, one kernel"]
    params = {"w": normal(*shape)}
    shared = sj.adapt(params, {"w": sj.lora(2)}, key=KEY, roles=sj.roles(fn, params, X))["w"]
    assert (shared.a.shape, shared.b.shape) == ((6, 2), (2, 2 * 3 * 4))
    roles = sj.roles(fn, params, X, stack={"w": 0})
    apart = sj.adapt(params, {"w": sj.lora(2)}, key=KEY, roles=roles)["w"]
    assert (apart.a.shape, apart.b.shape) == ((2, 6, 2), (2, 2, 3 * 4))
    check(fn, shape, X, roles=roles)


CHANGED = {
    "spectral norm": (lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], 2)), (6, 5)),
    "symmetrized": (lambda p, x: x @ ((p["w"] + p["w"].T) / 2), (6, 6)),
    "dropout on the weight": (lambda p, x: x @ jnp.where(KEPT, p["w"] / 0.8, 0.0), (6, 5)),
    "padded": (lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (0, 2))), (6, 5)),
}


@pytest.mark.parametrize("name", CHANGED)
def test_kernels_whose_entries_change_are_refused_by_path_and_exact_where_forming_is_allowed(name):
    fn, shape = CHANGED[name]
    check(fn, shape, X, allow=True)


def test_a_product_of_two_adapted_kernels_is_refused_by_path_and_exact_where_forming_is_allowed():
    fn = lambda p, x: x @ (p["a"] @ p["b"])
    params = {"a": normal(6, 4), "b": normal(4, 5, seed=1)}
    adapted = filled(params, {"*": sj.lora(2)}, sj.roles(fn, params, X))
    with pytest.raises(MaterializeError, match=r"^[ab]: .*'dot_general'"):
        sj.with_adapters(fn)(adapted, X)
    found = sj.with_adapters(fn, on_materialize={"a": "allow", "b": "allow"})(adapted, X)
    assert_rounding(found, fn(sj.merge(adapted), X), size=64)


def test_a_table_of_positions_that_is_sliced_and_added_is_refused_with_a_mend_that_works():
    fn = lambda p, x: jnp.tanh(x + p["w"][:5])
    params = {"w": normal(9, 6)}
    roles = sj.roles(fn, params, X)
    with pytest.raises(RoleError, match=r"^w: lora: .*role 'bias'.*full\(\).*roles=\{path: sj\.Role\.dense"):
        sj.adapt(params, {"w": sj.lora(2)}, key=KEY, roles=roles)
    check(fn, (9, 6), X, roles={"w": sj.Role.dense((0,), (1,))}, allow=True)


class Wrapped(nn.Module):
    """A layer whose kernel a wrapper of Flax computes from the stored one at every call."""

    wrapper: str

    @nn.compact
    def __call__(self, x):
        if self.wrapper == "weight":
            return nn.WeightNorm(nn.Dense(5))(x)
        return nn.SpectralNorm(nn.Dense(5))(x, update_stats=False)


@pytest.mark.parametrize("wrapper", ["weight", "spectral"])
def test_flax_wrappers_that_normalize_a_kernel(wrapper):
    model = Wrapped(wrapper)
    variables = model.init(KEY, X)
    params, rest = variables["params"], {name: v for name, v in variables.items() if name != "params"}
    fn = lambda p, x: jnp.asarray(model.apply({"params": p, **rest}, x))
    roles = sj.roles(fn, params, X)
    rules = {"**/kernel": sj.lora(2)}
    adapted = filled(params, rules, roles)
    (path,) = (path for path in roles if path.endswith("kernel"))
    assert (roles[path].kind, roles[path].in_axes, roles[path].out_axes) == ("dense", (0,), (1,))
    if wrapper == "weight":
        with pytest.raises(MaterializeError, match=rf"^{path}: .*on_materialize=\"allow\""):
            sj.with_adapters(fn)(adapted, X)
        apply = sj.with_adapters(fn, on_materialize={path: "allow"})
    else:  # by products with the kernel from both sides, which need no array
        apply = sj.with_adapters(fn)
    assert_rounding(jax.jit(apply)(adapted, X), fn(sj.merge(adapted), X), size=64)
    trainable, frozen = sj.partition(adapted)
    ours = jax.grad(lambda t: jnp.sum(jnp.sin(apply(sj.combine(t, frozen), X))))(trainable)
    merged = jax.grad(lambda t: jnp.sum(jnp.sin(fn(sj.merge(sj.combine(t, frozen)), X))))(trainable)
    jax.tree.map(lambda a, b: assert_rounding(a, b, size=512), ours, merged)
