"""SparseDelta: what is stored, what a step keeps, and where gradients go."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import subspace_jax as sj
from subspace_jax.core import Role
from subspace_jax.weights import SparseBlocks, SparseDelta, entries_at, flat_entries, migrate_entries, unflat_entries
from tests.tolerances import tolerance

ROLES = {
    "dense": (Role.dense(), (6, 5)),
    "heads_in_the_middle": (Role.dense((1,), (2, 0)), (2, 6, 5)),
    "conv": (Role.conv(), (3, 2, 4, 5)),
    "stacked": (Role.dense((1,), (2,), (0,)), (3, 6, 5)),
    "stacked_last": (Role.dense((0,), (1,), (2,)), (6, 5, 3)),
    "bias": (Role("bias"), (7,)),
    "stacked_scale": (Role("scale", (0,)), (3, 7)),
}


def sparse(shape, role, positions, values, mode="set", active=None, dtype=jnp.float32, seed=0):
    base = jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
    return SparseDelta(
        base=base,
        indices=jnp.asarray(positions, jnp.int32),
        values=jnp.asarray(values, jnp.float32),
        active=None if active is None else jnp.asarray(active),
        mode=mode,
        role=role,
        dtype=base.dtype,
        trainable=("values",),
    )


@pytest.mark.parametrize("name", list(ROLES))
@pytest.mark.parametrize("mode", ["set", "add"])
def test_materialize_writes_every_layers_values_and_nothing_else(name, mode):
    role, shape = ROLES[name]
    stack = role.stack_shape(shape)
    size = int(np.prod(shape) // np.prod(stack, dtype=int))
    rng = np.random.default_rng(1)
    positions = np.stack([np.sort(rng.choice(size, 4, replace=False)) for _ in range(int(np.prod(stack)))])
    positions[:, -1] = size  # padding
    positions, values = positions.reshape(*stack, 4), rng.normal(size=(*stack, 4)).astype(np.float32)
    weight = sparse(shape, role, positions, values, mode)
    # By brute force: the layer's own array, its entries counted as its matrix has them.
    moved = np.asarray(weight.base).transpose(flat_order(role, len(shape))).reshape(-1, size).copy()
    for layer, (where, what) in enumerate(zip(positions.reshape(-1, 4), values.reshape(-1, 4), strict=True)):
        for i, v in zip(where[:3], what[:3], strict=True):
            moved[layer, i] = v if mode == "set" else moved[layer, i] + v
    np.testing.assert_array_equal(flat_entries(weight.materialize(), role).reshape(-1, size), moved)
    np.testing.assert_array_equal(unflat_entries(flat_entries(weight.base, role), role, shape), weight.base)


@pytest.mark.parametrize("name", ["dense", "heads_in_the_middle", "conv", "stacked", "stacked_last"])
@pytest.mark.parametrize("mode", ["set", "add"])
def test_blocks_have_lists_of_their_own(name, mode):
    role, shape = ROLES[name]
    stack, (inputs, outputs), (rows, cols) = role.stack_shape(shape), role.sizes(shape), (3, 5)
    height, width = inputs // rows, outputs // cols
    size, rng = height * width, np.random.default_rng(1)
    assert (rows * height, cols * width) == (inputs, outputs)
    base = rng.normal(size=shape).astype(np.float32)
    lists = [np.sort(rng.choice(size, 2, replace=False)) for _ in range(int(np.prod(stack)) * rows * cols)]
    positions = np.stack(lists).reshape(*stack, rows, cols, 2)
    positions[..., 1] = np.where(rng.random(positions.shape[:-1]) < 0.5, size, positions[..., 1])  # padding
    values = rng.normal(size=positions.shape).astype(np.float32)
    weight = SparseBlocks(
        base=jnp.asarray(base),
        indices=jnp.asarray(positions, jnp.int32),
        values=jnp.asarray(values),
        mode=mode,
        role=role,
        dtype=np.dtype("float32"),
        trainable=("values",),
    )
    moved = base.transpose(role.order).reshape(-1, inputs, outputs).copy()
    picked = np.zeros((moved.shape[0], rows, cols, 2), np.float32)
    where, what = (v.reshape(picked.shape) for v in (positions, values))
    for place in np.ndindex(*picked.shape):
        if where[place] == size:
            continue
        layer, row, col, _ = place
        i, j = row * height + where[place] // width, col * width + where[place] % width
        picked[place] = moved[layer, i, j]
        moved[layer, i, j] = what[place] if mode == "set" else moved[layer, i, j] + what[place]
    expected = moved.reshape(*stack, *(shape[i] for i in (*role.in_axes, *role.out_axes)))
    np.testing.assert_array_equal(weight.materialize(), expected.transpose(np.argsort(role.order)))
    np.testing.assert_array_equal(entries_at(weight.base, weight.indices, role), picked.reshape(values.shape))
    assert weight.count == rows * cols * 2


def test_lists_of_the_whole_matrix_are_refused_where_a_device_sees_a_part_of_it():
    spec = jax.sharding.PartitionSpec("layer", "data", None)
    role, shape = ROLES["stacked"]
    weight = sparse(shape, role, np.zeros((3, 1)), np.zeros((3, 1)))
    with pytest.raises(sj.core.RoleError, match="positions count the whole matrix"):
        weight.partition_specs(spec, exact=True)
    assert weight.partition_specs(spec).values == jax.sharding.PartitionSpec("layer", None)
    whole = jax.sharding.PartitionSpec("layer", None, None)
    assert weight.partition_specs(whole, exact=True).values == jax.sharding.PartitionSpec("layer", None)


def flat_order(role, ndim):
    return role.order if role.is_matrix else (*role.stack_axes, *(i for i in range(ndim) if i not in role.stack_axes))


def test_bfloat16_base_takes_float32_values_and_casts_once():
    exact = sparse((6, 5), Role.dense(), [0, 8], [0.0, 0.0], dtype=jnp.bfloat16)
    weight = sparse(
        (6, 5), Role.dense(), [0, 8], entries_at(exact.base, exact.indices, Role.dense()), dtype=jnp.bfloat16
    )
    np.testing.assert_array_equal(weight.materialize(), weight.base)
    added = sparse((6, 5), Role.dense(), [0], [1e-3], "add", dtype=jnp.bfloat16)
    expected = (np.float32(added.base[0, 0]) + np.float32(1e-3)).astype(jnp.bfloat16)
    assert added.materialize()[0, 0] == expected
    assert added.materialize(jnp.float32)[0, 0] == np.float32(added.base[0, 0]) + np.float32(1e-3)


def uses():
    x = jax.random.normal(jax.random.key(0), (4, 3, 6))
    image = jax.random.normal(jax.random.key(1), (2, 7, 7, 4))
    conv = lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return {
        "dot": (Role.dense(), (6, 5), lambda w, x: x @ w, x),
        "tied": (Role.dense((1,), (0,)), (5, 6), lambda w, x: x @ w.T, x),
        "conv": (Role.conv(), (3, 3, 4, 5), conv, image),
        "lookup": (Role.embedding(), (6, 5), lambda w, i: jnp.take(w, i, axis=0), jnp.array([[0, 5], [5, 2]])),
        "scan": (
            Role.dense((1,), (2,), (0,)),
            (3, 6, 6),
            lambda w, x: lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, w)[0],
            x,
        ),
    }


@pytest.mark.parametrize("name", ["dot", "tied", "conv", "lookup", "scan"])
@pytest.mark.parametrize("mode", ["set", "add"])
def test_gradient_is_the_dense_gradient_at_the_positions(name, mode):
    role, shape, use, x = uses()[name]
    stack = role.stack_shape(shape)
    size = int(np.prod(shape) // np.prod(stack, dtype=int))
    positions = np.broadcast_to(np.array([0, 3, size - 1, size]), (*stack, 4))
    weight = sparse(shape, role, positions, np.ones((*stack, 4)), mode)
    loss = lambda y: jnp.sum(jnp.sin(y) * y)
    trainable, frozen = sj.partition({"w": weight})
    apply = sj.with_adapters(lambda p, x: use(p["w"], x))
    value, found = jax.value_and_grad(lambda t: loss(apply(sj.combine(t, frozen), x)))(trainable)
    dense_value, full = jax.value_and_grad(lambda w: loss(use(w, x)))(weight.materialize())
    np.testing.assert_allclose(value, dense_value, rtol=tolerance())
    expected = np.asarray(full).transpose(role.order).reshape(*stack, size)[..., [0, 3, size - 1]]
    np.testing.assert_allclose(found["w"].values[..., :3], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["w"].values[..., 3], 0)


def test_gradient_with_respect_to_the_input_is_that_of_the_changed_weight():
    weight = sparse((6, 5), Role.dense(), [1, 8], [3.0, -2.0])
    x = jax.random.normal(jax.random.key(0), (4, 6))
    apply = sj.with_adapters(lambda p, x: jnp.sum(jnp.sin(x @ p)))
    found = jax.grad(lambda x: apply(weight, x))(x)
    np.testing.assert_allclose(found, jax.grad(lambda x: jnp.sum(jnp.sin(x @ weight.materialize())))(x), rtol=1e-5)


def test_values_that_are_not_active_stay_in_use_and_get_no_gradient():
    weight = sparse((6, 5), Role.dense(), [1, 8, 9], [3.0, -2.0, 5.0], active=[True, False, True])
    assert weight.materialize()[1, 3] == -2.0
    trainable, frozen = sj.partition({"w": weight})
    x = jnp.ones((2, 6))
    through_use = lambda t: jnp.sum(sj.with_adapters(lambda p, x: x @ p["w"])(sj.combine(t, frozen), x))
    through_array = lambda t: 2 * jnp.sum(sj.combine(t, frozen)["w"].materialize())
    for function in (through_use, through_array):
        assert jax.grad(function)(trainable)["w"].values.tolist() == [2.0, 0.0, 2.0]


def test_biases_are_served_by_the_same_weight():
    bias = sparse((5,), Role("bias"), [1, 4], [3.0, -2.0])
    trainable, frozen = sj.partition({"bias": bias})
    apply = sj.with_adapters(lambda p, x: jnp.sin(x + p["bias"]).sum())
    x = jax.random.normal(jax.random.key(0), (4, 5))
    found = jax.grad(lambda t: apply(sj.combine(t, frozen), x))(trainable)["bias"].values
    expected = np.cos(np.asarray(x) + np.asarray(bias.materialize())).sum(0)[[1, 4]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def layers(count, size, stacked):
    """Square layers of which a few entries learn, and the model that applies them."""
    kernels = jax.random.normal(jax.random.key(0), (count, size, size)) / np.sqrt(size)
    method = sj.lift(1, filter_rank=1)
    if stacked:
        params, roles = {"w": kernels}, {"w": Role.dense((1,), (2,), (0,))}
    else:
        params, roles = {f"w{i}": kernels[i] for i in range(count)}, None
    adapted = sj.adapt(params, {"*": method}, key=jax.random.key(1), roles=roles)

    def model(params, x):
        if stacked:
            return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]
        for i in range(count):
            x = jnp.tanh(x @ params[f"w{i}"])
        return x

    return adapted, model


@pytest.mark.parametrize("stacked", [False, True])
def test_backward_pass_keeps_no_formed_weight(stacked):
    """Of a layer's size only the base itself is kept, once for each layer."""
    count, size = 4, 48
    adapted, model = layers(count, size, stacked)
    trainable, frozen = sj.partition(adapted)
    x = jnp.ones((5, size))
    _, pull = jax.vjp(lambda t: sj.with_adapters(model)(sj.combine(t, frozen), x), trainable)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= size * size]
    bases = jax.tree.leaves(frozen)
    assert sum(leaf.size for leaf in kept) <= count * size * size
    assert all(any(np.array_equal(leaf, base) for base in bases) for leaf in kept)


@pytest.mark.optimized
def test_compiled_step_holds_the_weights_of_one_layer_only():
    count, size = 16, 64
    adapted, model = layers(count, size, stacked=True)
    trainable, frozen = sj.partition(adapted)
    x = jnp.ones((4, size))
    apply = sj.with_adapters(model)

    def formed_first(params, x):
        return model(jax.tree.map(lambda w: w.materialize(), params, is_leaf=sj.core.is_weight), x)

    def compiled(apply):
        step = lambda t, f, x: jax.grad(lambda t: jnp.sum(apply(sj.combine(t, f), x) ** 2))(t)
        return jax.jit(step).lower(trainable, frozen, x).compile()

    layer = 4 * size * size
    found = compiled(apply)
    assert found.memory_analysis().temp_size_in_bytes < count * layer / 2
    assert compiled(formed_first).memory_analysis().temp_size_in_bytes > count * layer
    assert all(leaf.size <= trainable["w"].values.size for leaf in jax.tree.leaves(found.out_info))


def test_migration_is_scatter_to_dense_then_gather():
    rng = np.random.default_rng(0)
    size = 30
    old, new = (np.sort(rng.choice(size, 9, replace=False)) for _ in range(2))
    values = rng.normal(size=9).astype(np.float32)
    dense = np.zeros(size, np.float32)
    dense[old] = values
    found = jax.jit(migrate_entries)(jnp.asarray(values), jnp.asarray(old), jnp.asarray(new))
    np.testing.assert_array_equal(found, dense[new])
    both = migrate_entries(jnp.stack([jnp.asarray(values)] * 2), jnp.stack([old, old]), jnp.stack([new, old]))
    np.testing.assert_array_equal(both, np.stack([dense[new], values]))
    filled = migrate_entries(jnp.ones(0), jnp.zeros(0, jnp.int32), jnp.array([1]), jnp.array([5.0]))
    assert filled.tolist() == [5.0]


def test_weights_that_int32_cannot_count_are_refused():
    with pytest.raises(sj.core.RoleError, match="int32"):
        jax.eval_shape(lambda w: flat_entries(w, Role.dense()), jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32))
