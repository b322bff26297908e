"""The network's symmetries, its sizes, adapters, training and meta-learning, against closed forms and differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.methods import lemon
from tests.methods.systems.lemon_case import MODEL, SMALL, batch, forward64
from tests.tolerances import tolerance


@pytest.fixture(scope="module")
def params():
    b, rng = batch(), np.random.default_rng(1)
    arguments = b.inputs, b.input_times, b.target_times, b.tokens, b.mask
    made = jax.eval_shape(MODEL.init, jax.random.key(0), *arguments)["params"]

    def one(path, leaf):
        return jax.device_put(np.float32((path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape)))

    return jax.tree.map_with_path(one, made)


run = jax.jit(lambda params, b: lemon.predict(MODEL.apply, params, b))


def test_the_network_is_the_one_written_down(params):
    b = batch()
    b = b._replace(mask=b.mask.at[1, 4:].set(False))
    np.testing.assert_allclose(run(params, b), forward64(params, b), rtol=1e-4, atol=1e-4)


def test_each_query_time_is_on_its_own(params):
    b = batch()
    whole = run(params, b)
    for i in range(3):
        alone = run(params, b._replace(target_times=b.target_times[i : i + 1]))
        np.testing.assert_allclose(alone[:, 0], whole[:, i], atol=1e-5)
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(run(params, b._replace(target_times=b.target_times[order])), whole[:, order], atol=1e-5)


def test_padding_changes_nothing_and_rows_are_independent(params):
    b = batch()
    expected = run(params, b)
    longer = b._replace(
        tokens=jnp.pad(b.tokens, ((0, 0), (0, 4)), constant_values=9), mask=jnp.pad(b.mask, ((0, 0), (0, 4)))
    )
    np.testing.assert_allclose(run(params, longer), expected, atol=1e-5)
    order = np.array([1, 2, 0])
    rows = jax.tree.map(lambda v: v[order] if v.ndim > 1 else v, b)
    np.testing.assert_allclose(run(params, rows), expected[order], atol=1e-5)
    each = b._replace(input_times=jnp.tile(b.input_times, (3, 1)), target_times=jnp.tile(b.target_times, (3, 1)))
    np.testing.assert_allclose(run(params, each), expected, atol=1e-6)
    words = jax.jit(lambda p: MODEL.apply({"params": p}, b.tokens, b.mask, method="encode_symbols"))
    assert words(params).shape == (3, 7, 16)
    other = run(params, b._replace(tokens=b.tokens[:, ::-1]))
    assert np.abs(other - expected).max() > 1e-3  # symbols have places, and are read


@pytest.mark.parametrize(("scale", "shift"), [(3.0, -7.0), (0.25, 0.0)])
def test_units_of_the_data_go_in_and_come_out(params, scale, shift):
    b = batch()
    moved = run(params, b._replace(inputs=scale * b.inputs + shift))
    np.testing.assert_allclose(moved, scale * run(params, b) + shift, rtol=1e-4, atol=1e-4 * scale)


def test_statistics_and_errors_are_numpys():
    b = batch()
    mean, deviation = lemon.input_statistics(b.inputs)
    flat = np.asarray(b.inputs, np.float64).reshape(3, -1)
    np.testing.assert_allclose(mean[:, 0, 0], flat.mean(1), rtol=1e-5)
    np.testing.assert_allclose(deviation[:, 0, 0], flat.std(1, ddof=1) + 1e-6, rtol=1e-5)
    expected = [np.linalg.norm(p - t) / np.linalg.norm(t) for p, t in zip(b.targets + 1, b.targets, strict=True)]
    np.testing.assert_allclose(lemon.relative_errors(b.targets + 1, b.targets), expected, rtol=1e-5)


def test_loss_is_the_mean_square_in_normalized_units(params):
    b = batch()
    _, deviation = lemon.input_statistics(b.inputs)
    expected = np.mean(((np.asarray(run(params, b)) - b.targets) / deviation) ** 2)
    found = jax.jit(lambda p: lemon.lemon_loss(MODEL.apply, p, b))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_bfloat16_stays_near_and_finite(params):
    config = lemon.LemonConfig(points=6, width=16, ffn=24, heads=2, layers=(1, 1, 1, 2), dtype=jnp.bfloat16)
    b = batch()
    b = b._replace(mask=b.mask.at[:, 1:].set(False))  # all but one symbol masked
    narrow = jax.jit(lambda p: lemon.predict(lemon.Lemon(config).apply, p, b))(params)
    assert narrow.dtype == jnp.float32
    expected = run(params, b)
    assert np.abs(narrow - expected).max() < 0.1 * np.abs(expected).max()


def shapes(config, length=4):
    model, frames = lemon.Lemon(config), jnp.zeros((1, 2, config.points))
    tokens, mask = jnp.zeros((1, length), int), jnp.ones((1, length), bool)
    made = jax.eval_shape(model.init, jax.random.key(0), frames, jnp.zeros(2), jnp.zeros(2), tokens, mask)
    return made["params"]


@pytest.mark.parametrize(
    ("config", "rank", "whole", "adapters", "official"),
    [
        (lemon.LemonConfig(), 64, 70_542_464, 13_385_856, 7_618_688),
        (lemon.LemonConfig(32, 64, 256, 4, (1, 1, 2, 2)), 8, 321_696, 61_968, 37_392),
    ],
    ids=["published", "small"],
)
def test_networks_have_the_published_numbers_of_parameters(config, rank, whole, adapters, official):
    tree = shapes(config)
    sizes = {k: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(v)) for k, v in tree.items()}
    assert sizes.pop("words") == len(lemon.vocabulary()) * config.width
    assert sum(sizes.values()) == whole
    for flag, expected in ((False, adapters), (True, official)):
        rules = lemon.lora_rules(rank, official_targets=flag)
        adapted = jax.eval_shape(lambda p, r=rules: sj.adapt(p, r, key=jax.random.key(0)), tree)
        trainable, _ = sj.partition(adapted)
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable)) == expected


def test_lora_starts_at_the_base_learns_alone_and_merges(params):
    adapted = sj.adapt(params, lemon.lora_rules(4, 5.0), key=jax.random.key(2))
    weight = adapted["decoder"]["layer_0"]["attention"]["query"]["kernel"]
    assert float(weight.scale) == 5.0
    many = sj.adapt({"w": jnp.ones((400, 8))}, {"w": lemon.lemon_lora(16)}, key=jax.random.key(3))["w"].a
    np.testing.assert_allclose(np.std(many), 0.25, rtol=0.05)  # variance 1 / r
    apply, b = sj.with_adapters(MODEL.apply), batch()
    predicted = jax.jit(lambda tree: lemon.predict(apply, tree, b))
    base = run(params, b)
    np.testing.assert_allclose(predicted(adapted), base, atol=tolerance(size=16, norm=np.abs(base).max()))
    trainable, frozen = sj.partition(adapted)
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    layers = 5 * (2 * (16 + 24) + 4 * (16 + 16))  # feed-forward and attention
    ends = 2 * (1 + 16 + 32) + (6 + 16 + 32) + (32 + 16 + 6)  # two of times, frames, output
    assert count == 4 * (layers + ends)
    loss = lambda t, f, data: lemon.lemon_loss(apply, sj.combine(t, f), data)
    trained, losses = lemon.train(loss, trainable, frozen, _rows(b), 20, None, jax.random.key(4), 1e-2)
    assert losses[-1] < losses[0]
    tuned = sj.combine(trained, frozen)
    merged = sj.merge(tuned)
    np.testing.assert_allclose(predicted(tuned), run(merged, b), atol=1e-4)
    norm = ("fusion", "layer_0", "norm_0", "scale")
    assert (merged[norm[0]][norm[1]][norm[2]][norm[3]] == params[norm[0]][norm[1]][norm[2]][norm[3]]).all()


def _rows(b):
    """Times for each row, so that all leaves have a leading axis of samples."""
    return b._replace(input_times=jnp.tile(b.input_times, (3, 1)), target_times=jnp.tile(b.target_times, (3, 1)))


def test_training_is_adamw_with_warmup_clip_and_decay():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(6, 3)), jnp.float32)
    loss = lambda w, frozen, rows: 0.1 * jnp.sum((rows @ w - frozen) ** 2)
    start = jnp.ones(3)
    found, losses = lemon.train(loss, start, 2.0, x, 25, None, jax.random.key(0), 0.3)
    w, m, v, norms = np.ones(3), np.zeros(3), np.zeros(3), []
    rows = np.asarray(x, np.float64)
    for t in range(25):
        np.testing.assert_allclose(losses[t], 0.1 * ((rows @ w - 2) ** 2).sum(), rtol=1e-3)
        g = 0.2 * rows.T @ (rows @ w - 2)
        norms.append(np.linalg.norm(g))
        g = g / max(1.0, np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-6)
        rate = 0.3 * (t / 2 if t < 2 else 0.5 * (1 + np.cos(np.pi * (t - 2) / 23)))
        w = w - rate * (step + 1e-4 * w)
    np.testing.assert_allclose(found, w, rtol=1e-3)
    assert max(norms) > 2 > 1 > min(norms)  # else Adam would not see where gradients are clipped
    drawn, _ = lemon.train(loss, start, 2.0, x, 25, 4, jax.random.key(0), 0.3)
    assert np.abs(drawn - found).max() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lemon.LemonConfig(heads=3), "heads=3"),
        (lambda: lemon.LemonConfig(width=0), "width=0"),
        (lambda: lemon.LemonConfig(layers=(1, 1, 1)), "four depths"),
        (lambda: lemon.adapt_to(jnp.add, 1.0, 1.0, 0.1, steps=-1), "steps=-1"),
        (lambda: lemon.adapt_to(jnp.add, 1.0, 1.0, 0.1, clamp=0.0), "clamp=0.0"),
        (lambda: lemon.adapt_to(jnp.add, 1.0, 1.0, 0.1, temperature=1.0), "needs a key"),
        (lambda: lemon.warmup_cosine(0), "steps=0"),
        (lambda: lemon.warmup_cosine(10, warmup=1.0), r"warmup=1\.0"),
        (lambda: lemon.lemon_lora(0), "rank=0"),
        (lambda: lemon.lemon_lora(2, -1.0), "alpha"),
    ],
)
def test_bad_options_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.interop
def test_a_layer_is_pytorchs():
    torch = pytest.importorskip("torch")
    from subspace_jax.methods.systems.lemon import _model

    layer = _model._Layer(SMALL)
    x = np.random.default_rng(8).normal(size=(2, 5, 16)).astype(np.float32)
    p = jax.tree.map(np.asarray, jax.jit(layer.init)(jax.random.key(0), x)["params"])
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 24, 0.0, "gelu", norm_first=True, batch_first=True)
    attention = p["attention"]
    with torch.no_grad():
        put = lambda target, value: target.copy_(torch.tensor(np.array(value)))
        parts = [attention[n] for n in ("query", "key", "value")]
        put(theirs.self_attn.in_proj_weight, np.concatenate([q["kernel"].T for q in parts]))
        put(theirs.self_attn.in_proj_bias, np.concatenate([q["bias"] for q in parts]))
        for ours, module in (
            (attention["output"], theirs.self_attn.out_proj),
            (p["ffn_in"], theirs.linear1),
            (p["ffn_out"], theirs.linear2),
        ):
            put(module.weight, ours["kernel"].T)
            put(module.bias, ours["bias"])
        expected = theirs.eval()(torch.tensor(x)).numpy()
    np.testing.assert_allclose(jax.jit(layer.apply)({"params": p}, x), expected, atol=tolerance(size=64, norm=4.0))
