import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.models import cubic_resize_matrix, resize_positions


@pytest.mark.interop
@pytest.mark.parametrize("grid", [(5, 8), (37, 16), (1, 3), (74, 37)])
def test_resizing_equals_pytorch(rng, grid):
    torch = pytest.importorskip("torch")
    table = rng.normal(size=(37, 37, 4)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(table).permute(2, 0, 1)[None], size=grid, mode="bicubic", align_corners=False
    )[0].permute(1, 2, 0)
    np.testing.assert_allclose(resize_positions(jnp.asarray(table), grid), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (37, 16), (1, 5), (9, 1)])
def test_constants_survive_and_mirroring_commutes(old, new):
    matrix = cubic_resize_matrix(old, new)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)


def test_the_kernel_is_the_one_with_a_of_three_quarters():
    # At distance 1/2 and 3/2 the cubic with a is 1/2 - a/8 and a/8.
    a = -0.75
    np.testing.assert_allclose(cubic_resize_matrix(8, 4)[1, 1:5], [a / 8, 0.5 - a / 8, 0.5 - a / 8, a / 8])


def test_same_grid_is_untouched_and_impossible_sizes_are_refused():
    table = jnp.ones((3, 3, 2), jnp.bfloat16)
    assert resize_positions(table, (3, 3)) is table
    assert resize_positions(table, (2, 5)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="positive"):
        cubic_resize_matrix(3, 0)
