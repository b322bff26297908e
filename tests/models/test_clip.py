"""CLIP by itself: both layouts of its layers, where a text is read, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.models import Clip, ClipTower, small_clip, stack_layers
from tests.models.model_helpers import random_params, run

TEXTS = jnp.array([[5, 7, 100, 3], [6, 100, 8, 100]])
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12, 12, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    return random_params(Clip(small_clip()), TEXTS, IMAGES)


def test_stacked_and_rematerialized_layers_compute_the_same(params):
    expected = run(Clip(small_clip()), params, TEXTS, IMAGES)
    assert expected.shape == (3, 2)
    stacked = run(Clip(small_clip(scan_layers=True, remat=True)), stack_layers(params), TEXTS, IMAGES)
    np.testing.assert_allclose(stacked, expected, rtol=1e-4, atol=1e-5)


def test_a_text_is_read_at_its_first_end_and_sees_nothing_behind(params):
    def read(tokens, **options):
        return Clip(small_clip(**options)).apply({"params": params}, tokens, method="encode_text")

    whole = np.asarray(read(TEXTS))
    np.testing.assert_allclose(whole[0], read(TEXTS[:, :3])[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole[1], read(TEXTS[:, :2])[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(read(TEXTS, end_token=None), whole, rtol=1e-5)  # 100 is the highest id, too
    assert np.abs(read(TEXTS, end_token=8)[1] - whole[1]).max() > 1e-3


def test_what_does_not_fit_is_refused(params):
    model = Clip(small_clip())
    with pytest.raises(ValueError, match=r"\(batch, 12, 12, 3\)"):
        model.apply({"params": params}, jnp.zeros((1, 16, 16, 3)), method="encode_images")
    with pytest.raises(ValueError, match="at most 16"):
        model.apply({"params": params}, jnp.zeros((1, 17), jnp.int32), method="encode_text")
    with pytest.raises(ValueError, match="activation"):
        ClipTower(activation="relu")
    with pytest.raises(ValueError, match="multiple"):
        ClipTower(width=30, num_heads=4)
