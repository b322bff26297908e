"""SaRA against numpy: which entries learn, the nuclear norm and its gradient, and the optimizer's second selection."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import subspace_jax as sj
from subspace_jax.core import PatternError, RankError, StructureError, SubspaceError
from tests.tolerances import tolerance

sara = sj.methods.sara
EVERYTHING = {"min_side": 0, "min_entries": 0}


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapt(params, threshold, **options):
    params = jax.tree.map(jnp.asarray, params)
    return sj.adapt(params, {"**": sara.sara(threshold)}, key=jax.random.key(0), **options)


def gradient_tree(adapted, make):
    """A gradient of the trained values, made from numbers."""
    return jax.tree.map(lambda v: jnp.asarray(make(v.shape), v.dtype), sj.partition(adapted)[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_selects_what_is_below_one_threshold_for_all_arrays(dtype):
    params = {"w": jnp.asarray(normal((12, 7)), dtype), "small": jnp.asarray(0.1 * normal((5, 4)), dtype)}
    params["b"] = jnp.zeros(3, dtype)
    adapted = adapt(params, 0.3)
    for name, w in params.items():
        magnitudes = np.abs(np.asarray(w, np.float32)).ravel()
        np.testing.assert_array_equal(adapted[name].indices, np.flatnonzero(magnitudes < np.float32(0.3)))
        assert adapted[name].values.dtype == jnp.float32
        np.testing.assert_array_equal(sj.merge(adapted)[name], w)
    assert adapted["small"].count > 0.9 * 20
    assert adapted["w"].count < 0.5 * 84


def test_an_entry_at_the_threshold_is_not_selected_and_one_of_a_leaf_without_small_entries_stays():
    adapted = adapt({"w": np.array([[0.25, -0.25, 0.2], [1.0, -0.1, 0.5]]), "large": np.full((2, 2), 9.0)}, 0.25)
    assert adapted["w"].indices.tolist() == [2, 4]
    assert adapted["large"].count == 0
    np.testing.assert_array_equal(adapted["large"].materialize(), np.full((2, 2), 9.0))


def test_layers_of_a_stack_are_padded_to_the_longest():
    w = np.stack([0.1 * normal((4, 3), 1), normal((4, 3), 2), 9 + np.abs(normal((4, 3), 3))])
    weight = adapt({"w": w}, 0.5, roles={"w": sj.Role.dense((1,), (2,), (0,))})["w"]
    for layer in range(3):
        real = np.flatnonzero(np.abs(w[layer]) < 0.5)
        np.testing.assert_array_equal(weight.indices[layer][: real.size], real)
        assert (np.asarray(weight.indices[layer][real.size :]) == 12).all()
    assert sj.summary({"w": weight}).trainable == int((np.abs(w) < 0.5).sum())
    np.testing.assert_array_equal(weight.materialize(), w)


def test_room_that_was_given_serves_traced_arrays():
    w = normal((4, 3))
    make = lambda w: sj.adapt({"w": w}, {"w": sara.sara(0.5, slots=9)}, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(make)(w), make(jnp.asarray(w)))
    real = np.flatnonzero(np.abs(w) < 0.5)
    np.testing.assert_array_equal(make(jnp.asarray(w))["w"].indices, [*real, *[12] * (9 - real.size)])


def test_the_threshold_of_a_share_is_that_of_all_arrays_together():
    params = {"w": jnp.asarray(normal((9, 5))), "b": jnp.asarray(0.01 * normal((5,), 1))}
    magnitudes = np.concatenate([np.abs(v).ravel() for v in params.values()])
    for share in (0.1, 0.5):
        assert (magnitudes < sara.threshold_for(params, share)).sum() == math.floor(share * 50)
    assert sara.threshold_for(params, 1.0) == math.inf
    assert sum(w.count for w in adapt(params, math.inf).values()) == 50


def test_published_rate():
    expected = {2e-3: 4.96585e-4, 8e-4: 7.55784e-4, 2e-4: 9.32394e-4}
    for threshold, rate in expected.items():
        assert sara.default_rate(threshold) == pytest.approx(rate, rel=1e-5)


@jax.jit
def norm_and_gradient(adapted):
    trainable, frozen = sj.partition(adapted)
    return jax.value_and_grad(lambda t: sara.nuclear_norm(sj.combine(t, frozen), **EVERYTHING))(trainable)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_nuclear_gradient_is_that_of_the_sum_of_singular_values(shape):
    w = normal(shape)
    adapted = adapt({"w": w}, 0.8)
    indices = np.asarray(adapted["w"].indices)
    placed = np.zeros(w.size)
    placed[indices] = w.ravel()[indices]

    def norm(entries):
        full = placed.copy()
        full[indices] = entries
        return np.linalg.svd(full.reshape(shape), compute_uv=False).sum()

    value, found = norm_and_gradient(adapted)
    p = placed[indices]
    assert float(value) == pytest.approx(norm(p), rel=1e-5)
    central = [(norm(p + 1e-5 * e) - norm(p - 1e-5 * e)) / 2e-5 for e in np.eye(p.size)]
    np.testing.assert_allclose(found["w"].values, central, atol=1e-3)
    assert float(found["w"].values @ p) == pytest.approx(float(value), rel=1e-4)  # Euler's identity


def test_zero_and_equal_singular_values_do_no_harm():
    """Two empty rows, and a multiple of the identity: the gradient is the polar factor of what is not zero."""
    w = np.diag([0.5, 0.5, 9.0, 9.0]).astype(np.float32)
    w[w == 0] = 9.0
    w[2:, 2:] = 9.0
    adapted = adapt({"w": w}, 1.0)
    np.testing.assert_allclose(norm_and_gradient(adapted)[1]["w"].values, [1.0, 1.0], atol=tolerance())
    zeros = adapt({"w": np.zeros((3, 3))}, 1.0)
    assert not np.asarray(norm_and_gradient(zeros)[1]["w"].values).any()


def test_which_matrices_count():
    params = {"w": normal((6, 5)), "small": normal((3, 5)), "b": normal((5,)), "conv": normal((2, 2, 6, 6))}
    adapted = adapt(params, 9.0, roles={"conv": sj.Role.conv()})
    norm = lambda name: np.linalg.svd(params[name], compute_uv=False).sum()
    found = functools.partial(sara.nuclear_norm, adapted)
    assert float(found(**EVERYTHING)) == pytest.approx(norm("w") + norm("small"), rel=1e-5)
    assert float(found(min_side=3, min_entries=0)) == pytest.approx(norm("w"), rel=1e-5)
    assert float(found(min_side=0, min_entries=15)) == pytest.approx(norm("w"), rel=1e-5)
    assert float(found(min_side=0, min_entries=30)) == 0.0
    assert float(found()) == 0.0


def test_descent_on_the_penalty_alone_lowers_the_norm_at_every_step():
    adapted = adapt({"w": 0.5 * normal((8, 6))}, 0.6)
    trainable, frozen = sj.partition(adapted)
    norms = []
    for _ in range(50):
        norm, gradient = norm_and_gradient(sj.combine(trainable, frozen))
        norms.append(float(norm))
        trainable = jax.tree.map(lambda p, g: p - 1e-2 * g, trainable, gradient)
    assert (np.diff(norms) < 0).all()
    assert norms[-1] < 0.9 * norms[0]


def test_without_penalty_and_selection_it_is_adamw_of_everything():
    params = {"w": normal((5, 4)), "b": normal((4,), 1)}
    adapted = adapt(params, math.inf)
    ours = sara.sara_adam(1e-2, adapted, threshold=math.inf, reselect_after=None, penalty=0.0)
    plain, (trainable, frozen) = optax.adamw(1e-2, weight_decay=1e-2), sj.partition(adapted)
    state, arrays = ours.init(trainable), jax.tree.map(jnp.asarray, params)
    other, update = plain.init(arrays), jax.jit(ours.update)
    for step in range(4):
        g = {name: normal(v.shape, 10 + step) for name, v in params.items()}
        updates, state = update(gradient_tree_of(adapted, g), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        updates, other = plain.update(jax.tree.map(jnp.asarray, g), other, arrays)
        arrays = optax.apply_updates(arrays, updates)
    for name, merged in sj.merge(sj.combine(trainable, frozen)).items():
        np.testing.assert_allclose(merged, arrays[name], rtol=1e-5, atol=1e-6)


def gradient_tree_of(adapted, arrays):
    """The gradient of the trained values out of those of whole arrays."""
    trainable, _ = sj.partition(adapted)
    flat = {name: np.ravel(g)[np.asarray(adapted[name].indices)] for name, g in arrays.items()}
    return {name: jax.tree.map(lambda v, g=flat[name]: jnp.asarray(g), w) for name, w in trainable.items()}


class Numpy:
    """The equations of the optimizer for one matrix, entry by entry, in float64."""

    def __init__(self, w, threshold, after, penalty, reset):
        self.w, self.threshold, self.after, self.penalty, self.reset = (
            w.astype(np.float64),
            threshold,
            after,
            penalty,
            reset,
        )
        self.active = np.abs(w) < threshold
        self.m, self.v, self.count, self.since = np.zeros(w.shape), np.zeros(w.shape), 0, 0

    def step(self, gradient, rate, decay):
        if self.count == self.after:
            self.active &= np.abs(self.w) < self.threshold
            if self.reset:
                self.m, self.v, self.since = 0 * self.m, 0 * self.v, 0
        self.count, self.since = self.count + 1, self.since + 1
        u, _, vt = np.linalg.svd(np.where(self.active, self.w, 0.0), full_matrices=False)
        g = np.where(self.active, gradient + self.penalty * (u @ vt), 0.0)
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        hat = self.m / (1 - 0.9**self.since) / (np.sqrt(self.v / (1 - 0.999**self.since)) + 1e-8)
        self.w = self.w - rate * np.where(self.active, hat + decay * self.w, 0.0)


@pytest.mark.parametrize("reset", [True, False])
def test_the_optimizer_is_that_of_the_equations(reset):
    w, threshold = normal((6, 5)), 0.7
    adapted = adapt({"w": w}, threshold)
    optimizer = sara.sara_adam(
        0.1, adapted, threshold=threshold, reselect_after=3, penalty=0.3, mode="all", reset_moments=reset, **EVERYTHING
    )
    expected = Numpy(w, threshold, 3, 0.3, reset)
    trainable, frozen = sj.partition(adapted)
    state = optimizer.init(trainable)
    step = jax.jit(optimizer.update)
    before = np.asarray(state[0].active["w"])
    for number in range(7):
        g = normal(w.shape, 20 + number)
        updates, state = step(gradient_tree_of(adapted, {"w": g}), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        expected.step(g, 0.1, 1e-2)
        merged = np.asarray(sj.merge(sj.combine(trainable, frozen))["w"])
        np.testing.assert_allclose(merged, expected.w, rtol=1e-4, atol=1e-5, err_msg=f"update {number + 1}")
        np.testing.assert_array_equal(merged[np.abs(w) >= threshold], w[np.abs(w) >= threshold])
    after = np.asarray(state[0].active["w"])
    assert (after <= before).all()
    assert 0 < after.sum() < before.sum(), "nothing retired, so the test shows nothing"
    assert step._cache_size() == 1


def test_retired_entries_never_move_again_and_what_is_kept_has_their_number():
    adapted = adapt({"w": normal((6, 5))}, 0.7)
    optimizer = sara.sara_adam(0.3, adapted, threshold=0.7, reselect_after=1, **EVERYTHING)
    trainable, _ = sj.partition(adapted)
    state, seen = optimizer.init(trainable), []
    for number in range(5):
        updates, state = optimizer.update(gradient_tree(adapted, lambda s, n=number: normal(s, n)), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        seen.append(np.asarray(trainable["w"].values))
    active = np.asarray(state[0].active["w"])
    assert not active.all()
    assert all((v[~active] == seen[0][~active]).all() for v in seen)
    assert (seen[-1][active] != seen[0][active]).all()
    k = adapted["w"].count
    assert {leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim} == {k}
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= 13 * k + 16


def test_one_matrix_a_step_gets_the_penalty_and_each_its_share_of_steps():
    stack = sj.Role.dense((1,), (2,), (0,))
    params = {"a": normal((6, 5)), "b": normal((6, 5), 1), "c": normal((4, 5), 2), "stack": normal((2, 6, 5), 3)}
    adapted = adapt(params, 0.9, roles={"stack": stack})
    transform = sara.scale_by_sara(
        adapted, threshold=0.9, reselect_after=None, penalty=1.0, b1=0.0, b2=0.0, eps=1.0, **EVERYTHING
    )
    trainable, _ = sj.partition(adapted)
    zeros, start = jax.tree.map(jnp.zeros_like, trainable), transform.init(trainable)
    update = jax.jit(lambda count: transform.update(zeros, start._replace(count=count), trainable)[0])
    hits = []
    for step in range(200):
        found = update(jnp.asarray(step))
        norms = {n: float(jnp.abs(found[n].values).sum()) for n in ("a", "b", "c")}
        norms |= {f"stack {i}": float(jnp.abs(found["stack"].values[i]).sum()) for i in range(2)}
        assert sum(v > 0 for v in norms.values()) == 1
        hits.append(max(norms, key=norms.__getitem__))
        if len(hits) <= 20:  # what the drawn one gets is the gradient of its own norm alone
            name, _, layer = hits[-1].partition(" ")
            indices, values = (np.asarray(v) for v in (adapted[name].indices, adapted[name].values))
            got, shape = np.asarray(found[name].values), params[name].shape[-2:]
            if layer:
                indices, values, got = indices[int(layer)], values[int(layer)], got[int(layer)]
            real = indices < math.prod(shape)
            placed = np.zeros(math.prod(shape))
            placed[indices[real]] = values[real]
            u, _, vt = np.linalg.svd(placed.reshape(shape), full_matrices=False)
            g = (u @ vt).ravel()[indices[real]]
            np.testing.assert_allclose(got[real], g / (np.abs(g) + 1.0), atol=1e-4)
    again = update(jnp.asarray(199))  # the same step draws the same matrix
    jax.tree.map(np.testing.assert_array_equal, again, found)
    counts = [hits.count(name) for name in dict.fromkeys(hits)]
    assert len(counts) == 5
    assert min(counts) > 20
    few = sara.scale_by_sara(adapted, threshold=0.9, reselect_after=None, penalty=1.0, min_side=0, min_entries=99)
    found, _ = jax.jit(few.update)(zeros, few.init(trainable), trainable)
    assert not any(np.asarray(v).any() for v in jax.tree.leaves(found))


def test_a_model_of_nnx_and_a_head_train_together():
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    adapted = sj.adapt(params, {"kernel": sara.sara(0.2), "bias": sj.full()}, key=jax.random.key(0))

    def run(params, x):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    apply, x = sj.with_adapters(run), jnp.asarray(normal((8, 6)))
    optimizer = sara.sara_adam(1e-2, adapted, threshold=0.2, reselect_after=2, **EVERYTHING)
    loss = lambda tree, _: jnp.mean((apply(tree, x) - 1.0) ** 2)
    end = jax.jit(lambda tree: sj.training.scan_steps(loss, optimizer, tree, steps=5))(adapted)
    assert end.losses[-1] < end.losses[0]
    small = np.abs(np.asarray(params["kernel"])) < np.float32(0.2)
    merged = sj.merge(end.adapted)
    assert ((np.asarray(merged["kernel"]) != np.asarray(params["kernel"])) == small).mean() > 0.95
    assert (np.asarray(merged["bias"]) != 0).all()


def test_bad_input_is_refused_by_name():
    adapted = adapt({"w": normal((4, 3))}, 0.5)
    for threshold in (0.0, -1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="sara: threshold="):
            sara.sara(threshold)
    with pytest.raises(ValueError, match="share=0"):
        sara.threshold_for({"w": jnp.ones(3)}, 0.0)
    with pytest.raises(PatternError, match="matches no array"):
        sara.threshold_for({"w": jnp.ones(3)}, 0.5, select="v")
    with pytest.raises(SubspaceError, match="w: sara: how many entries learn"):
        jax.eval_shape(lambda w: sj.adapt({"w": w}, {"w": sara.sara(1.0)}, key=jax.random.key(0)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="threshold of the published learning rate"):
        sara.sara_adam(None, adapted, threshold=math.inf, reselect_after=None)
    for options in ({"mode": "one"}, {"penalty": -1.0}, {"min_side": -1}, {"reselect_after": -2}):
        with pytest.raises(ValueError, match=next(iter(options))):
            sara.sara_adam(1e-3, adapted, threshold=0.5, **{"reselect_after": None, **options})
    with pytest.raises(RankError, match="slots=0"):
        sara.sara(1.0, slots=0)
    with pytest.raises(RankError, match="w: sara: slots=2: 12 entries of a layer are smaller than 9"):
        sj.adapt({"w": jnp.ones((4, 3))}, {"w": sara.sara(9.0, slots=2)}, key=jax.random.key(0))
    other = adapt({"w": normal((4, 3), 5)}, 0.9)
    with pytest.raises(StructureError, match="w: has values of shape"):
        sara.sara_adam(1e-3, adapted, threshold=0.5, reselect_after=None).init(sj.partition(other)[0])
