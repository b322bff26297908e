"""A hypernetwork's factors, losses and guidance against merged kernels in NumPy, and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError, RankError, RoleError, StructureError
from subspace_jax.methods.systems.hypernetwork import (
    PooledDecoder,
    WeightDecoder,
    adapter_of,
    add_noise,
    cosine_schedule,
    ddim,
    denoising_loss,
    flatten,
    hybrid_guidance,
    hybrid_predictor,
    init_state,
    layout_of,
    output_penalty,
    personalized,
    train_step,
    unflatten,
)
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)
ROLES = {"block/out/kernel": sj.Role.dense((0, 1), (2,)), "layers/kernel": sj.Role.dense((1,), (2,), (0,))}


def draw(*shape, seed=0, scale=1.0):
    return jax.device_put(np.float32(scale * np.random.default_rng([seed, *shape]).normal(size=shape)))


def model(params, x, t, c):
    """A noise predictor with a plain kernel, one of heads and stacked layers."""
    h = jnp.concatenate([x, c, jnp.sin(t[:, None] / 5.0)], -1) @ params["block"]["query"]["kernel"]
    h = jnp.tanh(h + params["block"]["query"]["bias"])
    h = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, params["layers"]["kernel"])[0]
    return jnp.einsum("nhd,hdo->no", h.reshape(-1, 2, 4), params["block"]["out"]["kernel"])


def parameters():
    shapes = {"query": {"kernel": (9, 8), "bias": (8,)}, "out": {"kernel": (2, 4, 5)}}
    block = jax.tree.map(lambda s: draw(*s, scale=0.5), shapes, is_leaf=lambda s: isinstance(s, tuple))
    return {"block": block, "layers": {"kernel": draw(2, 8, 8, scale=0.3)}}


PARAMS = parameters()
LAYOUT = layout_of(PARAMS, "**/kernel", rank=3, alpha=6.0, roles=ROLES)
run, apply = jax.jit(sj.per_row(model)), jax.jit(model)
X, T, COND = draw(6, 5, seed=1), jnp.arange(6), draw(6, 3, seed=2)


def merged(output):
    """The model with kernels \\(W + s A B\\), formed in NumPy by the layout's definition."""
    o, plain = np.asarray(output, np.float64), jax.tree.map(np.asarray, PARAMS)
    places = [("block", "out", 8, 5), ("block", "query", 9, 8), ("layers", 0, 8, 8), ("layers", 1, 8, 8)]
    start = 0
    for group, name, i, j in places:
        a = o[start : start + 3 * i].reshape(i, 3) / np.sqrt(i)
        b = 0.1 * o[start + 3 * i : start + 3 * (i + j)].reshape(3, j)
        start += 3 * (i + j)
        change = 2.0 * a @ b  # alpha / r
        if group == "layers":
            kernel = np.array(plain["layers"]["kernel"])
            kernel[name] += change
            plain["layers"]["kernel"] = kernel
        else:
            kernel = plain[group][name]["kernel"]
            plain[group][name]["kernel"] = kernel + change.reshape(kernel.shape)
    assert start == len(o)
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), plain)


def test_every_number_has_its_place():
    assert LAYOUT.size == 3 * (13 + 17 + 16 + 16)
    assert [k.path for k in LAYOUT.kernels] == ["block/out/kernel", "block/query/kernel", "layers/kernel"]
    output = draw(4, LAYOUT.size)
    factors = unflatten(LAYOUT, output)
    assert factors["layers/kernel"][0].shape == (4, 2, 8, 3)
    np.testing.assert_allclose(flatten(LAYOUT, factors), output, rtol=1e-6)
    numbers = unflatten(LAYOUT, jnp.arange(LAYOUT.size)[None])  # each of them is in one factor of one kernel
    scaled = [np.concatenate([np.ravel(a * np.sqrt(a.shape[-2])), np.ravel(10 * b)]) for a, b in numbers.values()]
    np.testing.assert_allclose(np.sort(np.concatenate(scaled)), np.arange(LAYOUT.size), atol=1e-3)
    with pytest.raises(StructureError, match=r"output \(4, 3\)"):
        unflatten(LAYOUT, output[:, :3])


def test_a_batch_of_subjects_is_each_subject_with_merged_kernels():
    output = draw(3, LAYOUT.size)
    bank = personalized(PARAMS, LAYOUT, output)
    rows = jnp.array([2, 0, 1, 3, 1, 0])
    found = run(bank, rows, X, T, COND)
    for i, row in enumerate(np.asarray(rows)):
        one = PARAMS if row == 0 else merged(output[row - 1])
        np.testing.assert_allclose(found[i], apply(one, X, T, COND)[i], atol=2e-5)
    # No subject sees another, and a repeated one is the same.
    order = jnp.array([2, 0, 1])
    turned = run(personalized(PARAMS, LAYOUT, output[order]), jnp.array([3, 0, 2, 1, 2, 0]), X, T, COND)
    np.testing.assert_allclose(turned, found, atol=1e-6)
    alone = sj.merge(adapter_of(PARAMS, LAYOUT, output[1]))
    for one, expected in zip(jax.tree.leaves(alone), jax.tree.leaves(merged(output[1])), strict=True):
        assert_rounding(one, expected, size=16)
    text = str(jax.make_jaxpr(lambda o: run(personalized(PARAMS, LAYOUT, o), rows, X, T, COND))(output))
    assert "f32[6,9,8]" not in text
    assert "f32[3,9,8]" not in text


def test_a_bfloat16_model_is_close_to_its_float32_self():
    output, rows = draw(3, LAYOUT.size), jnp.array([2, 0, 1, 3, 1, 0])
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), PARAMS)
    low = sj.per_row(model)(
        personalized(half, LAYOUT, output), rows, X.astype(jnp.bfloat16), T, COND.astype(jnp.bfloat16)
    )
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), half)
    exact = run(personalized(wide, LAYOUT, output), rows, X, T, COND)
    np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=0.05 * float(jnp.abs(exact).max()))
    assert personalized(half, LAYOUT, output)["layers"]["kernel"].a.dtype == jnp.float32
    assert output_penalty(LAYOUT, output.astype(jnp.bfloat16)).dtype == jnp.float32


FEATURES = draw(4, 5, 7, seed=3)
DECODERS = {
    "transformer": WeightDecoder(LAYOUT, width=16, layers=1, heads=2),
    "pooled": PooledDecoder(LAYOUT, (12,)),
}


@pytest.fixture(params=DECODERS, scope="module")
def decoder(request):
    module = DECODERS[request.param]
    return module, jax.jit(module.init)(KEY, FEATURES)["params"]


def test_it_starts_as_the_model_and_learns_b_first(decoder):
    module, params = decoder
    write = jax.jit(lambda p: module.apply({"params": p}, FEATURES))
    output = write(params)
    assert output.shape == (4, LAYOUT.size)
    for a, b in unflatten(LAYOUT, output).values():
        assert not np.any(b)
        assert 0.5 < float(jnp.std(a)) * np.sqrt(a.shape[-2]) < 2
    rows = jnp.array([1, 2, 3, 4, 1, 0])
    plain = run(personalized(PARAMS, LAYOUT, output), jnp.zeros(6, int), X, T, COND)
    np.testing.assert_array_equal(run(personalized(PARAMS, LAYOUT, output), rows, X, T, COND), plain)

    def loss(params, penalty):
        arguments = rows, X, COND, jnp.zeros_like(COND), cosine_schedule(6), KEY
        return denoising_loss(run, PARAMS, LAYOUT, write(params), *arguments, penalty=penalty)[0]

    slope = jax.jit(jax.grad(loss))
    gradient, penalized = slope(params, 0.0), slope(params, 1e-3)
    heads = {n: g for n, g in gradient.items() if n.startswith("head")}
    assert heads
    for name, one in heads.items():
        first = int(name.split("_")[1])  # of a, by shape; the small decoder has one for every kernel, by number
        first = first if module is DECODERS["transformer"] else 3 * LAYOUT.kernels[first].inputs
        assert np.all(penalized[name]["bias"][:first] != 0)
        assert not np.any(one["kernel"][:, :first])
        assert not np.any(one["bias"][:first])
        assert np.any(one["kernel"][:, first:])
        assert np.any(one["bias"][first:])
    # Everything else waits for b to leave zero; the penalty moves a at once.
    others = [g for n, g in gradient.items() if not n.startswith("head")]
    assert not any(np.any(v) for v in jax.tree.leaves(others))


def test_the_transformer_shares_heads_by_shape_and_counts_as_it_says():
    layout = layout_of(
        {n: {"kernel": jnp.zeros((8, 6))} for n in "qkv"} | {"o": {"kernel": jnp.zeros((6, 8))}}, "**", rank=2
    )
    module = WeightDecoder(layout, width=16, layers=1, heads=2)
    params = jax.eval_shape(module.init, KEY, FEATURES)["params"]
    heads = {n: p for n, p in params.items() if n.startswith("head")}
    count = lambda tree: sum(v.size for v in jax.tree.leaves(tree))
    assert len(heads) == 2
    assert count(heads) == 2 * (16 + 1) * 2 * (8 + 6)
    assert params["queries"].shape == (4, 16)
    assert params["roles"].shape == (4, 16)
    # Subjects do not see each other, and the order of a reference's tokens does not matter: they are a set.
    moved = jax.tree.map(lambda v: draw(*v.shape, scale=0.3), params)
    run_it = jax.jit(lambda f: module.apply({"params": moved}, f))
    found = run_it(FEATURES)
    np.testing.assert_allclose(run_it(FEATURES[1:2])[0], found[1], atol=1e-5)
    np.testing.assert_allclose(run_it(FEATURES[:, ::-1]), found, atol=1e-5)
    np.testing.assert_allclose(run_it(jnp.concatenate([FEATURES, FEATURES], 1)), found, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_the_loss_is_the_denoising_error_of_the_written_model():
    output, rows, levels = draw(2, LAYOUT.size), jnp.array([1, 2, 2, 1, 1, 2]), cosine_schedule(20)
    null = jnp.full_like(COND, -1.0)
    arguments = run, PARAMS, LAYOUT, output, rows, X, COND, null, levels, KEY
    value, parts = denoising_loss(*arguments, penalty=0.01, condition_dropout=0.5)
    keys = jax.random.split(KEY, 4)
    t = jax.random.randint(keys[0], (6,), 0, 20)
    noise, empty = jax.random.normal(keys[1], X.shape), jax.random.bernoulli(keys[2], 0.5, (6,))
    assert 0 < int(empty.sum()) < 6  # samples drop their conditions one by one
    errors = []
    for i in range(6):
        level = float(levels[t[i]])
        x = np.sqrt(level) * X[i] + np.sqrt(1 - level) * noise[i]
        c = null[i] if empty[i] else COND[i]
        found = apply(merged(output[rows[i] - 1]), x[None], t[i : i + 1], c[None])[0]
        errors.append(np.mean((np.asarray(found) - noise[i]) ** 2))
    size = np.mean(np.sum(np.asarray(output, np.float64) ** 2, -1))
    assert float(parts["denoising"]) == pytest.approx(np.mean(errors), rel=1e-4)
    assert float(parts["penalty"]) == pytest.approx(size, rel=1e-5)
    assert float(value) == pytest.approx(np.mean(errors) + 0.01 * size, rel=1e-4)
    away = denoising_loss(*arguments, penalty=0.0, reference_dropout=0.999999)[1]["denoising"]
    base = denoising_loss(*arguments[:4], jnp.zeros(6, int), *arguments[5:], penalty=0.0)[1]["denoising"]
    assert float(away) == pytest.approx(float(base), rel=1e-6)


def test_its_gradient_is_a_difference_quotient_and_leaves_the_model_alone():
    output, rows = draw(2, LAYOUT.size), jnp.array([1, 2, 2, 1, 1, 2])
    one = lambda o, p=PARAMS: denoising_loss(
        run, p, LAYOUT, o, rows, X, COND, 0 * COND, cosine_schedule(20), KEY, penalty=1e-3
    )[0]
    value = jax.jit(one)
    gradient, step = jax.jit(jax.grad(one))(output), draw(2, LAYOUT.size, seed=5)
    quotient = (value(output + 1e-2 * step) - value(output - 1e-2 * step)) / 2e-2
    assert float(jnp.sum(gradient * step)) == pytest.approx(float(quotient), rel=1e-2)
    of_model = jax.jit(jax.grad(lambda p: one(output, p)))(PARAMS)["block"]["query"]["kernel"]
    assert not np.any(of_model)
    only = jax.jit(jax.grad(lambda o: 0.3 * output_penalty(LAYOUT, o)))(output)
    np.testing.assert_allclose(only, 2 * 0.3 * output / 2, rtol=1e-6)


def test_the_size_of_changes_by_gram_matrices_is_that_of_the_formed_ones():
    output = draw(2, LAYOUT.size)
    formed = [
        sum(
            np.sum((np.asarray(a, np.float64) - b) ** 2)
            for a, b in zip(*map(jax.tree.leaves, (merged(o), PARAMS)), strict=True)
        )
        for o in output
    ]
    assert float(output_penalty(LAYOUT, output, "delta")) == pytest.approx(np.mean(formed), rel=1e-4)


def test_training_changes_the_hypernetwork_alone_and_a_large_penalty_brings_it_back(decoder):
    module, params = decoder
    if isinstance(module, WeightDecoder):
        pytest.skip("one decoder is enough")
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.02, weight_decay=0.01))
    state, before = init_state(params, tx), jax.tree.map(np.array, PARAMS)
    rows, features = jnp.array([1, 2, 3, 4, 1, 2]), FEATURES

    @jax.jit
    def step(state, key, penalty):
        def loss(params):
            output = module.apply({"params": params}, features)
            arguments = rows, X, COND, 0 * COND, cosine_schedule(20), key
            return denoising_loss(run, PARAMS, LAYOUT, output, *arguments, penalty=penalty)

        return train_step(state, loss, tx, decay=0.9)

    sizes = {}
    for penalty in (0.0, 1.0):
        one = state
        for i in range(60):
            one, report = step(one, jax.random.fold_in(KEY, i), jnp.asarray(penalty))
        sizes[penalty] = float(report["penalty"])
        assert float(jnp.abs(one.params["head_0_0"]["bias"] - one.average["head_0_0"]["bias"]).max()) > 0
    assert sizes[1.0] < 0.1 * sizes[0.0]
    assert step._cache_size() == 1
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(old, new)
    count = lambda tree: sum(np.size(v) for v in jax.tree.leaves(tree))
    assert count(one.opt_state) == 2 * count(params) + 1  # moments and a count, of the hypernetwork alone


def test_guidance_reduces_to_what_it_is_made_of():
    p, p0, b, b0 = (draw(3, 4, seed=i) for i in range(4))
    np.testing.assert_allclose(hybrid_guidance(p, p0, b, b0, 2.0, 0.0), p0 + 2 * (p - p0), atol=1e-6)
    np.testing.assert_allclose(hybrid_guidance(b, b0, b, b0, 2.0, 1.5), b0 + 3.5 * (b - b0), atol=1e-5)
    np.testing.assert_allclose(hybrid_guidance(b, b0, b, b0, 0.0, 1.5), b0 + 1.5 * (b - b0), atol=1e-5)
    np.testing.assert_array_equal(hybrid_guidance(p, p0, b, b0, 0.0, 0.0), p0)
    at = lambda s, q: hybrid_guidance(p, p0, b, b0, s, q)
    np.testing.assert_allclose(
        at(0.7, 0.2) - at(0, 0), 0.7 * (at(1, 0) - at(0, 0)) + 0.2 * (at(0, 1) - at(0, 0)), atol=1e-5
    )


def test_the_guided_predictor_is_four_evaluations_of_two_models():
    output, rows = draw(2, LAYOUT.size), jnp.array([1, 2, 1, 2, 1, 2])
    bank, plain, null = personalized(PARAMS, LAYOUT, output), COND + 1, 0 * COND
    rate = lambda t: jnp.where(t > 2, 2.0, 0.5)
    predict = jax.jit(hybrid_predictor(run, bank, rows, COND, plain, null, rate, 0.5))
    mine = lambda c: jnp.stack(
        [model(merged(output[r - 1]), X[i : i + 1], T[i : i + 1], c[i : i + 1])[0] for i, r in enumerate(rows)]
    )
    theirs = lambda c: model(PARAMS, X, T, c)
    expected = mine(null) + rate(T)[:, None] * (mine(COND) - mine(null)) + 0.5 * (theirs(plain) - theirs(null))
    np.testing.assert_allclose(predict(X, T), expected, atol=5e-5)


def test_gaussian_data_is_denoised_by_a_closed_form():
    """Data N(mu_c, I): the noise is linear in x, and guidance moves its mean as the formula says, at every step."""
    levels, mu = cosine_schedule(30), {"c": 1.5, "plain": 1.0, "none": -0.5}
    seen = []

    def exact(x, t, mean):
        level = levels[t][:, None]
        return jnp.sqrt(1 - level) * (x - jnp.sqrt(level) * mean)

    def predict(x, t):
        parts = [exact(x, t, mu[n]) for n in ("c", "none", "plain", "none")]
        found = hybrid_guidance(*parts, 2.0, 0.5)
        mean = mu["none"] + 2.0 * (mu["c"] - mu["none"]) + 0.5 * (mu["plain"] - mu["none"])
        seen.append((found, exact(x, t, mean)))
        return found

    x = draw(4, 3)
    for t in (0, 7, 29):
        predict(x, jnp.full(4, t))
    for found, expected in seen:
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_noise_and_the_sampler():
    levels = cosine_schedule(100)
    assert np.all(np.diff(levels) < 0)
    assert 0 < levels[-1] < 1e-3
    x, noise = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    level = np.array([0.3, 0.9]).reshape(2, 1, 1)
    expected = np.sqrt(level) * x + np.sqrt(1 - level) * noise
    assert_rounding(add_noise(x, noise, jnp.asarray(level.ravel())), expected, size=4)
    point = draw(2, 5, seed=2)
    exact = lambda x, t: (x - jnp.sqrt(levels[t])[:, None] * point) / jnp.sqrt(1 - levels[t])[:, None]
    for steps in (1, 7):
        np.testing.assert_allclose(ddim(exact, draw(2, 5, seed=3), levels, steps), point, atol=2e-3)
    clipped = ddim(exact, draw(2, 5, seed=3), levels, 10, clip=0.5)
    np.testing.assert_allclose(clipped, np.clip(point, -0.5, 0.5), atol=2e-3)
    # Two steps by hand.
    start, seen = draw(2, 5, seed=4), []
    guess = lambda x, t: seen.append(1) or 0.3 * x
    middle = levels[jnp.array([99, 0])]
    clean = (start - np.sqrt(1 - middle[0]) * 0.3 * start) / np.sqrt(middle[0])
    between = np.sqrt(middle[1]) * clean + np.sqrt(1 - middle[1]) * 0.3 * start
    last = (between - np.sqrt(1 - middle[1]) * 0.3 * between) / np.sqrt(middle[1])
    assert_rounding(ddim(guess, start, levels, 2), last, size=64)
    # A bound on the clean image changes the noise that goes with it.
    clean = np.clip(clean, -0.2, 0.2)
    noise = (start - np.sqrt(middle[0]) * clean) / np.sqrt(1 - middle[0])
    between = np.sqrt(middle[1]) * clean + np.sqrt(1 - middle[1]) * noise
    last = np.clip((between - np.sqrt(1 - middle[1]) * 0.3 * between) / np.sqrt(middle[1]), -0.2, 0.2)
    assert_rounding(ddim(guess, start, levels, 2, clip=0.2), last, size=64)
    with pytest.raises(RankError, match="steps=101"):
        ddim(guess, start, levels, 101)


def test_bad_input_is_refused():
    with pytest.raises(RoleError, match="layers/kernel: shape"):
        layout_of(PARAMS, "layers/kernel", rank=2)
    with pytest.raises(RankError, match="rank"):
        layout_of(PARAMS, "block/query/kernel", rank=9)
    with pytest.raises(PatternError, match="nothing"):
        layout_of(PARAMS, "nothing")
    other = {"block": PARAMS["block"], "layers": {"kernel": jnp.zeros((3, 8, 8))}}
    with pytest.raises(StructureError, match="layers/kernel: the layout has a kernel of 8 inputs"):
        personalized(other, LAYOUT, draw(1, LAYOUT.size))
    with pytest.raises(ValueError, match="kind='frobenius'"):
        output_penalty(LAYOUT, draw(1, LAYOUT.size), "frobenius")
    arguments = jnp.ones(6, int), X, COND, COND, cosine_schedule(5), KEY
    with pytest.raises(ValueError, match="condition_dropout"):
        denoising_loss(run, PARAMS, LAYOUT, draw(1, LAYOUT.size), *arguments, condition_dropout=1.5)
