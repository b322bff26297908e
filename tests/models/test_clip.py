"""CLIP by itself: both layouts of its layers, where a text is read, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.models import Clip, ClipTower, small_clip, stack_layers

TEXTS = jnp.array([[5, 7, 100, 3], [6, 100, 8, 100]])
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12, 12, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    found = Clip(small_clip()).init(jax.random.key(0), TEXTS, IMAGES)["params"]
    return jax.tree.map(lambda v: v + 0.1 * jax.random.normal(jax.random.key(v.size), v.shape), found)


def test_stacked_and_rematerialized_layers_compute_the_same(params):
    expected = Clip(small_clip()).apply({"params": params}, TEXTS, IMAGES)
    assert expected.shape == (3, 2)
    stacked = Clip(small_clip(scan_layers=True, remat=True)).apply({"params": stack_layers(params)}, TEXTS, IMAGES)
    np.testing.assert_allclose(stacked, expected, rtol=1e-4, atol=1e-5)


def test_a_text_is_read_at_its_first_end_and_sees_nothing_behind(params):
    def run(tokens, **options):
        return Clip(small_clip(**options)).apply({"params": params}, tokens, method="encode_text")

    np.testing.assert_allclose(run(TEXTS)[0], run(TEXTS[:, :3])[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(TEXTS)[1], run(TEXTS[:, :2])[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(TEXTS, end_token=None), run(TEXTS), rtol=1e-5)  # 100 is the highest id, too
    assert float(jnp.abs(run(TEXTS, end_token=8)[1] - run(TEXTS)[1]).max()) > 1e-3


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
