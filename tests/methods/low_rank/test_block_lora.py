"""Block-LoRA: one head and a sum of arms, against numpy and against LoRA with a rate of its own for each factor."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import subspace_jax as sj
from subspace_jax.core import RankError
from subspace_jax.methods.low_rank.block_lora import block_lora, generalization_ratio, to_lora
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)
INPUTS, OUTPUTS = 7, 5


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W, X, Y = normal(INPUTS, OUTPUTS), normal(20, INPUTS, seed=1), normal(20, OUTPUTS, seed=2)


def adapt(method, w=W, roles=None):
    return sj.adapt({"w": jnp.asarray(w)}, {"w": method}, key=KEY, roles=roles)


def moved(method, w=W, roles=None):
    """With arms that differ."""
    weight = adapt(method, w, roles)["w"]
    return {"w": dataclasses.replace(weight, arms=jnp.asarray(normal(*weight.arms.shape, seed=3), weight.arms.dtype))}


def error(tree, x=X, y=Y):
    return jnp.mean((sj.with_adapters(lambda p: x @ p["w"])(tree) - y) ** 2)


def train(tree, optimizer, steps=100):
    run = jax.jit(lambda t: sj.training.scan_steps(lambda t, _: error(t), optimizer, t, steps=steps).adapted)
    return run(tree)["w"]


@pytest.mark.parametrize("stabilized", [True, False])
def test_it_is_the_sum_of_products_with_one_head(stabilized):
    tree = moved(block_lora(6, blocks=3, alpha=2.0, rank_stabilized=stabilized))
    weight = tree["w"]
    head, arms = (np.asarray(v, np.float64) for v in (weight.head, weight.arms))
    scale = 2.0 / (np.sqrt(6) if stabilized else 6)
    delta = scale * sum(head @ arm for arm in arms)
    assert_rounding(sj.merge(tree)["w"], W + delta, size=16)
    assert_rounding(sj.with_adapters(lambda p, x: x @ p["w"])(tree, X), X @ (W + delta), size=32)
    assert np.linalg.matrix_rank(delta) == weight.rank == 2
    whole = np.concatenate([head] * 3, axis=1) @ arms.reshape(6, -1)  # the LoRA whose lower blocks are one
    np.testing.assert_allclose(scale * whole, delta, atol=1e-10)
    permuted = {"w": dataclasses.replace(weight, arms=weight.arms[jnp.array([2, 0, 1])])}
    assert_rounding(sj.merge(permuted)["w"], sj.merge(tree)["w"], size=4)
    assert sj.summary(tree).trainable == 2 * INPUTS + 6 * OUTPUTS


def test_it_starts_as_the_weight_and_arms_stay_equal():
    tree = adapt(block_lora(4, blocks=2))
    np.testing.assert_array_equal(sj.merge(tree)["w"], W)
    gradient = jax.jit(jax.grad(lambda t, f: error(sj.combine(t, f))))(*sj.partition(tree))["w"].arms
    np.testing.assert_array_equal(gradient[0], gradient[1])
    assert np.abs(gradient).max() > 0
    trained = train(tree, optax.adamw(1e-2))
    np.testing.assert_array_equal(trained.arms[0], trained.arms[1])
    assert np.abs(trained.arms).max() > 0


DECAY = 0.3
OPTIMIZERS = {
    "sgd": (optax.sgd, {}),
    "adam": (functools.partial(optax.adam, eps=1e-3), {}),
    "adamw": (functools.partial(optax.adamw, eps=1e-3), {"weight_decay": DECAY}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_it_is_lora_whose_upper_factor_learns_faster(name, blocks):
    make, options = OPTIMIZERS[name]
    rate = 0.03
    ours = train(adapt(block_lora(4, blocks=blocks, alpha=3.0)), make(rate, **options))
    scale = 3.0 / np.sqrt(4)
    lora = adapt(sj.lora(4 // blocks, alpha=scale * 4 / blocks))
    upper = {k: v / blocks for k, v in options.items()}
    labels = jax.tree.map(lambda _: "", sj.partition(lora)[0])
    labels = {"w": dataclasses.replace(labels["w"], a="a", b="b")}
    # The oracle: a rate for each factor, and 1/n of the decay on the upper one.
    split = optax.multi_transform({"a": make(rate, **options), "b": make(blocks * rate, **upper)}, labels)
    theirs = train(lora, split)
    np.testing.assert_allclose(ours.head, theirs.a, atol=2e-5)
    np.testing.assert_allclose(np.sum(ours.arms, axis=0), theirs.b, atol=2e-5)
    if blocks == 1 and name != "adamw":
        same = train(adapt(sj.lora(4, alpha=3.0, rank_stabilized=True)), make(rate, **options))
        assert_rounding(ours.head, same.a, size=100)


def test_clipping_by_a_global_norm_breaks_that():
    tree = adapt(block_lora(4, blocks=4, alpha=2.0))
    lora = adapt(sj.lora(1, alpha=1.0))
    norms = [
        optax.tree.norm(jax.jit(jax.grad(lambda t, f: error(sj.combine(t, f))))(*sj.partition(t))) for t in (tree, lora)
    ]
    np.testing.assert_allclose(norms[0], 2 * norms[1], rtol=1e-4)


def test_arms_differ_once_they_are_dropped_apart():
    tree = adapt(block_lora(4, blocks=2, arm_dropout=0.5))
    run = jax.jit(lambda t, key: error(sj.with_dropout(t, key)))
    moving, still = moved(block_lora(4, blocks=2, arm_dropout=0.5)), {}
    values = {float(run(moving, jax.random.key(i))) for i in range(8)}
    assert len(values) > 3
    assert float(error(moving)) == float(error(moved(block_lora(4, blocks=2)) | still))  # none outside of training
    trainable, frozen = sj.partition(tree)
    gradient = jax.jit(jax.grad(lambda t: error(sj.with_dropout(sj.combine(t, frozen), jax.random.key(3)))))(trainable)[
        "w"
    ].arms
    assert not np.array_equal(gradient[0], gradient[1])
    # Kept rows are scaled up, so that the mean over masks is the whole.
    keys = jax.random.split(KEY, 4000)
    sums = jax.vmap(lambda key: sj.with_dropout(moving, key)["w"].factors()[1])(keys)
    np.testing.assert_allclose(sums.mean(0), moving["w"].factors()[1], atol=0.15)
    stack = moved(block_lora(4, arm_dropout=0.5), normal(3, 6, 5), {"w": sj.Role.dense((1,), (2,), (0,))})
    dropped = sj.with_dropout(stack, KEY)["w"].factors()[1] / sj.merge(stack)["w"].shape[0]
    assert dropped.shape == (3, 2, 5)


@pytest.mark.parametrize("inside", [False, True])
def test_export_is_the_same_function_with_the_alpha_of_its_reader(inside, tmp_path):
    method = block_lora(6, blocks=3, alpha=2.0)
    tree = moved(method) if not inside else adapt(sj.dora(method))
    if inside:
        arms = jnp.asarray(normal(3, 2, OUTPUTS, seed=3))
        tree = {"w": dataclasses.replace(tree["w"], direction=dataclasses.replace(tree["w"].direction, arms=arms))}
    plain = to_lora(tree)
    assert_rounding(sj.merge(plain)["w"], sj.merge(tree)["w"], size=4)
    params = {"layer": {"kernel": jnp.asarray(W)}}
    names = sj.io.NameMap((sj.io.NameRule("layer", "layer"),))
    for i, one in enumerate((tree, plain)):
        sj.save_peft(tmp_path / str(i), {"layer": {"kernel": one["w"]}}, params, names)
        config = json.loads((tmp_path / str(i) / "adapter_config.json").read_text())
        assert (config["r"], config["use_rslora"]) == (2, True)
        np.testing.assert_allclose(config["lora_alpha"], 2.0 / np.sqrt(6) * np.sqrt(2), rtol=1e-5)
        back = sj.merge(sj.load_peft(tmp_path / str(i), params, names))
        assert_rounding(back["layer"]["kernel"], sj.merge(tree)["w"], size=8)


def test_dora_scales_its_columns():
    tree = adapt(sj.dora(block_lora(4, blocks=2, dropout=0.3)))
    direction = moved(block_lora(4, blocks=2, dropout=0.3))["w"]
    tree = {"w": dataclasses.replace(tree["w"], direction=direction)}
    formed = np.asarray(direction.materialize(), np.float64)
    expected = formed * np.linalg.norm(W, axis=0) / np.linalg.norm(formed, axis=0)
    assert_rounding(sj.merge(tree)["w"], expected, size=16)
    assert_rounding(sj.with_adapters(lambda p, x: x @ p["w"])(tree, X), X @ expected, size=32)
    # With dropout, the base's part sees the undropped input, as DoRA of LoRA has it.
    lora = to_lora(tree)
    run = lambda t: sj.with_adapters(lambda p, x: x @ p["w"])(sj.with_dropout(t, KEY), X)
    assert_rounding(run(tree), run(lora), size=32)


def test_banks_mergers_and_files_take_it(tmp_path):
    params, tree = {"w": jnp.asarray(W)}, moved(block_lora(6, blocks=3))
    dense = np.asarray(sj.merge(tree)["w"])
    bank = sj.bank(params, [tree, adapt(sj.lora(1))])
    found = sj.per_row(lambda p, x: x @ p["w"])(bank, jnp.array([1, 0, 2]), X[:3])
    np.testing.assert_allclose(found, np.stack([X[0] @ dense, X[1] @ W, X[2] @ W]), atol=1e-5)
    half = sj.merging.task_arithmetic([tree], params, weights=0.5)
    assert half["w"].a.shape == (INPUTS, 2)
    np.testing.assert_allclose(sj.merge(half)["w"], W + 0.5 * (dense - W), atol=1e-5)
    sj.save_adapter(tmp_path / "one", tree)
    back = sj.load_adapter(tmp_path / "one", params)
    np.testing.assert_array_equal(back["w"].arms, tree["w"].arms)


def test_counts_are_those_of_the_published_setting():
    def trained(method, width):
        shape = jax.ShapeDtypeStruct((width, width), jnp.float32)
        params = {f"{i}_{n}": shape for i in range(12) for n in "qkv"}
        return sj.summary(jax.eval_shape(lambda p: sj.adapt(p, {"*": method}, key=KEY), params)).trainable

    # ViT-B/16 and its text encoder, query, key and value, rank 2.
    assert trained(sj.lora(2), 768) + trained(sj.lora(2), 512) == 184_320
    assert trained(block_lora(2), 768) + trained(block_lora(2), 512) == 138_240
    for blocks in (2, 4, 8):
        ratio = trained(block_lora(8, blocks=blocks), 64) / trained(sj.lora(8), 64)
        np.testing.assert_allclose(ratio, (1 + 1 / blocks) / 2)
        np.testing.assert_allclose(generalization_ratio([(64, 64)] * 3, 8, blocks) ** 2, ratio)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((OUTPUTS, 2), name="dense")(x)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_linen_and_nnx(library):
    if library == "linen":
        params = Layer().init(KEY, X)["params"]["dense"]

        def apply(p, x):
            return Layer().apply({"params": {"dense": p}}, x)
    else:
        graph, state = nnx.split(nnx.LinearGeneral(INPUTS, (OUTPUTS, 2), rngs=nnx.Rngs(0)))
        params = nnx.to_pure_dict(state)

        def apply(p, x):
            copy = jax.tree.map(lambda v: v, state)
            nnx.replace_by_pure_dict(copy, p)
            return nnx.merge(graph, copy)(x)

    tree = sj.adapt(params, {"kernel": block_lora(4)}, key=KEY, roles=sj.roles(apply, params, X))
    arms = jnp.asarray(normal(*tree["kernel"].arms.shape))
    tree = tree | {"kernel": dataclasses.replace(tree["kernel"], arms=arms)}
    np.testing.assert_allclose(sj.with_adapters(apply)(tree, X), apply(sj.merge(tree), X), atol=1e-5)


def test_bad_options_are_refused_by_name():
    with pytest.raises(RankError, match="block_lora: blocks=3 does not divide rank=4"):
        block_lora(4, blocks=3)
    bad = {"rank": 0, "blocks": 0, "alpha": 0.0, "dropout": 1.0, "arm_dropout": -0.1, "dtype": "int8"}
    for option, value in bad.items():
        with pytest.raises(ValueError, match=f"block_lora: {option}="):
            block_lora(**{option: value})
    with pytest.raises(RankError, match="generalization_ratio: rank"):
        generalization_ratio([(2, 2)], 0, 1)
