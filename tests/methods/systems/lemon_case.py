"""A small network with a batch for it, and its forward pass in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.methods import lemon

SMALL = lemon.LemonConfig(points=6, width=16, ffn=24, heads=2, layers=(1, 1, 1, 2))
MODEL = lemon.Lemon(SMALL)


def batch(count=3, length=7, seed=0):
    rng = np.random.default_rng(seed)
    arrays = (
        rng.normal(size=(count, 4, 6)) + 2,
        np.arange(4) / 4,
        rng.normal(size=(count, 3, 6)) + 2,
        np.array([1.0, 1.3, 1.9]),
        rng.integers(1, 1053, (count, length)),
        np.ones((count, length), bool),
    )
    dtypes = (np.float32, np.float32, np.float32, np.float32, np.int32, bool)
    return lemon.Batch(*(jnp.asarray(a.astype(d)) for a, d in zip(arrays, dtypes, strict=True)))


def forward64(p, b):
    """The whole network in float64, written anew."""
    from scipy.special import erf

    dense = lambda q, x: x @ q["kernel"] + q["bias"]
    gelu = lambda x: x * (1 + erf(x / np.sqrt(2))) / 2
    mlp = lambda q, x: dense(q["dense_1"], gelu(dense(q["dense_0"], x)))

    def norm(q, x):
        centered = x - x.mean(-1, keepdims=True)
        return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * q["scale"] + q["bias"]

    def layer(q, x, mask, memory=None):
        a, read = q["attention"], norm(q["norm_0"], x)
        source = read if memory is None else memory
        query, key, value = dense(a["query"], read), dense(a["key"], source), dense(a["value"], source)
        mixed = np.zeros_like(x)
        for h in (slice(0, 8), slice(8, 16)):
            scores = query[..., h] @ key[..., h].swapaxes(1, 2) / np.sqrt(8)
            shares = np.exp(np.where(mask[:, None], scores, -np.inf))
            mixed[..., h] = shares / shares.sum(-1, keepdims=True) @ value[..., h]
        x = x + dense(a["output"], mixed)
        return x + dense(q["ffn_out"], gelu(dense(q["ffn_in"], norm(q["norm_1"], x))))

    def stack(q, x, mask, memory=None):
        for i in range(len(q) - 1):
            x = layer(q[f"layer_{i}"], x, mask, memory)
        return norm(q["norm"], x)

    p = jax.tree.map(lambda v: np.asarray(v, np.float64), p)
    flat = np.asarray(b.inputs, np.float64).reshape(len(b.inputs), -1)
    mean, deviation = flat.mean(1)[:, None, None], flat.std(1, ddof=1)[:, None, None] + 1e-6
    frames = (np.asarray(b.inputs, np.float64) - mean) / deviation
    data = mlp(p["frames_mlp"], frames) + mlp(p["time_mlp"], np.asarray(b.input_times, np.float64)[:, None])
    data = stack(p["data_encoder"], data, np.ones(data.shape[:2], bool))
    rates = 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    angles = np.arange(b.tokens.shape[1])[:, None] * rates
    words = p["words"]["embedding"][np.asarray(b.tokens)] + np.concatenate([np.sin(angles), np.cos(angles)], -1)
    symbols = stack(p["symbol_encoder"], words, np.asarray(b.mask))
    valid = np.concatenate([np.ones(data.shape[:2], bool), np.asarray(b.mask)], 1)
    memory = stack(p["fusion"], np.concatenate([data + p["types"][0], symbols + p["types"][1]], 1), valid)
    asked = mlp(p["query_mlp"], np.asarray(b.target_times, np.float64)[:, None]) + p["patch"][0]
    asked = np.broadcast_to(asked, (len(frames), *asked.shape))
    return mlp(p["output_mlp"], stack(p["decoder"], asked, valid, memory)) * deviation + mean
