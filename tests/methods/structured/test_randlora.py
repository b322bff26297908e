"""RandLoRA's starts, scalings, counts, shared storage, and the cost of a step."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from benchmarks._measure import step_cost
from benchmarks._models import ModelConfig, linen
from benchmarks._variants import ours
from subspace_jax.core import RankError, RoleError
from tests.tolerances import tolerance

BASES = ("basis_a", "basis_b")


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def adapt(params, method, roles=None):
    return sj.adapt(params, {"**": method}, key=jax.random.key(0), roles=roles)


def layers(count, width=16, hidden=24):
    """Two kernels a layer, each the other's transpose in shape."""
    return {
        f"layer_{i}": {"up": normal((width, hidden), i), "down": normal((hidden, width), i + 9)} for i in range(count)
    }


def network(params, x):
    for layer in params.values():
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x


def moved(tree):
    trainable, frozen = sj.partition(tree)
    return sj.combine(jax.tree.map(lambda v: v + normal(v.shape), trainable), frozen)


@pytest.mark.parametrize("zero", ["rank_scales", "feature_scales"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_starts_at_the_weight_and_only_the_zero_scales_move_first(shape, zero):
    w = normal(shape)
    tree = adapt({"w": w}, sj.randlora(3, zero=zero))
    np.testing.assert_array_equal(sj.merge(tree)["w"], w)
    trainable, frozen = sj.partition(tree)
    apply = sj.with_adapters(lambda p, x: jnp.sin(x @ p["w"]).sum())
    gradient = jax.jit(jax.grad(lambda t: apply(sj.combine(t, frozen), normal((4, shape[0]), 1))))(trainable)["w"]
    other = {"rank_scales": "feature_scales", "feature_scales": "rank_scales"}[zero]
    assert not np.asarray(getattr(gradient, other)).any()
    assert np.abs(getattr(gradient, zero)).min() > 0
    assert not np.asarray(getattr(tree["w"], zero)).any()


def test_the_scales_that_do_not_start_at_zero_start_at_one_over_the_longer_axis():
    params = {"many": jnp.zeros((10, 12)), "few": jnp.zeros((3, 12))}
    tree = adapt(params, sj.randlora(2))
    np.testing.assert_allclose(tree["many"].feature_scales, np.full((5, 10), 1 / 10))
    np.testing.assert_allclose(tree["few"].feature_scales, np.full((2, 3), 1 / 3))
    tree = adapt(params, sj.randlora(2, zero="feature_scales"))
    np.testing.assert_allclose(tree["many"].rank_scales, np.full((5, 2), 1 / 5))
    assert tree["many"].rank_scales.dtype == tree["many"].feature_scales.dtype == jnp.float32
    narrow = adapt({"w": jnp.zeros((1, 12))}, sj.randlora(1, extra_basis=True))["w"]
    np.testing.assert_allclose(narrow.feature_scales, np.full((2, 1), 0.5))


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 2 / math.sqrt(5)),
        ({"alpha": 6.0}, 6 / (4 * math.sqrt(5))),
        ({"scaling": "peft"}, 20.0),
        ({"scaling": "peft", "alpha": 6.0}, 1.5),
        ({"scaling": "vision"}, 0.25),
    ],
)
def test_scalings(options, scale):
    weight = adapt({"w": jnp.zeros((18, 30))}, sj.randlora(4, **options))["w"]
    assert weight.scale == pytest.approx(scale)


def test_numbers_of_bases():
    params = {"divides": jnp.zeros((12, 20)), "rest": jnp.zeros((13, 20)), "rank above": jnp.zeros((3, 20))}
    counts = {name: w.rank_scales.shape[0] for name, w in adapt(params, sj.randlora(4)).items()}
    assert counts == {"divides": 3, "rest": 4, "rank above": 1}
    tree = adapt(params, sj.randlora(4, extra_basis=True))
    assert {name: w.rank_scales.shape[0] for name, w in tree.items()} == {"divides": 4, "rest": 4, "rank above": 1}
    for weight in sj.core.resolve_links(moved(tree)).values():
        smaller = min(weight.shape)
        assert np.linalg.matrix_rank(np.asarray(weight.update(jnp.float32)), tol=1e-4) == smaller == weight.rank


def test_count_is_that_of_the_published_setting():
    kernel = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    params = {str(i): {"q": kernel((3072, 3072)), "v": kernel((3072, 1024))} for i in range(28)}
    tree = jax.eval_shape(lambda p: adapt(p, sj.randlora(32)), params)
    assert sj.summary(tree).trainable == 9_289_728
    assert (tree["0"]["q"].basis_b.shape, tree["0"]["q"].basis_a.shape) == ((96, 32, 3072), (32, 3072))


def test_bases_are_as_large_as_some_weight_reads():
    tree = adapt({"a": jnp.zeros((20, 6)), "b": jnp.zeros((9, 14))}, sj.randlora(4))
    assert (tree["a"].basis_a.shape, tree["a"].basis_b.shape) == ((4, 9), (3, 4, 20))


def test_sparsity_is_the_models_not_the_weights():
    # Of the shapes' elementwise maximum, (300, 400), the smaller side; no weight has both.
    tree = adapt({"a": jnp.zeros((300, 50)), "b": jnp.zeros((60, 400))}, sj.randlora(4, basis="very_sparse"))
    assert tree["a"].sparsity == tree["b"].sparsity == pytest.approx(math.sqrt(300))
    share = (np.asarray(tree["a"].basis_b) != 0).mean()
    assert share == pytest.approx(1 / math.sqrt(300), rel=0.1)
    third = adapt({"a": jnp.zeros((300, 50))}, sj.randlora(4, basis="sparse"))["a"]
    assert (np.asarray(third.basis_b) != 0).mean() == pytest.approx(1 / 3, rel=0.05)


def test_one_pair_of_bases_serves_all_layers():
    one, four = (adapt(layers(n), sj.randlora(4)) for n in (1, 4))

    def basis_bytes(tree):
        flat = jax.tree_util.tree_leaves_with_path(tree)
        return [v.nbytes for path, v in flat if path[-1].name in BASES]

    assert basis_bytes(four) == basis_bytes(one) == [4 * 4 * 16, 4 * 4 * 4 * 24]
    found = sj.core.resolve_links(four)
    assert found["layer_0"]["down"].basis_b is found["layer_3"]["up"].basis_b
    # Same shape, same bases: the same scales give the same update.
    scales = {name: normal(getattr(found["layer_0"]["up"], name).shape) for name in ("rank_scales", "feature_scales")}
    updates = [
        dataclasses.replace(found[f"layer_{i}"]["up"], base=jnp.zeros((16, 24)), **scales).materialize() for i in (0, 2)
    ]
    np.testing.assert_array_equal(*updates)


def test_a_compiled_step_takes_the_bases_as_one_argument_each():
    tree = adapt(layers(4), sj.randlora(4))
    trainable, frozen = sj.partition(tree)
    apply = sj.with_adapters(network)

    def loss(trainable, frozen, x):
        return (apply(sj.combine(trainable, frozen), x) ** 2).sum()

    x = normal((5, 16))
    traced = jax.make_jaxpr(jax.grad(loss))(trainable, frozen, x)
    shapes = [v.aval.shape for v in traced.jaxpr.invars]
    assert shapes.count((4, 4, 24)) == 1
    assert shapes.count((4, 16)) == 1 + 8  # the basis, and the feature scales of eight kernels
    assert not [c for c in traced.consts if np.size(c) > 16]


def test_under_scan_the_bases_are_constants_of_the_loop():
    params = {"up": normal((4, 16, 24)), "down": normal((4, 24, 16), 1)}

    def scanned(params, x):
        return jax.lax.scan(lambda h, p: (h + jnp.tanh(h @ p["up"]) @ p["down"], None), x, params)[0]

    x = normal((5, 16))
    tree = moved(adapt(params, sj.randlora(4), sj.roles(scanned, params, x)))
    assert (tree["down"].basis_b.shape, tree["up"].rank_scales.shape) == ((4, 4, 24), (4, 4, 4))
    traced = jax.make_jaxpr(sj.with_adapters(scanned))(tree, x)
    (loop,) = (e for e in traced.eqns if e.primitive.name == "scan")
    inside = [v.aval.shape for v in loop.invars]
    assert (4, 4, 24) in inside
    assert (4, 4, 4, 24) not in inside
    merged = sj.merge(tree)
    np.testing.assert_allclose(sj.with_adapters(scanned)(tree, x), scanned(merged, x), rtol=2e-4, atol=2e-4)


def test_seed_alone_decides_the_bases():
    def bases(key, seed):
        weight = sj.adapt({"w": normal((6, 8))}, {"w": sj.randlora(2, seed=seed)}, key=jax.random.key(key))["w"]
        return np.asarray(weight.basis_b)

    np.testing.assert_array_equal(bases(0, 7), bases(1, 7))
    assert not np.array_equal(bases(0, 7), bases(0, 8))


def test_inside_another_method_the_bases_are_shared_too():
    params = {"a": normal((12, 8)), "b": normal((12, 8), 1)}
    tree = adapt(params, sj.dora(sj.randlora(4)))
    assert tree["b"].direction.basis_b is None
    for name, array in sj.merge(tree).items():
        np.testing.assert_allclose(array, params[name], rtol=1e-5, atol=tolerance(size=4))
    x = normal((5, 12), 2)
    y = sj.with_adapters(lambda p, x: x @ p["a"] + x @ p["b"])(moved(tree), x)
    merged = sj.merge(moved(tree))
    np.testing.assert_allclose(y, x @ (merged["a"] + merged["b"]), rtol=1e-3, atol=1e-3)


def test_training_moves_all_layers_and_compiles_once():
    tree = adapt(layers(2), sj.randlora(4))
    trainable, frozen = sj.partition(tree)
    apply, traces = sj.with_adapters(network), []
    x, target = normal((32, 16)), normal((32, 16), 5)

    @jax.jit
    def step(trainable):
        traces.append(None)
        loss = lambda t: ((apply(sj.combine(t, frozen), x) - target) ** 2).mean()
        value, gradient = jax.value_and_grad(loss)(trainable)
        return jax.tree.map(lambda v, g: v - 0.02 * g / (1e-8 + jnp.abs(g).max()), trainable, gradient), value

    values = []
    for _ in range(60):
        trainable, value = step(trainable)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    assert len(traces) == 1


@functools.cache
def gigaflops(rank, method, tokens=512):
    shape = jax.ShapeDtypeStruct((tokens // 128, 128), jnp.int32)
    plain = linen(ModelConfig(), shape, abstract=True)
    return step_cost(ours(plain, method(rank), shape, "adapter", "full", True), shape)[0].flops / 1e9


def test_operations_of_a_step_beside_lora():
    """The figures of the docstring, and the arithmetic that they come from."""
    ours, same_rank_argument, same_update_rank = (
        gigaflops(r, m) for r, m in ((32, sj.randlora), (32, sj.lora), (512, sj.lora))
    )
    assert ours == pytest.approx(66.0, rel=0.02)
    assert ours / same_rank_argument == pytest.approx(2.09, abs=0.05)
    assert ours / same_update_rank == pytest.approx(0.75, abs=0.03)
    width, hidden, vocabulary, tokens, rank, layers, length = 512, 2048, 1000, 512, 32, 4, 128
    kernels = [(width, width)] * 4 * layers + [(width, hidden)] * 2 * layers + [(width, vocabulary)]
    attention = 3 * layers * 4 * tokens * length * width

    def cost(d, larger):
        bases = -(-d // rank) * rank
        factored = tokens * bases * (4 * larger + 6 * d)
        return 4 * tokens * d * larger + min(factored, 2 * tokens * d * larger + 4 * bases * d * larger)

    assert ours == pytest.approx((attention + sum(cost(*k) for k in kernels)) / 1e9, rel=0.03)


def test_bad_options_are_refused_by_name():
    with pytest.raises(RankError, match="randlora: rank=0"):
        sj.randlora(0)
    for name in ("scaling", "basis", "zero", "pairing", "route"):
        with pytest.raises(ValueError, match=rf"randlora: {name}='none': expected one of"):
            sj.randlora(2, **{name: "none"})
    with pytest.raises(ValueError, match=r"dropout=1\.0"):
        sj.randlora(2, dropout=1.0)
    with pytest.raises(ValueError, match="seed=-1"):
        sj.randlora(2, seed=-1)
    with pytest.raises(ValueError, match="basis_dtype"):
        sj.randlora(2, basis_dtype=jnp.int32)
    with pytest.raises(RoleError, match=r"x: randlora: .*has 3 axes"):
        adapt({"w": jnp.zeros((4, 4)), "x": jnp.zeros((2, 3, 4))}, sj.randlora(2))


@pytest.mark.parametrize("wrap", [lambda method: method, sj.dora])
def test_methods_of_equal_settings_share_one_pair_of_bases(wrap):
    params = {"a": normal((8, 6)), "b": normal((6, 8), 1)}
    bases = lambda tree: [w for w in jax.tree.leaves(tree) if w.shape == (2, 4, 8)]

    def adapted(**options):
        rules = {"a": wrap(sj.randlora(4)), "b": wrap(sj.randlora(np.int64(4), **options))}
        return sj.adapt(params, rules, key=jax.random.key(0))

    together = sj.adapt(params, {"*": wrap(sj.randlora(4))}, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, adapted(), together)
    assert len(bases(adapted())) == 1
    for other in ({"seed": 1}, {"group": "b"}, {"alpha": 3.0}, {"basis_dtype": jnp.bfloat16}):
        assert len(bases(adapted(**other))) == 2
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, atol=tolerance(size=4)), sj.merge(adapted()), params)
