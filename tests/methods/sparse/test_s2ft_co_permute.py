"""Heads and channels in another order: the network function stays, for every kind of layer."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.core import PatternError, RoleError
from subspace_jax.methods.sparse.s2ft import Coupling, co_permute, coupled_order, inverse_order, reordered

MODEL, HEAD, CHANNELS = 12, 4, 20


def attention(params, x, heads, groups):
    """Causal attention with biases and rotary embeddings, `[tokens, model]`, in numpy."""

    def split(name, count):
        return (x @ params[name]["kernel"] + params[name]["bias"]).reshape(len(x), count, HEAD)

    def rotate(v):
        angle = np.arange(len(x))[:, None, None] / 10.0 ** np.arange(HEAD // 2)
        first, second = np.split(v, 2, axis=-1)
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)], -1
        )

    q, k, v = rotate(split("q", heads)), rotate(split("k", groups)), split("v", groups)
    k, v = (np.repeat(a, heads // groups, axis=1) for a in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD)
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)
    return mixed @ params["o"]["kernel"] + params["o"]["bias"]


def attention_params(heads, groups, dtype):
    rng = np.random.default_rng(0)
    sizes = {"q": (MODEL, heads * HEAD), "k": (MODEL, groups * HEAD), "v": (MODEL, groups * HEAD)}
    sizes["o"] = (heads * HEAD, MODEL)
    return {
        name: {"kernel": rng.normal(size=s).astype(dtype), "bias": rng.normal(size=s[1]).astype(dtype)}
        for name, s in sizes.items()
    }


def attention_coupling(heads, groups):
    axes = {"q/kernel": 1, "q/bias": 0, "o/kernel": 0}
    return Coupling(
        axes=axes, grouped={"k/kernel": 1, "k/bias": 0, "v/kernel": 1, "v/bias": 0}, units=heads, groups=groups
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize(("heads", "groups"), [(6, 6), (6, 3), (6, 2), (6, 1)])
def test_attention_is_unchanged(heads, groups, dtype, tolerance):
    params = attention_params(heads, groups, dtype)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, MODEL)).astype(dtype)
    order = coupled_order(rng.random(groups) < 0.5, rng.random(heads) < 0.4, units=heads, groups=groups)
    assert heads == 1 or not np.array_equal(order, np.arange(heads))
    moved = co_permute(params, attention_coupling(heads, groups), order)
    expected = attention(params, x, heads, groups)
    np.testing.assert_allclose(attention(moved, x, heads, groups), expected, atol=tolerance * np.abs(expected).max())
    assert not np.array_equal(moved["o"]["kernel"], params["o"]["kernel"])


@pytest.mark.parametrize("left_out", ["q/kernel", "q/bias", "k/kernel", "k/bias", "v/kernel", "v/bias", "o/kernel"])
def test_every_member_of_an_attention_matters(left_out):
    params, full = attention_params(4, 4, np.float64), attention_coupling(4, 4)
    partial = Coupling(
        axes={p: a for p, a in full.axes.items() if p != left_out},
        grouped={p: a for p, a in full.grouped.items() if p != left_out},
        units=4,
        groups=4,
    )
    x = np.random.default_rng(1).normal(size=(5, MODEL))
    moved = co_permute(params, partial, np.array([2, 0, 3, 1]))
    difference = np.abs(attention(moved, x, 4, 4) - attention(params, x, 4, 4)).max()
    # Keys' bias alone cancels in the softmax without rotary embeddings; with them it does not.
    assert difference > 1e-6


@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_is_unchanged(gated):
    rng = np.random.default_rng(0)
    shapes = {"up": (MODEL, CHANNELS), "up_bias": (CHANNELS,), "down": (CHANNELS, MODEL), "gate": (MODEL, CHANNELS)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def mlp(p, x):
        hidden = np.tanh(x @ p["up"] + p["up_bias"])
        return (hidden * (x @ p["gate"]) if gated else hidden) @ p["down"]

    axes = {"up": 1, "up_bias": 0, "down": 0} | ({"gate": 1} if gated else {})
    order = coupled_order(rng.random(CHANNELS) < 0.3, rng.random(CHANNELS) < 0.3)
    moved = co_permute(params, Coupling(axes=axes, units=CHANNELS), order)
    x = rng.normal(size=(5, MODEL))
    np.testing.assert_allclose(mlp(moved, x), mlp(params, x), atol=1e-11)
    assert (moved["gate"] is params["gate"]) is (not gated)


def test_inverse_restores_every_array_bit_for_bit():
    params, coupling = attention_params(6, 3, np.float32), attention_coupling(6, 3)
    params = {name: {k: jnp.asarray(v) for k, v in part.items()} for name, part in params.items()}
    order = coupled_order(np.array([False, True, True]), np.array([0, 1, 0, 0, 1, 1], bool), groups=3)
    back = co_permute(co_permute(params, coupling, order), coupling, inverse_order(order))
    for name, part in params.items():
        for key, value in part.items():
            np.testing.assert_array_equal(back[name][key], value)


def test_stacked_layers_have_orders_of_their_own():
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(3, 5, 8)), "bias": rng.normal(size=(3, 8)), "down": rng.normal(size=(3, 8, 5))}
    orders = np.stack([rng.permutation(4) for _ in range(3)])
    moved = co_permute(params, Coupling(axes={"up": 2, "bias": -1, "down": 1}, units=4, stack=1), orders)
    for layer in range(3):
        entries = (orders[layer][:, None] * 2 + np.arange(2)).ravel()
        np.testing.assert_array_equal(moved["up"][layer], params["up"][layer][:, entries])
        np.testing.assert_array_equal(moved["bias"][layer], params["bias"][layer][entries])
        np.testing.assert_array_equal(moved["down"][layer], params["down"][layer][entries])


def test_order_makes_both_selections_contiguous_where_the_spec_puts_them():
    for bits in itertools.product([False, True], repeat=8):
        first, second = np.array(bits[:4]), np.array(bits[4:])
        order = coupled_order(first, second)
        only_first, both, only_second = (first & ~second).sum(), (first & second).sum(), (~first & second).sum()
        np.testing.assert_array_equal(reordered(first, order), np.arange(4) < only_first + both)
        expected = (np.arange(4) >= only_first) & (np.arange(4) < only_first + both + only_second)
        np.testing.assert_array_equal(reordered(second, order), expected)


def test_grouped_heads_stay_with_their_group():
    second = np.array([0, 0, 0, 1, 1, 0], bool)
    order = coupled_order(np.array([False, False, True]), second, groups=3)
    assert order.tolist() == [4, 5, 3, 2, 0, 1]
    np.testing.assert_array_equal(reordered(np.array([False, False, True]), order), [True, False, False])
    np.testing.assert_array_equal(reordered(second, order), [True, False, True, False, False, False])
    with pytest.raises(RoleError, match="out of their groups"):
        co_permute(attention_params(6, 3, np.float32), attention_coupling(6, 3), np.array([0, 2, 1, 3, 4, 5]))


def test_wrong_couplings_are_refused_by_name():
    params = {"up": np.ones((3, 4)), "down": np.ones((4, 3))}
    with pytest.raises(PatternError, match="dwn: is in the coupling"):
        co_permute(params, Coupling(axes={"dwn": 0}, units=4), np.arange(4))
    with pytest.raises(RoleError, match=r"up: axis 0 of shape \(3, 4\)"):
        co_permute(params, Coupling(axes={"up": 0}, units=4), np.arange(4))
    with pytest.raises(RoleError, match="permutation of 4 units"):
        co_permute(params, Coupling(axes={"up": 1}, units=4), np.array([0, 1, 1, 3]))
    with pytest.raises(RoleError, match="6 heads do not fall into 4 groups"):
        Coupling(axes={}, units=6, groups=4)
    with pytest.raises(RoleError, match="expected 2 of the first"):
        coupled_order(np.ones(4, bool), np.ones(4, bool), groups=2)
