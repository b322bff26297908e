"""Orthogonal Adaptation: disjoint columns of one basis, exact sums, and taking one concept out of a sum."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats
from scipy.linalg import subspace_angles

import subspace_jax as sj
from subspace_jax.core import RankError, StructureError
from subspace_jax.methods.low_rank.orthogonal_adaptation import (
    extract_concept,
    merge_concepts,
    orthogonal_adaptation,
    overlap,
)
from tests.tolerances import assert_rounding, tolerance

INPUTS, OUTPUTS = 12, 7
KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W = normal(INPUTS, OUTPUTS, seed=1)


def concept(i, rank=3, w=W, seed=0, roles=None, **options):
    """A concept with something learned."""
    adapted = sj.adapt(
        {"w": jnp.asarray(w)}, {"w": orthogonal_adaptation(rank, concept=i, **options)}, key=KEY, roles=roles
    )
    weight = adapted["w"]
    b = jnp.asarray(normal(*weight.b.shape, seed=10 * i + seed), weight.b.dtype)
    return {"w": dataclasses.replace(weight, b=b)}


def delta(adapted, w=W):
    return np.asarray(sj.merge(adapted)["w"], np.float64) - np.asarray(w, np.float64)


@pytest.mark.parametrize("basis", ["qr", "cosine"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_columns_are_orthonormal_and_those_of_other_slots_orthogonal(basis, scale):
    frames = [np.asarray(concept(i, basis=basis, basis_scale=scale)["w"].a) for i in range(4)]
    whole = np.concatenate(frames, axis=1)  # four slots of three are the whole basis
    np.testing.assert_allclose(whole.T @ whole, scale**2 * np.eye(12), atol=tolerance(norm=scale**2))
    # The order is a random one, not that of the transform or of the matrix.
    columns = np.concatenate([np.asarray(concept(i)["w"].columns) for i in range(4)])
    assert sorted(columns) == list(range(12)) != list(columns)


def test_the_basis_is_that_of_a_qr_factorization_with_positive_diagonal():
    from subspace_jax.methods.low_rank.orthogonal_adaptation._basis import draw_columns

    drawn = np.random.Generator(np.random.PCG64([0, 3, 0, 9])).standard_normal((9, 9))
    # By Gram-Schmidt, which fixes signs by itself.
    q = np.zeros((9, 9))
    for j in range(9):
        rest = drawn[:, j] - q[:, :j] @ (q[:, :j].T @ drawn[:, j])
        rest -= q[:, :j] @ (q[:, :j].T @ rest)
        q[:, j] = rest / np.linalg.norm(rest)
    np.testing.assert_allclose(draw_columns(3, 0, 9, np.arange(9), None, "qr", None), q, atol=1e-12)


def test_random_columns_share_what_the_hypergeometric_distribution_says():
    sets = [set(np.asarray(concept(i, 3, mode="random", seed=0)["w"].columns).tolist()) for i in range(4)]
    shared = sorted(sets[0] & sets[1])
    q = [np.asarray(concept(i, 3, mode="random")["w"].a) for i in range(2)]
    product = q[0].T @ q[1]
    # Ones where columns agree, zeros elsewhere: a partial permutation.
    np.testing.assert_allclose(np.sort(np.abs(product).ravel())[::-1][: len(shared)], 1, atol=1e-6)
    np.testing.assert_allclose(np.sort(np.abs(product).ravel())[::-1][len(shared) :], 0, atol=1e-6)
    found = overlap(8, 64)
    expected = stats.hypergeom(64, 8, 8)
    np.testing.assert_allclose(found, (expected.mean(), expected.pmf(0)), rtol=1e-12)


def test_gaussian_columns_are_orthogonal_in_expectation_only():
    q = [np.asarray(concept(i, 6, w=normal(300, 2), mode="gaussian")["w"].a) for i in range(2)]
    np.testing.assert_allclose(np.std(q[0]), 300**-0.5, rtol=0.05)
    assert 0.5 < np.std(q[0].T @ q[1]) * np.sqrt(300) < 1.5
    same = [np.asarray(concept(i, mode="shared")["w"].a) for i in range(2)]
    np.testing.assert_array_equal(*same)


def test_changes_of_slots_are_orthogonal_and_their_norms_add_up():
    deltas = [delta(concept(i, alpha=2.0 + i)) for i in range(3)]
    largest = max(np.abs(d).max() for d in deltas) ** 2
    for one, two in itertools.combinations(deltas, 2):
        np.testing.assert_allclose(one.T @ two, 0, atol=tolerance(size=INPUTS, norm=largest))
    weights = (1.0, -0.5, 2.0)
    total = sum(c * d for c, d in zip(weights, deltas, strict=True))
    squares = sum(c**2 * np.sum(d**2) for c, d in zip(weights, deltas, strict=True))
    np.testing.assert_allclose(np.sum(total**2), squares, rtol=1e-5)


def test_a_merge_is_the_plain_sum_in_any_order_and_task_arithmetic_gives_it():
    concepts = [concept(0), concept(1, basis_scale=0.5, alpha=5.0), concept(2)]
    weights = (1.0, 0.6, 2.0)
    params = {"w": jnp.asarray(W)}
    merged = merge_concepts(concepts, params, weights=weights)
    by_hand = sum(
        c * float(t["w"].scale) * (np.asarray(t["w"].a, np.float64) @ np.asarray(t["w"].b, np.float64))
        for c, t in zip(weights, concepts, strict=True)
    )
    assert merged["w"].a.shape == (INPUTS, 9)
    np.testing.assert_array_equal(merged["w"].base, W)
    assert_rounding(delta(merged), by_hand, size=INPUTS, dtype="float32")
    back = merge_concepts(concepts[::-1], params, weights=weights[::-1])
    assert_rounding(sj.merge(back)["w"], sj.merge(merged)["w"], size=4)
    plain = sj.merging.task_arithmetic(concepts, params, weights=weights)
    np.testing.assert_array_equal(sj.merge(plain)["w"], sj.merge(merged)["w"])
    # An input in the span of one concept's columns meets that concept alone.
    x = normal(5, 3, seed=4) @ np.asarray(concepts[1]["w"].a).T
    alone = x @ (W + weights[1] * delta(concepts[1]))
    assert_rounding(x @ np.asarray(sj.merge(merged)["w"]), alone, size=8 * INPUTS, dtype="float32")
    other = normal(5, INPUTS, seed=5)  # crosstalk is not zero for other inputs
    assert np.abs(other @ (delta(merged) - weights[1] * delta(concepts[1]))).max() > 0.1


@pytest.mark.parametrize("form", ["factors", "arrays"])
def test_every_concept_comes_back_out_of_a_merge(form):
    w = normal(2, INPUTS, OUTPUTS)
    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    options = {"w": w, "roles": roles, "per_kernel": True}
    concepts = [concept(0, **options), concept(1, basis_scale=0.5, alpha=6.0, **options), concept(2, **options)]
    params = {"w": jnp.asarray(w)}
    merged = merge_concepts(concepts, params, weights=(1.0, 0.6, 2.0))
    merged = merged if form == "factors" else sj.merge(merged)
    for weight, one in zip((1.0, 0.6, 2.0), concepts, strict=True):
        fresh = {"w": dataclasses.replace(one["w"], b=jnp.zeros_like(one["w"].b))}
        found = extract_concept(merged, params, fresh)
        assert_rounding(found["w"].b, weight * np.asarray(one["w"].b), size=16 * INPUTS)
    # Taking a concept away leaves the sum of the others.
    without = sj.merging.task_arithmetic(
        [merged, extract_concept(merged, params, concepts[1])], params, weights=(1.0, -1.0)
    )
    rest = merge_concepts([concepts[0], concepts[2]], params, weights=(1.0, 2.0))
    assert_rounding(sj.merge(without)["w"], sj.merge(rest)["w"], size=16 * INPUTS)


def test_a_step_of_descent_is_the_kernel_s_gradient_on_the_slot():
    x, target = normal(9, INPUTS, seed=2), normal(9, OUTPUTS, seed=3)
    adapted = sj.adapt(
        {"w": jnp.asarray(W)}, {"w": orthogonal_adaptation(3, concept=1, alpha=6.0, basis_scale=0.5)}, key=KEY
    )
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(lambda p: jnp.sum((x @ p["w"] - target) ** 2) / 2)
    gradient = jax.jit(jax.grad(lambda t: apply(sj.combine(t, frozen))))(trainable)
    stepped = sj.combine(jax.tree.map(lambda p, g: p - 0.1 * g, trainable, gradient), frozen)
    q = np.asarray(adapted["w"].a, np.float64)
    full = x.T.astype(np.float64) @ (x @ W - target)
    assert_rounding(delta(stepped), -0.1 * 4.0 * q @ q.T @ full, size=8 * INPUTS, dtype="float32")
    np.testing.assert_array_equal(stepped["w"].a, adapted["w"].a)
    np.testing.assert_array_equal(sj.merge(adapted)["w"], W)


def test_bases_agree_wherever_they_are_made():
    one, two = concept(1), concept(1, 3, w=normal(INPUTS, 3))  # another kernel of as many inputs
    np.testing.assert_array_equal(one["w"].a, two["w"].a)
    under_jit = jax.jit(lambda w: sj.adapt({"w": w}, {"w": orthogonal_adaptation(3, concept=1)}, key=KEY))(W)
    assert np.max(subspace_angles(np.asarray(under_jit["w"].a), np.asarray(one["w"].a))) < 1e-5
    assert np.max(subspace_angles(np.asarray(concept(1, seed=0)["w"].a), np.asarray(concept(2)["w"].a))) > 1.5
    params = {n: jnp.asarray(normal(INPUTS, 4)) for n in "ab"}
    for per_kernel in (False, True):
        rules = {"*": orthogonal_adaptation(3, concept=0, per_kernel=per_kernel)}
        tree = sj.adapt(params, rules, key=KEY)
        assert np.array_equal(tree["a"].a, tree["b"].a) != per_kernel
    w = normal(2, INPUTS, 4)
    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    layers = concept(0, w=w, roles=roles)["w"].a, concept(0, w=w, roles=roles, per_kernel=True)["w"].a
    assert [np.array_equal(a[0], a[1]) for a in layers] == [True, False]


def test_counts_and_low_precision():
    tree = sj.adapt({"w": jnp.ones((320, 640), jnp.bfloat16)}, {"w": orthogonal_adaptation(4, concept=3)}, key=KEY)
    assert sj.summary(tree).trainable == 4 * 640
    q = np.asarray(tree["w"].a)
    assert q.dtype == np.float32
    np.testing.assert_allclose(q.T @ q, np.eye(4), atol=1e-6)
    assert sj.merge(tree)["w"].dtype == jnp.bfloat16


def test_a_bank_serves_concepts_and_refuses_to_train_them():
    params = {"w": jnp.asarray(W)}
    concepts = [concept(0), concept(1, alpha=5.0), concept(2, 2)]
    bank, x, rows = sj.bank(params, concepts), normal(4, INPUTS, seed=6), jnp.array([2, 0, 3, 1])
    found = jax.jit(sj.per_row(lambda p, x: x @ p["w"]))(bank, rows, x)
    for i, row in enumerate(np.asarray(rows)):
        w = W if row == 0 else np.asarray(sj.merge(concepts[row - 1])["w"])
        assert_rounding(found[i], x[i] @ w, size=4 * INPUTS)
    with pytest.raises(StructureError, match=r"w: adapter 0 cannot go on learning in a bank"):
        sj.bank(params, concepts, trainable=True)


def test_concepts_are_one_program_and_survive_files(tmp_path):
    traces = []

    @jax.jit
    def run(tree):
        traces.append(None)
        return tree["w"].materialize()

    concepts = [concept(0), concept(1), concept(2)]
    for one in concepts:
        run(one)
    assert len(traces) == 1
    params = {"w": jnp.asarray(W)}
    sj.save_adapter(tmp_path / "one", concepts[1])
    back = sj.load_adapter(tmp_path / "one", params)
    np.testing.assert_array_equal(back["w"].columns, concepts[1]["w"].columns)
    np.testing.assert_array_equal(
        sj.merge(merge_concepts([concepts[0], back], params))["w"],
        sj.merge(merge_concepts(concepts[:2], params))["w"],
    )


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(OUTPUTS, name="dense")(x)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_linen_and_nnx(library):
    x = jnp.asarray(normal(3, INPUTS, seed=7))
    if library == "linen":
        params = Layer().init(KEY, x)["params"]["dense"]
        apply = lambda p, x: Layer().apply({"params": {"dense": p}}, x)
    else:
        graph, state = nnx.split(nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0)))
        params = nnx.to_pure_dict(state)

        def apply(p, x):
            copy = jax.tree.map(lambda v: v, state)
            nnx.replace_by_pure_dict(copy, p)
            return nnx.merge(graph, copy)(x)

    fresh = sj.adapt(params, {"kernel": orthogonal_adaptation(3, concept=1)}, key=KEY)
    tree = fresh | {"kernel": dataclasses.replace(fresh["kernel"], b=jnp.asarray(normal(3, OUTPUTS)))}
    found = sj.with_adapters(apply)(tree, x)
    np.testing.assert_allclose(found, apply(sj.merge(tree), x), atol=1e-5)
    assert np.abs(found - apply(params, x)).max() > 0.1


def test_bad_input_is_refused_by_path():
    params = {"w": jnp.asarray(W)}
    with pytest.raises(RankError, match=r"w: .*concept=4 of rank 3 needs the columns 12 to 14.*concepts 0 to 3"):
        concept(4)
    with pytest.raises(RankError, match=r"w: .*rank=13 is above the 12 inputs"):
        concept(0, 13)
    with pytest.warns(UserWarning, match=r"5 concepts of rank 3 are more columns than the 12.*0.75 on average"):
        concept(4, mode="random")
    two = functools.partial(merge_concepts, base=params)
    with pytest.raises(StructureError, match=r"w: concepts 0 and 1 share column"):
        two([concept(0), concept(0)])
    with pytest.raises(StructureError, match=r"w: concepts 0 and 1 share column .* of rank 8"):
        two([concept(1, 4), concept(2, 2)])
    made = sj.adapt(params, {"w": orthogonal_adaptation(3, concept=1, seed=1)}, key=KEY)
    with pytest.raises(StructureError, match=r"w: concept 0 is of .* seed \(0, 0\) and concept 1 with \(1, 0\)"):
        two([concept(0), made])
    with pytest.raises(StructureError, match=r"w: concept 0 has mode='slot' and concept 1 'random'"):
        two([concept(0), concept(1, mode="random")])
    with pytest.raises(StructureError, match=r"w: concept 0 has basis='qr' and concept 1 'cosine'"):
        two([concept(0), concept(1, basis="cosine")])
    with pytest.raises(StructureError, match=r"w: concept 1 has a LowRank of 'lora' here"):
        two([concept(0), sj.adapt(params, {"w": sj.lora(2)}, key=KEY)])
    merged = sj.merge(two([concept(0), concept(1)]))
    with pytest.raises(StructureError, match=r"w: the concept's mode is 'gaussian'"):
        extract_concept(merged, params, concept(0, mode="gaussian"))
    with pytest.raises(StructureError, match=r"w: base has no leaf of the concept's shape"):
        extract_concept(merged, {"v": W}, concept(0))
    with pytest.raises(StructureError, match="no weight of orthogonal_adaptation"):
        extract_concept(merged, params, params)
    for options, error in (
        ({"concept": -1}, RankError),
        ({"mode": "x"}, ValueError),
        ({"basis": "x"}, ValueError),
        ({"basis_scale": 0.0}, ValueError),
        ({"seed": 2**31}, RankError),
        ({"alpha": -1.0}, ValueError),
        ({"dropout": 1.0}, ValueError),
        ({"dtype": "float16"}, ValueError),
    ):
        with pytest.raises(error, match=f"orthogonal_adaptation: {next(iter(options))}="):
            orthogonal_adaptation(2, **{"concept": 0, **options})
