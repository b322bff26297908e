"""CoSO against its steps in numpy float64, and what it promises to keep."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import subspace_jax as sj
from subspace_jax.core import PatternError, RankError, StructureError
from subspace_jax.linalg import frequent_directions
from tests.tolerances import tolerance

SIDES = ["out", "in"]
B1, B2, EPS = 0.9, 0.999, 1e-6
next_task = jax.jit(sj.methods.coso.next_task, static_argnames=("energy_threshold", "min_new"))


def svd(matrix):
    """Singular vectors with the library's signs: the largest entry of each left one is positive."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    return u * signs, s, vt * signs[:, None]


class Oracle:
    """The steps of the specification, for one kernel `[in, out]` and a list of earlier directions."""

    def __init__(self, shape, side, r1, r2, gap, lr):
        self.side, self.r1, self.r2, self.gap, self.lr = side, r1, r2, gap, lr
        self.size = shape[0] if side == "in" else shape[1]
        self.history = np.zeros((self.size, 0))
        self.reset()

    def reset(self):
        self.t, self.sketch, self.mu, self.nu = 0, None, 0.0, 0.0

    def step(self, gradient):
        g = gradient if self.side == "in" else gradient.T
        g = g - self.history @ (self.history.T @ g)
        if self.t % self.gap == 0:
            u, s, _ = svd(g)
            self.basis = u[:, : self.r1]
            self.basis = self.basis - self.history @ (self.history.T @ self.basis)
            columns = u[:, : self.r2] * s[: self.r2]
            if self.sketch is None:
                self.sketch = columns
            else:
                u1, s1, _ = np.linalg.svd(np.hstack([self.sketch, columns]), full_matrices=False)
                d = s1[self.r2] ** 2 if len(s1) > self.r2 else 0.0
                self.sketch = u1[:, : self.r2] * np.sqrt(np.maximum(s1[: self.r2] ** 2 - d, 0))
        self.t += 1
        r = self.basis.T @ g
        self.mu, self.nu = B1 * self.mu + (1 - B1) * r, B2 * self.nu + (1 - B2) * r**2
        size = self.lr * np.sqrt(1 - B2**self.t) / (1 - B1**self.t)
        found = -size * self.basis @ (self.mu / (np.sqrt(self.nu) + EPS))
        return found if self.side == "in" else found.T

    def end(self, energy_threshold, min_new):
        u, s, _ = np.linalg.svd(self.sketch, full_matrices=False)
        share = np.cumsum(s**2) / np.sum(s**2)
        self.history = np.hstack([self.history, u[:, : max(int((share < energy_threshold).sum()), min_new)]])
        self.reset()


def gradients(shape, count, seed=0, decay=0.6):
    """Random gradients whose singular values are well apart, so that each has its own directions."""
    rng, size = np.random.default_rng(seed), min(shape)
    for _ in range(count):
        u, v = (np.linalg.qr(rng.normal(size=(n, size)))[0] for n in shape)
        yield (u * decay ** np.arange(size)) @ v.T


def low_rank(shape, ranks, seed=0):
    """Gradients of the given ranks, all columns and rows in the same few directions."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(shape[0], max(ranks))), rng.normal(size=(max(ranks), shape[1]))
    return [(left * rng.normal(size=max(ranks)) * (np.arange(max(ranks)) < r)) @ right for r in ranks]


def run(optimizer, state, grads, update=None):
    """Updates of each step, and the state."""
    found, update = [], update or jax.jit(optimizer.update)
    for g in grads:
        u, state = update({"w": jnp.asarray(g, jnp.float32)}, state)
        found.append(np.asarray(u["w"], np.float64))
    return found, state


def start(optimizer, shape):
    return optimizer.init({"w": jnp.zeros(shape)})


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("shape", "gap"), [((12, 9), 1), ((8, 14), 3)])
def test_two_tasks_follow_the_specification(side, shape, gap):
    optimizer = sj.coso(1e-2, 3, 4, gap, side, tasks=2)
    oracle, state = Oracle(shape, side, 3, 4, gap, 1e-2), start(optimizer, shape)
    for task in range(2):
        grads = list(gradients(shape, 7, task))
        found, state = run(optimizer, state, grads)
        for i, g in enumerate(grads):
            np.testing.assert_allclose(found[i], oracle.step(g), atol=2e-5, err_msg=f"task {task} step {i}")
        s = np.asarray(state.sketch["w"], np.float64)
        np.testing.assert_allclose(s @ s.T, oracle.sketch @ oracle.sketch.T, atol=1e-5)
        state = next_task(state, 0.9)
        oracle.end(0.9, 1)
        m = np.asarray(state.history["w"], np.float64)
        assert int(state.used["w"]) == oracle.history.shape[1] > task
        np.testing.assert_allclose(m @ m.T, oracle.history @ oracle.history.T, atol=1e-4)
        assert int(state.count) == 0
        assert not any(np.asarray(v).any() for v in (state.mu["w"], state.nu["w"], state.sketch["w"]))


def leak(guard, side, ranks, seed=0):
    """The largest part of any update in the history, of a task with gradients of the given ranks."""
    shape = (16, 16)
    optimizer = sj.coso(1.0, 6, 8, 1, side, tasks=3, guard=guard)
    _, state = run(optimizer, start(optimizer, shape), low_rank(shape, [8] * 4, 7))
    state = next_task(state)
    found, state = run(optimizer, state, low_rank(shape, ranks, seed))
    m = np.asarray(state.history["w"])
    assert int(state.used["w"]) >= 5
    return max(np.abs(m.T @ (u if side == "in" else u.T)).max() for u in found)


@pytest.mark.parametrize("side", SIDES)
def test_nothing_of_an_update_reaches_the_history_even_where_gradients_have_small_and_changing_ranks(side):
    ranks = [5, 1, 4, 1, 2, 5, 1, 3]
    assert leak(True, side, ranks) < 1e-5
    assert leak(False, side, ranks) > 1e-3  # the official code, without the guard


@pytest.mark.parametrize("side", SIDES)
def test_outputs_that_the_history_protects_stay(side):
    optimizer = sj.coso(1e-1, 4, 6, 1, side, tasks=3)
    _, state = run(optimizer, start(optimizer, (12, 10)), gradients((12, 10), 5))
    state = next_task(state)
    found, state = run(optimizer, state, gradients((12, 10), 20, 1))
    change, m = sum(found), np.asarray(state.history["w"], np.float64)
    assert np.abs(change).max() > 0.1
    if side == "in":
        old_inputs = np.random.default_rng(0).normal(size=(5, m.shape[1])) @ m.T
        np.testing.assert_allclose(old_inputs @ change, 0, atol=1e-5)
    else:
        x = np.random.default_rng(0).normal(size=(5, 12))
        np.testing.assert_allclose(x @ change @ m, 0, atol=1e-5)


def test_steps_have_the_rank_of_the_subspace_and_tasks_have_more():
    optimizer = sj.coso(1e-2, 3, 6)
    found, state = run(optimizer, start(optimizer, (12, 10)), gradients((12, 10), 6))
    assert [np.linalg.matrix_rank(u, 1e-6) for u in found] == [3] * 6
    assert np.linalg.matrix_rank(sum(found), 1e-5) > 6
    p = np.asarray(state.basis["w"])
    np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-5)


def test_a_full_basis_that_stays_is_adam_in_turned_coordinates():
    shape, grads = (6, 9), list(gradients((6, 9), 8))
    optimizer = sj.coso(1e-2, 6, 6, 10**6, "in", tasks=1)
    found, state = run(optimizer, start(optimizer, shape), grads)
    basis = np.asarray(state.basis["w"], np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(6), atol=1e-5)
    # eps of Adam's own kind is inside the correction, which 1e-12 makes equal.
    tiny, adam = sj.coso(1e-2, 6, 6, 10**6, "in", tasks=1, eps=1e-12), optax.adam(1e-2, eps=1e-12)
    found, _ = run(tiny, start(tiny, shape), grads)
    turned, _ = run(adam, start(adam, shape), [basis.T @ g for g in grads])
    for a, b in zip(found, turned, strict=True):
        np.testing.assert_allclose(a, basis @ b, atol=2e-5)


def test_eps_is_outside_the_bias_correction():
    """One step on tiny gradients, where eps counts: lr sqrt(1-b2)/(1-b1) (1-b1) g / (sqrt(1-b2) |g| + eps)."""
    optimizer = sj.coso(1.0, 1, 1, side="in", tasks=1)
    g = 1e-5
    found, _ = run(optimizer, start(optimizer, (1, 1)), [np.array([[g]])])
    root = np.sqrt(1 - B2)
    np.testing.assert_allclose(found[0], -root * g / (root * g + EPS), rtol=1e-4)


@pytest.mark.parametrize(("rank", "width"), [(3, 4), (10, 4), (10, 10)])
def test_frequent_directions_stay_below_and_within_their_bound(rank, width):
    rng = np.random.default_rng(0)
    span = np.linalg.qr(rng.normal(size=(10, rank)))[0]
    sketch, exact, bound = jnp.zeros((10, width)), np.zeros((10, 10)), 0.0
    for _ in range(12):
        g = span @ (0.7 ** np.arange(rank)[:, None] * rng.normal(size=(rank, 7)))
        u, s, _ = np.linalg.svd(g, full_matrices=False)
        before = np.hstack([np.asarray(sketch, np.float64), (u * s)[:, :width]])
        values = np.linalg.svd(before, compute_uv=False)
        bound += (s[width] ** 2 if len(s) > width else 0.0) + (values[width] ** 2 if len(values) > width else 0.0)
        exact += g @ g.T
        sketch = frequent_directions(sketch, jnp.asarray((u * s)[:, :width], jnp.float32))
    s = np.asarray(sketch, np.float64)
    values = np.linalg.eigvalsh(exact - s @ s.T)
    size = np.linalg.norm(exact, 2)
    assert values.min() > -1e-5 * size
    assert values.max() <= bound + 1e-5 * size
    if rank <= width:
        np.testing.assert_allclose(s @ s.T, exact, atol=1e-5 * size)
    else:
        assert values.max() > 1e-3 * size


@functools.cache
def coso_of_width(r2):
    return sj.coso(1e-2, 1, r2, side="in", tasks=2)


@pytest.mark.parametrize(
    ("sigma", "energy_threshold", "min_new", "k"),
    [
        ((1, 1, 1, 1), 0.6, 0, 2),
        ((10, 1), 0.98, 0, 0),
        ((10, 1), 0.98, 1, 1),
        ((10, 1), 0.9900, 0, 0),
        ((10, 1), 0.9902, 0, 1),
        ((3, 2, 1), 2.0, 0, 3),
        ((0, 0), 0.98, 1, 0),
    ],
)
def test_the_threshold_is_strict(sigma, energy_threshold, min_new, k):
    optimizer = coso_of_width(len(sigma))
    _, state = run(optimizer, start(optimizer, (6, 6)), [np.diag([*sigma, *[0.0] * (6 - len(sigma))])])
    found = sj.methods.coso.next_task(state, energy_threshold, min_new=min_new)
    assert int(found.used["w"]) == k
    assert int(np.asarray(found.history["w"]).any(0).sum()) == k


@pytest.mark.parametrize("side", SIDES)
def test_the_history_stays_orthonormal_spans_the_tasks_and_compiles_once(side):
    traces, rng = [], np.random.default_rng(0)
    optimizer, size = sj.coso(1e-2, 4, 6, 2, side, tasks=5), 24
    spans = np.split(np.linalg.qr(rng.normal(size=(size, size)))[0], 6, axis=1)

    @jax.jit
    def update(g, state):
        traces.append(None)
        return optimizer.update(g, state)

    end = jax.jit(lambda s: sj.methods.coso.next_task(s, 2.0))
    state = start(optimizer, (size, size))
    for task in range(5):
        grads = [spans[task] @ rng.normal(size=(4, size)) for _ in range(6)]
        _, state = run(optimizer, state, [g if side == "in" else g.T for g in grads], update)
        state = end(state)
    used = int(state.used["w"])
    m = np.asarray(state.history["w"])
    assert used == 20
    assert not m[:, used:].any()
    np.testing.assert_allclose(m[:, :used].T @ m[:, :used], np.eye(used), atol=1e-4)
    assert scipy.linalg.subspace_angles(m[:, :used], np.hstack(spans[:5])).max() < 1e-3
    assert len(traces) == 1


def test_learning_stops_where_the_history_is_everything():
    optimizer = sj.coso(1e-2, 4, 6, side="in", tasks=1)
    _, state = run(optimizer, start(optimizer, (6, 6)), gradients((6, 6), 3, decay=0.9))
    state = next_task(state, 2.0)
    found, _ = run(optimizer, state, gradients((6, 6), 3, 1))
    assert int(state.used["w"]) == 6
    assert np.abs(found).max() < tolerance(size=4)


def test_moments_can_be_turned_with_the_basis():
    grads = list(gradients((8, 10), 2))
    kept, turned = (sj.coso(1e-2, 3, 4, side="in", rotate_moments=v) for v in (False, True))
    _, first = run(kept, start(kept, (8, 10)), grads[:1])
    _, plain = run(kept, first, grads[1:])
    _, rotated = run(turned, first, grads[1:])
    mixing = np.asarray(rotated.basis["w"]).T @ np.asarray(first.basis["w"])
    difference = B1 * (mixing @ first.mu["w"] - np.asarray(first.mu["w"]))
    np.testing.assert_allclose(rotated.mu["w"] - plain.mu["w"], difference, atol=tolerance(size=4))


def test_a_stack_is_its_layers_and_a_convolution_its_matrix():
    roles = {"stack": sj.Role.dense((1,), (2,), (0,)), "conv": sj.Role.conv()}
    optimizer = sj.coso(1e-2, 3, 4, side="in", tasks=2, roles=roles)
    rng = np.random.default_rng(0)
    layers, conv = np.stack(list(gradients((8, 10), 3))), rng.normal(size=(2, 2, 3, 5))
    tree = {"stack": jnp.asarray(layers, jnp.float32), "conv": jnp.asarray(conv, jnp.float32)}
    updates, state = jax.jit(optimizer.update)(tree, optimizer.init(tree))
    ended = next_task(state)
    for i, g in enumerate(layers):
        single, one = run(optimizer, start(optimizer, (8, 10)), [g])
        np.testing.assert_allclose(updates["stack"][i], single[0], atol=2e-5)
        assert int(next_task(one).used["w"]) == int(ended.used["stack"][i])
    single, _ = run(optimizer, start(optimizer, (12, 5)), [conv.reshape(12, 5)])
    np.testing.assert_allclose(updates["conv"].reshape(12, 5), single[0], atol=2e-5)


def test_state_has_the_published_size():
    """m r1 + 2 n r1 beside the sketch and the history, for a kernel [n, m] of side "out"."""
    state = jax.eval_shape(sj.coso(1e-3, 15, 100, tasks=5).init, {"w": jnp.zeros((96, 768))})
    assert state.basis["w"].shape == (768, 15)
    assert state.mu["w"].shape == state.nu["w"].shape == (96, 15)
    assert state.sketch["w"].shape == (768, 100)
    assert state.history["w"].shape == (768, 500)


def test_other_leaves_get_adam_and_decay_is_decoupled():
    params = {"w": jnp.ones((6, 5)), "head": jnp.ones((5, 3)), "bias": jnp.ones(5)}
    optimizer = sj.coso(1e-2, 2, 3, select="w", weight_decay=0.1, eps=1e-12)
    state = optimizer.init(params)
    assert isinstance(state.basis["head"], optax.MaskedNode)
    grads = {
        "w": jnp.asarray(next(gradients((6, 5), 1)), jnp.float32),
        "head": jnp.full((5, 3), 2.0),
        "bias": -jnp.ones(5),
    }
    updates, _ = optimizer.update(grads, state, params)
    np.testing.assert_allclose(updates["head"], -0.01 - 0.001, rtol=1e-4)
    np.testing.assert_allclose(updates["bias"], 0.01 - 0.001, rtol=1e-4)
    bare = sj.coso(1e-2, 2, 3, select="w", eps=1e-12)
    without, _ = bare.update(grads, bare.init(params))
    np.testing.assert_allclose(updates["w"] - without["w"], -0.001, rtol=1e-3)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)])
def test_the_out_side_of_a_kernel_is_the_in_side_of_its_transpose(shape):
    """Signs are those of the basis on both sides, so that moments are carried over the same flips, or none."""
    grads = [np.asarray(g, np.float32) for g in gradients(shape, 12)]
    found = []
    for side, turn in (("out", lambda g: g), ("in", np.transpose)):
        optimizer = sj.coso(1e-2, 4, 6, 3, side, tasks=2)
        updates, _ = run(optimizer, start(optimizer, turn(grads[0]).shape), list(map(turn, grads)))
        found.append([turn(np.asarray(u)) for u in updates])
    for out, transposed in zip(*found, strict=True):
        np.testing.assert_allclose(out, transposed, rtol=0, atol=tolerance(size=4) * 1e-2)


def test_a_gradient_inside_the_history_moves_nothing():
    """What is left of it is rounding, to which Adam would give full steps."""
    optimizer, rng = sj.coso(1e-2, 2, 2, side="in", tasks=3), np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(8, 2)))[0]
    g = 100.0 * left @ rng.normal(size=(2, 6))
    _, state = run(optimizer, start(optimizer, (8, 6)), [g])
    state = next_task(state, 2.0)
    updates, _ = run(optimizer, state, [g, 3 * g])
    assert not any(np.asarray(u).any() for u in updates)


def test_a_schedule_begins_again_with_each_task():
    optimizer = sj.coso(optax.linear_schedule(1.0, 0.0, 4), 2, 3)
    g = next(gradients((6, 5), 1))
    first, state = run(optimizer, start(optimizer, (6, 5)), [g, g])
    assert np.abs(first[1]).max() < np.abs(first[0]).max()
    again, _ = run(optimizer, next_task(state, 0.0, min_new=0), [g])
    np.testing.assert_allclose(again[0], first[0], atol=tolerance(size=4))


def test_keeps_dtypes_inside_other_transformations_and_ends_tasks_there():
    params = {"w": jnp.ones((6, 5), jnp.bfloat16), "head": jnp.ones((5, 3))}
    split = optax.multi_transform({"a": sj.coso(1e-2, 2, 3), "b": optax.adam(1e-2)}, {"w": "a", "head": "b"})
    for optimizer in (split, optax.MultiSteps(split, 2), optax.apply_if_finite(optax.chain(sj.coso(1e-2, 2, 3)), 2)):
        state = optimizer.init(params)
        updates, after = jax.jit(optimizer.update)(params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        for found in (after, sj.methods.coso.next_task(after), jax.eval_shape(optimizer.init, params)):
            chex.assert_trees_all_equal_shapes_and_dtypes(found, state)


def two_tasks(side, place):
    optimizer = sj.coso(1e-2, 3, 4, 1, side, tasks=2, rotate_moments=True)
    state = optimizer.init({"w": place(jnp.zeros((12, 9)))})
    for g in gradients((12, 9), 2):
        updates, state = jax.jit(optimizer.update)({"w": place(np.asarray(g, np.float32))}, state)
        state = jax.jit(sj.methods.coso.next_task)(state)
    return updates["w"], state.history["w"]


@functools.cache
def two_tasks_of_whole_arrays(side):
    return two_tasks(side, jnp.asarray)


@pytest.mark.parametrize("spec", [("a", "b"), (None, "b"), ("a",)])
@pytest.mark.parametrize("side", SIDES)
def test_works_where_mesh_axes_are_explicit(spec, side):
    """The types of split arrays are checked as a program is traced, on one device too."""
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        found = two_tasks(side, lambda g: jax.device_put(g, sharding))
        assert found[0].sharding.is_equivalent_to(sharding, 2)
    for a, b in zip(found, two_tasks_of_whole_arrays(side), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bad_options_are_refused_by_name():
    for options in ({"r1": 0}, {"r2": 1}, {"gap": 0}, {"tasks": 1.5}):
        with pytest.raises(RankError, match=next(iter(options))):
            sj.coso(1e-2, **{"r1": 2, "r2": 3, **options})
    with pytest.raises(ValueError, match="side='left'"):
        sj.coso(1e-2, side="left")
    for old, new in (("input", '"in"'), ("output", '"out"')):
        with pytest.raises(ValueError, match=f"side='{old}' is now called {new}"):
            sj.coso(1e-2, side=old)
    with pytest.raises(PatternError, match="nothing_here"):
        sj.coso(1e-2, select="nothing_here").init({"w": jnp.ones((3, 3))})
    with pytest.raises(StructureError, match="holds no coso"):
        sj.methods.coso.next_task(optax.sgd(1.0).init({}))
    optimizer = sj.coso(1e-2, 2, 3, side="in", tasks=1)
    state = start(optimizer, (9, 9))
    _, state = run(optimizer, state, gradients((9, 9), 3))
    _, state = run(optimizer, sj.methods.coso.next_task(state, 2.0), gradients((9, 9), 3, 1))
    with pytest.raises(StructureError, match=r"w: the history would have 6 directions and has room for 3.*tasks="):
        sj.methods.coso.next_task(state, 2.0)


@pytest.mark.optimized
def test_cost_of_an_ordinary_step_at_width_512():
    """Beside a plain Adam step: operations of a program whose refresh branch, which does not run, is left out."""
    x = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
    params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}

    def cost(optimizer, change=lambda state: state):
        def step(params, state, x):
            gradient, back = jax.grad(lambda p, x: jnp.sum((jnp.tanh(x) @ p["w"]) ** 2), (0, 1))(params, x)
            updates, state = optimizer.update(gradient, change(state), params)
            return optax.apply_updates(params, updates), state, back

        state = jax.eval_shape(optimizer.init, params)
        return jax.jit(step).lower(params, state, x).compile().cost_analysis()["flops"]

    ordinary = lambda state: state._replace(count=jnp.ones([], jnp.int32))  # a known count: the branch folds away
    ratio = cost(sj.coso(1e-3, 70, 160, 20), ordinary) / cost(optax.adam(1e-3))
    assert 1.005 < ratio < 1.02
