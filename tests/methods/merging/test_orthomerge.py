import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.merging import task_arithmetic, ties, tsv_m
from subspace_jax.methods.merging.orthomerge import orthomerge, procrustes, to_algebra, to_group

from ...merging import trees
from ...tolerances import assert_rounding

MEAN = functools.partial(task_arithmetic, weights=0.5)


def skew_matrix(n, size, seed=0):
    a = np.random.default_rng(seed).normal(size=(n, n))
    a = (a - a.T) / 2
    return size * a / np.linalg.norm(a)


def group(a):
    return np.linalg.solve(np.eye(len(a)) - a, np.eye(len(a)) + a)


def algebra(r):
    a = np.linalg.solve(r + np.eye(len(r)), r - np.eye(len(r)))
    return (a - a.T) / 2


def polar(m):
    u, _, vt = np.linalg.svd(m)
    return u @ vt


def test_cayley_pair():
    for n, size in ((2, 0.5), (7, 1.0), (16, 4.0)):
        a = skew_matrix(n, size)
        r = np.asarray(to_group(jnp.asarray(a, jnp.float32)), np.float64)
        assert np.abs(r.T @ r - np.eye(n)).max() < 1e-5
        assert np.linalg.det(r) == pytest.approx(1.0, abs=1e-5)
        assert_rounding(r, group(a), size=n, dtype="float32")
        assert_rounding(np.asarray(to_algebra(jnp.asarray(r, jnp.float32))), a, size=4 * n)
        back = to_group(-jnp.asarray(a, jnp.float32))
        assert_rounding(np.asarray(back), r.T, size=n, dtype="float32")
    t = 0.3
    turn = 2 * np.arctan(t)
    found = to_group(jnp.array([[0.0, -t], [t, 0.0]]))
    assert_rounding(np.asarray(found), np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]))


def test_a_half_turn_has_a_finite_coordinate():
    found = to_algebra(-jnp.eye(4))
    assert bool(jnp.isfinite(found).all())
    w = jax.random.normal(jax.random.key(0), (4, 6))
    merged = orthomerge([{"w": -w}, {"w": w}], {"w": w}, merger=MEAN)
    assert bool(jnp.isfinite(merged["w"]).all())


def test_procrustes_is_scipys_where_that_is_unique():
    linalg = pytest.importorskip("scipy.linalg")
    generator = np.random.default_rng(0)
    for seed in range(4):
        w = generator.normal(size=(6, 20))
        t = group(skew_matrix(6, 1.5, seed)) @ w + 0.1 * generator.normal(size=w.shape)
        expected = linalg.orthogonal_procrustes(w.T, t.T)[0].T
        found = np.asarray(procrustes(jnp.asarray(t, jnp.float32), jnp.asarray(w, jnp.float32)), np.float64)
        assert_rounding(found, expected, size=20, dtype="float32")
        m = t @ w.T @ found.T
        assert np.abs(m - m.T).max() < 1e-4 * np.abs(m).max()
        assert np.linalg.eigvalsh((m + m.T) / 2).min() > -1e-4 * np.abs(m).max()
        for _ in range(20):
            q = polar(generator.normal(size=(6, 6)))
            assert np.linalg.norm(found @ w - t) <= np.linalg.norm(q @ w - t)


@pytest.mark.parametrize("shape", [(8, 24), (12, 5), (32, 12), (6, 1)])
def test_nothing_to_turn_gives_the_identity_also_in_the_null_space(shape):
    w = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    np.testing.assert_allclose(procrustes(w, w), np.eye(shape[0]), atol=1e-4)
    low = w.at[:, -1].set(w[:, 0]) if shape[1] > 1 else w
    np.testing.assert_allclose(procrustes(low, low), np.eye(shape[0]), atol=1e-4)
    found = orthomerge([{"w": w}, {"w": w}], {"w": w}, merger=MEAN)
    np.testing.assert_allclose(found["w"], w, atol=1e-4)


def test_null_space_turns_as_little_as_it_can():
    """Of all rotations that fit equally well, that of the largest trace; brute force over the free plane."""
    generator = np.random.default_rng(2)
    w = generator.normal(size=(4, 2))
    t = group(skew_matrix(4, 1.0)) @ w
    found = np.asarray(procrustes(jnp.asarray(t, jnp.float32), jnp.asarray(w, jnp.float32)), np.float64)
    assert np.linalg.norm(found @ w - t) < 1e-4
    assert np.linalg.det(found) == pytest.approx(1.0, abs=1e-4)
    free = np.linalg.svd(w)[0][:, 2:]
    best = -np.inf
    for angle in np.linspace(0, 2 * np.pi, 20001):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        best = max(best, np.trace(found @ (np.eye(4) + free @ (turn - np.eye(2)) @ free.T)))
    assert np.trace(found) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("shape", [(5, 9), (5, 3)])
def test_a_reflected_expert_gets_a_rotation(shape):
    generator = np.random.default_rng(3)
    w = generator.normal(size=shape)
    mirror = np.eye(5) - 2 * np.outer(*[np.eye(5)[0]] * 2)
    found = np.asarray(procrustes(jnp.asarray(mirror @ w, jnp.float32), jnp.asarray(w, jnp.float32)), np.float64)
    assert np.linalg.det(found) == pytest.approx(1.0, abs=1e-4)
    assert np.abs(found.T @ found - np.eye(5)).max() < 1e-4


def reference(base, experts, weight, aggregate="mean", direction="theta", threshold=None):
    """The equations in float64, for matrices whose inputs are fewer than their outputs."""
    deltas = [e - base for e in experts]
    mean = np.mean(deltas, axis=0)
    coordinates, rests = [], []
    for delta in deltas:
        explained = delta.copy()
        if threshold is not None:
            for j in range(base.shape[1]):
                norms = max(np.linalg.norm(delta[:, j]) * np.linalg.norm(mean[:, j]), 1e-6)
                if not delta[:, j] @ mean[:, j] / norms < threshold:
                    explained[:, j] = 0
        coordinates.append(algebra(polar((base + explained) @ base.T)))
        rests.append(base + delta - group(coordinates[-1]) @ base)
    lengths = [np.linalg.norm(a) for a in coordinates]
    total = sum(
        a if direction == "theta" else a / n if n > 1e-5 else 0 * a for a, n in zip(coordinates, lengths, strict=True)
    )
    length = {"mean": np.mean, "median": np.median, "max": np.max}[aggregate](lengths)
    merged = group(length * total / np.linalg.norm(total)) if np.linalg.norm(total) > 1e-8 else np.eye(len(base))
    return merged @ base + weight * sum(rests)


@pytest.mark.parametrize("aggregate", ["mean", "median", "max"])
@pytest.mark.parametrize("direction", ["theta", "uniform"])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.6])
def test_full_experts_equal_float64_numpy(aggregate, direction, threshold):
    generator = np.random.default_rng(4)
    w = generator.normal(size=(6, 15))
    experts = [group(skew_matrix(6, s, s)) @ w + 0.05 * generator.normal(size=w.shape) for s in (1, 2, 3)]
    found = orthomerge(
        [{"w": jnp.asarray(e, jnp.float32)} for e in experts],
        {"w": jnp.asarray(w, jnp.float32)},
        aggregate=aggregate,
        direction=direction,
        targets="all" if threshold is None else "conflicts",
        threshold=threshold or 0.0,
    )
    expected = reference(w, experts, 0.2, aggregate, direction, threshold)
    np.testing.assert_allclose(found["w"], expected, atol=2e-4)


def test_conflicts_bounds_are_the_other_variants():
    base = {"w": jax.random.normal(jax.random.key(0), (6, 9))}
    experts = trees.full_experts(base, 3)
    run = functools.partial(orthomerge, experts, base, merger=MEAN)
    np.testing.assert_allclose(run(targets="conflicts", threshold=1.5)["w"], run()["w"], atol=1e-5)
    plain = task_arithmetic(experts, base, weights=0.5)["w"]
    np.testing.assert_allclose(run(targets="conflicts", threshold=-1.0)["w"], plain, atol=1e-4)


def test_lora_experts_stacks_embeddings_and_vectors():
    base = trees.base_tree()
    roles = trees.ROLES | {"wide": sj.Role.embedding()}
    experts = trees.adapted_experts(base, [sj.lora(rank=2), sj.lora(rank=3)])
    experts = [e | {"bias": base["bias"] + i} for i, e in enumerate(experts, 1)]
    merged = orthomerge(experts, base, roles=roles)
    start, moved = trees.arrays(base), [trees.arrays(e) for e in experts]
    for layer in range(3):  # every layer of a stack by itself
        expected = base_one(start["stack"][layer], [m["stack"][layer] for m in moved])
        np.testing.assert_allclose(merged["stack"].value[layer], expected, atol=2e-3)
    expected = base_one(start["wide"].T, [m["wide"].T for m in moved]).T
    np.testing.assert_allclose(merged["wide"].value, expected, atol=2e-3)
    assert_rounding(np.asarray(merged["bias"]), np.asarray(base["bias"] + 0.2 * 3), size=4)


def base_one(start, moved):
    """One matrix by the library in the orientation that is turned at its input side."""
    experts = [{"w": jnp.asarray(m, jnp.float32)} for m in moved]
    return np.asarray(orthomerge(experts, {"w": jnp.asarray(start, jnp.float32)})["w"])


def test_auto_turns_the_smaller_side():
    base = {"w": jax.random.normal(jax.random.key(0), (10, 4))}
    experts = trees.full_experts(base, 2)
    run = functools.partial(orthomerge, experts, base)
    assert np.array_equal(run(side="auto")["w"], run(side="out")["w"])
    assert not np.allclose(run(side="in")["w"], run(side="out")["w"])


def ofts(base, sizes, **options):
    adapted = sj.adapt(base, {"w": sj.oft(block_size=4, **options)}, key=jax.random.key(0))
    shape = adapted["w"].skew_entries.shape
    return [
        {"w": dataclasses.replace(adapted["w"], skew_entries=s * jax.random.normal(jax.random.key(i), shape))}
        for i, s in enumerate(sizes, 1)
    ]


def test_oft_adapters_merge_to_an_oft_adapter_of_one_length_a_layer(tmp_path):
    base = {"w": jax.random.normal(jax.random.key(0), (12, 9))}
    experts = ofts(base, [0.1, 0.3, 0.2])
    merged = orthomerge(experts, base)
    entries = [np.asarray(e["w"].skew_entries, np.float64) for e in experts]
    total, lengths = sum(entries), [np.linalg.norm(e) for e in entries]
    assert_rounding(np.asarray(merged["w"].skew_entries), np.mean(lengths) * total / np.linalg.norm(total))
    values = [np.linalg.svd(v, compute_uv=False) for v in (base["w"], merged["w"].materialize())]
    assert_rounding(values[1], values[0], size=12)
    gram = np.asarray(merged["w"].materialize(), np.float64)
    assert_rounding(gram.T @ gram, np.asarray(base["w"].T @ base["w"]), size=24, dtype="float32")
    same = orthomerge([experts[0]] * 4, base)
    assert_rounding(np.asarray(same["w"].skew_entries), entries[0])
    opposite = {"w": dataclasses.replace(experts[0]["w"], skew_entries=-experts[0]["w"].skew_entries)}
    assert not np.any(orthomerge([experts[0], opposite], base)["w"].skew_entries)
    path = sj.save_adapter(tmp_path / "merged.safetensors", merged, base=base)
    again = sj.load_adapter(path, base)
    assert np.array_equal(again["w"].skew_entries, merged["w"].skew_entries)


def test_oft_of_unequal_blocks_and_gains():
    base = {"w": jax.random.normal(jax.random.key(0), (12, 9))}
    one, other = ofts(base, [0.1, 0.2])
    small = sj.adapt(base, {"w": sj.oft(block_size=3)}, key=jax.random.key(0))
    assert type(orthomerge([one, small], base)["w"]).__name__ == "Full"
    gains = [dataclasses.replace(e["w"], output_scale=jnp.full(9, s)) for e, s in ((one, 1.0), (other, 3.0))]
    assert_rounding(np.asarray(orthomerge([{"w": g} for g in gains], base)["w"].output_scale), np.full(9, 2.0))
    bad = dataclasses.replace(other["w"], skew_entries=other["w"].skew_entries.at[0, 0].set(jnp.nan))
    with pytest.raises(sj.errors.NonFiniteError, match="w: expert 1"):
        orthomerge([one, {"w": bad}], base)
    with pytest.raises(sj.errors.StructureError, match="w: the expert's adapter stands on other values"):
        orthomerge([one, {"w": dataclasses.replace(other["w"], base=base["w"] + 1)}], base)


@pytest.mark.parametrize("merger", [functools.partial(ties, density=1.0), tsv_m, task_arithmetic])
def test_residuals_go_through_the_other_merger(merger):
    base = {"w": jax.random.normal(jax.random.key(0), (6, 9)), "v": jax.random.normal(jax.random.key(1), (5, 7))}
    experts = trees.full_experts(base, 2)
    seen = {}

    def look(residuals, zeros):
        assert all(not np.any(z) for z in zeros.values())
        seen.update({p: [np.asarray(r[p].make().array) for r in residuals] for p in zeros})
        seen["merged"] = merger(residuals, zeros)
        return dict(seen["merged"])

    merged = orthomerge(experts, base, merger=look, scale=0.7)
    without = orthomerge(experts, base, merger=look, scale=0.0)
    for path in base:
        rest = np.asarray(merged[path]) - np.asarray(without[path])
        np.testing.assert_allclose(rest, 0.7 * np.asarray(seen["merged"][path]), atol=1e-5)
        values = [np.linalg.svd(v, compute_uv=False) for v in (base[path], without[path])]
        assert_rounding(values[1], values[0], size=12)


def test_under_jit_and_order():
    base = trees.base_tree()
    experts = trees.full_experts(base, 3)
    found = jax.jit(functools.partial(orthomerge, roles=trees.ROLES))(experts, base)
    expected = orthomerge(experts[::-1], base, roles=trees.ROLES)
    for path in trees.SHAPES:
        np.testing.assert_allclose(found[path], expected[path], atol=2e-3)


@pytest.mark.parametrize(
    "options", [{"targets": "some"}, {"aggregate": "sum"}, {"direction": "x"}, {"side": "left"}, {"scale": "1"}]
)
def test_bad_options_are_refused(options):
    base = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=f"orthomerge: {next(iter(options))}="):
        orthomerge([base, base], base, **options)
