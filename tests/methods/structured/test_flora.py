"""FLoRA against explicit sums over the core, and its invariants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import subspace_jax as sj
from subspace_jax.core import RankError, RoleError
from tests.tolerances import tolerance

CONV = ("NHWC", "HWIO", "NHWC")


def trained(array, role, seed=1, **options):
    """A stand-in with random core and factors."""
    tree = sj.adapt({"w": array}, {"w": sj.flora(**options)}, key=jax.random.key(0), roles={"w": role})
    rng = np.random.default_rng(seed)
    names = tree["w"].trainable
    moved = {n: jnp.asarray(rng.normal(size=getattr(tree["w"], n).shape), jnp.float32) for n in names}
    return dataclasses.replace(tree["w"], **moved)


def kernel(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def brute_change(weight):
    """The sum over every core entry, one outer product each."""
    factors = [np.asarray(f, np.float64) for f in weight.in_factors] + [np.asarray(weight.out, np.float64).T]
    core = np.asarray(weight.core, np.float64)
    total = np.zeros([f.shape[0] for f in factors])
    for index in np.ndindex(core.shape):
        piece = np.array(core[index])
        for factor, a in zip(factors, index, strict=True):
            piece = np.multiply.outer(piece, factor[:, a])
        total += piece
    return weight.scale * total


@pytest.mark.parametrize(
    ("shape", "role", "options"),
    [
        ((3, 2, 5, 4), sj.Role.conv(), {"rank": 3, "out_rank": 2, "window_ranks": (2, 1)}),
        ((2, 3, 2, 4, 3), sj.Role.conv(5), {"rank": 2, "scale": 0.5}),
        ((6, 4), sj.Role.dense(), {"rank": 2, "out_rank": 3}),
    ],
)
def test_change_is_the_sum_over_the_core(shape, role, options):
    array = kernel(shape)
    weight = trained(array, role, **options)
    np.testing.assert_allclose(weight.materialize() - array, brute_change(weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 1), "padding": "VALID"},
        {"window_strides": (1, 1), "padding": ((2, 0), (1, 3)), "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": ((1, 1), (0, 0)), "lhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    ],
)
def test_factored_convolution_is_the_formed_one(options):
    groups = options.get("feature_group_count", 1)
    array, x = kernel((3, 2, 6 // groups, 4)), kernel((2, 7, 8, 6), 3)

    def model(w, x):
        return lax.conv_general_dilated(x, w, dimension_numbers=CONV, **options)

    weight = trained(array, sj.Role.conv(groups=groups), rank=2, out_rank=3)
    expected = model(weight.materialize(), x)
    np.testing.assert_allclose(sj.with_adapters(model)(weight, x), expected, rtol=1e-4, atol=1e-3)


def test_other_orders_of_axes():
    """A kernel stored as (out, height, width, in), with images that have their features first."""
    array, x = kernel((4, 3, 2, 5)), kernel((2, 5, 7, 8), 3)

    def model(w, x):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OHWI", "NCHW"))

    roles = sj.roles(lambda p, x: model(p["w"], x), {"w": array}, x)
    weight = trained(array, roles["w"], rank=2, out_rank=3)
    assert weight.in_0.shape == (3, 2)
    expected = model(weight.materialize(), x)
    np.testing.assert_allclose(sj.with_adapters(model)(weight, x), expected, rtol=1e-4, atol=1e-3)
    # Axes and their factors permuted together give the permuted change.
    flax = trained(jnp.transpose(array, (1, 2, 3, 0)), sj.Role.conv(), rank=2, out_rank=3)
    names = ("core", "in_0", "in_1", "in_2", "out")
    flax = dataclasses.replace(flax, **{n: getattr(weight, n) for n in names})
    np.testing.assert_allclose(jnp.transpose(flax.materialize(), (3, 0, 1, 2)), weight.materialize(), rtol=1e-5)


def test_no_step_holds_a_whole_kernels_gradient():
    array, x = kernel((3, 3, 32, 32)), kernel((2, 6, 6, 32), 3)
    weight = trained(array, sj.Role.conv(), rank=4)
    model = sj.with_adapters(lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=CONV))
    learned, frozen = sj.partition(weight)
    step = jax.jit(jax.grad(lambda t, x: jnp.sum(model(sj.combine(t, frozen), x) ** 2)))
    shapes = [str(v.aval.shape) for eqn in jax.make_jaxpr(step)(learned, x).eqns for v in eqn.outvars]
    text = step.lower(learned, x).as_text()
    assert shapes
    # The frozen kernel is a constant of the program; nothing computes another array of its size.
    computed = [line for line in text.splitlines() if "= stablehlo." in line and "-> tensor<3x3x32x32xf32>" in line]
    assert not [line for line in computed if "constant" not in line]


@pytest.mark.parametrize("factor_init", ["kaiming_r", "normal_0.02", "kaiming_fan_in"])
def test_start_is_the_array_and_factors_have_their_width(factor_init):
    array = kernel((300, 40))
    tree = sj.adapt({"w": array}, {"w": sj.flora(32, factor_init=factor_init)}, key=jax.random.key(0))
    np.testing.assert_array_equal(sj.merge(tree)["w"], array)
    widths = {"kaiming_r": 1 / np.sqrt(64), "normal_0.02": 0.02, "kaiming_fan_in": 1 / np.sqrt(3 * 300)}
    np.testing.assert_allclose(np.std(tree["w"].in_0), widths[factor_init], rtol=0.05)


def test_scales_of_the_publication():
    made = sj.adapt(
        {"conv": kernel((3, 3, 4, 4)), "dense": kernel((4, 4))},
        {"*": sj.flora(2)},
        key=jax.random.key(0),
        roles={"conv": sj.Role.conv(), "dense": sj.Role.dense()},
    )
    assert (made["conv"].scale, made["dense"].scale) == (4.0, 1.0)


def test_unfoldings_have_the_ranks():
    weight = trained(kernel((3, 3, 8, 9)), sj.Role.conv(), rank=4, out_rank=5, window_ranks=(2, 1))
    change = np.asarray(weight.change(), np.float64)
    for axis, rank in enumerate((2, 1, 4, 5)):
        unfolded = np.moveaxis(change, axis, 0).reshape(change.shape[axis], -1)
        assert np.linalg.matrix_rank(unfolded, tol=1e-3) == rank


def test_reparametrisation_and_norm():
    weight = trained(kernel((6, 7)), sj.Role.dense(), rank=3)
    rng = np.random.default_rng(5)
    mix = rng.normal(size=(3, 3))
    other = dataclasses.replace(
        weight,
        core=jnp.asarray(np.linalg.inv(mix) @ np.asarray(weight.core), jnp.float32),
        in_0=jnp.asarray(np.asarray(weight.in_0) @ mix, jnp.float32),
    )
    np.testing.assert_allclose(other.change(), weight.change(), rtol=1e-3, atol=1e-3)
    frames = {"in_0": np.linalg.qr(rng.normal(size=(6, 3)))[0], "out": np.linalg.qr(rng.normal(size=(7, 3)))[0].T}
    orthonormal = dataclasses.replace(weight, **{n: jnp.asarray(v, jnp.float32) for n, v in frames.items()})
    np.testing.assert_allclose(jnp.linalg.norm(orthonormal.change()), jnp.linalg.norm(weight.core), rtol=1e-5)
    whole = trained(kernel((3, 4)), sj.Role.dense(), rank=3, out_rank=4, scale=2.0)
    whole = dataclasses.replace(whole, in_0=jnp.eye(3), out=jnp.eye(4))
    np.testing.assert_allclose(whole.change(), 2.0 * whole.core, rtol=tolerance())


def test_only_the_core_learns_at_first():
    tree = sj.adapt({"w": kernel((6, 4))}, {"w": sj.flora(2)}, key=jax.random.key(0))
    x = kernel((5, 6), 3)
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(sj.with_adapters(lambda p, x: x @ p["w"])(t, x) ** 2)))(tree)["w"]
    assert np.abs(gradient.core).max() > 0
    assert not np.asarray(gradient.in_0).any()
    assert not np.asarray(gradient.out).any()
    upstream = np.asarray(x).T @ (2 * np.asarray(x @ tree["w"].base))
    np.testing.assert_allclose(gradient.core, tree["w"].in_0.T @ upstream @ tree["w"].out.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "role", "options", "count"),
    [
        ((768, 768), sj.Role.dense(), {"rank": 16}, 16 * 2 * 768 + 16**2),
        ((7, 7, 64, 128), sj.Role.conv(), {"rank": 16}, 2 * 2 * 16 * 16 + 2 * 7 * 2 + 64 * 16 + 128 * 16),
        ((3, 3, 32, 32), sj.Role.conv(), {"rank": 4}, 332),
    ],
)
def test_counts(shape, role, options, count):
    abstract = jax.ShapeDtypeStruct(shape, jnp.float32)
    tree = jax.eval_shape(
        lambda w: sj.adapt({"w": w}, {"w": sj.flora(**options)}, key=jax.random.key(0), roles={"w": role}), abstract
    )
    assert sj.summary(tree).trainable == count


def test_published_surplus_over_lora():
    """LLaMA-7B, rank 32, q, k, v, up, down in 32 layers: 164k parameters more than LoRA, r^2 a module."""
    assert 32 * 5 * 32**2 == 163_840
    dense = {"w": kernel((24, 16))}
    counts = [sj.summary(sj.adapt(dense, {"w": m}, key=jax.random.key(0))).trainable for m in (sj.flora(4), sj.lora(4))]
    assert counts[0] - counts[1] == 4**2


def test_dense_converts_to_lora():
    weight = trained(kernel((6, 7)), sj.Role.dense(), rank=3, scale=0.7)
    np.testing.assert_allclose(
        sj.methods.flora.to_lora(weight).materialize(), weight.materialize(), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(RankError, match="no product of two matrices"):
        sj.methods.flora.to_lora(trained(kernel((3, 3, 2, 4)), sj.Role.conv(), rank=1))


@pytest.mark.parametrize("stacked", [False, True])
def test_vectors(stacked):
    """Biases, also one for each layer of a loop, as b + s U G."""
    shape = (3, 4) if stacked else (4,)
    params = {"w": kernel((*shape[:-1], 4, 4)), "b": kernel(shape, 2)}

    def layer(h, p):
        return jnp.tanh(h @ p["w"] + p["b"]), None

    def model(p, x):
        return lax.scan(layer, x, p)[0] if stacked else layer(x, p)[0]

    x = kernel((5, 4), 3)
    tree = sj.adapt(params, {"b": sj.flora(2, vectors=True)}, key=jax.random.key(0), roles=sj.roles(model, params, x))
    core = jnp.asarray(np.random.default_rng(4).normal(size=tree["b"].core.shape), jnp.float32)
    tree["b"] = dataclasses.replace(tree["b"], core=core)
    change = np.einsum("...r,...rd->...d", core, tree["b"].out)
    np.testing.assert_allclose(sj.merge(tree)["b"], params["b"] + change, rtol=1e-5)
    expected = model({**params, "b": params["b"] + change}, x)
    np.testing.assert_allclose(sj.with_adapters(model)(tree, x), expected, rtol=1e-5)


def test_bad_input_is_refused():
    with pytest.raises(RankError, match="window of 2 axes"):
        sj.adapt(
            {"w": kernel((3, 3, 2, 4))},
            {"w": sj.flora(2, window_ranks=(2, 2, 2))},
            key=jax.random.key(0),
            roles={"w": sj.Role.conv()},
        )
    with pytest.raises(RoleError, match="no matrix"):
        sj.adapt({"b": jnp.ones(4)}, {"b": sj.flora(2)}, key=jax.random.key(0), roles={"b": sj.Role("bias")})
    with pytest.raises(ValueError, match="factor_init"):
        sj.flora(2, factor_init="normal")
    with pytest.raises(RankError):
        sj.flora(0)


@pytest.mark.parametrize("window", [(3, 5), (4,), (2, 3, 4)])
def test_kernels_of_both_layouts_have_ranks_on_the_same_axes(window):
    """[*window, in, out] and [out, in, *window]: the rank was given to a window's axis of the second."""
    ndim, channels, features = len(window), 6, 7
    ranks = tuple(range(1, ndim + 1))
    letters = "DHW"[-ndim:]
    flax = kernel((*window, channels, features))
    torch = jnp.moveaxis(flax, (-1, -2), (0, 1))
    x = kernel((2, channels, *(8 for _ in window)), 3)

    def conv(layout):
        names = (f"NC{letters}", layout, f"NC{letters}")
        return lambda p, x: lax.conv_general_dilated(x, p["w"], (1,) * ndim, "SAME", dimension_numbers=names)

    found = {}
    for layout, array in ((f"{letters}IO", flax), (f"OI{letters}", torch)):
        params = {"w": array}
        roles = sj.roles(conv(layout), params, x)
        method = sj.flora(4, out_rank=2, window_ranks=ranks)
        weight = sj.adapt(params, {"w": method}, key=jax.random.key(0), roles=roles)["w"]
        moved = dataclasses.replace(weight, core=kernel(weight.core.shape, 5))
        sizes = {f.shape[-2]: f.shape[-1] for f in weight.in_factors}
        assert sizes == {channels: 4, **dict(zip(window, ranks, strict=True))}
        found[layout] = weight.core.size
        expected = conv(layout)({"w": moved.materialize()}, x)
        np.testing.assert_allclose(sj.with_adapters(conv(layout))({"w": moved}, x), expected, rtol=1e-4, atol=1e-4)
    assert len(set(found.values())) == 1


def test_window_ranks_of_each_axis_are_at_most_the_window():
    roles = {"w": sj.Role.conv()}
    for ranks in ((4, 1), (1, 1, 1), (1,)):
        with pytest.raises(RankError, match=r"w: flora: window_ranks=.* for a window of 2 axes \(3, 2\)"):
            sj.adapt(
                {"w": kernel((3, 2, 4, 5))}, {"w": sj.flora(2, window_ranks=ranks)}, key=jax.random.key(0), roles=roles
            )
    weight = sj.adapt({"w": kernel((3, 1, 4, 5))}, {"w": sj.flora(2)}, key=jax.random.key(0), roles=roles)["w"]
    assert weight.core.shape == (2, 1, 2, 2)
    odd = {"w": sj.Role("conv", in_axes=(0, 2, 3), out_axes=(1,))}
    with pytest.raises(RoleError, match=r"w: flora: .*which has the input features is not known"):
        sj.adapt({"w": kernel((3, 2, 4, 5))}, {"w": sj.flora(2)}, key=jax.random.key(0), roles=odd)
