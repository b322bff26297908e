"""Maps, image scores, layers and turned copies against SciPy and NumPy; and the small texture experiment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import subspace_jax as sj
from subspace_jax.methods import subspace_ad as ad


@pytest.mark.parametrize("size", [(20, 21), (5, 7)])  # at the same size borders are not constant before the blur
def test_maps_are_resized_by_pixel_centers_and_blurred_with_a_mirrored_border(size):
    scores = np.random.default_rng(0).random((2, 5, 7)).astype(np.float32)
    height, width = size
    maps = ad.anomaly_maps(scores, (height, width))
    rows, columns = (np.clip((np.arange(n) + 0.5) * m / n - 0.5, 0, m - 1) for n, m in ((height, 5), (width, 7)))
    grid = np.meshgrid(rows, columns, indexing="ij")
    for found, image in zip(maps, scores.astype(np.float64), strict=True):
        resized = ndimage.map_coordinates(image, grid, order=1)
        expected = ndimage.gaussian_filter(resized, 4.0, mode="mirror", radius=1)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(ad.anomaly_maps(np.full((3, 4, 4), 2.5), (9, 8)), 2.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("top", lambda v: v[-2:].mean()),
        ("max", lambda v: v[-1]),
        ("mean", np.mean),
        ("p99", lambda v: np.percentile(v, 99)),
        ("top5", lambda v: v[-5:].mean()),
    ],
)
def test_image_scores(how, expected):
    maps = np.random.default_rng(1).random((3, 20, 14))  # 280 pixels: the floor of 2.8 is 2
    found = ad.image_scores(maps.astype(np.float32), how)
    np.testing.assert_allclose(found, [expected(np.sort(m.ravel())) for m in maps], rtol=1e-5)
    np.testing.assert_allclose(ad.image_scores(np.full((2, 3, 3), 1.5), how), 1.5)


def test_layers_are_averaged_raw():
    states = np.random.default_rng(2).normal(size=(3, 2, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(ad.mix_layers(jnp.asarray(states)), states.mean(0), rtol=1e-5, atol=1e-6)
    expected = np.concatenate(list(states), -1)
    np.testing.assert_allclose(ad.mix_layers(jnp.asarray(states), "concat"), expected)
    expected = np.concatenate([states[:2].mean(0), states[2]], -1)
    np.testing.assert_allclose(ad.mix_layers(jnp.asarray(states), "grouped", 2), expected, rtol=1e-5, atol=1e-6)
    assert ad.middle_layers(40) == tuple(41 - k for k in range(18, 11, -1))  # -18 to -12 of 41
    assert ad.middle_layers(1) == (1,)


def test_turned_images_are_scipys():
    image = np.random.default_rng(3).random((9, 12, 3)).astype(np.float32)
    angles = np.array([0.0, 30.0, 180.0, 345.0], np.float32)
    expected = [
        ndimage.rotate(image, a, axes=(0, 1), reshape=False, order=1, mode="grid-constant", cval=0.0) for a in angles
    ]
    np.testing.assert_allclose(ad.rotate(image, angles), expected, atol=1e-5)
    drawn = ad.rotation_angles(jax.random.key(0), 500)
    np.testing.assert_array_equal(drawn, ad.rotation_angles(jax.random.key(0), 500))
    assert 0 <= drawn.min() < 10
    assert 335 < drawn.max() < 345


def test_background_scores_nothing():
    rng = np.random.default_rng(4)
    scores, attention = rng.random((2, 20)) + 1, rng.random((2, 3, 4, 20))
    found = np.asarray(ad.mask_background(jnp.asarray(scores, jnp.float32), jnp.asarray(attention, jnp.float32), 0.15))
    for i in range(2):
        seen = attention[i].mean((0, 1))
        order = np.argsort(seen)
        assert (found[i, order[:3]] == 0).all()  # 15 % of 20
        np.testing.assert_allclose(found[i, order[3:]], scores[i, order[3:]], rtol=1e-6)


def textures(rng, count):
    """Sums of three plane waves of fixed direction, as patches of 4 x 4 through a fixed map to 64 features."""
    fixed = np.random.default_rng(99)
    waves, lift = fixed.uniform(0.1, 0.8, (3, 2)), fixed.normal(size=(16, 64)) / 4
    grid = np.stack(np.meshgrid(np.arange(32), np.arange(32), indexing="ij"), -1)
    phase = rng.uniform(0, 2 * np.pi, (count, 3, 1, 1))
    height = rng.uniform(0.3, 1, (count, 3, 1, 1))
    images = (height * np.sin(np.einsum("hwc,kc->khw", grid, waves) + phase)).sum(1)
    images += 0.02 * rng.normal(size=images.shape)
    return images, lift


def to_patches(images, lift):
    blocks = images.reshape(-1, 8, 4, 8, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8, 16)
    return jnp.asarray(blocks @ lift, jnp.float32)


def test_one_normal_texture_tells_noise_from_texture_where_distance_to_the_mean_does_not():
    """The specification's toy: one image to fit, 40 normal ones and 40 with one patch of noise, ten repeats."""
    found = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        images, lift = textures(rng, 81)
        masks = np.zeros((80, 8, 8), bool)
        for image, mask in zip(images[41:], masks[40:], strict=True):
            i, j = rng.integers(0, 8, 2)
            image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = 0.6 * rng.normal(size=(4, 4))
            mask[i, j] = True
        features = to_patches(images, lift)
        labels = masks.any((1, 2))
        for rank in (None, 0):
            scores = np.asarray(ad.score_patches(ad.fit_subspace(features[0], rank=rank), features[1:]))
            found.append((sj.metrics.auroc(scores.max((1, 2)), labels), sj.metrics.auroc(scores, masks)))
    ours, mean = np.array(found[::2]).mean(0), np.array(found[1::2]).mean(0)
    assert ours[0] >= 0.97
    assert (ours >= mean + 0.3).all()
