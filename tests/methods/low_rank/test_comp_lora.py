"""Comp-LoRA: protected singular triples stay triples, whatever is learned, by whatever optimizer."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.linalg import null_space

import subspace_jax as sj
from subspace_jax.core import RankError
from subspace_jax.methods.low_rank.comp_lora import comp_lora, confine, principal_bases, reproject, to_lora
from tests.tolerances import assert_rounding

pytestmark = pytest.mark.filterwarnings("ignore:comp_lora:UserWarning")
KEY = jax.random.key(0)
SHAPES = [(9, 6), (6, 9), (7, 7)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapt(method, w, roles=None):
    return sj.adapt({"w": jnp.asarray(w)}, {"w": method}, key=KEY, roles=roles)


def moved(method, w, roles=None, seed=3):
    """With factors drawn as if by an optimizer that knows of no complement."""
    weight = adapt(method, w, roles)["w"]
    a, b = (jnp.asarray(normal(*v.shape, seed=seed + i), v.dtype) for i, v in enumerate((weight.a, weight.b)))
    return {"w": dataclasses.replace(weight, a=a, b=b)}


def merged(tree):
    return np.asarray(sj.merge(tree, keep_float32=True)["w"], np.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", ["both", "in", "out"])
def test_protected_triples_stay_triples(shape, sides):
    w, p = normal(*shape), 3
    tree = moved(comp_lora(4, alpha=6.0, protect=p, sides=sides), w)
    assert tree["w"].method == "comp_lora" + ("" if sides == "both" else f"[{sides}]")
    after, (u, s, vt) = merged(tree), np.linalg.svd(w.astype(np.float64), full_matrices=False)
    delta = after - w
    size = 1e-5 * np.abs(delta).max()
    if sides != "out":
        np.testing.assert_allclose(u[:, :p].T @ delta, 0, atol=8 * size)
        np.testing.assert_allclose(after.T @ u[:, :p], vt[:p].T * s[:p], atol=1e-4)
        x = normal(5, p, seed=8) @ u[:, :p].T  # inputs in the span give what they gave
        np.testing.assert_allclose(x @ after, x @ w, atol=1e-4)
        found = sj.with_adapters(lambda params, x: x @ params["w"])(tree, x.astype(np.float32))
        np.testing.assert_allclose(found, x @ w, atol=1e-4)
    if sides != "in":
        np.testing.assert_allclose(delta @ vt[:p].T, 0, atol=8 * size)
        np.testing.assert_allclose(after @ vt[:p].T, u[:, :p] * s[:p], atol=1e-4)
    free = {"both": min(shape) - p, "in": shape[0] - p, "out": shape[1] - p}[sides]
    assert np.linalg.matrix_rank(delta, tol=1e-4) == min(4, free, *shape)
    if sides == "both":
        principal = (u[:, :p] * s[:p]) @ vt[:p]
        assert abs(np.sum(delta * principal)) < 1e-4
        expected = np.sum(principal**2) + np.sum((w - principal + delta) ** 2)
        np.testing.assert_allclose(np.sum(after**2), expected, rtol=1e-5)


def test_the_complement_is_that_of_a_null_space():
    w = normal(9, 6)
    tree = moved(comp_lora(4, protect=2), w)
    u, _, vt = np.linalg.svd(w.astype(np.float64))
    n, m = null_space(u[:, :2].T), null_space(vt[:2])
    a, b = tree["w"].original_factors()
    assert_rounding(a, n @ n.T @ np.asarray(tree["w"].a), size=16, dtype="float32")
    assert_rounding(b, np.asarray(tree["w"].b) @ m @ m.T, size=16, dtype="float32")
    assert_rounding(merged(tree), w + float(tree["w"].scale) * np.asarray(a) @ np.asarray(b), size=32, dtype="float32")


def test_it_starts_as_the_weight_with_the_values_of_lora_and_without_protection_is_lora():
    w, x, y = normal(8, 5), normal(20, 8, seed=1), normal(20, 5, seed=2)
    tree, lora = adapt(comp_lora(2, protect=2), w), adapt(sj.lora(2, alpha=1.0, rank_stabilized=True), w)
    np.testing.assert_array_equal(merged(tree), w)
    assert sj.summary(tree).trainable == sj.summary(lora).trainable == 2 * 13
    np.testing.assert_allclose(tree["w"].scale, 1 / np.sqrt(2))
    loss = lambda t, _: jnp.mean((sj.with_adapters(lambda p: x @ p["w"])(t) - y) ** 2)
    run = jax.jit(lambda t: sj.training.scan_steps(loss, optax.adam(1e-2), t, steps=30).adapted)
    free = run(adapt(comp_lora(2, protect=0), w))["w"]
    assert free.protected_in is free.protected_out is None
    assert_rounding(free.a, run(lora)["w"].a, size=30)
    assert_rounding(free.b, run(lora)["w"].b, size=30)


OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "adam": optax.adam(1e-2, eps=1e-4),
    "adamw": optax.adamw(1e-2, eps=1e-4, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_when_stored_factors_are_projected_does_not_matter(name):
    w, x, y = normal(8, 5), normal(20, 8, seed=1), normal(20, 5, seed=2)
    optimizer = OPTIMIZERS[name]
    trainable, frozen = sj.partition(adapt(comp_lora(2, protect=2), w))

    def train(each):
        def step(carry, _):
            trainable, state = carry
            loss = lambda t: jnp.mean((sj.with_adapters(lambda p: x @ p["w"])(sj.combine(t, frozen)) - y) ** 2)
            updates, state = optimizer.update(jax.grad(loss)(trainable), state, trainable)
            whole = sj.combine(optax.apply_updates(trainable, updates), frozen)
            return (sj.partition(reproject(whole) if each else whole)[0], state), None

        start = trainable, optimizer.init(trainable)
        return sj.combine(jax.jit(lambda s: jax.lax.scan(step, s, length=50)[0][0])(start), frozen)

    never, always = train(False), train(True)
    np.testing.assert_allclose(merged(never), merged(always), atol=2e-6)
    assert np.abs(merged(never) - w).max() > 0.05
    u = np.asarray(never["w"].protected_in)
    np.testing.assert_allclose(u.T @ np.asarray(always["w"].a), 0, atol=1e-6)
    if name == "adam":  # Adam leaves the complement with what is stored, not with what is used
        assert np.abs(u.T @ np.asarray(never["w"].a - adapt(comp_lora(2, protect=2), w)["w"].a)).max() > 1e-3


def test_the_energy_rule_and_its_limits():
    w = normal(9, 6)
    mass = np.linalg.svd(w, compute_uv=False) ** 2
    for energy in (0.2, 0.5, 0.8):
        expected = next(p for p in range(1, 7) if mass[:p].sum() >= energy * mass.sum())
        assert adapt(comp_lora(1, energy=energy), w)["w"].protected_in.shape == (9, min(expected, 5))
    low = (normal(9, 3) @ normal(3, 6, seed=1)).astype(np.float32)  # all the energy of a weight of rank 3
    assert adapt(comp_lora(1, energy=1.0), low)["w"].protected_in.shape == (9, 3)
    with pytest.warns(UserWarning, match=r"5 of 6 directions .* at most rank 1, below rank=2"):
        assert adapt(comp_lora(2, energy=1.0), w)["w"].protected_in.shape == (9, 5)
    assert adapt(comp_lora(2, protect="all_but_rank"), w)["w"].protected_in.shape == (9, 4)
    # Layers with different numbers: the largest, with columns of zeros.
    steep = np.diag([9.0, 1, 1, 1]).astype(np.float32)
    stack = np.stack([steep, np.eye(4, dtype=np.float32)])
    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    tree = moved(comp_lora(2, energy=0.7), stack, roles)
    np.testing.assert_array_equal(np.linalg.norm(tree["w"].protected_in, axis=-2).round(5), [[1, 0, 0], [1, 1, 1]])
    after = merged(tree)
    np.testing.assert_allclose(after[0, 0], steep[0], atol=1e-5)
    assert np.abs(after[0, 1:, 1:] - steep[1:, 1:]).min() > 0


def test_all_directions_are_refused_where_nothing_is_left():
    tall, wide = normal(9, 6), normal(6, 9)
    assert adapt(comp_lora(1, protect=5), tall)["w"].protected_in.shape == (9, 5)
    for w, sides, message in ((tall, "both", "at most 5"), (tall, "out", "at most 5"), (wide, "in", "at most 5")):
        with pytest.raises(
            RankError, match=rf"w: .*protect=6 .* leaves nothing to learn for sides='{sides}'.*{message}"
        ):
            adapt(comp_lora(1, protect=6, sides=sides), w)
    for w, sides in ((tall, "in"), (wide, "out")):
        with pytest.warns(UserWarning, match="at most rank 0"):
            assert np.abs(merged(moved(comp_lora(1, protect=6, sides=sides), w)) - w).max() > 0.1


def test_signs_and_rotations_of_tied_directions_do_not_matter():
    q, r = (np.linalg.qr(normal(6, 6, seed=i))[0] for i in (1, 2))
    w = (q * np.array([3, 2, 2, 1, 0.5, 0.2])) @ r.T
    tree = moved(comp_lora(2, protect=3), w.astype(np.float32))
    a = np.asarray(tree["w"].a)
    assert_rounding(tree["w"].original_factors()[0], a - q[:, :3] @ q[:, :3].T @ a, size=64, dtype="float32")


def test_low_precision_weights_are_protected_in_float32():
    w = jnp.asarray(normal(9, 6), jnp.bfloat16)
    tree = moved(comp_lora(2, protect=2), w)
    assert tree["w"].protected_in.dtype == tree["w"].protected_out.dtype == jnp.float32
    u = np.linalg.svd(np.asarray(w, np.float64))[0][:, :2]
    delta = merged(tree) - np.asarray(w, np.float64)
    np.testing.assert_allclose(u.T @ delta, 0, atol=1e-4)
    half = moved(comp_lora(2, protect=2, dtype="bfloat16"), w)["w"].original_factors()
    assert half[0].dtype == jnp.float32


def test_full_fine_tuning_in_the_complement_has_the_same_protection():
    w, x, y = normal(8, 6), normal(20, 8, seed=1), normal(20, 6, seed=2)
    params = {"a": {"w": jnp.asarray(w)}, "b": jnp.ones(3)}
    bases = principal_bases(params, "**/w", protect=2)
    optimizer = optax.chain(optax.adamw(1e-1), sj.project_orthogonal(bases, "remove", "both"))
    loss = lambda p: jnp.mean((x @ p["a"]["w"] - y) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    end = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=20)[0][0])(params)["a"]["w"]
    u, s, vt = np.linalg.svd(w.astype(np.float64))
    np.testing.assert_allclose(np.asarray(end).T @ u[:, :2], vt[:2].T * s[:2], atol=1e-4)
    np.testing.assert_allclose(np.asarray(end) @ vt[:2].T, u[:, :2] * s[:2], atol=1e-4)
    assert np.abs(end - w).max() > 0.3
    with pytest.raises(RankError, match=r"a/w: principal_bases: protect=6 .* leaves nothing"):
        principal_bases(params, "a/w", protect=6)


def test_a_stream_of_o_lora_leaves_protected_triples_alone():
    w, p = normal(8, 6), 2
    loss = lambda params, batch: jnp.mean((sj.with_adapters(lambda q: batch[0] @ q["w"])(params) - batch[1]) ** 2)
    learner = sj.methods.o_lora.learner(
        loss, "w", optax.adam(3e-2), tasks=3, rank=1, alpha=1.0, within=lambda method: confine(method, protect=p)
    )
    state = learner.init({"w": jnp.asarray(w)}, KEY)
    u, s, vt = np.linalg.svd(w.astype(np.float64))
    for task in range(3):
        before = np.asarray(sj.merge(state.adapted)["w"])
        state = learner.start_task(state, task, jax.random.key(task))
        # Starting a task changes no output: what is stored of the last one is what was used of it.
        np.testing.assert_allclose(np.asarray(sj.merge(state.adapted)["w"]), before, atol=1e-5)
        batch = normal(20, 8, seed=10 + task), normal(20, 6, seed=20 + task)
        for i in range(15):
            state, metrics = learner.step(state, batch, jax.random.key(i))
        after = np.asarray(sj.merge(state.adapted)["w"], np.float64)
        np.testing.assert_allclose(after.T @ u[:, :p], vt[:p].T * s[:p], atol=1e-4)
        np.testing.assert_allclose(after @ vt[:p].T, u[:, :p] * s[:p], atol=1e-4)
        assert np.abs(after - before).max() > 0.05
        assert (float(metrics["penalty"]) > 0) == (task > 0)
        state = learner.end_task(state, task, [batch])


def test_export_banks_mergers_and_files(tmp_path):
    w, x = normal(8, 5), normal(3, 8, seed=5)
    params, tree = {"w": jnp.asarray(w)}, moved(comp_lora(2, protect=2), w)
    dense, plain = merged(tree), to_lora(tree)
    assert_rounding(merged(plain), dense, size=16, dtype="float32")
    bank = sj.bank(params, [tree, adapt(sj.lora(1), w)])
    found = sj.per_row(lambda p, x: x @ p["w"])(bank, jnp.array([1, 0, 2]), x)
    np.testing.assert_allclose(found, np.stack([x[0] @ dense, x[1] @ w, x[2] @ w]), atol=1e-5)
    half = sj.merging.task_arithmetic([tree], params, weights=0.5)
    np.testing.assert_allclose(merged(half), w + 0.5 * (dense - w), atol=1e-5)
    sj.save_adapter(tmp_path / "one", tree)
    np.testing.assert_allclose(merged(sj.load_adapter(tmp_path / "one", params)), dense, atol=1e-6)
    outer = {"layer": {"kernel": jnp.asarray(w)}}
    names = sj.io.NameMap((sj.io.NameRule("layer", "layer"),))
    sj.save_peft(tmp_path / "peft", {"layer": {"kernel": tree["w"]}}, outer, names)
    back = sj.merge(sj.load_peft(tmp_path / "peft", outer, names))["layer"]["kernel"]
    assert_rounding(back, dense, size=16, dtype="float32")


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((4, 2), name="dense")(x)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_linen_and_nnx(library):
    x = jnp.asarray(normal(3, 6))
    if library == "linen":
        params = Layer().init(KEY, x)["params"]["dense"]

        def apply(p, x):
            return Layer().apply({"params": {"dense": p}}, x)
    else:
        graph, state = nnx.split(nnx.LinearGeneral(6, (4, 2), rngs=nnx.Rngs(0)))
        params = nnx.to_pure_dict(state)

        def apply(p, x):
            copy = jax.tree.map(lambda v: v, state)
            nnx.replace_by_pure_dict(copy, p)
            return nnx.merge(graph, copy)(x)

    tree = sj.adapt(params, {"kernel": comp_lora(2, protect=2)}, key=KEY, roles=sj.roles(apply, params, x))
    b = jnp.asarray(normal(*tree["kernel"].b.shape))
    tree = tree | {"kernel": dataclasses.replace(tree["kernel"], b=b)}
    np.testing.assert_allclose(sj.with_adapters(apply)(tree, x), apply(sj.merge(tree), x), atol=1e-5)
    u = np.asarray(tree["kernel"].protected_in)
    protected = jnp.asarray(normal(2, 2) @ u.T)
    np.testing.assert_allclose(apply(sj.merge(tree), protected), apply(params, protected), atol=1e-5)


def test_bad_options_are_refused_by_name():
    bad = {"rank": 0, "alpha": 0.0, "dropout": 1.0, "dtype": "int8", "sides": "x", "energy": 0.0, "protect": -1}
    for option, value in bad.items():
        with pytest.raises(ValueError, match=f"comp_lora: {option}="):
            comp_lora(**{option: value})
    with pytest.raises(ValueError, match="comp_lora: protect='all'"):
        comp_lora(protect="all")
    with pytest.raises(TypeError, match="confine: takes a method"):
        confine(2)
    with pytest.raises(TypeError, match=r"confine: pissa makes LowRank"):
        adapt(confine(sj.pissa(2)), normal(6, 6))
    with pytest.raises(RankError, match=r"w: .*abstract here; pass protect="):
        jax.eval_shape(lambda w: adapt(comp_lora(), w), jnp.ones((4, 4)))
