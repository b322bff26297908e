"""What every merger promises: shapes and dtypes, order of experts, bad input refused, one leaf at a time."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax import merging

from ..tolerances import assert_rounding
from . import trees


def _fisher(experts, base, **options):
    information = [jax.tree.map(lambda v: jnp.ones(v.shape), base) for _ in experts]
    return merging.fisher(experts, base, information, **options)


def _regmean(experts, base, **options):
    return merging.regmean(experts, base, [{"dense": jnp.eye(12)} for _ in experts], **options)


# Every public merger: how it is called, and whether the order of experts and a copy of one matter.
MERGERS = {
    "average": merging.average,
    "task_arithmetic": functools.partial(merging.task_arithmetic, weights=0.5),
    "ties": merging.ties,
    "dare": functools.partial(merging.dare, key=jax.random.key(0)),
    "slerp": merging.slerp,
    "knots": merging.knots,
    "tsv_m": merging.tsv_m,
    "iso_c": merging.iso_c,
    "fisher": _fisher,
    "regmean": _regmean,
    "orthomerge": functools.partial(
        sj.methods.orthomerge.orthomerge, merger=functools.partial(merging.task_arithmetic, weights=0.5)
    ),
    "do_merging": functools.partial(sj.methods.do_merging.do_merging, steps=5),
}
ORDERED = {"dare"}
KEEPS_COPIES = {"average", "task_arithmetic", "slerp", "fisher", "regmean", "orthomerge"}


@pytest.fixture(params=MERGERS)
def name(request):
    return request.param


def matrices(tree):
    return {k: v for k, v in tree.items() if k in ("dense", "wide")}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["full", "lora", "oft"])
def test_tree_shapes_and_dtypes_are_the_base_s(name, kind, dtype):
    base = trees.base_tree(dtype=dtype)
    if kind == "full":
        experts = trees.full_experts(base, 2)
    else:
        method = {"lora": sj.lora(rank=2), "oft": sj.oft(block_size=2)}[kind]
        experts = trees.adapted_experts(base, [method] * 2)
    if name == "do_merging" and kind != "lora":
        base, experts = matrices(base), [matrices(e) for e in experts]
    merged = MERGERS[name](experts, base)
    plain = sj.merge(merged)
    assert jax.tree.structure(plain) == jax.tree.structure(base)
    for leaf, start in zip(jax.tree.leaves(plain), jax.tree.leaves(base), strict=True):
        assert (leaf.shape, leaf.dtype) == (start.shape, start.dtype)
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    if kind != "full":
        assert all(sj.core.is_weight(merged[p]) for p in ("dense", "wide"))


def test_order_of_experts_does_not_matter(name):
    if name in ORDERED:
        pytest.skip("draws by the number of an expert")
    base = matrices(trees.base_tree())
    experts = trees.full_experts(base, 2)
    one, other = MERGERS[name](experts, base), MERGERS[name](experts[::-1], base)
    for path in base:
        assert_rounding(np.asarray(one[path]), np.asarray(other[path]), size=100)


def test_two_copies_of_an_expert_give_it_back(name):
    if name not in KEEPS_COPIES:
        pytest.skip("is not meant to")
    base = matrices(trees.base_tree())
    (expert,) = trees.full_experts(base, 1)
    merged = MERGERS[name]([expert, expert], base)
    for path in base:
        assert_rounding(np.asarray(merged[path]), np.asarray(expert[path]), size=100)


def test_what_is_not_selected_is_the_base_s_and_not_looked_at(name):
    base = matrices(trees.base_tree()) | {"head": jnp.ones((4, 2))}
    experts = trees.full_experts(base, 2)
    experts[1] = experts[1] | {"head": jnp.full((4, 7), jnp.nan)}
    merged = MERGERS[name](experts, base, select="{dense,wide}")
    assert merged["head"] is base["head"]
    assert not np.array_equal(merged["dense"], base["dense"])
    with pytest.raises(sj.errors.PatternError, match="nothing"):
        MERGERS[name](experts, base, select="nothing/*")


def test_bad_experts_are_refused_by_path(name):
    merger = MERGERS[name]
    base = matrices(trees.base_tree())
    experts = trees.full_experts(base, 2)
    error = sj.errors.StructureError
    with pytest.raises(error, match=r"wide: expert 1 lacks this leaf"):
        merger([experts[0], {"dense": experts[1]["dense"]}], base)
    with pytest.raises(error, match=r"more: expert 0 has this leaf, the base has not"):
        merger([experts[0] | {"more": jnp.ones(2)}, experts[1]], base)
    with pytest.raises(error, match=r"dense: expert 1 has shape \(3, 3\), the base \(12, 10\)"):
        merger([experts[0], experts[1] | {"dense": jnp.ones((3, 3))}], base)
    with pytest.raises(sj.errors.NonFiniteError, match=r"wide: expert 1 differs .* NaN"):
        merger([experts[0], experts[1] | {"wide": experts[1]["wide"].at[2, 3].set(jnp.nan)}], base)
    with pytest.raises(error, match="expected a list of trees"):
        merger(experts[0], base)
    if name != "task_arithmetic":
        with pytest.raises(error, match=r"at least 2 expected|exactly 2 expected"):
            merger(experts[:1], base)
    with pytest.raises(error, match="expert"):
        merger([], base)


def test_an_adapter_of_another_base_is_refused(name):
    base = matrices(trees.base_tree())
    experts = trees.adapted_experts(base, [sj.lora(rank=2)] * 2)
    strange = trees.with_leaf(experts[1], "dense", base=base["dense"] + 1)
    with pytest.raises(sj.errors.StructureError, match="dense: the expert's adapter stands on other values"):
        MERGERS[name]([experts[0], strange], base)


def test_one_leaf_of_all_experts_is_in_memory_at_a_time(name):
    """Leaves are made when they are needed, and gone when the next one is."""
    if name == "slerp":
        pytest.skip("two experts are all there are")
    base = {f"layer_{i}": {"dense": jnp.zeros((12, 10))} for i in range(6)}
    alive = most = 0

    class Tracked(np.ndarray):
        pass

    def gone():
        nonlocal alive
        alive -= 1

    def leaf(expert, layer):
        def make():
            nonlocal alive, most
            array = np.random.default_rng(100 * expert + layer).normal(size=(12, 10)).astype(np.float32).view(Tracked)
            weakref.finalize(array, gone)
            alive += 1
            most = max(most, alive)
            return array

        return merging.Deferred((12, 10), np.dtype("float32"), make)

    experts = [{f"layer_{i}": {"dense": leaf(e, i)} for i in range(6)} for e in range(4)]
    gc.collect(1)
    MERGERS[name](experts, base)
    assert most <= 5, f"{most} arrays of 24 were alive together"


def test_memory_mapped_experts_serve(name, tmp_path):
    base = matrices(trees.base_tree())
    experts = trees.full_experts(base, 2)
    for i, expert in enumerate(experts):
        for path, leaf in expert.items():
            np.save(tmp_path / f"{i}_{path}.npy", np.asarray(leaf))
    mapped = [{p: np.load(tmp_path / f"{i}_{p}.npy", mmap_mode="r") for p in base} for i in range(2)]
    one, other = MERGERS[name](mapped, base), MERGERS[name](experts, base)
    for path in base:
        assert_rounding(np.asarray(one[path]), np.asarray(other[path]))
