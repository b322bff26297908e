"""The head of class subspaces: its logits, its symmetries, its gradient, and training it beside a backbone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import subspace_jax as sj
from subspace_jax.methods.systems.gcr import GrassmannHead, NNXGrassmannHead, grassmann_logits
from tests.tolerances import tolerance

GAMMA = 25.0


def case(classes=5, width=7, dim=3, batch=4, seed=0):
    rng = np.random.default_rng(seed)
    subspaces = np.linalg.qr(rng.normal(size=(classes, width, dim)))[0].astype(np.float32)
    return rng.normal(size=(batch, width)).astype(np.float32), subspaces


def test_logits_are_norms_of_projections():
    x, subspaces = case()
    expected = np.empty((4, 5))
    for b, row in enumerate(x.astype(np.float64)):
        for c, s in enumerate(subspaces.astype(np.float64)):
            expected[b, c] = GAMMA * np.linalg.norm(s @ (s.T @ row)) / np.linalg.norm(row)
    np.testing.assert_allclose(grassmann_logits(x, subspaces), expected, rtol=1e-5)
    np.testing.assert_allclose(grassmann_logits(x, subspaces, 3.0), expected * 3 / 25, rtol=1e-5)


def test_logits_know_neither_basis_nor_length_nor_sign():
    x, subspaces = case()
    turns = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 3, 3)))[0].astype(np.float32)
    expected = grassmann_logits(x, subspaces)
    np.testing.assert_allclose(grassmann_logits(x, subspaces @ turns), expected, rtol=1e-5)
    for scale in (-1.0, 7.0, 1e-30, 1e30):
        np.testing.assert_allclose(grassmann_logits(np.float32(scale) * x, subspaces), expected, rtol=1e-5)


def test_logits_lie_between_zero_and_gamma():
    x, subspaces = case(width=40, batch=200)
    logits = np.asarray(grassmann_logits(x, subspaces))
    assert (logits >= 0).all()
    assert (logits < GAMMA).all()
    inside = np.einsum("cdk,ck->cd", subspaces, np.random.default_rng(2).normal(size=(5, 3)))
    logits = np.asarray(grassmann_logits(inside, subspaces))
    np.testing.assert_allclose(np.diag(logits), GAMMA, rtol=1e-5)
    assert (logits[~np.eye(5, dtype=bool)] < 0.99 * GAMMA).all()
    x, whole = case(dim=7)
    np.testing.assert_allclose(grassmann_logits(x, whole), GAMMA, rtol=1e-5)
    x, lines = case(dim=1)
    cosine = np.abs(x @ lines[..., 0].T) / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(grassmann_logits(x, lines), GAMMA * cosine, rtol=1e-4)


def test_gradient_of_a_logit_has_the_published_form_and_is_zero_where_the_norm_is():
    x, subspaces = case(batch=1)
    unit = x[0] / np.linalg.norm(x)
    projected = subspaces[2].T @ unit
    expected = GAMMA * np.outer(unit, projected) / np.linalg.norm(projected)
    found = jax.jit(jax.grad(lambda s: grassmann_logits(x, s)[0, 2]))(jnp.asarray(subspaces))
    np.testing.assert_allclose(found[2], expected, atol=1e-5)
    assert not np.asarray(found)[[0, 1, 3, 4]].any()
    # The feature's gradient, by finite differences in float64.
    wide, s = x[0].astype(np.float64), subspaces[2].astype(np.float64)
    logit = lambda v: GAMMA * np.linalg.norm(s.T @ v) / np.linalg.norm(v)
    numeric = [(logit(wide + e) - logit(wide - e)) / 2e-6 for e in 1e-6 * np.eye(7)]
    np.testing.assert_allclose(jax.jit(jax.grad(lambda v: grassmann_logits(v, subspaces)[2]))(x[0]), numeric, atol=1e-4)
    orthogonal = np.linalg.svd(subspaces[2])[0][:, -1]
    slope = jax.jit(jax.grad(lambda v, s: grassmann_logits(v, s).sum(), (0, 1)))
    for feature in (np.zeros(7, np.float32), orthogonal):
        both = slope(feature.astype(np.float32), subspaces.astype(np.float32))
        assert all(np.isfinite(v).all() for v in both)
    assert not np.asarray(grassmann_logits(np.zeros(7, np.float32), subspaces)).any()


def test_features_in_bfloat16_give_float32_logits():
    x, subspaces = case()
    narrow = jnp.asarray(x, jnp.bfloat16)
    logits = grassmann_logits(narrow, subspaces)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, grassmann_logits(narrow.astype(jnp.float32), subspaces), rtol=tolerance())


def test_linen_and_nnx_heads_are_one():
    x, subspaces = case()
    head = GrassmannHead(5, 3)
    params = head.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == {"subspaces": (5, 7, 3)}
    assert sj.manifolds.Grassmann().check_point(params["subspaces"], tolerance=1e-6)
    twin = NNXGrassmannHead(7, 5, 3, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(twin, nnx.Param))
    assert jax.tree.map(jnp.shape, state) == {"subspaces": (5, 7, 3)}
    assert sj.manifolds.Grassmann().check_point(state["subspaces"], tolerance=1e-6)
    twin.subspaces[...] = jnp.asarray(subspaces)
    expected = grassmann_logits(x, subspaces)
    np.testing.assert_array_equal(twin(x), expected)
    np.testing.assert_array_equal(head.apply({"params": {"subspaces": subspaces}}, x), expected)
    images = np.broadcast_to(x[:, None, None], (4, 2, 3, 7))
    np.testing.assert_allclose(grassmann_logits(images, subspaces)[:, 1, 2], expected, rtol=tolerance())


@pytest.mark.parametrize(("fields", "message"), [((5, 8), "exceeds the features' width 7"), ((0, 2), "num_classes=0")])
def test_impossible_heads_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GrassmannHead(*fields).init(jax.random.key(0), jnp.ones((1, 7)))
    with pytest.raises(ValueError, match=message):
        NNXGrassmannHead(7, *fields, rngs=nnx.Rngs(0))


class Classifier(nn.Module):
    """A backbone and the head."""

    @nn.compact
    def __call__(self, x):
        return GrassmannHead(4, 2, name="head")(nn.relu(nn.Dense(12, name="hidden")(x)))


def label(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: "head" if path[0].key == "head" else "rest", tree)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "beside LoRA"])
def test_trains_jointly_with_a_backbone_in_one_chain(adapted):
    """The head stays on its manifold, weight decay does not reach it, and it learns; alone or beside LoRA."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6))
    y = rng.integers(0, 4, 256)
    x = jnp.asarray(centres[y] + 0.3 * rng.normal(size=(256, 6)), jnp.float32)
    model = Classifier()
    params = model.init(jax.random.key(1), x)["params"]
    rules = {"head/*": sj.full(), "hidden/kernel": sj.lora(2)}
    tree = sj.adapt(params, rules, key=jax.random.key(2)) if adapted else params
    trainable, frozen = sj.partition(tree) if adapted else (tree, None)
    apply = sj.with_adapters(lambda p, x: model.apply({"params": p}, x))

    def loss(trainable):
        whole = sj.combine(trainable, frozen) if adapted else trainable
        return optax.softmax_cross_entropy_with_integer_labels(apply(whole, x), y).mean()

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"head": sj.methods.gcr.grassmann_sgd(optax.cosine_decay_schedule(0.05, 200)), "rest": optax.adamw(1e-2)},
            label,
        ),
    )

    @jax.jit
    def run(trainable):
        def step(carry, _):
            value, gradient = jax.value_and_grad(loss)(carry[0])
            updates, state = optimizer.update(gradient, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), value

        return jax.lax.scan(step, (trainable, optimizer.init(trainable)), None, length=200)

    (end, _), losses = run(trainable)
    assert losses[-1] < 0.5 * losses[0]
    subspaces = sj.merge(sj.combine(end, frozen))["head"]["subspaces"] if adapted else end["head"]["subspaces"]
    assert sj.manifolds.Grassmann().check_point(subspaces, tolerance=1e-5)
    assert np.all(sj.manifolds.Grassmann().distance(subspaces, params["head"]["subspaces"]) > 1e-3)
