import numpy as np
import pytest

from subspace_jax.models import greedy_decode
from subspace_jax.models._decode import _decode
from tests.models.model_helpers import random_params, run, tiny


def naive(model, params, prompt, count):
    """Whole sequence anew for every token; no cache."""
    tokens = list(map(int, prompt))
    for _ in range(count):
        # One length for all calls; what stands behind the last token cannot be seen from it.
        padded = np.array([tokens + [0] * (16 - len(tokens))])
        tokens.append(int(run(model, params, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def setup():
    model, tokens = tiny("llama")
    params = random_params(model, tokens, scale=0.6)
    return model, params, np.asarray(tokens)


def test_decoding_with_the_cache_equals_decoding_without(setup):
    model, params, tokens = setup
    found = greedy_decode(model, params, tokens, 6)
    expected = [naive(model, params, row, 6) for row in tokens]
    assert found.tolist() == expected
    assert len(set(expected[0])) > 2


def test_left_padding_changes_nothing(setup):
    model, params, tokens = setup
    padded = np.concatenate([np.zeros((2, 3), int), tokens], axis=1)
    padded[1, :5] = 0
    mask = np.arange(10)[None] >= np.array([[3], [5]])
    found = greedy_decode(model, params, padded, 5, mask=mask)
    assert found.tolist() == [naive(model, params, tokens[0], 5), naive(model, params, tokens[1][2:], 5)]


def test_a_stopped_sequence_repeats_its_stop_token(setup):
    model, params, tokens = setup
    free = greedy_decode(model, params, tokens, 8).tolist()
    stop = next(token for token in free[0][1:] if free[0].index(token) > 0)
    found = greedy_decode(model, params, tokens, 8, stop_token=stop).tolist()
    for full, cut in zip(free, found, strict=True):
        end = full.index(stop) + 1 if stop in full else 8
        assert cut == full[:end] + [stop] * (8 - end)


def test_a_second_call_compiles_nothing_anew(setup):
    model, params, tokens = setup
    traces = []

    def counted(*args):
        traces.append(1)
        return model.apply(*args)

    for prompt in (tokens, tokens + 1):
        greedy_decode(model, params, prompt % 101, 3, apply=counted)
    once = len(traces)
    greedy_decode(model, params, tokens, 3, apply=counted)
    assert once == len(traces) == 2  # the prompt, and the body of the loop
    before = _decode._cache_size()
    for _ in range(2):
        greedy_decode(model, params, tokens, 6)
    assert _decode._cache_size() <= before + 1


def test_another_apply_is_used(setup):
    model, params, tokens = setup
    halved = lambda variables, *args: model.apply({"params": variables["params"]["inner"]}, *args)
    found = greedy_decode(model, {"inner": params}, tokens, 3, apply=halved)
    assert found.tolist() == greedy_decode(model, params, tokens, 3).tolist()


@pytest.mark.parametrize(
    ("tokens", "count", "mask", "message"),
    [
        ([[1, 2], [3, 101]], 2, None, "tokenizer"),
        ([[1, -1]], 2, None, "tokenizer"),
        ([[]], 2, None, "batch, length"),
        ([[1.5]], 2, None, "integers"),
        ([[1, 2]], 63, None, "max_positions=64"),
        ([[1, 2]], 0, None, "at least one"),
        ([[1, 2]], 2, [[1, 0]], "on the left"),
        ([[1, 2]], 2, [[1]], "same shape"),
    ],
)
def test_bad_prompts_are_refused(setup, tokens, count, mask, message):
    model, params, _ = setup
    with pytest.raises(ValueError, match=message):
        greedy_decode(model, params, tokens, count, mask=mask)
