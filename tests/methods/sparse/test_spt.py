"""SPT against numpy: what is sensitive, where the budget goes, and the modules and entries that it is spent on."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats as scipy_stats
from scipy.special import erf

import subspace_jax as sj
from subspace_jax.core import PatternError, Statistics, StatisticsError, StructureError
from tests.tolerances import tolerance

spt = sj.methods.spt


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scored(**scores):
    return {p.replace("_", "/"): Statistics(squared_gradient=jnp.asarray(v, jnp.float32)) for p, v in scores.items()}


SHAPES = {"fc_kernel": (6, 5), "fc_bias": (5,), "out_kernel": (5, 4), "out_bias": (4,), "norm_scale": (6,)}
SCORES = {path: draw(shape, i) ** 2 for i, (path, shape) in enumerate(SHAPES.items())}


def params():
    return {
        "fc": {"kernel": jnp.asarray(draw((6, 5))), "bias": jnp.asarray(draw((5,), 1))},
        "out": {"kernel": jnp.asarray(draw((5, 4), 2)), "bias": jnp.asarray(draw((4,), 3))},
        "norm": {"scale": jnp.ones(6)},
    }


def network(p, x):
    h = jax.nn.relu((x * p["norm"]["scale"]) @ p["fc"]["kernel"] + p["fc"]["bias"])
    return h @ p["out"]["kernel"] + p["out"]["bias"]


def loss(p, batch):
    return jnp.mean((network(p, batch[0]) - batch[1]) ** 2)


def batches(count, rows=8):
    return [(jnp.asarray(draw((rows, 6), 10 + i)), jnp.asarray(draw((rows, 4), 50 + i))) for i in range(count)]


def allocate(budget=20, **options):
    return spt.allocate(scored(**SCORES), budget, **{"step": 1, "most": 80, "rank": 1, **options})


def test_sensitivity_is_the_sum_over_batches_of_squared_gradients_of_their_means():
    """What a captured statistic holds: additive over batches, and no sum of squares of examples."""
    data = batches(3)
    found = sj.capture(loss, params(), data, statistics="squared_gradient")
    slope = jax.jit(jax.grad(loss))
    one = [slope(params(), b)["fc"]["kernel"] for b in data]
    np.testing.assert_allclose(found["fc/kernel"].squared_gradient * 3, sum(g * g for g in one), rtol=1e-4)
    doubled = sj.capture(lambda p, b: 2.0 * loss(p, b), params(), data, statistics="squared_gradient")
    same = [spt.allocate(s, 9, step=1, most=80, alpha=1e-9) for s in (found, doubled)]
    for path in found:
        np.testing.assert_array_equal(*(np.asarray(a.leaves[path].chosen) for a in same))
        np.testing.assert_allclose(doubled[path].squared_gradient, 4.0 * found[path].squared_gradient, rtol=1e-4)


def test_scores_rank_entries_by_the_drop_that_tuning_each_alone_gives():
    p, batch, eps = params(), batches(1)[0], 1e-4
    square = sj.capture(loss, p, [batch], statistics="squared_gradient")["out/kernel"].squared_gradient
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: np.asarray(v, np.float64), (p, batch))
        gradient = jax.jit(jax.grad(loss))(*wide)["out"]["kernel"]

        def drop(i, j):
            moved = jax.tree.map(np.copy, wide[0])
            moved["out"]["kernel"][i, j] -= eps * gradient[i, j]
            return float(loss(wide[0], wide[1]) - loss(moved, wide[1]))

        drops = [drop(i, j) for i, j in itertools.product(range(5), range(4))]
    assert scipy_stats.spearmanr(np.ravel(square), drops).statistic > 0.99


def test_marks_the_most_sensitive_of_all_arrays_together():
    for tau in (1, 17, 60):
        found = allocate(budget=tau, step=tau, most=tau, alpha=1e-9, whole_vectors=False, include_norm=True)
        everything = np.concatenate([v.ravel() for v in SCORES.values()])
        masks = [np.zeros(v.shape) if v is None else v for v in _chosen(found)]
        taken = np.concatenate([np.ravel(m) for m in masks]).astype(bool)
        assert found.trained == found.counted == found.tau == taken.sum() == tau
        assert everything[taken].min() >= everything[~taken].max()


def _chosen(allocation):
    paths = [p.replace("_", "/") for p in SHAPES]
    shapes = list(SHAPES.values())
    return [
        np.zeros(s, bool) if allocation.leaves[p].chosen is None else allocation.leaves[p].chosen
        for p, s in zip(paths, shapes, strict=True)
    ]


def brute_force(tau, rank, alpha, beta, include_norm):
    """Every decision by the rules as they are written, and both totals."""
    everything = np.concatenate([v.ravel() for v in SCORES.values()])
    limit = np.sort(everything)[-tau]
    counted = trained = 0
    parts = {}
    for path, score in SCORES.items():
        c = int((score >= limit).sum())
        if path.endswith("kernel"):
            cost = rank * sum(score.shape)
            part, add = ("module", cost) if c >= max(1, cost / alpha) else ("entries", c)
            add_trained = add
        else:
            part, add = ("whole", score.size) if c >= max(1, score.size / beta) else ("entries", c)
            add_trained = add
            if part == "entries" and path.startswith("norm") and not include_norm:
                part, add_trained = "nothing", 0
        parts[path.replace("_", "/")] = part if c else "nothing"
        counted, trained = counted + add, trained + add_trained
    return parts, counted, trained


@pytest.mark.parametrize(("include_norm", "alpha", "beta"), [(False, 3.0, 1.5), (True, 2.75, 2.0)])
def test_allocation_is_that_of_brute_force_over_the_sweep(include_norm, alpha, beta):
    rank = 1  # at 2.75 four entries of eleven are just enough for a module
    sweep = {tau: brute_force(tau, rank, alpha, beta, include_norm) for tau in range(1, 66)}
    for budget in (10, 23, 35):
        best = min(abs(counted - budget) for _, counted, _ in sweep.values())
        tau = max(t for t, (_, counted, _) in sweep.items() if abs(counted - budget) == best)  # a later one wins
        found = allocate(budget, alpha=alpha, beta=beta, include_norm=include_norm)
        assert (found.tau, found.counted, found.trained) == (tau, *sweep[tau][1:])
        assert {p: leaf.part for p, leaf in found.leaves.items()} == sweep[tau][0]
    totals = [counted for _, counted, _ in sweep.values()]
    assert totals == sorted(totals), "for alpha and beta of at least 1 the total grows with tau"


def test_both_ends_of_the_thresholds():
    entries = allocate(20, alpha=1e-9, beta=1e-9)
    assert {leaf.part for leaf in entries.leaves.values()} <= {"entries", "nothing"}
    modules = allocate(20, alpha=1e9)
    kernels = {p: leaf for p, leaf in modules.leaves.items() if p.endswith("kernel")}
    assert all((leaf.part == "module") == (leaf.sensitive >= 1) for leaf in kernels.values())
    few = allocate(3 + 768, alpha=1.0, beta=1.0, step=3, most=3, extra=768)
    assert few.counted == 3 + 768
    only = allocate(20, structured_only=True)
    assert "entries" not in {leaf.part for leaf in only.leaves.values()}


def test_what_a_module_costs():
    stats = scored(w=draw((6, 5)) ** 2)
    count = lambda **o: spt.allocate(stats, 1, step=30, most=30, alpha=1e9, **o)
    with pytest.raises(ValueError, match="the sweep reaches from 33 to 33"):
        count(rank=3)
    with pytest.raises(ValueError, match=f"from {2 * 3 * 5 + 3 + 5} to"):
        count(rank=3, module="adapter")
    with pytest.raises(ValueError, match=f"from {3 * 11 + 3 + 5} to"):
        count(rank=3, module="adapter", parallel="w")
    stack = scored(w=draw((2, 6, 5)) ** 2)
    with pytest.raises(ValueError, match="from 66 to"):
        spt.allocate(stack, 1, step=60, most=60, alpha=1e9, rank=3, roles={"w": sj.Role.dense((1,), (2,), (0,))})


def test_just_enough_sensitive_entries_make_a_module_or_a_whole_vector():
    one = {"alpha": 11.0, "rank": 1, "step": 1, "most": 1}  # a module of 6 x 5 costs 11: one entry in eleven
    stats = scored(w=np.eye(6, 5) * np.eye(6, 5)[:, :1])
    assert spt.allocate(stats, 11, **one).leaves["w"].part == "module"
    assert spt.allocate(stats, 1, **{**one, "alpha": 10.9}).leaves["w"].part == "entries"
    vector = scored(b=np.array([1.0, 0.0, 0.0, 0.0]))
    assert spt.allocate(vector, 4, **one, beta=4.0).leaves["b"].part == "whole"
    assert spt.allocate(vector, 1, **one, beta=3.9, include_norm=True).leaves["b"].part == "entries"


def test_true_entries_of_a_linear_model_are_found():
    """Whitened inputs and a change at equal sizes: the squared gradient is largest exactly there."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 6))
    true = np.zeros(48)
    true[rng.choice(48, 9, replace=False)] = rng.choice([-0.5, 0.5], 9)
    x = np.linalg.qr(rng.normal(size=(64, 8)))[0] * 8
    data = (jnp.asarray(x), jnp.asarray(x @ (w + true.reshape(8, 6))))
    fit = lambda p, b: jnp.mean((b[0] @ p["w"] - b[1]) ** 2)
    stats = sj.capture(fit, {"w": jnp.asarray(w)}, [data], statistics="squared_gradient")
    found = spt.allocate(stats, 9, step=9, most=9, alpha=1e-9)
    np.testing.assert_array_equal(found.leaves["w"].chosen.ravel(), true != 0)


def adapted_at(budget, seed=0, method=None, **options):
    found = allocate(budget, **options)
    rules = {found.paths: spt.spt(found, **(method or {}))}
    return found, sj.adapt(params(), rules, key=jax.random.key(seed))


def moved(adapted, seed=5):
    trainable, frozen = sj.partition(adapted)
    rng = np.random.default_rng(seed)
    add = lambda v: v + jnp.asarray(0.2 * rng.normal(size=v.shape), v.dtype)
    return sj.combine(jax.tree.map(add, trainable), frozen)


@pytest.mark.parametrize("module", ["lora", "adapter"])
def test_starts_at_the_model_and_trains_as_many_values_as_the_allocation_says(module):
    x = jnp.asarray(draw((7, 6), 9))
    for budget in (12, 30):
        found, adapted = adapted_at(budget, module=module, alpha=3.0)
        y = sj.with_adapters(network)(adapted, x)
        np.testing.assert_allclose(y, network(params(), x), rtol=tolerance(), atol=tolerance())
        assert sj.summary(adapted).trainable == found.trained
        size = sum(v.size for v in jax.tree.leaves(sj.partition(adapted)[0]))
        assert size == found.trained, "every array that an optimizer sees holds what learns and nothing else"


def test_low_rank_module_and_entries_are_those_of_numpy_and_merge():
    found, adapted = adapted_at(30, alpha=3.0, rank=2, beta=1e-9, include_norm=True)
    adapted, x = moved(adapted), draw((7, 6), 9)
    kinds = {p: leaf.part for p, leaf in found.leaves.items()}
    assert set(kinds.values()) == {"module", "entries"}
    dense = {}
    for path, kind in kinds.items():
        layer, name = path.split("/")
        base, weight = np.array(params()[layer][name], np.float64), adapted[layer][name]
        if kind == "module":
            base += np.asarray(weight.a, np.float64) @ np.asarray(weight.b, np.float64)
        else:
            base.ravel()[np.asarray(weight.indices)] += np.asarray(weight.values, np.float64)
        dense.setdefault(layer, {})[name] = base
    expected = network(jax.tree.map(jnp.asarray, dense), jnp.asarray(x))
    np.testing.assert_allclose(sj.with_adapters(network)(adapted, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(network(sj.merge(adapted), x), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_additions_is_the_dense_one_at_their_places():
    _, adapted = adapted_at(20, alpha=1e-9, beta=1e-9)
    trainable, frozen = sj.partition(adapted)
    batch = batches(1)[0]
    fn = sj.with_adapters(loss)
    found = jax.jit(jax.grad(lambda t: fn(sj.combine(t, frozen), batch)))(trainable)
    dense = jax.jit(jax.grad(loss))(params(), batch)
    for layer, name in (("fc", "kernel"), ("out", "kernel"), ("fc", "bias")):
        places = np.asarray(adapted[layer][name].indices)
        np.testing.assert_allclose(found[layer][name].values, np.ravel(dense[layer][name])[places], rtol=1e-4)


@pytest.mark.parametrize(("beta", "part", "budget"), [(1e-9, "entries", 59), (1e9, "whole", 64)])
def test_an_adapter_reads_the_layer_with_its_trained_bias(beta, part, budget):
    found, adapted = adapted_at(budget, alpha=1e9, beta=beta, module="adapter", rank=2)
    assert found.leaves["fc/bias"].part == part
    assert found.leaves["fc/kernel"].part == "module"
    adapted, x = moved(adapted), draw((7, 6), 9).astype(np.float64)
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params())
    weight, scale = adapted["fc"]["kernel"], np.asarray(adapted["norm"]["scale"].materialize())
    bias = np.asarray(adapted["fc"]["bias"].materialize())
    z = (x * scale) @ p["fc"]["kernel"] + bias
    few = z @ np.asarray(weight.down) + np.asarray(weight.down_bias)
    few = 0.5 * few * (1 + erf(few / np.sqrt(2)))
    z = z + few @ np.asarray(weight.up) + np.asarray(weight.up_bias)
    first = lambda q, x: (x * q["norm"]["scale"]) @ q["fc"]["kernel"] + q["fc"]["bias"]
    run = sj.with_adapters(first)
    np.testing.assert_allclose(run(adapted, x.astype(np.float32)), z, rtol=1e-4, atol=1e-4)
    trainable, frozen = sj.partition(adapted)
    value = lambda t: jnp.sum(jnp.sin(run(sj.combine(t, frozen), jnp.asarray(x, jnp.float32))))
    name, step = ("values", "value")[part == "whole"], 1e-2
    gradient = getattr(jax.jit(jax.grad(value))(trainable)["fc"]["bias"], name)
    up = jax.tree.map(lambda v: v, trainable)
    along = jnp.asarray(draw(gradient.shape, 3))
    ends = []
    for sign in (1.0, -1.0):
        bias = jax.tree.map(lambda v, s=sign: v + s * step * along, trainable["fc"]["bias"])
        ends.append(value({**up, "fc": {**up["fc"], "bias": bias}}))
    assert float(gradient @ along) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=2e-2)


def test_a_projection_reads_its_input():
    options = {"alpha": 1e9, "module": "adapter", "rank": 2}
    found = allocate(30, parallel="out/kernel", **options)
    rules = {found.paths: spt.spt(found, parallel="out/kernel")}
    adapted = moved(sj.adapt(params(), rules, key=jax.random.key(0)))
    weight, x = adapted["out"]["kernel"], draw((7, 5), 9)
    few = x @ np.asarray(weight.down, np.float64) + np.asarray(weight.down_bias)
    few = 0.5 * few * (1 + erf(few / np.sqrt(2)))
    expected = x @ np.asarray(params()["out"]["kernel"]) + few @ np.asarray(weight.up) + np.asarray(weight.up_bias)
    y = sj.with_adapters(lambda p, x: x @ p["out"]["kernel"])(adapted, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_dropout_leaves_examples_out_and_keeps_the_mean():
    _, adapted = adapted_at(35, alpha=1e9, method={"dropout": 0.0, "drop_path": 0.4})
    adapted = moved(adapted)
    run = jax.jit(sj.with_adapters(lambda p, x: x @ p["fc"]["kernel"]))
    x = jnp.asarray(np.repeat(draw((1, 6), 9), 4000, axis=0))
    base, full = x[:1] @ params()["fc"]["kernel"], run(adapted, x)[:1]
    rows = np.asarray(run(sj.with_dropout(adapted, jax.random.key(1)), x))
    kept = base + (full - base) / 0.6
    left_out = np.abs(rows - base).max(axis=-1) < 1e-5
    np.testing.assert_allclose(rows[~left_out], np.repeat(kept, (~left_out).sum(), axis=0), rtol=1e-4, atol=1e-5)
    assert abs(left_out.mean() - 0.4) < 0.04


def test_a_linen_model_learns():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.relu(nn.Dense(6)(x)))

    model, (x, y) = Net(), batches(1)[0]
    p = model.init(jax.random.key(0), x)["params"]
    apply = lambda p, b: jnp.mean((model.apply({"params": p}, b[0]) - b[1]) ** 2)
    stats = sj.capture(apply, p, [(x, y)], statistics="squared_gradient")
    found = spt.allocate(stats, 20, step=1, most=60, rank=1, alpha=3.0)
    adapted = sj.adapt(p, {found.paths: spt.spt(found)}, key=jax.random.key(1))
    fit = lambda tree, _: sj.with_adapters(apply)(tree, (x, y))
    end = jax.jit(lambda t: sj.training.scan_steps(fit, optax.adam(3e-2), t, steps=30))(adapted)
    assert end.losses[-1] < 0.9 * end.losses[0]


def test_bad_input_is_refused_by_path():
    with pytest.raises(StatisticsError, match="no statistics"):
        spt.allocate({}, 3)
    with pytest.raises(StatisticsError, match="w: spt needs its squared gradient"):
        spt.allocate({"w": Statistics(gradient=jnp.ones(3))}, 3)
    with pytest.raises(ValueError, match=r"budget=4,000: the sweep reaches from \d+ to \d+"):
        allocate(4000)
    with pytest.raises(ValueError, match="step=99 is above 41"):
        spt.allocate(scored(a=np.ones(41)), 3, step=99, most=100)
    for options in ({"rank": 0}, {"alpha": 0.0}, {"beta": -1.0}, {"module": "dora"}, {"step": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            allocate(20, **options)
    with pytest.raises(PatternError, match="parallel='proj' matches no scored"):
        allocate(20, parallel="proj")
    found = allocate(20)
    with pytest.raises(ValueError, match="dropout"):
        spt.spt(found, dropout=1.0)
    with pytest.raises(PatternError, match="head: spt: was not scored"):
        sj.adapt({**params(), "head": jnp.ones(3)}, {"**": spt.spt(found)}, key=jax.random.key(0))
    other = {**params(), "fc": {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)}}
    with pytest.raises(StructureError, match="fc/kernel: spt: has shape"):
        sj.adapt(other, {"**": spt.spt(allocate(20, alpha=1e-9))}, key=jax.random.key(0))
    adapters = allocate(40, alpha=1e9, module="adapter")
    with pytest.raises(PatternError, match="fc/kernel: spt: its adapter reads the layer's output"):
        sj.adapt(params(), {"*/kernel": spt.spt(adapters)}, key=jax.random.key(0))
