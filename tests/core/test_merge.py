import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import NonFiniteError, NotMergeableError, register_weight
from subspace_jax.weights import LowRank

from .helpers import adapt, close, lora, merged, normal


def exact(weight):
    return np.asarray(weight.base, np.float64) + weight.scale * np.asarray(weight.a, np.float64) @ np.asarray(
        weight.b, np.float64
    )


def test_merge_gives_the_tree_that_came():
    params = {"a": {"w": normal(0, 6, 4), "b": normal(1, 4)}, "n": np.int32(3), "k": (normal(2, 2, 3, 4), None)}
    role = sj.Role.dense((0, 1), (2,))
    adapted = adapt(params, {"**/w": lora(), "k/0": lora(), "**/b": sj.full()}, {"k/0": role})
    plain = sj.merge(adapted)
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(merged(adapted)), strict=True):
        close(one, other, 1e-6)
    assert plain["n"] is params["n"]
    assert not np.allclose(plain["a"]["w"], params["a"]["w"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_merge_adds_in_float32_and_rounds_once(dtype):
    """Base and addition of very different size: adding in half precision would lose the addition."""
    base = np.full((4, 3), 256.0, np.float32)
    factors = {"a": jnp.full((4, 2), 0.75), "b": jnp.full((2, 3), 0.7)}
    weight = dataclasses.replace(adapt({"w": base.astype(dtype)})["w"], **factors, scale=1.0)
    found = sj.merge({"w": weight})["w"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, exact(weight).astype(np.float32).astype(dtype))
    kept = sj.merge({"w": weight}, keep_float32=True)["w"]
    assert kept.dtype == jnp.float32
    close(kept, exact(weight), 1e-7)
    # Factors in half precision are still multiplied in float32.
    half = dataclasses.replace(weight, a=normal(0, 4, 2).astype(dtype), b=normal(1, 2, 3).astype(dtype))
    close(sj.merge({"w": half}, keep_float32=True)["w"], exact(half), 1e-6)


def test_rounding_report():
    params = {"half": normal(0, 40, 30).astype(jnp.bfloat16), "single": normal(1, 6, 4), "rest": normal(2, 4)}
    adapted = adapt(params, {"half": lora(), "single": lora()})
    report = sj.core.merge_rounding(adapted)
    assert set(report) == {"half", "single"}
    reference = exact(adapted["half"]).astype(np.float32)
    error = reference.astype(jnp.bfloat16).astype(np.float64) - reference
    assert report["half"].max_error == pytest.approx(np.abs(error).max(), rel=1e-4)
    assert report["half"].relative_error == pytest.approx(np.linalg.norm(error) / np.linalg.norm(reference), rel=1e-4)
    assert report["half"].dtype == "bfloat16"
    assert 2**-11 < report["half"].relative_error < 2**-8
    assert report["single"] == (0.0, 0.0, "float32")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_results_that_are_not_finite_are_refused_by_path(bad):
    adapted = adapt({"x": {"w": normal(0, 6, 4)}, "y": normal(1, 6, 4)})
    broken = dataclasses.replace(adapted["x"]["w"], a=adapted["x"]["w"].a.at[2, 0].set(bad))
    with pytest.raises(NonFiniteError, match=r"x/w: 4 of 24 entries.*lora"):
        sj.merge({**adapted, "x": {"w": broken}})


def test_overflow_of_half_precision_names_the_mend():
    weight = adapt({"w": normal(0, 6, 4).astype(jnp.float16)})["w"]
    large = dataclasses.replace(weight, a=weight.a * 1e3, b=weight.b * 1e3)
    with pytest.raises(NonFiniteError, match=r"w: .*keep_float32=True"):
        sj.merge({"w": large})
    close(sj.merge({"w": large}, keep_float32=True)["w"], exact(large), 1e-6)


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed(LowRank):
    """Depends on the input."""

    mergeable = False


def test_weights_that_depend_on_the_input_are_refused_by_path():
    plain = adapt({"w": normal(0, 6, 4)})["w"]
    routed = Routed(**vars(plain))
    inside = dataclasses.replace(plain, base=routed)
    for weight in (routed, inside):
        for function in (sj.merge, sj.core.merge_rounding):
            with pytest.raises(NotMergeableError, match=r"layer/w: .*depends on the input.*with_adapters"):
                function({"layer": {"w": weight}})


def test_merge_of_a_tree_without_weights_and_inside_jit():
    params = {"w": normal(0, 6, 4)}
    assert sj.merge(params)["w"] is params["w"]
    adapted = adapt(params)
    close(jax.jit(sj.merge)(adapted)["w"], merged(adapted)["w"], 1e-6)


def test_partitioned_and_combined_tree_merges_to_the_same():
    adapted = adapt({"w": normal(0, 6, 4), "b": normal(1, 4)}, "w")
    same = sj.merge(sj.combine(*sj.partition(adapted)))
    np.testing.assert_array_equal(same["w"], sj.merge(adapted)["w"])
