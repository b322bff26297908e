"""The usual mergers against mergekit's `merge_tensors`, where it is installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import merging

torch = pytest.importorskip("torch")
mergekit = pytest.importorskip("mergekit.merge_methods")

SHAPE = (30, 20)


def tensors(count, seed=0, size=0.3):
    generator = np.random.default_rng(seed)
    base = generator.normal(size=SHAPE).astype(np.float32)
    return [base, *(base + size * generator.normal(size=SHAPE).astype(np.float32) for _ in range(count))]


def theirs(arrays, method, base=True, **parameters):
    given = {name.rstrip("_"): value for name, value in parameters.items()}
    options = {"base_index": 0} if base else {}
    return mergekit.merge_tensors([torch.from_numpy(a) for a in arrays], method, parameters=given, **options).numpy()


def trees(arrays):
    return [{"w": jnp.asarray(a)} for a in arrays]


def test_linear():
    arrays = tensors(3)[1:]
    expected = theirs(arrays, "linear", base=False, weight=[1.0, 2.0, 3.0], normalize=True)
    found = merging.average(trees(arrays), weights=[1, 2, 3])
    np.testing.assert_allclose(found["w"], expected, atol=1e-5)


def test_task_arithmetic():
    base, *experts = arrays = tensors(3)
    expected = theirs(arrays, "task_arithmetic", weight=0.4, normalize=False)
    found = merging.task_arithmetic(trees(experts), {"w": jnp.asarray(base)}, weights=0.4)
    np.testing.assert_allclose(found["w"], expected, atol=1e-5)


@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_ties(density, scale):
    base, *experts = arrays = tensors(4)
    expected = theirs(arrays, "ties", weight=1.0, density=density, normalize=True, lambda_=scale)
    found = merging.ties(
        trees(experts),
        {"w": jnp.asarray(base)},
        density=density,
        scale=scale,
        scope="leaf",
        keep="exact",
        zeros="positive",
    )
    np.testing.assert_allclose(found["w"], expected, atol=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [0.001, 0.5, 5.0])
def test_slerp(t, size):
    _, *experts = tensors(2, size=size)
    expected = theirs(experts, "slerp", t=t)
    np.testing.assert_allclose(merging.slerp(trees(experts), t=t)["w"], expected, atol=2e-5)
