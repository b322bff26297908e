"""The subspace of normal patches, scores outside it, and maps, against NumPy, scikit-learn and SciPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA, KernelPCA

from subspace_jax.methods.analysis import subspace_ad as ad
from tests.tolerances import tolerance

WIDTH = 12


def patches(count=60, rank=WIDTH, seed=0, noise=0.0, shift=3.0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0][:, :rank]
    x = rng.normal(size=(count, rank)) * np.geomspace(3, 0.3, rank) @ basis.T + shift
    return x + noise * rng.normal(size=x.shape), basis


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def test_fit_is_scikit_learns_pca(wide):
    x, _ = patches()
    found, theirs = ad.fit_subspace(jnp.asarray(x), tau=0.99), PCA(0.99, svd_solver="full").fit(x)
    assert found.components.dtype == jnp.float64
    assert found.components.shape == (WIDTH, theirs.n_components_)
    np.testing.assert_allclose(found.mean, theirs.mean_, atol=1e-12)
    np.testing.assert_allclose(found.variances[: theirs.n_components_], theirs.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(
        found.components @ found.components.T, theirs.components_.T @ theirs.components_, atol=1e-10
    )
    np.testing.assert_allclose(found.components.T @ found.components, np.eye(theirs.n_components_), atol=1e-12)
    other = patches(seed=1)[0].reshape(3, 20, WIDTH)
    rebuilt = theirs.inverse_transform(theirs.transform(other.reshape(-1, WIDTH))).reshape(other.shape)
    np.testing.assert_allclose(ad.score_patches(found, jnp.asarray(other)), ((other - rebuilt) ** 2).sum(-1), rtol=1e-9)


def test_residual_is_orthogonal_and_pythagoras_holds(wide):
    x = jnp.asarray(patches()[0])
    found = ad.fit_subspace(x, rank=4)
    y = jnp.asarray(patches(seed=2)[0]) - found.mean
    inside = y @ found.components
    assert np.abs((y - inside @ found.components.T) @ found.components).max() < 1e-12
    expected = jnp.sum(y**2, -1) - jnp.sum(inside**2, -1)
    np.testing.assert_allclose(ad.score_patches(found, y + found.mean), expected, rtol=1e-9)
    whole = ad.fit_subspace(x, rank=0)
    np.testing.assert_allclose(ad.score_patches(whole, y + found.mean), jnp.sum(y**2, -1), rtol=1e-12)


def test_everything_is_explained_at_tau_1(wide):
    x = jnp.asarray(patches()[0])
    found = ad.fit_subspace(x, tau=1.0)
    assert found.components.shape == (WIDTH, WIDTH)
    assert float(ad.score_patches(found, x).max()) < 1e-8 * float(found.variances[0])


@pytest.mark.parametrize("tau", [0.5, 0.9, 0.99])
def test_mean_score_of_the_fitted_patches_is_the_variance_left_out(wide, tau):
    x = jnp.asarray(patches()[0])
    found = ad.fit_subspace(x, tau=tau)
    rank = found.components.shape[1]
    scores = ad.score_patches(found, x)
    np.testing.assert_allclose(scores.mean(), (len(x) - 1) / len(x) * found.variances[rank:].sum(), rtol=1e-9)
    assert scores.mean() <= (1 - tau) * found.variances.sum()
    assert found.variances[: rank - 1].sum() < tau * found.variances.sum() <= found.variances[:rank].sum()
    assert float(ad.score_patches(ad.fit_subspace(x, rank=rank + 1), x).max()) > 0
    more = ad.score_patches(ad.fit_subspace(x, rank=rank + 1), x)
    assert (np.asarray(more) <= np.asarray(scores) + 1e-12).all()


@pytest.mark.parametrize("count", [60, 7], ids=["many", "fewer than features"])
def test_a_flat_of_low_dimension_is_found_and_a_normal_step_scores_its_square(wide, count):
    x, basis = patches(count, rank=5)
    found = ad.fit_subspace(jnp.asarray(x), tau=1.0)
    assert found.components.shape[1] == 5  # eigenvalues of rounding do not count
    assert not np.asarray(found.variances)[5:].any()
    assert float(ad.score_patches(found, jnp.asarray(x)).max()) < 1e-8
    normal = np.linalg.svd(basis)[0][:, -1]
    for height in (0.1, 2.0):
        np.testing.assert_allclose(ad.score_patches(found, jnp.asarray(x + height * normal)), height**2, rtol=1e-6)


def test_scores_know_neither_origin_nor_axes_and_grow_with_the_square_of_the_scale(wide):
    x, other = patches(noise=0.1)[0], patches(seed=3, noise=0.1)[0]
    turn = np.linalg.qr(np.random.default_rng(4).normal(size=(WIDTH, WIDTH)))[0]

    def scores(move):
        return np.asarray(ad.score_patches(ad.fit_subspace(jnp.asarray(move(x)), tau=0.9), jnp.asarray(move(other))))

    expected = scores(lambda v: v)
    np.testing.assert_allclose(scores(lambda v: v + 7.0), expected, rtol=1e-8)
    np.testing.assert_allclose(scores(lambda v: v @ turn), expected, rtol=1e-8)
    np.testing.assert_allclose(scores(lambda v: 3.0 * v), 9 * expected, rtol=1e-8)


def test_streaming_over_any_split_is_the_fit_of_all():
    x = jnp.asarray(patches(shift=1000.0)[0], jnp.float32)  # where squares minus a square would cancel
    exact = np.cov(np.asarray(x, np.float64).T)
    for cuts in ((60,), (1, 2, 57), (20, 20, 20)):
        parts = jnp.split(x, np.cumsum(cuts)[:-1])
        moments = ad.no_moments(WIDTH)
        for part in parts:
            moments = ad.add_patches(moments, part)
        np.testing.assert_allclose(moments.scatter / 59, exact, atol=1e-4 * exact.max())
        halves = [ad.add_patches(ad.no_moments(WIDTH), v) for v in (x[:13], x[13:])]
        for one, other in zip(ad.merge_moments(*halves), ad.merge_moments(*halves[::-1]), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-2)
        found = ad.fit_subspace(iter(parts), tau=0.9)
        expected = ad.fit_subspace(x, tau=0.9)
        np.testing.assert_allclose(found.variances, expected.variances, atol=1e-4 * float(expected.variances[0]))
        assert int(found.count) == 60


def test_streaming_compiles_once_and_takes_bfloat16():
    x = jnp.asarray(patches()[0], jnp.bfloat16)
    ad.fit_subspace(iter([x[:20], x[20:40]]))
    before = ad.add_patches._cache_size()
    found = ad.fit_subspace(iter([x[:20], x[20:40], x[40:]]))
    assert ad.add_patches._cache_size() == before
    assert found.mean.dtype == jnp.float32
    expected = np.linalg.eigvalsh(np.cov(np.asarray(x, np.float64).T))[::-1]
    np.testing.assert_allclose(found.variances, expected, atol=tolerance(size=60, norm=expected[0]))
    assert ad.score_patches(found, x).dtype == jnp.float32


def test_the_other_scores(wide):
    x, y = patches()[0], patches(seed=5)[0]
    found = ad.fit_subspace(jnp.asarray(x), rank=5)
    components, mean = np.asarray(found.components), np.asarray(found.mean)
    for drop in (0, 2):
        z = (y - mean) @ components
        z[:, :drop] = 0
        rebuilt = mean + z @ components.T
        expected = {
            "residual": ((y - rebuilt) ** 2).sum(-1),
            "mahalanobis": (z**2 / (np.asarray(found.variances)[:5] + 1e-6)).sum(-1),
            "euclidean": (z**2).sum(-1),
            "cosine": 1 - (y * rebuilt).sum(-1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(rebuilt, axis=-1),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(
                ad.score_patches(found, jnp.asarray(y), score=name, drop=drop), value, rtol=1e-8, atol=1e-12
            )


def test_kernel_form_is_scikit_learns_and_linear_is_the_plain_residual(wide):
    x, y = patches()[0], patches(20, seed=6)[0]
    found = ad.fit_kernel_subspace(jnp.asarray(x), rank=6, gamma=0.05)
    mean, deviation = x.mean(0), x.std(0)
    a, b = (x - mean) / deviation, (y - mean) / deviation
    theirs = KernelPCA(6, kernel="rbf", gamma=0.05).fit(a)
    kernel = lambda u, v: np.exp(-0.05 * ((u[:, None] - v) ** 2).sum(-1))
    total, cross = kernel(a, a).mean(), kernel(b, a).mean(1)
    expected = 1 - 2 * cross + total - (theirs.transform(b) ** 2).sum(-1)
    np.testing.assert_allclose(ad.score_kernel(found, jnp.asarray(y)), np.maximum(expected, 0), rtol=1e-7, atol=1e-10)
    linear = ad.fit_kernel_subspace(jnp.asarray(x), rank=6, kernel="linear")
    plain = ad.fit_subspace(jnp.asarray(a), rank=6)
    np.testing.assert_allclose(
        ad.score_kernel(linear, jnp.asarray(y)), ad.score_patches(plain, jnp.asarray(b)), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ad.fit_subspace(x, tau=0.0), "tau=0.0"),
        (lambda x: ad.fit_subspace(x, tau=1.1), "tau=1.1"),
        (lambda x: ad.fit_subspace(x, rank=WIDTH + 1), "rank=13"),
        (lambda x: ad.fit_subspace(x[:1]), "1 patches"),
        (lambda x: ad.fit_subspace(iter([])), "no batch came"),
        (lambda x: ad.fit_subspace(iter([x, x[:, :3]])), "3 features, those before 12"),
        (lambda x: ad.fit_subspace(x.at[0].set(jnp.nan)), "NaN"),
        (lambda x: ad.fit_subspace(x.astype(jnp.int32)), "expected real features"),
        (lambda x: ad.score_patches(ad.fit_subspace(x), x[:, :5]), "same backbone"),
        (lambda x: ad.score_patches(ad.fit_subspace(x), x, score="norm"), "score='norm'"),
        (lambda x: ad.score_patches(ad.fit_subspace(x, rank=3), x, drop=4), "drop=4"),
        (lambda x: ad.anomaly_maps(x, (8, 8), kernel=4), "kernel=4"),
        (lambda x: ad.anomaly_maps(x, (8, 8), sigma=0.0), "sigma=0.0"),
        (lambda x: ad.anomaly_maps(x[0], (8, 8)), "rows, columns"),
        (lambda x: ad.image_scores(x, "median"), "how='median'"),
        (lambda x: ad.image_scores(x, share=0.0), "share=0.0"),
        (lambda x: ad.mix_layers(x[None], "sum"), "mix='sum'"),
        (lambda x: ad.mix_layers(x[None], "grouped", 2), "groups=2"),
        (lambda x: ad.rotation_angles(jax.random.key(0), -1), "count=-1"),
        (lambda x: ad.mask_background(x, x[None, None], 2.0), "share=2.0"),
        (lambda x: ad.mask_background(x, x), "expected"),
        (lambda x: ad.fit_kernel_subspace(x, kernel="poly"), "kernel='poly'"),
        (lambda x: ad.fit_kernel_subspace(x, gamma=-1.0), "gamma=-1.0"),
        (lambda x: ad.fit_kernel_subspace(x[0]), "finite"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.asarray(patches()[0], jnp.float32))


def test_equal_patches_have_no_components():
    found = ad.fit_subspace(jnp.ones((5, 3)))
    assert found.components.shape == (3, 0)
    np.testing.assert_allclose(ad.score_patches(found, jnp.array([[1.0, 1.0, 3.0]])), [4.0])
