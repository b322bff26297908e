"""QLoRA: NF4 with quantized scales in NumPy, LoRA on stored weights, and what files hold of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.io import load_adapter, restore_checkpoint, save_adapter, save_checkpoint
from subspace_jax.models import load_gguf
from subspace_jax.weights import NF4, Packed, quantize_nf4
from tests.models.gguf_models import write_packed
from tests.tolerances import tolerance
from tests.weights.test_nf4 import LEVELS, nearest

BATCH = jnp.array([[5, 7, 9, 3], [1, 0, 2, 4]])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny Llama whose layers are quantized in several kinds."""
    return write_packed(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def both(file, **options):
    return load_gguf(file, packed=True, **options), load_gguf(file, **options)


def loss_of(model):
    def loss(params, tokens):
        logits = model.module.apply({"params": params}, tokens)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1, 3].astype(jnp.float32))

    return loss


def adapt(model, method):
    found = sj.roles(loss_of(model), model.params, BATCH)
    return sj.adapt(model.params, {"decoder/**/kernel": method}, key=jax.random.key(0), roles=found)


def test_scales_are_quantized_as_the_paper_has_it():
    w = np.random.default_rng(0).normal(size=(640, 96)).astype(np.float32)
    found = quantize_nf4(jnp.asarray(w), double=True)
    blocks = w.T.reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1)
    mean = absmax.astype(np.float64).mean()
    scales = np.empty_like(absmax)
    for start in range(0, len(absmax), 256):
        part = absmax[start : start + 256] - mean
        step = np.abs(part).max() / 448.0
        scales[start : start + 256] = (part / step).astype(jnp.float8_e4m3fn).astype(np.float64) * step + mean
    levels = np.asarray(LEVELS)
    codes = np.abs(blocks[:, :, None] / scales[:, None, None] - levels).argmin(-1)
    expected = (levels[codes] * scales[:, None]).reshape(w.T.shape).T
    differs = np.abs(np.asarray(found.materialize()) - expected) > 1e-5
    assert differs.mean() < 1e-3  # an entry midway between two levels, or a scale between two codes
    bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(found)) / w.size
    assert 4.12 < bits < 4.15
    once = np.abs(nearest(w) - w).mean()
    assert np.abs(np.asarray(found.materialize()) - w).mean() < 1.03 * once


def test_an_array_is_quantized_and_its_addition_is_loras():
    w = jax.random.normal(jax.random.key(3), (96, 64), jnp.bfloat16)
    ours, theirs = (
        sj.adapt({"w": w}, {"w": m}, key=jax.random.key(0))["w"] for m in (sj.qlora(4, alpha=8), sj.lora(4, alpha=8))
    )
    assert isinstance(ours.base, NF4)
    assert (ours.dtype, ours.method, float(ours.scale)) == (jnp.bfloat16, "qlora", 2.0)
    np.testing.assert_array_equal(ours.a, theirs.a)
    assert ours.base.absmax.dtype == jnp.float8_e4m3fn
    single = sj.adapt({"w": w}, {"w": sj.qlora(4, double_quantization=False)}, key=jax.random.key(0))["w"]
    assert single.base.absmax.dtype == jnp.float32


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "stacked"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_packed_model_trains_as_the_dense_one_that_its_blocks_mean(file, scan, dtype):
    packed, dense = both(file, scan_layers=scan, dtype=dtype)
    losses, compiled = [], []
    for model in (packed, dense):
        adapted = adapt(model, sj.qlora(4) if model is packed else sj.lora(4))
        trainable, frozen = sj.partition(adapted)
        trainable = jax.tree.map(lambda v: v + 0.05, trainable)
        run = sj.with_adapters(loss_of(model))
        step = jax.jit(jax.value_and_grad(lambda t, f, x, run=run: run(sj.combine(t, f), x)))
        losses.append(step(trainable, frozen, BATCH))
        step(trainable, frozen, BATCH + 1)
        compiled.append(step._cache_size())
    assert compiled == [1, 1]
    (ours, ours_gradient), (theirs, their_gradient) = losses
    bound = 2e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(ours, theirs, rtol=bound)
    leaves = jax.tree.leaves_with_path(ours_gradient)
    assert {path[-1].name for path, _ in leaves} == {"a", "b"}
    for (path, found), expected in zip(leaves, jax.tree.leaves(their_gradient), strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=10 * bound * scale, err_msg=str(path))


def test_kinds_of_layers_are_mixed_and_merging_forms_the_dense_model(file):
    packed, dense = both(file, scan_layers=True)
    kernels = packed.params["decoder"]["layers"]
    assert set(kernels["mlp"]["down"]["kernel"].kinds) == {"Q4_0", "Q5_0"}
    assert isinstance(packed.params["embedding"]["embedding"], Packed)
    merged = sj.merge(packed.params)
    for found, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(dense.params), strict=True):
        np.testing.assert_array_equal(found, expected)
    adapted = adapt(packed, sj.qlora(2))
    trainable, frozen = sj.partition(adapted)
    moved = sj.combine(jax.tree.map(lambda v: v + 0.1, trainable), frozen)
    run = jax.jit(sj.with_adapters(loss_of(packed)))
    np.testing.assert_allclose(run(moved, BATCH), run(sj.merge(moved), BATCH), rtol=1e-5)


def test_files_leave_the_blocks_out_and_other_blocks_are_refused(file, tmp_path):
    packed, _ = both(file, scan_layers=True)
    adapted = adapt(packed, sj.qlora(2))
    path = save_adapter(tmp_path / "a.safetensors", adapted, base=packed.params)
    names = sj.io.read_safetensors(path)[0]
    assert {name.rsplit("/", 1)[1] for name in names} == {"a", "b"}
    again = load_adapter(path, packed.params)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True):
        np.testing.assert_array_equal(found, expected)
    alone = load_adapter(save_adapter(tmp_path / "b.safetensors", adapted), packed.params)
    assert jax.tree.structure(alone) == jax.tree.structure(adapted)
    save_checkpoint(tmp_path / "run", 3, adapted, base=packed.params)
    restored = restore_checkpoint(tmp_path / "run", base=packed.params).adapted
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(adapted), strict=True):
        np.testing.assert_array_equal(found, expected)
    other = write_packed(tmp_path / "other.gguf", seed=1)
    with pytest.raises(sj.io.AdapterFileError, match="other numbers"):
        load_adapter(path, load_gguf(other, packed=True, scan_layers=True).params)


def test_peft_gets_the_factors_and_puts_them_on_the_model_of_the_blocks(file, tmp_path):
    packed, dense = both(file)
    adapted = adapt(packed, sj.qlora(2))
    folder = sj.save_peft(tmp_path / "peft", adapted, packed.params, packed.names)
    found = sj.load_peft(folder, dense.params, dense.names)
    run = jax.jit(sj.with_adapters(loss_of(dense)))
    np.testing.assert_allclose(run(found, BATCH), run(adapted, BATCH), rtol=tolerance(size=64))
    quantized = sj.adapt(
        dense.params,
        {"decoder/**/kernel": sj.qlora(2)},
        key=jax.random.key(0),
        roles=sj.roles(loss_of(dense), dense.params, BATCH),
    )
    with pytest.raises(sj.io.AdapterFileError, match="stands on a NF4"):
        sj.save_peft(tmp_path / "no", quantized, dense.params, dense.names)


def test_options_are_checked():
    with pytest.raises(ValueError, match="order"):
        sj.qlora(2, order="rows")
    with pytest.raises(sj.errors.RankError, match="rank"):
        sj.qlora(0)
