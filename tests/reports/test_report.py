"""What `report` tells, against NumPy in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj


def trees(seed=0, stack=()):
    rng = np.random.default_rng(seed)
    base = {"block": {"kernel": rng.normal(size=(*stack, 12, 8)), "bias": rng.normal(size=8)}}
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), base)


def moved(tree, rank=2, scale=0.3, seed=1):
    rng, kernel = np.random.default_rng(seed), np.asarray(tree["block"]["kernel"], np.float64)
    change = rng.normal(size=(*kernel.shape[:-1], rank)) @ rng.normal(size=(*kernel.shape[:-2], rank, 8))
    return {"block": {**tree["block"], "kernel": jnp.asarray(kernel + scale * change, jnp.float32)}}


def expected(base, tuned, k=10, threshold=0.5):
    """The figures of one matrix, in float64."""
    base, tuned = (np.asarray(v, np.float64) for v in (base, tuned))
    values, vt = np.linalg.svd(tuned - base)[1], np.linalg.svd(tuned, full_matrices=False)[2]
    directions = int(np.searchsorted(np.cumsum(values**2), 0.9 * (values**2).sum()) + 1)
    base_vt = np.linalg.svd(base, full_matrices=False)[2]
    onto = (tuned - base) @ base_vt[:directions].T
    similarity = np.abs(vt[:k] @ base_vt.T).max(1)
    return {
        "moved": np.linalg.norm(tuned - base) / np.linalg.norm(base),
        "rank": int((values > 1e-5 * values[0]).sum()),
        "directions": directions,
        "inside": (onto**2).sum() / (values**2).sum(),
        "intruders": int((similarity < threshold).sum()),
    }


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_figures_are_those_of_numpy(rank):
    before = trees()
    after = moved(before, rank)
    [one] = sj.report(before, after)
    for name, value in expected(before["block"]["kernel"], after["block"]["kernel"]).items():
        assert getattr(one, name) == pytest.approx(value, rel=1e-4), name
    assert (one.path, one.shape, one.method, one.rounding) == ("block/kernel", (12, 8), "", 0.0)


def test_intruders_are_those_of_the_method():
    before = trees()
    after = moved(before, scale=3.0)
    found = sj.methods.intruder_dimensions.intruder_dimensions(before, after, k=4, threshold=0.7)
    [one] = sj.report(before, after, k=4, threshold=0.7)
    assert one.intruders == int(found["block/kernel"].count) > 0


def test_adapters_layers_and_other_leaves():
    before = trees(stack=(3,))
    rules = {"block/kernel": sj.lora(2), "block/bias": sj.full()}
    roles = {"block/kernel": sj.Role.dense(in_axes=(1,), out_axes=(2,), stack_axes=(0,))}
    adapted = sj.adapt(before, rules, key=jax.random.key(0), roles=roles)
    trainable, frozen = sj.partition(adapted)
    adapted = sj.combine(jax.tree.map(lambda v: v + 0.1, trainable), frozen)
    found = sj.report(before, adapted)
    assert [one.path for one in found] == [f"block/kernel[{i}]" for i in range(3)]
    assert all(one.method == "lora" and 1 <= one.rank <= 2 for one in found)
    merged = sj.merge(adapted)["block"]["kernel"]
    for i, one in enumerate(found):
        assert one.moved == pytest.approx(expected(before["block"]["kernel"][i], merged[i])["moved"], rel=1e-4)
    bias = before["block"]["bias"]
    assert found.others["block/bias"] == pytest.approx(float(0.1 * np.sqrt(8) / jnp.linalg.norm(bias)), rel=1e-4)


def test_rounding_is_what_the_dtype_loses_of_the_change():
    before = jax.tree.map(lambda v: v.astype(jnp.bfloat16), trees())
    adapted = sj.adapt(before, {"block/kernel": sj.lora(2)}, key=jax.random.key(0))
    trainable, frozen = sj.partition(adapted)
    adapted = sj.combine(jax.tree.map(lambda v: v + 0.05, trainable), frozen)
    [one] = sj.report(before, adapted)
    weight = adapted["block"]["kernel"]
    exact = np.asarray(weight.base, np.float64) + np.asarray(weight.a, np.float64) @ np.asarray(weight.b, np.float64)
    rounded = np.asarray(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16), np.float64)
    change = np.linalg.norm(exact - np.asarray(weight.base, np.float64))
    assert one.rounding == pytest.approx(np.linalg.norm(rounded - exact) / change, rel=0.02)
    assert one.rounding > 0


def test_two_trainings_are_compared():
    before = trees()
    one_way, other_way = moved(before, 1, seed=1), moved(before, 1, seed=2)
    [same] = sj.report(before, one_way, other=one_way)
    assert (round(same.cosine, 4), round(same.overlap, 4)) == (1.0, 1.0)
    [found] = sj.report(before, one_way, other=other_way)
    a, b = (np.asarray(t["block"]["kernel"] - before["block"]["kernel"], np.float64) for t in (one_way, other_way))
    assert found.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-3)
    va, vb = (np.linalg.svd(v)[2][0] for v in (a, b))
    assert found.overlap == pytest.approx((va @ vb) ** 2, rel=1e-3)


def test_nothing_moved_and_weights_of_zero():
    before = {"w": jnp.zeros((4, 3)), "v": jnp.ones((4, 3))}
    still, moved_from_zero = (
        sj.report(before, {"w": before["w"], "v": before["v"]}),
        sj.report(before, {"w": jnp.ones((4, 3)), "v": before["v"]}),
    )
    assert all((one.moved, one.rank, one.directions, one.intruders) == (0.0, 0, 0, 0) for one in still)
    assert "none of 2 matrices moved" in str(still)
    assert {one.path: one.moved for one in moved_from_zero}["w"] == float("inf")
    assert {one["path"]: one["moved"] for one in moved_from_zero.as_dict()["matrices"]} == {"w": None, "v": 0.0}


def test_files(tmp_path):
    before = trees()
    found = sj.report(before, moved(before), other=moved(before, seed=3))
    page = found.save(tmp_path / "deep" / "folder")
    text = page.read_text()
    assert "block/kernel" in text
    assert "data:image/png;base64," in text
    assert "http" not in text
    data = json.loads((page.parent / "report.json").read_text())
    assert data["matrices"][0]["rank"] == 2
    assert len(data["spectra"]["block/kernel"]) == 8
    assert (page.parent / "report.png").read_bytes().startswith(b"\x89PNG")
    assert str(found).splitlines()[0].split() == [
        *("matrix", "method", "moved", "rank", "directions", "inside", "intruders", "rounding", "cosine", "overlap")
    ]


def test_names_in_pages_are_escaped(tmp_path):
    before = {"<script>": jnp.eye(3)}
    page = sj.report(before, {"<script>": 2 * jnp.eye(3)}).save(tmp_path)
    assert "<script>" not in page.read_text()


def test_another_tree_is_refused_by_path():
    before = trees()
    with pytest.raises(sj.errors.StructureError, match="block/kernel"):
        sj.report(before, {"block": {"bias": before["block"]["bias"]}})
