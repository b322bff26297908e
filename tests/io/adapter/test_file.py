import json
import os

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from flax.core import freeze
from hypothesis import HealthCheck, given, settings

import subspace_jax as sj
from subspace_jax.io import AdapterFileError, load_adapter, read_safetensors, save_adapter


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def test_round_trip(path, params, adapted, assert_same_bits):
    assert save_adapter(path, adapted, base=params) == path
    assert_same_bits(load_adapter(path, params), adapted)
    tensors, _ = read_safetensors(path)
    assert sorted(tensors) == [
        *("blocks/0/kernel/a", "blocks/0/kernel/b", "blocks/1/kernel/a", "blocks/1/kernel/b"),
        *("embed/value", "stacked/kernel/a", "stacked/kernel/b"),
    ]
    np.testing.assert_array_equal(tensors["stacked/kernel/a"], adapted["stacked"]["kernel"].a)


def test_round_trip_without_base_stores_the_bases(path, params, adapted, assert_same_bits):
    save_adapter(path, adapted)
    assert_same_bits(load_adapter(path, params), adapted)
    assert "stacked/kernel/base" in read_safetensors(path)[0]
    assert "norm/0" not in read_safetensors(path)[0]


def test_pissa_keeps_its_residual(path, assert_same_bits):
    params = {"w": jax.random.normal(jax.random.key(0), (64, 48)), "b": jnp.zeros(48)}
    sizes = {}
    for name, method in {"lora": sj.lora(rank=2), "pissa": sj.pissa(rank=2), "dora": sj.dora(sj.lora(rank=2))}.items():
        tree = sj.adapt(params, {"w": method}, key=jax.random.key(1))
        save_adapter(path, tree, base=params)
        sizes[name] = path.stat().st_size
        assert_same_bits(load_adapter(path, params), tree)
    assert sizes["lora"] < 64 * 48 * 4 < sizes["pissa"]
    assert sizes["dora"] < 64 * 48 * 4


def test_moved_plain_arrays_are_stored(path, params, adapted, assert_same_bits):
    moved = {**adapted, "norm": (adapted["norm"][0] + 1, adapted["norm"][1])}
    save_adapter(path, moved, base=params)
    assert "norm/0" in read_safetensors(path)[0]
    assert_same_bits(load_adapter(path, params), moved)


def test_other_containers(path, params, adapted, assert_same_bits):
    frozen = freeze({"params": {"w": params["embed"]}})
    tree = sj.adapt(frozen, {"**/w": sj.lora(rank=2)}, key=jax.random.key(0))
    save_adapter(path, tree, base=frozen)
    assert_same_bits(load_adapter(path, frozen), tree)


def test_small_dtypes(path, assert_same_bits):
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    for name in ("int4", "uint4", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float4_e2m1fn"):
        tree = sj.adapt(params, {"w": sj.lora(rank=1)}, key=jax.random.key(0))
        tree = {"w": type(tree["w"])(**{**vars(tree["w"]), "base": params["w"].astype(jnp.dtype(name))})}
        save_adapter(path, tree, base=params)
        assert_same_bits(load_adapter(path, params), tree)


def test_loads_with_the_base_s_own_arrays(path, params, adapted):
    save_adapter(path, adapted, base=params)
    assert load_adapter(path, params)["stacked"]["kernel"].base is params["stacked"]["kernel"]


def test_wrong_parameters(path, params, adapted):
    save_adapter(path, adapted, base=params)
    others = {
        "'blocks/0/bias' is in the file, not in the parameters": lambda p: p["blocks"][0].pop("bias"),
        "'head' is in the parameters, not in the file": lambda p: p.update(head=jnp.ones(2)),
        r"'embed' is float32\[7, 5\] in the parameters, and the Full stands for float32\[7, 4\]": lambda p: p.update(
            embed=jnp.ones((7, 5))
        ),
        r"'stacked/kernel' is bfloat16\[3, 4, 5\] in the base tree, expected float32": lambda p: p["stacked"].update(
            kernel=p["stacked"]["kernel"].astype(jnp.bfloat16)
        ),
        "'stacked/kernel' has other numbers": lambda p: p["stacked"].update(kernel=p["stacked"]["kernel"] + 1),
    }
    for words, change in others.items():
        copy = jax.tree.map(lambda x: x, params)
        change(copy)
        with pytest.raises(AdapterFileError, match=words) as caught:
            load_adapter(path, copy)
        assert str(path) in str(caught.value)


def test_other_numbers_on_purpose(path, params, adapted):
    save_adapter(path, adapted, base=params)
    other = {**params, "stacked": {"kernel": params["stacked"]["kernel"] + 1}}
    loaded = load_adapter(path, other, verify=False)
    np.testing.assert_array_equal(loaded["stacked"]["kernel"].base, other["stacked"]["kernel"])


def rewrite(path, change):
    """Writes the file again with the format's own library, after changing tensors and manifest."""
    tensors, metadata = read_safetensors(path)
    manifest = json.loads(metadata["subspace_jax"])
    change(tensors, manifest)
    safetensors.numpy.save_file(tensors, path, {"subspace_jax": json.dumps(manifest)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.pop("stacked/kernel/a"), r"'stacked/kernel/a' is missing, expected float32\[3, 4, 2\]"),
        (lambda t, m: t.update(more=np.ones(2)), "'more' is not expected"),
        (
            lambda t, m: t.update({"stacked/kernel/a": np.ones((3, 2, 4), np.float32)}),
            r"'stacked/kernel/a' holds float32\[3, 2, 4\], expected float32\[3, 4, 2\]",
        ),
        (
            lambda t, m: t.update({"stacked/kernel/a": t["stacked/kernel/a"].astype(ml_dtypes.bfloat16)}),
            "'stacked/kernel/a' holds bfloat16",
        ),
        (lambda t, m: m.update(format_version=99), "format_version 99"),
        (lambda t, m: m.update(format="subspace_jax.tree"), "format 'subspace_jax.tree'"),
        (lambda t, m: m["leaves"].pop("norm/0"), "'norm/0' is in the parameters, not in the file"),
        (lambda t, m: m.update(leaves=[]), "no leaves"),
        (
            lambda t, m: m["leaves"]["stacked/kernel"]["static"].update(dtype={"dtype": "float16"}),
            "the LowRank stands for float16",
        ),
        (
            lambda t, m: m["leaves"]["stacked/kernel"]["data"].update(base={"node": "none"}),
            "stacked/kernel: parts of the LowRank are missing",
        ),
    ],
)
def test_changed_files(path, params, adapted, change, words):
    save_adapter(path, adapted, base=params)
    rewrite(path, change)
    with pytest.raises(AdapterFileError, match=words):
        load_adapter(path, params)


def test_foreign_files(path, params):
    safetensors.numpy.save_file({"a": np.ones(2)}, path)
    with pytest.raises(AdapterFileError, match="not written by save_adapter"):
        load_adapter(path, params)
    safetensors.numpy.save_file({"a": np.ones(2)}, path, {"subspace_jax": "[" * 100_000})
    with pytest.raises(AdapterFileError, match="no JSON"):
        load_adapter(path, params)


@pytest.mark.parametrize(
    ("tree", "base", "words"),
    [
        (lambda p, a: p, None, "no stand-in weight"),
        (lambda p, a: sj.partition(a)[0], None, "combine"),
        (lambda p, a: a, lambda p, a: a, "base tree holds a LowRank"),
        (lambda p, a: a, lambda p, a: {"embed": p["embed"]}, "'norm/0' is in the adapted tree, not in base"),
        (lambda p, a: a, lambda p, a: {**p, "embed": p["embed"].T}, "'embed' is float32.4, 7. in the parameters"),
        (lambda p, a: {**a, "x": 3}, None, "x: holds a int"),
    ],
)
def test_refused_saves_write_nothing(tmp_path, params, adapted, tree, base, words):
    given = None if base is None else base(params, adapted)
    with pytest.raises(AdapterFileError, match=words):
        save_adapter(tmp_path / "x.safetensors", tree(params, adapted), base=given)
    assert os.listdir(tmp_path) == []


def test_failed_write_keeps_the_old_file(path, params, adapted, monkeypatch):
    save_adapter(path, adapted, base=params)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(AdapterFileError, match="disk full"):
        save_adapter(path, adapted)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Parameters and the bytes of their adapter's file, which every example below changes."""
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    tree = sj.adapt(params, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
    return params, save_adapter(tmp_path_factory.mktemp("saved") / "file", tree, base=params).read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_manifests_are_loaded_or_refused(path, saved, data):
    params, content = saved
    path.write_bytes(content)

    def change(tensors, manifest):
        place = manifest
        while data.draw(st.integers(0, 4)) and any(isinstance(v, (dict, list)) for v in _values(place)):
            place = data.draw(st.sampled_from([v for v in _values(place) if isinstance(v, (dict, list))]))
        if isinstance(place, dict):
            name = data.draw(st.sampled_from(sorted(place)) | st.text(max_size=6)) if place else "x"
            place[name] = data.draw(json_values)
        elif place:
            place[data.draw(st.integers(0, len(place) - 1))] = data.draw(json_values)

    rewrite(path, change)
    before = path.read_bytes()
    message = str(path)
    try:
        load_adapter(path, params)
    except AdapterFileError as error:
        message = str(error)
    assert str(path) in message
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def _values(place):
    return list(place.values()) if isinstance(place, dict) else place


def test_bases_that_a_seed_gives_are_not_in_the_file(path, assert_same_bits):
    params = {f"layer_{i}": jax.random.normal(jax.random.key(i), (96, 128)) for i in range(3)}
    tree = sj.adapt(params, {"*": sj.randlora(16, seed=9)}, key=jax.random.key(0))
    save_adapter(path, tree, base=params)
    tensors, metadata = read_safetensors(path)
    assert sorted(tensors) == [f"layer_{i}/{n}" for i in range(3) for n in ("feature_scales", "rank_scales")]
    values = 4 * 3 * 6 * (16 + 96)
    assert path.stat().st_size < values + 3 * 2500 < tree["layer_0"].basis_b.nbytes
    assert metadata["subspace_jax"].count('"regenerated"') == 2
    assert tree["layer_0"].basis_a.tobytes()[:64] not in path.read_bytes()
    loaded = load_adapter(path, params)
    assert_same_bits(loaded, tree)
    assert_same_bits(sj.merge(loaded), sj.merge(tree))

    def other_seed(tensors, manifest):
        manifest["leaves"]["layer_0"]["static"]["seed"] = 8

    rewrite(path, other_seed)
    with pytest.raises(AdapterFileError, match="layer_0/basis_a: was left out of the file because the RandomBases"):
        load_adapter(path, params)


def test_bases_of_another_origin_are_in_the_file(path, assert_same_bits):
    params = {"w": jnp.ones((6, 8)), "v": jnp.ones((8, 6))}
    tree = sj.adapt(params, {"*": sj.randlora(2)}, key=jax.random.key(0))
    owner = next(name for name, weight in tree.items() if weight.basis_a is not None)
    foreign = type(tree[owner])(**{**vars(tree[owner]), "basis_a": jnp.ones((2, 6))})
    save_adapter(path, {**tree, owner: foreign}, base=params)
    assert f"{owner}/basis_a" in read_safetensors(path)[0]
    assert_same_bits(load_adapter(path, params), {**tree, owner: foreign})


def test_a_file_of_old_paths_loads_onto_variables_of_nnx(path):
    """Once `.value` of a variable was a name in its path; a dict with that key writes the same file."""
    kernel, bias = jnp.arange(12.0).reshape(4, 3), jnp.ones(3)
    old = {"l": {"kernel": {"value": kernel}, "bias": {"value": bias}}}
    adapted = sj.adapt(old, {"l/kernel/value": sj.lora(2)}, key=jax.random.key(0))
    save_adapter(path, adapted, base=old)
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model.kernel[...], model.bias[...] = kernel, bias
    base = nnx.state(nnx.Dict(l=model))
    found = dict(sj.core.leaves_with_paths(load_adapter(path, base)))
    np.testing.assert_array_equal(found["l/kernel"].a, adapted["l"]["kernel"]["value"].a)
    again = load_adapter(save_adapter(path, load_adapter(path, base), base=base), base)
    np.testing.assert_array_equal(
        dict(sj.core.leaves_with_paths(again))["l/kernel"].a, adapted["l"]["kernel"]["value"].a
    )


def rng_params(**shapes):
    return {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}


def data_start(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("with_base", [True, False])
def test_a_flipped_bit_anywhere_in_the_data_is_refused(path, params, adapted, with_base):
    save_adapter(path, adapted, base=params if with_base else None)
    whole, start = path.read_bytes(), data_start(path)
    places = np.random.default_rng(0).integers(8 * start, 8 * len(whole), 40)
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(AdapterFileError, match="damaged: copy or download it again") as caught:
            load_adapter(path, params)
        assert str(path) in str(caught.value)


def test_a_changed_number_in_the_manifest_is_refused(path, params, adapted):
    save_adapter(path, adapted, base=params)
    whole = path.read_bytes()
    scale = b'\\"number\\":1.0'
    assert scale in whole
    path.write_bytes(whole.replace(scale, scale[:-3] + b"3.0", 1))
    with pytest.raises(AdapterFileError, match="damaged"):
        load_adapter(path, params)


def test_files_without_checksum_and_fingerprints_load(path, params, adapted, assert_same_bits):
    save_adapter(path, adapted, base=params)
    rewrite(path, lambda tensors, manifest: manifest.pop("base"))
    assert list(read_safetensors(path)[1]) == ["subspace_jax"]
    assert_same_bits(load_adapter(path, params), adapted)


@pytest.mark.parametrize("method", [sj.pissa(2), sj.loldu(), sj.lora(2)], ids=["pissa", "loldu", "lora"])
def test_a_base_of_other_values_is_refused_by_path(path, method, assert_same_bits):
    """Also where the file holds all that the weight is made of, so that no array of the base is read."""
    params = rng_params(w=(8, 6), v=(8, 6))
    tree = sj.adapt(params, {"w": method}, key=jax.random.key(0))
    save_adapter(path, tree, base=params)
    other = {**params, "w": params["w"].at[3, 2].add(1e-3)}
    with pytest.raises(AdapterFileError, match=r"'w' has other numbers in the base.*\n.*verify=False") as caught:
        load_adapter(path, other)
    assert str(path) in str(caught.value)
    assert "'v'" not in str(caught.value)
    assert load_adapter(path, other, verify=False)["w"].trainable == tree["w"].trainable
    assert_same_bits(load_adapter(path, params), tree)


def test_a_head_that_learns_as_a_whole_may_be_drawn_anew(path, assert_same_bits):
    params = rng_params(w=(8, 6), head=(6, 3))
    tree = sj.adapt(params, {"w": sj.lora(2), "head": sj.full()}, key=jax.random.key(0))
    tree = {**tree, "head": type(tree["head"])(**{**vars(tree["head"]), "value": tree["head"].value + 1})}
    save_adapter(path, tree, base=params)
    assert_same_bits(load_adapter(path, {**params, "head": jnp.zeros((6, 3))}), tree)


def test_a_part_without_the_weight_that_owns_the_bases_is_refused(path, assert_same_bits):
    params = {"first": {"w": jnp.ones((6, 8))}, "second": {"w": jnp.ones((8, 6))}}
    tree = sj.adapt(params, {"*/w": sj.randlora(2)}, key=jax.random.key(0))
    owner, reader = ("first", "second") if tree["first"]["w"].basis_a is not None else ("second", "first")
    with pytest.raises(AdapterFileError, match=f"stored as 'basis_a' at {owner}/w.*resolve_links"):
        save_adapter(path, tree[reader], base=params[reader])
    assert not path.exists()
    alone = sj.core.resolve_links(tree)[reader]
    save_adapter(path, alone, base=params[reader])
    loaded = load_adapter(path, params[reader])
    assert_same_bits(loaded, alone)
    np.testing.assert_array_equal(sj.merge(loaded)["w"], sj.merge(tree)[reader]["w"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_selection_stores_the_union_of_masks(path, dtype, assert_same_bits):
    params = {"w": jax.random.normal(jax.random.key(0), (3, 64, 96)).astype(dtype), "b": jnp.zeros(96)}
    method = sj.lift(1, filter_rank=2)
    roles = {"w": sj.Role.dense((1,), (2,), (0,))}
    tree = sj.adapt(params, {"w": method}, key=jax.random.key(0), roles=roles)
    save_adapter(path, tree, base=params)
    before = path.stat().st_size
    positions = set()
    for seed in range(2):
        values = 3 * jax.random.normal(jax.random.key(seed), tree["w"].values.shape)
        positions |= {(i, int(p)) for i, row in enumerate(np.asarray(tree["w"].indices)) for p in row}
        tree = {**tree, "w": type(tree["w"])(**{**vars(tree["w"]), "values": values})}
        tree, _ = sj.methods.lift.reselect_principal(tree, None, method, key=jax.random.key(9))
    assert not np.array_equal(tree["w"].base, params["w"])
    save_adapter(path, tree, base=params)
    tensors, _ = read_safetensors(path)
    changed = {(int(p) // (64 * 96), int(p) % (64 * 96)) for p in tensors["w/base/changed_at"]}
    assert changed <= positions
    assert path.stat().st_size < 3.5 * before < params["w"].nbytes
    loaded = load_adapter(path, params)
    assert_same_bits(loaded, tree)
    np.testing.assert_array_equal(sj.merge(loaded)["w"], sj.merge(tree)["w"])
    with pytest.raises(AdapterFileError, match="'w' has other numbers"):
        load_adapter(path, {**params, "w": params["w"] + 1})


def lifted(path):
    params = {"w": jnp.arange(600.0).reshape(20, 30)}
    tree = sj.adapt(params, {"w": sj.lift(1, filter_rank=1)}, key=jax.random.key(0))
    moved = type(tree["w"])(**{**vars(tree["w"]), "base": params["w"].at[0, :3].add(1)})
    save_adapter(path, {"w": moved}, base=params)
    return params


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"changed_at": np.array([0, 1, 600], np.int32)}, "w/base: has changed entries outside of its shape"),
        ({"changed_at": np.array([-1, 1, 2], np.int32)}, "w/base: has changed entries outside of its shape"),
        ({"changed_at": np.ones(3, np.float32)}, r"'w/base/changed_at' holds float32\[3\], expected int32"),
        ({"changed_to": np.ones(2, np.float32)}, r"'w/base/changed_to' holds float32\[2\], expected float32\[3\]"),
    ],
)
def test_changed_entries_that_do_not_fit(path, entries, words):
    params = lifted(path)
    rewrite(path, lambda tensors, _: tensors.update({f"w/base/{name}": v for name, v in entries.items()}))
    with pytest.raises(AdapterFileError, match=words):
        load_adapter(path, params)


def test_changed_entries_that_the_manifest_gives_wrongly(path):
    params = lifted(path)

    def fewer(tensors, manifest):
        tensors["w/base/changed_to"] = tensors["w/base/changed_to"][:2]
        manifest["leaves"]["w"]["data"]["base"]["changed_to"]["shape"] = [2]

    rewrite(path, fewer)
    with pytest.raises(AdapterFileError, match=r"w/base: its changed entries are .* do not fit"):
        load_adapter(path, params)
