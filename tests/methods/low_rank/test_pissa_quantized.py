import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import RankError
from subspace_jax.weights import NF4

SIZE, RANK = 256, 16
LEVELS = np.array(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ]
)


def rounded(w):
    """Rounds to NF4 in NumPy, consecutive entries being those of the (out, in) matrix."""
    blocks = w.T.reshape(-1, 64)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    scale = np.where(scale == 0, 1.0, scale)
    return (LEVELS[np.abs(blocks[..., None] / scale[..., None] - LEVELS).argmin(-1)] * scale).reshape(w.T.shape).T


def principal(w):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vt[:RANK]


def nuclear(w):
    return np.linalg.svd(w, compute_uv=False).sum()


def reduction(w, base, low_rank):
    return 1 - nuclear(w - base - low_rank) / nuclear(w - rounded(w))


def loftq(w, steps):
    low_rank = np.zeros_like(w)
    for _ in range(steps):
        base = rounded(w - low_rank)
        low_rank = principal(w - base)
    return reduction(w, base, low_rank)


def qpissa(w, steps):
    adapted = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.qpissa(RANK, steps=steps, svd="exact")}, key=jax.random.key(0))
    weight = adapted["w"]
    assert isinstance(weight.base, NF4)
    return reduction(w, np.asarray(weight.base.materialize()), np.asarray(weight.a) @ np.asarray(weight.b))


def spectrum(power):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0] for _ in range(2))
    return ((u * np.arange(1, SIZE + 1) ** -power) @ v.T).astype(np.float32)


@pytest.fixture(
    params=[(spectrum(0.5), 0.32, 0.44), (np.random.default_rng(1).normal(size=(SIZE, SIZE)), 0.12, 0.27)],
    ids=["decaying", "gaussian"],
    scope="module",
)
def case(request):
    w, first, fifth = request.param
    return w.astype(np.float32), first, fifth


def test_it_reduces_the_error_of_quantization_with_every_step_and_more_than_loftq(case):
    w, first, fifth = case
    found = [qpissa(w, steps) for steps in range(1, 6)]
    assert found[0] > 0
    assert all(later > earlier for earlier, later in itertools.pairwise(found)), found
    assert abs(found[0] - first) < 0.03
    assert abs(found[4] - fifth) < 0.03
    assert found[4] >= loftq(w, 5)


def test_one_step_is_pissa_with_a_quantized_residual(case):
    w, *_ = case
    weight = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.qpissa(RANK, steps=1, svd="exact")}, key=jax.random.key(0))["w"]
    low_rank = principal(w.astype(np.float64))
    np.testing.assert_allclose(weight.a @ weight.b, low_rank, atol=1e-4)
    # Rounding is discontinuous: an entry midway between two levels may go either way.
    differs = np.abs(np.asarray(weight.base.materialize()) - rounded(w - low_rank)) > 1e-3 * np.abs(w).max()
    assert differs.mean() < 1e-3


def test_the_randomized_mode_is_nearly_as_good(case):
    w, *_ = case
    adapted = sj.adapt({"w": jnp.asarray(w)}, {"w": sj.qpissa(RANK, iterations=16)}, key=jax.random.key(0))["w"]
    found = reduction(w, np.asarray(adapted.base.materialize()), np.asarray(adapted.a @ adapted.b))
    assert abs(found - qpissa(w, 5)) < 0.02


def test_the_base_takes_four_bits_and_a_scale_per_block():
    weight = sj.adapt({"w": jnp.ones((128, 64))}, {"w": sj.qpissa(4)}, key=jax.random.key(0))["w"]
    assert weight.base.codes.nbytes + weight.base.absmax.nbytes == 128 * 64 // 2 + 128 * 64 // 64 * 4
    assert weight.scale == 1.0


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="steps=0"):
        sj.qpissa(4, steps=0)
    with pytest.raises(RankError, match="rank=9"):
        sj.adapt({"w": jnp.ones((8, 16))}, {"w": sj.qpissa(9)}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="'full'"):
        sj.qpissa(4, svd="full")
