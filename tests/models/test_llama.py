import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.models import LlamaConfig, init_cache
from tests.models.model_helpers import random_params, run, tiny


def numpy_llama(params, tokens, config):
    """The model written out for one sequence with complex rotations and repeated heads, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    table = params["embedding"]["embedding"]
    length, half, repeats = len(tokens), config.head_dim // 2, config.num_heads // config.num_kv_heads

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon) * scale

    angles = np.outer(np.arange(length), config.rope_base ** (-np.arange(half) / half))[:, None]

    def rotate(x):
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], -1)

    x = table[tokens]
    for i in range(config.num_layers):
        layer = params["decoder"][f"layer_{i}"]
        attention, mlp = layer["attention"], layer["mlp"]
        h = norm(x, layer["attention_norm"]["scale"])
        query, key, value = (
            np.einsum("td,dhk->thk", h, attention[name]["kernel"]) for name in ("query", "key", "value")
        )
        query, key = rotate(query), rotate(key)
        key, value = np.repeat(key, repeats, axis=1), np.repeat(value, repeats, axis=1)
        scores = np.einsum("thk,shk->hts", query, key) / np.sqrt(config.head_dim)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shk->thk", weights, value)
        x = x + np.einsum("thk,hkd->td", mixed, attention["output"]["kernel"])
        h = norm(x, layer["mlp_norm"]["scale"])
        gate = h @ mlp["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
    x = norm(x, params["norm"]["scale"])
    return x @ (params["head"]["kernel"] if "head" in params else table.T)


@pytest.mark.parametrize("fields", [{}, {"num_kv_heads": 1}, {"num_kv_heads": 4}, {"tie_embeddings": False}])
def test_logits_equal_numpy_with_repeated_heads(fields):
    model, tokens = tiny("llama", **fields)
    params = random_params(model, tokens)
    found = run(model, params, tokens)
    for row, sequence in zip(found, np.asarray(tokens), strict=True):
        expected = numpy_llama(params, sequence, model.config)
        np.testing.assert_allclose(row, expected, atol=1e-4 * np.abs(expected).max())


def test_the_future_does_not_influence_the_past():
    model, tokens = tiny("llama", scan_layers=True)
    params = random_params(model, tokens)
    changed = tokens.at[:, 4:].set((tokens[:, 4:] + 17) % 101)
    first, second = (run(model, params, t) for t in (tokens, changed))
    np.testing.assert_allclose(first[:, :4], second[:, :4], atol=1e-5)
    assert np.abs(first[:, 4:] - second[:, 4:]).max() > 1e-2


def test_padding_takes_no_position_and_is_not_attended_to():
    model, tokens = tiny("llama")
    params = random_params(model, tokens)
    padded = jnp.concatenate([jnp.full((2, 3), 50), tokens], axis=1)
    mask = jnp.arange(10)[None] >= jnp.array([[3], [3]])
    expected = run(model, params, tokens)
    found = run(model, params, padded, mask)
    np.testing.assert_allclose(found[:, 3:], expected, atol=1e-4)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("scan", [False, True])
def test_feeding_in_pieces_through_the_cache_equals_feeding_at_once(scan):
    model, tokens = tiny("llama", scan_layers=scan)
    params = random_params(model, tokens)
    mask = jnp.arange(7)[None] >= jnp.array([[2], [0]])
    expected = run(model, params, tokens, mask)
    cache, pieces = init_cache(model.config, 2, 9), []
    for piece in (slice(0, 4), slice(4, 5), slice(5, 7)):
        logits, cache = run(model, params, tokens[:, piece], mask[:, piece], cache)
        pieces.append(logits)
    found = np.concatenate(pieces, axis=1)
    real = np.asarray(mask)
    np.testing.assert_allclose(found[real], expected[real], atol=2e-4)
    assert int(cache.length) == 7
    assert np.asarray(cache.valid.sum(1)).tolist() == [5, 7]


def test_more_tokens_than_the_cache_holds_are_refused():
    model, tokens = tiny("llama")
    params = random_params(model, tokens)
    with pytest.raises(ValueError, match="capacity=4"):
        run(model, params, tokens, None, init_cache(model.config, 2, 4))


@pytest.mark.parametrize("fields", [{"num_kv_heads": 2}, {"width": 9 * 63}, {"width": 100}, {"max_positions": 0}])
def test_impossible_configurations_are_refused(fields):
    with pytest.raises(ValueError, match="LlamaConfig"):
        LlamaConfig(**fields)


@pytest.mark.parametrize("fields", [{}, {"scan_layers": True}])
def test_packed_segments_equal_each_sequence_alone(fields):
    model, _ = tiny("llama", **fields)
    sequences = [[5, 7, 9, 11], [3], [8, 2, 6]]
    row = jnp.array([[*sequences[0], *sequences[1], *sequences[2], 0, 0]])
    segments = jnp.array([[1, 1, 1, 1, 2, 3, 3, 3, 0, 0]])
    params = random_params(model, row)
    found = jax.jit(model.apply)({"params": params}, row, row > 0, segments=segments)
    start = 0
    for sequence in sequences:
        alone = run(model, params, np.array([sequence + [0] * (4 - len(sequence))]))[:, : len(sequence)]
        np.testing.assert_allclose(found[0, start : start + len(sequence)], alone[0], atol=1e-5)
        start += len(sequence)


def test_hidden_states_times_the_table_are_the_logits():
    model, tokens = tiny("llama")
    params = random_params(model, tokens)
    hidden = jax.jit(lambda p: model.apply({"params": p}, tokens, return_hidden=True))(params)
    table = np.asarray(params["embedding"]["embedding"])
    np.testing.assert_allclose(np.asarray(hidden) @ table.T, run(model, params, tokens), atol=1e-5)
    with pytest.raises(ValueError, match="leave cache= out"):
        model.apply({"params": params}, tokens, None, init_cache(model.config, *tokens.shape), segments=tokens)
