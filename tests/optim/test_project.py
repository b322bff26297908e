"""What holds, and what does not, of projections before and after an optimizer, in numbers."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import subspace_jax as sj
from subspace_jax.core import PatternError, Role, RoleError, StructureError
from subspace_jax.linalg import orthonormalize
from tests.tolerances import tolerance

IN, OUT = 12, 7


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def array(values, dtype=jnp.float32):
    return jnp.asarray(values, dtype)


def columns(size=IN, rank=3, seed=1):
    return array(np.linalg.qr(random(size, rank, seed=seed))[0])


def axes(size=IN):
    return jnp.eye(size)[:, [0, 4, 9]]


def run(optimizer, steps, gradient=None, start=None, dtype=jnp.float32):
    """Change of the weights over steps, and the weights, each step's gradient drawn anew or a function of weights."""
    gradients = array(random(steps, IN, OUT, seed=7) + 0.5 * random(IN, OUT, seed=8), dtype)
    params = {"w": array(random(IN, OUT, seed=3) if start is None else start, dtype)}

    @jax.jit
    def loop(params):
        def one(carry, g):
            params, state = carry
            g = {"w": g} if gradient is None else jax.tree.map(gradient, params)
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, optimizer.init(params)), gradients)[0][0]

    end = loop(params)
    return np.asarray(end["w"], np.float64) - np.asarray(params["w"], np.float64), np.asarray(end["w"], np.float64)


def share(u, change):
    """The share of a change, by norm, that lies in the span of the columns."""
    return np.linalg.norm(np.asarray(u, np.float64).T @ change) / np.linalg.norm(change)


LINEAR = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, 0.9),
    "nesterov": optax.sgd(0.1, 0.9, nesterov=True),
    "ema": optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "schedule": optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda t: -0.1 / (1 + t))),
    "accumulation": optax.MultiSteps(optax.sgd(0.1, 0.9), 5).gradient_transformation(),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("mode", ["remove", "keep"])
def test_before_and_after_are_the_same_for_what_is_linear(name, mode):
    projection = sj.project_orthogonal({"w": columns()}, mode)
    before, _ = run(optax.chain(projection, LINEAR[name]), 20)
    after, _ = run(optax.chain(LINEAR[name], projection), 20)
    np.testing.assert_allclose(before, after, atol=1e-5 * np.abs(after).max())


def test_clipping_by_the_global_norm_gives_one_direction_and_two_lengths():
    """What is clipped before is clipped by the norm of the whole."""
    projection, clip = sj.project_orthogonal({"w": columns()}), optax.clip_by_global_norm(0.1)
    before, _ = run(optax.chain(projection, clip, optax.sgd(1.0)), 1)
    after, _ = run(optax.chain(clip, projection, optax.sgd(1.0)), 1)
    np.testing.assert_allclose(before / np.linalg.norm(before), after / np.linalg.norm(after), atol=1e-5)
    assert np.linalg.norm(after) < 0.97 * np.linalg.norm(before)


def test_before_adam_a_seventh_of_the_update_leaks_into_the_removed_directions():
    shares = []
    for seed in range(4):
        u = columns(seed=10 + seed)
        shares.append(share(u, run(optax.chain(sj.project_orthogonal({"w": u}), optax.adam(1e-2)), 50)[0]))
    assert 0.10 < np.mean(shares) < 0.20, shares
    assert min(shares) > 1e-2


def test_before_adam_nothing_leaks_into_coordinate_axes():
    change, _ = run(optax.chain(sj.project_orthogonal({"w": axes()}), optax.adam(1e-2)), 50)
    assert share(axes(), change) < tolerance(size=4)


def test_the_leak_is_bounded_by_the_spread_of_the_scales():
    u = columns()
    transform = optax.chain(sj.project_orthogonal({"w": u}), optax.scale_by_adam())
    state = transform.init({"w": jnp.zeros((IN, OUT))})
    for g in random(30, IN, OUT, seed=7):
        updates, state = transform.update({"w": array(g)}, state)
    moments = state[1]
    t = int(moments.count)
    m, v = np.asarray(moments.mu["w"]) / (1 - 0.9**t), np.asarray(moments.nu["w"]) / (1 - 0.999**t)
    assert np.abs(np.asarray(u).T @ m).max() < tolerance(size=4)  # the moments themselves are clean
    d = 1 / (np.sqrt(v) + 1e-8)
    for j in range(OUT):
        leak = np.linalg.norm(np.asarray(u).T @ np.asarray(updates["w"])[:, j])
        assert 0 < leak <= (d[:, j].max() - d[:, j].min()) / 2 * np.linalg.norm(m[:, j]) * (1 + 1e-4)


def descents(make, u, count=200):
    """Inner products of random gradients with the steps of an optimizer without momentum, after some history."""
    transform = make(optax.scale_by_adam(b1=0.0, b2=0.9), u)
    scales = np.exp(2 * random(IN, 1, seed=5))  # entries of very unequal size, so that Adam's scales differ
    state = transform.init({"w": jnp.zeros((IN, 1))})
    for g in random(20, IN, 1, seed=6):
        _, state = transform.update({"w": array(scales * g)}, state)
    found = []
    for g in random(count, IN, 1, seed=7):
        updates, _ = transform.update({"w": array(g)}, state)
        found.append(float(np.sum(g * np.asarray(updates["w"]))))
    return np.asarray(found)


def test_only_the_sandwich_always_descends():
    u = columns(rank=8)
    ways = {
        "before": lambda inner, u: optax.chain(sj.project_orthogonal({"w": u}), inner),
        "after": lambda inner, u: optax.chain(inner, sj.project_orthogonal({"w": u})),
        "sandwich": lambda inner, u: sj.sandwich(inner, {"w": u}),
        "complement": lambda inner, u: sj.optim.in_complement(inner, {"w": u}),
    }
    lowest = {name: descents(make, u).min() for name, make in ways.items()}
    assert lowest["before"] < -0.01
    assert lowest["after"] < -0.01
    assert lowest["sandwich"] > -1e-6
    assert lowest["complement"] > -1e-6


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("way", ["after", "sandwich", "complement"])
def test_what_is_projected_last_stays_out_of_the_removed_directions(way, decay):
    u = columns()
    inner = optax.adamw(1e-2, weight_decay=decay)
    projection = sj.project_orthogonal({"w": u})
    make = {
        "after": lambda: optax.chain(inner, projection),
        "sandwich": lambda: sj.sandwich(inner, {"w": u}),
        "complement": lambda: optax.chain(
            sj.optim.in_complement(optax.scale_by_adam(), {"w": u}),
            optax.add_decayed_weights(decay),
            projection,
            optax.scale(-1e-2),
        ),
    }
    change, _ = run(make[way](), 100)
    assert share(u, change) <= 1e-5
    assert np.linalg.norm(change) > 0.5


def test_weight_decay_behind_the_projection_leaks():
    u = columns()
    chain = optax.chain(
        sj.sandwich(optax.scale_by_adam(), {"w": u}), optax.add_decayed_weights(0.1), optax.scale(-1e-2)
    )
    change, _ = run(chain, 100)
    start = random(IN, OUT, seed=3)
    expected = (0.999**100 - 1) * np.asarray(u).T @ start  # the decay alone moves W there
    np.testing.assert_allclose(np.asarray(u).T @ change, expected, atol=1e-4)


@pytest.mark.parametrize("shape", [optax.clip(0.3), optax.scale_by_sign(), optax.scale_by_rss()], ids=range(3))
def test_elementwise_scales_leak_like_adam(shape):
    u = columns()
    change, _ = run(optax.chain(sj.project_orthogonal({"w": u}), shape, optax.scale(-0.1)), 20)
    assert share(u, change) > 1e-2
    change, _ = run(sj.sandwich(optax.chain(shape, optax.scale(-0.1)), {"w": u}), 20)
    assert share(u, change) < 1e-5


def test_rounding_of_bfloat16_parameters_breaks_orthogonality():
    """By up to 2^-9 of each entry's size at every step, as the dtype does."""
    u = columns()
    sandwich = lambda: sj.sandwich(optax.adam(1e-3), {"w": u})
    start = np.asarray(array(random(IN, OUT, seed=3), jnp.bfloat16), np.float64)
    change, end = run(sandwich(), 1, start=start, dtype=jnp.bfloat16)
    moved = np.linalg.norm(np.asarray(u).T @ change)
    assert 2.0**-14 * np.linalg.norm(end) < moved < 2.0**-8 * np.linalg.norm(end)
    change, _ = run(sandwich(), 1, start=start)
    assert np.linalg.norm(np.asarray(u).T @ change) < tolerance(size=4)


def test_adam_does_not_blow_up_rounding():
    """A gradient inside the removed directions leaves rounding only, which Adam would bring to full size."""
    u = columns()
    g = {"w": u @ array(random(3, OUT))}
    sizes = {}
    for rtol in (0.0, None):
        transform = optax.chain(sj.project_orthogonal({"w": u}, rtol=rtol), optax.scale_by_adam(eps=1e-12))
        updates, _ = transform.update(g, transform.init(g))
        sizes[rtol] = float(jnp.sqrt(jnp.mean(jnp.square(updates["w"]))))
    assert 0.3 < sizes[0.0] <= 1.0
    assert sizes[None] == 0.0


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_gradients_of_any_size_are_projected(size):
    u, g = columns(), random(IN, OUT)
    transform = sj.project_orthogonal({"w": u})
    updates, _ = transform.update({"w": array(size * g)}, transform.init({"w": u @ jnp.ones((3, OUT))}))
    expected = g - np.asarray(u) @ (np.asarray(u).T @ g)
    np.testing.assert_allclose(np.asarray(updates["w"], np.float64) / size, expected, atol=1e-5)


def test_what_is_not_finite_is_not_hidden():
    transform = sj.project_orthogonal({"w": columns()})
    g = {"w": array(random(IN, OUT)).at[0, 0].set(jnp.inf)}
    assert not jnp.isfinite(transform.update(g, transform.init(g))[0]["w"]).all()


def test_renorm_gives_each_matrix_its_length_back():
    u, g = columns(rank=9), array(random(IN, OUT))
    plain, scaled = (
        np.asarray(t.update({"w": g}, t.init({"w": g}))[0]["w"])
        for t in (sj.project_orthogonal({"w": u}), sj.project_orthogonal({"w": u}, renorm="rms"))
    )
    np.testing.assert_allclose(np.linalg.norm(scaled), np.linalg.norm(g), rtol=1e-5)
    np.testing.assert_allclose(scaled / np.linalg.norm(scaled), plain / np.linalg.norm(plain), atol=tolerance(size=4))
    step, _ = run(sj.sandwich(optax.adam(1e-2), {"w": u}, renorm="rms"), 1)
    np.testing.assert_allclose(np.linalg.norm(step), 1e-2 * np.sqrt(IN * OUT), rtol=1e-3)


@pytest.mark.parametrize("mode", ["remove", "keep"])
def test_sides(mode):
    inputs, outputs, g = columns(), columns(OUT, 2), random(IN, OUT)
    p, q = (np.asarray(u) @ np.asarray(u).T for u in (inputs, outputs))
    if mode == "remove":
        p, q = np.eye(IN) - p, np.eye(OUT) - q
    expected = {"in": p @ g, "out": g @ q, "both": p @ g @ q}
    for side, basis in (("in", inputs), ("out", outputs), ("both", (inputs, outputs))):
        transform = sj.project_orthogonal({"w": basis}, mode, side)
        updates, _ = transform.update({"w": array(g)}, transform.init({"w": array(g)}))
        np.testing.assert_allclose(updates["w"], expected[side], atol=tolerance(size=4))


def test_kernels_of_any_form_are_seen_as_matrices():
    """A convolution and a kernel with heads against numpy on their flat forms; one basis may serve a stack."""
    shapes = {"conv": (2, 3, 2, 5), "heads": (IN, 2, 3), "stacked": (4, IN, 5)}
    roles = {
        "conv": Role.conv(),
        "heads": Role.dense(in_axes=(0,), out_axes=(1, 2)),
        "stacked": Role.dense(in_axes=(1,), out_axes=(2,), stack_axes=(0,)),
    }
    g = {name: random(*shape) for name, shape in shapes.items()}
    u = columns()
    transform = sj.project_orthogonal(dict.fromkeys(shapes, u), roles=roles)
    tree = {n: array(v) for n, v in g.items()}
    updates, _ = transform.update(tree, transform.init(tree))
    p = np.eye(IN) - np.asarray(u) @ np.asarray(u).T
    np.testing.assert_allclose(updates["conv"].reshape(IN, 5), p @ g["conv"].reshape(IN, 5), atol=tolerance(size=4))
    np.testing.assert_allclose(updates["heads"].reshape(IN, 6), p @ g["heads"].reshape(IN, 6), atol=tolerance(size=4))
    np.testing.assert_allclose(updates["stacked"], np.einsum("ij,sjk->sik", p, g["stacked"]), atol=tolerance(size=4))


@pytest.mark.parametrize("side", ["in", "out"])
def test_of_factors_the_side_of_the_subspace_is_projected(side):
    """So that the change of the whole weight stays out of it; the other factor learns as it does."""
    adapted = sj.adapt({"w": jnp.zeros((IN, OUT))}, {"w": sj.lora(2)}, key=jax.random.key(0))
    trainable, _ = sj.partition(adapted)
    g = jax.tree.map(lambda v: array(random(*v.shape)), trainable)
    u = columns(IN if side == "in" else OUT)
    transform = sj.project_orthogonal({"w": u}, side=side)
    updates, _ = transform.update(g, transform.init(trainable))
    before, after = (dataclasses.asdict(t["w"]) for t in (g, updates))
    p = np.eye(len(u)) - np.asarray(u) @ np.asarray(u).T
    changed, kept = ("a", "b") if side == "in" else ("b", "a")
    expected = p @ before["a"] if side == "in" else before["b"] @ p
    np.testing.assert_allclose(after[changed], expected, atol=tolerance(size=4))
    np.testing.assert_array_equal(after[kept], before[kept])


def test_a_new_basis_goes_into_the_state_and_nothing_compiles_again():
    old, new = columns(seed=1), columns(seed=2)
    optimizer = optax.apply_if_finite(optax.chain(sj.sandwich(optax.sgd(1.0), {"w": old}), optax.scale(1.0)), 3)
    g = {"w": array(random(IN, OUT))}
    traces = []

    @jax.jit
    def step(state):
        traces.append(None)
        return optimizer.update(g, state, g)

    updates, state = step(optimizer.init(g))
    assert share(old, np.asarray(updates["w"])) < tolerance(size=4) < share(new, np.asarray(updates["w"]))
    updates, _ = step(sj.optim.replace_basis(state, {"w": new}))
    assert share(new, np.asarray(updates["w"])) < tolerance(size=4) < share(old, np.asarray(updates["w"]))
    assert len(traces) == 1
    with pytest.raises(StructureError, match="make room from the start"):
        sj.optim.replace_basis(state, {"w": columns(rank=4)})
    with pytest.raises(StructureError, match="v: the new basis"):
        sj.optim.replace_basis(state, {"w": new, "v": new})
    with pytest.raises(StructureError, match="holds no project_orthogonal"):
        sj.optim.replace_basis(optax.adam(1.0).init(g), {"w": new})


def test_a_basis_for_one_step_comes_with_the_update():
    old, new = columns(seed=1), columns(seed=2)
    g = {"w": array(random(IN, OUT))}
    for optimizer in (
        optax.chain(sj.project_orthogonal({"w": old}), optax.sgd(1.0)),
        sj.sandwich(optax.sgd(1.0), {"w": old}),
    ):
        updates, state = optimizer.update(g, optimizer.init(g), basis={"w": new})
        assert share(new, np.asarray(updates["w"])) < tolerance(size=4)
        updates, _ = optimizer.update(g, state)
        assert share(old, np.asarray(updates["w"])) < tolerance(size=4)


@pytest.mark.parametrize("make", [sj.project_orthogonal, lambda b: sj.sandwich(optax.sgd(1.0), b)], ids=["one", "both"])
def test_a_step_that_donates_its_state_leaves_the_given_bases_alone(make):
    u = columns()
    optimizer, g = make({"w": u}), {"w": array(random(IN, OUT))}
    state = sj.optim.replace_basis(optimizer.init(g), {"w": u})
    step = jax.jit(optimizer.update, donate_argnums=1)
    _, state = step(g, state)
    step(g, state)
    assert not u.is_deleted()
    optimizer.init(g)


def test_bases_come_as_numpy_arrays_and_trees_with_holes():
    u, tree = np.asarray(columns()), {"a": {"w": array(random(IN, OUT)), "b": jnp.ones(3)}}
    for basis in ({"a/w": u}, {"a": {"w": u, "b": None}}):
        transform = sj.project_orthogonal(basis)
        updates, _ = transform.update(tree, jax.jit(transform.init)(tree))
        assert share(u, np.asarray(updates["a"]["w"])) < tolerance(size=4)


def test_bad_bases_are_refused_by_name():
    params = {"w": jnp.zeros((IN, OUT)), "k": jnp.zeros((2, 2, 3, 5)), "b": jnp.zeros(3)}

    def init(basis, **options):
        return sj.project_orthogonal(basis, **options).init(params)

    with pytest.raises(PatternError, match=r"wi: there is a basis.*nearest are 'w'"):
        init({"wi": columns()})
    with pytest.raises(StructureError, match=r"w: .*\(7, 2\); expected \[12, k\] in float32.*other side"):
        init({"w": columns(OUT, 2)})
    with pytest.raises(StructureError, match="w: the basis is in bfloat16"):
        init({"w": columns().astype(jnp.bfloat16)})
    with pytest.raises(StructureError, match="w: 13 columns in 12 dimensions"):
        init({"w": jnp.zeros((IN, 13))})
    with pytest.raises(StructureError, match="w: the basis is off orthonormal columns by"):
        init({"w": 1.1 * columns()})
    with pytest.raises(RoleError, match=r"k: shape .*Pass roles"):
        init({"k": columns()})
    with pytest.raises(ValueError, match="mode='drop'"):
        init({"w": columns()}, mode="drop")
    with pytest.raises(ValueError, match="renorm='l2'"):
        init({"w": columns()}, renorm="l2")
    transform = sj.project_orthogonal({"w": columns()})
    with pytest.raises(StructureError, match="other side"):
        transform.update(params, transform.init(params), basis={"w": columns(OUT, 2)})


class Small(nnx.Module):
    """Two layers."""

    def __init__(self):
        self.l1, self.l2 = nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.l2(jnp.tanh(self.l1(x)))


@pytest.mark.parametrize("make", [sj.sandwich, lambda inner, basis: optax.chain(inner, sj.project_orthogonal(basis))])
def test_an_nnx_optimizer_keeps_out_of_the_subspace(make):
    columns = orthonormalize(jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32))
    model = Small()
    before = model.l1.kernel[...]
    optimizer = nnx.Optimizer(model, make(optax.adam(0.1), {"l1/kernel": columns}), wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 6))) ** 2))(model))
    change = model.l1.kernel[...] - before
    assert jnp.abs(change).max() > 0.1
    assert jnp.abs(columns.T @ change).max() <= tolerance(size=6, norm=jnp.abs(change).max())


def test_a_basis_that_fits_no_leaf_of_the_updates_is_refused():
    optimizer = sj.project_orthogonal({"a/w": jnp.eye(3)[:, :1]})
    state = optimizer.init({"a": {"w": jnp.ones((3, 2))}})
    for tree in ({"b": {"w": jnp.ones((3, 2))}}, {"a": jnp.ones((3, 2))}):  # the second one is a prefix of the path
        with pytest.raises(PatternError, match="a/w"):
            optimizer.update(tree, state)
    updates, _ = optimizer.update({"a": {"w": None}, "b": jnp.ones(2)}, state)  # no gradient is no other tree
    assert updates["a"]["w"] is None


@pytest.mark.parametrize(("make", "times"), [(sj.project_orthogonal, 1), (lambda b: sj.sandwich(optax.sgd(1.0), b), 1)])
def test_a_step_reads_the_tree_once(monkeypatch, make, times):
    params = {"w": jnp.ones((3, 2))}
    optimizer = make({"w": jnp.eye(3)[:, :1]})
    state, calls = optimizer.init(params), []
    for module in ("_bases", "_matrix_views"):
        original = sys.modules[f"subspace_jax.optim.{module}"].matrix_views
        counted = lambda *a, original=original: (calls.append(None), original(*a))[1]
        monkeypatch.setattr(f"subspace_jax.optim.{module}.matrix_views", counted)
    optimizer.update(params, state, params)
    assert len(calls) == times
