"""PEGO: the penalty against dense products in float64, and the group against one LoRA of the summed rank."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import subspace_jax as sj
from subspace_jax.core import RankError, StructureError
from subspace_jax.methods.low_rank.pego import GroupLowRank, pego, penalty, penalty_terms
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)
SHAPES = {"wide": (6, 9), "tall": (9, 6), "stacked": (2, 5, 7), "heads": (6, 2, 4)}
ROLES = {
    "wide": sj.Role.dense(),
    "tall": sj.Role.dense(),
    "stacked": sj.Role.dense((1,), (2,), (0,)),
    "heads": sj.Role.dense((0,), (1, 2)),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapt(name="wide", rank=2, modules=3, seed=1, w=None):
    """A tree with one group that has learned something."""
    w = normal(*SHAPES[name]) if w is None else w
    method = pego(rank, modules=modules)
    weight = sj.adapt({"w": jnp.asarray(w)}, {"w": method}, key=KEY, roles={"w": ROLES[name]})["w"]
    return {"w": dataclasses.replace(weight, b=jnp.asarray(normal(*weight.b.shape, seed=seed)))}


def dense_terms(tree, norm="l1", axis="in", a=None, b=None):
    """The two terms, of float64 products of whole matrices, module by module."""
    w = tree["w"]
    kernel = np.asarray(w.role.matrix(w.base), np.float64)
    a, b = (np.asarray(v, np.float64) for v in (w.a if a is None else a, w.b if b is None else b))
    size = {"l1": lambda m: np.abs(m).sum(), "fro2": lambda m: (m**2).sum()}[norm]
    r, terms = w.rank // w.modules, [0.0, 0.0]
    for layer in np.ndindex(kernel.shape[:-2]):
        k = kernel[layer] if axis == "in" else kernel[layer].T
        deltas = [a[layer][:, i * r : (i + 1) * r] @ b[layer][i * r : (i + 1) * r] for i in range(w.modules)]
        deltas = deltas if axis == "in" else [d.T for d in deltas]
        terms[0] += sum(size(k.T @ d) for d in deltas)
        terms[1] += sum(size(c.T @ d) for c, d in itertools.combinations(deltas, 2))
    return terms


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("norm", ["l1", "fro2"])
@pytest.mark.parametrize("name", SHAPES)
def test_terms_are_those_of_dense_products(name, norm, axis):
    tree = adapt(name)
    found, expected = penalty_terms(tree, norm=norm, axis=axis), dense_terms(tree, norm, axis)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.preserve.dtype == jnp.float32
    matrices, side = (2 if name == "stacked" else 1), tree["w"].role.sizes(SHAPES[name])[1 if axis == "in" else 0]
    both = {"a": tree["w"], "b": {"c": tree["w"]}}
    np.testing.assert_allclose(penalty(both, norm=norm, axis=axis), 2 * sum(expected), rtol=1e-5)
    mean = penalty(both, norm=norm, axis=axis, normalize=True)
    np.testing.assert_allclose(mean, 2 * sum(expected) / side**2 / (2 * matrices), rtol=1e-5)


def test_closed_numbers():
    e = np.eye(6, dtype=np.float32)
    kernel = e[:, :2] @ normal(2, 6)  # columns in the span of two axes
    tree = adapt(w=kernel, rank=1)
    apart = dataclasses.replace(tree["w"], a=jnp.asarray(e[:, [2, 3, 4]]), b=jnp.asarray(normal(3, 6)))
    assert float(penalty({"w": apart})) == 0.0
    same = dataclasses.replace(tree["w"], a=jnp.asarray(e[:, [2, 2, 4]]), b=jnp.asarray(np.ones((3, 6), np.float32)))
    np.testing.assert_array_equal(penalty_terms({"w": same}), (0.0, 36.0))


def test_at_the_start_all_is_zero_and_modules_differ():
    fresh = sj.adapt({"w": jnp.asarray(normal(8, 5))}, {"w": pego(2, modules=4)}, key=KEY)
    trainable, frozen = sj.partition(fresh)
    value, gradient = jax.jit(jax.value_and_grad(lambda t: penalty(sj.combine(t, frozen))))(trainable)
    assert float(value) == 0.0
    assert not any(np.asarray(v).any() for v in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(sj.merge(fresh)["w"], normal(8, 5))
    groups = np.asarray(fresh["w"].groups()[0])
    assert all(not np.array_equal(x, y) for x, y in itertools.combinations(groups, 2))
    assert 0.8 / np.sqrt(8) < np.abs(groups).max() <= 1 / np.sqrt(8)


def test_order_and_signs_of_modules_do_not_matter_and_degrees_are_one_and_two():
    tree = adapt(rank=2, modules=3)
    a, b = (np.asarray(v) for v in tree["w"].groups())

    def terms(a, b, norm="l1"):
        flat = np.moveaxis(a, 0, 1).reshape(a.shape[1], -1), b.reshape(-1, b.shape[-1])
        weight = dataclasses.replace(tree["w"], a=jnp.asarray(flat[0]), b=jnp.asarray(flat[1]))
        return np.asarray(penalty_terms({"w": weight}, norm=norm)), np.asarray(weight.materialize())

    (value, array), order = terms(a, b), [2, 0, 1]
    permuted, flipped = terms(a[order], b[order]), terms(a, b * np.array([1, -1, 1], np.float32)[:, None, None])
    np.testing.assert_allclose(permuted[0], value, rtol=1e-5)
    np.testing.assert_allclose(permuted[1], array, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flipped[0], value, rtol=1e-5)
    for norm, degrees in (("l1", (1, 2)), ("fro2", (2, 4))):
        ratio = terms(a, 3 * b, norm)[0] / terms(a, b, norm)[0]
        np.testing.assert_allclose(ratio, [3.0**d for d in degrees], rtol=1e-4)


def test_the_preserving_term_is_a_shrinkage_by_the_spectrum():
    tree = adapt("wide", modules=1)
    delta = np.linalg.norm(np.asarray(tree["w"].a) @ np.asarray(tree["w"].b))
    s = np.linalg.svd(np.asarray(tree["w"].base), compute_uv=False)
    found = np.sqrt(float(penalty(tree, norm="fro2")))
    assert s[-1] * delta < found < s[0] * delta


@pytest.mark.parametrize("norm", ["l1", "fro2"])
def test_gradients_are_difference_quotients_and_the_weight_has_none(norm):
    tree = adapt(rank=2, modules=3)
    gradient = jax.jit(jax.grad(lambda tree: penalty(tree, norm=norm), allow_int=True))(tree)["w"]
    assert not np.asarray(gradient.base).any()
    rng = np.random.default_rng(3)
    for _ in range(3):
        a, b = (np.asarray(v, np.float64) for v in (tree["w"].a, tree["w"].b))
        da, db = (rng.normal(size=v.shape) for v in (a, b))
        step = 1e-7  # in float64, and away from zeros of the absolute values
        ahead, behind = (sum(dense_terms(tree, norm, a=a + s * da, b=b + s * db)) for s in (step, -step))
        slope = np.sum(np.asarray(gradient.a) * da) + np.sum(np.asarray(gradient.b) * db)
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-3)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.05), optax.adam(1e-2)], ids=["sgd", "adam"])
def test_without_penalty_it_is_one_lora_of_the_summed_rank(optimizer):
    w, x, y = normal(6, 5), normal(20, 6, seed=2), normal(20, 5, seed=3)
    group = sj.adapt({"w": jnp.asarray(w)}, {"w": pego(2, modules=3)}, key=KEY)
    lora = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.lora(6)}, key=KEY)
    lora = {"w": dataclasses.replace(lora["w"], a=group["w"].a)}
    loss = lambda tree, _: jnp.mean((sj.with_adapters(lambda p: x @ p["w"])(tree) - y) ** 2)
    ends = [
        jax.jit(lambda t: sj.training.scan_steps(loss, optimizer, t, steps=30))(t).adapted["w"] for t in (group, lora)
    ]
    assert_rounding(ends[0].a, ends[1].a, size=30)
    assert_rounding(ends[0].b, ends[1].b, size=30)


def test_counts_are_those_of_the_published_settings():
    shape = jax.ShapeDtypeStruct((768, 12, 64), jnp.float32)
    params = {f"{i}_{name}": shape for i in range(12) for name in ("query", "value")}
    role = sj.Role.dense((0,), (1, 2))
    for modules, expected in ((4, 589_824), (2, 294_912)):
        made = jax.eval_shape(
            lambda p, m=modules: sj.adapt(p, {"*": pego(4, modules=m)}, key=KEY, roles=dict.fromkeys(p, role)), params
        )
        assert sj.summary(made).trainable == expected


def test_memory_is_that_of_one_product_however_many_modules():
    def temporaries(modules):
        tree = adapt(w=normal(24, 256), rank=1, modules=modules)
        trainable, frozen = sj.partition(tree)
        step = jax.jit(jax.grad(lambda t: penalty(sj.combine(t, frozen))))
        return step.lower(trainable).compile().memory_analysis().temp_size_in_bytes

    product = 4 * 256 * 256
    assert temporaries(8) < 4 * product  # of 36 products


def test_it_is_served_merged_and_saved_as_one_low_rank_weight(tmp_path):
    tree, w = adapt(rank=2, modules=3), normal(6, 9)
    params, x = {"w": jnp.asarray(w)}, normal(3, 6, seed=5)
    dense = np.asarray(sj.merge(tree)["w"])
    assert_rounding(dense, w + np.asarray(tree["w"].a) @ np.asarray(tree["w"].b), size=16)
    bank = sj.bank(params, [tree, sj.adapt(params, {"w": sj.lora(1)}, key=KEY)])
    found = sj.per_row(lambda p, x: x @ p["w"])(bank, jnp.array([1, 0, 2]), x)
    np.testing.assert_allclose(found, np.stack([x[0] @ dense, x[1] @ w, x[2] @ w]), atol=1e-5)
    half = sj.merging.task_arithmetic([tree], params, weights=0.5)
    assert half["w"].a.shape == (6, 6)
    np.testing.assert_allclose(sj.merge(half)["w"], w + 0.5 * (dense - w), atol=1e-5)
    padded = sj.banks.pad_rank(tree, 9)
    np.testing.assert_allclose(sj.merge(padded)["w"], dense, atol=1e-6)
    with pytest.raises(StructureError, match="no weight of pego"):  # its groups are not told apart any more
        penalty(padded)
    sj.save_adapter(tmp_path / "one", tree)
    back = sj.load_adapter(tmp_path / "one", params)
    assert isinstance(back["w"], GroupLowRank)
    assert float(penalty(back)) == float(penalty(tree))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, name="attention")(x)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_query_and_value_of_an_attention(library):
    x = jnp.asarray(normal(2, 5, 8, seed=7))
    if library == "linen":
        params = Attention().init(KEY, x)["params"]["attention"]

        def apply(p, x):
            return Attention().apply({"params": {"attention": p}}, x)
    else:
        graph, state = nnx.split(nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)))
        params = nnx.to_pure_dict(state)

        def apply(p, x):
            copy = jax.tree.map(lambda v: v, state)
            nnx.replace_by_pure_dict(copy, p)
            return nnx.merge(graph, copy)(x)

    roles = sj.roles(apply, params, x)
    tree = sj.adapt(params, {n + "/kernel": pego(1, modules=2) for n in ("query", "value")}, key=KEY, roles=roles)
    trainable, frozen = sj.partition(tree)

    @jax.jit
    def step(trainable):
        run = sj.with_adapters(apply)
        loss = lambda t: jnp.mean(run(sj.combine(t, frozen), x) ** 2) + 1e-3 * penalty(sj.combine(t, frozen))
        return jax.tree.map(lambda p, g: p - 0.5 * g, trainable, jax.grad(loss)(trainable))

    trained = sj.combine(step(step(trainable)), frozen)
    assert float(jax.jit(penalty)(trained)) > 0
    found = jax.jit(sj.with_adapters(apply))(trained, x)
    np.testing.assert_allclose(found, jax.jit(apply)(sj.merge(trained), x), atol=1e-5)


def test_low_precision_weights_have_a_penalty_in_float32():
    tree = adapt(w=jnp.asarray(normal(6, 9), jnp.bfloat16))
    found = penalty_terms(tree)
    assert found.preserve.dtype == jnp.float32
    np.testing.assert_allclose(found, dense_terms(tree), rtol=1e-5)


def test_bad_input_is_refused():
    with pytest.raises(RankError, match="pego: modules=0"):
        pego(2, modules=0)
    with pytest.raises(RankError, match="pego: rank=0"):
        pego(0)
    with pytest.raises(ValueError, match="pego: dtype=float16"):
        pego(dtype="float16")
    with pytest.raises(StructureError, match="the tree has no weight of pego"):
        penalty({"w": jnp.ones((2, 2))})
    for options in ({"norm": "l2"}, {"axis": "both"}):
        with pytest.raises(ValueError, match=f"penalty: {next(iter(options))}="):
            penalty(adapt(), **options)
