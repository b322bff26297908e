import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.models import stack_layers, unstack_layers
from tests.models.model_helpers import random_params, run, tiny

KINDS = ("bert", "vit", "llama")


@pytest.mark.parametrize("kind", KINDS)
def test_scanned_layers_compute_what_unrolled_layers_compute(kind):
    plain, inputs = tiny(kind)
    scanned, _ = tiny(kind, scan_layers=True)
    params = random_params(plain, inputs)
    stacked = stack_layers(params)
    expected_shapes = jax.eval_shape(scanned.init, jax.random.key(0), inputs)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda s: s.shape, expected_shapes)
    np.testing.assert_allclose(run(scanned, stacked, inputs), run(plain, params, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "scan"), [("bert", True), ("vit", False), ("llama", True)])
def test_remat_changes_neither_values_nor_gradients(kind, scan):
    plain, inputs = tiny(kind, scan_layers=scan)
    remat, _ = tiny(kind, scan_layers=scan, remat=True)
    params = random_params(plain, inputs)

    def gradient(module):
        return jax.jit(jax.grad(lambda p: (module.apply({"params": p}, inputs) ** 2).mean()))

    expected, found = (jax.tree.leaves(gradient(module)(params)) for module in (plain, remat))
    # One scale for all leaves: the gradient of a key's bias is zero but for rounding.
    scale = max(float(jnp.abs(leaf).max()) for leaf in expected)
    for want, got in zip(expected, found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 * scale)
    programs = [str(jax.make_jaxpr(gradient(module))(params)) for module in (plain, remat)]
    assert ["remat" in program or "checkpoint" in program for program in programs] == [False, True]
    assert all(("scan[" in program) == scan for program in programs)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_float32(kind):
    scan = kind != "vit"
    plain, inputs = tiny(kind, scan_layers=scan)
    half, _ = tiny(kind, scan_layers=scan, dtype=jnp.bfloat16)
    # As initialized: the large parameters of the other tests saturate the attention.
    params = jax.jit(plain.init)(jax.random.key(0), inputs)["params"]
    expected, found = run(plain, params, inputs), run(half, params, inputs)
    assert found.dtype == (jnp.float32 if kind == "llama" else jnp.bfloat16)
    error = np.abs(np.asarray(found, np.float32) - np.asarray(expected)).max()
    assert 0 < error < 0.05 * np.abs(expected).max()
    stored, _ = tiny(kind, scan_layers=scan, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(jax.eval_shape(stored.init, jax.random.key(0), inputs)["params"])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_kernels_have_the_documented_paths_and_shapes(kind):
    module, inputs = tiny(kind)
    flat = flax.traverse_util.flatten_dict(random_params(module, inputs), sep="/")
    tower = "decoder" if kind == "llama" else "encoder"
    shapes = {name: flat[f"{tower}/layer_1/attention/{name}/kernel"].shape for name in ("query", "key", "output")}
    assert (
        shapes
        == {
            "bert": {"query": (32, 32), "key": (32, 32), "output": (32, 32)},
            "vit": {"query": (32, 4, 8), "key": (32, 4, 8), "output": (4, 8, 32)},
            "llama": {"query": (32, 4, 8), "key": (32, 2, 8), "output": (4, 8, 32)},
        }[kind]
    )


def test_stacking_orders_layers_by_number_and_is_undone():
    tree = {"a": {f"layer_{i}": {"w": jnp.full(2, float(i))} for i in (10, 2, 0, 1, *range(3, 10))}, "b": 1}
    stacked = stack_layers(tree)
    assert stacked["a"]["layers"]["w"][:, 0].tolist() == list(range(11))
    back = unstack_layers(stacked)
    assert back["b"] == 1
    assert set(back["a"]) == set(tree["a"])
    for name, layer in tree["a"].items():
        np.testing.assert_array_equal(back["a"][name]["w"], layer["w"])


def test_stacking_refuses_gaps_and_unequal_layers():
    with pytest.raises(ValueError, match="without a gap"):
        stack_layers({"enc": {"layer_0": {"w": jnp.ones(2)}, "layer_2": {"w": jnp.ones(2)}}})
    with pytest.raises(ValueError, match="/enc/layer_1"):
        stack_layers({"enc": {"layer_0": {"w": jnp.ones(2)}, "layer_1": {"w": jnp.ones(3)}}})
    with pytest.raises(ValueError, match="/enc/layers"):
        unstack_layers({"enc": {"layers": {"w": jnp.ones((2, 1)), "v": jnp.ones((3, 1))}}})
