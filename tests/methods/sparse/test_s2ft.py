"""S2FT against numpy and dense differentiation: rows and columns learn, and a step keeps only what they need."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError, RoleError


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapt(params, rules, **options):
    return sj.adapt(jax.tree.map(jnp.asarray, params), rules, key=jax.random.key(0), **options)


def moved(adapted, seed=0):
    trainable, frozen = sj.partition(adapted)
    rng = np.random.default_rng(seed)
    return sj.combine(jax.tree.map(lambda v: v + jnp.asarray(rng.normal(size=v.shape), v.dtype), trainable), frozen)


FIELDS = {"in": "rows", "out": "columns"}
SIDES = list(FIELDS)
BOTH = ["delta", "in_place"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("parameterization", BOTH)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_starts_at_the_weight_and_changes_the_selection_alone(side, parameterization, dtype):
    w = jnp.asarray(matrix((12, 7)), dtype)
    adapted = adapt({"w": w}, {"w": sj.s2ft(0.3, side=side, parameterization=parameterization)})
    np.testing.assert_array_equal(sj.merge(adapted)["w"], w)
    weight = adapted["w"]
    assert (weight.rows if side == "in" else weight.columns).dtype == jnp.float32
    after = np.asarray(sj.merge(moved(adapted))["w"], np.float32) - np.asarray(w, np.float32)
    axis = 1 if side == "in" else 0
    changed = set(np.flatnonzero(np.abs(after).sum(axis)))
    assert changed == set(np.asarray(weight.positions()).tolist())
    assert len(changed) == int(0.3 * (12 if side == "in" else 7)) == weight.slots
    assert np.linalg.matrix_rank(after.astype(np.float64)) <= weight.slots


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("parameterization", BOTH)
@pytest.mark.parametrize("contiguous", [False, True])
def test_forward_and_gradient_are_those_of_the_dense_weight(side, parameterization, contiguous):
    w, x = matrix((12, 7)), matrix((3, 5, 12), 1)
    mask = np.zeros(12 if side == "in" else 7, bool)
    mask[[2, 3, 4] if contiguous else [1, 4, 6]] = True
    method = sj.s2ft(selected={"w": mask}, side=side, parameterization=parameterization)
    adapted = moved(adapt({"w": w}, {"w": method}))
    assert (adapted["w"].selected is None) is contiguous
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(lambda p, x: x @ p["w"])
    loss = lambda y: jnp.sum(jnp.sin(y))
    dense = sj.merge(adapted)["w"]
    np.testing.assert_allclose(apply(adapted, x), x @ dense, rtol=1e-4, atol=1e-5)
    found = jax.jit(jax.grad(lambda t, x: loss(apply(sj.combine(t, frozen), x)), argnums=(0, 1)))(trainable, x)
    full = jax.jit(jax.grad(lambda w, x: loss(x @ w), argnums=(0, 1)))(dense, x)
    expected = full[0][mask] if side == "in" else full[0][:, mask]
    np.testing.assert_allclose(getattr(found[0]["w"], FIELDS[side]), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1], full[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parameterization", BOTH)
@pytest.mark.parametrize("contiguous", [False, True])
def test_rows_keep_only_their_slice_of_the_input(parameterization, contiguous):
    w = matrix((96, 40))
    mask = np.isin(np.arange(96), [5, 6, 7] if contiguous else [5, 20, 70])
    adapted = adapt({"w": w}, {"w": sj.s2ft(selected={"w": mask}, parameterization=parameterization)})
    trainable, frozen = sj.partition(adapted)

    def kept(trainable, frozen, x):
        apply = sj.with_adapters(lambda p, x: jnp.tanh(x) @ p["w"])
        return jax.vjp(lambda t: apply(sj.combine(t, frozen), x), trainable)[1]

    for run in (kept, jax.jit(kept)):
        shapes = [leaf.shape for leaf in jax.tree.leaves(run(trainable, frozen, jnp.ones((11, 96))))]
        assert (11, 3) in shapes
        assert not any(11 in shape and 96 in shape for shape in shapes), shapes


@pytest.mark.optimized
def test_compiled_step_has_no_gradient_of_the_weights_size():
    adapted = adapt({"w": matrix((96, 40))}, {"w": sj.s2ft(0.05)})
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(lambda p, x: x @ p["w"])
    step = jax.jit(lambda t, f, x: jax.grad(lambda t: jnp.sum(apply(sj.combine(t, f), x) ** 2))(t))
    compiled = step.lower(trainable, frozen, jnp.ones((11, 96))).compile()
    assert compiled.out_info["w"].rows.shape == (4, 40)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 96 * 40
    assert not re.search(r"f32\[(96,40|40,96)\]\S* (dot|custom-call|fusion)\(", compiled.as_text())


def mlp_params(seed=0, width=10, channels=24, layers=2):
    return {
        f"block_{i}": {
            "up": matrix((width, channels), seed + 2 * i) / 4,
            "bias": matrix((channels,), seed + 20 + i) / 4,
            "down": matrix((channels, width), seed + 2 * i + 1) / 4,
        }
        for i in range(layers)
    }


def mlp(params, x):
    for block in params.values():
        x = x + jnp.tanh(x @ block["up"] + block["bias"]) @ block["down"]
    return x


def losses(adapted, steps=50):
    """A curve of training with Adam."""
    x, y = matrix((32, 10), 50), matrix((32, 10), 51)
    apply, optimizer = sj.with_adapters(mlp), optax.adam(1e-2, b2=0.95)
    trainable, frozen = sj.partition(adapted)

    @jax.jit
    def run(trainable, frozen):
        def step(carry, _):
            trainable, state = carry
            objective = lambda t: jnp.mean((apply(sj.combine(t, frozen), x) - y) ** 2)
            value, gradients = jax.value_and_grad(objective)(trainable)
            updates, state = optimizer.update(gradients, state, trainable)
            return (optax.apply_updates(trainable, updates), state), value

        return jax.lax.scan(step, (trainable, optimizer.init(trainable)), None, length=steps)[1]

    return np.asarray(run(trainable, frozen))


def test_layouts_and_parameterizations_train_alike():
    params = mlp_params()
    shapes = {f"block_{i}/{name}": (24,) for i in range(2) for name in ("up", "down")}
    masks = sj.methods.s2ft.select_units(shapes, 0.25)
    permuted, placed = params, {}
    for i in range(2):
        up, down = f"block_{i}/up", f"block_{i}/down"
        order = sj.methods.s2ft.coupled_order(masks[up], masks[down])
        coupling = sj.methods.s2ft.Coupling(axes={up: 1, f"block_{i}/bias": 0, down: 0}, units=24)
        permuted = sj.methods.s2ft.co_permute(permuted, coupling, order)
        placed |= {path: sj.methods.s2ft.reordered(masks[path], order) for path in (up, down)}

    def rules(selected, parameterization):
        options = {"selected": selected, "parameterization": parameterization}
        return {"**/up": sj.s2ft(side="out", **options), "**/down": sj.s2ft(**options)}

    curves = []
    for start, selected in ((params, masks), (permuted, placed)):
        for parameterization in BOTH:
            adapted = adapt(start, rules(selected, parameterization))
            if start is permuted:
                assert all(block["down"].selected is None for block in adapted.values())
            curves.append(losses(adapted))
    assert curves[0][-1] < 0.8 * curves[0][0]
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-4, atol=1e-5)


def test_rows_converge_to_least_squares_of_what_is_left():
    w, x, y = matrix((9, 4)), matrix((40, 9), 1), matrix((40, 4), 2)
    mask = np.isin(np.arange(9), [1, 4, 8])
    adapted = adapt({"w": w}, {"w": sj.s2ft(selected={"w": mask})})
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(lambda p: jnp.mean((x @ p["w"] - y) ** 2))
    gradient = jax.jit(jax.grad(lambda t: apply(sj.combine(t, frozen))))
    for _ in range(400):
        trainable = jax.tree.map(lambda v, g: v - 1.0 * g, trainable, gradient(trainable))
    expected = np.linalg.lstsq(x[:, mask], y - x @ w, rcond=None)[0]
    np.testing.assert_allclose(trainable["w"].rows, expected, rtol=1e-3, atol=1e-4)


def test_one_draw_is_shared_by_all_layers_and_a_layer_may_get_nothing():
    params = {f"down_{i}": matrix((10, 3), i) for i in range(8)}
    adapted = adapt(params, {"down_*": sj.s2ft(0.05)})
    counts = [weight.slots for weight in adapted.values()]
    assert sum(counts) == int(10 * 8 * 0.05)
    assert 0 in counts
    x = jnp.ones((2, 10))
    y = sj.with_adapters(lambda p, x: sum(x @ w for w in p.values()))(adapted, x)
    np.testing.assert_allclose(y, sum(x @ w for w in params.values()), rtol=1e-5, atol=1e-5)
    trainable, _ = sj.partition(adapted)
    updates, _ = optax.adam(1e-3).update(trainable, optax.adam(1e-3).init(trainable))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, trainable)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("parameterization", BOTH)
def test_stacked_layers_are_padded_and_padding_learns_nothing(side, parameterization):
    w = matrix((4, 6, 6))
    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    adapted = adapt({"w": w}, {"w": sj.s2ft(0.25, side=side, parameterization=parameterization)}, roles=roles)
    positions = np.asarray(adapted["w"].positions())
    real = positions < 6
    assert real.sum() == int(4 * 6 * 0.25)
    assert sj.summary(adapted).trainable == 6 * real.sum() < adapted["w"].slots * 4 * 6
    assert not real.all()
    assert real.all(-1).any()
    x = jnp.ones((2, 6))
    model = lambda p, x: jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, p["w"])[0]
    trainable, frozen = sj.partition(moved(adapted))
    loss = lambda t: jnp.sum(sj.with_adapters(model)(sj.combine(t, frozen), x))
    gradient = np.asarray(getattr(jax.jit(jax.grad(loss))(trainable)["w"], FIELDS[side]))
    gradient = gradient if side == "in" else gradient.swapaxes(-1, -2)
    assert not gradient[~real].any()
    assert gradient[real].any(-1).all()
    merged = np.asarray(sj.merge(moved(adapted))["w"]) != w
    np.testing.assert_array_equal(merged.any(2 if side == "in" else 1).sum(-1), real.sum(-1))


def test_heads_are_selected_whole():
    adapted = adapt({"o": matrix((24, 5))}, {"o": sj.s2ft(0.5, heads=6)})
    heads = np.asarray(adapted["o"].positions()).reshape(3, 4)
    assert (heads[:, 0] % 4 == 0).all()
    np.testing.assert_array_equal(heads, heads[:, :1] + np.arange(4))
    assert adapted["o"].rows.shape == (12, 5)


def test_convolutions_train_output_channels_and_refuse_input_channels():
    kernel, image = matrix((3, 3, 2, 6)), matrix((2, 5, 5, 2), 1)
    roles = {"w": sj.Role.conv()}
    adapted = moved(adapt({"w": kernel}, {"w": sj.s2ft(0.5, side="out")}, roles=roles))
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    merged = sj.merge(adapted)
    np.testing.assert_allclose(sj.with_adapters(conv)(adapted, image), conv(merged, image), rtol=1e-4, atol=1e-4)
    assert (np.asarray(merged["w"]) != kernel).any((0, 1, 2)).sum() == 3
    with pytest.raises(RoleError, match=r'w: s2ft: inputs of a convolution.*side="out"'):
        adapt({"w": kernel}, {"w": sj.s2ft(0.5)}, roles=roles)


def test_scores_are_norms_and_mean_magnitudes():
    w = matrix((12, 7))
    np.testing.assert_allclose(sj.methods.s2ft.channel_scores(w), np.linalg.norm(w, axis=1), rtol=1e-5)
    np.testing.assert_allclose(sj.methods.s2ft.channel_scores(w, side="out"), np.linalg.norm(w, axis=0), rtol=1e-5)
    heads = np.linalg.norm(w.reshape(3, 4 * 7), axis=1)
    np.testing.assert_allclose(sj.methods.s2ft.channel_scores(w, heads=3), heads, rtol=1e-5)
    stacked = sj.methods.s2ft.channel_scores(np.stack([w, 2 * w]), sj.Role.dense((1,), (2,), (0,)))
    np.testing.assert_allclose(stacked[1], 2 * np.linalg.norm(w, axis=1), rtol=1e-5)
    x = matrix((2, 5, 12), 1)
    np.testing.assert_allclose(sj.methods.s2ft.activation_scores(x), np.abs(x).mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(
        sj.methods.s2ft.activation_scores(x, heads=3), np.abs(x).mean((0, 1)).reshape(3, 4).mean(1), rtol=1e-5
    )


@pytest.mark.parametrize("strategy", ["weight", "activation", "product", "gradient"])
@pytest.mark.parametrize("prefer", ["large", "small"])
def test_strategies_take_the_channels_of_largest_or_smallest_score(strategy, prefer):
    w, x = matrix((20, 7)), np.abs(matrix((30, 20), 1)) * np.linspace(0.1, 3, 20, dtype=np.float32)
    gradient = x.T @ matrix((30, 7), 2)
    scores = {
        "weight": sj.methods.s2ft.channel_scores(w),
        "activation": sj.methods.s2ft.activation_scores(x),
        "product": sj.methods.s2ft.channel_scores(w) * sj.methods.s2ft.activation_scores(x),
        "gradient": sj.methods.s2ft.channel_scores(gradient),
    }[strategy]
    expected = {
        "weight": np.sqrt((w**2).sum(1)),
        "activation": np.abs(x).mean(0),
        "product": np.sqrt((w**2).sum(1)) * np.abs(x).mean(0),
        "gradient": np.sqrt((gradient**2).sum(1)),
    }[strategy]
    adapted = adapt({"w": w}, {"w": sj.s2ft(0.2, scores={"w": scores}, prefer=prefer)})
    taken = np.argsort(-expected if prefer == "large" else expected)[:4]
    assert set(np.asarray(adapted["w"].positions()).tolist()) == set(taken.tolist())


def test_quantized_base_is_used_as_it_is():
    import dataclasses

    from subspace_jax.weights import quantize_nf4

    w, x = matrix((64, 16)), matrix((3, 64), 1)
    adapted = moved(adapt({"w": w}, {"w": sj.s2ft(0.1)}))
    quantized = {"w": dataclasses.replace(adapted["w"], base=quantize_nf4(jnp.asarray(w), sj.Role.dense()))}
    merged = sj.merge(quantized)["w"]
    untouched = np.setdiff1d(np.arange(64), adapted["w"].positions())
    np.testing.assert_array_equal(merged[untouched], quantized["w"].base.materialize()[untouched])
    y = sj.with_adapters(lambda p, x: x @ p["w"])(quantized, x)
    np.testing.assert_allclose(y, x @ merged, rtol=1e-4, atol=1e-4)


def channel_scores(side):
    return sj.methods.s2ft.channel_scores(matrix((12, 7)), side=side)


def test_bad_options_are_refused_by_name():
    w = {"w": matrix((12, 7))}
    with pytest.raises(ValueError, match="pass a ratio"):
        sj.s2ft()
    with pytest.raises(ValueError, match="side='row'"):
        sj.s2ft(0.1, side="row")
    for owner, call in (("s2ft", lambda side: sj.s2ft(0.1, side=side)), ("channel_scores", channel_scores)):
        for old, new in (("rows", "in"), ("columns", "out")):
            with pytest.raises(ValueError, match=f"{owner}: side='{old}' is called side='{new}' now"):
                call(old)
    with pytest.raises(ValueError, match="prefer='big'"):
        sj.s2ft(0.1, prefer="big")
    with pytest.raises(RoleError, match="w: s2ft: heads=5 does not divide the 12 features of side='in'"):
        adapt(w, {"w": sj.s2ft(0.1, heads=5)})
    with pytest.raises(PatternError, match="w: s2ft: nothing is selected"):
        adapt(w, {"w": sj.s2ft(selected={"v": np.ones(12, bool)})})
    with pytest.raises(RoleError, match=r"w: s2ft: selected is bool \(3,\)"):
        adapt(w, {"w": sj.s2ft(selected={"w": np.ones(3, bool)})})
