"""Where the arrays of adapters and optimizer states lie: specs by hand, on a mesh of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import subspace_jax as sj
from subspace_jax.core import StructureError

from .eight_devices import KINDS, run_on_8_devices

MESH = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
SPECS = {"w": P("data", "model"), "stack": P(None, "model", "data"), "heads": P("data", "model", None), "bias": P()}
SHAPES = {"w": (8, 6), "stack": (3, 6, 8), "heads": (8, 2, 4), "bias": (6,)}
ROLES = {
    "stack": sj.Role.dense((1,), (2,), (0,)),
    "heads": sj.Role.dense((0,), (1, 2)),
}
KERNELS = ("w", "stack", "heads")


def make(method):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
    rules = {name: method for name in KERNELS} | {"bias": sj.full()}
    return params, sj.adapt(params, rules, key=jax.random.key(0), roles=ROLES)


def specs_of(tree):
    return jax.tree.map(lambda s: s.spec, tree)


def test_factors_are_split_as_the_axes_that_they_share():
    _, adapted = make(sj.lora(2))
    found = specs_of(sj.shardings(adapted, SPECS, MESH))
    assert found["w"] == dataclasses.replace(
        adapted["w"], base=P("data", "model"), a=P("data", None), b=P(None, "model"), scale=P()
    )
    assert (found["stack"].a, found["stack"].b) == (P(None, "model", None), P(None, None, "data"))
    assert (found["heads"].a, found["heads"].b) == (P("data", None), P(None, "model"))
    assert found["bias"].value == P(None)


def on_a_pod(method, sizes=(4, 2)):
    """Specs on a mesh of several devices, of which none has to be there."""
    _, adapted = make(method)
    return adapted, specs_of(sj.shardings(adapted, SPECS, AbstractMesh(sizes, ("data", "model"))))


def test_a_rank_as_long_as_the_weight_is_split_over_the_mesh_axes_left_over():
    _, found = on_a_pod(sj.osf(2))  # ranks 2 and 4 of 6 or 8
    assert (found["w"].left, found["w"].right) == (P("data", "model"), P("data", "model"))
    assert (found["stack"].left, found["stack"].right) == (P(None, "model", "data"), P(None, "model", "data"))
    assert (found["heads"].left, found["heads"].right) == (P("data", "model"), P(None, "model"))  # 6 is not 4 times 1
    assert (found["w"].high_left, found["w"].high_right) == (P("data", "model"), P(None, "model"))  # nor is 2
    assert found["stack"].core == P(None, None)


def test_entries_are_split_over_all_mesh_axes_of_the_weight_that_divide_their_number():
    adapted, found = on_a_pod(sj.lift(4, filter_rank=2))  # all 48 entries
    assert adapted["w"].count == 48
    assert found["w"].indices == found["w"].values == P(("data", "model"))
    assert found["stack"].values == P(None, ("model", "data"))
    _, found = on_a_pod(sj.lift(1, filter_rank=2))  # 14 entries
    assert (found["w"].values, found["stack"].values) == (P("model"), P(None, "model"))
    assert found["heads"].values == P(("data", "model"))
    _, found = on_a_pod(sj.lift(1, filter_rank=2, blocks=(2, 2)))
    assert found["w"].indices == found["w"].values == P("data", "model", None)
    assert found["stack"].values == P(None, "model", "data", None)


def test_small_ranks_stay_whole():
    for method in (sj.lora(4), sj.pissa(4)):
        _, found = on_a_pod(method)
        assert [s for s in jax.tree.leaves(found["w"]) if s == P("data", None)], "no factor has the input axis"
        assert (found["stack"].a, found["stack"].b) == (P(None, "model", None), P(None, None, "data"))


@pytest.mark.slow
def test_split_entries_and_ranks_train_as_on_one_device():
    lines, output = run_on_8_devices(__file__)
    assert len(lines) == 5 * len(KINDS), output


@pytest.mark.parametrize("kind", ["arrays", "shardings", "specs"])
def test_the_base_is_given_in_three_ways(kind):
    params, adapted = make(sj.lora(2))
    named = {name: NamedSharding(MESH, spec) for name, spec in SPECS.items()}
    base = {"arrays": jax.device_put(params, named), "shardings": named, "specs": SPECS}[kind]
    expected = sj.shardings(adapted, SPECS, MESH)
    assert sj.shardings(adapted, base, MESH if kind == "specs" else None) == expected
    placed = jax.device_put(adapted, expected)
    assert jax.tree.map(lambda v: v.sharding, placed) == expected


def test_parts_of_a_partition_have_the_shardings_of_the_whole():
    _, adapted = make(sj.lora(2))
    whole = sj.shardings(adapted, SPECS, MESH)
    trainable, frozen = sj.partition(adapted)
    found = sj.shardings(trainable, SPECS, MESH)
    assert jax.tree.structure(found) == jax.tree.structure(trainable)
    assert found["w"].a == whole["w"].a
    assert found["w"].base is None
    assert sj.shardings(frozen, SPECS, MESH)["w"].base == whole["w"].base


# What belongs to which part of the parameter, on a mesh of explicit axes and of automatic ones.
OPTIMIZERS = {
    "adam": (optax.adam(1e-3), lambda s: s[0].mu["w"], P("data", "model"), P("data", "model")),
    "in_subspace": (
        sj.optim.in_subspace(optax.scale_by_adam(), rank=2, side="in", roles=ROLES),
        lambda s: (s.basis["w"], s.inner.mu["w"], s.basis["stack"]),
        (P("data", None), P(None, "model"), P(None, "model", None)),
        (P("data", "model"), P("data", "model"), P(None, "model", "data")),
    ),
    "coso": (
        sj.coso(1e-3, 2, 3, side="in", roles=ROLES),
        lambda s: (s.history["w"], s.mu["w"]),
        (P("data", None), P(None, "model")),
        (P("data", "model"), P("data", "model")),
    ),
    "dct_adam": (
        sj.methods.dct_lowrank.scale_by_dct_adam(2, roles=ROLES),
        lambda s: (s.error["w"], s.mu["w"]),
        (P("data", "model"), P("data", None)),
        (P("data", "model"), P("data", None)),  # its columns are chosen by index
    ),
}


@pytest.mark.parametrize("axes", ["explicit", "auto"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_split_as_what_they_belong_to(name, axes):
    optimizer, parts, *expected = OPTIMIZERS[name]
    mesh = MESH if axes == "auto" else jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params, _ = make(sj.full())
    placed = sj.shardings(params, SPECS, mesh)
    found = sj.state_shardings(optimizer, params, placed)
    assert jax.tree.structure(found) == jax.tree.structure(jax.eval_shape(optimizer.init, params))
    assert all(isinstance(s, NamedSharding) and s.mesh == mesh for s in jax.tree.leaves(found))
    assert specs_of(parts(found)) == expected[axes == "auto"]
    if axes == "auto":
        state = jax.jit(optimizer.init, out_shardings=found)(params)
        assert jax.tree.map(lambda v: v.sharding, state) == found


def test_axes_that_do_not_divide_the_subspace_leave_it_whole():
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, _ = make(sj.full())
    placed = sj.shardings(params, SPECS, mesh)
    optimizer = sj.optim.in_subspace(optax.scale_by_adam(), rank=2, side="in", select="w")
    found = sj.state_shardings(optimizer, params, placed)
    assert (found.basis["w"].spec, found.inner.mu["w"].spec) == (P("data", "model"), P(None, "model"))
    # The same where frozen weights lie beside those that learn.
    both = optax.GradientTransformation(lambda trees: optimizer.init(trees[0]), optax.identity().update)
    beside = sj.state_shardings(both, (params, {"w": jnp.ones((8, 4))}), (placed, {"w": placed["w"]}))
    assert beside.basis["w"].spec == P("data", None)  # two parameters have this name, so no mesh axis is added


def test_states_of_adapters_follow_their_factors():
    _, adapted = make(sj.lora(2))
    trainable, _ = sj.partition(adapted)
    found = sj.state_shardings(optax.adam(1e-3), trainable, sj.shardings(trainable, SPECS, MESH))
    assert (found[0].nu["stack"].a.spec, found[0].nu["stack"].b.spec) == (P(None, "model", None), P(None, None, "data"))


def test_what_is_missing_is_named():
    _, adapted = make(sj.lora(2))
    with pytest.raises(StructureError, match=r"bias: shardings: base has nothing at this path"):
        sj.shardings(adapted, {n: s for n, s in SPECS.items() if n != "bias"}, MESH)
    with pytest.raises(StructureError, match=r"on no mesh"):
        sj.shardings(adapted, SPECS)
    with pytest.raises(StructureError, match=r"w: shardings: base has .*ArrayImpl here"):
        sj.shardings({"w": adapted["w"]}, {"w": jnp.ones((8, 6))})
    with pytest.raises(StructureError, match="holds no NamedSharding"):
        sj.state_shardings(optax.adam(1e-3), {}, {})
