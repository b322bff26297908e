"""Against einsums over PyTorch's own layouts, written out."""

import numpy as np
import pytest

from subspace_jax.io import NameMap, NameRule
from subspace_jax.io.peft import _layout as layout

RNG = np.random.default_rng(0)


def subspace_map(rule, shape, leaf="kernel"):
    return NameMap((rule,)).places({f"a/{leaf}": np.zeros(shape)})[f"a/{leaf}"]


def normal(*shape):
    return RNG.normal(size=shape)


def test_dense():
    place = subspace_map(NameRule("a", "m"), (6, 4))
    kernel, a, b = normal(6, 4), normal(6, 2), normal(2, 4)
    x = normal(3, 6)
    np.testing.assert_allclose(x @ layout.whole_to_torch(kernel, place).T, x @ kernel)
    down, up = layout.input_factor_to_torch(a, place), layout.output_factor_to_torch(b, place)
    assert (down.shape, up.shape) == ((2, 6), (4, 2)) == layout.factor_shapes(2, place)
    np.testing.assert_allclose(x @ down.T @ up.T, x @ a @ b)
    assert layout.factor_names(place) == ("lora_A.weight", "lora_B.weight")


def test_heads():
    """PyTorch's linear gives all heads side by side."""
    place = subspace_map(NameRule("a", "m"), (6, 2, 3))
    kernel, x = normal(6, 2, 3), normal(5, 6)
    y = x @ layout.whole_to_torch(kernel, place).T
    np.testing.assert_allclose(y.reshape(5, 2, 3), np.einsum("xi,ihd->xhd", x, kernel))
    back = subspace_map(NameRule("a", "m", inputs=2), (2, 3, 6))
    kernel, x = normal(2, 3, 6), normal(5, 2, 3)
    found = x.reshape(5, 6) @ layout.whole_to_torch(kernel, back).T
    np.testing.assert_allclose(found, np.einsum("xhd,hdo->xo", x, kernel))
    assert layout.sizes(back) == (6, 6)


def test_convolution():
    """A patch `[in, height, width]` under PyTorch's kernel, and `[height, width, in]` under Flax's."""
    place = subspace_map(NameRule("a", "m", "conv"), (3, 2, 5, 4))
    kernel, a, b, patch = normal(3, 2, 5, 4), normal(30, 7), normal(7, 4), normal(3, 2, 5)
    theirs = patch.transpose(2, 0, 1)
    expected = np.einsum("hwi,hwio->o", patch, kernel)
    np.testing.assert_allclose(np.einsum("ihw,oihw->o", theirs, layout.whole_to_torch(kernel, place)), expected)
    down, up = layout.input_factor_to_torch(a, place), layout.output_factor_to_torch(b, place)
    assert (down.shape, up.shape) == ((7, 5, 3, 2), (4, 7, 1, 1)) == layout.factor_shapes(7, place)
    found = np.einsum("ihw,rihw,or->o", theirs, down, up[:, :, 0, 0])
    np.testing.assert_allclose(found, np.einsum("hwi,hwir,ro->o", patch, a.reshape(3, 2, 5, 7), b))
    assert layout.magnitude_to_torch(normal(4), place).shape == (1, 4, 1, 1)


def test_embedding():
    place = subspace_map(NameRule("a", "m", "embedding"), (9, 4), "embedding")
    table, a, b = normal(9, 4), normal(9, 2), normal(2, 4)
    np.testing.assert_array_equal(layout.whole_to_torch(table, place), table)
    down, up = layout.input_factor_to_torch(a, place), layout.output_factor_to_torch(b, place)
    assert (down.shape, up.shape) == ((2, 9), (4, 2))
    np.testing.assert_allclose(down.T[3] @ up.T, (a @ b)[3])
    assert layout.factor_names(place) == ("lora_embedding_A", "lora_embedding_B")


@pytest.mark.parametrize(
    ("rule", "shape", "leaf"),
    [
        (NameRule("a", "m.{l}"), (2, 6, 4), "kernel"),
        (NameRule("a", "m.{l}"), (2, 2, 3), "bias"),
        (NameRule("a", "m.{l}.{e}", inputs=2), (2, 3, 4, 5, 6), "kernel"),
        (NameRule("a", "m.{l}", "conv"), (2, 3, 3, 5, 4), "kernel"),
        (NameRule("a", "m", "conv"), (3, 5, 4), "kernel"),
        (NameRule("a", "m", "embedding"), (9, 4), "embedding"),
        (NameRule("a", "m.{l}", "vector"), (2, 4), "scale"),
    ],
)
def test_inverses(rule, shape, leaf):
    place = subspace_map(rule, shape, leaf)
    array = normal(*shape)
    parts = layout.unstack(array, place, "a")
    assert len(parts) == len(place.modules)
    tensors = [layout.whole_to_torch(part, place) for part in parts]
    assert {tensor.shape for tensor in tensors} == {layout.whole_shape(place)}
    back = layout.stack([layout.whole_from_torch(tensor, place) for tensor in tensors], place)
    np.testing.assert_array_equal(back, array)
    if leaf in ("kernel", "embedding"):
        inputs, outputs = layout.sizes(place)
        a, b = normal(inputs, 2), normal(2, outputs)
        down, up = layout.input_factor_to_torch(a, place), layout.output_factor_to_torch(b, place)
        assert (down.shape, up.shape) == layout.factor_shapes(2, place)
        np.testing.assert_array_equal(layout.input_factor_from_torch(down, place), a)
        np.testing.assert_array_equal(layout.output_factor_from_torch(up, place), b)
