"""Merged adapters against PEFT: its merging functions, `add_weighted_adapter`, and files both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax import merging

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from . import peft_backbones as pb  # noqa: E402
from .peft_backbones import peft  # noqa: E402

QUERIES = "**/{query,value}/kernel"


def experts_of(side, params, methods):
    trees = []
    for i, method in enumerate(methods):
        adapted = sj.adapt(params, {QUERIES: method}, key=jax.random.key(i), roles=side.roles(params))
        trainable, frozen = sj.partition(adapted)
        leaves, treedef = jax.tree.flatten(trainable)
        keys = jax.random.split(jax.random.key(10 + i), len(leaves))
        moved = [v + 0.1 * jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)]
        trees.append(sj.combine(jax.tree.unflatten(treedef, moved), frozen))
    return trees


def in_peft(side, params, trees, folder):
    """PEFT's model with every expert loaded from the files written here."""
    for i, tree in enumerate(trees):
        sj.save_peft(folder / f"e{i}", tree, params, side.names)
    with pb.quiet():
        model = peft.PeftModel.from_pretrained(side.make(), folder / "e0", adapter_name="e0")
        for i in range(1, len(trees)):
            model.load_adapter(folder / f"e{i}", adapter_name=f"e{i}")
    return model.eval()


def assert_close(found, expected, base):
    largest = max(1.0, np.abs(expected).max())
    assert np.abs(expected - base).max() > 1e-2 * largest
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize("weights", [[1.0, 0.5], [0.3, 0.7]])
def test_sum_of_loras_of_unequal_ranks_is_pefts_cat(weights, tmp_path):
    side = pb.Bert()
    params = side.params()
    trees = experts_of(side, params, [sj.lora(2, alpha=3), sj.lora(5, alpha=4)])
    merged = merging.task_arithmetic(trees, params, weights=weights)
    model = in_peft(side, params, trees, tmp_path)
    model.add_weighted_adapter(["e0", "e1"], weights, "both", combination_type="cat")
    model.set_adapter("both")
    base = side.torch_logits(side.make())
    assert_close(np.asarray(side.logits(merged)), side.torch_logits(model), base)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_adapters_are_written_loaded_by_peft_and_loaded_again(kind, tmp_path):
    side = pb.Bert()
    params = side.params()
    wrap = sj.dora if kind == "dora" else lambda method: method
    trees = experts_of(side, params, [wrap(sj.lora(2, alpha=3)), wrap(sj.lora(3, rank_stabilized=True))])
    merged = merging.task_arithmetic(trees, params, weights=[0.6, -0.4])
    sj.save_peft(tmp_path / "merged", merged, params, side.names)
    with pb.quiet():
        loaded = peft.PeftModel.from_pretrained(side.make(), tmp_path / "merged").eval()
    ours, base = np.asarray(side.logits(merged)), side.torch_logits(side.make())
    assert_close(side.torch_logits(loaded), ours, base)
    again = sj.load_peft(tmp_path / "merged", params, side.names)
    np.testing.assert_allclose(np.asarray(side.logits(again)), ours, rtol=0, atol=1e-5)
    both = merging.average([again, trees[0]], params)  # and is an expert again
    assert np.isfinite(np.asarray(side.logits(both))).all()


def test_to_low_rank_of_ties_loads_in_peft(tmp_path):
    side = pb.Bert()
    params = side.params()
    trees = experts_of(side, params, [sj.lora(2), sj.lora(3)])
    merged = merging.ties(trees, params, density=0.5, select=QUERIES)
    small = merging.to_low_rank(merged, params, rank=4, select=QUERIES, roles=side.roles(params))
    sj.save_peft(tmp_path / "merged", small, params, side.names)
    with pb.quiet():
        loaded = peft.PeftModel.from_pretrained(side.make(), tmp_path / "merged").eval()
    base = side.torch_logits(side.make())
    assert_close(side.torch_logits(loaded), np.asarray(side.logits(small)), base)


@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_ties_is_pefts(density, elect):
    from peft.utils import merge_utils

    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(4, 30, 20)).astype(np.float32)
    weights = [1.0, 0.5, 2.0, 0.1]
    expected = merge_utils.ties(
        [torch.from_numpy(v) for v in vectors],
        torch.tensor(weights),
        density,
        majority_sign_method="total" if elect == "sum" else "frequency",
    )
    found = merging.ties(
        [{"w": jnp.asarray(v)} for v in vectors],
        {"w": jnp.zeros((30, 20))},
        density=density,
        weights=weights,
        scope="leaf",
        keep="exact",
        elect=elect,
        zeros="positive",
    )
    np.testing.assert_allclose(found["w"], expected.numpy(), rtol=0, atol=1e-5)


def test_dare_has_pefts_values():
    """The draws differ, so what every entry can be is compared: zero or one rescaled value each."""
    from peft.utils import merge_utils

    base, experts = {"w": jnp.zeros(4000)}, [{"w": jnp.ones(4000)}, {"w": 10 * jnp.ones(4000)}]
    found = merging.dare(experts, base, key=jax.random.key(0), drop=0.75)["w"]
    tensors = [torch.ones(4000), 10 * torch.ones(4000)]
    expected = merge_utils.dare_linear(tensors, torch.tensor([0.3, 0.3]), 0.25)
    values, counts = np.unique(np.asarray(found).round(3), return_counts=True)
    theirs, others = np.unique(expected.numpy().round(3), return_counts=True)
    assert values.tolist() == theirs.tolist()
    np.testing.assert_allclose(counts / 4000, others / 4000, atol=0.05)
