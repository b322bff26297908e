"""What every stand-in weight promises, checked for every method on every kind of kernel.

Each check runs one compiled program per method, in which all kernels are leaves; a failure names the leaf.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import subspace_jax as sj
from subspace_jax.core import SubspaceError, Weight, leaves_with_paths, path_string

from .kernels import KERNELS, loss, make_inputs, make_params, model
from .methods import METHODS, PARAMETERIZATIONS, adapt, fresh, supported, trained

FLOAT32, BFLOAT16 = 2e-5, 4e-2


# Of module scope so that pytest runs all checks of one method together, and what they share is computed once.
@pytest.fixture(params=METHODS, ids=lambda case: case.name, scope="module")
def case(request):
    return request.param


# The first ones of `METHODS`, so that their other checks run beside those of every method.
parameterizations = pytest.mark.parametrize("case", PARAMETERIZATIONS, ids=lambda case: case.name, indirect=True)


def inputs_of(case):
    return {name: x for name, x in make_inputs().items() if name in case.kernels}


def assert_close(actual, expected, what):
    """Compares two trees leaf by leaf, relative to each leaf's largest entry."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for (path, one), (_, other) in zip(leaves_with_paths(actual), leaves_with_paths(expected), strict=True):
        for (part, a), (_, b) in zip(_arrays(path, one), _arrays(path, other), strict=True):
            tolerance = BFLOAT16 if path.split("/")[0] == "bfloat16" else FLOAT32
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            error, size = np.abs(a - b).max(initial=0.0), np.abs(b).max(initial=0.0)
            assert np.isfinite(a).all(), f"{what}: {part} is not finite"
            assert error <= tolerance * max(size, 1e-2), f"{what}: {part} differs by {error} of {size}"


def _arrays(path, leaf):
    found, _ = jax.tree_util.tree_flatten_with_path(leaf)
    return [(path + jax.tree_util.keystr(inner), value) for inner, value in found]


def objective(apply):
    """A function of the trainable tree whose value is the loss and whose extra result is the outputs."""

    def value(trainable, frozen, inputs):
        outputs = apply(sj.combine(trainable, frozen), inputs)
        return loss(outputs), outputs

    return jax.value_and_grad(value, has_aux=True)


@functools.cache
def reference(case):
    """Outputs and gradients of the trainable parts, through the model on materialized arrays."""

    def apply(adapted, inputs):
        arrays = jax.tree.map(lambda w: w.materialize(), adapted, is_leaf=sj.core.is_weight)
        return model(arrays, inputs)

    trainable, frozen = sj.partition(trained(case))
    (_, outputs), gradients = jax.jit(objective(apply))(trainable, frozen, inputs_of(case))
    return outputs, gradients


@functools.cache
def contracted(case):
    """Outputs, and gradients of the whole tree, through the model with its stand-ins."""

    def value(adapted, inputs):
        outputs = sj.with_adapters(model)(adapted, inputs)
        return loss(outputs), outputs

    run = jax.jit(jax.value_and_grad(value, has_aux=True, allow_int=True))
    (_, outputs), gradients = run(trained(case), inputs_of(case))
    return outputs, gradients


plain_model = jax.jit(model)
merge = jax.jit(sj.merge)  # one program for all kernels; leaf by leaf: tests/core/test_merge.py


def test_contract_gives_what_the_merged_arrays_give(case):
    assert_close(contracted(case)[0], plain_model(merge(trained(case)), inputs_of(case)), "contract")


def test_gradients_agree_with_those_through_materialize(case):
    gradients, _ = sj.partition(contracted(case)[1])
    assert_close(gradients, reference(case)[1], "gradients")
    for path, weight in leaves_with_paths(gradients):
        for part, gradient in _arrays(path, weight):
            assert np.abs(np.asarray(gradient, np.float32)).max() > 0, f"{part} learns nothing"


def test_no_gradient_reaches_what_is_frozen(case):
    """Even where the caller differentiates the whole tree."""
    _, frozen = sj.partition(contracted(case)[1])
    for path, weight in leaves_with_paths(frozen):
        for part, gradient in _arrays(path, weight):
            if gradient.dtype != jax.dtypes.float0:
                assert not np.asarray(gradient, np.float32).any(), f"{part} is frozen and has a gradient"


@parameterizations
def test_eager_gives_the_same(case):
    outputs = sj.with_adapters(model)(trained(case), inputs_of(case))
    assert_close(outputs, reference(case)[0], "eager")


@parameterizations
def test_vmap_over_adapters_gives_the_same(case):
    """Many adapters of one base in one batch."""
    trainable, frozen = sj.partition(trained(case))
    other, _ = sj.partition(trained(case, seed=1))
    stacked = jax.tree.map(lambda *v: np.stack(v), other, trainable)

    def apply(trainable):
        return sj.with_adapters(model)(sj.combine(trainable, frozen), inputs_of(case))

    outputs = jax.jit(jax.vmap(apply))(stacked)
    outputs = jax.tree.map(np.asarray, outputs)
    assert_close(jax.tree.map(lambda y: y[1], outputs), reference(case)[0], "vmap")
    assert all(not np.array_equal(*y) for y in jax.tree.leaves(outputs))


@parameterizations
def test_scan_and_remat_give_the_same(case):
    """A rematerialized model inside a loop over batches, so that weights enter both as constants.

    One program for both, with its gradients; each alone and either inside the other: tests/core/test_control_flow.py.
    """

    def over_batches(params, inputs):
        return jax.lax.scan(lambda _, batch: (None, jax.checkpoint(model)(params, batch)), None, inputs)[1]

    inputs = jax.tree.map(lambda x: np.stack([x[::-1], x]), inputs_of(case))

    def apply(adapted, inputs):
        return jax.tree.map(lambda y: y[1], sj.with_adapters(over_batches)(adapted, inputs))

    trainable, frozen = sj.partition(trained(case))
    (_, outputs), gradients = jax.jit(objective(apply))(trainable, frozen, inputs)
    assert_close(outputs, reference(case)[0], "scan of remat")
    assert_close(gradients, reference(case)[1], "scan of remat, gradients")


def test_a_stand_in_has_the_arrays_shape_and_dtype(case):
    params = supported(case)
    for name, weight in fresh(case).items():
        assert isinstance(weight, Weight)
        assert (weight.shape, weight.dtype, weight.ndim) == (params[name].shape, params[name].dtype, params[name].ndim)
        assert weight.size == params[name].size
        formed = jax.eval_shape(weight.materialize)
        assert (formed.shape, formed.dtype) == (weight.shape, weight.dtype), name
        assert jax.eval_shape(lambda w: w.materialize(jnp.float32), weight).dtype == jnp.float32


def test_merge_at_the_start_returns_the_base(case):
    params = supported(case)
    merged = merge(fresh(case))
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    for name, array in merged.items():
        found, expected = np.asarray(array, np.float32), np.asarray(params[name], np.float32)
        if case.start == 0:
            np.testing.assert_array_equal(found, expected, name)
        else:
            # One unit in the last place of a bfloat16 residual, which is no larger than the array.
            tolerance = max(case.start, 2**-7 if name == "bfloat16" else 0.0)
            assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max(), name


def test_partition_and_combine_are_inverse(case):
    trainable, frozen = sj.partition(trained(case))
    assert jax.tree.leaves(trainable)
    chex.assert_trees_all_equal(sj.combine(trainable, frozen), trained(case))
    count = len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen))
    assert count == len(jax.tree.leaves(trained(case)))


def test_parts_of_a_partition_have_the_shardings_of_the_whole(case):
    adapted, mesh = fresh(case), jax.make_mesh((1,), ("model",))
    specs = {path: P(*(None,) * (leaf.ndim - 1), "model") for path, leaf in leaves_with_paths(make_params())}
    specs = jax.tree_util.tree_map_with_path(lambda path, _: specs[path_string(path)], make_params())
    whole = dict(jax.tree_util.tree_leaves_with_path(sj.shardings(adapted, specs, mesh)))
    parts = [sj.shardings(part, specs, mesh) for part in sj.partition(adapted)]
    found = [pair for part in parts for pair in jax.tree_util.tree_leaves_with_path(part)]
    assert len(found) == len(whole)
    assert {path: one for path, one in found if whole[path] != one} == {}


@parameterizations
def test_flattening_and_unflattening_are_inverse(case):
    adapted = trained(case)
    leaves, structure = jax.tree.flatten(adapted)
    again = jax.tree.unflatten(structure, leaves)
    assert jax.tree.structure(again) == structure
    assert hash(jax.tree.structure(again)) == hash(structure)
    assert all(type(again[name]) is type(adapted[name]) for name in adapted)
    chex.assert_trees_all_equal(again, adapted)
    assert {name: str(weight.method) for name, weight in again.items()} == {n: w.method for n, w in adapted.items()}


def test_equal_trees_trace_once(case):
    """Two trees of one method have equal metadata, so a compiled step serves both."""
    traces = []

    @jax.jit
    def step(adapted):
        traces.append(None)
        return [jnp.sum(leaf) for leaf in jax.tree.leaves(adapted)]

    # Traced alone: that a program compiles is what the other checks show.
    step.trace(fresh(case))
    step.trace(adapt(case, supported(case), seed=1))
    assert len(traces) == 1


def test_abstract_arrays_give_an_abstract_tree(case):
    shapes = jax.eval_shape(lambda params: adapt(case, params), supported(case))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, fresh(case))


def test_refused_kernels_are_refused_with_their_path(case):
    for name in case.refuses:
        with pytest.raises(SubspaceError, match=name):
            adapt(case, {name: make_params()[name]})


def test_every_weight_class_is_in_the_battery():
    def classes(value):
        if isinstance(value, Weight):
            yield type(value).__name__
            for _, inner in value.data_items():
                yield from classes(inner)

    trees = [jax.eval_shape(functools.partial(adapt, case), supported(case)) for case in METHODS]
    covered = {name for tree in trees for weight in tree.values() for name in classes(weight)}
    observing = {"Probed", "Compared", "Observed"}
    # These stand for a bias, or for what no array stands for: test_ssf.py, test_spt.py, tests/banks, tests/modules.
    beside = {"ShiftedBias", "ScaledShifted", "AdapterBank", "Bottleneck", "KeptInput", "ModuleBank"}
    beside |= {"LayerAdapter", "MixedAdapter", "QueryableLowRank"}
    beside |= {"Packed"}  # a base made by loaders, not of an array: tests/weights/test_packed.py
    beside |= {"ExpertPool"}  # its experts depend on what routers saw: tests/methods/continual/test_igsp.py
    # Live while a program runs, around others: tests/core/test_foreign_uses.py, test_joined.py.
    beside |= {"Rescaled", "Joined"}
    library = {
        name
        for name, cls in Weight.classes.items()
        if cls.__module__.startswith("subspace_jax.") and not name.startswith("_") and not inspect.isabstract(cls)
    }
    assert library - observing - beside == covered, (
        "add a line to METHODS in tests/contract/methods.py for each new weight"
    )


def test_every_kind_of_kernel_is_served_by_some_method():
    assert all(any(name not in case.refuses for case in METHODS) for name in KERNELS)
