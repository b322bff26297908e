"""Axis bookkeeping of roles and weights: folding, splitting, reshaping, partition specs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import subspace_jax as sj
from subspace_jax.core import Full, RoleError, Weight, product
from subspace_jax.weights import LowRank

from .helpers import close, dense, normal


def low_rank(shape, role, seed=0):
    stack = [shape[i] for i in role.stack_axes]
    inputs, outputs = (int(np.prod([shape[i] for i in axes])) for axes in (role.in_axes, role.out_axes))
    factors = {
        "a": jnp.asarray(normal(seed, *stack, inputs, 2)),
        "b": jnp.asarray(normal(seed + 1, *stack, 2, outputs)),
    }
    base = jnp.asarray(normal(seed + 2, *shape))
    return LowRank(base=base, **factors, scale=1.5, role=role, dtype=np.dtype("float32"), trainable=("a", "b"))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 2), st.integers(1, 3))
def test_role_folds_any_axes(order, stacked, inputs):
    if stacked + inputs >= 4:
        inputs, stacked = 1, min(stacked, 2)
    shape = (2, 3, 4, 5)
    role = sj.Role.dense(order[stacked : stacked + inputs], order[stacked + inputs :], order[:stacked])
    array = normal(0, *shape)
    matrix = np.asarray(role.matrix(jnp.asarray(array)))
    sizes = [shape[i] for i in order]
    assert matrix.shape == (
        *sizes[:stacked],
        np.prod(sizes[stacked : stacked + inputs]),
        np.prod(sizes[stacked + inputs :]),
    )
    for index in itertools.product(*map(range, shape)):
        place = [index[i] for i in order]
        row = np.ravel_multi_index(place[stacked : stacked + inputs], sizes[stacked : stacked + inputs])
        column = np.ravel_multi_index(place[stacked + inputs :], sizes[stacked + inputs :])
        assert float(matrix[(*place[:stacked], row, column)]) == array[index]
    np.testing.assert_array_equal(role.unmatrix(jnp.asarray(matrix), shape), array)


@pytest.mark.parametrize(
    "role",
    [
        sj.Role.dense((0,), (2,)),
        sj.Role.dense((0,), (0, 1, 2)),
        sj.Role.dense((0, 1), (2, 3)),
        sj.Role.dense((0, 1), (-1,)),
    ],
)
def test_roles_that_do_not_fit_the_shape(role):
    with pytest.raises(RoleError, match=r"do not cover.*3 axes"):
        role.matrix(jnp.zeros((2, 3, 4)))


ROLES = [
    ((3, 6, 4), sj.Role.dense((1,), (2,), (0,))),
    ((6, 3, 4), sj.Role.dense((0,), (2,), (1,))),
    ((6, 4, 3), sj.Role.dense((0,), (1,), (2,))),
    ((2, 6, 3, 4), sj.Role.dense((1,), (3,), (2, 0))),
    ((4, 3, 6), sj.Role.dense((2,), (0,), (1,))),
]


@pytest.mark.parametrize(("shape", "role"), ROLES)
def test_one_layer_of_a_stack(shape, role):
    weight, whole = low_rank(shape, role), np.asarray(dense(low_rank(shape, role)))
    for axis in role.stack_axes:
        few = np.array([2, 0]) % shape[axis]
        mapped, rebuild = weight.split_stack(axis)
        assert {len(v) for v in mapped.values()} == {shape[axis]}
        one = rebuild(jax.tree.map(lambda v: v[1], mapped))
        close(one.materialize(), np.take(whole, 1, axis))
        two = weight.map_stacked(axis, lambda v, place, few=few: jnp.take(v, few, place))
        close(two.materialize(), np.take(whole, few, axis))
    assert not weight.can_split(role.in_axes[0], loop=False)


@pytest.mark.parametrize(
    ("shape", "role", "new"),
    [
        ((6, 8), sj.Role.dense(), (6, 2, 4)),
        ((6, 8), sj.Role.dense(), (2, 3, 8)),
        ((6, 8), sj.Role.dense(), (1, 6, 8)),
        ((6, 8), sj.Role.dense(), (6, 8, 1)),
        ((6, 8), sj.Role.dense(), (3, 2, 1, 4, 2)),
        ((1, 8), sj.Role.dense(), (1, 2, 4)),
        ((8, 6), sj.Role.dense((1,), (0,)), (2, 4, 6)),
        ((2, 3, 8), sj.Role.dense((0, 1), (2,)), (6, 8)),
        ((3, 6, 2, 4), sj.Role.dense((1,), (2, 3), (0,)), (3, 6, 8)),
        ((1, 6, 8), sj.Role.dense((1,), (2,), (0,)), (1, 6, 2, 4)),
        ((6, 8, 3), sj.Role.dense((0,), (1,), (2,)), (6, 2, 4, 3)),
        ((4, 6, 8), sj.Role.dense((1,), (2,), (0,)), (2, 2, 6, 8)),
        ((2, 2, 6, 8), sj.Role.dense((2,), (3,), (0, 1)), (4, 6, 8)),
    ],
)
def test_reshape_within_groups(shape, role, new):
    weight = low_rank(shape, role)
    found = weight.reshape(new)
    assert found is not None
    assert found.shape == new
    close(found.materialize(), np.reshape(dense(weight), new))


@pytest.mark.parametrize(
    ("shape", "role", "new"),
    [
        ((6, 8), sj.Role.dense(), (48,)),
        ((6, 8), sj.Role.dense(), (4, 12)),
        ((6, 8), sj.Role.dense(), (8, 6)),
        ((1, 8), sj.Role.dense(), (2, 4)),
        ((2, 3, 4), sj.Role.dense((1,), (0, 2)), (6, 4)),
        ((3, 6, 8), sj.Role.dense((1,), (2,), (0,)), (18, 8)),
    ],
)
def test_reshape_across_groups_is_none(shape, role, new):
    assert low_rank(shape, role).reshape(new) is None


def test_partition_specs_follow_the_axes():
    weight = low_rank((3, 6, 2, 4), sj.Role.dense((1,), (2, 3), (0,)))
    specs = weight.partition_specs(P("layer", "data", ("model", "pod")))
    assert specs.base == P("layer", "data", ("model", "pod"), None)
    assert specs.a == P("layer", "data", None)
    assert specs.b == P("layer", None, ("model", "pod"))
    # A split of the second output axis does not carry over to their product.
    loose = weight.partition_specs(P(None, None, None, "model"))
    assert loose.b == P(None, None, None)
    assert loose.base == P(None, None, None, "model")
    with pytest.raises(RoleError, match="only the first can be split"):
        weight.partition_specs(P(None, None, None, "model"), exact=True)


def test_a_weight_is_a_pytree_under_every_transformation():
    weight = low_rank((3, 6, 4), sj.Role.dense((1,), (2,), (0,)))
    assert len(jax.tree.leaves(weight)) == 4
    assert jax.tree.structure(weight) == jax.tree.structure(jax.tree.map(lambda v: v + 1, weight))
    paths = [sj.core.path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path({"w": weight})]
    assert paths == ["w/base", "w/a", "w/b", "w/scale"]
    assert sj.core.is_weight(jax.eval_shape(lambda w: w, weight))
    close(jax.jit(lambda w: w.materialize())(weight), dense(weight))
    assert (weight.ndim, weight.size, weight.rank) == (3, 72, 2)


def test_every_weight_is_known_by_its_class():
    assert Weight.classes["LowRank"] is LowRank
    assert Weight.classes["Full"] is Full


def test_full_is_the_array_itself():
    value = jnp.asarray(normal(0, 2, 3))
    weight = Full(value=value, role=sj.Role("other"), dtype=value.dtype, trainable=("value",))
    assert weight.materialize() is not None
    np.testing.assert_array_equal(weight.materialize(jnp.bfloat16), value.astype(jnp.bfloat16))
    frozen = Full(value=value, role=sj.Role("other"), dtype=value.dtype, trainable=())
    gradient = jax.grad(lambda w: sj.with_adapters(lambda v: (v**2).sum())(w))
    np.testing.assert_array_equal(gradient(weight).value, 2 * value)
    assert not np.asarray(gradient(frozen).value).any()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_product_of_named_axes(data):
    """Against einsum, whose letters are the labels."""
    letters = data.draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True))
    left = data.draw(st.lists(st.sampled_from(letters), unique=True))
    right = data.draw(st.lists(st.sampled_from(letters), unique=True))
    both = [n for n in left if n in right]
    summed = data.draw(st.lists(st.sampled_from(both), unique=True)) if both else []
    out = data.draw(st.permutations([n for n in dict.fromkeys([*left, *right]) if n not in summed]))
    sizes = dict(zip("abcde", (2, 3, 1, 4, 2), strict=True))
    x, y = (normal(i, *(sizes[n] for n in names)) for i, names in enumerate((left, right)))
    found = product(jnp.asarray(x), tuple(left), jnp.asarray(y), tuple(right), tuple(out))
    close(
        found,
        np.einsum(
            x, ["abcde".index(n) for n in left], y, ["abcde".index(n) for n in right], ["abcde".index(n) for n in out]
        ),
    )


def test_summary_rows_and_table():
    params = {"a": {"w": normal(0, 60, 40), "b": normal(1, 40)}, "s": np.float32(2), "n": np.int32(1)}
    adapted = sj.adapt(params, {"a/w": sj.lora(3), "a/b": sj.full()}, key=jax.random.key(0))
    found = sj.summary(adapted)
    rows = {r.path: r for r in found}
    assert (rows["a/w"].method, rows["a/w"].shape, rows["a/w"].rank) == ("lora", (60, 40), 3)
    assert (rows["a/w"].trainable, rows["a/w"].size) == (3 * 100, 2400)
    assert (rows["a/b"].method, rows["a/b"].trainable) == ("full", 40)
    assert (rows["s"].method, rows["s"].trainable, rows["s"].size) == ("", 0, 1)
    assert (found.trainable, found.size) == (340, 2442)
    text = str(found)
    assert "a/w" in text
    assert "2 other leaves" in text
    assert f"{100 * 340 / 2442:.3f}%" in text
    assert all(len(line) < 100 for line in text.splitlines())
    abstract = jax.eval_shape(lambda: adapted)
    assert sj.summary(abstract).rows == found.rows
    assert str(sj.summary({}))
