import collections
import copy
import dataclasses
import json
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import Weight
from subspace_jax.io import ManifestError, describe, rebuild
from subspace_jax.weights import LowRank


class Pair(NamedTuple):
    left: object
    right: object


def through_json(manifest):
    return json.loads(json.dumps(manifest, allow_nan=False))


def round_trip(tree, base=None):
    manifest, arrays = describe(tree, base)
    return rebuild(through_json(manifest), arrays, base)


def test_mixed_tree(adapted, assert_same_bits):
    assert_same_bits(round_trip(adapted), adapted)


def test_both_halves_of_a_partition(adapted, assert_same_bits):
    for half in sj.partition(adapted):
        assert_same_bits(round_trip(half), half)


def test_nested_and_quantized_weights(assert_same_bits):
    params = {"w": jax.random.normal(jax.random.key(0), (16, 8)), "v": jnp.ones((8, 8))}
    tree = sj.adapt(params, {"w": sj.dora(sj.pissa(rank=2)), "v": sj.qpissa(rank=2)}, key=jax.random.key(1))
    back = round_trip(tree)
    assert_same_bits(back, tree)
    assert back["w"].direction.method == tree["w"].direction.method
    manifest, arrays = describe(tree)
    assert {"w/direction/a", "w/magnitude", "v/base/codes"} <= arrays.keys()
    del manifest, arrays


def test_python_values_and_containers(assert_same_bits):
    tree = {
        "a": [1, 2.5, "text", True, None, -0.0, 10**25],
        "numbers": {3: (np.float32(1.5), np.arange(3)), -1: np.float64(2)},
        "pair": Pair({}, []),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
        "weak": jnp.asarray(0.5),
        "empty": jnp.zeros((0, 3)),
    }
    back = round_trip(tree)
    assert_same_bits(back, tree)
    assert list(back) == list(tree)
    assert type(back["pair"]) is Pair
    assert str(jax.random.key_impl(back["keys"])) == "rbg"


def test_named_tuples_without_fields(assert_same_bits):
    tree = {"state": (optax.EmptyState(), optax.adam(1e-3).init(jnp.ones(2)))}
    back = round_trip(tree)
    assert_same_bits(back, tree)
    assert type(back["state"][0]) is optax.EmptyState


def test_named_tuple_of_unloaded_module():
    manifest, arrays = describe(Pair(jnp.ones(2), None))
    text = json.dumps(manifest).replace(f"{__name__}:Pair", "not_loaded_here:Pair")
    back = rebuild(json.loads(text), arrays)
    assert type(back).__name__ == "Pair"
    assert back.left.shape == (2,)
    assert type(back) is type(rebuild(json.loads(text), arrays))
    assert "not_loaded_here" not in sys.modules


def test_other_class_of_the_same_place_is_not_called():
    manifest, arrays = describe(Pair(jnp.ones(2), None))
    for other in ("subprocess:Popen", "collections:OrderedDict", f"{__name__}:round_trip", "builtins:eval"):
        text = json.dumps(manifest).replace(f"{__name__}:Pair", other)
        assert isinstance(rebuild(json.loads(text), arrays), tuple)


@pytest.mark.parametrize("bad", [collections.OrderedDict(a=1), {1.5: 2}, {("a",): 1}, {1, 2}, object(), b"x", 1j])
def test_refuses_foreign_values_by_path(bad):
    with pytest.raises(ManifestError, match="here/0"):
        describe({"here": [bad]})


def test_refuses_paths_that_collide():
    with pytest.raises(ManifestError, match="'a/b' is the path of two arrays"):
        describe({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})
    with pytest.raises(ManifestError, match="'a/3' is the path of two arrays"):
        describe({"a": {"3": jnp.ones(1), 3: jnp.ones(1)}})


def test_refuses_tracers_and_deleted_arrays():
    with pytest.raises(ManifestError, match="w: is traced"):
        jax.jit(lambda x: describe({"w": x}) and x)(1.0)
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(ManifestError, match="w: the array was donated"):
        describe({"w": gone})


def test_cycle_is_an_error():
    tree = {}
    tree["a"] = tree
    with pytest.raises(ManifestError, match="too deeply"):
        describe(tree)


def test_strict_both_ways(adapted):
    manifest, arrays = describe(adapted)
    name = "blocks/0/kernel/a"
    with pytest.raises(ManifestError, match=rf"'{name}' is missing, expected bfloat16\[4, 2\]"):
        rebuild(manifest, {k: v for k, v in arrays.items() if k != name})
    with pytest.raises(ManifestError, match="'more' is not expected"):
        rebuild(manifest, arrays | {"more": jnp.ones(2)})
    with pytest.raises(ManifestError, match=rf"'{name}' holds bfloat16\[2, 4\], expected bfloat16\[4, 2\]"):
        rebuild(manifest, arrays | {name: arrays[name].T})
    with pytest.raises(ManifestError, match=rf"'{name}' holds float32\[4, 2\], expected bfloat16\[4, 2\]"):
        rebuild(manifest, arrays | {name: arrays[name].astype(jnp.float32)})


def test_base_leaves_out_what_is_equal(params, adapted, assert_same_bits):
    manifest, arrays = describe(adapted, params)
    assert set(arrays) == {
        *("embed/value", "blocks/0/kernel/a", "blocks/0/kernel/b", "blocks/1/kernel/a", "blocks/1/kernel/b"),
        *("stacked/kernel/a", "stacked/kernel/b"),
    }
    back = rebuild(through_json(manifest), arrays, params)
    assert_same_bits(back, adapted)
    assert back["stacked"]["kernel"].base is params["stacked"]["kernel"]
    moved = {**params, "stacked": {"kernel": params["stacked"]["kernel"].at[0, 0, 0].add(1)}}
    with pytest.raises(ManifestError, match="'stacked/kernel' has other numbers"):
        rebuild(manifest, arrays, moved)
    with pytest.raises(ManifestError, match=r"'stacked/kernel' is float32\[2, 4, 5\] in the base tree"):
        rebuild(manifest, arrays, {**params, "stacked": {"kernel": params["stacked"]["kernel"][:2]}})
    with pytest.raises(ManifestError, match="'stacked/kernel' is missing from the base tree"):
        rebuild(manifest, arrays)


def test_base_keeps_what_differs_in_one_bit(params, assert_same_bits):
    # 0.0 equals -0.0 as a number, not as bytes.
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    tree = sj.adapt(params, {"w": sj.lora(rank=1)}, key=jax.random.key(0)) | {"b": -jnp.zeros(3)}
    _, arrays = describe(tree, params)
    assert set(arrays) == {"w/a", "w/b", "b"}
    assert_same_bits(round_trip(tree, params), tree)


def test_a_trainable_array_is_never_left_out():
    params = {"w": jnp.ones((4, 3))}
    tree = sj.adapt(params, {"w": sj.full()}, key=jax.random.key(0))
    assert set(describe(tree, params)[1]) == {"w/value"}


def test_methods_are_free_words(adapted):
    manifest, arrays = describe(adapted)
    text = json.dumps(manifest).replace('"method": "lora"', '"method": "a method of the future"')
    assert rebuild(json.loads(text), arrays)["stacked"]["kernel"].method == "a method of the future"


def test_rebuilds_without_models_and_data(adapted, tmp_path):
    manifest, arrays = describe(adapted)
    numbers = {name: np.asarray(value).astype(np.float32) for name, value in arrays.items()}
    np.savez(tmp_path / "arrays.npz", **numbers)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "names.json").write_text(json.dumps({n: v.dtype.name for n, v in arrays.items()}))
    # A package object without its __init__ stands in, because that imports everything.
    script = """
        import importlib.util, json, pathlib, sys, types
        import numpy as np
        folder = pathlib.Path(sys.argv[1])
        spec = importlib.util.find_spec("subspace_jax")
        package = types.ModuleType("subspace_jax")
        package.__path__ = spec.submodule_search_locations
        sys.modules["subspace_jax"] = package
        import subspace_jax.io as io
        import jax.numpy as jnp
        dtypes = json.loads((folder / "names.json").read_text())
        arrays = {n: v.astype(jnp.dtype(dtypes[n])) for n, v in np.load(folder / "arrays.npz").items()}
        tree = io.rebuild(json.loads((folder / "manifest.json").read_text()), arrays)
        loaded = [m for m in sys.modules if m.startswith("subspace_jax.")]
        assert not any(m.startswith(("subspace_jax.data", "subspace_jax.models")) for m in loaded), loaded
        assert not any(m.startswith("orbax") for m in sys.modules), "orbax is slow, and was not asked for"
        kernel = tree["stacked"]["kernel"]
        print(type(kernel).__name__, kernel.method, kernel.scale, float(kernel.materialize().sum()))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    kernel = adapted["stacked"]["kernel"]
    assert out[:3] == ["LowRank", "lora", str(kernel.scale)]
    assert float(out[3]) == float(kernel.materialize().sum())


def test_descriptions_of_before_have_scales_among_the_static_fields(adapted, assert_same_bits):
    """Up to version 0.1 a scale was static, in both halves of a partition."""

    def as_before(node):
        if isinstance(node, list):
            return [as_before(item) for item in node]
        if not isinstance(node, dict):
            return node
        node = {k: as_before(v) for k, v in node.items()}
        if node.get("node") == "weight" and "scale" in sj.core.Weight.classes[node["class"]].number_names():
            scale = node["data"].pop("scale", {"number": 1.0})
            node["static"]["scale"] = scale["number"]
        return node

    trainable, frozen = sj.partition(adapted)
    for tree in (adapted, trainable, frozen):
        manifest, arrays = describe(tree)
        before = as_before(manifest)
        assert before != manifest
        back = rebuild(json.loads(json.dumps(before)), arrays)
        assert_same_bits(back, tree)


def edited(manifest, path, value):
    manifest = copy.deepcopy(manifest)
    *parents, last = path
    place = manifest
    for name in parents:
        place = place[name]
    if value is Ellipsis:
        del place[last]
    else:
        place[last] = value
    return manifest


WEIGHT = ("tree", "items", 0, 1)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), "something else", "format 'something else'"),
        (("format_version",), 2, "format_version 2"),
        (("format_version",), True, "format_version True"),
        (("tree",), ..., "no node"),
        (("tree", "node"), "future", "no node"),
        (("tree", "items", 0), [1.5, None], "not an entry of a dict"),
        ((*WEIGHT, "class"), "LowRnak", "w: .*'LowRnak' is not known.*'LowRank'"),
        ((*WEIGHT, "static", "sclae"), 1.0, "w: LowRank has no static field 'sclae'"),
        ((*WEIGHT, "static", "scale"), "big", r"w\.scale: holds 'big', expected float"),
        ((*WEIGHT, "static", "role"), ..., "w: LowRank misses its static field 'role'"),
        ((*WEIGHT, "static", "role"), None, r"w\.role: holds None, expected Role"),
        ((*WEIGHT, "static", "trainable"), {"tuple": ["c"]}, "w: LowRank cannot train 'c'"),
        ((*WEIGHT, "data", "c"), {"node": "none"}, "w: LowRank has no field 'c'"),
        ((*WEIGHT, "data", "a", "shape"), [-1, 2], "w/a: .* does not describe an array"),
        ((*WEIGHT, "data", "a", "shape"), "ab", "w/a: .* does not describe an array"),
        ((*WEIGHT, "data", "a", "dtype"), "object", "w/a: 'object' is no dtype"),
        ((*WEIGHT, "data", "a", "key"), "no such generator", "w/a"),
    ],
)
def test_damaged_manifests(path, value, words):
    tree = sj.adapt({"w": jnp.ones((4, 3))}, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
    manifest, arrays = describe(tree)
    with pytest.raises(ManifestError, match=words):
        rebuild(edited(manifest, path, value), arrays)


def test_static_field_with_default_may_be_missing():
    tree = sj.adapt({"w": jnp.ones((4, 3))}, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
    manifest, arrays = describe(tree)
    assert rebuild(edited(manifest, (*WEIGHT, "static", "dropout"), ...), arrays)["w"].dropout == 0.0


def test_deeply_nested_manifest_is_refused():
    node = {"node": "none"}
    for _ in range(100_000):
        node = {"node": "list", "items": [node]}
    with pytest.raises(ManifestError, match="too deeply"):
        rebuild({"format": "subspace_jax.tree", "format_version": 1, "tree": node}, {})
    while node["node"] == "list":  # taken apart by hand: the interpreter would recurse
        node = node["items"].pop()


def test_two_classes_of_one_name_are_refused(adapted):
    kernel = adapted["stacked"]["kernel"]
    Weight.classes["LowRank"] = type("LowRank", (), {})
    try:
        with pytest.raises(ManifestError, match="two classes"):
            describe({"w": kernel})
    finally:
        Weight.classes["LowRank"] = LowRank


def with_shared_bases():
    params = {"a": jax.random.normal(jax.random.key(0), (40, 30)), "b": {"c": jnp.ones((2, 30, 40))}}
    roles = {"b/c": sj.Role.dense((1,), (2,), (0,))}
    return sj.adapt(params, {"**": sj.randlora(4, seed=3)}, key=jax.random.key(1), roles=roles)


def test_arrays_that_static_fields_give_are_left_out(assert_same_bits):
    tree = with_shared_bases()
    manifest, arrays = describe(tree)
    assert sorted(arrays) == [f"{p}/{n}" for p in ("a", "b/c") for n in ("base", "feature_scales", "rank_scales")]
    back = rebuild(through_json(manifest), arrays)
    assert_same_bits(back, tree)
    for half in sj.partition(tree):
        assert_same_bits(round_trip(half), half)
    nested = sj.adapt({"w": jnp.ones((6, 5))}, {"w": sj.dora(sj.randlora(2))}, key=jax.random.key(0))
    assert not [path for path in describe(nested)[1] if "basis" in path]
    assert_same_bits(round_trip(nested), nested)


def test_arrays_that_hold_something_else_are_kept(assert_same_bits):
    tree = with_shared_bases()
    for other in (tree["a"].basis_b.at[0, 0, 0].add(1e-6), tree["a"].basis_b[:, :, :20], np.asarray(tree["a"].basis_b)):
        changed = {**tree, "a": dataclasses.replace(tree["a"], basis_b=other)}
        manifest, arrays = describe(changed)
        assert "a/basis_b" in arrays
        assert "a/basis_a" not in arrays
        assert_same_bits(rebuild(through_json(manifest), arrays), changed)


def test_a_traced_array_is_refused_by_path():
    tree = with_shared_bases()["a"]
    with pytest.raises(ManifestError, match=r"a/basis_.: is traced"):
        jax.jit(lambda basis: describe({"a": dataclasses.replace(tree, basis_a=basis)})[1])(tree.basis_a)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m["static"].update(seed=4),
            "a/basis_a: .*other numbers than were saved.*jax_threefry_partitionable",
        ),
        (lambda m: m["data"]["basis_b"].update(regenerated="0" * 64), "a/basis_b: .*other numbers than were saved"),
        (lambda m: m["data"]["basis_b"].update(regenerated=3), "a/basis_b: .*is no node"),
        (lambda m: m["data"]["basis_b"].update(shape=[8, 4, 41]), "a/basis_b: was saved as float32.8, 4, 41., and the"),
        (
            lambda m: m["data"].update(feature_scales={**m["data"]["feature_scales"], "regenerated": "0" * 64}),
            "RandomBases cannot make 'feature_scales' of its static fields",
        ),
        (
            lambda m: m["static"].update(bases_shape={"tuple": [8, 4, 40, -30]}),
            "a/basis_.: was saved as float32.* give float32",
        ),
        (lambda m: m["static"].update(seed=-(2**70)), "a/basis_.: .*do not give it again"),
    ],
)
def test_changed_manifests_of_regenerated_arrays(change, words):
    manifest, arrays = describe(with_shared_bases())
    manifest = through_json(manifest)
    (node,) = [node for key, node in manifest["tree"]["items"] if key == "a"]
    change(node)
    with pytest.raises(ManifestError, match=f"(?s){words}"):
        rebuild(manifest, arrays)


def test_another_random_generator_is_refused():
    manifest, arrays = describe(with_shared_bases())
    before = jax.config.jax_threefry_partitionable
    jax.config.update("jax_threefry_partitionable", not before)
    try:
        with pytest.raises(ManifestError, match="jax_threefry_partitionable is not that of the run"):
            rebuild(manifest, arrays)
    finally:
        jax.config.update("jax_threefry_partitionable", before)
