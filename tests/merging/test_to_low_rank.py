import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.merging import task_arithmetic, ties, to_low_rank

from . import trees


def test_is_the_nearest_of_its_rank():
    base = trees.base_tree()
    merged = ties(trees.full_experts(base), base, density=0.5)
    found = to_low_rank(merged, base, rank=3, roles=trees.ROLES)
    for path, layers in (("dense", [...]), ("wide", [...]), ("stack", [0, 1, 2])):
        delta = np.asarray(merged[path], np.float64) - np.asarray(base[path], np.float64)
        change = np.asarray(found[path].a, np.float64) @ np.asarray(found[path].b, np.float64)
        for layer in layers:
            tail = np.linalg.svd(delta[layer], compute_uv=False)[3:]
            assert np.linalg.norm(delta[layer] - change[layer]) == pytest.approx(np.linalg.norm(tail), rel=1e-3)
    assert found["bias"] is merged["bias"]


def test_shrinks_a_sum_of_loras_and_leaves_small_ones_alone():
    base = trees.base_tree()
    experts = trees.adapted_experts(base, [sj.lora(rank=2), sj.lora(rank=3)])
    merged = task_arithmetic(experts, base, weights=1.0)
    assert to_low_rank(merged, base, rank=5)["dense"] is merged["dense"]
    small = to_low_rank(merged, base, rank=4)
    assert small["dense"].rank == 4
    delta = np.asarray(merged["dense"].a @ merged["dense"].b, np.float64)
    tail = np.linalg.svd(delta, compute_uv=False)[4:]
    error = np.linalg.norm(delta - np.asarray(small["dense"].a @ small["dense"].b, np.float64))
    assert error == pytest.approx(np.linalg.norm(tail), rel=1e-3)
    with pytest.raises(sj.errors.RankError, match="to_low_rank: rank=0"):
        to_low_rank(merged, base, rank=0)
    assert jnp.allclose(small["dense"].materialize(), merged["dense"].materialize(), atol=float(tail[0]) + 1e-5)
