"""Weights in the blocks of a GGUF file: exact in jit, alone and stacked, looked up, in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError
from subspace_jax.models import GgufTensor
from subspace_jax.weights import BLOCK_KINDS, pack_blocks, stack_packed
from subspace_jax.weights import _packed as packed_module
from tests.tolerances import tolerance


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_rows(rng, kind, rows, values):
    """Arbitrary blocks whose float16 numbers are finite, scales of either sign and subnormal ones among them."""
    found = BLOCK_KINDS[kind]
    raw = rng.integers(0, 256, (rows * values // found.values, found.size), dtype=np.uint8)
    for place in found.scales:
        scale = rng.normal(size=(len(raw), 1)).astype("<f2")
        scale[0] = 3e-7
        raw[:, place : place + 2] = scale.view(np.uint8)
    return raw.reshape(rows, -1)


def reference(kind, rows, values):
    """What the reader of files makes of them, in NumPy."""
    return GgufTensor("w", (len(rows), values), kind, rows.reshape(-1)).dequantize()


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_blocks_in_jit_are_the_readers_numbers_to_the_bit(kind, rng):
    rows = random_rows(rng, kind, 6, 512)
    weight = pack_blocks(jnp.asarray(rows), kind, sj.Role.dense(), (512, 6))
    found = jax.jit(lambda w: w.materialize())(weight)
    np.testing.assert_array_equal(found, reference(kind, rows, 512).T)
    assert weight.blocks.nbytes < 512 * 6 * 4 / 3.7


@pytest.mark.interop
@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_blocks_are_what_the_gguf_package_says(kind, rng):
    gguf = pytest.importorskip("gguf")
    rows = random_rows(rng, kind, 4, 256)
    weight = pack_blocks(jnp.asarray(rows), kind, sj.Role.embedding(), (4, 256))
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(weight.materialize(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("role", "shape"),
    [(sj.Role.dense((0,), (1, 2)), (64, 3, 5)), (sj.Role.dense((0, 1), (2,)), (4, 16, 5))],
    ids=["heads_out", "heads_in"],
)
def test_kernels_of_attention_keep_their_axes(role, shape, rng):
    count = int(np.prod(shape)) // 64
    rows = random_rows(rng, "Q5_0", count, 64)
    weight = pack_blocks(jnp.asarray(rows), "Q5_0", role, shape)
    array = reference("Q5_0", rows, 64).T.reshape(shape)
    np.testing.assert_array_equal(weight.materialize(), array)
    x = jnp.asarray(rng.normal(size=(7, *(shape[i] for i in role.in_axes))), jnp.float32)
    axes = tuple(range(1, x.ndim))
    apply = sj.with_adapters(lambda w, x: jax.lax.dot_general(x, w, ((axes, role.in_axes), ((), ()))))
    np.testing.assert_allclose(apply(weight, x), apply(jnp.asarray(array), x), rtol=tolerance(size=64), atol=1e-4)


def stacked(rng, kinds=("Q4_K", "Q6_K", "Q4_K")):
    rows = [random_rows(rng, kind, 5, 256) for kind in kinds]
    layers = [pack_blocks(r, k, sj.Role.dense(), (256, 5)) for r, k in zip(rows, kinds, strict=True)]
    whole = jax.tree.map(jnp.asarray, stack_packed(layers))
    return whole, np.stack([reference(k, r, 256).T for k, r in zip(kinds, rows, strict=True)])


def test_layers_of_several_kinds_are_one_stack(rng):
    weight, arrays = stacked(rng)
    assert weight.shape == (3, 256, 5)
    np.testing.assert_array_equal(jax.jit(lambda w: w.materialize())(weight), arrays)

    def chain(w, x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer) @ layer.T, None), x, w)[0]

    x = jnp.asarray(rng.normal(size=(2, 256)) * 1e-3, jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(sj.with_adapters(chain)(w, x) ** 2)))
    for found, expected in zip(run(x, weight), run(x, jnp.asarray(arrays)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))
    one = sj.with_adapters(lambda w, x: x @ w[1])(weight, x)
    np.testing.assert_allclose(one, x @ arrays[1], rtol=1e-4, atol=1e-5)


def test_the_backward_pass_of_a_scan_keeps_no_layer(rng):
    """What it keeps is smaller than a stack of dense layers, and than a second copy of the blocks."""
    weight, arrays = stacked(rng, ("Q4_K",) * 3)
    big = jax.tree.map(lambda v: jnp.tile(v, (20, 40, 1)), weight)
    big = sj.weights.Packed(**{**vars(big), "out_sizes": (200,)})

    def chain(w, x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh((x @ layer) @ layer.T), None), x, w)[0]

    loss = jax.grad(lambda x, w: jnp.sum(sj.with_adapters(chain)(w, x)))
    compiled = jax.jit(loss).lower(jnp.ones((1, 256)), big).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < big.blocks.nbytes < 60 * 256 * 200 * 4 / 7
    del arrays


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_rows_of_a_table_are_looked_up_alone(mode, rng):
    rows = random_rows(rng, "Q8_0", 11, 64)
    table = pack_blocks(jnp.asarray(rows), "Q8_0", sj.Role.embedding(), (11, 64))
    apply = jax.jit(sj.with_adapters(lambda w, i: jnp.take(w, i, axis=0, mode=mode).astype(jnp.bfloat16)))
    index = jnp.array([[3, 0], [10, 12]])
    expected = apply(jnp.asarray(reference("Q8_0", rows, 64)), index)
    assert apply(table, index).dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(apply(table, index), np.float32), np.asarray(expected, np.float32))
    text = apply.lower(table, index).as_text()
    assert "11x64xf32" not in text


@pytest.mark.parametrize("rows", [16, 13])
def test_a_tied_head_is_formed_in_chunks(rows, rng, monkeypatch):
    monkeypatch.setattr(packed_module, "CHUNK", 4 * 64)
    blocks = random_rows(rng, "Q8_0", rows, 64)
    table = pack_blocks(jnp.asarray(blocks), "Q8_0", sj.Role.embedding(), (rows, 64))
    dense = jnp.asarray(reference("Q8_0", blocks, 64))
    x = jnp.asarray(rng.normal(size=(2, 3, 64)) * 1e-2, jnp.float32)
    for product in ("bpw,vw->bpv", "bpw,vw->vbp"):
        run = sj.with_adapters(lambda w, x, product=product: jnp.einsum(product, x, w))
        value = jax.jit(jax.value_and_grad(lambda x, w, run=run: jnp.sum(jnp.sin(run(w, x)))))
        np.testing.assert_allclose(run(table, x), run(dense, x), rtol=1e-4, atol=1e-4)
        for found, expected in zip(value(x, table), value(x, dense), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert f"{rows}x64xf32" not in value.lower(x, table).as_text()


def test_nothing_of_it_learns_and_methods_that_need_numbers_are_refused(rng):
    weight, _ = stacked(rng)
    assert not jax.tree.leaves(sj.partition({"w": weight})[0])
    with pytest.raises(PatternError, match=r"w: is stored as Packed, and pissa needs the array"):
        sj.adapt({"w": weight}, {"w": sj.pissa(2)}, key=jax.random.key(0))
    np.testing.assert_array_equal(sj.merge({"w": weight})["w"], weight.materialize())


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [("Q9", (64, 4), "kind 'Q9'"), ("Q8_0", (64, 5), r"uint8\[5, 68\]"), ("Q8_0", (32, 4), r"uint8\[4, 34\]")],
)
def test_blocks_that_do_not_fit_are_refused(kind, shape, message, rng):
    rows = random_rows(rng, "Q8_0", 4, 64)
    with pytest.raises(ValueError, match=message):
        pack_blocks(jnp.asarray(rows), kind, sj.Role.dense(), shape)
